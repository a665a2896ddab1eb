"""The published shapes of Qwen2.5-VL and Qwen3-VL, without a download, and the numbers in them.

`published` builds a configuration of transformers from the numbers below; models made of it have
exactly the parameters of the checkpoints on Hugging Face (tested on the meta device). `text_shape`
counts the matrices of any image-text-to-text configuration: those that LoRA covers (the seven
projections of every layer of the text model) and all the rest (embeddings, head, norms, vision).

Left out: weights, tokenizers, picture processors (`turbo.model` loads them); mixtures of experts.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

COVERED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOKENS = dict(
    vision_start_token_id=151652,
    vision_end_token_id=151653,
    image_token_id=151655,
    video_token_id=151656,
)
ENDS = dict(bos_token_id=151643, eos_token_id=151645)


@dataclass(frozen=True)
class Published:
    """What tells one published model from its siblings; the rest is the family's."""

    hugging_face_id: str
    family: str  # "qwen2.5" or "qwen3"
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool  # the head is the embedding
    large_vision: bool = False  # Qwen3-VL has two vision towers


PUBLISHED = {
    "qwen2.5-vl-3b": Published(
        "Qwen/Qwen2.5-VL-3B-Instruct", "qwen2.5", 2048, 11008, 36, 16, 2, 151936, True
    ),
    "qwen2.5-vl-7b": Published(
        "Qwen/Qwen2.5-VL-7B-Instruct", "qwen2.5", 3584, 18944, 28, 28, 4, 152064, False
    ),
    "qwen3-vl-2b": Published(
        "Qwen/Qwen3-VL-2B-Instruct", "qwen3", 2048, 6144, 28, 16, 8, 151936, True
    ),
    "qwen3-vl-4b": Published(
        "Qwen/Qwen3-VL-4B-Instruct", "qwen3", 2560, 9728, 36, 32, 8, 151936, True
    ),
    "qwen3-vl-8b": Published(
        "Qwen/Qwen3-VL-8B-Instruct", "qwen3", 4096, 12288, 36, 32, 8, 151936, False, True
    ),
}
NAMES = tuple(PUBLISHED)


def published(name: str) -> Any:
    """The configuration of one of NAMES: a Qwen2_5_VLConfig or a Qwen3VLConfig of transformers."""
    model = _find(name)
    return _qwen3(model) if model.family == "qwen3" else _qwen25(model)


def _find(name: str) -> Published:
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name.lower(), NAMES, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}?" if near else f"use {', '.join(NAMES)}"
        raise ValueError(f"no published shape is called {name!r}: {hint}")
    return PUBLISHED[name]


def _text(m: Published, theta: float, positions: int, sections: list[int], **more) -> dict:
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": sections}
    if m.family == "qwen3":
        rope["mrope_interleaved"] = True
    return dict(
        hidden_size=m.hidden,
        intermediate_size=m.intermediate,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads,
        vocab_size=m.vocabulary,
        rms_norm_eps=1e-6,
        max_position_embeddings=positions,
        rope_parameters=rope,
        tie_word_embeddings=m.tied,
        **ENDS,
        **more,
    )


def _qwen25(m: Published) -> Any:
    from transformers import Qwen2_5_VLConfig

    vision = dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=m.hidden,
        patch_size=14,
        spatial_merge_size=2,
        temporal_patch_size=2,
        tokens_per_second=2,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
    )
    text = _text(m, 1e6, 128_000, [16, 24, 24])
    return Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=m.tied, **TOKENS
    )


def _qwen3(m: Published) -> Any:
    from transformers import Qwen3VLConfig

    tower = dict(
        depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17]
    )
    if m.large_vision:
        tower = dict(
            depth=27,
            hidden_size=1152,
            intermediate_size=4304,
            deepstack_visual_indexes=[8, 16, 24],
        )
    vision = dict(
        num_heads=16,
        out_hidden_size=m.hidden,
        patch_size=16,
        spatial_merge_size=2,
        temporal_patch_size=2,
        num_position_embeddings=2304,
        **tower,
    )
    text = _text(m, 5e6, 262_144, [24, 20, 20], head_dim=128)
    return Qwen3VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=m.tied, **TOKENS
    )


