"""turbo/prompts.py: the chat frame is Qwen's, and its parts fit together."""

import tiny_models

from turbo import prompts
from turbo.tiny import GAMES


def test_the_frame_is_that_of_the_chat_template(vlm):
    for game in GAMES:
        env = tiny_models.new_env(game)
        env.reset(seed=0)
        prompt = env.prompt("short")
        content = [{"type": "image"}, {"type": "text", "text": prompt.text}]
        chat = vlm.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        assert (
            tiny_models.prefix_text(prompt.fixed, 1) + tiny_models.suffix_text(prompt.state) == chat
        )
        assert vlm.frame.prefix(prompt.fixed, 3) == tiny_models.prefix_text(prompt.fixed, 3)
        assert vlm.frame.suffix(prompt.state) == tiny_models.suffix_text(prompt.state)


def test_a_picture_has_as_many_places_as_features(vlm):
    env = tiny_models.new_env("points24")
    picture, _ = env.reset(seed=0)
    features, _ = vlm.see([picture])
    ids = vlm.encode(tiny_models.prefix_text("rules", features.shape[1]))
    assert ids.count(vlm.image) == features.shape[1] == 8
    start, end = (
        vlm.tokenizer.convert_tokens_to_ids(t) for t in (prompts.VISION_START, prompts.VISION_END)
    )
    assert ids[ids.index(vlm.image) - 1] == start
    assert ids[len(ids) - 1 - ids[::-1].index(vlm.image) + 1] == end


def test_the_parts_are_encoded_by_themselves(vlm):
    """No token spans the boundary between prefix, suffix and answer."""
    prefix, suffix = tiny_models.prefix_text("A, B.\n", 2), tiny_models.suffix_text('formula: ""')
    assert vlm.tokenizer.decode(vlm.encode(prefix) + vlm.encode(suffix)) == prefix + suffix
    assert suffix.endswith("<|im_start|>assistant\n")
    assert all(len(vlm.encode(t)) == 1 for t in prompts.SPECIAL_TOKENS)
