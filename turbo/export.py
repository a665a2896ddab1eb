"""A result to take away, for plain transformers or peft: `python -m turbo.export RUN --out DIR`.

With --what policy, adapter or teacher it is

    adapter    LoRA factors that peft's `PeftModel.from_pretrained(base, DIR)` loads
    policy     base + s B A, merged in float32, as a model that plain transformers loads
    teacher    base + merge(s_1 B_1 A_1, ...), the merged teacher, likewise

Beside the weights: tokenizer, chat template, image processor, generation settings, a picture to try
it with, a model card (`turbo.card`) and gtr_turbo.json, the record of how it was made. Everything
is written into DIR.partial-PROCESS, which becomes DIR at the end: DIR is whole or not there, and
only a process that is killed outright leaves the other one. The network is used with --push alone
(and for a base of the Hub that has gone from the cache).

Left out: quantised formats, serving, and weights of the value head.
"""

import importlib.util
import re
import signal
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import torch
import tyro
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from turbo import checkpoint, families
from turbo.card import Facts, card
from turbo.config import TrainConfig
from turbo.envs.make import find
from turbo.flags import conclude, read_flags
from turbo.formats import (
    Kept,
    check_out,
    copy_processor_files,
    generation_config,
    is_far_from_all,
    loss_of_rounding,
    policy_matrices,
    save_adapter,
    save_model,
    saved_dtype,
    write_folder,
)
from turbo.hub import model_folder, model_name, model_sha256, open_model
from turbo.log import read_jsonl
from turbo.lora import Lora, new_lora
from turbo.model import VisionLanguageModel
from turbo.run import env_maker, rollout_options
from turbo.saved import from_saved
from turbo.teacher import saved_teacher
from turbo.versions import versions

RECORD, PICTURE = "gtr_turbo.json", "example.png"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass
class ExportConfig:
    """Write a run's policy, its LoRA adapter or its merged teacher as files for plain transformers
    and peft: weights, tokenizer, image processor, generation settings, and a model card whose
    README.md says how to load them and what the run measured.

    python -m turbo.export runs/first --out first

    python -m turbo.export runs/first --out first-adapter --what adapter --base owner/base

    python -m turbo.export runs/first --out first-teacher --what teacher --push owner/name
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """run directory of `turbo.train`; it is only read, and may still be training"""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """folder for the export; it must not exist, or be empty, and is made at the very end"""
    what: Literal["adapter", "policy", "teacher"] = "policy"
    """policy: the base with the LoRA factors merged in, a complete model;
    adapter: the factors alone, for peft;
    teacher: the merged teacher, a complete model (runs with --guidance kl or sft)"""
    checkpoint: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """take the checkpoint of update N; without it the newest that is whole"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the saved weights; auto: as the base was saved, and float32, as trained, for an adapter"""
    base: str = ""
    """what card and adapter call the base, such as its name on the Hub (empty: as the run did)"""
    overwrite: bool = False
    """replace DIR if it is an export"""
    push: Annotated[str, tyro.conf.arg(metavar="OWNER/NAME")] = ""
    """also upload to the Hugging Face Hub, with the token of `hf auth login`"""
    private: bool = False
    """with --push: a new repository is a private one"""


@dataclass(frozen=True)
class Source:
    """An opened run: its model, and what is to be exported of it."""

    config: TrainConfig
    sha256: str  # of the base's weights
    versions: dict  # with which the run was made
    records: list[dict]  # of its metrics.jsonl
    vlm: VisionLanguageModel
    lora: Lora
    dense: dict[str, Tensor]  # matrices in place of the base's, by module name, as they are saved
    kept: float  # share of what training changed that they keep
    dtype: torch.dtype  # in which they are saved
    update: int
    env_steps: int


