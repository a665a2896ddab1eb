"""Points24: write a formula, token by token, that makes 24 of four cards.

Each rank is uniform on A..K, unfiltered, so only 20,876 of 28,561 hands can be won. A step appends
one token. A number that is not left among the cards: -1, and nothing is appended. '=' ends the
episode: +10 if the formula uses every card and equals the target exactly, else -1. Every other
step: 0. Truncated when more than `max_tokens` attempts were made. Left out: the expert, the answer
format and the arithmetic (formula.py, cards.py).
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import combinations_with_replacement
from math import factorial

from turbo.envs.base import Optimum, Prompt, check_style
from turbo.envs.cards import RANKS, is_held_out, rank_value, read_hand, solvable
from turbo.envs.formula import WIN, FormulaEnv, FormulaGame
from turbo.envs.guess import guess_answer

CARDS = 4
SIGNS = ("+", "-", "*", "/", "(", ")", "=")
SPLITS = ("all", "seen", "unseen")
SHORT_RULES = "Make the target with the four cards. Reply in JSON.\n"


class Points24(FormulaEnv):
    """Options are the constructor's; `reset(options={"hand": ["10", "4", "5", "A"]})` sets a deal.

    `reset(options={"target": 36})` asks for another number in this episode alone, as an exercise.

    hands: sorted tuples of four values; only these are dealt, in their natural proportions.
    split: deal all hands, only those not held out ("seen"), or only the held-out ones ("unseen").
    """

    def __init__(
        self,
        target: int = 24,
        faces_ten: bool = True,
        early_truncation: bool = True,
        draw_formula: bool = True,
        canvas: tuple[int, int] = (448, 224),
        hands: Sequence[tuple[int, ...]] | None = None,
        split: str = "all",
        illegal_penalty: float = -1.0,
        max_tokens: int = 20,
        expert_solutions: int = 4,
        render_mode: str | None = None,
        fresh_pictures: bool = False,
    ):
        numbers = range(1, 11 if faces_ten else 14)
        super().__init__(
            actions=(*map(str, numbers), *SIGNS),
            most_attempts=max_tokens + 1,  # an attempt more than EZPoints has
            early_truncation=early_truncation,
            draw_formula=draw_formula,
            canvas=canvas,
            illegal_penalty=illegal_penalty,
            expert_solutions=expert_solutions,
            render_mode=render_mode,
            fresh_pictures=fresh_pictures,
        )
        self.target, self.faces_ten = target, faces_ten
        self.dealt = allowed_hands(hands, split, faces_ten)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        fixed = options and "hand" in options
        ranks = read_hand(options["hand"], CARDS) if fixed else self._deal()
        values = tuple(rank_value(rank, self.faces_ten) for rank in ranks)
        target = (options or {}).get("target", self.target)
        game = FormulaGame(ranks, values, target, "+-*/()", self.expert_solutions)
        return self._begin(game, solvable(values, target))

    def _deal(self) -> tuple[str, ...]:
        while True:
            block = self.np_random.integers(
                len(RANKS), size=(1 if self.dealt is None else 64, CARDS)
            )
            for row in block:
                ranks = tuple(RANKS[i] for i in row)
                values = sorted(rank_value(rank, self.faces_ten) for rank in ranks)
                if self.dealt is None or tuple(values) in self.dealt:
                    return ranks

    def prompt(self, style: str = "full") -> Prompt:
        check_style(style)
        game = self.game
        if style == "short":
            return Prompt(SHORT_RULES, f'target: {game.target}, formula: "{game.formula}"')
        rules = _full_rules(self.faces_ten, self.actions)
        return Prompt(rules, f'The target is {game.target}. The formula so far: "{game.formula}"')

    def guess_answer(self, written: str, previous: str | None) -> str:
        return guess_answer(written, previous, self.game, self.faces_ten)

    def optimum(self) -> Optimum:
        rate = _solvable_share(self.target, self.faces_ten, self.dealt)
        source = f"exact solver over all dealt hands: {rate} can make {self.target}"
        return Optimum(float(rate), WIN * float(rate), source)


def allowed_hands(hands: Sequence | None, split: str, faces_ten: bool) -> frozenset | None:
    """The multisets that may be dealt; None means all of them."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: use one of {', '.join(SPLITS)}")
    if hands is None and split == "all":
        return None
    every = combinations_with_replacement(range(1, 11 if faces_ten else 14), CARDS)
    possible = frozenset(every)
    chosen = possible if hands is None else frozenset(tuple(sorted(hand)) for hand in hands)
    if not chosen <= possible:
        wrong = sorted(chosen - possible)[0]
        raise ValueError(f"hand {wrong} cannot be dealt: give four values of the deck")
    if split != "all":
        chosen = frozenset(hand for hand in chosen if is_held_out(hand) == (split == "unseen"))
    if not chosen:
        raise ValueError(f"no hand is left in split {split!r}: give more hands or split='all'")
    return chosen


@lru_cache(maxsize=16)
def _solvable_share(target: int, faces_ten: bool, dealt: frozenset | None) -> Fraction:
    """The probability that a dealt hand can be won."""
    every = combinations_with_replacement(range(1, 11 if faces_ten else 14), CARDS)
    weights = {hand: _ordered_draws(hand, faces_ten) for hand in dealt or every}
    won = sum(weight for hand, weight in weights.items() if solvable(hand, target))
    return Fraction(won, sum(weights.values()))


def _ordered_draws(hand: tuple[int, ...], faces_ten: bool) -> int:
    """How many of the 13^4 ordered rank draws give this multiset of values."""
    draws = factorial(CARDS)
    for value in set(hand):
        draws //= factorial(hand.count(value))
    return draws * (4 ** hand.count(10) if faces_ten else 1)


@lru_cache(maxsize=128)
def _full_rules(faces_ten: bool, actions: Sequence[str]) -> str:
    faces = "J, Q and K count 10" if faces_ten else "J counts 11, Q 12 and K 13"
    listed = ", ".join(f'"{action}"' for action in actions)
    return f"""You are an expert at the card game 24 points. The picture shows four playing cards. \
A counts 1, {faces}, and every other card counts its number. Write a formula that uses each of the \
four cards exactly once and whose value is exactly the target. You write it one token at a time: \
in every turn you choose one number or sign, and it is put at the end of the formula so far.
The actions are: {listed}.
A number may be chosen only while a card of that value is still unused. When the formula is \
complete, choose "=": you win if it uses all four cards and equals the target, and lose otherwise.
Reply with one JSON object and nothing else, in this form:
{{"cards": [the ranks of the four cards from left to right, as strings], "formula": "the formula \
so far", "thoughts": "work out step by step which complete formula makes the target, starting with \
the formula so far, and which token comes next", "action": "the one token you choose"}}
"""
