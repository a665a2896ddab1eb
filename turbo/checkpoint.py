"""Run directories and checkpoints: safetensors and JSON, written whole or not at all.

    RUN/config.json               all settings, versions, commit
    RUN/metrics.jsonl             one line an update
    RUN/episodes.jsonl            a sample of episodes (`turbo.trajectory`)
    RUN/warnings.jsonl            what the metrics gave cause to warn of (`turbo.advice`)
    RUN/view.html                 the page of `turbo.view`, where it was made
    RUN/checkpoints/00000010/     adapter.safetensors, state.safetensors, meta.json, manifest.json
                                  history-00000007.safetensors, ...
    RUN/logger.json               what the run is called in other logs (`turbo.sinks`)
    RUN/lock                      held by the process that writes (`turbo.lock`)
    RUN/faults/                   minibatches that gave no finite gradient (`turbo.faults`)

A checkpoint is written into a temporary folder: its files, then a manifest of their sizes and
hashes; all of it is forced to the disk before the folder is renamed. One that does not agree with
its manifest is left out, and the one before it is used. No generator is saved: every random number
of an update derives from (seed, update).

What the teacher is merged from never changes: each entry of its history has a file of its own,
which the next checkpoint shares by a hard link where the file system has them. So a checkpoint
writes what is new, however long the history is; but a file that is damaged later is so in all, and
the run can then go on without that entry alone.

Left out: what a run's state consists of (`turbo.run`).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbo.config import TrainConfig
from turbo.log import append_whole
from turbo.saved import LASTING
from turbo.versions import versions

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
NAME = re.compile(r"[0-9]{8}")
ENTRY = re.compile(r"teacher/history/(\d{1,8})\.")  # how the tensors of an entry are named
HISTORY = re.compile(r"history-[0-9]{8}\.safetensors")


class CheckpointError(ValueError):
    """A run directory or checkpoint that cannot be used; the message says why and what to do."""


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
    is_run = (path / CONFIG).is_file()
    if there and not overwrite:
        ways = f"continue it with --resume {path}, replace it with --overwrite, or " * is_run
        raise CheckpointError(f"{path} already exists: {ways}choose another --out")
    if there and not is_run:
        raise CheckpointError(f"{path} is not a run directory, so --overwrite leaves it alone")
    return there


def create_run(path: Path, config: TrainConfig, model_sha256: str) -> None:
    """Make a run directory; an existing one is refused unless it is to be overwritten."""
    for entry in occupied(path, config.overwrite):
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    (path / CHECKPOINTS).mkdir(parents=True)
    record = {"config": asdict(config), "versions": versions(), "model_sha256": model_sha256}
    write_json(path / CONFIG, record)


def keep_settings(path: Path, config: TrainConfig) -> None:
    """Write down what a resumed run is given that counts from now on.

    What else may change, such as its logs, is of one sitting.
    """
    record = read_run(path)
    for name in LASTING:
        record["config"][name] = getattr(config, name)
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
    before: Path | None = None,
    best: int | None = None,
) -> Path:
    """Write the checkpoint of `update`, then drop all but the newest `keep` and that of `best`.

    `before` is the checkpoint that this run was at last, loaded or saved: entries of the history
    that are there are shared with it. One of `update` that is there and whole is left as it is.
    OSError where it cannot be written; what was there before is still there then.
    """
    folder = run / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / f"{update:08d}", folder / f"{update:08d}.partial"
    if final.exists() and (final == before or damage(final) is None):  # which reads all of it
        return final
    shutil.rmtree(partial, ignore_errors=True)
    rest, history = _apart(state)
    try:
        partial.mkdir()
        files = _share_history(before, partial, history) if before else {}
        for name, tensors in {ADAPTER: adapter, STATE: rest, **history}.items():
            if name not in files:
                _write_tensors(partial / name, tensors)
                files[name] = _fingerprint(partial / name)
        write_json(partial / META, meta)
        files[META] = _fingerprint(partial / META)
        write_json(partial / MANIFEST, {"files": files})
        _sync(partial)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one
        os.replace(partial, final)
        _sync(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)  # makes room
        raise
    for old in checkpoints(run)[:-keep]:
        if int(old.name) != best:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _apart(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A state without its history, and each entry of the history by the name of its file."""
    rest: dict[str, Tensor] = {}
    history: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        entry = ENTRY.match(key)
        file = history.setdefault(f"history-{int(entry[1]):08d}.safetensors", {}) if entry else rest
        file[key] = tensor
    return rest, history


def _share_history(before: Path, folder: Path, wanted: Iterable[str]) -> dict[str, dict]:
    """Link those of the files that a checkpoint has into a folder; what is recorded of them.

    What cannot be linked is left to be written.
    """
    try:
        recorded = read_json(before / MANIFEST)["files"]
    except (CheckpointError, KeyError):  # it is gone
        return {}
    shared = {}
    for name in wanted:
        with contextlib.suppress(OSError):  # no hard links here, or too many of this file
            if name in recorded and (before / name).stat().st_size == recorded[name]["bytes"]:
                os.link(before / name, folder / name)
                shared[name] = recorded[name]
    return shared


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


