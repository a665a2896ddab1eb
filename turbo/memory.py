"""What a training run takes of a GPU, planned before anything is loaded: `python -m turbo.memory`.

One card holds the base, one scratch buffer (alternately the policy's rounded factors, or the merged
policy, and the merged teacher), LoRA factors, optimiser. An update passes through phases that do
not coincide:

    read     the policy plays: factors in the scratch buffer, keys and values of every environment;
             prompts are read, and answers that were guessed whole, a micro-batch at once
    decode   it draws tokens: with the same, logits in place of activations
    score    the teacher reads: merged in the scratch buffer, one pass without gradients
    train    the policy learns: base and factors, activations, the policy head, gradients
    step     the optimiser moves the factors
    merge    a tile of the merge, and the factors of all checkpoints of one matrix

so a run needs the largest of their sums. `turbo.footprint` derives every term. A term is `counted`
where it is the size of tensors that must be there; it is `modelled` where it follows from how they
are used, from what autograd keeps, or is an allowance: none of these has been measured on a GPU
yet. GB are 10^9 bytes; a card sold as 24 GB has about 24 * 2^30 bytes, and the 7 % between the two
are left to whatever else uses it.

Left out: several GPUs, full fine-tuning, memory of the host but for what the design keeps there.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from turbo import footprint as size
from turbo.batch import MICRO_ROWS, BatchSizes
from turbo.flags import conclude, flag, read_flags
from turbo.shapes import TextShape, find_config, text_shape

PHASES = ("read", "decode", "score", "train", "step", "merge")
GB = 1e9
MOST_ENVS, MOST_TOKENS = 1 << 16, 1 << 20  # no more is searched for
LEAST = 128  # tokens of a row behind its prefix, about, or more
KEPT = 8  # prompts whose keys and values are kept beside those in the cache of environments
STEP = 64  # micro-batches are proposed in multiples of so many tokens
ENOUGH, SPARE = 8192, 0.05  # tokens that keep any card busy; share of a card that is left free
# What `nearest` falls back to, and one row for a micro-batch
SMALLEST = dict(
    envs=1, gradient_checkpointing=True, optimizer="adamw8bit", quantize="nf4", lora_rank=1
)


@dataclass(frozen=True)
class Settings:
    """What memory depends on beside the model. The defaults are those of the paper's preset."""

    quantize: Literal["none", "nf4"] = "none"
    """base of the matrices that LoRA covers: bf16, or 4-bit NormalFloat"""
    lora_rank: int = 128
    """rank of the LoRA factors"""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """moments in fp32, or in 8 bits"""
    gradient_checkpointing: bool = True
    """keep only the input of each layer and compute the layer again in the backward pass"""
    stream: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of the hidden states between layers"""
    envs: int = 64
    """environments that decode at once"""
    prompt_tokens: int = 512
    """longest prefix of a prompt in tokens: picture and rules"""
    suffix_tokens: int = 128
    """longest rest of a prompt in tokens: the history"""
    max_new_tokens: int = 256
    """longest answer in tokens"""
    micro_tokens: int = 2048
    """tokens that run at once, prompts and answers, when they are read, scored and trained on"""
    steps_per_update: int = 1024
    """environment steps of an update: their hidden states are kept on the host"""
    history: int = 30
    """checkpoints that are merged; their factors are kept on the host"""

    @property
    def row(self) -> int:
        """Tokens of the longest prompt and answer."""
        return self.prompt_tokens + self.suffix_tokens + self.max_new_tokens

    @property
    def nf4(self) -> bool:
        """Whether covered matrices are coded."""
        return self.quantize == "nf4"


@dataclass(frozen=True)
class Term:
    """One part of the memory, in bytes by phase; absent where it does not exist."""

    name: str
    bytes: dict[str, int]
    counted: bool


@dataclass(frozen=True)
class Plan:
    """All terms of a run, and the card that they are to fit."""

    shape: TextShape
    settings: Settings
    gpu_bytes: float
    terms: list[Term]
    host: dict[str, int]  # bytes of the host's memory

    @property
    def totals(self) -> dict[str, int]:
        """Bytes of each phase."""
        return {p: sum(term.bytes.get(p, 0) for term in self.terms) for p in PHASES}

    @property
    def phase(self) -> str:
        """The phase that needs most."""
        return max(PHASES, key=self.totals.__getitem__)

    @property
    def total(self) -> int:
        """Bytes that the run needs."""
        return self.totals[self.phase]

    @property
    def fits(self) -> bool:
        """Whether the card has them."""
        return self.total <= self.gpu_bytes


def check(s: Settings) -> None:
    """Refuse settings that mean nothing, naming the flag, its value and the remedy."""
    for f in fields(s):
        value = getattr(s, f.name)
        if type(value) is int and value < 1:
            raise ValueError(f"{flag(f.name)} must be at least 1, got {value}")
    if s.micro_tokens < s.row:
        raise ValueError(
            f"--micro-tokens must hold one row, --prompt-tokens + --suffix-tokens + "
            f"--max-new-tokens = {s.row}, got {s.micro_tokens}"
        )


def plan(shape: TextShape, s: Settings, gpu_bytes: float) -> Plan:
    """Every term of a run with these settings; ValueError where the settings mean nothing."""
    check(s)
    lasting = _lasting(shape, s)
    terms = [*lasting, *_passing(shape, s)]
    staying = sum(term.bytes.get("decode", 0) for term in lasting)  # all but gradients
    waste = {}
    for phase in PHASES:
        moving = sum(term.bytes.get(phase, 0) for term in terms) - staying
        waste[phase] = int(size.STATIC_WASTE * staying + size.DYNAMIC_WASTE * moving)
    terms.append(Term("fragmentation", waste, counted=False))
    terms.append(Term("CUDA context", dict.fromkeys(PHASES, size.CUDA_CONTEXT), counted=False))
    n = size.host_entry_bytes(shape, s.lora_rank)
    tokens = s.steps_per_update * s.max_new_tokens
    host = {
        f"factors of {s.history} checkpoints": s.history * n,
        "teacher's hidden states of an update": size.BF16 * tokens * shape.hidden,
        "picture features of an update, at most": size.feature_bytes(
            shape, s.steps_per_update * s.prompt_tokens
        ),
    }
    return Plan(shape, s, gpu_bytes, terms, host)


def _lasting(shape: TextShape, s: Settings) -> list[Term]:
    """What is there in every phase, and gradients."""
    factors = size.factor_bytes(shape, s.lora_rank)
    always = {
        "base": size.base_bytes(shape, s.nf4),
        "scratch": size.scratch_bytes(shape, s.nf4),
        "LoRA": factors,
        "optimizer": size.moment_bytes(shape, s.lora_rank, s.optimizer == "adamw8bit"),
    }
    terms = [Term(name, dict.fromkeys(PHASES, n), counted=True) for name, n in always.items()]
    return [*terms, Term("gradients", dict.fromkeys(("train", "step"), factors), counted=True)]


def _passing(shape: TextShape, s: Settings) -> list[Term]:
    """What a phase makes and drops again."""
    wide, tokens, rank = s.stream == "float32", s.micro_tokens, s.lora_rank
    read = size.read_bytes(shape, tokens, wide)
    # Half of a micro-batch are prefixes; a row that is longer than the other half runs alone.
    prefixes = max(tokens // 2, s.prompt_tokens)
    scored = max(tokens // 2, s.suffix_tokens + s.max_new_tokens)
    repeated = min(MICRO_ROWS, max(1, scored // LEAST)) * s.prompt_tokens
    kept = size.train_bytes(shape, prefixes, scored, repeated, rank, wide, s.gradient_checkpointing)
    back = size.read_back_bytes(shape, s.nf4)
    narrow = size.cast_bytes(shape, rank, shape.layers) if s.nf4 else 0
    answers = s.envs * (s.suffix_tokens + s.max_new_tokens)
    prompts = (s.envs + KEPT) * s.prompt_tokens
    copied = size.copied_bytes(shape, min(s.envs, BatchSizes.decode), s.row)
    play = ("read", "decode")
    modelled = {
        "KV of prompts": dict.fromkeys(play, size.cache_bytes(shape, prompts)),
        "KV of answers": dict.fromkeys(play, size.cache_bytes(shape, answers)),
        "LoRA in bf16": dict.fromkeys(play, narrow),
        "picture features": dict.fromkeys(
            ("read", "score", "train"), size.feature_bytes(shape, tokens)
        ),
        "activations": {
            "read": read + copied,
            "score": read + size.cache_bytes(shape, repeated),
            "train": kept,
        },
        "NF4 matrix read back": dict.fromkeys((*play, "score", "train"), back),
        "logits chunk": {
            "decode": size.draw_bytes(shape, s.envs, s.row, s.max_new_tokens, tokens, wide),
            "score": size.head_bytes(shape, tokens, backward=False),
            "train": size.head_bytes(shape, tokens, backward=True),
        },
        "optimizer's temporaries": {
            "step": size.step_bytes(shape, rank, s.optimizer == "adamw8bit")
        },
        "merge workspace": {"merge": size.merge_bytes(shape, rank, s.history)},
    }
    return [Term(name, found, counted=False) for name, found in modelled.items()]


# ------------------------------------------------------------------------------------ what fits


def largest(low: int, high: int, good: Callable[[int], bool]) -> int:
    """The largest n of low..high that is good, where all below it are; low - 1 if none is."""
    low -= 1
    while low < high:
        middle = (low + high + 1) // 2
        if good(middle):
            low = middle
        else:
            high = middle - 1
    return low


def largest_envs(shape: TextShape, s: Settings, gpu_bytes: float) -> int:
    """Environments that can decode at once, all else as set; 0 where not even one can."""
    return largest(1, MOST_ENVS, lambda n: plan(shape, replace(s, envs=n), gpu_bytes).fits)


def largest_micro_tokens(shape: TextShape, s: Settings, gpu_bytes: float) -> int:
    """Tokens that a micro-batch can have, all else as set; 0 where not even one row fits."""
    s = replace(s, micro_tokens=s.row)
    found = largest(
        s.row, MOST_TOKENS, lambda n: plan(shape, replace(s, micro_tokens=n), gpu_bytes).fits
    )
    return 0 if found < s.row else max(s.row, found - found % STEP)


def good_micro_tokens(shape: TextShape, s: Settings, gpu_bytes: float) -> int:
    """Tokens of a micro-batch for a run that leaves them open.

    Those of `s` where they fit, and more up to `ENOUGH` where some of the card stays free; else
    as many as fit; those of `s` where nothing does.
    """
    usual = max(s.micro_tokens, s.row)
    if plan(shape, replace(s, micro_tokens=usual), gpu_bytes).fits:
        most = largest_micro_tokens(shape, s, (1 - SPARE) * gpu_bytes)
        return max(usual, min(most, ENOUGH))
    return largest_micro_tokens(shape, s, gpu_bytes) or usual


def nearest(shape: TextShape, s: Settings, gpu_bytes: float) -> Settings | None:
    """The settings nearest to `s` that fit; None where there are none.

    From the most harmful change to the least (rank, NF4, 8-bit moments, checkpointing,
    environments, micro-batch) each setting stays as near to what was asked for as it can while all
    the less harmful ones give way as far as they can.
    """
    found = replace(s, **SMALLEST, micro_tokens=s.row)

    def fits(**changes) -> bool:
        return plan(shape, replace(found, **changes), gpu_bytes).fits

    if not fits():
        return None
    rank = s.lora_rank
    while rank > 1 and not fits(lora_rank=rank):
        rank //= 2
    found = replace(found, lora_rank=rank)
    for name in ("quantize", "optimizer", "gradient_checkpointing"):
        if fits(**{name: getattr(s, name)}):
            found = replace(found, **{name: getattr(s, name)})
    found = replace(found, envs=min(s.envs, largest_envs(shape, found, gpu_bytes)))
    tokens = min(s.micro_tokens, largest_micro_tokens(shape, found, gpu_bytes))
    return replace(found, micro_tokens=tokens)


def refuse(p: Plan) -> str:
    """Nothing where the plan fits; else one sentence: the total, the card, and what would fit."""
    if p.fits:
        return ""
    card = f"the card has {p.gpu_bytes / GB:.1f} GB"
    need = f"{p.shape.name} needs {p.total / GB:.1f} GB to {p.phase}, {card}"
    other = nearest(p.shape, p.settings, p.gpu_bytes)
    if other is not None:
        total = plan(p.shape, other, p.gpu_bytes).total
        return f"{need}: it fits with {_changes(p.settings, other)} ({total / GB:.1f} GB)"
    least = replace(p.settings, **SMALLEST, micro_tokens=p.settings.row)
    total = plan(p.shape, least, p.gpu_bytes).total
    return (
        f"{need}, and no settings make it fit ({total / GB:.1f} GB with "
        f"{_changes(p.settings, least)}): take a smaller model or a larger card"
    )


def _changes(old: Settings, new: Settings) -> str:
    """The flags that lead from one to the other, the most harmful first."""
    order = ("lora_rank", "quantize", "optimizer", "gradient_checkpointing", "envs", "micro_tokens")
    changed = [name for name in order if getattr(old, name) != getattr(new, name)]
    words = {n: f"{flag(n)} {getattr(new, n)}" for n in changed}
    if "gradient_checkpointing" in words:  # it is only ever turned on
        words["gradient_checkpointing"] = "--gradient-checkpointing"
    return " ".join(words.values())


def refuse_host(p: Plan, there: float) -> str:
    """Nothing where a host with so many bytes can keep what the plan says; else one sentence."""
    needed = sum(p.host.values())
    if needed <= there:
        return ""
    entry = size.host_entry_bytes(p.shape, p.settings.lora_rank)
    kept = int((there - needed) // entry) + p.settings.history
    remedy = f"--history-max {kept}" if kept > 0 else "fewer --steps-per-update"
    return (
        f"{p.shape.name} needs {needed / GB:.1f} GB of the host's memory for the history of "
        f"{p.settings.history} checkpoints and an update's steps, the host has {there / GB:.1f} "
        f"GB: it fits with {remedy}"
    )


# ------------------------------------------------------------------------------------ the command


@dataclass
class MemoryConfig:
    """Say what a training run takes on a GPU, and the largest batches that fit it."""

    settings: tyro.conf.OmitArgPrefixes[Settings]
    model: str = "qwen2.5-vl-7b"
    """a published shape (qwen2.5-vl-3b|7b, qwen3-vl-2b|4b|8b) or a local folder with config.json"""
    gpu: float = 24.0
    """memory of the card in GB (10^9 bytes)"""


def show(p: Plan, console: Console) -> None:
    """Print every term, the verdict, the largest batches that fit, and what the host holds."""
    shape, s = p.shape, p.settings
    console.print(
        f"{shape.name}: {shape.weights / 1e9:.2f} billion weights, LoRA on "
        f"{shape.covered_matrices} matrices of {shape.covered_weights / 1e9:.2f} billion"
    )
    table = Table(title=None)
    table.add_column("GB")
    for phase in PHASES:
        table.add_column(phase, justify="right")
    table.add_column("known by")
    for term in p.terms:
        cells = [f"{term.bytes[x] / GB:.2f}" if term.bytes.get(x) else "" for x in PHASES]
        table.add_row(term.name, *cells, "counted" if term.counted else "modelled")
    table.add_section()
    table.add_row("total", *(f"{p.totals[x] / GB:.2f}" for x in PHASES), f"most: {p.phase}")
    console.print(table)
    verdict = "fits" if p.fits else "does not fit"
    console.print(f"{p.total / GB:.2f} of {p.gpu_bytes / GB:.2f} GB: it {verdict}.")
    if p.fits:
        envs = largest_envs(shape, s, p.gpu_bytes)
        tokens = largest_micro_tokens(shape, s, p.gpu_bytes)
        console.print(f"Environments that can decode at once: {envs:,} (set: {s.envs:,}).")
        console.print(f"Tokens of a micro-batch: up to {tokens:,} (set: {s.micro_tokens:,}).")
    kept = ", ".join(f"{name} {n / GB:.1f} GB" for name, n in p.host.items())
    console.print(f"Memory of the host: {kept}.")
    console.print(
        "Planned, not measured: what is modelled follows from the program's text and has not been "
        "compared with a GPU yet."
    )


def read(argv: list[str]) -> MemoryConfig:
    """The settings of a command line; ValueError, in one line, where it means nothing."""
    c = read_flags(MemoryConfig, argv, "turbo.memory")
    if not (math.isfinite(c.gpu) and c.gpu > 0):
        raise ValueError(f"--gpu must be a number of GB above 0, got {c.gpu}")
    check(c.settings)
    return c


def main(argv: list[str] | None = None) -> int:
    """Print the plan; returns the exit status: 1 where it does not fit, 2 for a wrong flag."""
    try:
        c = read(sys.argv[1:] if argv is None else argv)
        shape = text_shape(find_config(c.model), c.model)
        p = plan(shape, c.settings, c.gpu * GB)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show(p, Console(highlight=False, width=100))
    if refusal := refuse(p):
        print(refusal, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(conclude(main))
