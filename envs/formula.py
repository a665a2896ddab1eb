"""What Points24 and EZPoints share: the game of tokens, its steps, the canonical answer, its judge.

The canonical answer, which the expert writes and the tiny model learns:

    {"cards": ["10", "4", "5", "A"], "formula": "(10-", "thoughts": "1 4 5 10: 10-4=6,
     1 5 6: 5-1=4, 4 6: 6*4=24, so (10-4)*(5-1), next 4", "action": "4"}          (on one line)

The thoughts are the formula's operations in post-order, each behind the numbers left before it,
the formula aimed at, and its next token. Left out: prompts, how hands are dealt, guesses
(guess.py).
"""

import re
from collections.abc import Sequence
from copy import copy
from fractions import Fraction
from functools import lru_cache
from operator import and_
from typing import ClassVar

import gymnasium as gym
import numpy as np

from turbo.envs.base import Answer, Verdict, read_json_answer
from turbo.envs.cards import SUITS, evaluate, intermediate_values, operations, solutions, tokenize
from turbo.envs.picture import as_array, draw_line, draw_row

KEYS = ("cards", "formula", "thoughts", "action")
SO, NEXT = "so ", ", next "
WIN, LOSS = 10.0, -1.0

_SO_FORMULA = re.compile(r"\bso +([-+*/()0-9][-+*/()0-9 ]*)")
_RUN = re.compile(r"[-+*/()0-9\s]+")
_TYPOGRAPHY = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})


class FormulaGame:
    """One deal: the tokens written so far, the values not yet used, the attempts made.

    `operators` are the signs a formula may use, `limit` how many formulas the expert draws from.
    """

    __slots__ = ("attempts", "left", "limit", "operators", "ranks", "target", "tokens", "values")

    def __init__(
        self, ranks: Sequence[str], values: Sequence[int], target: int, operators: str, limit: int
    ):
        self.ranks = tuple(ranks)
        self.values = tuple(values)
        self.target = target
        self.operators = operators
        self.limit = limit
        self.tokens: list[str] = []
        self.left = list(values)
        self.attempts = 0

    def copy(self) -> "FormulaGame":
        """The same game, played no further when this one is."""
        twin = copy(self)
        twin.tokens, twin.left = list(self.tokens), list(self.left)
        return twin

    @property
    def formula(self) -> str:
        return "".join(self.tokens)

    def play(self, token: str) -> tuple[float, bool, bool]:
        """Append one token. Returns (reward, whether '=' ended the game, success)."""
        self.attempts += 1
        if token == "=":
            won = not self.left and evaluate(self.tokens) == self.target
            return (WIN if won else LOSS), True, won
        if token.isdigit():
            value = int(token)
            if value not in self.left:
                return LOSS, False, False
            self.left.remove(value)
        self.tokens.append(token)
        return 0.0, False, False


