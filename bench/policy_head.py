"""The policy head against eager PyTorch, torch.compile and others: `python -m bench.policy_head`.

Log-probability, entropy and reverse KL of T tokens over a vocabulary of 151,936, and the first and
the last of them alone, which is what Liger-Kernel and cut-cross-entropy offer; forward alone and
with the gradient of the hidden states; student and teacher share the frozen head. On a CPU at
D = 512 and T = 256 and 2,048 in fp32, on a GPU at D = 3,584 and 2,048 and T up to 8,192 in bf16.
The floor is that of the matrix products: one a side forward, and one backward. What keeps no logits
for the backward forms them again, five products in place of three (three in place of two without a
teacher), and reaches 60 % (67 %) of it at most; what is given the loss forms them once, and may
come near the floor.

On the first 64 rows, outputs and gradient are first compared with the fp64 reference.
"""

import sys
from dataclasses import dataclass

import torch

from bench.harness import read_settings
from bench.head_rivals import (
    ALL_THREE,
    PRODUCTS,
    TASKS,
    Variant,
    all_three,
    ours,
    ours_given_loss,
)
from bench.race import agreeing, check_close, device_name, product_rate, race, status
from turbo.kernels.reference import policy_head_reference

VOCABULARY = 151_936
FEW = 64  # rows that are compared with the reference
# Largest error: of an output, absolute and relative, and of the gradient's norm. Dense logits in
# bf16 are off by 0.01, and the KL's gradient lives on their differences.
TOLERANCES = {torch.float32: (1e-4, 1e-4, 1e-3), torch.bfloat16: (2e-2, 1e-2, 1e-1)}


@dataclass
class Config:
    """Race the policy head against its rivals."""

    rows: tuple[int, ...] = ()
    """tokens T (empty: 256 and 2,048 on a CPU, and 1,024, 4,096, 8,192 as well on a GPU)"""
    widths: tuple[int, ...] = ()
    """hidden sizes D (empty: 512 on a CPU, 3,584 and 2,048 on a GPU)"""
    vocabulary: int = VOCABULARY
    """entries of the vocabulary V"""
    chunks: tuple[int, ...] = ()
    """number of logits that ours may hold at once, a variant for each (empty: its own)"""
    repeats: int = 3
    """timed turns"""
    dtype: str = ""
    """float32 or bfloat16 (empty: float32 on a CPU, bfloat16 on a GPU)"""
    save: bool = True
    """append the rows to bench/results/"""


def loss(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A sum in which each output has a gradient of its own size."""
    return sum(size * out.sum() for size, out in zip((-1, -0.01, 0.5), outputs, strict=False))


def checker(weight: torch.Tensor, hidden, targets, teacher):
    """A check of one variant's outputs and gradient on these rows."""
    atol, rtol, of_norm = TOLERANCES[weight.dtype]
    exact = hidden.double().requires_grad_()
    truth = policy_head_reference(exact, weight.double(), targets, teacher_hidden=teacher.double())

    def check(variant: Variant) -> None:
        leaf = hidden.clone().requires_grad_()
        wanted, inputs = variant.truth(truth), (leaf, weight, targets, teacher)
        if variant.given_loss:
            value = variant.call(*inputs, loss)
            check_close(value.detach(), loss(wanted).detach(), rtol=rtol, atol=FEW * atol)
        else:
            outputs = variant.call(*inputs)
            for got, true in zip(outputs, wanted, strict=True):
                check_close(got.detach(), true.detach(), rtol=rtol, atol=atol)
            value = loss(outputs)
        (grad,) = torch.autograd.grad(value, leaf)
        (true,) = torch.autograd.grad(loss(wanted), exact, retain_graph=True)
        off = ((grad.double() - true).norm() / true.norm()).item()
        if not off <= of_norm:
            raise AssertionError(f"the gradient is {off:.1e} of its norm off, {of_norm:.0e} may be")

    return check


def compare(c: Config, rows: int, width: int, dtype: torch.dtype, device: str) -> None:
    """One shape: agreement, then forward, then forward and backward."""
    torch.manual_seed(0)
    weight = (torch.randn(c.vocabulary, width, device=device) / width**0.5).to(dtype)
    teacher = torch.randn(rows, width, device=device).to(dtype)
    hidden = (teacher.float() + 0.3 * torch.randn(rows, width, device=device)).to(dtype)
    targets = torch.randint(c.vocabulary, (rows,), device=device)

    def forward(variant: Variant) -> object:
        with torch.no_grad():
            return variant.call(hidden, weight, targets, teacher)

    def both_ways(variant: Variant) -> object:
        leaf = hidden.detach().requires_grad_()
        if variant.given_loss:
            value = variant.call(leaf, weight, targets, teacher, loss)
        else:
            value = loss(variant.call(leaf, weight, targets, teacher))
        return torch.autograd.grad(value, leaf)

    check = checker(weight, hidden[:FEW], targets[:FEW], teacher[:FEW])
    shape = f"T={rows} D={width} V={c.vocabulary} {str(dtype).removeprefix('torch.')}"
    tasks = dict(TASKS)
    for chunk in c.chunks:
        given = ours_given_loss(*ALL_THREE, piece_elements=chunk)
        tasks["policy_head"] = tasks["policy_head"] | {
            f"ours, {chunk:,} logits at once": Variant(
                ours(*ALL_THREE, chunk_elements=chunk), all_three
            ),
            f"ours, given the loss, {chunk:,} logits": Variant(given, all_three, True),
        }
    torch.compiler.reset()  # else it stops compiling after a few shapes, and this one is not new
    product = 2 * rows * width * c.vocabulary / product_rate(dtype, device)
    for task, variants in tasks.items():
        variants = agreeing(f"{task} {shape}", variants, check)
        ways = (("forward", forward), ("forward+backward", both_ways))
        for (name, way), products in zip(ways, PRODUCTS[task], strict=True):
            racing = {k: v for k, v in variants.items() if way is both_ways or not v.given_loss}
            race(
                f"{task} {name}",
                shape,
                {key: lambda v=v, way=way: way(v) for key, v in racing.items()},
                device=device,
                repeats=c.repeats,
                floor=products * product,
                save=c.save,
            )


def main(argv: list[str] | None = None) -> int:
    """Measure, show and record; returns the exit status."""
    c = read_settings(Config, argv, "bench.policy_head")
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
    return status()


if __name__ == "__main__":
    sys.exit(main())
