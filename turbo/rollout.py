"""Playing: batches of environments, answers sampled by `turbo.decode`, one record per environment step.

Every deal is played by a group of G environments that share its picture and the keys and values of the prompt prefix.
Episodes are played to their end, in rounds of E environments that start together, until enough steps are there; so
each update's data are whole episodes and nothing has to be carried from one update to the next. Every random number of a
rollout derives from (seed, update, worker): a resumed run continues bit for bit without saving any generator.

An answer that cannot be read, or names no legal action, is *illegal*: the environment receives no action and says what
that costs. Format rewards belong to the same reward stream as the environment's own.

Left out: scoring under other weights (`turbo.score`), advantages (`turbo.gae`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from turbo.decode import Decoder, Request, Sample
from turbo.envs.base import Answer, Verdict
from turbo.model import PrefixKV, TextWeights, VisionLanguageModel
from turbo.parallel import Crew
from turbo.prompts import suffix_text


@dataclass
class Step:
    """One environment step: what was asked, what was answered, what came of it."""

    picture: int  # row of `Rollout.features`
    suffix: list[int]  # prompt tokens behind the shared prefix
    tokens: list[int]  # the sampled answer, T tokens
    logprobs: list[float]  # [T] log-probability of each under the sampled distribution
    thought: int  # the first `thought` tokens are thought, the rest is action
    hidden: Tensor  # [D] hidden state at the last prompt token, input of the value head
    reward: float  # the environment's reward
    format_reward: float  # bonus of a well-formed answer, penalty of an illegal one
    answer: Answer
    verdict: Verdict
    terminated: bool
    truncated: bool


@dataclass
class Episode:
    """One environment's way from reset to its end."""

    group: int  # number of the deal; the G episodes of a group share it
    deal: tuple  # what was dealt, for splits
    steps: list[Step] = field(default_factory=list)
    success: bool = False
    solvable: bool = True
    final: tuple[int, list[int]] | None = None  # picture and suffix of a truncated end

    @property
    def episode_return(self) -> float:
        """Undiscounted sum of the environment's rewards."""
        return sum(s.reward for s in self.steps)


@dataclass
class Rollout:
    """Whole episodes with what scoring them needs."""

    episodes: list[Episode]
    features: Tensor  # [U, n, D] vision features, one row a picture
    grid: Tensor  # [1, 3]
    fixed: str  # the fixed part of the prompt
    guessed: int = 0
    accepted: int = 0
    passes: int = 0

    @property
    def steps(self) -> list[Step]:
        """All steps, episode after episode."""
        return [s for e in self.episodes for s in e.steps]


@dataclass(frozen=True)
class RolloutOptions:
    """How to play."""

    envs: int  # environments that play at once, over all workers
    group: int  # environments that play the same deal
    temperature: float
    max_new_tokens: int
    prompt_style: str = "short"
    format_valid: float = 0.0
    format_invalid: float = 0.0


