"""NumberLine: walk from the current number to the target with '-' and '+'.

Both numbers are in 0..5 and different. +1 on arrival, which ends the episode; -1 for a move that
does not come closer (a move off the line stays where it is); else 0. Truncated after `max_steps`.
Left out: randomness beyond the deal.
"""

from copy import copy
from functools import lru_cache
from typing import ClassVar

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw

from turbo.envs.base import (
    Answer,
    Optimum,
    Prompt,
    Verdict,
    check_style,
    continue_answer,
    fixed_value,
    read_json_answer,
    word_after,
)
from turbo.envs.picture import WHITE, as_array, bold_text, font

ACTIONS = ("-", "+")
HIGHEST = 5
KEYS = ("current number", "target number", "thoughts", "action")
BLUE, RED, INK = (30, 80, 200), (205, 20, 30), (40, 40, 40)
SCALE = 3


class NumberLine(gym.Env):
    """`reset(options={"hand": [current, target]})` sets both numbers."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(
        self,
        early_truncation: bool = False,
        canvas: tuple[int, int] = (336, 168),
        illegal_penalty: float = -1.0,
        max_steps: int = 10,
        render_mode: str | None = None,
        fresh_pictures: bool = False,
    ):
        self.fresh_pictures = fresh_pictures
        self.early_truncation, self.canvas = early_truncation, tuple(canvas)
        self.illegal_penalty, self.max_steps = float(illegal_penalty), max_steps
        self.render_mode, self.actions = render_mode, ACTIONS
        self.action_space = gym.spaces.Discrete(len(ACTIONS))
        shape = (self.canvas[1], self.canvas[0], 3)
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        if options and "hand" in options:
            self.current, self.target = _two_numbers(options["hand"])
        else:
            numbers = self.np_random.choice(HIGHEST + 1, size=2, replace=False)
            self.current, self.target = int(numbers[0]), int(numbers[1])
        self.start, self.attempts = self.current, 0
        return self._observe(), {"success": False}

    def step(self, action: int) -> tuple:
        self.attempts += 1
        before = abs(self.target - self.current)
        move = 1 if ACTIONS[action] == "+" else -1
        self.current = min(max(self.current + move, 0), HIGHEST)
        if self.current == self.target:
            return self._outcome(1.0, True)
        return self._outcome(0.0 if abs(self.target - self.current) < before else -1.0, False)

    def step_illegal(self) -> tuple:
        self.attempts += 1
        return self._outcome(self.illegal_penalty, False, illegal=True)

    def _outcome(self, reward: float, success: bool, illegal: bool = False) -> tuple:
        ended = success or (self.early_truncation and (illegal or reward <= -1.0))
        truncated = not ended and self.attempts >= self.max_steps
        return self._observe(), reward, ended, truncated, {"success": success}

    def _observe(self) -> np.ndarray:
        return self.render().copy() if self.fresh_pictures else self.render()

    def render(self) -> np.ndarray:
        return draw_numbers(self.current, self.target, self.canvas)

    def prompt(self, style: str = "full") -> Prompt:
        check_style(style)
        if style == "short":
            return Prompt("Move the current number to the target. Reply in JSON.\n", "- or +?")
        return Prompt(_FULL_RULES, "Which move do you choose now?")

    def read_answer(self, text: str) -> Answer:
        return read_json_answer(text, KEYS, ACTIONS)

    def expert_answer(self, rng: np.random.Generator) -> str | None:
        thoughts, action = self._thought(), self._best()
        return (
            f'{{"current number": "{self.current}", "target number": "{self.target}", '
            f'"thoughts": "{thoughts}", "action": "{action}"}}'
        )

    def _best(self) -> str:
        return "+" if self.target > self.current else "-"

    def _thought(self) -> str:
        more = "more" if self.target > self.current else "less"
        return f"{self.target} is {more} than {self.current}, so {self._best()}"

    def guess_answer(self, written: str, previous: str | None) -> str:
        def guess_thought(values: list[str], rest: str) -> str | None:
            thought = self._thought()
            return thought if thought.startswith(rest) else None

        def guess_action(values: list[str], rest: str) -> str | None:
            return rest or word_after(values[-1], "so ")

        parts = [
            ('{"current number": "', fixed_value(str(self.current))),
            ('", "target number": "', fixed_value(str(self.target))),
            ('", "thoughts": "', guess_thought),
            ('", "action": "', guess_action),
        ]
        return continue_answer(written, parts)

    def judge(self, answer: Answer) -> Verdict:
        """Both numbers read; the move named after the last "so" comes closer; it is the action."""
        numbers = [answer.fields.get(key) for key in KEYS[:2]]
        truth = [self.current, self.target]
        read = all(n in (t, str(t)) for n, t in zip(numbers, truth, strict=True))
        thoughts = answer.fields.get("thoughts")
        named = word_after(thoughts, "so ") if isinstance(thoughts, str) else None
        if answer.action is None:
            return Verdict(read, False, False)
        if named not in ACTIONS:
            return Verdict(read, None, None)
        return Verdict(read, named == self._best(), named == answer.action)

    def snapshot(self) -> "NumberLine":
        return copy(self)

    def optimum(self) -> Optimum:
        return Optimum(1.0, 1.0, "every target is at most five moves away")

    def deal_key(self) -> tuple:
        return (self.start, self.target)


def _two_numbers(hand: object) -> tuple[int, int]:
    numbers = tuple(int(number) for number in hand)
    if len(numbers) != 2 or numbers[0] == numbers[1] or not all(0 <= n <= HIGHEST for n in numbers):
        raise ValueError(f"hand {hand!r} is not [current, target]: two different numbers in 0..5")
    return numbers


@lru_cache(maxsize=256)
def draw_numbers(current: int, target: int, canvas: tuple[int, int]) -> np.ndarray:
    """Both numbers, named, above a line with a dot at the current one and a ring at the target."""
    w, h = canvas[0] * SCALE, canvas[1] * SCALE
    image = Image.new("RGB", (w, h), WHITE)
    draw = ImageDraw.Draw(image)
    for x, name, number, ink in (
        (0.25 * w, "current", current, BLUE),
        (0.75 * w, "target", target, RED),
    ):
        label = font(int(0.17 * h))
        draw.text((x, 0.11 * h), name, font=label, fill=INK, anchor="mm")
        bold_text(draw, (x, 0.43 * h), str(number), int(0.46 * h), ink)
    y, r = 0.83 * h, 0.06 * h
    places = [w * (0.1 + 0.8 * n / HIGHEST) for n in range(HIGHEST + 1)]
    draw.line([places[0], y, places[-1], y], fill=INK, width=SCALE)
    for x in places:
        draw.line([x, y - r, x, y + r], fill=INK, width=SCALE)
    x = places[target]
    draw.ellipse([x - 2 * r, y - 2 * r, x + 2 * r, y + 2 * r], outline=RED, width=2 * SCALE)
    x = places[current]
    draw.ellipse([x - 1.2 * r, y - 1.2 * r, x + 1.2 * r, y + 1.2 * r], fill=BLUE)
    return as_array(image.resize(canvas, Image.Resampling.LANCZOS))


_FULL_RULES = """You are an expert at a game called number line. The picture shows a current \
number and a target number, both between 0 and 5. In every turn you move the current number by \
one, and you win when it equals the target number. A move that does not bring it closer is punished.
The actions are: "-" (subtract one) and "+" (add one).
Reply with one JSON object and nothing else, in this form:
{"current number": "the current number in the picture", "target number": "the target number in \
the picture", "thoughts": "compare the two numbers and say which move brings the current number \
closer", "action": "- or +"}
"""
