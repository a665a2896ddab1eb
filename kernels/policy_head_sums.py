"""What the policy head sums over a part of the vocabulary, and the gradient of a part's logits.

The formulas are those of policy_head.py. A part's logits, or its products where Triton kernels do
the rest, are formed by `Sides.form`; `Sums` are kept relative to the largest logit seen so far and
are joined from part to part.

Left out: which parts there are, what is kept for the backward (policy_head.py).
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

STUDENT_OUTPUTS = ("logprob", "entropy")
TEACHER_OUTPUTS = ("teacher_logprob", "reverse_kl", "forward_kl")
OUTPUTS = STUDENT_OUTPUTS + TEACHER_OUTPUTS


@dataclass(frozen=True)
class Head:
    """What does not change from row to row."""

    temperature: float
    banned: Tensor | None
    want: tuple[str, ...]
    chunk_elements: int
    keep: bool  # the logits, for the backward
    how: str  # "reference", "torch", "triton"

    @property
    def needs_teacher(self) -> bool:
        return any(name in TEACHER_OUTPUTS for name in self.want)

    @property
    def triton(self) -> bool:
        return self.how == "triton"


def ban_bias(banned: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to logits so that `banned` [V] is never sampled; finite.  # [V]"""
    low = -3e4 if dtype == torch.float16 else -1e30
    return torch.zeros(banned.shape, dtype=dtype, device=banned.device).masked_fill_(banned, low)


@dataclass(frozen=True)
class Sides:
    """Both sides' inputs."""

    hidden: Tensor  # [T, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # [T]
    teacher_hidden: Tensor | None  # [T, D'], None where no output needs it
    teacher_weight: Tensor | None  # [V, D']

    def at(self, some: slice | Tensor) -> "Sides":
        """Some of the rows."""
        teacher = None if self.teacher_hidden is None else self.teacher_hidden[some]
        hidden, targets = self.hidden[some], self.targets[some]
        return replace(self, hidden=hidden, targets=targets, teacher_hidden=teacher)

    def logits(self, part: slice, head: Head) -> tuple[Tensor, Tensor | None]:
        """Logits z and u of one part of the vocabulary, in fp32 or wider.  # [T, width]"""
        ban = None
        if head.banned is not None:
            ban = ban_bias(head.banned[part], self.weight.dtype)
        sides = [(self.hidden, self.weight)]
        if head.needs_teacher:
            sides.append((self.teacher_hidden, self.teacher_weight))
        logits = []
        for hidden, weight in sides:
            x = F.linear(hidden, weight[part], ban)
            x = x.to(torch.promote_types(x.dtype, torch.float32))
            if self.bias is not None:
                x += self.bias[part]
            if head.temperature != 1.0:
                x /= head.temperature
            logits.append(x)
        return (*logits, None)[:2]

    def form(self, part: slice, head: Head) -> tuple[Tensor, Tensor | None]:
        """What the sums and gradients of a part are made of: logits, or products for Triton."""
        return self.products(part) if head.triton else self.logits(part, head)

    def products(self, part: slice) -> tuple[Tensor, Tensor]:
        """h W^T of one part in fp32 for the Triton kernels; no teacher: its place is not read.

        Where the part is the whole vocabulary and both sides share the head, the rows of both are
        one product: few rows alone would leave a GPU's tensor cores idle in part.
        """
        weight = self.weight[part]
        if self.teacher_hidden is None:
            student = product(self.hidden, weight.T)
            return student, student
        if len(weight) == len(self.weight) and is_same(self.weight, self.teacher_weight):
            both = torch.cat([self.hidden, self.teacher_hidden])
            return product(both, weight.T).chunk(2)
        student = product(self.hidden, weight.T)
        return student, product(self.teacher_hidden, self.teacher_weight[part].T)


