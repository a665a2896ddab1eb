"""The Triton kernels of the policy head: online sums over the vocabulary, and d loss / d logits.

Forward: a program takes a block of rows and a part of the vocabulary, forms the logits z and the
teacher's u block by block, and keeps the sums of `policy_head.Sums` in registers; when a block
brings a larger logit, they shrink. The parts are joined as in PyTorch. Backward: a kernel forms the
logits of a part of the vocabulary again and writes dz in the dtype of the head; the product with
the head is left to the matrix library. Neither direction holds [T, V].

Importing this needs triton. Left out: fp64, which policy_head.py computes with PyTorch.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .policy_head import Sides, Sums, ban_bias
from .tiles_triton import WIDEN, rounded

BLOCK_T, BLOCK_D = 128, 64  # rows and entries of the vocabulary, width
SMALL = 32  # blocks of the interpreter, which pays by the program, and of short inputs
PROGRAMS = 264  # at least so many: two for each of a large GPU's processors
SUMS = 9  # numbers a row that the forward keeps
LOWEST = tl.constexpr(-3.0e38)  # below any logit, and finite: no inf - inf


@triton.jit
def _logits(
    hidden,  # [T, D]
    weight,  # [V, D]
    bias,  # [V] float32, zero where there is none
    inverse_temperature,
    t,  # [BT] rows
    v,  # [BV] entries of the vocabulary
    T,
    V,
    D,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    """(h W^T + bias) / temperature of one block; LOWEST beyond the vocabulary.  # [BT, BV]"""
    product = tl.zeros([BT, BV], dtype=tl.float32)
    for start in range(0, D, BD):
        d = start + tl.arange(0, BD)
        inside = (t[:, None] < T) & (d[None, :] < D)
        h = tl.load(hidden + t[:, None].to(tl.int64) * D + d[None, :], mask=inside, other=0.0)
        inside = (v[None, :] < V) & (d[:, None] < D)
        w = tl.load(weight + v[None, :].to(tl.int64) * D + d[:, None], mask=inside, other=0.0)
        if WIDEN:
            h, w = h.to(tl.float32), w.to(tl.float32)
        product = tl.dot(h, w, product, input_precision="ieee")
    more = tl.load(bias + v, mask=v < V, other=0.0)
    return tl.where(v[None, :] < V, (product + more[None, :]) * inverse_temperature, LOWEST)


