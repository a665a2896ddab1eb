"""Games of ALFWorld drawn at random, of any split."""

import random
from collections.abc import Sequence

from turbo.envs.alfworld_rooms import ROOMS, Game, fill_room, sample_room


def sample_game(
    rng: random.Random, task: str, size: str = "small", rooms: Sequence[str] = tuple(ROOMS)
) -> Game:
    """A game of a task type; it can be won, and is not won at the start."""
    return fill_room(rng, sample_room(rng, task, size, rooms), task, size)
