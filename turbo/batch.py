"""Rows of token ids, padded for one forward pass, with the places where a token is scored.

A row is the suffix of a prompt and an answer. Hidden states are projected on the vocabulary only
where they predict an answer token: prompt and padding never reach the head.

Left out: the model; prefixes (rows refer to them by number).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MICRO_ROWS = 32  # rows of about 50 tokens that a core's cache holds; measured in docs/LOG.md


@dataclass(frozen=True)
class TokenBatch:
    """Padded rows and the N answer tokens of the first `rows` of them, row after row."""

    rows: int  # R, rows that are meant
    ids: Tensor  # [R', L] int64, suffix + answer without its last token; R' and L are rounded up
    select: Tensor  # [N', >= N] flat index of the position that predicts each answer token
    targets: Tensor  # [N] the answer tokens
    row: Tensor  # [N] the row of each answer token
    last_prompt: Tensor  # [R] flat index of each row's last prompt position
    counts: list[int]  # answer tokens of each row

    @property
    def padded_rows(self) -> int:
        """Rows that are computed, R'."""
        return self.ids.shape[0]


def round_up(n: int, step: int = 8) -> int:
    """The next of the sizes in which work is computed: multiples of `step`, coarser for large n.

    The matrix library of the CPU compiles a kernel for every new shape, ten times as long as it
    runs: few sizes keep it from compiling.
    """
    while n > 16 * step:
        step *= 2
    return -(-n // step) * step


def evenly(count: int, wanted: int) -> list[int]:
    """`wanted` numbers below `count` at even distances; all of them with 0."""
    wanted = min(wanted or count, count)
    return [i * count // wanted for i in range(wanted)]


def pad_rows(
    suffixes: Sequence[list[int]],
    answers: Sequence[list[int]],
    pad: int,
    device: torch.device | str = "cpu",
    exact: bool = False,
) -> TokenBatch:
    """Build a `TokenBatch` of R rows on `device`; every answer has at least one token.

    Sizes are rounded up, see `round_up`, unless they are to be `exact`.
    """
    rows = [s + a[:-1] for s, a in zip(suffixes, answers, strict=True)]
    length = max(map(len, rows))
    length = length if exact else round_up(length)
    blank = [] if exact else [[pad] * length] * (round_up(len(rows)) - len(rows))
    ids = torch.tensor([r + [pad] * (length - len(r)) for r in rows] + blank)
    starts = torch.tensor([len(s) - 1 for s in suffixes]) + torch.arange(len(rows)) * length
    counts = torch.tensor([len(a) for a in answers])
    row = torch.repeat_interleave(torch.arange(len(rows)), counts)
    within = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    targets = torch.tensor([t for a in answers for t in a])
    select = starts[row] + within
    if not exact:
        select = torch.cat([select, select.new_zeros(round_up(len(select), 64) - len(select))])
    tensors = (t.to(device) for t in (ids, select, targets, row, starts))
    return TokenBatch(len(rows), *tensors, [len(a) for a in answers])


def pad_to(tensor: Tensor, length: int) -> Tensor:
    """`tensor` with its first entry repeated behind it until it has `length` entries."""
    if len(tensor) == length:
        return tensor
    return torch.cat([tensor, tensor[:1].expand(length - len(tensor), *tensor.shape[1:])])


LOGITS = 1 << 26  # logits that are held at once while answers are sampled, about
SHORT = 8  # inputs of at most so many tokens run together then, apart from longer ones
ROWS_OF_FEW = 4  # times as many rows run together while each adds few tokens to its answer


@dataclass
class BatchSizes:
    """Rows that run together, phase by phase: halved where memory runs out, and kept so."""

    decode: int = 64
    score: int = 64
    train: int = MICRO_ROWS
    tokens: int = 0  # bound on the tokens that run at once, prompts' prefixes included (0: none)
    decode_tokens: int = 0  # the same while answers are sampled

    @property
    def half(self) -> int:
        """The part of the tokens that rows may have; the other one is that of their prefixes."""
        return self.tokens // 2

    def halve(self, phase: str, rows: int, tokens: int = 0) -> int:
        """The size to go on with, after `rows` rows were too many, of so many tokens in all."""
        if rows <= 1:
            raise torch.OutOfMemoryError(
                f"not even one row fits into memory in the phase {phase!r}: use a smaller model, "
                "fewer --envs or a lower --max-new-tokens"
            )
        if phase == "decode" and self.decode_tokens:  # long rows and short ones have one bound
            self.decode_tokens = max(1, min(self.decode_tokens, tokens or self.decode_tokens) // 2)
        else:
            setattr(self, phase, min(getattr(self, phase), rows // 2))
            self.tokens = max(1, self.tokens // 2) if self.tokens else 0
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return rows // 2


def run_batches(
    lengths: Sequence[int],
    sizes: BatchSizes,
    phase: str,
    work: Callable[[list[int]], None],
) -> None:
    """`work` on all rows in micro-batches; one that runs out of memory is cut in two and run again.

    When it fails, `work` leaves nothing behind.
    """
    tokens = sizes.decode_tokens if phase == "decode" else sizes.tokens
    todo = micro_batches(lengths, getattr(sizes, phase), tokens=tokens // 2)
    while todo:
        rows = todo.pop(0)
        if not fits(work, rows):
            half = sizes.halve(phase, len(rows))
            todo = [rows[i : i + half] for i in range(0, len(rows), half)] + todo


def fits(work: Callable, *arguments) -> bool:
    """Call `work`; False where memory ran out. What it held is free again when this returns."""
    try:
        work(*arguments)
    except torch.OutOfMemoryError:
        return False
    return True


def micro_batches(
    lengths: Sequence[int], size: int = MICRO_ROWS, *, tokens: int = 0
) -> list[list[int]]:
    """Row numbers in groups of at most `size` rows of similar length, so that little is padded.

    With `tokens`, a group of several rows is at most so large when padded.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    if not tokens:
        return [order[i : i + size] for i in range(0, len(order), size)]
    groups: list[list[int]] = []
    for i in order:  # the longest so far is this one
        if groups and len(groups[-1]) < size and lengths[i] * (len(groups[-1]) + 1) <= tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
