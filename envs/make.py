"""Environments by name: `make("points24")`, `make("mypackage.maze:Maze")`.

After `register_envs()` also `gymnasium.make("gtr_turbo/Points24-v0")`.
"""

import inspect
from difflib import get_close_matches
from functools import cache

import gymnasium as gym

from turbo.envs import custom
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
    return find(name)(**options)


@cache
def find(name: str) -> type:
    """The class of an environment: one of this project's, module:Class, or an entry point."""
    if _known(name) in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    return custom.load_class(name, name if custom.is_path(name) else custom.installed()[name])


def takes(name: str, option: str) -> bool:
    """Whether the constructor of an environment has this option."""
    return option in inspect.signature(find(name)).parameters


def tiny_kwargs(name: str) -> dict:
    """The constructor options that draw pictures for the tiny model.

    A class of one's own has them as TINY, or, where it is made from a game here, that game's.
    """
    if name in TINY:
        return dict(TINY[name])
    kind = find(name)
    if hasattr(kind, "TINY"):
        return dict(kind.TINY)
    known = {ENVIRONMENTS[game]: options for game, options in TINY.items()}
    options = next((known[c] for c in kind.__mro__ if c in known), {})
    parameters = inspect.signature(kind).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(options)
    return {option: value for option, value in options.items() if takes(name, option)}


def check_env(name: str, needs_expert: bool = False) -> None:
    """ValueError where an environment is unknown, or is somebody's own and cannot be trained in."""
    if find(name) in ENVIRONMENTS.values():
        return
    small = tiny_kwargs(name)
    for options in (small, {}) if small else ({},):
        custom.try_out(name, lambda options=options: make(name, **options))
    if needs_expert:
        custom.check_expert(name, make(name, **small))


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


def is_name(name: str) -> bool:
    """Whether this is a name that could be an environment's; nothing is imported."""
    return name in ENVIRONMENTS or custom.is_path(name) or name in custom.installed()


def _known(name: str) -> str:
    if is_name(str(name)):
        return name
    names = [*ENVIRONMENTS, *custom.installed()]
    near = get_close_matches(str(name).lower(), names, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"environment {name!r} is unknown: use {', '.join(names)}, or module:Class.{hint}"
    )
