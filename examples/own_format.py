"""Other words and another form of answer for a game that is there, by composition.

    <see>2 to 5</see><think>5 is more than 2, so +</think><do>+</do>

    python -m turbo.sft examples.own_format:TaggedNumberLine --out tagged
    python -m turbo.train examples.own_format:TaggedNumberLine --model tagged

The game keeps its pictures, rules and solver; only what is asked and how answers are written and
read is new. Left out: `--guidance gtr`, whose correctors write JSON.
"""

import json
import re
from dataclasses import replace

import numpy as np

from turbo.envs import base
from turbo.envs.numberline import NumberLine

FORM = re.compile(r"<see>([^<]*) to ([^<]*)</see><think>([^<]*)</think><do>([^<]*)</do>")
RULES = """The picture shows a current number and a target number. Move the current number by one.
Reply in this form, with + or - at its end: <see>current to target</see><think>why</think><do>+</do>
"""


class TaggedNumberLine:
    """NumberLine, asked and answered in tags."""

    TINY = {"canvas": (112, 56)}  # noqa: RUF012
    action_key = "<do>"  # all before it is thought
    guess_answer, snapshot = base.guess_expert, base.copied

    def __init__(self, **options):
        self.game = game = NumberLine(**options)
        self.actions, self.reset, self.step = game.actions, game.reset, game.step
        self.step_illegal, self.render, self.judge = game.step_illegal, game.render, game.judge
        self.optimum, self.deal_key = game.optimum, game.deal_key

    def prompt(self, style: str = "full") -> base.Prompt:
        fixed = RULES if style == "full" else "Step to the target. Reply in tags.\n"
        return base.Prompt(fixed, "Your step:")

    def read_answer(self, text: str) -> base.Answer:
        found = FORM.fullmatch(text.strip())
        if not found:
            return base.Answer(text, None, {}, "not <see>...</see><think>...</think><do>...</do>")
        keys = ("current number", "target number", "thoughts", "action")
        fields = dict(zip(keys, found.groups(), strict=True))  # under the names that judge knows
        return replace(self.game.read_answer(json.dumps(fields)), text=text)

    def expert_answer(self, rng: np.random.Generator) -> str:
        f = json.loads(self.game.expert_answer(rng))
        see = f"<see>{f['current number']} to {f['target number']}</see>"
        return f"{see}<think>{f['thoughts']}</think><do>{f['action']}</do>"
