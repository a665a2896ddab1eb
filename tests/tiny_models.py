"""Nano models for the tests; transformers' own forward pass to compare with.

`random_folder` holds a model as it is initialised: it answers nonsense. `fitted_folder` holds the
built-in one of numberline with noise on its weights: part of its answers are legal.
"""

import copy
import fcntl
import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from turbo import prompts, tiny
from turbo.config import TrainConfig
from turbo.envs.make import make, tiny_kwargs
from turbo.lora import Lora, new_lora
from turbo.model import VisionLanguageModel, load
from turbo.parallel import Crew
from turbo.rollout import Rollout, RolloutOptions, Step, Table

GAME = "numberline"
NOISE = 0.22  # deviations of a matrix


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="gtr-turbo-tests-")


def new_folder(name: str) -> Path:
    """A folder that goes with the process."""
    return Path(_scratch().name) / name


def _save(module, folder: Path) -> Path:
    module.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    tiny.image_processor().save_pretrained(folder)
    return folder


@functools.cache
def tokenizer():
    """The tiny model's tokenizer, as the shipped models have it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny.builtin_path(GAME))


@functools.cache
def random_folder() -> Path:
    """A random nano model, float32, in Hugging Face format."""
    return _save(tiny.new_model("nano", tokenizer(), 0), new_folder("random"))


@functools.cache
def fitted_folder() -> Path:
    """The built-in nano model of numberline, unsettled by noise: itself it is too sure of all.

    The first test process that asks makes it for all.
    """
    folder = Path(os.environ["GTR_TURBO_TESTS"]) / "fitted"
    with folder.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        return folder if folder.exists() else _fit(folder)


def _fit(folder: Path) -> Path:
    vlm = load(tiny.builtin_path(GAME), torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in vlm.module.named_parameters():
            if p.dim() >= 2 and "visual" not in name:
                p.add_(torch.randn(p.shape, generator=generator) * NOISE * p.std())
    _save(vlm.module, folder.with_suffix(".partial")).rename(folder)
    return folder


@functools.cache
def random_model() -> VisionLanguageModel:
    """The random model, loaded; tests leave it as it is."""
    return load(random_folder(), torch.float32)


@functools.cache
def fitted_model() -> VisionLanguageModel:
    """The fitted model, loaded; tests leave it as it is."""
    return load(fitted_folder(), torch.float32)


def new_env(game: str = GAME, **options):
    """An environment with the pictures of the tiny model."""
    return make(game, **{**tiny_kwargs(game), **options})


def new_config(**changes) -> TrainConfig:
    """Small settings of a run on numberline."""
    small = dict(
        env=GAME,
        workers=1,
        dtype="float32",
        envs=8,
        group_size=4,
        steps_per_update=16,
        max_new_tokens=48,
        epochs=1,
        minibatch=16,
        temperature=0.7,
        advantage="group",
        thought_coef=0.5,
        clip=0.2,
        skip_certain=0.0,
        lora_rank=4,
        lora_alpha=8.0,
        guidance="kl",
        guidance_range="thought",
        kl_placement="loss",
        kl_estimator="full",
        kl_coef="0.5",
        eval_episodes=0,
    )
    return TrainConfig(**{**small, **changes})


def noisy_lora(vlm: VisionLanguageModel, seed: int = 0, size: float = 0.05) -> Lora:
    """LoRA factors of which neither is zero, so that every matrix differs from the base."""
    lora = new_lora(vlm.matrices, 4, 8.0, seed)
    generator = torch.Generator().manual_seed(100 + seed)
    with torch.no_grad():
        for _, b in lora.factors.values():
            b.copy_(torch.randn(b.shape, generator=generator) * size)
    return lora


def play(
    vlm: VisionLanguageModel,
    lora: Lora | None = None,
    *,
    game: str = GAME,
    seed: tuple[int, ...] = (0,),
    steps: int = 1,
    deals: list[dict] | None = None,
    make_env: Callable | None = None,
    **options,
) -> Rollout:
    """A rollout in this process."""
    o = RolloutOptions(**{**dict(envs=8, group=4, temperature=0.7, max_new_tokens=48), **options})
    table = Table(vlm, make_env or (lambda: new_env(game)), o, Crew())
    with torch.no_grad():
        weights = vlm.weights(lora)
    return table.collect(weights, seed, steps, deals)


def prefix_text(fixed: str, image_tokens: int) -> str:
    """The unchanging part of a prompt as the tiny models are used to it: picture, rules."""
    picture = prompts.VISION_START + prompts.IMAGE_PAD * image_tokens + prompts.VISION_END
    return f"{prompts.IM_START}user\n{picture}{fixed}"


def suffix_text(state: str) -> str:
    """The part that changes with every step, and the opening of the answer's turn."""
    return f"{state}{prompts.IM_END}\n{prompts.IM_START}assistant\n"


