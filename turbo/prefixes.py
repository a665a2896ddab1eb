"""Prompt prefixes of many pictures: their keys and values, computed when or before they are needed.

A small model computes those of all new pictures together and keeps them. A large one computes each
when it is asked for, and keeps those of the last few pictures.

Left out: the prefix of one batch (`turbo.model`), the decoder's cache (`turbo.decode`).
"""

import torch
from torch import Tensor

from turbo.attend import PrefixKV
from turbo.memory import KEPT
from turbo.model import VisionLanguageModel, Weights


class Prefixes:
    """Keys and values of numbered pictures' prefixes, with the same weights and the same text."""

    def __init__(self, vlm: VisionLanguageModel, weights: Weights, fixed: str):
        self.vlm, self.weights, self.fixed = vlm, weights, fixed
        self.features: list[Tensor] = []  # [tokens, D'], by number
        self.grid = torch.empty(0)
        self._kept: dict[int, tuple[PrefixKV, int]] = {}  # number -> batch, place; oldest use first

    def add(self, features: Tensor, grid: Tensor) -> None:
        """Take the next pictures' features [U, tokens, D']."""
        if self.vlm.text.small:
            prefix = self.vlm.prefix(self.weights, features, self.fixed, grid)
            first = len(self.features)
            self._kept |= {first + row: (prefix, row) for row in range(len(features))}
        self.features += list(features.cpu())  # of a whole update: on the host
        self.grid = grid

    def get(self, number: int) -> tuple[PrefixKV, int]:
        """A batch of prefixes, and the place of this one in it."""
        found = self._kept.pop(number, None)
        if found is None:
            features = self.features[number][None]
            found = self.vlm.prefix(self.weights, features, self.fixed, self.grid), 0
            if len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
        self._kept[number] = found
        return found
