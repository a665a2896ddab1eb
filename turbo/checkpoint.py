"""Run directories and checkpoints: safetensors and JSON, written whole or not at all.

    RUN/config.json               all settings, versions, commit
    RUN/metrics.jsonl             one line an update
    RUN/episodes.jsonl            a sample of episodes (`turbo.trajectory`)
    RUN/warnings.jsonl            what the metrics gave cause to warn of (`turbo.advice`)
    RUN/view.html                 the page of `turbo.view`, where it was made
    RUN/checkpoints/00000010/     adapter.safetensors, state.safetensors, meta.json, manifest.json
    RUN/logger.json               what the run is called in other logs (`turbo.sinks`)
    RUN/lock                      held by the process that writes (`turbo.lock`)
    RUN/faults/                   minibatches that gave no finite gradient (`turbo.faults`)

A checkpoint is written into a temporary folder: its files, then a manifest of their sizes and
hashes; all of it is forced to the disk before the folder is renamed. One that does not agree with
its manifest is left out, and the one before it is used. No generator is saved: every random number
of an update derives from (seed, update).

Left out: what a run's state consists of (`turbo.run`).
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbo.config import TrainConfig
from turbo.log import append_whole

CONFIG, METRICS, EPISODES, WARNINGS, LOGGER, CHECKPOINTS, FAULTS, LOCK = (
    "config.json",
    "metrics.jsonl",
    "episodes.jsonl",
    "warnings.jsonl",
    "logger.json",
    "checkpoints",
    "faults",
    "lock",
)
ADAPTER, STATE, META, MANIFEST = (
    "adapter.safetensors",
    "state.safetensors",
    "meta.json",
    "manifest.json",
)
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW
NAME = re.compile(r"[0-9]{8}")


class CheckpointError(ValueError):
    """A run directory or checkpoint that cannot be used; the message says why and what to do."""


def processor() -> str:
    """The processor's name as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def versions() -> dict[str, str]:
    """What a result depends on: versions, Python, processor, the commit of a source checkout."""
    import numpy
    import transformers

    import turbo

    root = Path(__file__).resolve().parent.parent
    commit = ""
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        with contextlib.suppress(OSError):  # no git
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            commit = done.stdout.strip()
    return {
        "gtr-turbo": turbo.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "processor": processor(),
    }


@contextlib.contextmanager
def writing(out: str | Path) -> Iterator[None]:
    """What fails inside because it cannot be written is an OSError that names --out."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = " ".join(str(error).split())
        raise OSError(f"--out {out} cannot be written: {why}") from error


def try_folder(out: Path) -> None:
    """OSError where nothing can be written into a folder; no trace of the trial is left."""
    made = [p for p in (out, *out.parents) if not p.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"x")
    finally:
        for folder in made:
            with contextlib.suppress(OSError):  # it was not made
                folder.rmdir()


def occupied(path: Path, overwrite: bool) -> list[Path]:
    """What is in the way of a new run at `path`; CheckpointError unless it may be overwritten.

    The lock is no content.
    """
    if not path.exists():
        return []
    there = [p for p in path.iterdir() if p.name != LOCK] if path.is_dir() else [path]
    if there and not overwrite:
        raise CheckpointError(
            f"{path} already exists: continue it with --resume {path}, replace it with "
            "--overwrite, or choose another --out"
        )
    if there and not (path / CONFIG).is_file():
        raise CheckpointError(f"{path} is not a run directory, so --overwrite leaves it alone")
    return there


def create_run(path: Path, config: TrainConfig, model_sha256: str) -> None:
    """Make a run directory; an existing one is refused unless it is to be overwritten."""
    for entry in occupied(path, config.overwrite):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (path / CHECKPOINTS).mkdir(parents=True)
    record = {"config": asdict(config), "versions": versions(), "model_sha256": model_sha256}
    write_json(path / CONFIG, record)


def read_run(path: Path) -> dict:
    """The contents of a run's config.json."""
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{path} is not a run directory: it has no {CONFIG}")
    record = read_json(path / CONFIG)
    if not isinstance(record.get("config"), dict):
        raise CheckpointError(f"{path / CONFIG} has no settings: it was not written by turbo.train")
    return record


def save(
    run: Path,
    update: int,
    adapter: dict[str, Tensor],
    state: dict[str, Tensor],
    meta: dict,
    keep: int,
) -> Path:
    """Write the checkpoint of `update`, then drop all but the newest `keep`.

    One that is there and whole is left as it is. OSError where it cannot be written; what was there
    before is still there then.
    """
    folder = run / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / f"{update:08d}", folder / f"{update:08d}.partial"
    if final.exists() and damage(final) is None:
        return final
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        _write_tensors(partial / ADAPTER, adapter)
        _write_tensors(partial / STATE, state)
        write_json(partial / META, meta)
        files = {name: _fingerprint(partial / name) for name in (ADAPTER, STATE, META)}
        write_json(partial / MANIFEST, {"files": files})
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        os.replace(partial, final)
        _sync(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # makes room
        raise
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path)
    except SafetensorError as error:  # what went wrong with the file, in other clothes
        raise OSError(f"{path} cannot be written: {error}") from error
    _sync(path)