def legal_and_illegal(rollout: Rollout) -> tuple[list[Step], list[Step]]:
    """The steps whose answers were legal, and the others."""
    steps = rollout.steps
    return (
        [s for s in steps if s.answer.action is not None],
        [s for s in steps if s.answer.action is None],
    )


def merged_parameters(vlm: VisionLanguageModel, lora: Lora | None) -> dict[str, Tensor]:
    """The module's parameters, `base + scale * B @ A` where it is adapted; differentiable."""
    out = dict(vlm.module.named_parameters())
    for name, (a, b) in ({} if lora is None else lora.factors).items():
        out[name + ".weight"] = out[name + ".weight"] + lora.scale * (b @ a)
    return out


def own_forward(
    vlm: VisionLanguageModel, parameters: dict[str, Tensor], ids: list[int], pixels, grid
) -> tuple[Tensor, Tensor]:
    """Logits [L, V] and hidden states [L, D] of one row by transformers' own forward pass."""
    row = torch.tensor([ids])
    out = torch.func.functional_call(
        vlm.module,
        parameters,
        kwargs=dict(
            input_ids=row,
            attention_mask=torch.ones_like(row),
            mm_token_type_ids=(row == vlm.image).int(),
            pixel_values=pixels,
            image_grid_thw=grid,
            output_hidden_states=True,
        ),
    )
    return out.logits[0], out.hidden_states[-1][0]


def own_answer(
    vlm: VisionLanguageModel,
    parameters: dict[str, Tensor],
    picture,
    fixed: str,
    suffix: list[int],
    answer: list[int],
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """By transformers' pass: log p [T, V] of the answer, hidden state [D] at the last prompt token.

    Specials are banned, and the temperature divides the logits.
    """
    pixels, grid = vlm.pixels([picture]).values()
    prefix = vlm.encode(prefix_text(fixed, int(grid.prod()) // 4))
    logits, hidden = own_forward(vlm, parameters, [*prefix, *suffix, *answer], pixels, grid)
    first = len(prefix) + len(suffix) - 1
    logits = logits[first : first + len(answer)].masked_fill(vlm.banned, -1e30)
    return torch.log_softmax(logits / temperature, -1), hidden[first]


def shown_pictures(rollout: Rollout) -> list:
    """The picture before each step of a rollout on numberline, by playing its actions again."""
    env, pictures = new_env(), []
    for episode in rollout.episodes:
        env.reset(options={"hand": episode.deal})
        for step in episode.steps:
            pictures.append(env.render())
            legal = step.answer.action is not None
            env.step(env.actions.index(step.answer.action)) if legal else env.step_illegal()
    return pictures


def with_banned(vlm: VisionLanguageModel, allowed: list[int]) -> VisionLanguageModel:
    """The same model, which may sample the `allowed` tokens alone."""
    other = copy.copy(vlm)
    other.banned = torch.ones_like(vlm.banned)
    other.banned[allowed] = False
    return other


def speechless(vlm):
    """A model that ends every answer at once; `scripted` environments answer for it."""
    return with_banned(vlm, [vlm.end])


def scripted(game, choose=None, **options):
    """An environment that reads every answer as the expert's, or as one with another action."""
    env = new_env(game, **options)
    read, rng = env.read_answer, np.random.default_rng(0)

    def answer(text):
        written = env.expert_answer(rng)
        if choose is not None:
            before, key, _ = written.rpartition('"action": "')
            written = before + key + choose(env) + '"}'
        return read(written)

    env.read_answer = answer
    return env


def without_times(record: dict) -> dict:
    """A record of metrics.jsonl, less what the clock and the machine say."""
    timed = ("elapsed", "steps_per_second", "tokens_per_second", "peak_memory_gb")
    return {k: v for k, v in record.items() if k not in timed and not k.startswith("seconds_")}