def check(c: ExportConfig) -> TrainConfig:
    """Refuse what cannot be exported, before anything is loaded; the settings of the run."""
    run = Path(c.run)
    if not run.is_dir():
        raise ValueError(f"{c.run!r} is no folder: give a run directory of turbo.train")
    record = checkpoint.read_run(run)
    settings = from_saved(record["config"], c.run)
    if settings.random_weights:
        raise ValueError(f"{run} ran on random weights, for measuring: nothing of it is of use")
    if c.what == "teacher" and not settings.teaches:
        raise ValueError(
            f"{run} has no merged teacher, it was trained with --guidance {settings.guidance}: "
            "export its policy, or train with --guidance kl or sft"
        )
    if c.what == "teacher" and settings.teacher == "initial":
        raise ValueError(
            f"the teacher of {run} is the warm start, {settings.model!r}, itself: use that model, "
            "or train with --teacher merged"
        )
    find(settings.env)  # it draws the example of the export
    if c.push and not HUB_NAME.fullmatch(c.push):
        raise ValueError(f"--push must be owner/name, got {c.push!r}")
    if c.private and not c.push:
        raise ValueError("--private is for --push: name the repository too, or leave it out")
    check_out(c.out, c.overwrite, "export", RECORD, (run, model_folder(settings)))
    if record.get("model_sha256") != model_sha256(settings):
        raise ValueError(f"{run} was trained from another model than {settings.model!r} is now")
    return settings


def open_run(c: ExportConfig, settings: TrainConfig) -> Source:
    """Load a run's model and a checkpoint; ValueError if they do not belong together."""
    run, dtype = Path(c.run), wanted_dtype(c, settings)
    saved = checkpoint.load(run, c.checkpoint, history=c.what == "teacher")
    for problem in saved.problems:
        print(f"warning: {problem}; taking {saved.folder}", file=sys.stderr)
    vlm = open_base(settings, dtype)
    try:
        lora = new_lora(vlm.matrices, settings.lora_rank, settings.lora_alpha, 0)
        lora.load_state_dict(saved.adapter)
        dense, kept = {}, Kept()
        if c.what == "policy":
            dense = policy_matrices(vlm, lora, dtype, kept)
        if c.what == "teacher":
            dense = teacher_matrices(vlm, lora, settings, saved, dtype, kept)
        update, env_steps = int(saved.meta["update"]), int(saved.meta["env_steps"])
    except (KeyError, TypeError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the checkpoint of {run} cannot be exported: {error}; use the program and the model "
            "that made it"
        ) from error
    record, metrics = checkpoint.read_run(run), run / checkpoint.METRICS
    made_with = record.get("versions")
    return Source(
        config=settings,
        sha256=record["model_sha256"],
        versions=made_with if isinstance(made_with, dict) else {},
        records=read_jsonl(metrics) if metrics.is_file() else [],
        vlm=vlm,
        lora=lora,
        dense=dense,
        kept=kept.share,
        dtype=dtype,
        update=update,
        env_steps=env_steps,
    )


def wanted_dtype(c: ExportConfig, settings: TrainConfig) -> torch.dtype:
    """The dtype of the saved weights."""
    if c.dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[c.dtype]
    return torch.float32 if c.what == "adapter" else saved_dtype(model_folder(settings))


def open_base(settings: TrainConfig, dtype: torch.dtype) -> VisionLanguageModel:
    """A run's base on the CPU, by the engine of the run, for it decides how teachers are kept.

    In bfloat16 if it was saved so and is saved so again, else in float32: nothing is rounded twice.
    """
    plain = dtype == torch.bfloat16 == saved_dtype(model_folder(settings))
    engine = "modules" if settings.device == "cuda" else settings.engine
    name = "bfloat16" if plain else "float32"
    # apart: in a sum of 16 bits what was added cannot be told from what was rounded away
    own = dict(device="cpu", engine=engine, dtype=name, play="auto")
    return open_model(replace(settings, **own))


@torch.no_grad()
def teacher_matrices(
    vlm: VisionLanguageModel,
    lora: Lora,
    settings: TrainConfig,
    saved: checkpoint.Checkpoint,
    dtype: torch.dtype,
    kept: Kept,
) -> dict[str, Tensor]:
    """The merged teacher of a checkpoint, [out, in], by module name."""
    dense = {}
    for name, merged, change in saved_teacher(vlm, lora, settings, saved).dense():
        dense[name] = merged.to(dtype)
        kept.add(merged - change, change, dense[name])
    if not dense:
        raise ValueError("no checkpoint had been merged yet: choose a later --checkpoint")
    return dense


