"""What rows attend to: keys and values of shared prompt prefixes, masks, heads that share keys.

Left out: attention of the built-in models (`turbo.fused`), caches that grow (`turbo.decode`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
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


def grouped_attention(
    query: Tensor,  # [R, G Hkv, L, hd]
    key: Tensor,  # [R, Hkv, S, hd]
    value: Tensor,  # [R, Hkv, S, hd]
    mask: Tensor,  # additive, [R or 1, 1, L, S]
    scale: float | None,
) -> Tensor:
    """softmax(scale q k^T + mask) v, where G query heads share a head of keys.  # [R, G Hkv, L, hd]

    The G heads' queries stand behind one another as if they were G L queries of one head, so that
    keys and values are read once and not repeated G times first. For few queries: the mask is.
    """
    rows, heads, length, hd = query.shape
    shared = key.shape[1]
    folded = query.reshape(rows, shared, heads // shared * length, hd)
    mask = mask.repeat(1, 1, heads // shared, 1)  # [R or 1, 1, G L, S]
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return out.reshape(rows, heads, length, hd)


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