@dataclass
class Sums:
    """Sums over the vocabulary, or a part of it, relative to its largest logit.  # [T] each"""

    m: Tensor  # max z
    p: Tensor  # sum e^(z-m)
    pz: Tensor  # sum e^(z-m) (z-m)
    z_target: Tensor
    n: Tensor | None = None  # max u
    q: Tensor | None = None  # sum e^(u-n)
    pd: Tensor | None = None  # sum e^(z-m) (z-u)
    qd: Tensor | None = None  # sum e^(u-n) (u-z)
    u_target: Tensor | None = None

    def join(self) -> "Sums":
        """The sums of the whole vocabulary from those of its parts, fields [parts, T] -> [T]."""
        m = self.m.amax(0)
        shift = self.m - m
        shrink = shift.exp()
        pz = ((self.pz + self.p * shift) * shrink).sum(0)
        out = Sums(m, (self.p * shrink).sum(0), pz, self.z_target.sum(0))
        if self.n is not None:
            out.pd, out.n = (self.pd * shrink).sum(0), self.n.amax(0)
            shrink = (self.n - out.n).exp()
            out.q, out.qd = (self.q * shrink).sum(0), (self.qd * shrink).sum(0)
            out.u_target = self.u_target.sum(0)
        return out

    def outputs(self, banned: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """Every output, and a, b, entropy and reverse KL for the backward [4, T].

        `banned` [T] marks rows whose target cannot be sampled.
        """
        log_p = self.p.log()  # of the sum; the largest logit is kept apart, so that digits remain
        a, entropy = self.m + log_p, log_p - self.pz / self.p
        b = reverse = torch.zeros_like(a)
        out = {"logprob": (self.z_target - self.m) - log_p, "entropy": entropy}
        if self.n is not None:
            log_q = self.q.log()
            b, a_less_b = self.n + log_q, (self.m - self.n) + (log_p - log_q)
            reverse = self.pd / self.p - a_less_b
            out["teacher_logprob"] = (self.u_target - self.n) - log_q
            out["reverse_kl"], out["forward_kl"] = reverse, self.qd / self.q + a_less_b
        if banned is not None:
            for name in {"logprob", "teacher_logprob"} & set(out):
                out[name] = out[name].masked_fill(banned, -torch.inf)
        return out, torch.stack([a, b, entropy, reverse])


def part_sums(
    z: Tensor, u: Tensor | None, targets: Tensor, part: slice, want: tuple[str, ...]
) -> Sums:
    """The sums of one part of the vocabulary, from its logits [T, width]; only those wanted."""

    inside, place = targets_in(part, targets)

    def of_target(x: Tensor) -> Tensor:
        return torch.where(inside, x.gather(1, place)[:, 0], 0.0)

    m = z.amax(1)
    shifted = z - m[:, None]
    p = shifted.exp()
    zero = torch.zeros_like(m)
    pz = torch.linalg.vecdot(p, shifted) if "entropy" in want else zero
    sums = Sums(m, p.sum(1), pz, of_target(z))
    if u is None:
        return sums
    d = torch.sub(z, u, out=shifted)
    sums.pd = torch.linalg.vecdot(p, d) if "reverse_kl" in want else zero
    sums.n = u.amax(1)
    q = torch.sub(u, sums.n[:, None], out=p).exp_()
    sums.q, sums.u_target = q.sum(1), of_target(u)
    sums.qd = -torch.linalg.vecdot(q, d) if "forward_kl" in want else zero
    return sums


def stack(one: Sums, two: Sums) -> Sums:
    """The sums of two parts of the vocabulary, fields [2, T]."""
    pairs = zip(vars(one).values(), vars(two).values(), strict=True)
    return Sums(*(None if x is None else torch.stack([x, y]) for x, y in pairs))


def targets_in(part: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which targets lie in a part of the vocabulary [T], and a column of it for each [T, 1]."""
    inside = (targets >= part.start) & (targets < part.stop)
    return inside, (targets - part.start).clamp(0, part.stop - part.start - 1)[:, None]


def part_gradient(z: Tensor, u: Tensor | None, targets: Tensor, part: slice, rows: Tensor):
    """d loss / d z of one part of the vocabulary.  # [T, width]

    rows [8, T]: a, b, entropy H, reverse KL R; d loss / d logprob, H, R, forward KL: l, h, r, f.
    The four formulas in one: dz = p ((r - h) z - r u + c) - f q + l onehot(target), where
    c = h (a - H) - r (a - b + R) - l + f.
    """
    a, b, entropy, reverse, of_logprob, of_entropy, of_reverse, of_forward = rows
    c = of_entropy * (a - entropy) - of_reverse * (a - b + reverse) - of_logprob + of_forward
    x = torch.addcmul(c[:, None], z, (of_reverse - of_entropy)[:, None])
    if u is not None:
        x.addcmul_(u, of_reverse[:, None], value=-1)
    x.mul_((z - a[:, None]).exp_())
    inside, place = targets_in(part, targets)
    x.scatter_add_(1, place, torch.where(inside, of_logprob, 0.0)[:, None])
    if u is not None and of_forward.any():
        x.addcmul_((u - b[:, None]).exp_(), of_forward[:, None], value=-1)
    return x


def is_same(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors are the same memory, read alike."""
    same = one.data_ptr() == two.data_ptr() and one.dtype == two.dtype
    return same and one.shape == two.shape and one.stride() == two.stride()


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32, not rounded to the dtype of 16-bit inputs in between."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cpu:  # the interpreter's tests; a CPU has no such product
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; the sum over parts of the vocabulary is in total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cpu:
        total += left @ right
    else:  # the sum is read and written by the product itself, not by a pass of its own
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