def write(folder: Path, c: ExportConfig, source: Source) -> None:
    """All files of an export."""
    vlm, settings, dtype = source.vlm, source.config, source.dtype
    generation = generation_config(vlm, settings.eval_temperature, settings.max_new_tokens)
    vlm.module.generation_config = generation  # transformers would refuse to save some bases' own
    base, on_hub = base_name(c, settings)
    if c.what == "adapter":
        save_adapter(folder, vlm.module, source.lora, base, dtype)
    else:
        save_model(folder, vlm.module, source.dense, dtype)
    generation.save_pretrained(folder)
    vlm.tokenizer.save_pretrained(folder)
    for option, value in families.WHOLE.get(vlm.module.config.model_type, {}).items():
        setattr(vlm.processor, option, value)  # one picture stays one, as in training
    vlm.processor.save_pretrained(folder)
    copy_processor_files(model_folder(settings), folder)
    env = env_maker(settings)()
    picture = env.reset(seed=settings.seed)[0]
    Image.fromarray(picture).save(folder / PICTURE)
    with torch.no_grad():
        places = vlm.see([picture])[0].shape[1]
    facts = Facts(
        what=c.what,
        base=base,
        base_on_hub=on_hub,
        base_sha256=source.sha256,
        config=settings,
        update=source.update,
        env_steps=source.env_steps,
        dtype=str(dtype).removeprefix("torch."),
        kept=source.kept,
        trained_with=source.versions,
        exported_with=versions(),
        records=source.records,
        question=env.prompt(rollout_options(settings).prompt_style).text,
        frame=vlm.frame,
        places=0 if hasattr(vlm.processor, "merge_size") else places,
    )
    checkpoint.write_text(folder / "README.md", card(facts))
    told = ("what", "base", "base_sha256", "update", "env_steps", "dtype", "kept")
    record = {key: getattr(facts, key) for key in told}
    record["settings"] = shareable(settings)
    record |= {"trained_with": facts.trained_with, "exported_with": facts.exported_with}
    checkpoint.write_json(folder / RECORD, record)


def shareable(settings: TrainConfig) -> dict:
    """The settings but for free text, which may hold paths, addresses and names of one machine."""
    kinds = get_type_hints(TrainConfig)
    return {k: v for k, v in asdict(settings).items() if kinds[k] is not str or k == "kl_coef"}


def base_name(c: ExportConfig, settings: TrainConfig) -> tuple[str, bool]:
    """How the base is called, and whether that is a name on the Hub."""
    name = c.base or model_name(settings)
    return name, bool(HUB_NAME.fullmatch(name)) and not Path(name).exists()


def export(c: ExportConfig, source: Source) -> None:
    """Write DIR, whole or not at all; OSError where that fails."""
    write_folder(Path(c.out), lambda folder: write(folder, c, source))


def upload(c: ExportConfig) -> None:
    """Copy DIR to the Hub; OSError tells in one line what came in between."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(c.push, private=c.private or None, exist_ok=True)  # None: as it is
        api.upload_folder(repo_id=c.push, folder_path=c.out, commit_message="Add an export")
    except Exception as error:  # of several libraries, other ones from version to version
        why = " ".join(str(error).split()) or type(error).__name__
        raise OSError(
            f"{c.push} could not be uploaded: {why}. {c.out} is complete; look at the network and "
            f"at `hf auth whoami`, then: hf upload {c.push} {c.out}"
        ) from error


def need_packages(c: ExportConfig) -> None:
    """ImportError, with what to install, if an optional package is missing."""
    if c.what == "adapter" and importlib.util.find_spec("peft") is None:
        raise ImportError("--what adapter needs peft: pip install peft")


def main(argv: list[str] | None = None) -> int:
    """Export; returns the exit status: 0, 1 for a failure, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        c = read_flags(ExportConfig, argv, "turbo.export")
    except ValueError as error:
        return fail(error, 2)
    # SIGTERM ends like Ctrl-C, so that a folder that is half written is removed on the way out
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        return run(c)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    finally:
        signal.signal(signal.SIGTERM, before)


def run(c: ExportConfig) -> int:
    """Check, open, write, upload; the exit status."""
    try:
        settings = check(c)
        need_packages(c)
        source = open_run(c, settings)
    except (ValueError, OSError) as error:
        return fail(error, 2)
    except ImportError as error:
        return fail(error, 1)
    try:
        export(c, source)
        print(f"{c.what} after {source.update} updates: {c.out}; its README.md says how to use it")
        if is_far_from_all(source.kept):
            print(f"{loss_of_rounding(source.kept)}: --dtype float32, or --what adapter, keeps all")
        if c.push:
            upload(c)
            print(f"uploaded to {c.push}")
    except (ValueError, OSError, SafetensorError, ImportError) as error:
        return fail(error, 1)
    return 0


def fail(error: Exception, status: int) -> int:
    """Say in one line what went wrong; the exit status."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(conclude(main))
