"""LoRA adapters merged into one: `python -m turbo.merge A B C --density 0.8 --out DIR`.

Each matrix is merged in weight space, on the products, never on the factors:

    tau_i  = s_i B_i A_i                    of adapter i; zero where it has no factors
    M      = TIES(tau_1, ..., tau_K)        or sum_i w_i tau_i / sum_i w_i
    M      ~ B A                            truncated SVD, B = U_R S_R^(1/2), A = S_R^(1/2) V_R^T
    error  = |M - B A| / |M|                Frobenius, of what is saved; told for every matrix

With --exact nothing is truncated: the rank is as high as it takes, or, with --base, the merged
model is written whole. In TIES an adapter without a matrix has no say in it, since zeros have no
sign; in a linear merge it pulls the matrix towards the base.

peft's `add_weighted_adapter(combination_type="ties_svd")` gives the same M where all weights are 1.
With others it does not weigh the election of signs, divides by the number of adapters in place of
their weights, and makes a positive number of a sum of zero.

Left out: GPUs, adapters that are more than LoRA (`turbo.adapters` refuses them), quantised bases.
"""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from safetensors import SafetensorError
from torch import Tensor, nn

from turbo import checkpoint
from turbo.adapters import TARGETS, Adapter, check_same_base, read_adapter
from turbo.families import without_bars
from turbo.flags import conclude, read_flags
from turbo.formats import (
    ADAPTER_CONFIG,
    check_out,
    save_factors,
    save_model,
    saved_dtype,
    write_folder,
)
from turbo.hub import is_hub_id, snapshot
from turbo.kernels.checks import check_weights
from turbo.kernels.ties import linear_merge_lora, ties_merge_lora, trim_threshold
from turbo.lora import Lora
from turbo.versions import versions

RECORD = "merge.json"
OVERSAMPLED = 32  # further directions in which a large matrix is looked at
GENERATION = "generation_config.json"
COPIED = {".json", ".jinja", ".txt", ".model"}  # files beside a base's weights


@dataclass
class MergeConfig:
    """Merge LoRA adapters into one, for peft, or into their base.

    python -m turbo.merge first second third --out merged

    python -m turbo.merge runs/a runs/b --method linear --weights 2 1 --rank 32 --out merged

    python -m turbo.merge first second --exact --base path/to/base --out model
    """

    adapters: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="ADAPTER")]
    """folders of peft adapters; run directories of `turbo.train`, of which the newest checkpoint is
    taken; or RUN/checkpoints/N"""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """folder for the result; it must not exist, or be empty, and is made at the very end"""
    method: Literal["ties", "linear"] = "ties"
    """ties: trim, elect signs, average what agrees (arXiv 2306.01708); linear: weighted mean"""
    density: float = 0.8
    """ties: share of the entries of each task vector that is kept, the largest ones"""
    weights: tuple[float, ...] = ()
    """one number an adapter, of which only the ratios count (none: all alike)"""
    rank: int = 0
    """rank of the merged adapter (0: the sum of the adapters' ranks, exact for a linear merge)"""
    exact: bool = False
    """truncate nothing: an adapter of as high a rank as it takes, or with --base a whole model"""
    base: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """with --exact: folder, or id on the Hub, of the model that the adapters adapt"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of the saved weights; auto: as the first adapter was saved, or the base"""
    force: bool = False
    """merge adapters whose bases have different names"""
    overwrite: bool = False
    """replace DIR if it is a merge"""


@dataclass(frozen=True)
class Merged:
    """One merged matrix."""

    name: str
    matrix: Tensor  # [out, in] float32: M, or base + M
    holders: int  # adapters that have factors for it


@dataclass(frozen=True)
class LowRank:
    """B A in place of a matrix, and how far off it is."""

    a: Tensor  # [r, in]
    b: Tensor  # [out, r]
    error: float  # relative, in the Frobenius norm


def check(c: MergeConfig) -> None:
    """Refuse what cannot be merged, before anything is read."""
    if not c.adapters:
        raise ValueError("name the adapters to be merged")
    if not 0 < c.density <= 1:
        raise ValueError(f"--density must be more than 0 and at most 1, got {c.density}")
    if c.weights:
        try:
            check_weights(c.weights, len(c.adapters))
        except ValueError as error:
            raise ValueError(f"--{str(error).replace('checkpoint', 'adapter')}") from error
    if c.rank < 0:
        raise ValueError(f"--rank must be 1 or more (0: the sum of the ranks), got {c.rank}")
    if c.rank and c.exact:
        raise ValueError("--exact finds the rank itself: leave out --rank")
    if c.base and not c.exact:
        raise ValueError("--base is for --exact, which writes a whole model: add that flag")
    needed = (*c.adapters, c.base or c.adapters[0])
    check_out(c.out, c.overwrite, "merge", RECORD, needed)