class FormulaEnv(gym.Env):
    """The steps, the picture and the judge of both environments; options are the constructors'.

    An episode is truncated when `most_attempts` were made.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(
        self,
        actions: Sequence[str],
        most_attempts: int,
        early_truncation: bool,
        draw_formula: bool,
        canvas: tuple[int, int],
        illegal_penalty: float,
        expert_solutions: int,
        render_mode: str | None,
        fresh_pictures: bool,
    ):
        self.actions, self.most_attempts = tuple(actions), most_attempts
        self.early_truncation, self.draw_formula = early_truncation, draw_formula
        self.canvas, self.illegal_penalty = tuple(canvas), float(illegal_penalty)
        self.expert_solutions, self.render_mode = expert_solutions, render_mode
        self.fresh_pictures = fresh_pictures
        self.action_space = gym.spaces.Discrete(len(self.actions))
        shape = (self.canvas[1], self.canvas[0], 3)
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        self._strip = canvas[1] // 5 if draw_formula else 0

    def _begin(self, game: FormulaGame, solvable: bool) -> tuple:
        """Lay the cards of a deal on the table; what `reset` returns."""
        self.game, self.solvable = game, solvable
        self.ranks, self.values, count = game.ranks, game.values, len(game.ranks)
        self.suits = tuple(SUITS[i] for i in self.np_random.integers(len(SUITS), size=count))
        jitter = self.np_random.uniform(-1, 1, (count, 2))
        self._table = draw_row(self.ranks, self.suits, jitter, self.canvas, self._strip)
        self._draw()
        return self._observe(), self._info(False)

    def step(self, action: int) -> tuple:
        written = len(self.game.tokens)
        reward, terminated, success = self.game.play(self.actions[action])
        if len(self.game.tokens) != written and self.draw_formula:
            self._draw()
        return self._outcome(reward, terminated, success)

    def step_illegal(self) -> tuple:
        self.game.attempts += 1
        return self._outcome(self.illegal_penalty, self.early_truncation, False)

    def _outcome(self, reward: float, terminated: bool, success: bool) -> tuple:
        terminated = terminated or (self.early_truncation and reward <= LOSS)
        truncated = not terminated and self.game.attempts >= self.most_attempts
        return self._observe(), reward, terminated, truncated, self._info(success)

    def _info(self, success: bool) -> dict:
        return {"success": success, "solvable": self.solvable, "hand": self.ranks}

    def _draw(self) -> None:
        table = self._table
        if self.draw_formula:
            table = draw_line(table, f"Formula: {self.game.formula}", self._strip)
        self._picture = as_array(table)

    def _observe(self) -> np.ndarray:
        return self._picture.copy() if self.fresh_pictures else self._picture

    def render(self) -> np.ndarray:
        return self._picture

    def read_answer(self, text: str) -> Answer:
        return read_json_answer(text, KEYS, self.actions)

    def expert_answer(self, rng: np.random.Generator) -> str | None:
        return expert_answer(self.game, rng)

    def judge(self, answer: Answer) -> Verdict:
        return judge(answer, self.game)

    def snapshot(self) -> "FormulaEnv":
        twin = copy(self)
        twin.game = self.game.copy()
        return twin

    def deal_key(self) -> tuple:
        return tuple(sorted(self.values))


# --- the expert


@lru_cache(maxsize=65_536)
def ranked_solutions(values: tuple[int, ...], target: int, operators: str) -> tuple:
    """(kind, tokens) of each solution: 0 plain, 1 with a negative step, 2 with a fractional one."""
    ranked = []
    for tokens in solutions(values, target):
        if any(token not in operators and not token.isdigit() for token in tokens):
            continue
        steps = intermediate_values(tokens)
        kind = 2 if any(s.denominator > 1 for s in steps) else int(any(s < 0 for s in steps))
        ranked.append((kind, tokens))
    return tuple(sorted(ranked, key=lambda entry: entry[0]))  # stable: keeps (length, text)


def expert_answer(game: FormulaGame, rng: np.random.Generator) -> str | None:
    """An answer that follows one of the plans, drawn uniformly; None where there is no plan."""
    found = game_plans(game)
    if not found:
        return None
    plan, written = found[int(rng.integers(len(found)))], len(game.tokens)
    thoughts, action = thought_text(plan, written), next_token(plan, written)
    return answer_text(game.ranks, game.formula, thoughts, action)


def game_plans(game: FormulaGame) -> tuple[tuple[str, ...], ...]:
    """The solutions the expert draws from."""
    values = tuple(sorted(game.values))
    return plans(values, game.target, game.operators, tuple(game.tokens), game.limit)


@lru_cache(maxsize=65_536)
def plans(
    values: tuple[int, ...], target: int, operators: str, begun: tuple[str, ...], limit: int
) -> tuple[tuple[str, ...], ...]:
    """The first `limit` solutions of the plainest kind that continue the formula begun."""
    fits = [
        entry
        for entry in ranked_solutions(values, target, operators)
        if entry[1][: len(begun)] == begun
    ]
    return tuple(tokens for kind, tokens in fits if kind == fits[0][0])[:limit]


@lru_cache(maxsize=65_536)
def thought_text(plan: tuple[str, ...], written: int) -> str:
    """The thought that aims at `plan` when `written` of its tokens are there already."""
    steps = ", ".join(worked_steps(plan))
    return f"{steps}, {SO}{''.join(plan)}{NEXT}{next_token(plan, written)}"


@lru_cache(maxsize=65_536)
def worked_steps(plan: tuple[str, ...]) -> tuple[str, ...]:
    """Each operation behind the numbers that are left before it, in ascending order.

    ("1 4 5 10: 10-4=6", "1 5 6: 5-1=4", "4 6: 6*4=24"): what to do next is then a function of what
    is written, which a model can learn for hands that it has never seen.
    """
    left = [Fraction(token) for token in plan if token.isdigit()]
    lines = []
    for a, sign, b, result in operations(plan):
        lines.append(f"{' '.join(map(str, sorted(left)))}: {a}{sign}{b}={result}")
        left.remove(a)
        left.remove(b)
        left.append(result)
    return tuple(lines)


def next_token(plan: Sequence[str], written: int) -> str:
    """The token that follows `written` tokens of the plan, "=" after the last."""
    return plan[written] if written < len(plan) else "="


def answer_text(cards: Sequence[str], formula: str, thoughts: str, action: str) -> str:
    """The canonical answer; the only place that formats it."""
    named = '", "'.join(cards)
    return (
        f'{{"cards": ["{named}"], "formula": "{formula}", '
        f'"thoughts": "{thoughts}", "action": "{action}"}}'
    )


# --- reading a thought


def aim_of(thoughts: str) -> str | None:
    """The formula a thought aims at, without spaces; None if it names none.

    It uses more than one number, and comes after the last "so " that is followed by such a one; in
    other wordings it is the last run of formula characters that does. Numbers beside each other,
    "4 6", are a list and no formula.
    """
    text = thoughts.translate(_TYPOGRAPHY)
    for run in (*reversed(_SO_FORMULA.findall(text)), *reversed(_RUN.findall(text))):
        tokens = tokenize(run)
        numbers = [token.isdigit() for token in tokens]
        if sum(numbers) > 1 and not any(map(and_, numbers, numbers[1:])):
            return "".join(tokens)
    return None


def judge(answer: Answer, game: FormulaGame) -> Verdict:
    """Cards read, formula aimed at correct and continuing the one begun, action its next token."""
    cards, thoughts = answer.fields.get("cards"), answer.fields.get("thoughts")
    perception = isinstance(cards, list) and [_name(card) for card in cards] == list(game.ranks)
    aim = aim_of(thoughts) if isinstance(thoughts, str) else None
    if aim is None:
        return Verdict(perception, False, None if answer.action else False)
    plan, begun = tuple(tokenize(aim)), tuple(game.tokens)
    continues = plan[: len(begun)] == begun
    used = sorted(token for token in plan if token.isdigit())
    uses_cards = used == sorted(str(value) for value in game.values)
    correct = continues and uses_cards and evaluate(plan) == game.target
    follows = continues and answer.action == next_token(plan, len(begun))
    return Verdict(perception, correct, follows)


def _name(card: object) -> str | None:
    if isinstance(card, str):
        return card.strip().upper()
    return str(card) if type(card) is int else None
