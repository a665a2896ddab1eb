"""The command line of `turbo.train`: its settings, over those of a preset or of a run to resume.

Left out: what each setting is (`turbo.config`), how flags are read (`turbo.flags`).
"""

from dataclasses import asdict
from pathlib import Path

from turbo import checkpoint
from turbo.config import TrainConfig, changed, check, from_saved
from turbo.envs.make import find
from turbo.flags import read_flags
from turbo.hub import preset_of
from turbo.idle import check_idle
from turbo.presets import PRESETS, defaults


def flag(name: str) -> str:
    """How a setting is called on the command line."""
    return "the environment" if name == "env" else "--" + name.replace("_", "-")


def parse(argv: list[str]) -> TrainConfig:
    """Settings from the command line, over those of a preset or of the run to resume.

    ValueError says which flag cannot be.
    """
    preset = None  # that of the model
    argv = [x for a in argv for x in (a.split("=", 1) if a.startswith("--preset=") else [a])]
    if "--preset" in argv:
        at = argv.index("--preset")
        preset = argv[at + 1] if at + 1 < len(argv) else ""
        argv = argv[:at] + argv[at + 2 :]
    names = [a for a in argv[:1] if not a.startswith("-")]
    find(names[0] if names else "points24")
    base = defaults(names[0] if names else "points24", "tiny" if preset is None else preset)
    help_text = (
        f"{TrainConfig.__doc__} Presets: --preset {' | '.join(PRESETS)}. Where none is named, a "
        "model of more than 200 MB has that of the paper, not the defaults below."
    )

    def read(base: TrainConfig) -> TrainConfig:
        options = dict(default=base, description=help_text)
        return read_flags(TrainConfig, argv, "turbo.train", also=["--preset"], **options)

    c = read(base)
    if c.resume:
        fresh = f"--out {c.out}" if c.out else f"--preset {preset}" if preset else ""
        if fresh:
            raise ValueError(f"{fresh} is for a new run: leave it out with --resume")
        base = from_saved(checkpoint.read_run(Path(c.resume))["config"], c.resume)
        c = read(base)
    else:  # the environment may not be named first, and the model may be large
        base = defaults(c.env, preset_of(c) if preset is None else preset)
        c = read(base)
    check(c)
    if c.resume and (odd := changed(asdict(base), c)):
        both = {name: [getattr(x, name) for x in (base, c)] for name in odd}
        told = (f"{flag(name)} {x or repr(x)}, not {y or repr(y)}" for name, (x, y) in both.items())
        raise ValueError(f"{c.resume} was begun with {', '.join(told)}: leave that out")
    check_idle(c, base)
    return c
