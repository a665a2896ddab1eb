"""The small operations between the matrix products, with their gradients written out.

On a CPU a tiny transformer spends most of its time not in matrix products but in the passes over
memory between them; autograd of a composed RMSNorm alone makes sixteen. Here each operation makes
as few passes as its formula needs:

    rms_norm   y = x r w,  r = (mean(x^2) + eps)^-1/2      dx = r (g w) - x r^3 mean(g w x)
               (without w where the next matrix has it: (x r w) M^T = (x r) (M w)^T)
    swiglu     y = silu(a) b                               da = silu'(a) (g b),  db = g silu(a)

Left out: Triton versions; a GPU uses the composed operations of PyTorch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        # mean(x^2) as a norm: one pass and no temporary of x's size
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = r.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
        ctx.save_for_backward(x, weight, r)
        y = x * r
        return (y if weight is None else y.mul_(weight)).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, r = ctx.saved_tensors
        grad = grad.to(x.dtype)
        dw = None
        if ctx.needs_input_grad[1]:
            dw = (grad * x).mul_(r).flatten(0, -2).sum(0)
        gw = grad if weight is None else grad * weight
        mean = torch.linalg.vecdot(gw, x).unsqueeze(-1).div_(x.shape[-1])
        dx = (gw * r).addcmul_(x, mean * r**3, value=-1)
        return dx, dw, None, None


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        d_gate, d_up = out.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=d_up)
        d_gate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return out


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """RMSNorm over the last dimension (Zhang & Sennrich 2019).

    x [..., D], weight [D] or None for ones; computed in x's dtype, returned in `dtype`.
    """
    return _RmsNorm.apply(x, weight, eps, dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of a fused projection [..., 2*I] -> [..., I] (Shazeer 2020)."""
    return _Swiglu.apply(gate_up)
