"""The Triton kernels of the policy head: what is done to a chunk of logits between the products.

The products are the matrix library's, h W^T of a part of the vocabulary for each side, in fp32 and
without rounding in between; what it writes is read once and given up. Forward: a program takes a
row of the chunk, or a share of it, and adds it to `policy_head_sums.Sums`, which stay in memory
from part to part; when a block brings a larger logit, they shrink. One more launch joins the shares
and makes outputs of them. Backward: dz of the chunk, in the dtype of the head, for the product with
the head.

Importing this needs triton. Left out: fp64, which policy_head.py computes with PyTorch.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .policy_head_sums import OUTPUTS, Sides, ban_bias
from .tiles_triton import FUSED, rounded

# Entries of the vocabulary that a program holds at once. Sums are formed by a single warp, which
# finds its largest logit without waiting for others: measured 1.4 times as fast as by four.
SUM_BLOCK, SUM_WARPS = 512, 1
GRAD_BLOCK = 1024
PROGRAMS = 2112  # at least so many: sixteen for each of a large GPU's processors
ROWS = 128  # that are finished by one program
SUMS = 9  # numbers a row: m p pz z_target n q pd qd u_target
LOWEST = -3.0e38  # below any logit, and finite: no inf - inf
MASKED = tl.constexpr(LOWEST)


@triton.jit
def _logits(
    products,  # [T, width] float32
    bias,  # [V] float32
    inverse_temperature,
    row,
    column,  # [BLOCK]
    start,  # first entry of the vocabulary in this chunk
    width,
    BIASED: tl.constexpr,
):
    """(h W^T + bias) / temperature of one block of a row; MASKED beyond the chunk.  # [BLOCK]"""
    known = column < width
    z = tl.load(products + row * width + column, mask=known, other=0.0)
    if BIASED:
        z += tl.load(bias + start + column, mask=known, other=0.0)
    return tl.where(known, z * inverse_temperature, MASKED)


