"""LoRA adapters from anywhere: a folder of peft, a run of this project, one of its checkpoints.

    delta W = s B A,    s = alpha / r,  or alpha / sqrt(r) with rsLoRA;  r and alpha of each matrix

Ranks, scales and matrices may differ from adapter to adapter and from matrix to matrix. What is
more than such a product is refused by its name, and so is what is trained on a changed base.

Left out: what is done with them (`turbo.merge`), pickled adapters, those of other libraries.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from turbo import checkpoint
from turbo.formats import ADAPTER, ADAPTER_CONFIG
from turbo.hub import model_name
from turbo.saved import from_saved

FACTOR = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Fields of adapter_config.json with which an adapter is more than s B A on linear layers.
MORE = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "modules_to_save", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens", "arrow_config"),
    *("kasa_config", "monteclora_config"),
)
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # that leave the base as it is
# Fields that say which modules of a model are adapted, beside what they do.
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True)
class Adapter:
    """LoRA factors by module name, and what they belong to."""

    path: str
    base: str  # what the model is called that they adapt
    factors: dict[str, tuple[Tensor, Tensor]]  # A [r, in], B [out, r]
    scales: dict[str, float]
    dtype: torch.dtype  # in which they were saved; the factors are float32
    config: dict = field(default_factory=dict)  # of peft, empty for a run
    base_sha256: str = ""  # of a run's base

    @property
    def rank(self) -> int:
        """The largest rank of a matrix."""
        return max(a.shape[0] for a, _ in self.factors.values())


def read_adapter(path: str) -> Adapter:
    """A peft adapter, or the newest checkpoint of a run, or the checkpoint at RUN/checkpoints/N."""
    folder = Path(path)
    if found := checkpoint.run_of(folder):
        return _read_run(path, *found)
    if not folder.is_dir():
        raise ValueError(f"{path!r} is no folder: give a peft adapter, or a run of turbo.train")
    if (folder / ADAPTER_CONFIG).is_file():
        return _read_peft(path, folder)
    raise ValueError(
        f"{path!r} is no adapter: it has neither {ADAPTER_CONFIG} nor a run's checkpoints"
    )


def _read_run(path: str, run: Path, update: int | None) -> Adapter:
    record = checkpoint.read_run(run)
    settings = from_saved(record["config"], path)
    if settings.random_weights:
        raise ValueError(f"{path} ran on random weights, for measuring: nothing of it is of use")
    tensors = checkpoint.load(run, update, history=False).adapter
    scale = settings.lora_alpha / settings.lora_rank
    factors = _pair(path, tensors)
    sha256, scales = record.get("model_sha256", ""), dict.fromkeys(factors, scale)
    base = model_name(settings)
    return Adapter(path, base, factors, scales, torch.float32, base_sha256=str(sha256))


def _read_peft(path: str, folder: Path) -> Adapter:
    config = checkpoint.read_json(folder / ADAPTER_CONFIG)
    _check_kind(path, config)
    if not (folder / ADAPTER).is_file():
        raise ValueError(
            f"{path!r} has no {ADAPTER}: save the adapter with save_pretrained(..., "
            "safe_serialization=True); pickles are not read"
        )
    try:
        tensors = load_file(folder / ADAPTER)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder / ADAPTER} cannot be read: {error}") from error
    factors = _pair(path, tensors)
    dtype = next(iter(tensors.values())).dtype
    scales = {name: _scale(config, name, a.shape[0]) for name, (a, _) in factors.items()}
    base = str(config.get("base_model_name_or_path") or "")
    return Adapter(path, base, factors, scales, dtype, config)


def _check_kind(path: str, config: dict) -> None:
    """ValueError on an adapter that is more, or other, than LoRA on a base as it is."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path!r} is an adapter of type {kind!r}: only LORA can be merged")
    for name in MORE:
        if config.get(name):
            told = json.dumps(config[name])[:60]
            raise ValueError(
                f"{path!r} has {name}: {told}, which is more than a product B A: train it without"
            )
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path!r} has trained biases, bias: {config['bias']!r}: use bias 'none'")
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"{path!r} began with init_lora_weights: {start!r}, which changes the base: save it "
            "with path_initial_model_for_weight_conversion, as peft's documentation says"
        )


def _pair(path: str, tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of every module, in float32."""
    sides: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = FACTOR.fullmatch(key)
        if not found or tensor.dim() != 2:
            shape = tuple(tensor.shape)
            raise ValueError(f"{path!r} holds {key!r} {shape}: only factors of linear layers merge")
        if not tensor.isfinite().all():
            raise ValueError(f"{path!r}: {key!r} has a NaN or an infinity: take another checkpoint")
        sides.setdefault(found[1], {})[found[2]] = tensor.float()
    for name, pair in sides.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            shapes = {side: tuple(t.shape) for side, t in pair.items()}
            raise ValueError(f"{path!r}: the factors of {name!r} do not fit each other: {shapes}")
    if not sides:
        raise ValueError(f"{path!r} holds no factors")
    return {name: (pair["A"], pair["B"]) for name, pair in sides.items()}


def _scale(config: dict, name: str, rank: int) -> float:
    """s of one matrix, as peft finds it."""
    alpha = config.get("lora_alpha", 8)
    for key, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            alpha = value
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_same_base(adapters: list[Adapter], force: bool) -> None:
    """ValueError where the adapters belong to different models, or matrices differ in shape."""
    first = adapters[0]
    for other in adapters[1:]:
        for what, one, two in (
            ("base", first.base, other.base),
            ("weights of the base", first.base_sha256, other.base_sha256),
        ):
            both = what == "base" or (one and two)
            if both and one != two and not force:
                raise ValueError(
                    f"{first.path!r} and {other.path!r} differ in the {what}, {one!r} and {two!r}: "
                    "add --force if that is the same model"
                )
        flags = [bool(a.config.get("fan_in_fan_out")) for a in (first, other)]
        if flags[0] != flags[1]:
            raise ValueError(f"{first.path!r} and {other.path!r} differ in fan_in_fan_out")
    shapes: dict[str, tuple] = {}
    for adapter in adapters:
        for name, (a, b) in adapter.factors.items():
            shape = (b.shape[0], a.shape[1])
            if shapes.setdefault(name, shape) != shape:
                raise ValueError(
                    f"{adapter.path!r}: {name!r} is {shape}, and {shapes[name]} in one before: "
                    "they adapt different models"
                )
