"""The Triton kernels compile for real GPUs, and into what they were written for."""

import json
import os
import platform
import subprocess
import sys
from importlib.util import find_spec

import pytest

from bench import compiled
from bench.compiled import Code

NEEDS = pytest.mark.skipif(
    find_spec("triton") is None or platform.machine() != "x86_64", reason="needs Triton's assembler"
)


def run(*flags, cache):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", "bench.compiled", *flags]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=compiled.ROOT
    )


def read(done):
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@NEEDS
@pytest.mark.slow
@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.long), 90])
def test_every_kernel_compiles_into_what_it_was_written_for(arch, tmp_path):
    codes = read(run("--json", "--arch", str(arch), cache=tmp_path))
    names = {code["kernel"] for code in codes}
    products = {"merge", "merge_nf4", "count", "ema_lora"}
    assert names == products | {"choose", "ema_list", "add_chunk", "finish", "grad_logits"}
    _, most, _ = compiled.LIMITS[arch]
    for code in codes:
        told = f"{code['kernel']} of {code['inputs']}: {code}"
        assert code["spilled"] <= {80: 40, 90: 0}[arch], told  # bytes: ten registers
        assert code["shared"] <= 1024 * most and code["at_once"] >= 1, told
        wanted = {80: "HMMA", 90: "HGMMA"}[arch] if code["kernel"] in products else ""
        assert code["tensor_cores"].startswith(wanted) and bool(wanted) == bool(
            code["tensor_cores"]
        ), told
        # the masked end of a tensor of the list is read entry by entry, and bytes of a mask
        assert code["narrow"] == 0 or code["kernel"] in ("ema_list", "finish"), told


def test_bad_flags_are_told_in_one_line(capsys):
    for flags, wanted in (
        (["--arch", "75"], "error: --arch must be of [80, 89, 90], got 75"),
        (["--write", "--arch", "80"], "error: --write takes the whole table"),
    ):
        assert compiled.main(flags) == 2
        err = capsys.readouterr().err
        assert err.startswith(wanted) and err.count("\n") == 1


@NEEDS
def test_a_kernel_that_is_not_there_is_told(tmp_path):
    done = run("--arch", "80", "--only", "nothing", cache=tmp_path)
    wanted = "error: --only 'nothing' is in the name of no kernel"
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == wanted


def test_programs_at_once_are_bound_by_what_runs_out_first():
    def code(arch=90, registers=32, shared=0, warps=4):
        return Code("k", "", arch, registers, 0, shared, warps, "", 0)

    assert code().at_once == 16  # 2,048 threads
    assert code(arch=89).at_once == 12  # 1,536
    assert code(registers=250, warps=8).at_once == 1  # 256 x 256 registers are all
    assert code(registers=128).at_once == 4
    assert code(shared=100 * 1024).at_once == 2
    assert code(arch=80, shared=100 * 1024).at_once == 1


def test_the_page_has_a_table_between_its_marks():
    page = compiled.PAGE.read_text(encoding="utf-8")
    first, last = compiled.MARKS
    written = page.split(first)[1].split(last)[0]
    for kernel in ("merge", "count", "add_chunk", "grad_logits", "ema_list", "ema_lora"):
        assert f"| {kernel} | " in written
    cells = compiled.table(
        [Code("merge", "bf16", a, 9, 8, 2048, 4, "HGMMA.64", 3) for a in (80, 90)]
    )
    assert "| merge | bf16 | 9, 8 B spilled, 2 KB, 16 at once, HGMMA, 3 narrow |" in cells
