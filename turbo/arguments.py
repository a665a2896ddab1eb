"""The command line of `turbo.train`: its settings, over those of a preset or of a run to resume.

Left out: what each setting is (`turbo.config`), how flags are read (`turbo.flags`).
"""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from turbo import checkpoint
from turbo.config import TrainConfig, check
from turbo.envs.make import find
from turbo.flags import flag, flag_of, read_flags
from turbo.hub import preset_of
from turbo.idle import check_idle
from turbo.presets import defaults
from turbo.saved import changed, from_saved


@dataclass
class DefaultsSettings:
    """Where the settings that are not given come from."""

    preset: Literal["auto", "tiny", "paper"] = "auto"
    """tiny: what suits the built-in model; paper: the hyper-parameters of the paper's code; auto:
    paper for a model of more than 200 MB, else tiny. --help shows those of the game and the preset
    that stand before it"""
    like: str = ""
    """run directory: its settings, for a new run, such as one with another --seed"""


@dataclass
class TrainFlags(*TrainConfig.__bases__[:-1], DefaultsSettings, TrainConfig.__bases__[-1]):
    """Train a policy with PPO, guided by a teacher merged from its own past checkpoints."""


def parse(argv: list[str]) -> TrainConfig:
    """Settings from the command line, over those of a preset or of the run to resume.

    ValueError says which flag cannot be.
    """

    def read(base: TrainConfig) -> TrainFlags:
        return read_flags(TrainFlags, argv, "turbo.train", default=TrainFlags(**asdict(base)))

    given = read(defaults(*named(argv)))
    source = given.resume or given.like
    if source:
        base = from_saved(checkpoint.read_run(Path(source))["config"], source)
    if given.resume:
        for name, plain in (("out", ""), ("like", ""), ("preset", "auto")):
            if (value := getattr(given, name)) != plain:
                told = f"{flag(name)} {value} is for a new run"
                raise ValueError(f"{told}: leave it out with --resume")
    elif given.like:
        if given.preset != "auto":
            raise ValueError(f"--preset {given.preset} and --like {source}: give one of the two")
        base = replace(base, out="", overwrite=False)
        check(base)
    else:  # the environment may not be named first, and the model may be large
        own = given.preset == "auto"
        base = defaults(given.env, preset_of(settings(given)) if own else given.preset)
    c = settings(read(base))
    alone = not c.resume and "--final-learning-rate" not in map(flag_of, argv)
    if alone and c.learning_rate != base.learning_rate:
        c.final_learning_rate = base.final_learning_rate * (c.learning_rate / base.learning_rate)
    check(c)
    if c.resume and (odd := changed(asdict(base), c)):
        both = {name: [getattr(x, name) for x in (base, c)] for name in odd}
        called = {name: flag(name) for name in odd} | {"env": "the environment"}
        told = (
            f"{called[name]} {x or repr(x)}, not {y or repr(y)}" for name, (x, y) in both.items()
        )
        raise ValueError(f"{c.resume} was begun with {', '.join(told)}: leave that out")
    check_idle(c, base)
    return c


def named(argv: list[str]) -> tuple[str, str]:
    """The game and the preset whose defaults --help shows: before anything is read."""
    words = [part for word in argv for part in word.split("=", 1)]
    env = words[0] if words and not words[0].startswith("-") else "points24"
    find(env)
    after = words[words.index("--preset") + 1 :] if "--preset" in words else ["auto"]
    preset = after[0] if after else ""
    return env, "tiny" if preset == "auto" else preset


def settings(given: TrainFlags) -> TrainConfig:
    """What was given, without what tells where the rest comes from."""
    return TrainConfig(**{f.name: getattr(given, f.name) for f in fields(TrainConfig)})
