"""What Triton's compiler makes of every kernel for a GPU that need not be there.

`python -m bench.compiled` compiles each kernel as it would be launched on the matrices of
Qwen2.5-VL-7B (the launchers run, on tensors without data) for three generations of GPUs and looks
at the machine code: Triton's wheel brings the assembler. It tells what Triton's interpreter, in
which the tests run without a GPU, cannot:

    registers     a thread's, 255 at most; what does not fit is spilled into memory
    shared KB     memory on the chip that a program takes
    at once       programs that fit on one of the GPU's processors together
    tensor cores  the matrix instruction that the products are made with
    narrow        accesses to global memory of 2 bytes or less, where 16 are possible

Left out: time, which only a GPU tells (`bench.ties`, `bench.policy_head`).
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench.harness import ROOT, read_settings

PAGE = ROOT / "kernels" / "README.md"
MARKS = "<!-- compiled: written by bench.compiled -->\n", "<!-- end of compiled -->\n"
# Shared memory of a processor and the most that one program may take, KB; threads at once
LIMITS = {80: (164, 163, 2048), 89: (100, 99, 1536), 90: (228, 227, 2048)}
REGISTERS = 65_536  # of a processor
ROWS, COLUMNS, RANK, VOCABULARY, TOKENS = 18_944, 3_584, 128, 151_936, 1_024  # Qwen2.5-VL-7B


@dataclass
class Config:
    """Compile every Triton kernel for GPUs that need not be there, and look at the result."""

    arch: tuple[int, ...] = tuple(LIMITS)
    """number of each architecture: 80 is an A100's, 89 an L40's or RTX 4090's, 90 an H100's"""
    only: str = ""
    """kernels whose name contains this (empty: all)"""
    json: bool = False
    """print one JSON object a kernel in place of the table"""
    write: bool = False
    """put the table into kernels/README.md in place of printing it"""


@dataclass(frozen=True)
class Code:
    """One kernel's machine code."""

    kernel: str
    inputs: str
    arch: int
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes
    warps: int
    tensor_cores: str  # the instruction, empty where there is no product
    narrow: int

    @property
    def at_once(self) -> int:
        """Programs on one processor."""
        threads = 32 * self.warps
        shared, _, most = LIMITS[self.arch]
        by_registers = REGISTERS // (threads * (-(-self.registers // 8) * 8))
        by_memory = 1024 * shared // (self.shared + 1024)  # 1 KB of each is the system's
        return min(by_registers, by_memory, most // threads)


class AbsentGpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return self.target


@contextmanager
def compiling(arch: int, only: str = "") -> Iterator[list]:
    """Inside, a launch of a kernel compiles it for the architecture and launches nothing.

    Gives the list of (name, compiled kernel) to which each launch appends. Kernels that do not have
    `only` in their name are not compiled either.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: list = []
    active = "_active" if hasattr(driver, "_active") else "active"  # before Triton 3.5
    run, driver_before = JITFunction.run, getattr(driver, active)

    def only_compile(self, *args, grid, warmup, **options):
        name = self.fn.__name__
        if only in name:
            found.append((name, run(self, *args, grid=grid, warmup=True, **options)))

    driver.set_active(AbsentGpu(arch))
    JITFunction.run = only_compile
    try:
        yield found
    finally:
        JITFunction.run = run
        setattr(driver, active, driver_before)


def launches() -> dict[str, Callable[[], object]]:
    """What is launched for which inputs, on tensors without data."""
    from turbo.kernels import ema_triton, nf4_triton, policy_head_triton, ties_triton
    from turbo.kernels.nf4 import empty_nf4
    from turbo.kernels.policy_head_sums import OUTPUTS, STUDENT_OUTPUTS, Head, Sides

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def factors(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        return [empty(RANK, COLUMNS, dtype=dtype)] * 2, [empty(ROWS, RANK, dtype=dtype)] * 2

    def merge(into: Callable, out: object, dtype: torch.dtype) -> None:
        numbers = [1.0, 1.0], [1.0, 1.0], [0.5, 0.5]
        into(empty(ROWS, COLUMNS), *factors(dtype), *numbers, 1.0, out)

    def threshold(dtype: torch.dtype) -> None:
        (a, _), (b, _) = factors(dtype)
        ties_triton.trim_threshold(a, b, 1.0, 1000)

    def ema_lora(dtype: torch.dtype) -> None:
        (a, _), (b, _) = factors(dtype)
        average, base = empty(ROWS, COLUMNS), empty(ROWS, COLUMNS)
        ema_triton.ema_lora_(average, base, a, b, 1.0, 0.5, 0)

    def ema(dtype: torch.dtype) -> None:
        tensors = [empty(ROWS, COLUMNS, dtype=dtype)]
        ema_triton.ema_list_(tensors, tensors, 0.5, 0)

    def head(teacher: bool) -> None:  # with a ban where there is a teacher, as the trainer has it
        hidden, weight = empty(TOKENS, COLUMNS), empty(VOCABULARY, COLUMNS)
        other = (hidden, weight) if teacher else (None, None)
        sides = Sides(hidden, weight, None, empty(TOKENS, dtype=torch.int64), *other)
        banned = empty(VOCABULARY, dtype=torch.bool) if teacher else None
        want = OUTPUTS if teacher else STUDENT_OUTPUTS
        options = Head(1.0, banned, want, 1 << 24, keep=False, how="triton")
        part, rows = slice(0, 1 << 14), empty(8, TOKENS, dtype=torch.float32)
        policy_head_triton.head_outputs(sides, options, [part], sides.products)
        policy_head_triton.part_gradients(sides, options, rows, sides.products)(part)

    bf16, fp32 = torch.bfloat16, torch.float32
    dense, coded = empty(ROWS, COLUMNS), empty_nf4((ROWS, COLUMNS), bf16, torch.device("meta"))
    return {
        "factors bf16": lambda: merge(ties_triton.merge, dense, bf16),
        "factors fp32": lambda: merge(ties_triton.merge, dense, fp32),
        "factors bf16, NF4": lambda: merge(nf4_triton.merge, coded, bf16),
        "threshold, bf16": lambda: threshold(bf16),
        "threshold, fp32": lambda: threshold(fp32),
        "list, bf16, stochastic": lambda: ema(bf16),
        "list, fp32": lambda: ema(fp32),
        "bf16 from factors bf16": lambda: ema_lora(bf16),
        "bf16 from factors fp32": lambda: ema_lora(fp32),
        "student alone": lambda: head(False),
        "with teacher and ban": lambda: head(True),
    }


def look(kernel, name: str, inputs: str, arch: int) -> Code:
    """Read a compiled kernel's resources and instructions."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def ask(what: str) -> str:
            return subprocess.run([tool, what, file.name], capture_output=True, text=True).stdout

        usage, code = ask("-res-usage"), ask("-sass")
    instruction = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+ +)?([A-Z][A-Z0-9_.]*)"
    used = Counter(re.findall(instruction, code, re.MULTILINE))
    products = [op for op in used if re.match(r"HGMMA|HMMA", op)]
    narrow = (n for op, n in used.items() if re.match(r"(LDG|STG)\S*\.[US](8|16)\b", op))
    return Code(
        kernel=name.strip("_"),
        inputs=inputs,
        arch=arch,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled=int(re.search(r"STACK:(\d+)", usage)[1]),
        shared=kernel.metadata.shared,
        warps=kernel.metadata.num_warps,
        tensor_cores=max(products, key=used.get, default=""),
        narrow=sum(narrow),
    )


