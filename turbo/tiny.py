"""The built-in tiny vision-language model, of Qwen2.5-VL's own classes, and its tokenizer.

Nothing here is a look-alike: the model is `Qwen2_5_VLForConditionalGeneration`, the pictures go
through `Qwen2VLImageProcessorPil`, the tokenizer is a byte-level BPE with Qwen's chat and vision
tokens, trained on the prompts and expert answers of the project's own games. Only the sizes are
small, so that the whole method can be trained on a CPU in minutes. The warm-started weights are
shipped in `turbo/models/<game>/`.

Left out: the warm start itself (`turbo.sft`), LoRA (`turbo.lora`), and the forward passes
(`turbo.fused`, `turbo.modules`).
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from turbo import prompts
from turbo.envs.make import make, tiny_kwargs

if TYPE_CHECKING:  # half of what a command takes to start, and `--help` needs none of it
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessorPil,
    )

GAMES = ("points24", "ezpoints", "numberline", "blackjack")
VOCABULARY = 640
ALFWORLD_VOCABULARY = 1024
POSITIONS, ALFWORLD_POSITIONS = 512, 1024
OTHER_TARGETS = (10, 61)  # from and below: further exercises in Points24, two digits like 24
PATCH, MERGE = 14, 2

# Sizes that were tried are in docs/LOG.md. Head dimension is 32 throughout.
SIZES = {
    "small": dict(hidden=128, inter=384, layers=4, heads=4, kv_heads=2, vision=64, vision_depth=2),
    "medium": dict(hidden=192, inter=512, layers=4, heads=6, kv_heads=3, vision=96, vision_depth=2),
    "nano": dict(hidden=96, inter=256, layers=2, heads=3, kv_heads=3, vision=64, vision_depth=1),
}
SIZE_OF_GAME = {
    "points24": "small",
    "ezpoints": "nano",
    "numberline": "nano",
    "blackjack": "nano",
    "alfworld": "small",
}

# What is kept whole when the text is split, before byte pairs are merged: a card's rank with the
# separator behind it, a result "=24, so ", a number left " 6: ", a number, an operator. The rest is
# JSON skeleton and words.
SPLIT = (
    r'(?<=")(?:10|[2-9AJQK])", "(?=[0-9AJQK])|(?<=")[AJQK](?=")'
    r"|=-?[0-9]+(?:/[0-9]+)?(?:, (?:so )?)?| ?-?[0-9]+: | [0-9]+|[0-9]+|[+\-*/()=]"
)
# In ALFWorld a numbered thing, " mug 2", is kept whole, and so is every word.
ALFWORLD_SPLIT = r" ?[A-Za-z]+ [0-9]+| ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9 ]+| "


def builtin_path(game: str) -> Path:
    """Folder of the shipped warm start of one game."""
    return Path(__file__).parent / "models" / game


# For environments of others: words, numbers and signs, each with the space before it. Whole answers
# would become tokens where there are few of them.
WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"


def corpus(episodes: int = 400, seed: int = 0) -> Iterator[str]:
    """Prompts and expert answers of all games, the text on which the tokenizer is trained."""
    rng = np.random.default_rng(seed)
    for game in GAMES:
        env = make(game, **tiny_kwargs(game))
        for episode in range(episodes * (4 if game == "points24" else 1)):
            low, end = OTHER_TARGETS
            other = {"target": low + episode % (end - low)}
            target = other if game == "points24" and episode % 2 else None
            yield from expert_texts(env, rng, seed + episode, target)


def expert_texts(env, rng: np.random.Generator, seed: int, options=None) -> Iterator[str]:
    """Prompts and answers of one episode that the expert plays."""
    env.reset(seed=seed, options=options)
    done = False
    while not done:
        answer = env.expert_answer(rng)
        if answer is None:
            break
        prompt = env.prompt("short")
        yield from ("user\n", prompt.fixed, prompt.state, "\n", "assistant\n", answer)
        action = env.actions.index(env.read_answer(answer).action)
        _, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated


def tokenizer_of(name: str, env, episodes: int = 300) -> "PreTrainedTokenizerFast":
    """The games share a tokenizer; any other environment has one of its own, of its own words."""
    if name in GAMES:
        return train_tokenizer()
    rng = np.random.default_rng(0)
    texts = (text for seed in range(episodes) for text in expert_texts(env, rng, seed))
    if name == "alfworld":
        return train_tokenizer(ALFWORLD_VOCABULARY, texts=texts, split=ALFWORLD_SPLIT)
    return train_tokenizer(texts=texts, split=WORDS)


def positions_of(name: str) -> int:
    """The longest prompt and answer of a new model, in tokens."""
    return ALFWORLD_POSITIONS if name == "alfworld" else POSITIONS


def train_tokenizer(
    vocabulary: int = VOCABULARY,
    texts: Iterable[str] | None = None,
    split: str = SPLIT,
) -> "PreTrainedTokenizerFast":
    """Byte-level BPE on `texts`, or else on `corpus`, that merges nothing across `split`.

    Ids 0..6 are Qwen's special tokens (`prompts.SPECIAL_TOKENS`).
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(prompts.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus() if texts is None else texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=prompts.PAD,
        eos_token=prompts.IM_END,
        additional_special_tokens=list(prompts.SPECIAL_TOKENS[1:]),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = prompts.CHAT_TEMPLATE
    return fast


def config(
    size: str, tokenizer: "PreTrainedTokenizerFast", positions: int = POSITIONS
) -> "Qwen2_5_VLConfig":
    """A Qwen2.5-VL configuration of one of `SIZES`, with the token ids of `tokenizer`, for prompts
    and answers of at most so many tokens together."""
    from transformers import Qwen2_5_VLConfig

    s = SIZES[size]
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in prompts.SPECIAL_TOKENS}
    head_dim = s["hidden"] // s["heads"]
    text = dict(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=s["hidden"],
        intermediate_size=s["inter"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        max_position_embeddings=positions,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            # temporal, height, width shares of the half head dimension
            "mrope_section": [head_dim // 8, 3 * head_dim // 16, 3 * head_dim // 16],
        },
        tie_word_embeddings=True,
        bos_token_id=ids[prompts.IM_START],
        eos_token_id=ids[prompts.IM_END],
        pad_token_id=ids[prompts.PAD],
    )
    vision = dict(
        depth=s["vision_depth"],
        hidden_size=s["vision"],
        intermediate_size=2 * s["vision"],
        num_heads=s["vision"] // 32,
        out_hidden_size=s["hidden"],
        patch_size=PATCH,
        spatial_merge_size=MERGE,
        temporal_patch_size=2,
        window_size=112,
        fullatt_block_indexes=[s["vision_depth"] - 1],
    )
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    name_tokens(config, tokenizer)
    return config


def new_model(
    size: str, tokenizer: "PreTrainedTokenizerFast", seed: int, positions: int = POSITIONS
) -> "Qwen2_5_VLForConditionalGeneration":
    """A randomly initialised model, float32."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(config(size, tokenizer, positions))


def name_tokens(config, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Give a Qwen configuration of any size the special tokens of this tokenizer."""
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in prompts.SPECIAL_TOKENS}
    config.image_token_id, config.video_token_id = ids[prompts.IMAGE_PAD], ids[prompts.VIDEO_PAD]
    config.vision_start_token_id = ids[prompts.VISION_START]
    config.vision_end_token_id = ids[prompts.VISION_END]


def image_processor(patch: int = PATCH) -> "Qwen2VLImageProcessorPil":
    """transformers' own processor; it never resizes the games, drawn at multiples of 28 pixels."""
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=patch, min_pixels=(PATCH * MERGE) ** 2, max_pixels=448 * 448
    )
