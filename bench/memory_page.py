"""Which model fits which card, written from the planner: `python -m bench.memory_page`.

Writes docs/results/memory.md, and its first table between two marks of README.md. Nothing is
measured: a test fails when the pages say something else than `turbo.memory` would. Left out: any
figure of its own.
"""

import io
import sys
from dataclasses import replace
from functools import cache

from rich.console import Console

from bench.harness import ROOT
from turbo.memory import (
    GB,
    Settings,
    largest_envs,
    largest_micro_tokens,
    plan,
    refuse,
    show,
)
from turbo.shapes import NAMES, TextShape, published, text_shape

PAGE, README = ROOT / "docs" / "results" / "memory.md", ROOT / "README.md"
MARKS = "<!-- memory: written by bench.memory_page -->\n", "<!-- end of memory -->\n"
CARDS = (24, 40, 80)
BASES = {"none": "bf16", "nf4": "NF4"}
SHOWN = (("qwen2.5-vl-7b", "nf4", 24), ("qwen2.5-vl-7b", "none", 40))  # printed in full
INTRODUCTION = """\
# Which model fits which card

Planned by `python -m turbo.memory`, **not measured**: no figure on this page has been compared with
a GPU yet. Written by `python -m bench.memory_page` (`make memory`). How every term is derived is in
[turbo/footprint.py](../../turbo/footprint.py); what the tests hold it against, without a GPU, is in
[test_footprint.py](../../tests/turbo/test_footprint.py).

"""
SETTINGS = """\

All with LoRA of rank {lora_rank} in fp32, AdamW, gradient checkpointing, prompts of {prompt_tokens}
+ {suffix_tokens} tokens, answers of {max_new_tokens}, {history} checkpoints in the history. GB are
10^9 bytes. *Needs* is the largest phase with {envs} environments and micro-batches of
{micro_tokens:,} tokens. A cell has the most environments that can decode at once with such
micro-batches, and the longest micro-batch with so many environments; "no" is a card that the
settings do not fit as they are.

"""


@cache
def shape(name: str) -> TextShape:
    """A published shape, counted once."""
    return text_shape(published(name), name)


def table() -> str:
    """Models and precisions by card, as Markdown."""
    cards = " | ".join(f"{gpu} GB" for gpu in CARDS)
    lines = [f"| model | base | needs | {cards} |", "|---|---|---" + "|---" * len(CARDS) + "|"]
    for name in NAMES:
        for quantize, base in BASES.items():
            s = replace(Settings(), quantize=quantize)
            p = plan(shape(name), s, 0)
            cells = [cell(name, s, gpu) for gpu in CARDS]
            needs = f"{p.total / GB:.1f} GB ({p.phase})"
            lines.append(f"| {name} | {base} | {needs} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(name: str, s: Settings, gpu: float) -> str:
    """The largest batches of a model on a card, or that it does not fit."""
    if not plan(shape(name), s, gpu * GB).fits:
        return "no"
    envs = largest_envs(shape(name), s, gpu * GB)
    tokens = largest_micro_tokens(shape(name), s, gpu * GB)
    return f"{envs:,} envs, {tokens:,} tokens"


def refusals() -> str:
    """What the planner proposes where bf16 does not fit, as a list."""
    lines = []
    for name in NAMES:
        for gpu in CARDS:
            if said := refuse(plan(shape(name), Settings(), gpu * GB)):
                lines.append(f"* {said}\n")
    return "".join(lines)


def printed(name: str, quantize: str, gpu: int) -> str:
    """What the command prints, as a block of text under the command."""
    out = io.StringIO()
    s = replace(Settings(), quantize=quantize)
    show(plan(shape(name), s, gpu * GB), Console(file=out, highlight=False, width=100))
    flags = f"--model {name} --quantize {quantize} --gpu {gpu}"
    lines = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    return f"\n```\n$ python -m turbo.memory {flags}\n{lines}\n```\n"


def page() -> str:
    """The page as Markdown."""
    settings = SETTINGS.format(**vars(Settings()))
    text = INTRODUCTION + table() + settings
    text += "Where bf16 does not fit, the planner says:\n\n" + refusals()
    return text + "".join(printed(*shown) for shown in SHOWN)


def readme(text: str) -> str:
    """README with the table between its marks."""
    first, last = MARKS
    before, after = text.split(first)[0], text.split(last)[1]
    return before + first + table() + last + after


def main() -> int:
    """Write both; returns the exit status."""
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} and the table of {README.name} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
