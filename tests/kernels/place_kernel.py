"""A kernel that notes which tile each program would merge; importing it needs triton."""

import triton
import triton.language as tl

from turbo.kernels.ties_triton import place


@triton.jit
def note_places(places):  # [programs, 2] int64, in the order in which a GPU starts them
    down, across = place()
    started = tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)
    tl.store(places + 2 * started, down)
    tl.store(places + 2 * started + 1, across)