def damage(checkpoint: Path, history: bool = True) -> str | None:
    """Why a checkpoint is not what was written, None if it is; `history`: look at that too."""
    try:
        files = read_json(checkpoint / MANIFEST).get("files")
    except CheckpointError as error:
        return str(error)
    if not isinstance(files, dict) or not _are_named_well(files):
        return f"{checkpoint / MANIFEST} does not name the files of a checkpoint"
    for name, recorded in files.items():
        if HISTORY.fullmatch(name) and not history:
            continue
        if problem := _change(checkpoint / name, recorded):
            return problem
    return None


def _change(path: Path, recorded: object) -> str:
    """What is wrong with a file of which this was recorded; nothing if it is as it was written."""
    try:
        found = _fingerprint(path)
    except OSError as error:
        return f"{path} cannot be read: {error}"
    if found == recorded:
        return ""
    size = recorded.get("bytes") if isinstance(recorded, dict) else None
    what = "size" if found["bytes"] != size else "SHA-256"
    return f"{path} is not the file that was written: its {what} differs"


def _lost_entries(checkpoint: Path) -> dict[int, str]:
    """By number, the entries of a checkpoint's history that are damaged, and how."""
    files = read_json(checkpoint / MANIFEST)["files"]
    history = [name for name in files if HISTORY.fullmatch(name)]
    problems = {int(name[8:16]): _change(checkpoint / name, files[name]) for name in history}
    return {number: problem for number, problem in problems.items() if problem}


def _are_named_well(files: Iterable[str]) -> bool:
    """Whether these are the names of a checkpoint's files, all that must be there among them."""
    fixed = {ADAPTER, STATE, META}
    return fixed <= set(files) and all(map(HISTORY.fullmatch, set(files) - fixed))


def checkpoints(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first; one may be damaged."""
    folder = run / CHECKPOINTS
    found = [p for p in folder.iterdir() if NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found)


def disk_bytes(run: Path) -> int:
    """What a run's checkpoints take on the disk, files that they share once."""
    found = [p.stat() for p in (run / CHECKPOINTS).rglob("*") if p.is_file()]
    return sum({s.st_ino: s.st_size for s in found}.values())


def run_of(path: str | Path) -> tuple[Path, int | None] | None:
    """The run that a path leads to, and the update where it is RUN/checkpoints/N; None: no run.

    N is that of a folder, or the number alone: RUN/checkpoints/2 is .../00000002.
    """
    folder = Path(path)
    if (folder / CHECKPOINTS).is_dir():
        return folder, None
    folder = folder.absolute()
    if folder.parent.name == CHECKPOINTS and re.fullmatch(r"\d{1,8}", folder.name):
        run = folder.parent.parent
        return (run, int(folder.name)) if (run / CONFIG).is_file() else None
    return None


def newest(run: Path, history: bool = True) -> tuple[Path, list[str]]:
    """A run's newest checkpoint that is whole, and what is wrong with those that are newer."""
    problems = []
    for folder in reversed(checkpoints(run)):
        problem = damage(folder, history)
        if problem is None:
            return folder, problems
        problems.append(problem)
    if problems:
        raise CheckpointError(f"{run} has no checkpoint that is whole: {'; '.join(problems)}")
    raise CheckpointError(f"{run} has no checkpoint yet: train it first")


def find(run: Path, update: int, history: bool = True) -> Path:
    """A run's checkpoint of one update; CheckpointError if it is gone or not whole."""
    there = {int(p.name): p for p in checkpoints(run)}
    if update not in there:
        kept = ", ".join(map(str, there)) or "none"
        raise CheckpointError(f"{run} has no checkpoint of update {update}; those kept: {kept}")
    problem = damage(there[update], history)
    if problem is not None:
        raise CheckpointError(problem)
    return there[update]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds."""

    folder: Path
    problems: list[str]  # what is wrong with those that are newer
    adapter: dict[str, Tensor]  # LoRA factors by peft's names
    state: dict[str, Tensor]  # all else of the run, by the names that `turbo.run` gives
    meta: dict
    lost: dict[int, str]  # entries of the history that are damaged, by number, and how


def load(run: Path, update: int | None = None, history: bool = True) -> Checkpoint:
    """One checkpoint; without `update` the newest whole one.

    Without `history` it is neither checked nor read: what the teacher is merged from is most of a
    large model's checkpoint, and a policy has no need of it.
    """
    if update is None:
        return _read(*newest(run, history), history)
    return _read(find(run, update, history), [], history)


def load_to_go_on(run: Path) -> Checkpoint:
    """The newest whole checkpoint; without those entries of the history that are damaged in all."""
    try:
        return load(run)
    except CheckpointError as error:
        try:
            folder, problems = newest(run, history=False)
        except CheckpointError:
            raise error from None  # which names all that is wrong
    return _read(folder, problems, True, _lost_entries(folder))


def _read(
    folder: Path, problems: list[str], history: bool, lost: dict[int, str] | None = None
) -> Checkpoint:
    lost = lost or {}
    try:
        adapter, state = load_file(folder / ADAPTER), load_file(folder / STATE)
        for file in sorted(read_json(folder / MANIFEST)["files"]) if history else ():
            if HISTORY.fullmatch(file) and int(file[8:16]) not in lost:
                state |= load_file(folder / file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error}") from error
    return Checkpoint(folder, problems, adapter, state, read_json(folder / META), lost)


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
