"""From hidden states to log-probability, entropy and exact KL, without a [T, V] logits tensor.

With student logits z = (h W^T + bias) / temperature, teacher logits u likewise, p = softmax(z) and
q = softmax(u), the outputs per row and their gradients with respect to z are

    logprob    = log p[target]               d = onehot(target) - p
    entropy    = H = - sum p log p           d = - p (log p + H)
    reverse_kl = R = sum p (log p - log q)   d = p (log p - log q - R)
    forward_kl = sum q (log q - log p)       d = p - q

and then grad_hidden = (dz / temperature) W. With a = log sum e^z and b = log sum e^u,

    entropy    = a - sum p z
    reverse_kl = sum p (z - u) - a + b     forward_kl = sum q (u - z) - b + a

so running sums over the vocabulary suffice, kept relative to the largest logit seen so far
(`Sums`). The vocabulary is taken in parts of all rows at once: W is read once a direction. Forward
keeps only the inputs and [T] numbers, backward computes each part's logits again; small problems,
of one part, keep their logits instead. The weight's gradient is computed only if the weight
requires one; the teacher's side never gets any. Banned entries enter as a bias of -1e30 of the
matrix product: p is 0 there, and nothing has to be masked.

On a GPU the products are the matrix library's too, and Triton kernels (policy_head_triton.py) form
the same sums and gradients in one pass over each part's logits. Left out: second derivatives. A NaN
or infinity in a hidden state propagates to its own row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_head_inputs, check_head_teacher
from .dispatch import choose_impl
from .reference import IGNORED_TARGET, PolicyHeadOutput, policy_head_reference

STUDENT_OUTPUTS = ("logprob", "entropy")
TEACHER_OUTPUTS = ("teacher_logprob", "reverse_kl", "forward_kl")
OUTPUTS = STUDENT_OUTPUTS + TEACHER_OUTPUTS
DIFFERENTIABLE = ("logprob", "entropy", "reverse_kl", "forward_kl")
CHUNK_ELEMENTS = 1 << 21  # logits held at once: 8 MB in fp32, for each of student and teacher
# A GPU needs larger chunks to be busy: 168 MB of fp32 logits a side, and 84 MB of dz in bf16. So
# 256 tokens over a vocabulary of 151,936 are one part.
CUDA_CHUNK_ELEMENTS = 5 << 23
KEPT_ELEMENTS = 1 << 22  # up to this many logits in all, keep them for the backward
ALIGNED = 128  # parts of the vocabulary are multiples of it


def policy_head(
    hidden: Tensor,  # [T, D]
    weight: Tensor,  # [V, D]
    targets: Tensor,  # [T] int64, -100 marks a row without a target: it costs nothing and gives 0
    *,
    temperature: float = 1.0,  # divides the logits of student and teacher alike
    teacher_hidden: Tensor | None = None,  # [T, D']
    teacher_weight: Tensor | None = None,  # [V, D'], default: weight
    bias: Tensor | None = None,  # [V], added to the logits of both
    banned: Tensor | None = None,  # [V] bool, True: the entry has probability 0 under both
    want: Sequence[str] | None = None,  # names of PolicyHeadOutput; default: all that can be
    impl: str | None = None,
    chunk_elements: int | None = None,  # bound on logits held at once; given, none are kept
) -> PolicyHeadOutput:
    """The wanted outputs, in fp32 (fp64 for fp64 inputs); the others are None and cost nothing."""
    want = _check_want(want, teacher_hidden is not None)
    check_head_inputs(hidden, weight, targets, temperature, bias, banned)
    if teacher_hidden is not None:
        teacher_weight = weight if teacher_weight is None else teacher_weight
        check_head_teacher(hidden, weight, teacher_hidden, teacher_weight)
        teacher_hidden, teacher_weight = teacher_hidden.detach(), teacher_weight.detach()
    default = CUDA_CHUNK_ELEMENTS if hidden.is_cuda else CHUNK_ELEMENTS
    how = choose_impl(impl, hidden.device, has_triton=True)
    triton = how == "triton" and hidden.dtype != torch.float64
    kept = CUDA_CHUNK_ELEMENTS if hidden.is_cuda else KEPT_ELEMENTS
    keep = targets.numel() * weight.shape[0] <= kept and chunk_elements is None
    head = _Head(temperature, banned, want, chunk_elements or default, keep, triton)
    if how == "reference":
        return _reference(hidden, weight, targets, teacher_hidden, teacher_weight, bias, head)

    counted = (targets != IGNORED_TARGET).nonzero()[:, 0]  # [T'], rows that have a target
    rows = targets.numel()
    if counted.numel() < rows:
        hidden, targets = hidden[counted], targets[counted]
        teacher_hidden = None if teacher_hidden is None else teacher_hidden[counted]
    if not head.needs_teacher:
        teacher_hidden = teacher_weight = None
    values = _OnlineHead.apply(hidden, weight, bias, targets, teacher_hidden, teacher_weight, head)
    if counted.numel() < rows:
        values = [value.new_zeros(rows).index_copy(0, counted, value) for value in values]
    return PolicyHeadOutput(**dict(zip(want, values, strict=True)))


@dataclass(frozen=True)
class _Head:
    """What does not change from row to row."""

    temperature: float
    banned: Tensor | None
    want: tuple[str, ...]
    chunk_elements: int
    keep: bool  # the logits, for the backward
    triton: bool

    @property
    def needs_teacher(self) -> bool:
        return any(name in TEACHER_OUTPUTS for name in self.want)


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

    def logits(self, part: slice, head: _Head) -> tuple[Tensor, Tensor | None]:
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

    def products(self, part: slice) -> tuple[Tensor, Tensor]:
        """h W^T of one part in fp32 for the Triton kernels; no teacher: its place is not read."""
        weight = self.weight[part]
        student = _product(self.hidden, weight.T)
        if self.teacher_hidden is None:
            return student, student
        return student, _product(self.teacher_hidden, self.teacher_weight[part].T)


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


def _part_sums(
    z: Tensor, u: Tensor | None, targets: Tensor, part: slice, want: tuple[str, ...]
) -> Sums:
    """The sums of one part of the vocabulary, from its logits [T, width]; only those wanted."""

    inside, place = _targets_in(part, targets)

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


def _stack(one: Sums, two: Sums) -> Sums:
    """The sums of two parts of the vocabulary, fields [2, T]."""
    pairs = zip(vars(one).values(), vars(two).values(), strict=True)
    return Sums(*(None if x is None else torch.stack([x, y]) for x, y in pairs))


def _targets_in(part: slice, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which targets lie in a part of the vocabulary [T], and a column of it for each [T, 1]."""
    inside = (targets >= part.start) & (targets < part.stop)
    return inside, (targets - part.start).clamp(0, part.stop - part.start - 1)[:, None]


