"""Guesses of what comes next in an answer: right where they can be, harmless where they cannot."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbo.envs.cards import join
from turbo.envs.ezpoints import EZPoints
from turbo.envs.formula import answer_text, next_token, thought_text
from turbo.envs.points24 import Points24

HAND = ["10", "4", "5", "A"]
START = '{"cards": ["10", "4", "5", "A"], "formula": "", "thoughts": "'
CANONICAL = (
    START + '1 4 5 10: 10-4=6, 1 5 6: 5-1=4, 4 6: 6*4=24, so (10-4)*(5-1), next (", "action": "("}'
)


def deal(hand=HAND, **options) -> Points24:
    env = Points24(canvas=(112, 56), draw_formula=False, **options)
    env.reset(seed=0, options={"hand": hand})
    return env


def play(env: Points24, text: str) -> None:
    for token in text.split():
        env.step(env.actions.index(token))


def passes(env, text: str, previous: str | None = None) -> int:
    """How many times a model asks for a guess until it has written `text`."""
    tokens = re.findall("[0-9]|[a-zA-Z]+|.", text)
    asked, done = 0, 0
    while done < len(tokens):
        written = "".join(tokens[:done])
        guess = env.guess_answer(written, previous)
        assert guess.startswith(written)
        guessed = re.findall("[0-9]|[a-zA-Z]+|.", guess)
        while done < min(len(tokens), len(guessed)) and guessed[done] == tokens[done]:
            done += 1
        asked, done = asked + 1, done + 1
    return asked


@pytest.mark.parametrize("kind,most", [(Points24, 1.6), (EZPoints, 1.4)])
def test_what_an_expert_writes_takes_few_passes(kind, most):
    env, rng = kind(canvas=(112, 56), draw_formula=False), np.random.default_rng(0)
    first, again = [], []
    for seed in range(60):
        env.reset(seed=seed)
        previous, ended = None, not env.solvable
        while not ended:
            text = env.expert_answer(rng)
            first.append(passes(env, text))
            if previous is not None:
                plan = env.guess_answer("", previous)
                assert env.judge(env.read_answer(plan)).right
                assert all(env.guess_answer(plan[:n], previous) == plan for n in range(len(plan)))
                again.append(passes(env, text, previous))
            previous = text
            ended = env.step(env.actions.index(env.read_answer(text).action))[2]
    assert np.mean(first) < most and max(first) <= 5
    assert np.mean(again) < most


def test_any_operations_take_a_few_passes_each():
    env, rng = deal(), np.random.default_rng(0)
    for seed in range(60):
        env.reset(seed=seed)
        pool = [(str(value), (str(value),), 3) for value in env.values]
        while len(pool) > 1:
            pool = [pool[i] for i in rng.permutation(len(pool))]
            (a, *left), (b, *right), *others = pool
            sign = "+-*"[rng.integers(3)]
            result = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
            pool = [*others, (str(result), *join(tuple(left), sign, tuple(right)))]
        plan = pool[0][1]
        text = answer_text(env.ranks, "", thought_text(plan, 0), plan[0])
        assert passes(env, text) <= 16


def test_the_first_guess_is_an_experts_whole_answer():
    env = deal()
    assert env.judge(env.read_answer(env.guess_answer("", None))).right
    assert env.guess_answer(CANONICAL[:-60], None) == CANONICAL
    play(env, "10 + 4 + 5 +")  # no plan is left
    start = START.replace('formula": "', 'formula": "10+4+5+')
    assert env.guess_answer("", None) == start + "1 4 5 10: "
    assert deal(["A", "A", "A", "A"]).guess_answer("", None).endswith('"thoughts": "1 1 1 1: ')


LISTED = "1 4 5 10: "
TOLD = "1 4 5 10: 10*4=40, 1 5 40: 1+5=6, 6 40: 40-6=34, so 10*4-(1+5)"


@pytest.mark.parametrize(
    "begun,goes_on",
    [
        (LISTED + "10*", ""),  # no plan begins so, and three numbers could follow
        (LISTED + "10*4", "=40, 1 5 40: "),
        (LISTED + "10*4=4", "0, 1 5 40: "),
        (LISTED + "10*4=41", ", 1 5 41: "),  # wrong, but written
        (LISTED + "10*4=40, 1 5 40: 1-5", "=-4, -4 40: "),
        (LISTED + "10*4=40, 1 5 40: 1/5", "=1/5, 1/5 40: "),
        (LISTED + "10*4=40, 1 5 40: 1/5=1/5, 1/5 40: 40", ""),
        (LISTED + "10*4=40, 1 5 40: 1/5=1/5, 1/5 40: 40/", "1/5=200, so 10*4/(1/5), next 10!"),
        (LISTED + "10*4=40, 1 5 40: 40/5=8, 1 8: 8-", "1=7, so 10*4/5-1, next 10!"),
        (LISTED + "4*5=20, 1 10 20: 10-1=9, 9 20", ": "),
        (LISTED + "10+4=19, 1 5 19: 19*1=19, ", "5 19: 5+19=24, so 5+(10+4)*1, next 5!"),
        (LISTED + "10-3", "=7, "),  # no such number: what is left is not known
        (LISTED + "10-3=7, 1 4 7: 7*4", "=28, 1 28: "),
        (LISTED + "10-3=7, 1 4 7: 7*4=28, 1 28: 28-1=27", ", so "),
        ("1 4 6 10: 4*6", "=24, 1 10 24: "),  # another list
        ("0 4: 4-", "0=4, so "),
        (TOLD[:-7], TOLD[-7:] + ", next 10!"),
        (TOLD + ",", " next 10!"),
        (TOLD + "+", ""),  # not what the operations make
        (TOLD + "+1,", " next 10!"),
        (TOLD + ", next 7", "!"),
        ("so 10-4", ""),
        ("so 10-4, ", "next 10!"),
        ("hm", ""),
    ],
)
def test_a_thought_goes_on_as_far_as_it_is_determined(begun, goes_on):
    if goes_on.endswith("!"):
        action = (begun + goes_on[:-1]).rsplit(" ", 1)[1]
        goes_on = f'{goes_on[:-1]}", "action": "{action}"}}'
    guess = deal().guess_answer(START + begun, None)
    assert guess == START + begun + goes_on


def test_equal_numbers_compose_what_continues_the_formula_begun():
    env = deal(["2", "2", "4", "3"])
    play(env, "4")
    start = env.guess_answer("", None).split('"thoughts": "')[0] + '"thoughts": "'
    begun = start + "2 2 3 4: 2+2=4, 3 4 4: 4*4=16, 3 16: 16+3=19"
    assert env.guess_answer(begun, None).startswith(begun + ", so 4*(2+2)+3, next *")


def test_a_guess_goes_on_after_cards_read_otherwise():
    env = deal()
    guess = env.guess_answer('{"cards": ["10", "7', None)
    answer = env.read_answer(guess)
    assert answer.fields["cards"] == ["10", "7", "5", "A"]
    assert answer.fields["thoughts"].startswith("1 5 7 10: ")
    start = START.replace('"A"', '"6"')
    begun = start + "4 5 6 10: 10-6=4, 4 4 5: 4+5=9, 4 9: 9*4=36"
    guess = env.guess_answer(begun, None)
    assert guess == begun + ', so (10-6+5)*4, next (", "action": "("}'
    told = begun + ", so (10-6+5)*4,"
    whole = told + ' next (", "action": "("}'
    assert env.guess_answer(told, None) == env.guess_answer(whole[:-4], None) == whole
    acts = whole[: whole.index('"action"')] + '"action": "7'
    assert env.guess_answer(acts, None) == acts + '"}'
    unknown = START.replace('"A"', '"X"')
    assert env.guess_answer(unknown, None) == unknown


def test_the_previous_plan_moves_on():
    env = deal()
    play(env, "(")
    moved = env.guess_answer("", CANONICAL)
    assert moved == CANONICAL.replace("next (", "next 10").replace(
        '"action": "("', '"action": "10"'
    ).replace('"formula": ""', '"formula": "("')
    play(env, "5")  # not as planned
    other = env.read_answer(env.guess_answer("", CANONICAL))
    assert env.judge(other).right and next_token("(5-1)", 2) == other.action


_SHARED = deal()
_PIECES = ["1 4 5 10: ", "10", *"01456-*/=( ", ": ", ", ", "so ", "next "]


@given(
    st.text(max_size=80) | st.lists(st.sampled_from(_PIECES), max_size=30).map("".join),
    st.none() | st.text(max_size=80),
    st.integers(0, 150),
)
def test_a_guess_starts_with_what_is_written_and_never_raises(noise, previous, cut):
    for written in (noise, START + noise, CANONICAL[:cut], CANONICAL[:cut] + noise):
        for before in (previous, CANONICAL, CANONICAL[:cut], CANONICAL[:cut] + noise):
            assert _SHARED.guess_answer(written, before).startswith(written)
