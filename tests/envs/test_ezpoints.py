"""The rules, the deal and the expert of EZPoints."""

from collections import Counter

import numpy as np
import pytest

from turbo.envs.cards import rank_value
from turbo.envs.ezpoints import EZPoints


def deal(*hand: str, **options) -> EZPoints:
    env = EZPoints(canvas=(56, 56), draw_formula=False, **options)
    env.reset(seed=0, options={"hand": list(hand)} if hand else None)
    return env


def play(env: EZPoints, text: str) -> list[tuple]:
    return [env.step(env.actions.index(token)) for token in text.split()]


@pytest.mark.parametrize(
    "hand,tokens,rewards,terminated,truncated,success",
    [
        (("10", "2"), "10 + 2 =", [0, 0, 0, 10], True, False, True),
        (("3", "4"), "4 * 3 =", [0, 0, 0, 10], True, False, True),
        (("3", "4"), "4 + 3 =", [0, 0, 0, -1], True, False, False),
        (("K", "2"), "10 + 10", [0, 0, -1], True, False, False),
        (("K", "2"), "10 + + + +", [0] * 5, False, True, False),
    ],
)
def test_worked_episodes(hand, tokens, rewards, terminated, truncated, success):
    steps = play(deal(*hand), tokens)
    assert [step[1] for step in steps] == rewards
    assert steps[-1][2:4] == (terminated, truncated)
    assert steps[-1][4]["success"] is success


def test_the_deal_follows_its_law():
    env, pairs = EZPoints(canvas=(56, 56), draw_formula=False), Counter()
    env.reset(seed=0)
    ordered = 0
    for _ in range(4_000):
        ranks = env._deal()
        a, b = sorted(rank_value(rank) for rank in ranks)
        assert a + b == 12 or a * b == 12
        pairs[a, b] += 1
        ordered += rank_value(ranks[0]) == a
    # value 10 has 4 of the 12 first ranks and one partner; 2 has half of 1 in 12; so on
    expected = {(2, 10): 4 / 12 + 0.5 / 12, (5, 7): 2 / 12, (3, 4): 1 / 12, (2, 6): 1 / 12}
    for pair, chance in expected.items():
        assert pairs[pair] / 4_000 == pytest.approx(chance, abs=0.03)
    assert pairs[6, 6] / 4_000 == pytest.approx(0.5 / 12, abs=0.02)
    assert 0.45 < ordered / 4_000 < 0.58


def test_the_expert_wins_and_is_judged_right():
    env, rng = EZPoints(canvas=(56, 56), draw_formula=False), np.random.default_rng(0)
    for seed in range(60):
        env.reset(seed=seed)
        terminated, previous = False, None
        while not terminated:
            answer = env.read_answer(env.expert_answer(rng))
            assert env.judge(answer).right
            if previous is not None:
                guess = env.guess_answer("", previous)
                assert env.judge(env.read_answer(guess)).right
            previous = answer.text
            _, reward, terminated, _, info = env.step(env.actions.index(answer.action))
        assert reward == 10 and info["success"]


def test_the_canonical_answer():
    env = deal("10", "2")
    play(env, "10")
    assert env.expert_answer(np.random.default_rng(0)) == (
        '{"cards": ["10", "2"], "formula": "10", "thoughts": "2 10: 10+2=12, so 10+2, '
        'next +", "action": "+"}'
    )
    assert env.optimum().success_rate == 1.0


def test_an_illegal_answer_changes_nothing_but_the_count():
    env = deal("10", "2", early_truncation=False)
    play(env, "10")
    assert env.step_illegal()[1:4] == (-1.0, False, False)
    assert env.game.formula == "10" and env.game.attempts == 2
