"""Blackjack: gymnasium's Blackjack-v1 with natural=False and sab=False, seen as cards.

An infinite deck; the dealer shows one card and draws to 17, soft 17 included. 'hit' draws a card
and loses at once above 21; 'stand' ends the game: +1, 0 or -1. The best play is computed exactly:

    V(hand, up) = max( E[compare(hand, dealer) | up],  E_card[ V(hand + card, up) ] )

Left out: bets, splits, doubling, bonuses for a natural.
"""

import re
from copy import copy
from fractions import Fraction
from functools import lru_cache
from typing import ClassVar, NamedTuple

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
    read_json_answer,
    word_after,
)
from turbo.envs.cards import RANKS, SUITS, rank_value, read_hand
from turbo.envs.picture import FELT, as_array, bold_text, card_face

ACTIONS = ("stand", "hit")
KEYS = ("thoughts", "action")
MAX_ATTEMPTS = 22  # no legal game is longer; this ends a run of illegal answers
CHANCES = tuple((value, Fraction(4 if value == 10 else 1, 13)) for value in range(1, 11))
DEALER_FELT = (20, 75, 45)

_HOLD = re.compile(r"\b(?:hold|have)\s+(?:an?\s+)?(soft\s+)?([0-9]{1,2})\b", re.IGNORECASE)
_SHOWS = re.compile(
    r"\bdealer\s+(?:shows|has)\s+(?:an?\s+)?([0-9]{1,2}|ace|jack|queen|king|[AJQK])\b",
    re.IGNORECASE,
)


class Hand(NamedTuple):
    """The cards one side holds; an ace counts 11 (`soft`) where that does not exceed 21."""

    hard: int  # every ace counted 1
    ace: bool

    @property
    def soft(self) -> bool:
        return self.ace and self.hard <= 11

    @property
    def total(self) -> int:
        return self.hard + 10 if self.soft else self.hard

    def plus(self, value: int) -> "Hand":
        return Hand(self.hard + value, self.ace or value == 1)


class Play(NamedTuple):
    """An action with its chance to win and its expected reward."""

    action: str
    win: Fraction
    value: Fraction


EMPTY = Hand(0, False)


@lru_cache(maxsize=1_024)
def dealer_totals(hand: Hand) -> dict[int, Fraction]:
    """The chance of each total the dealer ends with; 0 stands for more than 21."""
    if hand.total >= 17:
        return {hand.total if hand.total <= 21 else 0: Fraction(1)}
    chances: dict[int, Fraction] = {}
    for value, chance in CHANCES:
        for total, rest in dealer_totals(hand.plus(value)).items():
            chances[total] = chances.get(total, Fraction(0)) + chance * rest
    return chances


@lru_cache(maxsize=4_096)
def best_play(hand: Hand, up: int) -> Play:
    """The action of the highest return, its chance to win and its return, under best play."""
    totals = dealer_totals(EMPTY.plus(up))
    win = sum(chance for total, chance in totals.items() if total < hand.total)
    lose = sum(chance for total, chance in totals.items() if total > hand.total)
    stand = Play("stand", Fraction(win), Fraction(win - lose))
    hit_win, hit_value = Fraction(0), Fraction(0)
    for value, chance in CHANCES:
        after = hand.plus(value)
        then = best_play(after, up) if after.hard <= 21 else Play("", Fraction(0), Fraction(-1))
        hit_win += chance * then.win
        hit_value += chance * then.value
    return stand if stand.value >= hit_value else Play("hit", hit_win, hit_value)


@lru_cache(maxsize=1)
def best_overall() -> Play:
    """The chance to win and the return of best play, before the cards are dealt."""
    win, value = Fraction(0), Fraction(0)
    for first, p in CHANCES:
        for second, q in CHANCES:
            for up, r in CHANCES:
                play = best_play(EMPTY.plus(first).plus(second), up)
                win += p * q * r * play.win
                value += p * q * r * play.value
    return Play("", win, value)


