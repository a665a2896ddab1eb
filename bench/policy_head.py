"""The policy head against eager PyTorch, torch.compile and Liger: `python -m bench.policy_head`.

Log-probability, entropy and reverse KL of T tokens over a vocabulary of 151,936, forward alone and
with the gradient of the hidden states; student and teacher share the frozen head. On a CPU at
D = 512 and T = 256 and 2,048 in fp32, on a GPU at D = 3,584 and 2,048 and T up to 8,192 in bf16.
The floor is that of the matrix products: two forward, and one backward.
"""

import sys
from dataclasses import dataclass

import torch
import tyro

from bench.race import device_name, product_rate, race
from turbo.kernels.policy_head import policy_head

VOCABULARY = 151_936
WANT = ("logprob", "entropy", "reverse_kl")


@dataclass
class Config:
    """Race the policy head against its rivals."""

    rows: tuple[int, ...] = ()
    """tokens T (empty: 256 and 2,048 on a CPU, and 1,024, 4,096, 8,192 as well on a GPU)"""
    widths: tuple[int, ...] = ()
    """hidden sizes D (empty: 512 on a CPU, 3,584 and 2,048 on a GPU)"""
    vocabulary: int = VOCABULARY
    """entries of the vocabulary V"""
    repeats: int = 3
    """timed turns"""
    dtype: str = ""
    """float32 or bfloat16 (empty: float32 on a CPU, bfloat16 on a GPU)"""
    save: bool = True
    """append the rows to bench/results/"""


def eager(hidden, weight, targets, teacher) -> tuple:
    """What one writes first: dense [T, V] logits, and autograd."""
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    with torch.no_grad():
        log_q = (teacher @ weight.T).float().log_softmax(-1)
    p = log_p.exp()
    logprob = log_p.gather(1, targets[:, None])[:, 0]
    return logprob, -(p * log_p).sum(-1), (p * (log_p - log_q)).sum(-1)


def ours(hidden, weight, targets, teacher) -> tuple:
    """The kernel."""
    out = policy_head(hidden, weight, targets, teacher_hidden=teacher, want=WANT)
    return out.logprob, out.entropy, out.reverse_kl


def loss(outputs: tuple) -> torch.Tensor:
    """A sum in which each output has a gradient of its own size."""
    logprob, entropy, reverse_kl = outputs
    return -logprob.sum() - 0.01 * entropy.sum() + 0.5 * reverse_kl.sum()


def liger(hidden, weight, targets, teacher) -> torch.Tensor:
    """Liger's fused linear Jensen-Shannon divergence, beta = 1: the reverse KL alone."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD(jsd_beta=1.0)(hidden, weight, teacher, weight, targets)


def compare(c: Config, rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    """One shape: agreement, then forward, then forward and backward."""
    torch.manual_seed(0)
    weight = (torch.randn(c.vocabulary, width, device=device) / width**0.5).to(dtype)
    teacher = torch.randn(rows, width, device=device).to(dtype)
    hidden = (teacher.float() + 0.3 * torch.randn(rows, width, device=device)).to(dtype)
    targets = torch.randint(c.vocabulary, (rows,), device=device)
    few = slice(0, 64)
    sample = hidden[few].clone().requires_grad_(), hidden[few].clone().requires_grad_()
    both = [
        f(x, weight, targets[few], teacher[few]) for f, x in zip((ours, eager), sample, strict=True)
    ]
    for got, wanted in zip(*both, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=2e-2)
    grads = [torch.autograd.grad(loss(out), x)[0] for out, x in zip(both, sample, strict=True)]
    torch.testing.assert_close(*grads, rtol=5e-2, atol=5e-3)
    torch.compiler.reset()  # else it stops compiling after a few shapes
    compiled = torch.compile(eager) if device == "cuda" else None

    def forward(function) -> object:
        with torch.no_grad():
            return function(hidden, weight, targets, teacher)

    def both_ways(function) -> object:
        leaf = hidden.detach().requires_grad_()
        out = function(leaf, weight, targets, teacher)
        return torch.autograd.grad(loss(out) if isinstance(out, tuple) else out, leaf)

    functions = {"ours": ours, "eager": eager}
    if device == "cuda":
        functions |= {"torch.compile": compiled, "liger (reverse KL alone)": liger}
    product = 2 * rows * width * c.vocabulary / product_rate(dtype, device)
    shape = f"T={rows} D={width} V={c.vocabulary} {str(dtype).removeprefix('torch.')}"
    for name, way, products in (("forward", forward, 2), ("forward+backward", both_ways, 3)):
        race(
            f"policy_head {name}",
            shape,
            {key: lambda f=f, way=way: way(f) for key, f in functions.items()},
            device=device,
            repeats=c.repeats,
            floor=products * product,
            save=c.save,
        )


def main(argv: list[str] | None = None) -> int:
    """Measure, show and record; returns the exit status."""
    c = tyro.cli(Config, args=argv, prog="bench.policy_head")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"on {device_name(device)}")
    if c.dtype not in ("", "float32", "bfloat16"):
        print(f"error: --dtype must be float32 or bfloat16, got {c.dtype!r}", file=sys.stderr)
        return 2
    fitting = "bfloat16" if device == "cuda" else "float32"
    dtype = getattr(torch, c.dtype or fitting)
    rows = c.rows or ((256, 1024, 4096, 8192) if device == "cuda" else (256, 2048))
    for width in c.widths or ((3584, 2048) if device == "cuda" else (512,)):
        for count in rows:
            try:
                compare(c, count, width, dtype, device)
            except torch.OutOfMemoryError as error:
                print(f"T={count} D={width} is left out: {str(error).splitlines()[0]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
