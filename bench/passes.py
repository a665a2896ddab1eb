"""Does reinforcement find what sampling would not? `python -m bench.passes`, after `bench.study`.

    warm start   32 answers for each of 200 hands at temperature 1: pass@32
    trained      8 answers for the same hands at temperature 0.2: pass@1, hand by hand

A policy that only sharpens what the warm start knows wins no hand that 32 samples of the warm start
lose. The hands are drawn from a seed that no run of the study is evaluated on. Written to
docs/study/passes.json, which the study's page reads; what is there is not played again.

Left out: the runs themselves (`bench.study`).
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.claims import compare_passes
from bench.harness import read_settings
from bench.records import is_complete
from bench.study import plan
from bench.study_runs import read_table
from turbo.envs.make import make, tiny_kwargs
from turbo.measure import fresh_deals

HANDS, SEED = 200, 900
FILE = "passes.json"


@dataclass
class PassesConfig:
    """Play the same hands with the warm start, many times, and with trained policies."""

    regime: str = "calm"
    """regime whose runs are compared with the warm start"""
    method: str = "kl"
    """their method"""
    runs: str = "runs/study"
    """folder of the run directories"""
    out: str = "docs/study"
    """folder of the data"""


def solved(source: str, samples: int, temperature: float) -> list[int]:
    """How many of `samples` answers solved each hand."""
    options = f"--episodes {HANDS} --samples {samples} --temperature {temperature} --seed {SEED}"
    program = [sys.executable, "-m", "turbo.eval", source, "--env", "points24", "--json"]
    done = subprocess.run([*program, *options.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"turbo.eval {source} failed: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout)["solved"]


def solvable() -> list[bool]:
    """Which of the hands can make 24 at all, by the exact solver."""
    env = make("points24", **tiny_kwargs("points24"))
    return [env.reset(**deal)[1]["solvable"] for deal in fresh_deals(HANDS, SEED)]


def main(argv: list[str] | None = None) -> int:
    """Play what is missing; returns the exit status."""
    c = read_settings(PassesConfig, argv, "bench.passes")
    path = Path(c.out) / FILE
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known["solvable"] = solvable()
    if "warm start" not in known:
        known["warm start"] = solved("tiny", 32, 1.0)
    for p in plan(read_table()):
        if (p.regime, p.method) != (c.regime, c.method) or p.name in known:
            continue
        folder = p.folder(Path(c.runs))
        if not is_complete(folder, p.config):
            print(f"not there, left out: {p.name} ({folder})", file=sys.stderr)
            continue
        known[p.name] = solved(str(folder), 8, 0.2)
        told = compare_passes(known["warm start"], known[p.name], 8, known["solvable"])
        print(p.name, told, flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in known.items())
    path.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
