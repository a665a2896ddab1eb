"""Run directories and checkpoints: safetensors and JSON, written whole or not at all.

    RUN/config.json               all settings, versions, commit
    RUN/metrics.jsonl             one line an update
    RUN/episodes.jsonl            a sample of episodes: thoughts and verdicts
    RUN/checkpoints/00000010/     adapter.safetensors, state.safetensors, meta.json

A checkpoint is written into a temporary folder that is renamed when it is complete. No generator is
saved: every random number of an update derives from (seed, update).

Left out: hashes and manifests, locks, disk-space checks.
"""

import json
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from turbo.config import TrainConfig

CONFIG, METRICS, EPISODES, CHECKPOINTS = (
    "config.json",
    "metrics.jsonl",
    "episodes.jsonl",
    "checkpoints",
)


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


def create_run(path: Path, config: TrainConfig, model_sha256: str) -> None:
    """Make a run directory; an existing one is refused unless it is to be overwritten."""
    if path.exists() and any(path.iterdir() if path.is_dir() else [path]):
        if not config.overwrite:
            raise CheckpointError(
                f"{path} already exists: continue it with --resume {path}, replace it with "
                "--overwrite, or choose another --out"
            )
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"{path} is not a run directory, so --overwrite leaves it alone")
        shutil.rmtree(path)
    (path / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
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
    """Write the checkpoint of `update`, then drop all but the newest `keep`."""
    folder = run / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    final, partial = folder / f"{update:08d}", folder / f"{update:08d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file({k: v.contiguous() for k, v in adapter.items()}, partial / "adapter.safetensors")
    save_file({k: v.contiguous() for k, v in state.items()}, partial / "state.safetensors")
    write_json(partial / "meta.json", meta)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run / CHECKPOINTS
    found = [p for p in folder.iterdir() if p.name.isdigit()] if folder.is_dir() else []
    return sorted(found)


def load(run: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """Adapter, state and meta data of a run's newest checkpoint."""
    found = checkpoints(run)
    if not found:
        raise CheckpointError(f"{run} has no checkpoint yet: train it first")
    try:
        adapter = load_file(found[-1] / "adapter.safetensors")
        state = load_file(found[-1] / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {found[-1]} cannot be read: {error}") from error
    return adapter, state, read_json(found[-1] / "meta.json")


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
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's moments and step counts, as named tensors."""
    out = {}
    for i, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            out[f"optimizer/{i}/{name}"] = torch.as_tensor(value)
    return out


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, i, name = key.split("/")
            state.setdefault(int(i), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