@triton.jit
def _add_chunk(
    student,  # [T, width] float32
    teacher,
    bias,
    targets,  # [T] int64
    sums,  # [shares, 9, T] float32
    inverse_temperature,
    start,
    width,
    share,  # entries of a row that one program adds
    T,
    TEACHER: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = sums + tl.program_id(1).to(tl.int64) * 9 * T + row
    m, n = tl.load(at), tl.load(at + 4 * T)
    first_m, first_n = m, n
    # Each lane adds up its own columns: across the lanes only the largest logit is looked for
    p = tl.zeros([BLOCK], dtype=tl.float32)
    pz, q, pd, qd = p, p, p, p
    first = tl.program_id(1) * share
    for begin in range(first, min(first + share, width), BLOCK):
        column = begin + tl.arange(0, BLOCK)
        z = _logits(student, bias, inverse_temperature, row, column, start, width, BIASED)
        largest = tl.maximum(m, tl.max(z, 0))
        if largest > m:
            shrink = tl.exp(m - largest)
            pz = shrink * (pz + p * (m - largest))
            p, pd, m = shrink * p, shrink * pd, largest
        shifted = z - m
        e = tl.exp(shifted)
        p += e
        pz += e * shifted
        if TEACHER:
            u = _logits(teacher, bias, inverse_temperature, row, column, start, width, BIASED)
            d = z - u
            pd += e * d
            largest = tl.maximum(n, tl.max(u, 0))
            if largest > n:
                shrink = tl.exp(n - largest)
                q, qd, n = shrink * q, shrink * qd, largest
            e = tl.exp(u - n)
            q += e
            qd -= e * d
    shift = first_m - m
    shrink = tl.exp(shift)
    sum_p = tl.load(at + T)
    sum_pz = tl.sum(pz, 0) + shrink * (tl.load(at + 2 * T) + sum_p * shift)
    sum_p = tl.sum(p, 0) + shrink * sum_p
    target = tl.load(targets + row) - start
    hit = (tl.program_id(1) == 0) & (target >= 0) & (target < width)  # or in another part
    target = tl.where(hit, target, 0)
    z = _logits(student, bias, inverse_temperature, row, target, start, width, BIASED)
    z_target = tl.load(at + 3 * T) + tl.where(hit, z, 0.0)
    if TEACHER:
        sum_pd = tl.sum(pd, 0) + shrink * tl.load(at + 6 * T)
        shrink = tl.exp(first_n - n)
        sum_q = tl.sum(q, 0) + shrink * tl.load(at + 5 * T)
        sum_qd = tl.sum(qd, 0) + shrink * tl.load(at + 7 * T)
        u = _logits(teacher, bias, inverse_temperature, row, target, start, width, BIASED)
        u_target = tl.load(at + 8 * T) + tl.where(hit, u, 0.0)
    tl.store(at, m)
    tl.store(at + T, sum_p)
    tl.store(at + 2 * T, sum_pz)
    tl.store(at + 3 * T, z_target)
    if TEACHER:
        tl.store(at + 4 * T, n)
        tl.store(at + 5 * T, sum_q)
        tl.store(at + 6 * T, sum_pd)
        tl.store(at + 7 * T, sum_qd)
        tl.store(at + 8 * T, u_target)


@triton.jit
def _grad_logits(
    student,  # [T, width] float32
    teacher,
    bias,
    targets,  # [T] int64
    rows,  # [8, T] float32, as in `policy_head_sums.part_gradient`
    dz,  # [T, width]
    inverse_temperature,
    start,
    width,
    T,
    TEACHER: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = rows + row
    a, entropy = tl.load(at), tl.load(at + 2 * T)
    of_logprob, of_entropy = tl.load(at + 4 * T), tl.load(at + 5 * T)
    z = _logits(student, bias, inverse_temperature, row, column, start, width, BIASED)
    log_p = z - a
    x = -of_entropy * (log_p + entropy) - of_logprob
    more = tl.where(column == tl.load(targets + row) - start, of_logprob, 0.0)
    if TEACHER:
        b, reverse = tl.load(at + T), tl.load(at + 3 * T)
        of_reverse, of_forward = tl.load(at + 6 * T), tl.load(at + 7 * T)
        u = _logits(teacher, bias, inverse_temperature, row, column, start, width, BIASED)
        log_q = u - b
        x += of_reverse * (log_p - log_q - reverse) + of_forward
        more -= of_forward * tl.exp(log_q)
    gradient = rounded(tl.exp(log_p) * x + more, dz.dtype.element_ty, 0, False)
    tl.store(dz + row * width + column, gradient, mask=column < width)


@triton.jit
def _finish(
    sums,  # [shares, 9, T] float32
    never,  # [T] bool, the target cannot be sampled
    logprob,  # [T] float32, as all that follow
    entropy,
    teacher_logprob,
    reverse_kl,
    forward_kl,
    rows,  # [4, T]: a, b, entropy, reverse KL
    shares,
    T,
    TEACHER: tl.constexpr,
    BANNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`Sums.join` and `Sums.outputs` at once."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = row < T
    at = sums + row
    m = tl.load(at, mask=here, other=0.0)
    n = tl.load(at + 4 * T, mask=here, other=0.0)
    for share in range(1, shares):
        m = tl.maximum(m, tl.load(at + share * 9 * T, mask=here, other=0.0))
        n = tl.maximum(n, tl.load(at + share * 9 * T + 4 * T, mask=here, other=0.0))
    p = tl.zeros([ROWS], dtype=tl.float32)
    pz, z, q, pd, qd, u = p, p, p, p, p, p
    for _ in range(shares):
        shift = tl.load(at, mask=here, other=0.0) - m
        shrink = tl.exp(shift)
        own = tl.load(at + T, mask=here, other=1.0)
        p += shrink * own
        pz += shrink * (tl.load(at + 2 * T, mask=here, other=0.0) + own * shift)
        z += tl.load(at + 3 * T, mask=here, other=0.0)
        if TEACHER:
            pd += shrink * tl.load(at + 6 * T, mask=here, other=0.0)
            shrink = tl.exp(tl.load(at + 4 * T, mask=here, other=0.0) - n)
            q += shrink * tl.load(at + 5 * T, mask=here, other=1.0)
            qd += shrink * tl.load(at + 7 * T, mask=here, other=0.0)
            u += tl.load(at + 8 * T, mask=here, other=0.0)
        at += 9 * T
    gone = tl.load(never + row, mask=here, other=0) != 0 if BANNED else row < 0
    log_p = tl.log(p)
    h = log_p - pz / p
    tl.store(logprob + row, tl.where(gone, float("-inf"), (z - m) - log_p), mask=here)
    tl.store(entropy + row, h, mask=here)
    tl.store(rows + row, m + log_p, mask=here)
    tl.store(rows + 2 * T + row, h, mask=here)
    if TEACHER:
        log_q = tl.log(q)
        difference = (m - n) + (log_p - log_q)
        reverse = pd / p - difference
        tl.store(teacher_logprob + row, tl.where(gone, float("-inf"), (u - n) - log_q), mask=here)
        tl.store(reverse_kl + row, reverse, mask=here)
        tl.store(forward_kl + row, qd / q + difference, mask=here)
        tl.store(rows + T + row, n + log_q, mask=here)
        tl.store(rows + 3 * T + row, reverse, mask=here)


Products = tuple[Tensor, Tensor]  # h W^T of student and teacher  # [T, width] each


def head_outputs(
    sides: Sides, head, parts: Sequence[slice], form: Callable[[slice], Products]
) -> tuple[dict[str, Tensor], Tensor]:
    """`Sums.outputs` of the whole vocabulary, part after part; `form` makes a part's products."""
    count, vocabulary = len(sides.hidden), len(sides.weight)
    shares = max(1, min(-(-PROGRAMS // max(count, 1)), -(-vocabulary // SUM_BLOCK)))
    sums = sides.hidden.new_zeros(shares, SUMS, count, dtype=torch.float32)
    sums[:, 0:5:4] = LOWEST  # m and n; a list of the two would be copied to the device first
    others, constants = _constants(sides, head)
    products = None
    for part in parts if count else ():
        width = part.stop - part.start
        share = SUM_BLOCK * -(-width // (shares * SUM_BLOCK))
        place = (1 / head.temperature, part.start, width, share, count)
        grid = (count, -(-width // share))
        products = None  # before there are new ones
        products = form(part)
        options = dict(BLOCK=SUM_BLOCK, num_warps=SUM_WARPS)
        _add_chunk[grid](*products, *others, sums, *place, **constants, **options)
    names = OUTPUTS if head.needs_teacher else OUTPUTS[:2]
    out = {name: sums.new_empty(count) for name in names}
    rows = sums.new_zeros(4, count)
    if count:
        never = sides.targets if head.banned is None else head.banned[sides.targets]
        places = [out.get(name, rows) for name in OUTPUTS]  # not written where there is no teacher
        options = dict(TEACHER=head.needs_teacher, BANNED=head.banned is not None, ROWS=ROWS)
        grid = (-(-count // ROWS),)
        _finish[grid](sums, never, *places, rows, shares, count, **options, **FUSED)
    return out, rows


def part_gradients(
    sides: Sides, head, rows: Tensor, form: Callable[[slice], Products]
) -> Callable[[slice], Tensor]:
    """`policy_head_sums.part_gradient` in the dtype of the head, from the products of `form`."""
    others, constants = _constants(sides, head)

    def gradient(part: slice) -> Tensor:
        count, width = len(sides.hidden), part.stop - part.start
        dz = sides.weight.new_empty(count, width)
        if count:
            place = (1 / head.temperature, part.start, width, count)
            grid = (count, -(-width // GRAD_BLOCK))
            inputs = (*form(part), *others, rows, dz)
            _grad_logits[grid](*inputs, *place, **constants, BLOCK=GRAD_BLOCK)
        return dz

    return gradient


def _constants(sides: Sides, head) -> tuple[tuple[Tensor, Tensor], dict]:
    """Bias with ban [V] (not read where there is neither) and targets; what is known beforehand."""
    biased = sides.bias is not None or head.banned is not None
    bias = sides.targets  # any address
    if biased:
        bias = torch.zeros(len(sides.weight), dtype=torch.float32, device=sides.weight.device)
        if sides.bias is not None:
            bias += sides.bias
        if head.banned is not None:
            bias += ban_bias(head.banned, torch.float32)
    constants = dict(TEACHER=head.needs_teacher, BIASED=biased, **FUSED)
    return (bias, sides.targets.contiguous()), constants
