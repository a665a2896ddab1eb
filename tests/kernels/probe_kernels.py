"""Kernels that note what the others' parts do; importing this needs triton."""

import triton
import triton.language as tl

from turbo.kernels.ties_triton import place
from turbo.kernels.tiles_triton import random_bits


@triton.jit
def note_places(places):  # [programs, 2] int64, in the order in which a GPU starts them
    """Which tile each program would merge."""
    down, across = place()
    started = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    tl.store(places + 2 * started, down)
    tl.store(places + 2 * started + 1, across)


@triton.jit
def note_bits(bits, seed, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # [programs, BLOCKS * BLOCK]
    """The random bits of each span of an EMA, block after block."""
    span = tl.program_id(0)
    for block in range(BLOCKS):
        at = block * BLOCK
        entry = span * BLOCKS * BLOCK + at + tl.arange(0, BLOCK)
        tl.store(bits + entry, random_bits(seed + span, at, BLOCK))
