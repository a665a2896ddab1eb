"""Blackjack: the rules against gymnasium's own, and the exact best play."""

import gymnasium.envs.toy_text.blackjack as reference
import numpy as np
import pytest

from turbo.envs.blackjack import EMPTY, Blackjack, best_overall, best_play, dealer_totals

OPTIONS = {"canvas": (112, 56)}


def scripted(cards: list[int]):
    deck = iter(cards)
    return lambda *_: next(deck)


@pytest.mark.parametrize("seed", range(200))
def test_the_same_cards_give_the_rewards_of_gymnasium(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    cards = [int(c) for c in np.minimum(rng.integers(1, 14, 60), 10)]
    hits = int(rng.integers(0, 4))
    dealer, player, later = cards[:2], cards[2:4], cards[4:]

    theirs = reference.BlackjackEnv(natural=False, sab=False)
    monkeypatch.setattr(reference, "draw_card", scripted([*dealer, *player, *later]))
    theirs.reset(seed=0)
    ours = Blackjack(**OPTIONS)
    ours.reset(seed=0, options={"hand": [*player, dealer[0]]})
    drawn = iter(later)
    hidden = [dealer[1]]

    def draw_rank() -> str:
        value = hidden.pop() if standing and hidden else next(drawn)
        return "A" if value == 1 else str(value)

    monkeypatch.setattr(ours, "_draw_rank", draw_rank)
    for turn in range(hits + 1):
        standing = turn == hits
        expected = theirs.step(0 if standing else 1)
        got = ours.step(0 if standing else 1)
        assert got[1:4] == (expected[1], expected[2], False)
        total, up, soft = expected[0]
        assert (ours.hand.total, ours.up, int(ours.hand.soft)) == (total, up, int(soft))
        assert got[4]["success"] == (expected[1] > 0)
        if got[2]:
            break


def test_the_exact_chances():
    for up in range(1, 11):
        totals = dealer_totals(EMPTY.plus(up))
        assert sum(totals.values()) == 1 and set(totals) <= {0, 17, 18, 19, 20, 21}
    assert float(dealer_totals(EMPTY.plus(6))[0]) == pytest.approx(0.4232, abs=2e-3)


def test_the_best_play_is_the_well_known_one():
    def action(total_cards, up):
        hand = EMPTY
        for card in total_cards:
            hand = hand.plus(card)
        return best_play(hand, up).action

    assert action([10, 6], 10) == "hit" and action([10, 6], 6) == "stand"
    assert action([10, 2], 3) == "hit" and action([10, 2], 4) == "stand"
    assert action([10, 7], 1) == "stand" and action([1, 6], 6) == "hit"
    assert action([1, 7], 9) == "hit" and action([1, 7], 8) == "stand"


def test_the_optimum_is_what_the_expert_earns():
    env, rng = Blackjack(**OPTIONS), np.random.default_rng(0)
    env.reset(seed=0)
    env.render_mode = None
    wins, total, games = 0, 0.0, 4_000
    for _ in range(games):
        env.reset()
        ended = False
        while not ended:
            action = best_play(env.hand, env.up).action
            _, reward, ended, _, info = env.step(env.actions.index(action))
        wins, total = wins + info["success"], total + reward
    best = best_overall()
    assert wins / games == pytest.approx(float(best.win), abs=0.03)
    assert total / games == pytest.approx(float(best.value), abs=0.06)
    assert env.expert_answer(rng) is not None  # also after the end
    assert env.optimum().success_rate == pytest.approx(0.42946, abs=1e-5)
    assert env.optimum().episode_return == pytest.approx(-0.04656, abs=1e-5)


def test_the_expert_is_judged_right():
    env, rng = Blackjack(**OPTIONS), np.random.default_rng(0)
    for seed in range(60):
        env.reset(seed=seed)
        ended = False
        while not ended:
            text = env.expert_answer(rng)
            answer = env.read_answer(text)
            verdict = env.judge(answer)
            assert verdict.perception and verdict.aim and verdict.follows
            assert env.guess_answer("", None) == text
            ended = env.step(env.actions.index(answer.action))[2]


@pytest.mark.parametrize(
    "thoughts,action,verdict",
    [
        ("I hold 16, dealer shows 10, so hit", "hit", (True, True, True)),
        ("I have a 16 and the dealer has a king, so hit", "hit", (True, True, True)),
        ("I hold 17, dealer shows 10, so stand", "stand", (False, False, True)),
        ("I hold soft 16, dealer shows 10, so hit", "stand", (False, True, False)),
        ("hard to say", "hit", (None, None, None)),
    ],
)
def test_judge(thoughts, action, verdict):
    env = Blackjack(**OPTIONS)
    env.reset(seed=0, options={"hand": ["10", "6", "K"]})
    answer = env.read_answer(f'{{"thoughts": "{thoughts}", "action": "{action}"}}')
    judged = env.judge(answer)
    assert (judged.perception, judged.aim, judged.follows) == verdict


def test_illegal_answers():
    env = Blackjack(**OPTIONS)
    env.reset(seed=0)
    before = env.hand
    assert env.step_illegal()[1:4] == (-1.0, True, False) and env.hand == before
    env = Blackjack(early_truncation=False, **OPTIONS)
    env.reset(seed=0)
    ends = [env.step_illegal()[3] for _ in range(22)]
    assert ends == [False] * 21 + [True]


def test_the_labels_are_the_cards_on_the_table():
    env = Blackjack()
    env.reset(seed=0, options={"hand": ["2", "A", "K"]})
    assert env.picture_labels() == ["K", "2", "A", "-", "-", "-", "-"]
    env.step(env.actions.index("hit"))
    assert env.picture_labels() == ["K", "2", "A", env.player[2][0], "-", "-", "-"]


def test_the_picture_changes_with_a_hit_alone():
    env = Blackjack(**OPTIONS)
    first, _ = env.reset(seed=1, options={"hand": ["2", "3", "A"]})
    second = env.step(1)[0]
    assert second is not first and (second != first).any()
    assert env.step(0)[0] is second
