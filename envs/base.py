"""What every environment says about itself, and how answers are read and guessed.

An environment is a `gymnasium.Env` with pictures, [H, W, 3] uint8. Beside step and reset it says
how it is asked (prompt), how an answer is read, what an expert would write, whether a thought is
right and what the best possible score is. Left out: models, tokens, training.

An answer is one JSON object with every required key. Nothing is repaired: an answer that is not
such an object, or whose action is not exactly one of the actions, is illegal, and `Answer.error`
says why. The action stands last: what comes before its key is thought. An environment with a form
of its own names what begins the action in its attribute `action_key`.

An environment of your own has all that `VisualEnv` lists; where it has nothing to say, it assigns a
default:

    class Maze(gymnasium.Env):
        expert_answer, guess_answer, judge = no_expert, no_guess, no_verdict
        snapshot, optimum, deal_key = copied, unknown_optimum, no_deal_key
"""

import json
from collections.abc import Callable, Hashable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

MAX_ANSWER_CHARS = 8_000
FENCE = "```"
ACTION_KEY = '"action":'


@dataclass(frozen=True)
class Prompt:
    """Text shown after the picture: fixed + state. `fixed` is the same in every episode."""

    fixed: str
    state: str

    @property
    def text(self) -> str:
        return self.fixed + self.state


@dataclass(frozen=True)
class Answer:
    """An answer as read. `action` is None when the answer is illegal, and `error` says why.

    `fields["thoughts"]` is the thought that is shown and compared with others.
    """

    text: str
    action: str | None
    fields: dict
    error: str | None


@dataclass(frozen=True)
class Verdict:
    """Whether a thought is right. None: this environment, or this thought, does not say."""

    perception: bool | None  # it reads the picture correctly
    aim: bool | None  # what it aims at is correct
    follows: bool | None  # the action is what the thought aims at
    judged: bool = True  # False: this environment judges no thoughts at all

    @property
    def right(self) -> bool:
        parts = [part for part in (self.perception, self.aim, self.follows) if part is not None]
        return bool(parts) and all(parts)


@dataclass(frozen=True)
class Optimum:
    """The best possible play: success rate, undiscounted return, and how they are known."""

    success_rate: float
    episode_return: float | None
    source: str


class VisualEnv(Protocol):
    """The interface. `step` and friends return (obs, reward, terminated, truncated, info).

    The observation is the same ndarray object while the picture is unchanged, so that vision
    features can be reused by identity; it must not be written to. With the constructor's option
    fresh_pictures=True it is a new array at every call. `info["success"]` is a bool, and
    `info["solvable"]`, where reset gives it, whether the deal can be won.

    Three things an environment may have beside: the class attribute TINY, a dict of options for its
    constructor, that draw for a tiny model; an option early_truncation, whether the first reward of
    -1 ends the episode; and `action_key`.
    """

    actions: tuple[str, ...]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        """(picture, info) of a new episode; the seed decides all of it."""

    def step(self, action: int) -> tuple:
        """Play `actions[action]`. Every episode ends or is truncated at some time."""

    def step_illegal(self) -> tuple:
        """An illegal answer: nothing is executed, the attempt is counted and penalised."""

    def render(self) -> np.ndarray:
        """The picture as it is now."""

    def prompt(self, style: str) -> Prompt:
        """`style` is "short" (tiny model) or "full" (large models)."""

    def read_answer(self, text: str) -> Answer:
        """Read any text whatever; `read_json_answer` does it for JSON."""

    def expert_answer(self, rng: np.random.Generator) -> str | None:
        """The answer an expert writes in this state; None where there is nothing to show."""

    def guess_answer(self, written: str, previous: str | None) -> str:
        """A full answer that starts with `written`, or `written` where nothing can be guessed."""

    def judge(self, answer: Answer) -> Verdict:
        """Whether the thought of an answer is right."""

    def snapshot(self) -> "VisualEnv":
        """This environment as it is now: it can be asked, guess and judge after this one moved on.

        It is not to be played.
        """

    def optimum(self) -> Optimum:
        """The best possible play, over all deals."""

    def deal_key(self) -> tuple:
        """What identifies the deal, for splits into seen and unseen."""


@runtime_checkable
class SlowEnv(Protocol):
    """A `VisualEnv` that may work in a process of its own: a step has two halves.

    Between them other environments and the model work.
    """

    is_remote: bool  # whether it does

    def send(self, action: int | None) -> None:
        """Begin a step; None is an illegal answer."""

    def receive(self) -> tuple:
        """What `step` returns."""


@runtime_checkable
class LabelledEnv(Protocol):
    """A `VisualEnv` whose answers do not list what the picture shows, but which says so itself."""

    def picture_labels(self) -> list[str]:
        """What the picture shows, one name a slot: a fresh vision tower learns to read them."""