@triton.jit
def _forward(
    hidden,
    weight,
    teacher_hidden,
    teacher_weight,
    bias,
    targets,  # [T] int64
    parts,  # [splits, 9, T] float32, as in `Sums`: m p pz z_target n q pd qd u_target
    inverse_temperature,
    T,
    V,
    D,
    teacher_D,
    blocks_per_split,
    TEACHER: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    target = tl.load(targets + t, mask=t < T, other=-1)
    m = tl.full([BT], LOWEST, dtype=tl.float32)
    n = tl.full([BT], LOWEST, dtype=tl.float32)
    sum_p = tl.zeros([BT], dtype=tl.float32)
    sum_pz = tl.zeros([BT], dtype=tl.float32)
    sum_q = tl.zeros([BT], dtype=tl.float32)
    sum_pd = tl.zeros([BT], dtype=tl.float32)
    sum_qd = tl.zeros([BT], dtype=tl.float32)
    z_target = tl.zeros([BT], dtype=tl.float32)
    u_target = tl.zeros([BT], dtype=tl.float32)
    first = tl.program_id(1) * blocks_per_split
    for block in range(first, min(first + blocks_per_split, tl.cdiv(V, BV))):
        v = block * BV + tl.arange(0, BV)
        known = v[None, :] < V
        hit = v[None, :] == target[:, None]
        z = _logits(hidden, weight, bias, inverse_temperature, t, v, T, V, D, BT, BV, BD)
        z_target += tl.sum(tl.where(hit, z, 0.0), 1)
        new_m = tl.maximum(m, tl.max(z, 1))
        shrink = tl.exp(m - new_m)
        shifted = tl.where(known, z - new_m[:, None], 0.0)
        p = tl.where(known, tl.exp(shifted), 0.0)
        sum_pz = shrink * (sum_pz + sum_p * (m - new_m)) + tl.sum(p * shifted, 1)
        sum_p = shrink * sum_p + tl.sum(p, 1)
        m = new_m
        if TEACHER:
            u = _logits(
                teacher_hidden,
                teacher_weight,
                bias,
                inverse_temperature,
                t,
                v,
                T,
                V,
                teacher_D,
                BT,
                BV,
                BD,
            )
            u_target += tl.sum(tl.where(hit, u, 0.0), 1)
            d = z - u
            sum_pd = shrink * sum_pd + tl.sum(p * d, 1)
            new_n = tl.maximum(n, tl.max(u, 1))
            shrink = tl.exp(n - new_n)
            q = tl.where(known, tl.exp(u - new_n[:, None]), 0.0)
            sum_q = shrink * sum_q + tl.sum(q, 1)
            sum_qd = shrink * sum_qd - tl.sum(q * d, 1)
            n = new_n
    at = parts + tl.program_id(1).to(tl.int64) * 9 * T + t
    row = t < T
    tl.store(at, m, mask=row)
    tl.store(at + T, sum_p, mask=row)
    tl.store(at + 2 * T, sum_pz, mask=row)
    tl.store(at + 3 * T, z_target, mask=row)
    tl.store(at + 4 * T, n, mask=row)
    tl.store(at + 5 * T, sum_q, mask=row)
    tl.store(at + 6 * T, sum_pd, mask=row)
    tl.store(at + 7 * T, sum_qd, mask=row)
    tl.store(at + 8 * T, u_target, mask=row)


@triton.jit
def _grad_logits(
    hidden,
    weight,
    teacher_hidden,
    teacher_weight,
    bias,
    targets,
    rows,  # [8, T] float32, as in `policy_head._part_gradient`
    dz,  # [T, width]
    inverse_temperature,
    start,  # first entry of the vocabulary in this chunk
    width,
    T,
    V,
    D,
    teacher_D,
    TEACHER: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BD: tl.constexpr,
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    column = tl.program_id(1) * BV + tl.arange(0, BV)
    v = start + column
    row = t < T
    target = tl.load(targets + t, mask=row, other=-1)
    a = tl.load(rows + t, mask=row, other=0.0)
    entropy = tl.load(rows + 2 * T + t, mask=row, other=0.0)
    of_logprob = tl.load(rows + 4 * T + t, mask=row, other=0.0)
    of_entropy = tl.load(rows + 5 * T + t, mask=row, other=0.0)
    z = _logits(hidden, weight, bias, inverse_temperature, t, v, T, V, D, BT, BV, BD)
    log_p = z - a[:, None]
    p = tl.exp(log_p)
    x = -of_entropy[:, None] * (log_p + entropy[:, None]) - of_logprob[:, None]
    more = tl.where(v[None, :] == target[:, None], of_logprob[:, None], 0.0)
    if TEACHER:
        b = tl.load(rows + T + t, mask=row, other=0.0)
        reverse = tl.load(rows + 3 * T + t, mask=row, other=0.0)
        of_reverse = tl.load(rows + 6 * T + t, mask=row, other=0.0)
        of_forward = tl.load(rows + 7 * T + t, mask=row, other=0.0)
        u = _logits(
            teacher_hidden,
            teacher_weight,
            bias,
            inverse_temperature,
            t,
            v,
            T,
            V,
            teacher_D,
            BT,
            BV,
            BD,
        )
        log_q = u - b[:, None]
        x += of_reverse[:, None] * (log_p - log_q - reverse[:, None]) + of_forward[:, None]
        more -= of_forward[:, None] * tl.exp(log_q)
    gradient = p * x + more
    inside = row[:, None] & (column[None, :] < width)
    at = t[:, None].to(tl.int64) * width + column[None, :]
    tl.store(dz + at, rounded(gradient, dz.dtype.element_ty, 0, 0, False), mask=inside)


def head_sums(sides: Sides, head) -> Sums:
    """The sums over the whole vocabulary, in one launch."""
    matrices, sizes, blocks = _arguments(sides, head)
    rows, vocabulary = sizes[:2]
    across, count = triton.cdiv(rows, blocks["BT"]), triton.cdiv(vocabulary, blocks["BV"])
    splits = min(count, max(1, PROGRAMS // max(across, 1)))
    per_split = triton.cdiv(count, splits)
    splits = triton.cdiv(count, per_split)
    parts = sides.hidden.new_empty(splits, SUMS, rows, dtype=torch.float32)
    if rows:
        shape = (1 / head.temperature, *sizes, per_split)
        _forward[(across, splits)](*matrices, parts, *shape, **blocks)
    m, p, pz, z_target, *teacher = parts.unbind(1)  # [splits, T] each
    n, q, pd, qd, u_target = teacher if head.needs_teacher else [None] * 5
    return Sums(m, p, pz, z_target, n, q, pd, qd, u_target).join()


def part_gradients(sides: Sides, head, rows: Tensor) -> Callable[[slice], Tensor]:
    """`policy_head._part_gradient` of any part, from the inputs, in the dtype of the head."""
    matrices, sizes, blocks = _arguments(sides, head)

    def gradient(part: slice) -> Tensor:
        width = part.stop - part.start
        dz = sides.weight.new_empty(sizes[0], width)
        if sizes[0]:
            grid = (triton.cdiv(sizes[0], blocks["BT"]), triton.cdiv(width, blocks["BV"]))
            place = (1 / head.temperature, part.start, width)
            _grad_logits[grid](*matrices, rows, dz, *place, *sizes, **blocks)
        return dz

    return gradient


def _arguments(sides: Sides, head) -> tuple[tuple, tuple, dict]:
    """Matrices, sizes T, V, D, D', and constants of both kernels."""
    hidden, weight = sides.hidden.contiguous(), sides.weight.contiguous()
    others = hidden, weight  # not read
    if head.needs_teacher:
        others = sides.teacher_hidden.contiguous(), sides.teacher_weight.contiguous()
    bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device)
    if sides.bias is not None:
        bias += sides.bias
    if head.banned is not None:
        bias += ban_bias(head.banned, torch.float32)
    small = len(hidden) <= SMALL or hidden.device.type == "cpu"
    size = SMALL if small else BLOCK_T
    depth = BLOCK_D if hidden.element_size() == 2 else BLOCK_D // 2
    blocks = dict(TEACHER=head.needs_teacher, BT=size, BV=size, BD=depth)
    if not small:
        blocks["num_warps"] = 8  # two tiles of 128 x 128 sums fill the registers of eight
    matrices = (hidden, weight, *others, bias, sides.targets.contiguous())
    return matrices, (len(hidden), *weight.shape, others[0].shape[1]), blocks