def compile_all(c: Config) -> list[Code]:
    """Every kernel for every architecture; of kernels of several passes, the first."""
    codes = []
    for arch in c.arch:
        for inputs, launch in launches().items():
            with compiling(arch, c.only) as found:
                launch()
            once = dict(reversed(found))
            for name in reversed(once):
                codes.append(look(once[name], name, inputs, arch))
    return codes


def table(codes: list[Code]) -> str:
    """Kernels by architecture, as Markdown."""
    archs = list(dict.fromkeys(code.arch for code in codes))
    lines = [
        "| kernel | inputs | " + " | ".join(f"sm_{arch}" for arch in archs) + " |",
        "|---|---|" + "---|" * len(archs),
    ]
    by_kernel: dict[tuple[str, str], dict[int, Code]] = {}
    for code in codes:
        by_kernel.setdefault((code.kernel, code.inputs), {})[code.arch] = code
    for (kernel, inputs), found in by_kernel.items():
        cells = [cell(found[arch]) for arch in archs]
        lines.append(f"| {kernel} | {inputs} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(code: Code) -> str:
    """One kernel's figures."""
    parts = [f"{code.registers}"]
    if code.spilled:
        parts.append(f"{code.spilled} B spilled")
    if code.shared:
        parts.append(f"{code.shared / 1024:.0f} KB")
    parts.append(f"{code.at_once} at once")
    if code.tensor_cores:
        parts.append(code.tensor_cores.split(".")[0])
    if code.narrow:
        parts.append(f"{code.narrow} narrow")
    return ", ".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Compile, look, print or write; returns the exit status."""
    c = read_settings(Config, argv, "bench.compiled")
    if odd := [arch for arch in c.arch if arch not in LIMITS]:
        print(f"error: --arch must be of {sorted(LIMITS)}, got {odd[0]}", file=sys.stderr)
        return 2
    if c.write and (c.only or set(c.arch) != set(LIMITS)):
        print("error: --write takes the whole table: leave --only and --arch out", file=sys.stderr)
        return 2
    try:
        from triton.runtime.interpreter import InterpretedFunction

        from turbo.kernels.ties_triton import _merge
    except ModuleNotFoundError:
        print("error: triton is not installed: pip install triton", file=sys.stderr)
        return 2
    if isinstance(_merge, InterpretedFunction):
        print("error: unset TRITON_INTERPRET: it replaces the compiler", file=sys.stderr)
        return 2
    codes = compile_all(c)
    if not codes:
        print(f"error: --only {c.only!r} is in the name of no kernel", file=sys.stderr)
        return 2
    if c.json:
        print("\n".join(json.dumps(asdict(code) | {"at_once": code.at_once}) for code in codes))
    elif c.write:
        first, last = MARKS
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(first)[0], page.split(last)[1]
        PAGE.write_text(before + first + table(codes) + last + after, encoding="utf-8")
        print(f"wrote {PAGE.relative_to(ROOT)}")
    else:
        print(table(codes), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
