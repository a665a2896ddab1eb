"""EZPoints: two cards make 12, by + or *.

The first rank is uniform on 2..K (J, Q, K count 10). If its value divides 12, the partner is the
quotient with probability 1/2; otherwise, and for all other values, it is the difference. Their
order is random. Steps and rewards are those of Points24; truncated after `max_tokens` attempts.
Left out: the expert and the answer format (formula.py).
"""

from turbo.envs.base import Optimum, Prompt, check_style
from turbo.envs.cards import RANKS, rank_value, read_hand
from turbo.envs.formula import WIN, FormulaEnv, FormulaGame, ranked_solutions
from turbo.envs.guess import guess_answer

TARGET = 12
OPERATORS = "+*"
ACTIONS = (*(str(number) for number in range(1, 11)), "+", "*", "=")


class EZPoints(FormulaEnv):
    """`reset(options={"hand": ["10", "2"]})` sets a deal."""

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
        super().__init__(
            actions=ACTIONS,
            most_attempts=max_tokens,
            early_truncation=early_truncation,
            draw_formula=draw_formula,
            canvas=canvas,
            illegal_penalty=illegal_penalty,
            expert_solutions=expert_solutions,
            render_mode=render_mode,
            fresh_pictures=fresh_pictures,
        )

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        fixed = options and "hand" in options
        ranks = read_hand(options["hand"], 2) if fixed else self._deal()
        values = tuple(rank_value(rank) for rank in ranks)
        game = FormulaGame(ranks, values, TARGET, OPERATORS, self.expert_solutions)
        found = ranked_solutions(tuple(sorted(values)), TARGET, OPERATORS)
        return self._begin(game, bool(found))

    def _deal(self) -> tuple[str, str]:
        first = RANKS[int(self.np_random.integers(1, len(RANKS)))]
        value = rank_value(first)
        partner = TARGET - value
        if TARGET % value == 0 and self.np_random.random() < 0.5:
            partner = TARGET // value
        choices = [rank for rank in RANKS if rank_value(rank) == partner]
        second = choices[int(self.np_random.integers(len(choices)))]
        return (first, second) if self.np_random.random() < 0.5 else (second, first)

    def prompt(self, style: str = "full") -> Prompt:
        check_style(style)
        if style == "short":
            fixed, label = "Make 12 with the two cards. Reply in JSON.\n", "formula"
        else:
            fixed, label = _FULL_RULES, "The formula so far"
        return Prompt(fixed, f'{label}: "{self.game.formula}"')

    def guess_answer(self, written: str, previous: str | None) -> str:
        return guess_answer(written, previous, self.game)

    def optimum(self) -> Optimum:
        return Optimum(1.0, WIN, "every dealt pair makes 12 by + or *")


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
