"""The settings of a warm start, and what makes them impossible.

Left out: reading the command line and the work itself (`turbo.sft`).
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from turbo.envs.make import check_env, find
from turbo.flags import flag


@dataclass
class RunSettings:
    """The game, the model, the length of a training."""

    env: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[ENV]")] = "points24"
    """which environment to learn: points24, ezpoints, numberline, blackjack or alfworld; one of
    your own as module:Class; or the name of an installed entry point of the group gtr_turbo.envs"""
    out: str = "warm-start"
    """folder for the model, the tokenizer and the record of how they were made"""
    overwrite: bool = False
    """write into a folder that is not empty"""
    seed: int = 0
    """seed of everything"""
    model: str = ""
    """empty: a new tiny model; else a folder or an id of the Hub, to be fine-tuned by LoRA and
    written merged"""
    steps: int = 2000
    """optimiser steps of the language model; 300 with --model"""
    workers: int = 0
    """processes (0: one a core, at most 4)"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the matrix products"""


@dataclass
class DataSettings:
    """What the expert shows in a step."""

    deals: int = 24
    """deals per step"""
    states: int = 4
    """states per deal, each of an episode of its own (0: every state of one episode)"""
    solutions: int = 8
    """card games: the expert begins with one of so many solutions"""
    other_targets: float = 0.0
    """Points24: share of the deals that ask for another target than 24, as further exercises; 0
    with --model"""
    stray: float = 0.0
    """share of the expert's steps at which a random action is played in place of its own, so that
    it shows how to get out of it"""
    games: str = ""
    """ALFWorld: folder of games (empty: $ALFWORLD_DATA, else small ones that are made once)"""
    tasks: str = ""
    """ALFWorld: task types to play, separated by commas (empty: all six)"""
    history_length: int = 40
    """ALFWorld: number of commands that the prompt shows, the newest ones; 40 is all of them"""


@dataclass
class TinySettings:
    """Without --model: a new tiny model."""

    size: Literal["", "small", "medium", "nano"] = ""
    """size of the model (empty: the one of the environment)"""
    read_out_steps: int = 250
    """steps of the read-out that teaches the vision tower to see"""
    learning_rate: float = 2e-3
    """peak learning rate of AdamW: embeddings, norms, vision tower"""
    muon_learning_rate: float = 3e-3
    """peak learning rate of Muon: the matrices of the text layers"""


@dataclass
class LoraSettings:
    """With --model: one that is there is fine-tuned, and written merged."""

    lora_rank: int = 64
    """rank of the LoRA factors"""
    lora_learning_rate: float = 1e-4
    """peak learning rate of the factors"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the model runs; auto is the GPU where there is one"""
    observation: Literal["auto", "small", "full"] = "auto"
    """small: short prompts and few pixels; full: the rules in words and large pictures; auto: small
    for models of less than 200 MB, full for all others"""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: the base in 4 bits"""
    micro_tokens: int = 0
    """tokens that run forward and backward at once (0: 2048, and up to 8192 where the memory plan
    leaves a twentieth of the card free)"""
    save_every: int = 50
    """steps between saves into OUT/unfinished, from which --resume goes on (0: none)"""
    resume: bool = False
    """go on with a fine-tuning of the same settings that did not come to its end"""


@dataclass
class EvaluationSettings:
    """Episodes at the end."""

    eval_episodes: int = 500
    """episodes of each evaluation at the end"""
    max_new_tokens: int = 96
    """longest answer in tokens, in the evaluation at the end; 256 with --model"""


@dataclass
class SftConfig(  # fields of the last base come first
    EvaluationSettings, LoraSettings, TinySettings, DataSettings, RunSettings
):
    """Make a warm start from expert traces: the tiny model from scratch, or any other by LoRA."""


# Measured in docs/LOG.md: enough to begin reinforcement learning, far from the optimum.
SFT_DEFAULTS: dict[str, dict] = {
    "points24": dict(other_targets=0.75),
    "ezpoints": dict(steps=150, deals=32, read_out_steps=120),
    "numberline": dict(steps=160, deals=32),
    "blackjack": dict(steps=300, deals=32),
    "alfworld": dict(
        steps=900,
        deals=8,
        states=0,
        stray=0.15,
        read_out_steps=400,
        eval_episodes=200,
        max_new_tokens=128,
    ),
}


LEGAL = 0.5  # share of legal answers below which a model does not know its game


# A large model knows how to write and to count, and splits numbers into more tokens.
FINE_TUNING = dict(steps=300, max_new_tokens=256, other_targets=0.0)
OF_A_NEW_MODEL = ("size", "learning_rate", "muon_learning_rate", "read_out_steps")
OF_ANY_MODEL = ("lora_rank", "lora_learning_rate", "device", "observation", "quantize")
OF_ANY_MODEL += ("micro_tokens", "save_every", "resume")


def sft_defaults(env: str, fine_tuning: bool = False) -> SftConfig:
    """The settings of the warm start of one environment; of a model that is there already."""
    find(env)
    more = FINE_TUNING if fine_tuning else {}
    return SftConfig(**{"env": env, **SFT_DEFAULTS.get(env, {}), **more})


def expert_options(c: SftConfig) -> dict:
    """What the settings say of the expert, for the environments that have it."""
    return {"expert_solutions": c.solutions} if c.env in ("points24", "ezpoints") else {}


def too_long(longest: int, limit: int) -> str:
    """What to say where the expert's answers are longer than answers may be; else nothing."""
    if longest <= limit:
        return ""
    more = f"--max-new-tokens {longest + longest // 4}"
    return f"the expert's answers have up to {longest} tokens: add {more}, in training too"


