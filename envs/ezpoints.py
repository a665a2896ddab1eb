"""EZPoints: two cards make 12, by + or *.

The first rank is uniform on 2..K (J, Q, K count 10). If its value divides 12, the partner is the
quotient with probability 1/2; otherwise, and for all other values, it is the difference. Their
order is random. Steps and rewards are those of Points24; truncated after `max_tokens` attempts.
Left out: the expert and the answer format (formula.py).
"""

from copy import copy
from typing import ClassVar

import gymnasium as gym
import numpy as np

from turbo.envs.base import Answer, Optimum, Prompt, Verdict, check_style, read_json_answer
from turbo.envs.cards import RANKS, SUITS, rank_value, read_hand
from turbo.envs.formula import (
    KEYS,
    LOSS,
    WIN,
    FormulaGame,
    expert_answer,
    judge,
    ranked_solutions,
)
from turbo.envs.guess import guess_answer
from turbo.envs.picture import as_array, draw_line, draw_row

TARGET = 12
OPERATORS = "+*"
ACTIONS = (*(str(number) for number in range(1, 11)), "+", "*", "=")


class EZPoints(gym.Env):
    """`reset(options={"hand": ["10", "2"]})` sets a deal."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(
        self,
        early_truncation: bool = True,
        draw_formula: bool = True,
        canvas: tuple[int, int] = (336, 224),
        illegal_penalty: float = -1.0,
        max_tokens: int = 5,
        expert_solutions: int = 4,
        render_mode: str | None = None,
        fresh_pictures: bool = False,
    ):
        self.fresh_pictures = fresh_pictures
        self.early_truncation, self.draw_formula = early_truncation, draw_formula
        self.canvas, self.illegal_penalty = tuple(canvas), float(illegal_penalty)
        self.max_tokens, self.expert_solutions = max_tokens, expert_solutions
        self.render_mode, self.actions = render_mode, ACTIONS
        self.action_space = gym.spaces.Discrete(len(ACTIONS))
        shape = (self.canvas[1], self.canvas[0], 3)
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        self._strip = canvas[1] // 5 if draw_formula else 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        fixed = options and "hand" in options
        self.ranks = read_hand(options["hand"], 2) if fixed else self._deal()
        self.values = tuple(rank_value(rank) for rank in self.ranks)
        self.suits = tuple(SUITS[i] for i in self.np_random.integers(len(SUITS), size=2))
        jitter = self.np_random.uniform(-1, 1, (2, 2))
        self._table = draw_row(self.ranks, self.suits, jitter, self.canvas, self._strip)
        self.game = FormulaGame(self.ranks, self.values, TARGET, OPERATORS, self.expert_solutions)
        self.solvable = bool(ranked_solutions(tuple(sorted(self.values)), TARGET, OPERATORS))
        self._draw()
        return self._observe(), self._info(False)

    def _deal(self) -> tuple[str, str]:
        first = RANKS[int(self.np_random.integers(1, len(RANKS)))]
        value = rank_value(first)
        partner = TARGET - value
        if TARGET % value == 0 and self.np_random.random() < 0.5:
            partner = TARGET // value
        choices = [rank for rank in RANKS if rank_value(rank) == partner]
        second = choices[int(self.np_random.integers(len(choices)))]
        return (first, second) if self.np_random.random() < 0.5 else (second, first)

    def step(self, action: int) -> tuple:
        written = len(self.game.tokens)
        reward, terminated, success = self.game.play(ACTIONS[action])
        if len(self.game.tokens) != written and self.draw_formula:
            self._draw()
        return self._outcome(reward, terminated, success)

    def step_illegal(self) -> tuple:
        self.game.attempts += 1
        return self._outcome(self.illegal_penalty, self.early_truncation, False)

    def _outcome(self, reward: float, terminated: bool, success: bool) -> tuple:
        terminated = terminated or (self.early_truncation and reward <= LOSS)
        truncated = not terminated and self.game.attempts >= self.max_tokens
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

    def prompt(self, style: str = "full") -> Prompt:
        check_style(style)
        if style == "short":
            fixed, label = "Make 12 with the two cards. Reply in JSON.\n", "formula"
        else:
            fixed, label = _FULL_RULES, "The formula so far"
        return Prompt(fixed, f'{label}: "{self.game.formula}"')

    def read_answer(self, text: str) -> Answer:
        return read_json_answer(text, KEYS, ACTIONS)

    def expert_answer(self, rng: np.random.Generator) -> str | None:
        return expert_answer(self.game, rng)

    def guess_answer(self, written: str, previous: str | None) -> str:
        return guess_answer(written, previous, self.game)

    def judge(self, answer: Answer) -> Verdict:
        return judge(answer, self.game)

    def snapshot(self) -> "EZPoints":
        twin = copy(self)
        twin.game = self.game.copy()
        return twin

    def optimum(self) -> Optimum:
        return Optimum(1.0, WIN, "every dealt pair makes 12 by + or *")

    def deal_key(self) -> tuple:
        return tuple(sorted(self.values))


_FULL_RULES = f"""You are an expert at a small card game. The picture shows two playing cards. \
A counts 1, J, Q and K count 10, and every other card counts its number. Write a formula that uses \
both cards exactly once, joined by + or *, and whose value is exactly 12. You write it one token \
at a time: in every turn you choose one number or sign, and it is put at the end of the formula so \
far.
The actions are: {", ".join(f'"{action}"' for action in ACTIONS)}.
A number may be chosen only while a card of that value is still unused. When the formula is \
complete, choose "=": you win if it uses both cards and equals 12, and lose otherwise.
Reply with one JSON object and nothing else, in this form:
{{"cards": [the ranks of the two cards from left to right, as strings], "formula": "the formula \
so far", "thoughts": "work out which complete formula makes 12, starting with the formula so far, \
and which token comes next", "action": "the one token you choose"}}
"""