def _sync(path: Path) -> None:
    """Return when a file's content, or a folder's entries, are on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _fingerprint(path: Path) -> dict:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint is not what was written, None if it is."""
    try:
        files = read_json(checkpoint / MANIFEST).get("files")
    except CheckpointError as error:
        return str(error)
    if not isinstance(files, dict) or set(files) != {ADAPTER, STATE, META}:
        return f"{checkpoint / MANIFEST} does not name the files of a checkpoint"
    for name, recorded in files.items():
        try:
            found = _fingerprint(checkpoint / name)
        except OSError as error:
            return f"{checkpoint / name} cannot be read: {error}"
        if found != recorded:
            size = recorded.get("bytes") if isinstance(recorded, dict) else None
            what = "size" if found["bytes"] != size else "SHA-256"
            return f"{checkpoint / name} is not the file that was written: its {what} differs"
    return None


def checkpoints(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first; one may be damaged."""
    folder = run / CHECKPOINTS
    found = [p for p in folder.iterdir() if NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found)


def run_of(path: str | Path) -> tuple[Path, int | None] | None:
    """The run that a path leads to, and the update where it is RUN/checkpoints/N; None: no run."""
    folder = Path(path)
    if (folder / CHECKPOINTS).is_dir():
        return folder, None
    folder = folder.resolve()
    if NAME.fullmatch(folder.name) and (folder / ADAPTER).is_file():
        return folder.parent.parent, int(folder.name)
    return None


def newest(run: Path) -> tuple[Path, list[str]]:
    """A run's newest checkpoint that is whole, and what is wrong with those that are newer."""
    problems = []
    for folder in reversed(checkpoints(run)):
        problem = damage(folder)
        if problem is None:
            return folder, problems
        problems.append(problem)
    if problems:
        raise CheckpointError(f"{run} has no checkpoint that is whole: {'; '.join(problems)}")
    raise CheckpointError(f"{run} has no checkpoint yet: train it first")


def find(run: Path, update: int) -> Path:
    """A run's checkpoint of one update; CheckpointError if it is gone or not whole."""
    there = {int(p.name): p for p in checkpoints(run)}
    if update not in there:
        kept = ", ".join(map(str, there)) or "none"
        raise CheckpointError(f"{run} has no checkpoint of update {update}; those kept: {kept}")
    problem = damage(there[update])
    if problem is not None:
        raise CheckpointError(problem)
    return there[update]


def load(run: Path, update: int | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Adapter, state and meta data of one checkpoint; without `update` of the newest whole one."""
    folder = newest(run)[0] if update is None else find(run, update)
    try:
        adapter, state = load_file(folder / ADAPTER), load_file(folder / STATE)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error}") from error
    return adapter, state, read_json(folder / META)


def section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def read_json(path: Path) -> dict:
    """A JSON object from a file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return data


def write_json(path: Path, data: dict) -> None:
    """Write a JSON object, whole or not at all."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    os.replace(partial, path)


def append_text(path: Path, text: str) -> None:
    """Write behind what a file holds, all of it or nothing."""
    with path.open("ab", buffering=0) as file:
        append_whole(file, text.encode())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's moments and step counts, as named tensors."""
    out = {}
    for i, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state[parameter].items():
            out[f"optimizer/{i}/{name}"] = torch.as_tensor(value).clone()  # bnb shares
    return out


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave: the moments of every parameter, or of none."""
    parameters = _parameters(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in section(tensors, "optimizer/").items():
        i, _, name = key.partition("/")
        state.setdefault(int(i), {})[name] = value
    if state and sorted(state) != list(range(len(parameters))):
        raise ValueError(f"moments of {len(state)} parameters, expected {len(parameters)}")
    coded = type(optimizer).__name__ == "AdamW8bit"
    for i, values in state.items():
        want = _coded_moments(parameters[i]) if coded else _moments(parameters[i])
        found = {name: (value.shape, value.dtype) for name, value in values.items()}
        found.pop("step", None)
        if found != want or values.get("step", torch.ones(1)).numel() != 1:
            raise ValueError(f"the moments of parameter {i} are not {want}")
    if coded:  # its own way takes no plain tensors
        for i, values in state.items():
            moments = {k: v.to(parameters[i].device) for k, v in values.items()}
            optimizer.state[parameters[i]] = moments | {"step": int(values["step"])}
        return
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _moments(p: Tensor) -> dict[str, tuple]:
    """Shapes and dtypes of AdamW's moments."""
    return dict.fromkeys(MOMENTS, (p.shape, torch.float32))


def _coded_moments(p: Tensor) -> dict[str, tuple]:
    """Those of bitsandbytes' 8-bit AdamW; small parameters are not coded."""
    if p.numel() < 4096:
        return dict.fromkeys(("state1", "state2"), (p.shape, torch.float32))
    out = dict.fromkeys(("state1", "state2"), (p.shape, torch.uint8))
    out |= dict.fromkeys(("qmap1", "qmap2"), (torch.Size([256]), torch.float32))
    blocks = torch.Size([-(-p.numel() // 256)])
    return out | dict.fromkeys(("absmax1", "absmax2"), (blocks, torch.float32))