def find_config(model: str) -> Any:
    """The configuration of a published name or id, or of a local folder with a config.json.

    Raises ValueError, in one line, where there is neither. Nothing is downloaded and no code of
    the folder is run.
    """
    if (Path(model) / "config.json").is_file():
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises what json, its checks and its hub raise
            reason = " ".join(str(error).split())
            raise ValueError(f"{model}: config.json cannot be read: {reason:.200}") from error
    if Path(model).is_dir():
        raise ValueError(f"the folder {model!r} has no config.json: it holds no model")
    ids = {m.hugging_face_id: name for name, m in PUBLISHED.items()}
    if "/" in model and model not in ids:
        raise ValueError(f"{model!r} is no folder with a config.json, and no published shape")
    return published(ids.get(model, model))


@dataclass(frozen=True)
class TextShape:
    """The numbers of a model that its memory follows from; weights are counted, not bytes."""

    layers: int
    hidden: int  # D
    heads: int  # H
    kv_heads: int  # Hkv
    head_dim: int
    intermediate: int  # I
    vocabulary: int  # V
    tied: bool
    covered_matrices: int  # that have LoRA factors
    covered_weights: int  # in these matrices
    covered_features: int  # in + out features, summed over these matrices
    largest_weights: int  # of one covered matrix
    largest_features: int  # in + out of one covered matrix
    other_weights: int  # embeddings, head, norms, biases, vision tower; a tied head counts once
    qk_norm: bool = False  # queries and keys are normed (Qwen3)
    vision_hidden: int = 0
    vision_intermediate: int = 0
    patches_per_token: int = 4  # of a picture, merged into one token of the prompt
    deepstack: int = 0  # further layers that picture features are added to (Qwen3-VL)
    name: str = "the model"

    @property
    def weights(self) -> int:
        """All parameters, each once."""
        return self.covered_weights + self.other_weights


def text_shape(config: Any, name: str = "the model") -> TextShape:
    """Count the parameters of a configuration by building its model without memory (meta device).

    Raises ValueError, in one line, where it is no image-text-to-text model whose text layers have
    the seven projections each.
    """
    try:
        shape = _count(config, name)
    except Exception as error:  # whatever a family lacks of what the others have
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        kind, reason = type(config).__name__, " ".join(str(error).split())
        raise ValueError(f"{name}: a {kind} is not planned for: {reason:.200}") from error
    if shape.covered_matrices != len(COVERED) * shape.layers:
        raise ValueError(
            f"{name}: its text model has {shape.covered_matrices} of {', '.join(COVERED)} in "
            f"{shape.layers} layers; models with all seven in each layer are planned for"
        )
    return shape


def _count(config: Any, name: str) -> TextShape:
    model = _meta_model(config, name)
    text, vision = config.get_text_config(), config.vision_config
    decoder = model.get_decoder()
    shapes = [
        module.weight.shape
        for path, module in decoder.named_modules()
        if path.rsplit(".", 1)[-1] in COVERED and hasattr(module, "weight")
    ]
    covered = sum(shape.numel() for shape in shapes)
    merge = getattr(vision, "spatial_merge_size", None) or getattr(config, "scale_factor", None)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return TextShape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        tied=head.weight is embedding.weight,
        covered_matrices=len(shapes),
        covered_weights=covered,
        covered_features=sum(sum(shape) for shape in shapes),
        largest_weights=max((shape.numel() for shape in shapes), default=0),
        largest_features=max((sum(shape) for shape in shapes), default=0),
        other_weights=sum(p.numel() for p in model.parameters()) - covered,
        qk_norm=any(path.endswith("q_norm") for path, _ in decoder.named_modules()),
        vision_hidden=vision.hidden_size,
        vision_intermediate=getattr(vision, "intermediate_size", None) or 4 * vision.hidden_size,
        patches_per_token=(merge or 4) ** 2,
        deepstack=len(getattr(vision, "deepstack_visual_indexes", None) or ()),
        name=name,
    )


def _meta_model(config: Any, name: str) -> Any:
    import torch
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText
    from transformers.utils import logging

    kind = getattr(config, "model_type", "unknown")
    known = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not known or not hasattr(config, "vision_config"):
        raise ValueError(f"{name} is a {kind}, not a model of pictures and text that writes text")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would print the settings of generation
    try:
        with torch.device("meta"):
            return AutoModelForImageTextToText.from_config(config)
    finally:
        logging.set_verbosity(verbosity)