class Table:
    """One worker's environments, made once; every worker of the crew plays its own deals."""

    def __init__(
        self, vlm: VisionLanguageModel, make_env: Callable, options: RolloutOptions, crew: Crew
    ):
        own = options.envs // crew.size // options.group * options.group
        if own == 0:
            raise ValueError(
                f"{options.envs} environments are too few for {crew.size} workers with groups of "
                f"{options.group}: use at least {crew.size * options.group}, or fewer workers"
            )
        self.vlm, self.options, self.crew = vlm, options, crew
        self.envs = [make_env() for _ in range(own)]

    def collect(
        self,
        weights: TextWeights,
        seed: tuple[int, ...],
        steps: int = 0,
        deals: list[dict] | None = None,
    ) -> Rollout:
        """This worker's share of at least `steps` steps, or of the given `deals` (arguments of reset), played once each."""
        rank, size = self.crew.rank, self.crew.size
        player = _Player(self.vlm, weights, self.envs, self.options, (*seed, rank))
        return player.play(-(-steps // size), None if deals is None else deals[rank::size])


class _Gallery:
    """The pictures of a round: each different one is seen once, and its prompt prefix is computed once."""

    def __init__(self, vlm: VisionLanguageModel, weights: TextWeights, fixed: str):
        self.vlm, self.weights, self.fixed = vlm, weights, fixed
        self.number: dict[bytes, int] = {}
        self.last: dict[
            int, tuple
        ] = {}  # environment -> its last picture and that picture's number
        self.features: list[Tensor] = []
        self.prefix: PrefixKV | None = None
        self.grid = torch.empty(0)

    def look(self, pictures: dict[int, np.ndarray]) -> list[int]:
        """Numbers of the environments' pictures; those not seen before go through the vision tower."""
        new = []
        for env, picture in pictures.items():
            if env in self.last and self.last[env][0] is picture:
                continue  # the same object: unchanged
            key = picture.tobytes()
            if key not in self.number:
                self.number[key] = len(self.number)
                new.append(picture)
            self.last[env] = (picture, self.number[key])
        if new:
            features, self.grid = self.vlm.see(new)
            prefix = self.vlm.prefix(self.weights, features, self.fixed, self.grid)
            self.prefix = prefix if self.prefix is None else self.prefix.extend(prefix)
            self.features.append(features)
        return [self.last[env][1] for env in pictures]


class _Player:
    """One worker's rollout."""

    def __init__(self, vlm, weights, envs, options: RolloutOptions, seed: tuple[int, ...]):
        self.vlm, self.weights, self.envs, self.options = vlm, weights, envs, options
        self.seeds = torch.Generator().manual_seed(mix(*seed, 0))
        self.sampling = torch.Generator().manual_seed(mix(*seed, 1))

    def play(self, steps: int, deals: list[dict] | None) -> Rollout:
        """Rounds of episodes until there are `steps` steps, or until the `deals` are played."""
        groups = len(self.envs) // self.options.group
        queue = list(deals or [])
        rounds, done = [], 0
        while queue if deals is not None else done < steps:
            if deals is not None:
                batch, queue = queue[:groups], queue[groups:]
            else:
                numbers = torch.randint(2**31 - 1, (groups,), generator=self.seeds).tolist()
                batch = [{"seed": n} for n in numbers]
            rounds.append(self._round(batch))
            done += len(rounds[-1].steps)
        return join(rounds)

    @torch.no_grad()
    def _round(self, deals: list[dict]) -> Rollout:
        envs = self.envs[: len(deals) * self.options.group]
        pictures, episodes = {}, []
        for i, env in enumerate(envs):
            pictures[i], info = env.reset(**deals[i // self.options.group])
            solvable = info.get("solvable", True)
            episodes.append(Episode(i // self.options.group, env.deal_key(), solvable=solvable))
        o = self.options
        gallery = _Gallery(self.vlm, self.weights, envs[0].prompt(o.prompt_style).fixed)
        decoder = Decoder(
            self.vlm, self.weights, len(envs), o.temperature, o.max_new_tokens, self.sampling
        )
        shown = gallery.look(pictures)
        for i, env in enumerate(envs):
            decoder.show(i, gallery.prefix, shown[i])
            decoder.ask(i, self._request(env, None))
        while decoder.rows:
            done = decoder.advance()
            still = {}
            for i, sample in done:
                step, picture = self._step(envs[i], episodes[i], sample, shown[i])
                if not step.terminated:
                    still[i] = picture
            for i, number in zip(still, gallery.look(still), strict=True):
                last = episodes[i].steps[-1]
                if last.truncated:  # its value is asked of the final observation
                    episodes[i].final = (number, self._suffix(envs[i]))
                    continue
                if number != shown[i]:
                    shown[i] = number
                    decoder.show(i, gallery.prefix, number)
                decoder.ask(i, self._request(envs[i], last.answer.text))
        out = Rollout(episodes, torch.cat(gallery.features), gallery.grid, gallery.fixed)
        out.guessed, out.accepted, out.passes = decoder.guessed, decoder.accepted, decoder.passes
        return out

    def _suffix(self, env) -> list[int]:
        return self.vlm.encode(suffix_text(env.prompt(self.options.prompt_style).state))

    def _request(self, env, previous: str | None) -> Request:
        return Request(self._suffix(env), lambda written: env.guess_answer(written, previous))

    def _step(self, env, episode: Episode, sample: Sample, picture_number: int) -> tuple:
        """Read an answer and play it; the step's record and the next picture."""
        tokens = sample.tokens
        suffix = self._suffix(env)
        answer = env.read_answer(self.vlm.decode(tokens))
        verdict = env.judge(answer)
        if answer.action is None or tokens[-1] != self.vlm.end:
            answer = (
                answer
                if answer.action is None
                else Answer(answer.text, None, answer.fields, "too long")
            )
            picture, reward, terminated, truncated, info = env.step_illegal()
            bonus = self.options.format_invalid
        else:
            action = env.actions.index(answer.action)
            picture, reward, terminated, truncated, info = env.step(action)
            bonus = self.options.format_valid
        step = Step(
            picture=picture_number,
            suffix=suffix,
            tokens=tokens,
            logprobs=sample.logprobs,
            thought=self.vlm.thought_tokens(tokens),
            hidden=sample.hidden,
            reward=float(reward),
            format_reward=bonus,
            answer=answer,
            verdict=verdict,
            terminated=terminated,
            truncated=truncated,
        )
        episode.steps.append(step)
        episode.success = bool(info["success"])
        return step, picture


def join(parts: list[Rollout]) -> Rollout:
    """One rollout of several; pictures and groups are renumbered."""
    if not parts:
        return Rollout([], torch.empty(0), torch.empty(0), "")
    out = Rollout([], torch.cat([p.features for p in parts]), parts[0].grid, parts[0].fixed)
    pictures = groups = 0
    for p in parts:
        for e in p.episodes:
            e.group += groups
            for s in e.steps:
                s.picture += pictures
            if e.final is not None:
                e.final = (e.final[0] + pictures, e.final[1])
        pictures += len(p.features)
        groups = 1 + max(e.group for e in p.episodes)
        out.episodes += p.episodes
        out.guessed, out.accepted = out.guessed + p.guessed, out.accepted + p.accepted
        out.passes += p.passes
    return out


def mix(*numbers: int) -> int:
    """One seed of several numbers (a polynomial hash); the same on every machine."""
    value = 0x9E3779B97F4A7C15
    for n in numbers:
        value = (value ^ (n + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        value ^= value >> 29
    return value % (2**63)
