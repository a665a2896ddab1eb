"""turbo/formats.py beside what `test_export.py` sees of it: names, dtypes, generation settings."""

import json
import re

import tiny_models
import torch

from turbo import formats


def test_target_modules_are_matched_whole():
    text = [f"model.language_model.layers.{i}.mlp.up_proj" for i in range(12)]
    tower = [f"model.visual.blocks.{i}.mlp.up_proj" for i in range(2)]
    pattern = formats.target_modules(text, [*text, *tower, "lm_head"])
    assert pattern == r"model\.language_model\.layers\.\d+\.mlp\.up_proj"
    some = formats.target_modules(text[:2], [*text, *tower])  # no shorter way to say it
    assert [n for n in [*text, *tower] if re.fullmatch(some, n)] == text[:2]


def test_an_odd_scale_is_kept(vlm, tmp_path):
    """alpha / rank is what peft multiplies with; a whole alpha is written as one."""
    for alpha in (8.0, 2.5):
        lora = formats.Lora({}, alpha / 3, 3)
        lora.factors = tiny_models.noisy_lora(vlm).factors
        formats.save_adapter(tmp_path, vlm.module, lora, "base", torch.bfloat16)
        known = json.loads((tmp_path / "adapter_config.json").read_text())
        assert abs(known["lora_alpha"] / known["r"] - lora.scale) < 1e-12
    assert type(known["lora_alpha"]) is float


def test_generation_bans_what_turbo_bans(vlm):
    config = formats.generation_config(vlm, 0.3, 17)
    assert vlm.banned[config.suppress_tokens].all()
    assert len(config.suppress_tokens) == vlm.banned.sum()
    assert (config.eos_token_id, config.temperature, config.top_k) == (vlm.end, 0.3, 0)
