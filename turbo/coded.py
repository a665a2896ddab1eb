"""A frozen matrix, dense or in NF4 (`turbo.kernels.nf4`), and products with it.

    dense     y = x W^T
    in NF4    the same with W as it is read back, which is never kept: once forward, once backward

Left out: LoRA and the roles of a layer (`turbo.modules`), how codes are made (`turbo.kernels.nf4`).
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from turbo.kernels.nf4 import BLOCK, Nf4Matrix, dequantize_nf4, empty_nf4, nf4_levels

Matrix = Tensor | Nf4Matrix


def linear(x: Tensor, weight: Matrix, bias: Tensor | None) -> Tensor:
    """x W^T + bias for a frozen matrix, dense or in NF4."""
    if isinstance(weight, Nf4Matrix):
        return _CodedLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _CodedLinear(torch.autograd.Function):
    """A product with a matrix in NF4; read back once forward and once backward, and never kept."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ read(ctx.weight).to(grad.dtype), None, None


def product(x: Tensor, matrix: Nf4Matrix, bias: Tensor | None) -> Tensor:
    """x W^T + bias without a gradient.

    The few rows of a decode step are bound by what is moved: 36.5 bits a value where the matrix is
    first read back. bitsandbytes since 0.50 has a kernel that takes the codes as they are, 4.5
    bits, and knows by card and shape where that is faster.
    """
    able = matrix.device.type == "cuda" and find_bitsandbytes() is not None
    fits = x.dtype == matrix.dtype and matrix.shape[1] % BLOCK == 0
    if able and fits and hasattr(torch.ops.bitsandbytes, "gemm_4bit"):
        return bnb_product(x, matrix, bias)
    return F.linear(x, read(matrix).to(x.dtype), bias)


def bnb_product(x: Tensor, matrix: Nf4Matrix, bias: Tensor | None) -> Tensor:
    """x W^T + bias by bitsandbytes, which must have been imported."""
    codes, shape = matrix.codes[:, None], list(matrix.shape)
    call = torch.ops.bitsandbytes.gemm_4bit
    return call(x, codes, shape, matrix.absmax, BLOCK, "nf4", bias)


def read(matrix: Nf4Matrix) -> Tensor:
    """The dense matrix [out, in]; on a GPU by bitsandbytes' kernel, where it is installed."""
    if matrix.device.type == "cuda" and (bnb := find_bitsandbytes()) is not None:
        return bnb_read(bnb, matrix)
    return dequantize_nf4(matrix)


@cache
def find_bitsandbytes():
    """`bitsandbytes.functional`; None where it is not installed."""
    try:
        from bitsandbytes import functional
    except ImportError:
        return None
    return functional


def read_dense(matrix: Matrix) -> Tensor:
    """A dense matrix as it is, or what codes stand for."""
    return read(matrix) if isinstance(matrix, Nf4Matrix) else matrix.detach()


def bnb_read(bnb, matrix: Nf4Matrix) -> Tensor:
    """The dense matrix [out, in] by `bitsandbytes.functional`, whose layout this is."""
    state = bnb.QuantState(
        absmax=matrix.absmax,
        shape=torch.Size(matrix.shape),
        code=nf4_levels(matrix.device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=matrix.dtype,
    )
    return bnb.dequantize_4bit(matrix.codes[:, None], state)


def merge_ground(base: Matrix, apart: bool) -> Tensor:
    """What task vectors are added to in the scratch: the base, or zeros where they stay apart."""
    if apart:
        return torch.zeros(base.shape, dtype=base.dtype, device=base.device)
    return base.detach()


def room_like(base: Matrix) -> Matrix:
    """Room for a matrix like the base; its contents are undefined."""
    if isinstance(base, Nf4Matrix):
        return empty_nf4(base.shape, base.dtype, base.device)
    return torch.empty_like(base, requires_grad=False)
