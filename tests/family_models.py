"""Tiny random models of the families that are tested: folders in Hugging Face format.

The classes and the chat templates' manner are the families' own, the sizes are not.
"""

import copy
import functools
import json
import shutil
from pathlib import Path

import torch
from tiny_models import new_folder, random_folder, tokenizer
from torch import Tensor
from transformers import (
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

from turbo import tiny
from turbo.model import Engine, VisionLanguageModel, load

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "smolvlm")
TEXT = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.15,  # at the usual 0.02 so small a model hardly looks at its input
)
SMOL_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}:"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


@functools.cache
def folder(family: str) -> Path:
    """A random model of the family, float32."""
    torch.manual_seed(5)
    if family == "qwen2_5_vl":
        return random_folder()
    make = {"qwen3_vl": _qwen3, "smolvlm": _smol}[family]
    path = new_folder(family)
    for part in make():
        part.save_pretrained(path)
    return path


def roomy_folder(family: str, path: Path) -> Path:
    """A copy of such a model that takes the published preset's prompts, of some 700 tokens."""
    shutil.copytree(folder(family), path)
    config = json.loads((path / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 2048
    (path / "config.json").write_text(json.dumps(config))
    return path


def _qwen3():
    words = tokenizer()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    text = dict(TEXT, vocab_size=len(words), rope_parameters=rope | {"mrope_interleaved": True})
    vision = dict(
        depth=3,
        hidden_size=32,
        intermediate_size=64,
        num_heads=2,
        out_hidden_size=64,
        patch_size=tiny.PATCH,
        spatial_merge_size=tiny.MERGE,
        temporal_patch_size=2,
        num_position_embeddings=64,
        deepstack_visual_indexes=[0, 1],
        initializer_range=0.15,
    )
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    tiny.name_tokens(config, words)
    pictures = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=448 * 448)
    return Qwen3VLForConditionalGeneration(config), words, pictures


def _smol():
    words = copy.deepcopy(tokenizer())
    specials = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"]
    words.add_special_tokens({"additional_special_tokens": specials})
    words.chat_template = SMOL_TEMPLATE
    config = SmolVLMConfig(
        text_config=dict(TEXT, model_type="llama", vocab_size=656, max_position_embeddings=512),
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=56,
            patch_size=14,
        ),
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=False,
    )
    edge = {"longest_edge": 56}
    pictures = SmolVLMImageProcessorPil(size=edge, max_image_size=edge)
    return SmolVLMForConditionalGeneration(config), words, pictures


def model(
    family: str, *, quantize="none", checkpointing=True, dtype=torch.float32, play="auto"
) -> VisionLanguageModel:
    """The family's random model, run by transformers' modules."""
    engine = Engine("modules", "cpu", quantize, checkpointing, play=play)
    return load(folder(family), dtype, engine)


def own_logits(
    vlm: VisionLanguageModel, parameters: dict[str, Tensor], picture, fixed: str, row: list[int]
) -> Tensor:
    """Logits [L, V] behind every token of `row` by the untouched model's own forward pass."""
    inputs = vlm.pixels([picture])
    features, _ = vlm.see([picture])
    prefix = vlm.encode(vlm.frame.prefix(fixed, features.shape[1]))
    ids = torch.tensor([[*prefix, *row]])
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == vlm.image).int()
    inputs |= dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    pristine = load_plain(vlm)
    out = torch.func.functional_call(pristine, parameters, kwargs=inputs)
    return out.logits[0, -len(row) :]


def load_plain(vlm: VisionLanguageModel):
    """The model as transformers loads it, nothing of it replaced."""
    from transformers import AutoModelForImageTextToText

    folder = vlm.module.name_or_path
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=vlm.text.dtype).eval()