@runtime_checkable
class MeetingEnv(Protocol):
    """A `VisualEnv` whose prompt tells the way to a state, so that no two episodes see the same."""

    def meeting(self) -> Hashable:
        """Equal where two episodes of a deal are in the same place, however they came there.

        Their returns from there on are compared (`turbo.gae.state_advantages`).
        """


def no_expert(env: VisualEnv, rng: np.random.Generator) -> None:
    """A default for expert_answer: nobody shows how it is done, so there is no warm start."""


def no_guess(env: VisualEnv, written: str, previous: str | None) -> str:
    """A default for guess_answer: every token is sampled for itself, which takes longest."""
    return written


def guess_expert(env: VisualEnv, written: str, previous: str | None) -> str:
    """A default for guess_answer where there is a quick expert: its answer, as long as that agrees
    with what is written. Guesses make sampling faster and change nothing else."""
    text = env.expert_answer(np.random.default_rng(0)) or ""
    return text if text.startswith(written) else written


def no_verdict(env: VisualEnv, answer: Answer) -> Verdict:
    """A default for judge: nothing is known about thoughts."""
    return Verdict(None, None, None, judged=False)


def copied(env: VisualEnv) -> VisualEnv:
    """A default for snapshot: a deep copy. Whoever replaces values and never changes them may
    return `copy.copy(self)`, which is faster."""
    return deepcopy(env)


def unknown_optimum(env: VisualEnv) -> Optimum:
    """A default for optimum: no more than every episode can succeed."""
    return Optimum(1.0, None, "not known: every episode at best")


def no_deal_key(env: VisualEnv) -> tuple:
    """A default for deal_key: deals are not told apart in the record of episodes."""
    return ()


def action_key(env: VisualEnv) -> str:
    """What begins the action in answers to this environment; all before it is thought."""
    return getattr(env, "action_key", ACTION_KEY)


def check_style(style: str) -> None:
    """ValueError on a prompt style that does not exist."""
    if style not in ("short", "full"):
        raise ValueError(f"prompt style {style!r} is unknown: use 'short' or 'full'")


def read_json_answer(text: str, keys: Sequence[str], actions: Sequence[str]) -> Answer:
    """Read an answer strictly; `keys` must all be there, extra keys are allowed. Never raises."""
    if len(text) > MAX_ANSWER_CHARS:
        return Answer(text, None, {}, f"{len(text)} characters, more than {MAX_ANSWER_CHARS}")
    body = text.strip()
    if body.startswith(FENCE) and body.endswith(FENCE) and len(body) >= 2 * len(FENCE):
        body = body[len(FENCE) : -len(FENCE)].removeprefix("json")
    try:
        fields = json.loads(body, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        return Answer(text, None, {}, f"not one JSON object: {str(error)[:120]}")
    if not isinstance(fields, dict):
        return Answer(text, None, {}, f"JSON {type(fields).__name__} where an object is wanted")
    missing = [key for key in keys if key not in fields]
    if missing:
        return Answer(text, None, fields, f"missing keys: {', '.join(missing)}")
    action = fields["action"]
    if type(action) is int:
        action = str(action)
    if not isinstance(action, str):
        return Answer(text, None, fields, f"action is a {type(action).__name__}, not a string")
    action = action.strip()
    if action not in actions:
        return Answer(text, None, fields, f"action {action[:40]!r} is not in the list")
    return Answer(text, action, fields, None)


def _unique_keys(pairs: list[tuple]) -> dict:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key is there twice")
    return fields


Guess = Callable[[list[str], str], str | None]


def continue_answer(written: str, parts: Sequence[tuple[str, Guess]], closing: str = '"}') -> str:
    """Guess the rest of an answer of which `written` is there.

    An answer is lead + value + lead + value + ... + closing. Each part is (lead, guess), and
    guess(values before, part of the value written) returns the value, which must start with what is
    written, or None where it cannot be known. Values written otherwise than guessed are kept and
    the skeleton goes on after them; what does not fit the skeleton is returned as it is.
    """
    text, values = "", []
    for lead, guess in parts:
        if not _agrees(written[len(text) :], lead):
            return written
        text += lead
        rest = written[len(text) :]
        quote = rest.find('"')
        value = rest[:quote] if quote >= 0 else guess(values, rest)
        if value is None:
            return text + rest
        values.append(value)
        text += value
    return text + closing if closing.startswith(written[len(text) :]) else written


def _agrees(rest: str, lead: str) -> bool:
    return rest.startswith(lead) if len(rest) >= len(lead) else lead.startswith(rest)


def fixed_value(value: str) -> Guess:
    """A guess that is known from the state: `value`, or what is written where it differs."""
    return lambda values, rest: value if value.startswith(rest) else rest


def word_after(text: str, mark: str) -> str | None:
    """The last word after the last `mark` in `text`, None without one."""
    at = text.rfind(mark)
    return text[at + len(mark) :].strip() or None if at >= 0 else None