class Blackjack(gym.Env):
    """`reset(options={"hand": [player, player, dealer]})` sets the cards that are seen."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(
        self,
        early_truncation: bool = True,
        canvas: tuple[int, int] = (448, 224),
        illegal_penalty: float = -1.0,
        render_mode: str | None = None,
        fresh_pictures: bool = False,
    ):
        self.fresh_pictures = fresh_pictures
        self.early_truncation, self.canvas = early_truncation, tuple(canvas)
        self.illegal_penalty, self.render_mode = float(illegal_penalty), render_mode
        self.actions = ACTIONS
        self.action_space = gym.spaces.Discrete(len(ACTIONS))
        shape = (self.canvas[1], self.canvas[0], 3)
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        if options and "hand" in options:
            ranks = read_hand(options["hand"], 3)
        else:
            ranks = tuple(self._draw_rank() for _ in range(3))
        self.player = [(rank, self._draw_suit()) for rank in ranks[:2]]
        self.dealer = (ranks[2], self._draw_suit())
        self.hand = EMPTY.plus(rank_value(ranks[0])).plus(rank_value(ranks[1]))
        self.up = rank_value(ranks[2])
        self._key = (*sorted(rank_value(rank) for rank in ranks[:2]), self.up)
        self.attempts = 0
        self._picture = draw_table(self.player, self.dealer, self.canvas)
        return self._observe(), self._info(False)

    def _draw_rank(self) -> str:
        return RANKS[int(self.np_random.integers(len(RANKS)))]

    def _draw_suit(self) -> str:
        return SUITS[int(self.np_random.integers(len(SUITS)))]

    def step(self, action: int) -> tuple:
        self.attempts += 1
        if ACTIONS[action] == "hit":
            rank = self._draw_rank()
            self.player.append((rank, self._draw_suit()))
            self.hand = self.hand.plus(rank_value(rank))
            self._picture = draw_table(self.player, self.dealer, self.canvas)
            bust = self.hand.hard > 21
            return self._observe(), -1.0 if bust else 0.0, bust, False, self._info(False)
        dealer = EMPTY.plus(self.up)
        while dealer.total < 17:
            dealer = dealer.plus(rank_value(self._draw_rank()))
        theirs = dealer.total if dealer.total <= 21 else 0
        reward = float(self.hand.total > theirs) - float(self.hand.total < theirs)
        return self._observe(), reward, True, False, self._info(reward > 0)

    def step_illegal(self) -> tuple:
        self.attempts += 1
        ended = self.early_truncation
        truncated = not ended and self.attempts >= MAX_ATTEMPTS
        return self._observe(), self.illegal_penalty, ended, truncated, self._info(False)

    def _info(self, success: bool) -> dict:
        hand = (*(rank for rank, _ in self.player), self.dealer[0])
        return {"success": success, "solvable": True, "hand": hand}

    def _observe(self) -> np.ndarray:
        return self._picture.copy() if self.fresh_pictures else self._picture

    def render(self) -> np.ndarray:
        return self._picture

    def prompt(self, style: str = "full") -> Prompt:
        check_style(style)
        if style == "short":
            return Prompt("Play Blackjack. Reply in JSON.\n", "stand or hit?")
        return Prompt(_FULL_RULES, "Do you stand or hit now?")

    def read_answer(self, text: str) -> Answer:
        return read_json_answer(text, KEYS, ACTIONS)

    def _thought(self) -> tuple[str, str]:
        action = best_play(self.hand, self.up).action if self.hand.hard <= 21 else "stand"
        soft = "soft " if self.hand.soft else ""
        shown = "A" if self.up == 1 else str(self.up)
        return f"I hold {soft}{self.hand.total}, dealer shows {shown}, so {action}", action

    def expert_answer(self, rng: np.random.Generator) -> str | None:
        thoughts, action = self._thought()
        return f'{{"thoughts": "{thoughts}", "action": "{action}"}}'

    def guess_answer(self, written: str, previous: str | None) -> str:
        def guess_thought(values: list[str], rest: str) -> str | None:
            thought = self._thought()[0]
            return thought if thought.startswith(rest) else None

        def guess_action(values: list[str], rest: str) -> str | None:
            named = word_after(values[-1], "so ")
            return named if named and named.startswith(rest) else rest or None

        return continue_answer(
            written, [('{"thoughts": "', guess_thought), ('", "action": "', guess_action)]
        )

    def judge(self, answer: Answer) -> Verdict:
        """The total and the dealer's card as named; the action named last is the best one."""
        thoughts = answer.fields.get("thoughts")
        if answer.action is None or not isinstance(thoughts, str):
            return Verdict(False, False, False)
        held, shown = _HOLD.search(thoughts), _SHOWS.search(thoughts)
        perception = None
        if held and shown:
            mine = (bool(held.group(1)), int(held.group(2))) == (self.hand.soft, self.hand.total)
            perception = mine and _shown_value(shown.group(1)) == self.up
        named = word_after(thoughts, "so ")
        if named not in ACTIONS:
            return Verdict(perception, None, None)
        return Verdict(perception, named == self._thought()[1], named == answer.action)

    def picture_labels(self) -> list[str]:
        """The dealer's card and the player's first six."""
        ranks = [rank for rank, _ in self.player]
        return [self.dealer[0], *[*ranks, *"------"][:6]]

    def snapshot(self) -> "Blackjack":
        twin = copy(self)
        twin.player = list(self.player)
        return twin

    def optimum(self) -> Optimum:
        best = best_overall()
        source = "exact dynamic programme over the infinite deck; wins under the best return"
        return Optimum(float(best.win), float(best.value), source)

    def deal_key(self) -> tuple:
        return self._key


