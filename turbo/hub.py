"""Where a run's model comes from: the built-in warm starts, a folder, the Hub, or nowhere.

Left out: what a loaded model is (`turbo.model`).
"""

import hashlib
import json
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from turbo import memory, shapes
from turbo.batch import MICRO_ROWS
from turbo.coded import find_bitsandbytes
from turbo.config import TrainConfig
from turbo.machine import host_bytes
from turbo.model import (
    Engine,
    VisionLanguageModel,
    is_small,
    load,
    pick_device,
    pick_dtype,
    random_model,
)
from turbo.parallel import cores
from turbo.sft_config import SftConfig
from turbo.tiny import builtin_path

BUILT_IN = "turbo/models/"  # within the repository
WHOLE = 1 << 30  # bytes of weights that are hashed whole


def open_model(c: TrainConfig) -> VisionLanguageModel:
    """The model of a run, loaded and put where it is to run."""
    device = device_of(c)
    check_nf4(c)
    engine = Engine(
        c.engine, c.device, c.quantize, c.gradient_checkpointing, c.decode_graphs, c.play
    )
    dtype = pick_dtype(c.dtype, device)
    if c.gpu and device.type == "cuda":
        share = c.gpu * memory.GB / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    if c.random_weights:
        vlm = random_model(c.model, dtype, engine)
    else:
        vlm = load(model_folder(c), dtype, engine)
    if not vlm.text.small:
        vlm.batches.score = MICRO_ROWS  # as the planner counts
        tokens = c.micro_tokens or planned_tokens(memory_plan(c))
        vlm.batches.tokens = vlm.batches.decode_tokens = tokens
    return vlm


def plan_prompts(
    vlm: VisionLanguageModel, c: TrainConfig, prefix: int, suffix: int
) -> memory.Plan | None:
    """The plan of a run whose prompts have up to so many tokens; None where there is none.

    Tokens of a micro-batch that were left open are settled by it. ValueError where it does not fit.
    """
    plan = memory_plan(c, prefix, suffix)
    if plan is not None:
        if told := refusal(c, plan):
            raise ValueError(told)
        vlm.batches.tokens = vlm.batches.decode_tokens = c.micro_tokens or planned_tokens(plan)
    return plan


def model_folder(c: TrainConfig) -> Path:
    """Where the model's files are.

    `tiny` is the warm start shipped for the environment; what is no folder is an id of the Hugging
    Face Hub, taken from its cache, or downloaded.
    """
    if c.model == "tiny":
        if not builtin_path(c.env).is_dir():
            raise ValueError(
                f"--model tiny: no warm start is built in for {c.env}; make one with `python -m "
                f"turbo.sft {c.env} --out DIR`, then use --model DIR"
            )
        return builtin_path(c.env)
    if is_hub_id(c.model):
        return snapshot(c.model)
    if told := no_model(Path(c.model)):
        raise ValueError(f"model {c.model!r} {told}")
    return Path(c.model)


def no_model(folder: Path) -> str:
    """What a path leads to in place of a model, and the remedy; nothing where it may be one."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        if known := shapes.PUBLISHED.get(str(folder)):
            ways = "or measure its shapes, with --random-weights"
            return f"{what}: its weights are {known.hugging_face_id} on the Hub; {ways}"
        return f"{what}: give a folder with a model, the id of one on the Hub, or `tiny`"
    if (folder / "checkpoints").is_dir() and (folder / "config.json").is_file():
        return (
            "is a run of turbo.train: make a model of its policy with `python -m turbo.export "
            f"{folder} --what policy --out DIR`, and give DIR"
        )
    if (folder / "adapter_config.json").is_file() and missing_weights(folder):
        return (
            "is an adapter without its base: make a model of both with `python -m turbo.merge "
            f"{folder} --exact --base BASE --out DIR`, or export the policy, and give DIR"
        )
    return ""


def model_name(c: TrainConfig) -> str:
    """What the model of a run is called outside of it."""
    return BUILT_IN + c.env if c.model == "tiny" else c.model


def is_hub_id(name: str) -> bool:
    """Whether a name is one of the Hub: owner/model, and neither is a file or folder here."""
    owner = name.partition("/")[0]
    form = re.fullmatch(r"[\w.-]+/[\w.-]+", name)
    return bool(form) and not Path(owner).exists()  # what is mistyped is asked of nobody


def snapshot(name: str) -> Path:
    """The files of a model of the Hub: those in the cache, or fresh ones."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
    why = "is not in the cache"
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted, local_files_only=True))
        if not (lacking := missing_files(folder)):
            return folder
        why = f"is not whole in the cache, {lacking[0]} is missing"  # a download that was cut off
    except LocalEntryNotFoundError:
        pass
    print(f"{name} {why}: downloading it", file=sys.stderr)
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # no network, no such model, no permission
        raise ValueError(
            f"model {name!r} is no folder, {why}, and could not be downloaded: {error}"
        ) from error


def missing_files(folder: Path) -> list[str]:
    """What a model's folder lacks to be loaded, as far as its own index of weights tells."""
    parts = (
        ["config.json"],
        ["tokenizer.json", "tokenizer_config.json"],
        ["preprocessor_config.json", "processor_config.json"],
    )
    lacking = [names[0] for names in parts if not any((folder / n).is_file() for n in names)]
    return lacking + missing_weights(folder)


