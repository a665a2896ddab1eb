"""Copies of a run's records, by flag: TensorBoard, Weights & Biases, trackio.

    --tensorboard        RUN/tensorboard
    --wandb PROJECT      RUN/wandb, offline; WANDB_MODE=online sends it while it trains
    --trackio PROJECT    trackio's own folder; TRACKIO_SPACE_ID or TRACKIO_SERVER_URL send it

Nothing goes over the network unless one of those variables asks for it. The names are those of
`turbo.log.METRICS`, one step an update. A resumed run goes on in the same place: its name there
derives from an id in RUN/logger.json. An update that is done again after a kill has the same
numbers again; TensorBoard shows the later ones, trackio both.

Left out: what is recorded (`turbo.log`); system figures, sources and console, which Weights &
Biases would take along by itself.
"""

import contextlib
import importlib.util
import io
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from turbo.checkpoint import LOGGER, read_json, write_json
from turbo.config import TrainConfig
from turbo.log import Sink

PACKAGES = ("tensorboard", "wandb", "trackio")  # each called as its flag is


def check_packages(c: TrainConfig) -> None:
    """Refuse a log whose package is missing, before anything is trained."""
    for name in PACKAGES:
        if getattr(c, name):
            found = importlib.util.find_spec(name)
            if found is None or found.origin is None:  # a folder of that name is no package
                raise ValueError(f"--{name} needs {name}: pip install 'gtr-turbo[loggers]'")


def open_sinks(c: TrainConfig, run: Path, update: int, warn: Callable[[str], None]) -> list[Sink]:
    """The sinks that the settings ask for; one that cannot be opened is told of and left out.

    `update` is where a resumed run goes on.
    """
    resumed = bool(c.resume)
    about = dict(run=run, config=asdict(c), resumed=resumed)
    makers: dict[str, Callable[[], Sink]] = {
        "tensorboard": lambda: TensorboardSink(
            run / "tensorboard", update + 1 if resumed else None
        ),
        "wandb": lambda: WandbSink(c.wandb, **about),
        "trackio": lambda: TrackioSink(c.trackio, **about),
    }
    sinks = []
    for name in PACKAGES:
        if getattr(c, name):
            try:
                sinks.append(makers[name]())
            except Exception as error:  # of a foreign package, which may raise anything
                warn(f"the {name} log is left out, since it could not be opened: {error}")
    return sinks


def logger_id(run: Path) -> str:
    """What the run is called elsewhere; drawn once, and kept in its folder."""
    path = run / LOGGER
    if not path.is_file():
        write_json(path, {"id": secrets.token_hex(4)})
    return str(read_json(path)["id"])


class TensorboardSink:
    """Event files for `tensorboard --logdir`."""

    name = "tensorboard"

    def __init__(self, folder: Path, first: int | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run wrote behind its checkpoint is shown no more.
        self._writer = SummaryWriter(log_dir=str(folder), purge_step=first)

    def write(self, update: int, record: Mapping[str, int | float]) -> None:
        """Add one scalar for each metric."""
        for name, value in record.items():
            self._writer.add_scalar(name, value, update)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbSink:
    """A run in Weights & Biases, offline unless WANDB_MODE says otherwise."""

    name = "wandb"

    def __init__(self, project: str, *, run: Path, config: dict, resumed: bool) -> None:
        mode = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":  # else it reports its own errors to its maker
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=project,
            name=run.name,
            id=logger_id(run),
            resume="allow" if resumed else None,
            dir=str(run),
            mode=mode,
            config=config,
            settings=settings,
        )

    def write(self, update: int, record: Mapping[str, int | float]) -> None:
        """Log one step of the run."""
        self._run.log(dict(record), step=update)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


class TrackioSink:
    """A run in trackio, the local dashboard of Hugging Face: `trackio show --project PROJECT`."""

    name = "trackio"

    def __init__(self, project: str, *, run: Path, config: dict, resumed: bool) -> None:
        with _silent():  # it prints what it does, to standard output
            import trackio

            self._finish = trackio.finish
            with contextlib.nullcontext() if _remote() else _no_hub():
                self._run = trackio.init(
                    project=project,
                    name=f"{run.name}-{logger_id(run)}",
                    resume="allow" if resumed else "never",
                    config=config,
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )

    def write(self, update: int, record: Mapping[str, int | float]) -> None:
        """Log one step of the run."""
        self._run.log(dict(record), step=update)

    def close(self) -> None:
        """End the run."""
        with _silent():
            self._finish()


def _remote() -> bool:
    """Whether the user has named a place on the network for trackio."""
    return any(os.environ.get(k) for k in ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"))


@contextlib.contextmanager
def _no_hub() -> Iterator[None]:
    """Keep trackio from asking the Hub for the name of the user."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _silent() -> contextlib.AbstractContextManager:
    return contextlib.redirect_stdout(io.StringIO())
