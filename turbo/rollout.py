"""Playing: batches of environments, answers sampled by `turbo.decode`, one record per step.

Every deal is played by a group of G environments that share its picture and the keys and values of
the prompt prefix. Episodes are played to their end; an environment that comes free begins the next
one, until enough steps are there. So each update's data are whole episodes and nothing has to be
carried from one update to the next. Every random number of a rollout derives from (seed, update,
worker): a resumed run continues bit for bit without saving any generator.

An answer that cannot be read, or names no legal action, is *illegal*: the environment receives no
action and says what that costs. Format rewards belong to the same reward stream as the
environment's own.

Left out: scoring under other weights (`turbo.score`), advantages (`turbo.gae`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from turbo.batch import run_batches
from turbo.decode import Decoder, Request, Sample
from turbo.envs.base import Answer, SlowEnv, Verdict, VisualEnv, action_key
from turbo.model import VisionLanguageModel, Weights
from turbo.parallel import Crew
from turbo.phases import Phases
from turbo.prefixes import Prefixes

PICTURE = 256  # tokens that a picture counts for where a large model sees several together
AHEAD = 4  # deals whose pictures are seen together, once all environments are busy
TOGETHER = 8  # one in so many slots of a large model's decoder waits for the next to be free


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
    asked: VisualEnv | None = None  # the environment as it asked; stays with its worker


@dataclass
class Episode:
    """One environment's way from reset to its end."""

    group: int  # number of the deal; the G episodes of a group share it
    deal: tuple  # what was dealt, for splits
    steps: list[Step] = field(default_factory=list)
    success: bool = False
    solvable: bool = True
    task: str = ""  # what kind of task it is, in games that have several
    goal_rate: float = 0.0  # share of the goal's conditions that hold at the end
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
    pictures: list[np.ndarray] = field(default_factory=list)  # [H, W, 3] uint8, U of them
    guessed: int = 0
    accepted: int = 0
    passes: int = 0

    @property
    def steps(self) -> list[Step]:
        """All steps, episode after episode; a list that is made when it is asked for."""
        return [s for e in self.episodes for s in e.steps]

    def select(self, rows: Iterable[int]) -> list[Step]:
        """The steps of these numbers."""
        steps = self.steps
        return [steps[i] for i in rows]


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


class Abandoned(Exception):
    """A rollout that was given up because somebody asked to stop; nothing came of it."""