@torch.no_grad()
def merge_matrix(
    base: Tensor,  # [out, in], zeros for M itself
    name: str,
    adapters: list[Adapter],
    weights: list[float],
    method: str,
    density: float,
) -> Merged:
    """base + M of one matrix, in base's dtype; sums in float32."""
    have = [(a, w) for a, w in zip(adapters, weights, strict=True) if name in a.factors]
    named = sum(w for _, w in have)
    if named == 0:  # only adapters of weight 0 have it
        return Merged(name, base.clone(), len(have))
    lora_a, lora_b = ([a.factors[name][side] for a, _ in have] for side in (0, 1))
    scales, own = [a.scales[name] for a, _ in have], [w for _, w in have]
    options = dict(check_finite=False)  # looked at when they were read
    if method == "linear":
        share = named / sum(weights)  # what the others hold is zero
        matrix = linear_merge_lora(base, lora_a, lora_b, scales, own, lam=share, **options)
    else:
        parts = zip(lora_a, lora_b, scales, strict=True)
        thresholds = [trim_threshold(a, b, s, density, **options) for a, b, s in parts]
        matrix = ties_merge_lora(base, lora_a, lora_b, scales, own, thresholds, **options)
    return Merged(name, matrix, len(have))


def merged_matrices(adapters: list[Adapter], c: MergeConfig) -> Iterator[Merged]:
    """M of every matrix that an adapter has, one at a time."""
    weights = list(c.weights) or [1.0] * len(adapters)
    for name, (out_features, in_features) in shapes_of(adapters).items():
        zero = torch.zeros(out_features, in_features)
        yield merge_matrix(zero, name, adapters, weights, c.method, c.density)


def shapes_of(adapters: list[Adapter]) -> dict[str, tuple[int, int]]:
    """[out, in] of every matrix that an adapter has."""
    pairs = [(n, b.shape[0], a.shape[1]) for x in adapters for n, (a, b) in x.factors.items()]
    return {name: (rows, columns) for name, rows, columns in pairs}


@torch.no_grad()
def truncate(matrix: Tensor, rank: int, dtype: torch.dtype = torch.float32) -> LowRank:
    """The nearest B A of a rank, in `dtype`; rank 0: as high as it takes to lose nothing.

    A matrix with many more rows and columns than the rank is decomposed by subspace iteration from
    random directions (Halko et al. 2011), a small one whole.
    """
    side = min(matrix.shape)
    if rank and 4 * (rank + OVERSAMPLED) < side:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank + OVERSAMPLED, niter=4)
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    if not rank:  # singular values that are more than rounding
        rank = max(1, int((s > s[0] * max(matrix.shape) * torch.finfo(s.dtype).eps).sum()))
    root = s[:rank].sqrt()
    a, b = (root[:, None] * v[:, :rank].T).to(dtype), (u[:, :rank] * root).to(dtype)
    norm = matrix.norm()
    error = (matrix - b.float() @ a.float()).norm() / norm if norm else norm
    return LowRank(a, b, error.item())


