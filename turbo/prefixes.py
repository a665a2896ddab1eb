"""Prompt prefixes of many pictures: computed in batches, kept while there is room.

A small model keeps them all. A large one keeps those that were used last, and computes one again
when its picture comes back later.

Left out: the prefix of one batch (`turbo.model`), the decoder's cache (`turbo.decode`).
"""

import torch
from torch import Tensor

from turbo.attend import PrefixKV
from turbo.model import VisionLanguageModel, Weights


class Prefixes:
    """Keys and values of numbered pictures' prefixes, with the same weights and the same text."""

    def __init__(
        self, vlm: VisionLanguageModel, weights: Weights, fixed: str, room: int | None = None
    ):
        self.vlm, self.weights, self.fixed = vlm, weights, fixed
        self.room = room if vlm.text.groups else None  # pictures that are kept (None: all)
        self.features: list[Tensor] = []  # [tokens, D'], by number
        self.grid = torch.empty(0)
        self._where: dict[int, tuple[int, int]] = {}  # number -> chunk, row of it
        self._chunks: dict[int, tuple[PrefixKV, list[int]]] = {}  # least recently used first
        self._made = 0

    def add(self, features: Tensor, grid: Tensor) -> None:
        """Take the next pictures' features [U, tokens, D'] and compute their prefixes."""
        first = len(self.features)
        self._compute(list(range(first, first + len(features))), features, grid)
        self.features += list(features)
        self.grid = grid

    def get(self, number: int) -> tuple[PrefixKV, int]:
        """A batch of prefixes, and the place of this one in it."""
        if number not in self._where:
            self._compute([number], self.features[number][None], self.grid)
        chunk, row = self._where[number]
        prefix, _ = self._chunks[chunk] = self._chunks.pop(chunk)
        return prefix, row

    def _compute(self, numbers: list[int], features: Tensor, grid: Tensor) -> None:
        prefix = self.vlm.prefix(self.weights, features, self.fixed, grid)
        self._made += 1
        self._chunks[self._made] = prefix, numbers
        self._where |= {number: (self._made, row) for row, number in enumerate(numbers)}
        while self.room and len(self._where) > self.room and len(self._chunks) > 1:
            _, dropped = self._chunks.pop(next(iter(self._chunks)))
            for other in dropped:
                del self._where[other]
