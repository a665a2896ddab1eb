"""turbo/measure.py: the interval is Wilson's, and every figure is what its name says."""

import math
import re

import numpy as np
import pytest
import tiny_models
from hypothesis import given
from hypothesis import strategies as st

from turbo.envs.base import Answer, Verdict
from turbo.log import METRICS
from turbo.measure import (
    all_episodes,
    certainty,
    distinct,
    evaluate,
    interval,
    interval_of_deals,
    mean,
    mean_interval,
    outcomes,
    paired_interval,
    rate,
    self_bleu,
    student,
    thought,
    thoughts,
)
from turbo.parallel import Crew
from turbo.rollout import Episode, Rollout, Step


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe 1998, table I, method 3; and two that are quickly worked out by hand
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (5, 10, 0.2366, 0.7634),
        (10, 10, 0.7225, 1.0),
    ],
)
def test_wilson_intervals_from_the_literature(successes, n, low, high):
    assert interval(successes, n) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_intervals_hold_the_share_and_mirror(pair):
    k, n = pair
    low, high = interval(k, n)
    assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1
    mirrored = interval(n - k, n)
    assert mirrored == (pytest.approx(1 - high, abs=1e-9), pytest.approx(1 - low, abs=1e-9))
    # its ends solve |p - k/n| = z sqrt(p (1 - p) / n)
    for p in (low, high):
        if 0 < p < 1:
            assert abs(p - k / n) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / n), abs=1e-6)


def test_nothing_counted():
    assert interval(0, 0) == (0.0, 1.0)
    assert math.isnan(mean([])) and math.isnan(distinct([]))


def step(
    action="+",
    verdict=(True, True, True),
    thoughts="4 is more",
    logprobs=(-1.0, -2.0, -0.5),
    reward=0.0,
):
    fields = {} if action is None else {"thoughts": thoughts, "action": action}
    return Step(
        picture=0,
        suffix=[1],
        tokens=[1, 2, 3],
        logprobs=list(logprobs),
        thought=2,
        hidden=object(),
        reward=reward,
        format_reward=5.0,
        answer=Answer("raw", action, fields, None if action else "unreadable"),
        verdict=Verdict(*verdict),
        terminated=False,
        truncated=False,
    )


def episode(steps, success=False, solvable=True):
    return Episode(0, (1, 2), steps, success, solvable)


def test_outcomes_by_hand():
    episodes = [
        episode([step(reward=-1.0), step(reward=1.0)], success=True),
        episode([step(action=None, verdict=(False, False, False), reward=-1.0)]),
        episode([step(verdict=(True, False, True), thoughts="other")], solvable=False),
    ]
    got = outcomes(episodes)
    assert set(got) < set(METRICS)
    assert got["episodes"] == 3 and got["episode_length"] == pytest.approx(4 / 3)
    assert got["success_rate"] == pytest.approx(1 / 3) and got["success_solvable"] == 0.5
    assert got["episode_return"] == pytest.approx(-1 / 3)  # without the format's rewards
    assert got["legal_rate"] == 0.75 and got["card_rate"] == 0.75
    assert got["reasoning_score"] == pytest.approx(2 / 3)  # the hand that cannot be won is left out
    assert got["thought_length"] == 2
    assert got["distinct_thoughts"] == 0.75  # "4 is more" twice, "raw", "other"


def test_rates_where_nothing_is_said():
    assert math.isnan(rate([step(verdict=(None, True, True))], "perception"))
    steps = [step(verdict=(True, True, True)), step(verdict=(None, None, None))]
    assert rate(steps, "perception") == 1.0  # who does not say is not counted
    illegal = step(action=None, verdict=(None, False, False))
    assert rate([*steps, illegal], "perception") == 0.5  # but illegal answers are wrong


def test_thoughts_by_part():
    told = [
        episode([step(verdict=(True, True, False))]),
        episode([step(verdict=(True, False, True))]),
        episode([step(verdict=(False, False, False))], solvable=False),
    ]
    got = thoughts(told)
    assert got["aim_rate"] == 0.5 and got["follow_rate"] == 0.5  # of what can be won
    assert got["card_rate"] == pytest.approx(2 / 3)
    assert got["reasoning_score"] == 0.0


