"""Settings as a run saved them: whether they are of this program; what a resumed run may change.

Left out: the file (`turbo.checkpoint`).
"""

from dataclasses import asdict
from typing import Literal, get_args, get_origin, get_type_hints

from turbo.config import TrainConfig
from turbo.envs.make import is_name

_KEPT = ("save_every", "keep", "max_faults")
# Of what a resumed run may change, that which counts from then on: its length, what it keeps
LASTING = ("updates", *_KEPT)
# On what no outcome depends: where a run is kept, what it tells, and what suits its machine
_APART = {*_KEPT, "resume", "out", "overwrite", "quiet", "json"}
_APART |= {"tensorboard", "wandb", "trackio", "micro_tokens", "gpu", "decode_graphs"}
INDIFFERENT = _APART | {"workers", "teacher_url", "teacher_key_env", "teacher_concurrency"}
INDIFFERENT |= {"teacher_timeout", "teacher_price_in", "teacher_price_out"}
# What a resumed run may change
FREE = _APART | {"updates", "minutes"}


def from_saved(saved: object, source: str) -> TrainConfig:
    """Settings as a run saved them; ValueError names what is not of this program.

    A setting that is newer than the run stands at its field's default. So that of a new setting is
    what the program did before it.
    """
    kinds = get_type_hints(TrainConfig)
    if not isinstance(saved, dict) or not saved:
        raise ValueError(f"{source} has no settings: start a new run")
    if odd := [str(name) for name in saved if name not in kinds]:
        raise ValueError(
            f"{source} was made by another version of the program, whose setting {odd[0]:.60} is "
            "unknown here: use that version, or start a new run"
        )
    for name, value in saved.items():
        kind = kinds[name]
        if get_origin(kind) is Literal:
            good = value in get_args(kind) and isinstance(value, str)
        elif kind is float:
            good = type(value) in (int, float)
        else:
            good = type(value) is kind
        if not good:
            raise ValueError(f"{source}: {name} cannot be {value!r:.60}: the file was changed")
    c = TrainConfig(**saved)
    if not is_name(c.env):
        raise ValueError(
            f"{source}: env cannot be {c.env!r:.60}, which is unknown here: install the package "
            "that brings it"
        )
    return c


def changed(old: dict, new: TrainConfig) -> list[str]:
    """Names of the settings in which a resumed run would differ from the saved one."""
    now = asdict(new)
    return [k for k in now if k not in FREE and k in old and old[k] != now[k]]
