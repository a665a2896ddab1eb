"""A maze of your own in 60 lines: `python -m turbo.sft examples.maze:Maze --out DIR` and on."""

import gymnasium as gym
import numpy as np
from PIL import Image, ImageDraw

from turbo.envs import base

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


def _beside(cell: tuple, move: str) -> tuple:
    return cell[0] + MOVES[move][0], cell[1] + MOVES[move][1]


class Maze(gym.Env):
    """Walk from the red dot to the green square; black squares are walls."""

    actions = tuple(MOVES)
    guess_answer, judge, snapshot = base.guess_expert, base.no_verdict, base.copied
    optimum, deal_key = base.unknown_optimum, base.no_deal_key

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        self.steps, self.me, self.far = 0, None, {}  # far: square -> steps to the goal
        while not self.far.get(self.me):  # until there is a way
            cells = [divmod(int(n), 4) for n in self.np_random.permutation(16)][:11]
            self.me, self.goal, self.far = cells[0], cells[1], {cells[1]: 0}
            for n in range(1, 11):
                edge = [c for c in cells if any(_beside(c, m) in self.far for m in MOVES)]
                self.far = dict.fromkeys(edge, n) | self.far
        return self.render(), {"success": False}

    def step(self, action: int) -> tuple:
        before, place = self.me, _beside(self.me, self.actions[action])
        self.me = place if place in self.far else before
        return self.step_illegal(float(self.far[before] - self.far[self.me]))  # steps closer

    def step_illegal(self, reward: float = -1.0) -> tuple:
        self.steps, won = self.steps + 1, self.me == self.goal
        return self.render(), reward, won, self.steps == 12 and not won, {"success": won}

    def render(self) -> np.ndarray:
        draw = ImageDraw.Draw(image := Image.new("RGB", (112, 112)))
        for (y, x), far in self.far.items():
            draw.rectangle([28 * x, 28 * y, 28 * x + 26, 28 * y + 26], "white" if far else "green")
        draw.circle((28 * self.me[1] + 13, 28 * self.me[0] + 13), 8, "red")
        return np.array(image)

    def prompt(self, style: str) -> base.Prompt:
        return base.Prompt("Walk from red to green. Reply in JSON.\n", "Which way?")

    def read_answer(self, text: str) -> base.Answer:
        return base.read_json_answer(text, ("red", "green", "thoughts", "action"), self.actions)

    def expert_answer(self, rng: np.random.Generator) -> str:
        move = min(MOVES, key=lambda m: self.far.get(_beside(self.me, m), 99))
        see = f'"red": "{self.me}", "green": "{self.goal}"'
        why = f"{move} is free, then {self.far[_beside(self.me, move)]} to go"
        return f'{{{see}, "thoughts": "{why}", "action": "{move}"}}'