def _shown_value(text: str) -> int:
    if text.isdigit():
        return 1 if int(text) == 11 else int(text)
    return rank_value(text[0].upper())  # ace, jack, queen, king by their first letter


def draw_table(player: list, dealer: tuple[str, str], canvas: tuple[int, int]) -> np.ndarray:
    """The dealer's card on dark felt at the left, the player's on the rest, in two rows from 4."""
    width, height = canvas
    title = height // 8 if width >= 200 else 0
    cell, free = width / 4, height - title
    card_h = int(min(0.78 * free, cell * 42 / 28))
    card_w = int(card_h * 26 / 42)
    image = Image.new("RGB", canvas, FELT)
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, 0, int(cell) - 1, height], fill=DEALER_FELT)
    if title:
        bold_text(draw, (cell / 2, 0.7 * title), "Dealer", int(0.8 * title), (255, 255, 255))
        bold_text(draw, (2.5 * cell, 0.7 * title), "You", int(0.8 * title), (255, 255, 255))
    face = card_face(*dealer, card_w, card_h)
    image.paste(face, (round((cell - card_w) / 2), title + (free - card_h) // 2))
    rows = 1 if len(player) <= 3 else 2
    columns = max(3, -(-len(player) // rows)) if rows == 1 else max(4, -(-len(player) // 2))
    step = 3 * cell / columns
    if rows == 2:
        card_h = int(min(0.47 * free, 0.75 * cell * 42 / 28))
        card_w = int(card_h * 26 / 42)
    for i, card in enumerate(player):
        row, column = divmod(i, columns)
        x = cell + column * step + max(0.0, (step - card_w) / 2)
        y = title + (row + 0.5) * free / rows - card_h / 2
        image.paste(card_face(*card, card_w, card_h), (round(x), round(y)))
    return as_array(image)


_FULL_RULES = """You are an expert at Blackjack. The picture shows the dealer's open card at the \
left and your cards at the right. Number cards count their number, J, Q and K count 10, and an A \
counts 11 as long as that does not take your total above 21, otherwise 1. "hit" gives you one more \
card, and you lose at once if your total is above 21. "stand" ends your turn: the dealer draws \
until reaching at least 17, and the higher total that is not above 21 wins.
The actions are: "stand", "hit".
Reply with one JSON object and nothing else, in this form:
{"thoughts": "say your total and the dealer's card, and reason about which action is better", \
"action": "stand or hit"}
"""
