"""The rules and the expert of NumberLine."""

from itertools import permutations

import numpy as np
import pytest

from turbo.envs.numberline import NumberLine


def deal(current: int, target: int, **options) -> NumberLine:
    env = NumberLine(canvas=(112, 56), **options)
    env.reset(options={"hand": [current, target]})
    return env


@pytest.mark.parametrize(
    "hand,moves,rewards,terminated,truncated",
    [
        ((2, 4), "++", [0, 1], True, False),
        ((2, 1), "-", [1], True, False),
        ((0, 2), "-++", [-1, 0, 1], True, False),
        ((5, 4), "++-", [-1, -1, 1], True, False),
        ((2, 5), "-+-+-+-+-+", [-1, 0] * 5, False, True),
        ((4, 5), "-+-+-+-+-+"[:2], [-1, 0], False, False),
    ],
)
def test_worked_episodes(hand, moves, rewards, terminated, truncated):
    env = deal(*hand)
    steps = [env.step(env.actions.index(move)) for move in moves]
    assert [step[1] for step in steps] == rewards
    assert steps[-1][2:4] == (terminated, truncated)
    assert steps[-1][4]["success"] is terminated


def test_the_expert_is_right_everywhere():
    rng = np.random.default_rng(0)
    for hand in permutations(range(6), 2):
        env, terminated = deal(*hand), False
        while not terminated:
            text = env.expert_answer(rng)
            answer = env.read_answer(text)
            verdict = env.judge(answer)
            assert verdict.perception and verdict.aim and verdict.follows
            assert env.guess_answer("", None) == text
            _, reward, terminated, _, _ = env.step(env.actions.index(answer.action))
        assert reward == 1


def test_the_answer_and_a_wrong_thought():
    env = deal(2, 4)
    text = env.expert_answer(np.random.default_rng(0))
    assert text == (
        '{"current number": "2", "target number": "4", "thoughts": "4 is more than 2, so +", '
        '"action": "+"}'
    )
    wrong = text.replace('"2"', '"3"').replace("so +", "so -")
    verdict = env.judge(env.read_answer(wrong))
    assert (verdict.perception, verdict.aim, verdict.follows) == (False, False, False)
    assert env.guess_answer('{"current number": "3', None).startswith('{"current number": "3", ')
    assert env.guess_answer(wrong[:-5], None).startswith(wrong[:-5])


def test_illegal_answers_and_deals():
    env = deal(2, 4)
    picture = env.render()
    observation, reward, terminated, truncated, _ = env.step_illegal()
    assert observation is picture and (reward, terminated, truncated) == (-1.0, False, False)
    assert env.current == 2 and env.attempts == 1 and env.deal_key() == (2, 4)
    assert deal(2, 4, early_truncation=True).step_illegal()[2]
    with pytest.raises(ValueError, match=r"\[3, 3\]"):
        deal(3, 3)