def plain_bleu(texts):
    """Self-BLEU written down plainly."""
    words = [re.findall(r"\w+|[^\w\s]", t) for t in texts]
    scores = []
    for i, own in enumerate(words):
        others = [w for j, w in enumerate(words) if j != i]
        score = 0.0
        for n in range(1, 5):
            grams = [tuple(own[k : k + n]) for k in range(len(own) - n + 1)]
            hits = 0
            for gram in set(grams):
                counts = [
                    sum(tuple(o[k : k + n]) == gram for k in range(len(o) - n + 1)) for o in others
                ]
                hits += min(grams.count(gram), max(counts))
            score += math.log(max(hits, 0.1) / max(1, len(grams))) / 4
        near = min((abs(len(o) - len(own)), len(o)) for o in others)[1]
        score += min(0.0, 1 - near / max(1, len(own)))
        scores.append(math.exp(score))
    return sum(scores) / len(scores)


@given(st.lists(st.text("ab1+ ,", max_size=12), min_size=2, max_size=6))
def test_self_bleu_is_what_its_definition_says(texts):
    assert self_bleu(texts) == pytest.approx(plain_bleu(texts))


def test_self_bleu_sees_collapse():
    varied = [f"{i} is more than {i * 7 % 11}, so {'+-'[i % 2]} it" for i in range(200)]
    same = ["3 is more than 1, so +"] * 200
    assert self_bleu(same) == pytest.approx(1.0)
    assert self_bleu(varied) < 0.9
    assert math.isnan(self_bleu(["one"])) and math.isnan(self_bleu([]))


def test_certainty_splits_thought_and_action():
    steps = [step(logprobs=(-1.0, -2.0, -0.5)), step(logprobs=(-3.0, -4.0, -1.5))]
    assert certainty(steps) == {"thought_entropy": 2.5, "action_entropy": 1.0}


def test_a_thought_is_its_field_or_the_raw_answer():
    assert thought(step(thoughts="so +")) == "so +" and thought(step(action=None)) == "raw"
    assert distinct(["a", "b", "a", "a"]) == 0.5


def test_shared_episodes_carry_no_tensors():
    rollout = Rollout([episode([step()])], None, None, "")
    (got,) = all_episodes(rollout.episodes, Crew())
    assert got.steps[0].hidden is None and got.steps[0].suffix == []
    assert got.steps[0].tokens == [1, 2, 3] and got.deal == (1, 2)
    assert rollout.episodes[0].steps[0].hidden is not None  # the original is as it was


def figures(vlm, **changes):
    options = dict(episodes=12, seed=0, temperature=0.7, max_new_tokens=48, crew=Crew())
    return evaluate(vlm, vlm.weights(), tiny_models.new_env, **{**options, **changes})


def test_evaluate_plays_every_deal_once_and_repeats(fitted):
    first = figures(fitted)
    assert first["episodes"] == 12 and 0 < first["legal_rate"] <= 1
    wins = round(12 * first["success_rate"])
    assert (first["success_low"], first["success_high"]) == interval(wins, 12)
    assert {"thought_entropy", "action_entropy"} < set(first)
    assert figures(fitted) == first
    assert figures(fitted, seed=1) != first
    assert figures(fitted, episodes=1)["episodes"] == 1


def test_the_interval_of_deals_that_are_played_more_than_once():
    # One sample each, or samples that tell as much as new deals would: Wilson's.
    assert interval_of_deals([1, 0, 1, 1], 1) == interval(3, 4)
    assert interval_of_deals([2, 2, 2], 4) == interval(6, 12)
    # All samples of a deal alike: no more than the deals themselves, but for n / (n - 1).
    got = interval_of_deals([32] * 250 + [0] * 250, 32)
    assert got == pytest.approx(interval(250, 500), abs=1e-4)
    assert interval_of_deals([0, 0, 0], 8) == interval(0, 3)
    assert interval_of_deals([8, 8], 8) == interval(2, 2)
    assert interval_of_deals([3], 8) == pytest.approx(interval(0.375, 1))
    # In between: it holds the rate of all deals as often as it says.
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        rates = rng.beta(0.5, 0.5, 100)  # of a mean of a half
        low, high = interval_of_deals(rng.binomial(8, rates).tolist(), 8)
        held += low <= 0.5 <= high
    assert 0.92 < held / 400 < 0.98


