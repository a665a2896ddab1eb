"""Weights and settings in the formats of transformers and peft.

    save_model      a complete model, for `AutoModelForImageTextToText.from_pretrained`
    save_adapter    LoRA factors, for peft's `PeftModel.from_pretrained`
    policy_matrices a policy's matrices, merged with their base
    Kept            how much of what training changed survives the dtype of a file
    check_out       whether a command may write to a folder
    write_folder    a folder that is whole or not there

Left out: which weights these are, and all other files of an export (`turbo.export`).
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from turbo.checkpoint import try_folder, writing
from turbo.coded import read_dense
from turbo.families import without_bars
from turbo.lora import Lora
from turbo.model import VisionLanguageModel

# Read by transformers' AutoProcessor and by servers such as vLLM, where a model has them
PROCESSOR_FILES = ("processor_config.json", "video_preprocessor_config.json")
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft calls them


def saved_dtype(folder: Path) -> torch.dtype:
    """The dtype in which a model folder was saved."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return config.dtype or config.get_text_config().dtype or torch.float32


LITTLE = 0.01  # of a change: what is lost beyond that is told


def is_far_from_all(share: float) -> bool:
    """Whether so much of a change is lost, or added, that it is worth telling."""
    return abs(share - 1) > LITTLE


def loss_of_rounding(share: float) -> str:
    """What is said where the dtype of a file loses some of what training changed."""
    return f"rounded, the weights keep {share:.1%} of what training changed"


class Kept:
    """What is left of a change of matrices when their sum is rounded.

    The part that lies along the change, over all matrices: <r(base + change) - r(base), change> /
    |change|^2, r to round. Changes below half a unit of a weight's last place are gone: of a run's
    first updates in bfloat16 that is nearly everything. Of a base that is not of that dtype itself
    they are kept on average, as noise that is larger than they are.
    """

    def __init__(self):
        self.along = self.whole = 0.0

    def add(self, base: Tensor, change: Tensor, saved: Tensor) -> None:
        """One matrix: as it was, what was added to it, the rounded sum."""
        left = saved.float() - base.to(saved.dtype).float()
        self.along += (left * change).sum(dtype=torch.float64).item()
        self.whole += change.square().sum(dtype=torch.float64).item()

    @property
    def share(self) -> float:
        """1 where nothing is lost, or nothing was changed; more where it grew in rounding."""
        return self.along / self.whole if self.whole else 1.0


@torch.no_grad()
def policy_matrices(
    vlm: VisionLanguageModel, lora: Lora, dtype: torch.dtype, kept: Kept
) -> dict[str, Tensor]:
    """base + s B A, [out, in], by module name, on the CPU; computed in float32."""
    dense = {}
    for name, (a, b) in lora.factors.items():
        base = read_dense(vlm.matrices[name + ".weight"]).float()
        merged = torch.addmm(base, b, a, alpha=lora.scale)
        rounded = merged.to(dtype)
        kept.add(base, merged - base, rounded)
        dense[name] = rounded.cpu()
    return dense


def save_model(
    folder: Path, module: nn.Module, dense: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """A model with some matrices replaced, by module name, in shards as transformers makes them.

    The module is changed: it has these matrices and this dtype afterwards. A layer whose own matrix
    is in 4 bits must be among them.
    """
    for name, matrix in dense.items():
        layer = module.get_submodule(name)
        layer.weight = nn.Parameter(matrix.to(dtype), requires_grad=False)
    for name in module.config.sub_configs:  # else they go on telling how the base was loaded
        if (part := getattr(module.config, name, None)) is not None:
            part.dtype = dtype
    without_bars()
    module.to(dtype).save_pretrained(folder)


def save_adapter(
    folder: Path, module: nn.Module, lora: Lora, base: str, dtype: torch.dtype
) -> None:
    """adapter_model.safetensors and adapter_config.json, which peft itself writes.

    `module` is the model that they adapt, `base` is what it is called.
    """
    from peft import LoraConfig

    alpha, kind = lora.scale * lora.rank, type(module)
    config = LoraConfig(
        base_model_name_or_path=base,
        r=lora.rank,
        lora_alpha=round(alpha) if abs(alpha - round(alpha)) < 1e-9 else alpha,
        target_modules=target_modules(lora.factors, (n for n, _ in module.named_modules())),
        lora_dropout=0.0,
        bias="none",
        inference_mode=True,
    )
    mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    config.save_pretrained(folder, auto_mapping_dict=mapping)
    save_factors(folder, lora, dtype)


def save_factors(folder: Path, lora: Lora, dtype: torch.dtype) -> None:
    """adapter_model.safetensors alone."""
    tensors = {k: v.to(dtype).contiguous() for k, v in lora.state_dict().items()}
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})


def copy_processor_files(base: Path, folder: Path) -> None:
    """What a base has beside tokenizer and image processor, for what is made of it."""
    for name in PROCESSOR_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)


def check_out(
    out: str, overwrite: bool, kind: str, record: str, needed: Iterable[str | Path]
) -> None:
    """ValueError where `write_folder` may not write to --out, or would replace what is `needed`.

    What may be overwritten is a folder of this `kind` (export, merge): one with the file `record`.
    """
    if not out.strip():
        raise ValueError("--out must be a folder, got an empty name")
    out = Path(out)
    there = sorted(out.iterdir()) if out.is_dir() else [out] if out.exists() else []
    if there and not overwrite:
        raise ValueError(f"{out} is there already: choose another --out, or add --overwrite")
    if there and not (out / record).is_file():
        raise ValueError(f"{out} is no {kind} (it has no {record}), so --overwrite leaves it alone")
    for kept in map(Path, needed):
        if kept.exists() and kept.resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--out {out} would replace {kept}, which is needed: choose another")
    try:
        try_folder(out.resolve().parent)  # known before the work is done
    except OSError as error:
        raise ValueError(f"--out {out} cannot be made: {error.strerror}; choose another") from error


def write_folder(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `out`, then give it that name.

    OSError, which names --out, where that fails.

    What was there before is replaced at the very end, or left as it was.
    """
    with writing(out):
        _write_folder(out.resolve(), write)


def _write_folder(out: Path, write: Callable[[Path], None]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (out.with_name(f"{out.name}.{end}-{os.getpid()}") for end in ("partial", "old"))
    try:
        partial.mkdir()
        mode = partial.stat().st_mode & 0o666
        write(partial)
        for file in [p for p in partial.rglob("*") if p.is_file()]:
            file.chmod(mode)  # safetensors lets nobody else read what it writes
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if out.exists() and any(out.iterdir()):
            os.replace(out, old)
        try:
            os.replace(partial, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def target_modules(names: Iterable[str], modules: Iterable[str]) -> str:
    """A regular expression that matches these of a model's modules and no other.

    peft takes it for the whole name. Bare names such as `q_proj` would also hit those of the
    vision tower. Layers are written as one number where that hits nothing else.
    """
    wanted = sorted(names)
    short = "|".join(
        dict.fromkeys(re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(n)) for n in wanted)
    )
    if {m for m in modules if re.fullmatch(short, m)} == set(wanted):
        return short
    return "|".join(re.escape(n) for n in wanted)


def generation_config(vlm: VisionLanguageModel, temperature: float, max_new_tokens: int):
    """transformers' settings to sample as turbo does: temperature, end, and what is banned.

    Nothing of the base's own settings stays, such as a penalty on repetition.
    """
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        eos_token_id=vlm.end,
        pad_token_id=vlm.pad,
        suppress_tokens=vlm.banned.nonzero()[:, 0].tolist(),
    )
