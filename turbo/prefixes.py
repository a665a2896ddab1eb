"""Prompt prefixes of many pictures: their keys and values, computed when or before they are needed.

A small model computes those of all new pictures together and keeps them. A large one computes one
when it is asked for, with those that are asked for next, and keeps the last few.

Left out: the prefix of one batch (`turbo.model`), the decoder's cache (`turbo.decode`).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from turbo.attend import PrefixKV
from turbo.batch import fits
from turbo.memory import KEPT
from turbo.model import VisionLanguageModel, Weights


class Prefixes:
    """Keys and values of numbered pictures' prefixes, with the same weights and the same text."""

    def __init__(self, vlm: VisionLanguageModel, weights: Weights, fixed: str):
        self.vlm, self.weights, self.fixed = vlm, weights, fixed
        self.features: list[Tensor] = []  # [tokens, D'], by number
        self.grid = torch.empty(0)
        self._place: dict[int, tuple[PrefixKV, int]] = {}  # number -> batch, place
        self._batches: list[list[int]] = []  # a large model's, by number; the oldest first

    def add(self, features: Tensor, grid: Tensor) -> None:
        """Take the next pictures' features [U, tokens, D']."""
        if self.vlm.text.small:
            prefix = self.vlm.prefix(self.weights, features, self.fixed, grid)
            first = len(self.features)
            self._place |= {first + row: (prefix, row) for row in range(len(features))}
        self.features += list(features.cpu())  # of a whole update: on the host
        self.grid = grid

    def get(self, number: int, soon: Iterable[int] = ()) -> tuple[PrefixKV, int]:
        """A batch of prefixes, and the place of this one in it; `soon` are asked for next."""
        if number not in self._place:
            batch = [n for n in dict.fromkeys((number, *soon)) if n not in self._place]
            batch = batch[: self._most()]
            while not fits(self._compute, batch):
                batch = batch[: self.vlm.batches.halve("decode", len(batch))]
        return self._place[number]

    def _most(self) -> int:
        """How many are computed together."""
        tokens = self.vlm.batches.decode_tokens
        length = self.vlm.prefix_length(self.fixed, len(self.features[0]))
        return max(1, min(KEPT, tokens // length)) if tokens else KEPT

    def _compute(self, batch: list[int]) -> None:
        while self._batches and sum(map(len, self._batches)) + len(batch) > KEPT:
            for n in self._batches.pop(0):
                del self._place[n]
        features = torch.stack([self.features[n] for n in batch])
        prefix = self.vlm.prefix(self.weights, features, self.fixed, self.grid)
        self._batches.append(batch)
        self._place |= {n: (prefix, row) for row, n in enumerate(batch)}