def test_the_interval_of_paired_deals():
    # Agresti and Min (2005): 0.5 added to each of the four cells
    first, second = [1] * 53 + [0] * 16 + [1] * 8 + [0] * 9, [1] * 53 + [1] * 16 + [0] * 8 + [0] * 9
    d, low, high = paired_interval(first, second)
    centre, n = (8 - 16) / 88, 88
    half = 1.959964 * math.sqrt((8.5 + 16.5) - (8 - 16) ** 2 / n) / n
    assert d == pytest.approx(-8 / 86)
    assert (low, high) == (pytest.approx(centre - half), pytest.approx(centre + half))
    assert paired_interval(second, first) == pytest.approx((-d, -high, -low))
    alike = paired_interval([1, 0, 1], [1, 0, 1])
    assert alike[0] == 0 and alike[1] == -alike[2] and 0.1 < alike[2] < 1  # three deals say little
    assert paired_interval([1] * 4, [0] * 4)[2] <= 1.0
    rng, held, narrower = np.random.default_rng(0), 0, 0
    for _ in range(1000):  # two policies that win the same deals, mostly
        ease = rng.beta(0.3, 0.3, 100)
        one, two = (rng.binomial(4, p) / 4 for p in (ease, np.minimum(1, ease + 0.1 * (1 - ease))))
        _, low, high = paired_interval(two.tolist(), one.tolist())
        held += low <= 0.05 <= high
        apart = math.sqrt(one.var() / 100 + two.var() / 100)
        narrower += high - low < 2 * 1.96 * apart
    assert 0.93 < held / 1000 < 0.98 and narrower == 1000


@pytest.mark.parametrize(
    ("freedom", "t"), [(1, 12.706), (9, 2.262), (10, 2.228), (19, 2.093), (29, 2.045), (120, 1.980)]
)
def test_students_t_from_the_tables(freedom, t):
    assert student(freedom) == pytest.approx(t, abs=2e-3)
    values = [0.0, 1.0] * ((freedom + 1) // 2) + [0.5] * ((freedom + 1) % 2)
    middle, low, high = mean_interval(values)
    spread = np.std(values, ddof=1) / math.sqrt(len(values))
    assert middle == 0.5 and (high - low) / 2 == pytest.approx(t * spread, rel=1e-3)


def test_samples_of_a_deal_are_counted_by_deal(fitted):
    got = figures(fitted, episodes=5, samples=4, envs=8)
    assert got["episodes"] == 20 and len(got["solved"]) == 5
    assert sum(got["solved"]) == round(20 * got["success_rate"])
    assert got["pass_at_k"] == sum(n > 0 for n in got["solved"]) / 5
    assert got["pass_at_k"] >= got["success_rate"]
    bounds = got["success_low"], got["success_high"]
    assert bounds == interval_of_deals(got["solved"], 4)
    assert max(got["solved"]) > 0 and min(got["solved"]) < 4  # the samples of a deal differ


def test_evaluation_never_sees_a_deal_of_training(fitted):
    seeds = []

    def make_env():
        other = tiny_models.new_env()
        reset = other.reset
        other.reset = lambda **k: (seeds.append(k["seed"]), reset(**k))[1]
        return other

    evaluate(
        fitted,
        fitted.weights(),
        make_env,
        episodes=6,
        seed=3,
        temperature=0.2,
        max_new_tokens=48,
        crew=Crew(),
    )
    deals = {s for s in seeds if s}  # 0: an environment asked for its rules
    assert len(deals) == 6 and min(deals) >= 2**31
