"""Rows of token ids, padded for one forward pass, with the places where a token is scored.

A row is the suffix of a prompt and an answer. Hidden states are projected on the vocabulary only where they predict an
answer token: prompt and padding never reach the head.

Left out: the model; prefixes (rows refer to them by number).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MICRO_ROWS = 32  # rows of about 50 tokens that a core's cache holds; measured in docs/LOG.md


@dataclass(frozen=True)
class TokenBatch:
    """R padded rows and their N answer tokens, row after row."""

    ids: Tensor  # [R, L] int64, suffix + answer without its last token, right-padded
    select: Tensor  # [N] flat index into [R * L] of the position that predicts each answer token
    targets: Tensor  # [N] the answer tokens
    row: Tensor  # [N] the row of each answer token
    last_prompt: Tensor  # [R] flat index of each row's last prompt position

    @property
    def rows(self) -> int:
        """Number of rows, R."""
        return self.ids.shape[0]


def pad_rows(suffixes: Sequence[list[int]], answers: Sequence[list[int]], pad: int) -> TokenBatch:
    """Build a `TokenBatch` of R rows; every answer has at least one token."""
    rows = [s + a[:-1] for s, a in zip(suffixes, answers, strict=True)]
    length = max(map(len, rows))
    ids = torch.tensor([r + [pad] * (length - len(r)) for r in rows])
    starts = torch.tensor([len(s) - 1 for s in suffixes]) + torch.arange(len(rows)) * length
    counts = torch.tensor([len(a) for a in answers])
    row = torch.repeat_interleave(torch.arange(len(rows)), counts)
    within = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]
    targets = torch.tensor([t for a in answers for t in a])
    return TokenBatch(ids, starts[row] + within, targets, row, starts)


def micro_batches(lengths: Sequence[int], size: int = MICRO_ROWS) -> list[list[int]]:
    """Row numbers in groups of at most `size` rows of similar length, so that little is padded."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[i : i + size] for i in range(0, len(order), size)]
