"""What rows attend to: keys and values of shared prompt prefixes, and masks.

Left out: attention itself (`turbo.fused`, `turbo.modules`), caches that grow (`turbo.decode`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from turbo.batch import round_up


def causal_mask(length: int, past: int, text) -> Tensor | None:
    """Additive mask [length, S >= past + length]: query i sees the past and the keys up to itself.

    S is a multiple of `text.keys`, the dtype and the device are the text model's. None where that
    attends causally without a mask.
    """
    if text.flash:
        return None
    width = past + length if text.keys == 1 else round_up(past + length, text.keys)
    blocked = torch.ones(length, width, dtype=torch.bool, device=text.device).triu(past + 1)
    return additive(blocked, text.dtype)


def additive(blocked: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores so that `blocked` keys are not attended to; finite."""
    low = -3e4 if dtype == torch.float16 else -1e30
    return torch.zeros(blocked.shape, dtype=dtype, device=blocked.device).masked_fill_(blocked, low)


@dataclass
class PrefixKV:
    """Keys and values of U prompt prefixes, per layer [U, Hkv, P, hd], and the next position."""

    keys: list[Tensor]
    values: list[Tensor]
    next_position: int

    @property
    def length(self) -> int:
        """Tokens in the prefix, P."""
        return self.keys[0].shape[2]

    def select(self, rows: Tensor) -> "PrefixKV":
        """The prefixes `rows` [R], repeated as asked."""
        return PrefixKV(
            [k.index_select(0, rows) for k in self.keys],
            [v.index_select(0, rows) for v in self.values],
            self.next_position,
        )
