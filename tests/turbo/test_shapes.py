"""Published shapes: the parameters of the checkpoints, counted without memory; other models too.

The figures below are those of the checkpoints themselves (the size of their safetensors in bytes,
halved, as each index file and model card states it).
"""

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    Blip2Config,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SmolVLMConfig,
)

from turbo import shapes

PARAMETERS = {  # total, of which the vision tower, and how many tensors
    "qwen2.5-vl-3b": (3_754_622_976, 668_684_288, 824),
    "qwen2.5-vl-7b": (8_292_166_656, 676_550_144, 729),
    "qwen3-vl-2b": (2_127_532_032, 406_957_056, 625),
    "qwen3-vl-4b": (4_437_815_808, 415_347_712, 713),
    "qwen3-vl-8b": (8_767_123_696, 576_388_336, 750),
}


def test_every_name_has_its_figures():
    assert tuple(PARAMETERS) == shapes.NAMES


@pytest.mark.parametrize("name", shapes.NAMES)
def test_parameters_are_those_of_the_checkpoint(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shapes.published(name))
    parameters = dict(model.named_parameters())
    vision = sum(p.numel() for p in model.model.visual.parameters())
    total = sum(p.numel() for p in parameters.values())
    assert (total, vision, len(parameters)) == PARAMETERS[name]
    assert shapes.text_shape(shapes.published(name)).weights == total


def test_what_lora_covers_of_7b():
    shape = shapes.text_shape(shapes.published("qwen2.5-vl-7b"))
    assert shape.covered_matrices == 28 * 7 == 196
    layer = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944
    assert shape.covered_weights == 28 * layer == 6_525_288_448
    assert shape.covered_features == 28 * (4 * 3584 + 2 * (3584 + 512) + 3 * (3584 + 18944))
    assert shape.largest_weights == 3584 * 18944


@pytest.mark.parametrize("name", shapes.NAMES)
def test_families(name):
    config, shape = shapes.published(name), shapes.text_shape(shapes.published(name))
    assert isinstance(config, Qwen3VLConfig if "qwen3" in name else Qwen2_5_VLConfig)
    text, rope = config.text_config, config.text_config.rope_parameters
    assert sum(rope["mrope_section"]) == shape.head_dim // 2 == 64
    assert rope["rope_theta"] == (5e6 if "qwen3" in name else 1e6)
    assert bool(rope.get("mrope_interleaved")) == shape.qk_norm == ("qwen3" in name)
    assert shape.tied == text.tie_word_embeddings == (name[-2:] in ("2b", "3b", "4b"))
    assert shape.deepstack == (3 if "qwen3" in name else 0)
    assert shape.patches_per_token == 4
    assert config.vision_config.out_hidden_size == shape.hidden


def test_ids():
    for name, model in shapes.PUBLISHED.items():
        by_id = shapes.find_config(model.hugging_face_id)
        assert by_id.to_dict() == shapes.published(name).to_dict()
    by_id = shapes.find_config("Qwen/Qwen3-VL-8B-Instruct")
    assert by_id.to_dict() == shapes.published("qwen3-vl-8b").to_dict()


def test_unknown_names():
    with pytest.raises(ValueError, match=r"'qwen2.5-vl-8b'.*qwen2.5-vl-[37]b"):
        shapes.published("qwen2.5-vl-8b")
    with pytest.raises(ValueError, match=r"'Qwen3-VL-4B'.*did you mean qwen3-vl-4b"):
        shapes.published("Qwen3-VL-4B")
    with pytest.raises(ValueError, match=r"use qwen2\.5-vl-3b, "):
        shapes.published("llama")


def test_folders(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        shapes.find_config(str(tmp_path))
    file = tmp_path / "config.json"
    for broken in ("", "{", "[]", '{"model_type": "qwen9"}', '{"model_type": 3}', "{}"):
        file.write_text(broken)
        with pytest.raises(ValueError, match=r"config\.json cannot be read") as found:
            shapes.find_config(str(tmp_path))
        assert "\n" not in str(found.value)
    shapes.published("qwen3-vl-2b").save_pretrained(tmp_path)
    read = shapes.text_shape(shapes.find_config(str(tmp_path)))
    assert read == shapes.text_shape(shapes.published("qwen3-vl-2b"))


def test_other_families():
    shape = shapes.text_shape(SmolVLMConfig())
    assert shape.covered_matrices == 7 * shape.layers
    assert shape.patches_per_token == SmolVLMConfig().scale_factor ** 2
    with pytest.raises(ValueError, match="qwen2, not a model of pictures"):
        shapes.text_shape(Qwen2Config())
    with pytest.raises(ValueError, match=r"has 96 of q_proj, .* in 24 layers"):  # experts
        shapes.text_shape(Qwen3VLMoeConfig())
    with pytest.raises(ValueError, match="a Blip2Config is not planned for: ") as found:
        shapes.text_shape(Blip2Config())
    assert "\n" not in str(found.value)