def padded(found: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    """Its factors with zeros up to a rank, so that one rank is that of all matrices."""
    more = rank - found.a.shape[0]
    a = nn.functional.pad(found.a, (0, 0, 0, more))
    return a, nn.functional.pad(found.b, (0, more))


def write_adapter(folder: Path, adapters: list[Adapter], c: MergeConfig) -> dict:
    """The merged adapter; what is told about it."""
    dtype = adapters[0].dtype if c.dtype == "auto" else getattr(torch, c.dtype)
    wanted = 0 if c.exact else c.rank or sum(a.rank for a in adapters)
    parts, told = {}, {}
    for merged in merged_matrices(adapters, c):
        parts[merged.name] = found = truncate(merged.matrix, wanted, dtype)
        told[merged.name] = {
            "relative_error": found.error,
            "rank": found.a.shape[0],
            "adapters": merged.holders,
        }
    rank = max(found.a.shape[0] for found in parts.values())
    factors = {name: padded(found, rank) for name, found in parts.items()}
    save_factors(folder, Lora(factors, 1.0, rank), dtype)
    checkpoint.write_json(folder / ADAPTER_CONFIG, adapter_config(adapters, rank))
    return {"rank": rank, "dtype": str(dtype).removeprefix("torch."), "matrices": told}


def adapter_config(adapters: list[Adapter], rank: int) -> dict:
    """adapter_config.json; what is not in it is as peft has it by default."""
    first = next((a for a in adapters if a.config), adapters[0])
    kept = ("task_type", "auto_mapping", "revision", "fan_in_fan_out")
    config = {name: first.config[name] for name in kept if first.config.get(name) is not None}
    config |= {"peft_type": "LORA", "base_model_name_or_path": adapters[0].base or None}
    config |= {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none"}
    config |= {"inference_mode": True, "target_modules": sorted(shapes_of(adapters))}
    # What all of them say of their modules is shorter, if it leads to the same ones.
    if first.config and all(
        targets(a) == targets(first) and a.factors.keys() == first.factors.keys() for a in adapters
    ):
        config |= targets(first)
    return config


def targets(adapter: Adapter) -> dict:
    """How an adapter names its modules."""
    told = {name: adapter.config.get(name) for name in TARGETS}
    return {k: sorted(v) if isinstance(v, list) else v for k, v in told.items() if v is not None}


def open_base(name: str, dtype: str) -> tuple[nn.Module, Path]:
    """The model of a folder, or of the Hub, and the folder."""
    import transformers

    folder = snapshot(name) if is_hub_id(name) else Path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"--base {name!r} is not a folder with a Hugging Face model")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = getattr(transformers, (config.architectures or ["none"])[0], None)
    if kind is None:
        raise ValueError(f"--base {name!r}: transformers has no class {config.architectures}")
    own = saved_dtype(folder) if dtype == "auto" else getattr(torch, dtype)
    without_bars()
    # Merged in the dtype in which it is saved, or a wider one: nothing is rounded twice.
    module = kind.from_pretrained(folder, dtype=own, use_safetensors=True, local_files_only=True)
    return module.requires_grad_(False), folder


@torch.no_grad()
def write_model(folder: Path, adapters: list[Adapter], c: MergeConfig) -> dict:
    """The base with every merged matrix, tokenizer and all; what is told about it."""
    import transformers

    module, source = open_base(c.base, c.dtype)
    weights, told = list(c.weights) or [1.0] * len(adapters), {}
    tied = module.get_input_embeddings().weight
    turned = any(a.config.get("fan_in_fan_out") for a in adapters)
    for name, shape in shapes_of(adapters).items():
        try:
            layer = module.get_submodule(name)
        except AttributeError as error:
            raise ValueError(f"--base {c.base!r} has no module {name!r}: another model") from error
        matrix = layer.weight.T if turned else layer.weight
        if tuple(matrix.shape) != shape:
            raise ValueError(f"--base {c.base!r}: {name!r} is {tuple(matrix.shape)}, not {shape}")
        if layer.weight is tied:
            raise ValueError(f"{name!r} is tied to the embedding: leave out --base, for an adapter")
        merged = merge_matrix(matrix, name, adapters, weights, c.method, c.density)
        layer.weight.data = merged.matrix.T.contiguous() if turned else merged.matrix
        told[name] = {"adapters": merged.holders}
    dtype = module.dtype
    if (source / GENERATION).is_file():  # copied as it is; transformers would refuse some
        module.generation_config = transformers.GenerationConfig()
    save_model(folder, module, {}, dtype)
    for file in sorted(source.iterdir()):
        named = file.suffix in COPIED and not file.name.endswith(".index.json")
        if named and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    return {"dtype": str(dtype).removeprefix("torch."), "matrices": told}


def merge(c: MergeConfig) -> dict:
    """Read, merge, write; the record that is written too."""
    adapters = [read_adapter(path) for path in c.adapters]
    check_same_base(adapters, c.force)
    record = {
        "method": c.method,
        "density": c.density if c.method == "ties" else None,
        "weights": list(c.weights) or [1.0] * len(adapters),
        "base": adapters[0].base,
        "adapters": [
            {"path": a.path, "rank": a.rank, "matrices": len(a.factors)} for a in adapters
        ],
        "versions": versions(),
    }

    def write(folder: Path) -> None:
        record.update((write_model if c.base else write_adapter)(folder, adapters, c))
        checkpoint.write_json(folder / RECORD, record)

    write_folder(Path(c.out), write)
    return record


def summary(record: dict, c: MergeConfig) -> str:
    """What came of it, in a few lines."""
    told = record["matrices"]
    how = f"ties at density {c.density:g}" if c.method == "ties" else "linear"
    head = f"{len(record['adapters'])} adapters, {how}, {len(told)} matrices, {record['dtype']}"
    single = sum(m["adapters"] < len(record["adapters"]) for m in told.values())
    lines = [f"{head}: {c.out}"]
    if single:
        lines += [f"{single} matrices are not in all adapters: those count as zero there"]
    if c.base:
        return "\n".join([*lines, "merged into the base: nothing was truncated"])
    errors = {name: m["relative_error"] for name, m in told.items()}
    worst = max(errors, key=errors.get)
    mean = sum(errors.values()) / len(errors)
    rank = f"rank {record['rank']}: relative error of a matrix"
    return "\n".join([*lines, f"{rank} {mean:.2%} in the mean, {errors[worst]:.2%} in {worst}"])


def main(argv: list[str] | None = None) -> int:
    """Merge; returns the exit status: 0, 1 where it cannot be written, 2 for bad input."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        c = read_flags(MergeConfig, argv, "turbo.merge")
        check(c)
        print(summary(merge(c), c))
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(conclude(main))
