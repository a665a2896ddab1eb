"""Environments by name: `make("points24")`.

After `register_envs()` also `gymnasium.make("gtr_turbo/Points24-v0")`.
"""

from difflib import get_close_matches

import gymnasium as gym

from turbo.envs.alfworld import ALFWorld
from turbo.envs.blackjack import Blackjack
from turbo.envs.ezpoints import EZPoints
from turbo.envs.numberline import NumberLine
from turbo.envs.points24 import Points24

ENVIRONMENTS = {
    "points24": Points24,
    "ezpoints": EZPoints,
    "numberline": NumberLine,
    "blackjack": Blackjack,
    "alfworld": ALFWorld,
}
TINY = {  # pictures of the tiny model: few, 28-pixel cells, nothing but what must be seen
    "points24": {"canvas": (112, 56), "draw_formula": False},
    "ezpoints": {"canvas": (56, 56), "draw_formula": False},
    "numberline": {"canvas": (112, 56)},
    "blackjack": {"canvas": (112, 56)},
    # a goal condition pays when it is met: waiting with some of them earns nothing
    "alfworld": {
        "canvas": (168, 112),
        "telling": False,
        "goal_reward": "change",
        "own_process": False,
    },
}


def make(name: str, **options):
    """An environment by name; `options` go to its constructor."""
    return ENVIRONMENTS[_known(name)](**options)


def tiny_kwargs(name: str) -> dict:
    """The constructor options that draw pictures for the tiny model."""
    return dict(TINY[_known(name)])


def register_envs() -> None:
    """Registers gtr_turbo/<Name>-v0 with gymnasium. Calling it again does nothing.

    gymnasium 1.x looks for no plugins: call this before `gymnasium.make`. Made that way, an
    environment returns a new array at every call, as gymnasium asks; `make` leaves the same array
    standing while the picture does, which the trainer makes use of.
    """
    for name, environment in ENVIRONMENTS.items():
        identity = f"gtr_turbo/{environment.__name__}-v0"
        if identity not in gym.registry:
            entry_point = f"turbo.envs.{name}:{environment.__name__}"
            gym.register(identity, entry_point=entry_point, kwargs={"fresh_pictures": True})


def _known(name: str) -> str:
    if name in ENVIRONMENTS:
        return name
    near = get_close_matches(str(name).lower(), ENVIRONMENTS, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"environment {name!r} is unknown: use {', '.join(ENVIRONMENTS)}.{hint}")