class Table:
    """One worker's environments, made once; every worker of the crew plays its own deals."""

    def __init__(
        self,
        vlm: VisionLanguageModel,
        make_env: Callable,
        options: RolloutOptions,
        crew: Crew,
        phases: Phases | None = None,  # hears how far this worker's share of a rollout is
    ):
        own = options.envs // crew.size // options.group * options.group
        if own == 0:
            raise ValueError(
                f"{options.envs} environments are too few for {crew.size} workers with groups of "
                f"{options.group}: use at least {crew.size * options.group}, or fewer workers"
            )
        self.vlm, self.options, self.crew = vlm, options, crew
        self.phases = phases or Phases()
        self.envs = [make_env() for _ in range(own)]
        self.scout = make_env()  # draws pictures ahead

    def collect(
        self,
        weights: Weights,
        seed: tuple[int, ...],
        steps: int = 0,
        deals: list[dict] | None = None,
        patient: bool = False,
    ) -> Rollout:
        """This worker's share of at least `steps` steps, or of the given `deals`, played once each.

        A deal is the arguments of `reset`. Raises Abandoned, in all workers, when one was asked to
        stop, unless they are `patient`.
        """
        crew, rank, size = self.crew, self.crew.rank, self.crew.size
        player = _Player(self, weights, (*seed, rank))
        deals = None if deals is None else deals[rank::size]
        rollout = player.play(-(-steps // size), deals, lambda: crew.is_asked and not patient)
        if any(crew.share(rollout is None)):  # all workers abandon it, or none
            raise Abandoned
        return rollout


class _Gallery:
    """The pictures of a round: each one is seen once, and its prompt prefix is computed once."""

    def __init__(self, vlm: VisionLanguageModel, weights: Weights, fixed: str):
        self.vlm, self.prefixes = vlm, Prefixes(vlm, weights, fixed)
        self.number: dict[bytes, int] = {}
        self.pictures: list[np.ndarray] = []  # by number
        # environment -> its last picture and that picture's number
        self.last: dict[int, tuple] = {}

    def look(self, pictures: dict[int, np.ndarray]) -> list[int]:
        """Numbers of the environments' pictures; new ones go through the vision tower."""
        new: list[np.ndarray] = []
        for env, picture in pictures.items():
            if env in self.last and self.last[env][0] is picture:
                continue  # the same object: unchanged
            key = picture.tobytes()
            if key not in self.number:
                self.number[key] = len(self.number)
                new.append(picture)
            self.last[env] = (picture, self.number[key])

        def see(rows: list[int]) -> None:
            self.prefixes.add(*self.vlm.see([new[i] for i in rows]))

        run_batches([PICTURE] * len(new), self.vlm.batches, "decode", see)
        self.pictures += new
        return [self.last[env][1] for env in pictures]


@dataclass
class _Sent:
    """An answer that is being played."""

    slot: int
    env: VisualEnv
    sample: Sample
    suffix: list[int]
    asked: VisualEnv
    answer: Answer
    verdict: Verdict
    action: int | None  # None: illegal

    @property
    def is_slow(self) -> bool:
        """Whether the environment works in a process of its own."""
        return isinstance(self.env, SlowEnv) and self.env.is_remote

    def outcome(self) -> tuple:
        """(picture, reward, terminated, truncated, info)."""
        if self.is_slow:
            return self.env.receive()
        return self.env.step_illegal() if self.action is None else self.env.step(self.action)


class _Player:
    """One worker's rollout."""

    def __init__(self, table: Table, weights: Weights, seed: tuple[int, ...]):
        self.vlm, self.weights, self.options = table.vlm, weights, table.options
        self.envs, self.scout, self.phases = table.envs, table.scout, table.phases
        self.seeds = torch.Generator().manual_seed(mix(*seed, 0))
        self.dealt: list[dict] = []
        self.sampling = torch.Generator().manual_seed(mix(*seed, 1))

    @torch.no_grad()
    def play(
        self, steps: int, deals: list[dict] | None, asked: Callable[[], bool]
    ) -> Rollout | None:
        """Episodes of the `deals`, or of random ones until `steps` steps are done.

        All that begin are finished. Every environment takes the next episode as it comes free.
        Which episodes are begun depends only on steps already played, so long episodes are as
        likely to be in as short ones. None as soon as it is asked to stop.
        """
        o, self.taken, self.done = self.options, 0, 0
        self.deals, self.steps = deals, steps
        self.phases.expect(steps if deals is None else len(deals) * o.group)
        self.scout.reset(seed=0)  # an environment says what it asks once it is reset
        fixed = self.scout.prompt(o.prompt_style).fixed
        gallery = self.gallery = _Gallery(self.vlm, self.weights, fixed)
        size = len(self.envs) if deals is None else min(len(self.envs), len(deals) * o.group)
        decoder = Decoder(
            self.vlm, self.weights, size, o.temperature, o.max_new_tokens, self.sampling
        )
        out = Rollout([], torch.empty(0), torch.empty(0), fixed)
        playing: dict[int, Episode] = {}  # slot -> episode
        shown: dict[int, int] = {}  # slot -> number of the picture its cache holds
        pictures: dict[int, np.ndarray] = {}  # slots that wait for their next prompt
        for slot in range(size):
            self._begin(slot, playing, pictures, out)
        landed: list[_Sent] = []  # steps that slow environments do meanwhile
        while pictures or decoder.rows or landed:
            if asked():
                for sent in landed:
                    sent.outcome()
                return None
            ended = []
            if enough(self.vlm, len(pictures), len(decoder.rows)):
                numbers = dict(zip(pictures, gallery.look(pictures), strict=True))
                over = {i for i in pictures if (s := playing[i].steps) and s[-1].truncated}
                new = {i: n for i, n in numbers.items() if i not in over and shown.get(i) != n}
                for slot, number in numbers.items():
                    if slot in over:  # its value is asked of the final observation
                        playing[slot].final = (number, self._suffix(self.envs[slot]))
                        ended.append(slot)
                        continue
                    if slot in new:
                        shown[slot] = number
                        decoder.show(slot, *gallery.prefixes.get(number, new.values()))
                    steps = playing[slot].steps
                    previous = steps[-1].answer.text if steps else None
                    decoder.ask(slot, self._request(self.envs[slot], previous))
                pictures = {}
            # What was sent a pass ago is fetched behind this one: the order is always the same.
            sent = [self._send(slot, sample) for slot, sample in decoder.advance()]
            ready = landed + [s for s in sent if not s.is_slow]
            landed = [s for s in sent if s.is_slow]
            for s in ready:
                step, picture = self._step(s, playing[s.slot], shown[s.slot])
                if step.terminated:
                    ended.append(s.slot)
                else:
                    pictures[s.slot] = picture
            for slot in ended:
                self._begin(slot, playing, pictures, out)
            self.phases.done = self.done if deals is None else self.phases.done + len(ended)
        if gallery.prefixes.features:  # none where there was nothing to play
            out.features, out.grid = torch.stack(gallery.prefixes.features), gallery.prefixes.grid
        out.pictures = gallery.pictures
        out.guessed, out.accepted, out.passes = decoder.guessed, decoder.accepted, decoder.passes
        return out

    def _begin(self, slot: int, playing: dict, pictures: dict, out: Rollout) -> None:
        """Reset a free environment to the next episode, if there is one to be played."""
        number, place = divmod(self.taken, self.options.group)
        if self.deals is None and place == 0 and self.done >= self.steps:
            return  # enough; a group that was begun is completed
        if number == len(self.dealt):
            self._deal()
        if number == len(self.dealt):
            return
        env = self.envs[slot]
        pictures[slot], info = env.reset(**self.dealt[number])
        solvable = info.get("solvable", True)
        task = info.get("task_type", "")
        playing[slot] = Episode(number, env.deal_key(), solvable=solvable, task=task)
        out.episodes.append(playing[slot])
        self.taken += 1

    def _deal(self) -> None:
        """Deal a block of episodes, and see their pictures together: one by one would be slower."""
        count = AHEAD if self.dealt else len(self.envs) // self.options.group
        if self.deals is None:
            block = torch.randint(2**31 - 1, (count,), generator=self.seeds).tolist()
            block = [{"seed": n} for n in block]
        else:
            block = self.deals[len(self.dealt) : len(self.dealt) + count]
        self.gallery.look({-1 - i: self.scout.reset(**deal)[0] for i, deal in enumerate(block)})
        self.dealt += block

    def _suffix(self, env) -> list[int]:
        return self.vlm.encode(self.vlm.frame.suffix(env.prompt(self.options.prompt_style).state))

    def _request(self, env, previous: str | None) -> Request:
        return Request(self._suffix(env), lambda written: env.guess_answer(written, previous))

    def _send(self, slot: int, sample: Sample) -> "_Sent":
        """Read an answer and begin to play it."""
        env = self.envs[slot]
        suffix, asked = self._suffix(env), env.snapshot()
        answer = read_answer(self.vlm, env, sample.tokens)
        action = None if answer.action is None else env.actions.index(answer.action)
        sent = _Sent(slot, env, sample, suffix, asked, answer, env.judge(answer), action)
        if sent.is_slow:
            env.send(action)
        return sent

    def _step(self, sent: "_Sent", episode: Episode, picture_number: int) -> tuple:
        """What came of an answer: the step's record and the next picture."""
        tokens, answer = sent.sample.tokens, sent.answer
        picture, reward, terminated, truncated, info = sent.outcome()
        o = self.options
        bonus = o.format_invalid if answer.action is None else o.format_valid
        step = Step(
            picture=picture_number,
            suffix=sent.suffix,
            tokens=tokens,
            logprobs=sent.sample.logprobs,
            thought=self.vlm.thought_tokens(tokens, action_key(sent.env)),
            hidden=sent.sample.hidden,
            reward=float(reward),
            format_reward=bonus,
            answer=answer,
            verdict=sent.verdict,
            terminated=terminated,
            truncated=truncated,
            asked=sent.asked,
        )
        episode.steps.append(step)
        self.done += 1
        episode.success = bool(info["success"])
        episode.goal_rate = float(info.get("goal_rate", episode.success))
        return step, picture


def enough(vlm: VisionLanguageModel, free: int, busy: int) -> bool:
    """Whether `free` slots of a decoder are enough to begin their answers, while `busy` ones work.

    A large model takes as long to see one picture and to read one prompt as for several.
    """
    return vlm.text.small or free * TOGETHER >= free + busy


def read_answer(vlm: VisionLanguageModel, env: VisualEnv, tokens: list[int]) -> Answer:
    """The answer as `env` reads it; one that was cut off before its end is illegal."""
    answer = env.read_answer(vlm.decode(tokens))
    if answer.action is None or tokens[-1] == vlm.end:
        return answer
    return Answer(answer.text, None, answer.fields, "too long")


def mix(*numbers: int) -> int:
    """One seed of several numbers (a polynomial hash); the same on every machine."""
    value = 0x9E3779B97F4A7C15
    for n in numbers:
        value = (value ^ (n + 0x7F4A7C15)) * 0xBF58476D1CE4E5B9 % 2**64
        value ^= value >> 29
    return value % (2**63)