def missing_weights(folder: Path) -> list[str]:
    """Files of weights that a folder lacks: of those that its index names, or the one file."""
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file():
        try:
            known = json.loads(index.read_text(encoding="utf-8"))
            names = sorted(set(known["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is no index of weights: {error!r}") from error
    return [name for name in names if not (folder / name).is_file()]


def model_sha256(c: TrainConfig) -> str:
    """A fingerprint of the model's weights, so that a run is never resumed on others.

    The hash of a model in one small file; of large ones, of sizes and of both ends of every file.
    """
    if c.random_weights:
        shapes.find_config(c.model)  # says which there are
        return hashlib.sha256(f"random {c.model}".encode()).hexdigest()
    folder = model_folder(c)
    file = folder / "model.safetensors"
    if lacking := missing_weights(folder):
        remedy = f"give a folder that holds a model, or make one: `python -m turbo.sft {c.env}`"
        if lacking != [file.name]:
            remedy = "its index names it: copy or download it again"
        raise ValueError(f"model {c.model!r}: {folder / lacking[0]} is missing; {remedy}")
    if file.is_file() and file.stat().st_size < WHOLE:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    files = sorted(folder.glob("*.safetensors"))
    found = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            found.update(stream.read(1 << 20))
            stream.seek(max(0, size - (1 << 20)))
            found.update(stream.read())
    return found.hexdigest()


def device_of(c: TrainConfig | SftConfig) -> torch.device:
    """Where the model of a run will run."""
    return pick_device(c.device, is_small_model(c))


def is_small_model(c: TrainConfig | SftConfig) -> bool:
    """Whether a run's model is of the built-in ones' kind."""
    return c.model in ("", "tiny") or is_small(Path(c.model))


def preset_of(c: TrainConfig) -> str:
    """The preset of `turbo.presets` that suits the size of a run's model."""
    return "tiny" if is_small_model(c) and not c.random_weights else "paper"


def check_nf4(c: TrainConfig) -> None:
    """Refuse a base in 4 bits on a GPU without bitsandbytes: read back by PyTorch alone it takes
    many times as long, and memory that the plan does not have."""
    if c.quantize == "nf4" and device_of(c).type == "cuda" and find_bitsandbytes() is None:
        raise ValueError("--quantize nf4 on a GPU needs bitsandbytes: pip install bitsandbytes")


def own_workers(c: TrainConfig | SftConfig, most: int) -> int:
    """How many processes work by themselves: one on a GPU, else one a core, at most `most`."""
    if device_of(c).type == "cuda":
        if c.workers > 1:
            raise ValueError(f"--workers must be 1 on a GPU, got {c.workers}")
        return 1
    return c.workers or min(cores(), most)


def lack_of_memory(c: TrainConfig) -> str:
    """Why a run cannot fit its card or its host, and settings that do; nothing where it can.

    Its prompts are not known yet: `plan_prompts` asks again.
    """
    plan = memory_plan(c)
    return "" if plan is None else refusal(c, plan)


def refusal(c: TrainConfig, plan: memory.Plan) -> str:
    """Why this card cannot hold what is planned, or its host; nothing where they can."""
    here = device_of(c).type == "cuda"  # else another machine's card is planned for
    return memory.refuse(plan) or (here and memory.refuse_host(plan, host_bytes())) or ""


def has_card(c: TrainConfig) -> bool:
    """Whether a run is on a GPU, or planned for the card that --gpu names."""
    return device_of(c).type == "cuda" or c.gpu > 0


def memory_plan(c: TrainConfig, prefix: int = 0, suffix: int = 0) -> memory.Plan | None:
    """What a run needs of its GPU, or of the card that --gpu names; nothing is loaded for it.

    Prompts have as many tokens as the planner assumes, or `prefix` and `suffix` where those are
    more. A row that is longer than --micro-tokens runs alone, and is what is planned for. None on a
    CPU, and for a family that the planner does not know.
    """
    if not has_card(c):
        return None
    own = ("quantize", "lora_rank", "optimizer", "gradient_checkpointing", "envs")
    own += ("max_new_tokens", "steps_per_update")
    settings = memory.Settings(
        **{name: getattr(c, name) for name in own},
        history=max(1, c.kept_checkpoints),
        prompt_tokens=max(prefix, memory.Settings.prompt_tokens),
        suffix_tokens=max(suffix, memory.Settings.suffix_tokens),
    )
    name = c.model if c.random_weights else str(model_folder(c))
    config = shapes.find_config(name)
    try:
        shape = shapes.text_shape(config, c.model)
    except ValueError as error:
        _warn(f"memory is not planned: {error}")
        return None
    there = c.gpu * memory.GB or torch.cuda.mem_get_info()[1]
    tokens = c.micro_tokens or memory.good_micro_tokens(shape, settings, there)
    return memory.plan(shape, replace(settings, micro_tokens=max(tokens, settings.row)), there)


@cache
def _warn(text: str) -> None:
    """Say so once: a run is planned several times."""
    print(f"warning: {text}", file=sys.stderr)


def planned_tokens(plan: memory.Plan | None) -> int:
    """Tokens that run at once in a run that leaves them open."""
    return (plan.settings if plan else memory.Settings).micro_tokens


def observation(c: TrainConfig) -> Literal["small", "full"]:
    """How the games are shown to the model of a run."""
    if c.observation != "auto":
        return c.observation
    return "small" if preset_of(c) == "tiny" else "full"