def _part_gradient(z: Tensor, u: Tensor | None, targets: Tensor, part: slice, rows: Tensor):
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
    inside, place = _targets_in(part, targets)
    x.scatter_add_(1, place, torch.where(inside, of_logprob, 0.0)[:, None])
    if u is not None and of_forward.any():
        x.addcmul_((u - b[:, None]).exp_(), of_forward[:, None], value=-1)
    return x


class _OnlineHead(torch.autograd.Function):
    """The head by online sums over parts of the vocabulary, with the gradients written out."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, teacher_hidden, teacher_weight, head):
        sides = Sides(hidden, weight, bias, targets, teacher_hidden, teacher_weight)
        ctx.head = head
        ctx.set_materialize_grads(False)  # an output that the loss does not use has gradient None
        parts = _parts(hidden, weight, head)
        if head.triton:
            from .policy_head_triton import head_sums

            sums, logits = head_sums(sides, head, parts)
        else:
            sums = None
            for part in parts:
                logits = sides.logits(part, head)
                more = _part_sums(*logits, targets, part, head.want)
                sums = more if sums is None else _stack(sums, more).join()
        never = None if head.banned is None else head.banned[targets]
        values, rows = sums.outputs(never)
        # Saved so that the backward gives the logits up, not whoever holds the loss.
        kept = logits if head.keep else (None, None)
        inputs = hidden, weight, bias, targets, teacher_hidden, teacher_weight
        ctx.save_for_backward(*inputs, rows, *kept)
        outputs = tuple(values[name] for name in head.want)
        teacher_only = [
            o for name, o in zip(head.want, outputs, strict=True) if name == "teacher_logprob"
        ]
        ctx.mark_non_differentiable(*teacher_only)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        *inputs, rows, z, u = ctx.saved_tensors
        sides, head = Sides(*inputs), ctx.head
        kept = None if z is None else (z, u)
        hidden, weight, bias, targets = inputs[:4]
        named = dict(zip(head.want, grad_outputs, strict=True))
        zero = torch.zeros_like(rows[0])
        grads = torch.stack([zero if named.get(n) is None else named[n] for n in DIFFERENTIABLE])
        if head.banned is not None:  # nothing makes a banned target likelier
            grads[0].masked_fill_(head.banned[targets], 0.0)
        # divided by the temperature: with respect to h W^T + bias
        rows = torch.cat([rows, grads / head.temperature])  # [8, T]
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=rows.dtype) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=rows.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=rows.dtype) if needs_bias else None
        if head.triton:
            from .policy_head_triton import part_gradients

            gradient = part_gradients(sides, head, rows, kept)
        else:

            def gradient(part: slice) -> Tensor:
                logits = kept or sides.logits(part, head)
                return _part_gradient(*logits, targets, part, rows)

        for part in _parts(hidden, weight, head):
            dz = gradient(part)
            if needs_bias:
                grad_bias[part] = dz.sum(0, dtype=rows.dtype)
            dz = dz.to(weight.dtype)
            if needs_hidden:
                _add_product(grad_hidden, dz, weight[part])
            if needs_weight:
                _add_product(grad_weight[part], dz.T, hidden)
            del dz  # before the next part's is formed
        grads = zip((grad_hidden, grad_weight, grad_bias), inputs, strict=False)
        return *(None if g is None else g.to(x.dtype) for g, x in grads), None, None, None, None


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32, not rounded to the dtype of 16-bit inputs in between."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cpu:  # the interpreter's tests; a CPU has no such product
        return left.float() @ right.float()
    return torch.mm(left, right, out_dtype=torch.float32)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right; the sum over parts of the vocabulary is in total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cpu:
        total += left @ right
    else:
        total += _product(left, right)


def _parts(hidden: Tensor, weight: Tensor, head: _Head) -> list[slice]:
    """Parts of the vocabulary whose logits may exist at once."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    width = max(1, head.chunk_elements // max(rows, 1))
    if head.keep or width >= vocabulary:
        return [slice(0, vocabulary)]
    if width >= ALIGNED:
        width -= width % ALIGNED
    return [slice(at, min(at + width, vocabulary)) for at in range(0, vocabulary, width)]


def _reference(hidden, weight, targets, teacher_hidden, teacher_weight, bias, head):
    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double()

    full = policy_head_reference(
        wide(hidden),
        wide(weight),
        targets,
        head.temperature,
        wide(teacher_hidden),
        wide(teacher_weight),
        wide(bias),
        head.banned,
    )
    return PolicyHeadOutput(**{name: vars(full)[name] for name in head.want})


def _check_want(want: Sequence[str] | None, has_teacher: bool) -> tuple[str, ...]:
    possible = OUTPUTS if has_teacher else STUDENT_OUTPUTS
    want = possible if want is None else tuple(want)
    if not want or len(set(want)) < len(want) or not set(want) <= set(OUTPUTS):
        raise ValueError(f"want: expected different names out of {OUTPUTS}, got {want}")
    if not set(want) <= set(possible):
        raise ValueError(f"teacher_hidden: expected a tensor for want={want}, got None")
    return want