def written(c: SftConfig, legal: float) -> str:
    """What to say at the end, of a warm start whose answers are legal as often as that."""
    text = f"written to {c.out}: train it with python -m turbo.train {c.env} --model {c.out}"
    if legal >= LEGAL:
        return text
    return (
        f"{text}\nwarning: only {legal:.0%} of its answers are legal: it needs more --steps, or a "
        f"longer answer than --max-new-tokens {c.max_new_tokens}"
    )


def warm_cosine(step: int, steps: int, warm: int) -> float:
    """The learning rate as a share of its peak: a rise over `warm` steps, a cosine down to 2 %."""
    return min(1, (step + 1) / warm) * max(0.02, 0.5 * (1 + math.cos(math.pi * step / steps)))


def check_sft(c: SftConfig) -> None:
    """Refuse settings that cannot work."""
    rates = ("learning_rate", "muon_learning_rate", "lora_learning_rate", "lora_rank")
    for name in ("steps", "deals", "solutions", "read_out_steps", *rates, "eval_episodes"):
        if not getattr(c, name) > 0:
            raise ValueError(f"{flag(name)} must be more than 0, got {getattr(c, name)}")
    for name in ("seed", "states", "workers", "history_length", "save_every", "micro_tokens"):
        if getattr(c, name) < 0:
            raise ValueError(f"{flag(name)} must be zero or more, got {getattr(c, name)}")
    plain = sft_defaults(c.env, bool(c.model))
    for name in OF_A_NEW_MODEL if c.model else OF_ANY_MODEL:
        if getattr(c, name) != getattr(plain, name):
            if not c.model:
                raise ValueError(f"{flag(name)} is a setting with --model: leave it out")
            hint = "; that of its factors is --lora-learning-rate" * name.endswith("rate")
            raise ValueError(
                f"{flag(name)} is a setting of a new model, without --model: leave it out{hint}"
            )
    if not 0 <= c.stray < 1:
        raise ValueError(f"--stray must be a share from 0 to below 1, got {c.stray}")
    if (c.games or c.tasks) and c.env != "alfworld":
        raise ValueError("--games and --tasks are for alfworld alone: leave them out")
    check_env(c.env, needs_expert=True)
    if not 0 <= c.other_targets <= 1 or (c.other_targets and c.env != "points24"):
        rule = "a share from 0 to 1, and 0 except with points24"
        raise ValueError(f"--other-targets must be {rule}, got {c.other_targets}")
