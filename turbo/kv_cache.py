"""Keys and values of the answers that are being sampled: a slot for every environment.

Per layer [slots + 1, Hkv, places, hd]: a prompt's prefix, copied into the slots that show it, and
behind it what its row has said. On a CPU it grows as answers do; on a GPU, and where passes are
recorded, it has place for whole answers. A pass over few tokens of most slots runs on all of them,
in their order, and reads the cache where it is: on a GPU copying it costs more than rows that
nobody asked for.

With `--decode-graphs` such passes are recorded and replayed (`turbo.graphs`). Rows and lengths then
take few sizes, so that shapes recur.

Left out: what is sampled (`turbo.decode`), the prefixes (`turbo.prefixes`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from turbo.attend import PrefixKV, additive, causal_mask
from turbo.batch import ROWS_OF_FEW, SHORT, round_up
from turbo.graphs import Graphs
from turbo.model import VisionLanguageModel, Weights

CACHED = 32  # places are reserved in multiples of this,
RECORDED = 128  # or of this where passes are recorded
MOST = 0.75  # share of the slots from which on all of them run, where the cache is read in place


class Placed(Protocol):
    """A row of a pass: its slot, and how many tokens it has there behind the prefix."""

    slot: int
    position: int


@dataclass(frozen=True)
class Layout:
    """How rows stand in the batch of a pass."""

    places: list[int]  # of each row
    count: int  # rows that are computed
    length: int  # tokens that are computed of each
    whole: bool = False  # row i of the batch is slot i, for all slots


class KVCache:
    """Keys and values per slot, of prefix and the rest: per layer [slots + 1, Hkv, width, hd]."""

    def __init__(self, vlm: VisionLanguageModel, slots: int, answer: int = 0):
        self.vlm, self.slots, self.width = vlm, slots, 0
        self.graphs = None if vlm.text.record is None else Graphs(vlm.text.record)
        # Places behind the prefix that are made at once on a GPU, and more of them for prompts that
        # get longer. Grown piece by piece, a cache would leave its allocator with as much again in
        # pieces that are too small for it.
        self.ahead, self.spare = (answer, RECORDED) if vlm.text.in_place else (0, 0)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.past = self.next_position = 0  # of the prefix

    def put_prefix(self, slot: int, prefix: PrefixKV, number: int) -> None:
        """Copy one prompt prefix into a slot."""
        if not self.keys:
            self.past, self.next_position = prefix.length, prefix.next_position
            _, heads, _, hd = prefix.keys[0].shape
            # One slot more than there are environments, for rows that only fill up a batch.
            empty = prefix.keys[0].new_zeros(self.slots + 1, heads, 0, hd)
            self.keys, self.values = [empty] * len(prefix.keys), [empty] * len(prefix.keys)
            self.reserve(self.past + self.ahead)
        for own, new in zip(self.keys, prefix.keys, strict=True):
            own[slot, :, : self.past] = new[number]
        for own, new in zip(self.values, prefix.values, strict=True):
            own[slot, :, : self.past] = new[number]

    def layout(self, rows: Sequence[Placed], length: int) -> Layout:
        """The batch of a pass over `rows`, of up to `length` tokens each; the rest is padding."""
        places, count = list(range(len(rows))), round_up(len(rows))
        if length > SHORT:  # a blank row of a large model costs what another one does
            return Layout(places, count if self.vlm.text.small else len(rows), round_up(length, 8))
        if self.graphs is None:
            length = round_up(length, 2)
        else:  # few sizes: every one is a graph
            length = max(2, 1 << (length - 1).bit_length())
            most = min(self.slots, ROWS_OF_FEW * self.vlm.batches.decode)
            step = round_up(-(-most // 4))
            count = -(-len(rows) // step) * step
        if self.vlm.text.in_place and len(rows) >= MOST * self.slots and rows[0].position:
            return Layout([row.slot for row in rows], self.slots, length, whole=True)
        return Layout(places, count, length)

    def forget_graphs(self) -> None:
        """Where there are any; their memory is free again."""
        if self.graphs is not None:
            self.graphs.clear()

    def reserve(self, tokens: int) -> int:
        """Make place for `tokens` in every slot; how many of them to attend to."""
        used = round_up(tokens, CACHED if self.graphs is None else RECORDED)
        if used > self.width:
            self.forget_graphs()
            self.width = used + self.spare
            for cache in (self.keys, self.values):  # layer by layer: never two whole caches
                for i, x in enumerate(cache):
                    cache[i] = F.pad(x, (0, 0, 0, self.width - x.shape[2]))
        return used

    def _take(self, cache: Tensor, slot: Tensor, used: int, whole: bool) -> Tensor:
        """[R, Hkv, used, hd] of the slots; whole slots are copied four times as fast as parts."""
        if whole:
            return cache[: self.slots, :, :used]
        return cache.index_select(0, slot) if used == self.width else cache[slot, :, :used]

    def run(self, weights: Weights, ids: Tensor, rows: Sequence[Placed], layout: Layout) -> Tensor:
        """Hidden states [R, L, D] of ids [R, L] behind what each row has in the cache.

        They are cached too.
        """
        text, length = self.vlm.text, ids.shape[1]
        far = max(row.position for row in rows)
        slots, starts = [self.slots] * len(ids), [0] * len(ids)  # blank rows write to the last slot
        for place, row in zip(layout.places, rows, strict=True):
            slots[place], starts[place] = row.slot, row.position
        slot, start = (torch.tensor(numbers, device=ids.device) for numbers in (slots, starts))
        used = self.reserve(self.past + far + length)
        if far == 0:  # a prompt is read: everything lies in one piece
            return self._run_fresh(weights, text.embed(weights, ids), slot)
        inputs = (ids, slot, start)
        step = partial(self._run_behind, weights, used, layout.whole)
        if self.graphs is None or length > SHORT:
            return step(*inputs)
        text.use(weights)  # refuses weights that are gone, also where nothing but a replay follows
        return self.graphs.run((*ids.shape, used, layout.whole), step, inputs)

    def _run_behind(
        self, weights: Weights, used: int, whole: bool, ids: Tensor, slot: Tensor, start: Tensor
    ) -> Tensor:
        """Hidden states of ids [R, L] in the slots [R] from the places start [R] on.

        It can be recorded: nothing in here depends on values. (The built-in models' rotary table
        does; they are not recorded.)
        """
        text, length = self.vlm.text, ids.shape[1]
        x = text.embed(weights, ids)
        at = start[:, None] + torch.arange(length, device=ids.device)  # [R, L] behind the prefix
        rope = text.text_rope(at + self.next_position)
        at += self.past
        blocked = torch.arange(used, device=ids.device) > at[..., None]  # [R, L, S]
        mask = additive(blocked, text.dtype)[:, None, None]
        _, heads, width, hd = self.keys[0].shape
        place = slot[:, None] * heads + torch.arange(heads, device=ids.device)
        place = place[..., None] * width + at[:, None]
        place = place.flatten()  # [R * Hkv * L] rows of the cache as a matrix of hd columns

        def attend(i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            pair = []
            for cache, new in ((self.keys[i], k), (self.values[i], v)):
                cache.view(-1, hd).index_copy_(0, place, new.reshape(-1, hd))
                pair.append(self._take(cache, slot, used, whole))
            return pair[0], pair[1]

        return text.forward(weights, x, rope, mask, attend)

    def _run_fresh(self, weights: Weights, x: Tensor, slot: Tensor) -> Tensor:
        """Hidden states of embeddings x [R, L, D] right behind the prefixes of the slots."""
        text, past, length = self.vlm.text, self.past, x.shape[1]
        rope = text.text_rope(torch.arange(length, device=x.device) + self.next_position)

        def attend(i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            pair = []
            for cache, new in ((self.keys[i], k), (self.values[i], v)):
                cache[slot, :, past : past + length] = new
                pair.append(torch.cat([cache[slot, :, :past], new], 2))
            return pair[0], pair[1]

        return text.forward(weights, x, rope, causal_mask(length, past, text), attend)
