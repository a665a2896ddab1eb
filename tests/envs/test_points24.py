"""The rules of Points24, its expert, its guesses and its judge."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbo.envs.cards import evaluate, is_held_out, tokenize
from turbo.envs.formula import aim_of
from turbo.envs.points24 import Points24

HAND = ["10", "4", "5", "A"]
FRACTIONS = ["3", "8", "3", "8"]


def deal(hand=HAND, **options) -> Points24:
    env = Points24(**{"canvas": (112, 56), "draw_formula": False, **options})
    env.reset(seed=0, options={"hand": hand})
    return env


def play(env: Points24, text: str) -> list[tuple]:
    return [env.step(env.actions.index(token)) for token in text.split()]


WORKED = [  # hand, tokens, rewards, terminated, truncated, success, formula at the end
    (HAND, "( 10 - 4 ) * ( 5 - 1 ) =", [0] * 11 + [10], True, False, True, "(10-4)*(5-1)"),
    (FRACTIONS, "8 / ( 3 - 8 / 3 ) =", [0] * 9 + [10], True, False, True, "8/(3-8/3)"),
    (HAND, "10 + 4 =", [0, 0, 0, -1], True, False, False, "10+4"),
    (HAND, "=", [-1], True, False, False, ""),
    (HAND, "7", [-1], True, False, False, ""),
    (HAND, "1 + 1", [0, 0, -1], True, False, False, "1+"),
    (["J", "Q", "K", "10"], "10 + 10 + 10 + 10 =", [0] * 7 + [-1], True, False, False, None),
    (HAND, "( " * 20, [0] * 20, False, False, False, "(" * 20),
    (HAND, "( " * 21, [0] * 21, False, True, False, "(" * 21),
    (HAND, "( " * 20 + "=", [0] * 20 + [-1], True, False, False, "(" * 20),
]


@pytest.mark.parametrize("hand,tokens,rewards,terminated,truncated,success,formula", WORKED)
def test_worked_episodes(hand, tokens, rewards, terminated, truncated, success, formula):
    env = deal(hand)
    steps = play(env, tokens)
    assert [step[1] for step in steps] == rewards
    assert steps[-1][2:4] == (terminated, truncated)
    assert steps[-1][4]["success"] is success
    assert not any(step[2] or step[3] for step in steps[:-1])
    assert formula is None or env.game.formula == formula


def test_without_early_truncation_a_refusal_goes_on_and_is_counted():
    env = deal(early_truncation=False)
    steps = play(env, "7 " * 20)
    assert all(step[1:4] == (-1.0, False, False) for step in steps)
    assert env.game.formula == "" and env.game.attempts == 20
    assert play(env, "7")[0][2:4] == (False, True)


def test_an_illegal_answer_changes_nothing_but_the_count():
    for early in (True, False):
        env = deal(early_truncation=early, illegal_penalty=-2.5)
        play(env, "( 10")
        before, left = env.game.formula, list(env.game.left)
        observation, reward, terminated, truncated, info = env.step_illegal()
        assert (reward, terminated, truncated, info["success"]) == (-2.5, early, False, False)
        assert env.game.formula == before and env.game.left == left and env.game.attempts == 3
        assert observation is env.render()


def test_faces_can_count_eleven_to_thirteen():
    env = deal(["K", "J", "A", "A"], faces_ten=False)
    assert env.values == (13, 11, 1, 1) and "13" in env.actions
    assert play(env, "( 13 + 11 ) * 1 * 1 =")[-1][1] == 10


def test_the_picture_is_the_same_object_until_it_changes():
    env = deal()
    first = env.render()
    assert all(step[0] is first for step in play(env, "( 10 -"))
    env = deal(draw_formula=True, canvas=(448, 224))
    first = env.render().copy()
    drawn = play(env, "(")[0][0]
    assert drawn.shape == (224, 448, 3) and (drawn != first).any()
    env.game.left.clear()
    assert play(env, "5")[0][0] is drawn  # refused: nothing is appended


def test_two_seeded_copies_are_the_same():
    one, two = Points24(), Points24()
    for seed in range(5):
        a, b = one.reset(seed=seed), two.reset(seed=seed)
        assert np.array_equal(a[0], b[0]) and a[1] == b[1]
        for action in (3, 11, 14, 0):
            a, b = one.step(action), two.step(action)
            assert np.array_equal(a[0], b[0]) and a[1:] == b[1:]


def test_hands_and_splits_restrict_the_deal():
    env = Points24(canvas=(112, 56), draw_formula=False, hands=[(1, 4, 5, 10), (1, 4, 6, 10)])
    keys = {env.reset(seed=seed)[1] and env.deal_key() for seed in range(20)}
    assert keys == {(1, 4, 5, 10), (1, 4, 6, 10)}
    assert env.optimum().success_rate == 1.0
    for split in ("seen", "unseen"):
        env = Points24(canvas=(112, 56), draw_formula=False, split=split)
        for seed in range(20):
            env.reset(seed=seed)
            assert is_held_out(env.deal_key()) == (split == "unseen")
    with pytest.raises(ValueError, match="'trian'"):
        Points24(split="trian")
    with pytest.raises(ValueError, match="cannot be dealt"):
        Points24(hands=[(1, 2, 3, 11)])


def test_the_optimum_is_exact():
    optimum = Points24().optimum()
    assert optimum.success_rate == 20_876 / 28_561
    assert optimum.episode_return == pytest.approx(10 * 20_876 / 28_561)


def test_the_canonical_answer():
    env, rng = deal(expert_solutions=100), np.random.default_rng(0)
    play(env, "( 10 -")
    answers = {env.expert_answer(rng) for _ in range(200)}
    assert (
        '{"cards": ["10", "4", "5", "A"], "formula": "(10-", "thoughts": "1 4 5 10: 10-4=6, '
        '1 5 6: 5-1=4, 4 6: 6*4=24, so (10-4)*(5-1), next 4", "action": "4"}'
    ) in answers


def test_the_expert_wins_every_solvable_hand_and_is_judged_right():
    env, rng = Points24(canvas=(112, 56), draw_formula=False), np.random.default_rng(1)
    for seed in range(60):
        _, info = env.reset(seed=seed)
        terminated = False
        while not terminated:
            text = env.expert_answer(rng)
            assert (text is not None) == info["solvable"]
            if text is None:
                break
            answer = env.read_answer(text)
            assert answer.error is None
            verdict = env.judge(answer)
            assert verdict.right and verdict.perception and verdict.aim and verdict.follows
            _, reward, terminated, truncated, step_info = env.step(env.actions.index(answer.action))
            assert not truncated
        assert text is None or (reward == 10 and step_info["success"])


def test_the_expert_is_plain_where_it_can_be():
    rng = np.random.default_rng(0)
    env = deal(expert_solutions=1000)
    for _ in range(200):
        thoughts = env.read_answer(env.expert_answer(rng)).fields["thoughts"]
        steps = thoughts.split(", so")[0]
        results = [step.split("=")[1] for step in steps.split(", ")]
        assert all(result.isdigit() for result in results)
    assert "8/1/3=24" in deal(FRACTIONS).expert_answer(rng)
    env = deal()
    play(env, "10 + 4 + 5 +")
    assert env.expert_answer(rng) is None


@pytest.mark.parametrize(
    "cards,aim,action,verdict",
    [
        (HAND, "(10-4)*(5-1)", "4", (True, True, True)),
        (["10", "4", "5", "1"], "(10-4)*(5-1)", "4", (False, True, True)),
        (HAND, "(10-4)*(5+1)", "4", (True, False, True)),
        (HAND, "(10-4)*(5-1)", "5", (True, True, False)),
        (HAND, "4*(10-5+1)", "4", (True, False, False)),
        (HAND, "(10-5+1)*4", "5", (True, True, True)),
    ],
)
def test_judge(cards, aim, action, verdict):
    env = deal()
    play(env, "( 10 -")
    text = env.expert_answer(np.random.default_rng(0))
    answer = env.read_answer(text)
    answer.fields.update(cards=cards, thoughts=f"10-4=6, so {aim}, next {action}")
    answer = type(answer)(text, action, answer.fields, None)
    judged = env.judge(answer)
    assert (judged.perception, judged.aim, judged.follows) == verdict
    assert judged.right == all(verdict)


@pytest.mark.parametrize(
    "thoughts,aim",
    [
        ("1 4 5 10: 10-4=6, 1 5 6: 5-1=4, 4 6: 6*4=24, so (10-4)*(5-1), next 4", "(10-4)*(5-1)"),
        ("1 4 5 10: 10-4=6, 1 5 6", "10-4"),
        ("1 4 5 10: ", None),
        ("so 4 6", None),
        ("We have 10 - 4 = 6. The formula (10 - 4) × (5 − 1) = 24 works.", "(10-4)*(5-1)"),
        ("so 24 is reached by (10-4)*(5-1).", "(10-4)*(5-1)"),
        ("no idea, so 4", None),
        ("", None),
    ],
)
def test_aim_of(thoughts, aim):
    assert aim_of(thoughts) == aim


@given(st.text(max_size=200) | st.text("so 10-+*/() ,next=24", max_size=60))
def test_aim_of_never_raises(text):
    aim = aim_of(text)
    assert aim is None or "".join(tokenize(aim)) == aim


def test_actions_are_exact_not_substrings():
    env = deal()
    form = '{"cards": [], "formula": "", "thoughts": "", "action": %s}'
    assert env.read_answer(form % '"1"').action == "1"
    assert env.read_answer(form % '"10"').action == "10"
    assert env.read_answer(form % '" 10 "').action == "10"
    assert env.read_answer(form % "10").action == "10"
    for wrong in ('"11"', '"1 0"', '"choose 10"', "true", "null", "1.0", '["1"]', '""', "-0"):
        assert env.read_answer(form % wrong).action is None


def test_another_target_for_one_episode():
    env, rng = deal(), np.random.default_rng(0)
    env.reset(seed=0, options={"hand": HAND, "target": 36})
    assert env.prompt("short").state == 'target: 36, formula: ""'
    full = env.prompt("full")
    assert full.state == 'The target is 36. The formula so far: ""'
    reward = 0.0
    while reward == 0.0:
        answer = env.read_answer(env.expert_answer(rng))
        assert env.judge(answer).right
        _, reward, _, _, info = env.step(env.actions.index(answer.action))
    assert reward == 10.0 and info["success"] and evaluate(env.game.tokens) == 36
    env.reset(seed=0)
    assert env.prompt("short").state == 'target: 24, formula: ""'
    # One answer's rules stand before all others of a warm start: no target in them.
    assert env.prompt("full").fixed == full.fixed
    assert env.prompt("full").state == 'The target is 24. The formula so far: ""'


def test_prompts_keep_their_fixed_part():
    env = deal()
    fixed = {style: env.prompt(style).fixed for style in ("short", "full")}
    play(env, "( 10 -")
    assert env.prompt("short").text == (
        'Make the target with the four cards. Reply in JSON.\ntarget: 24, formula: "(10-"'
    )
    assert {style: env.prompt(style).fixed for style in fixed} == fixed
    assert env.prompt("full").state.endswith('"(10-"')
    with pytest.raises(ValueError, match="'long'"):
        env.prompt("long")
