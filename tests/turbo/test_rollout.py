"""turbo/rollout.py: whole episodes in groups that share their deal, one record per step."""

import copy
from collections import Counter

import pytest
import tiny_models
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import suffix_text

from turbo.decode import Decoder
from turbo.parallel import Crew
from turbo.rollout import Abandoned, RolloutOptions, Table, mix


class Seen:
    """A copy of a model that counts the pictures its vision tower is shown."""

    def __init__(self, vlm):
        self.vlm, self.pictures = copy.copy(vlm), []
        self.vlm.see = lambda pictures: (self.pictures.extend(pictures), vlm.see(pictures))[1]


def collect(vlm, make_env, *, seed=(0,), steps=1, deals=None, crew=None, **options):
    o = RolloutOptions(**{**dict(envs=8, group=4, temperature=0.7, max_new_tokens=48), **options})
    return Table(vlm, make_env, o, crew or Crew()).collect(vlm.weights(), seed, steps, deals)


@pytest.mark.parametrize("steps", [1, 70])
def test_whole_groups_of_whole_episodes(fitted, steps):
    rollout = tiny_models.play(fitted, steps=steps, envs=8, group=4)
    assert len(rollout.steps) >= steps
    sizes = Counter(e.group for e in rollout.episodes)
    assert set(sizes.values()) == {4} and sorted(sizes) == list(range(len(sizes)))
    assert len(sizes) >= 2
    for group in sizes:
        assert len({e.deal for e in rollout.episodes if e.group == group}) == 1
    assert len({e.deal for e in rollout.episodes}) > 1
    for episode in rollout.episodes:
        ends = [s.terminated or s.truncated for s in episode.steps]
        assert ends == [False] * (len(ends) - 1) + [True]
        assert not (episode.steps[-1].terminated and episode.steps[-1].truncated)
        assert (episode.final is not None) == episode.steps[-1].truncated
        assert episode.success == (episode.steps[-1].reward == 1.0)
        assert episode.episode_return == sum(s.reward for s in episode.steps)


def test_records_of_steps(fitted):
    rollout = tiny_models.play(
        fitted, steps=60, temperature=1.0, format_valid=3.0, format_invalid=-2.0
    )
    legal, illegal = tiny_models.legal_and_illegal(rollout)
    assert legal and illegal
    assert rollout.features.shape[1:] == (8, fitted.text.dim)
    for step in rollout.steps:
        assert 0 <= step.picture < len(rollout.features)
        assert 0 < len(step.tokens) == len(step.logprobs) <= 48
        assert all(p <= 0 for p in step.logprobs)
        assert step.hidden.shape == (fitted.text.dim,) and step.hidden.dtype == torch.float32
        assert step.thought == fitted.thought_tokens(step.tokens)
        assert step.suffix == fitted.encode(suffix_text("- or +?"))
        assert step.answer.text == fitted.decode(step.tokens)
        assert (step.answer.action is None) == (step.answer.error is not None)
    for step in legal:
        assert step.tokens[-1] == fitted.end and 0 < step.thought < len(step.tokens)
        assert step.answer.action in "+-" and step.format_reward == 3.0
    for step in illegal:
        assert step.format_reward == -2.0 and step.reward == -1.0


def test_every_step_has_the_picture_that_was_shown(fitted):
    rollout = tiny_models.play(fitted, steps=60)
    shown = tiny_models.shown_pictures(rollout)
    features, grid = fitted.see(shown)
    mine = rollout.features[[s.picture for s in rollout.steps]]
    torch.testing.assert_close(mine, features, rtol=1e-4, atol=1e-5)
    assert torch.equal(rollout.grid, grid)
    assert any(
        a.picture != b.picture
        for e in rollout.episodes
        for a, b in zip(e.steps, e.steps[1:], strict=False)
    )


def test_a_seed_repeats_a_rollout_and_another_does_not(fitted):
    def record(seed):
        rollout = tiny_models.play(fitted, seed=seed, steps=20)
        return [
            (e.deal, [(s.tokens, s.logprobs, s.reward) for s in e.steps]) for e in rollout.episodes
        ]

    first = record((3, 1))
    assert record((3, 1)) == first
    assert record((3, 2)) != first and record((4, 1)) != first


def test_environments_may_be_used_again(fitted):
    """The same table plays the same rollout twice: nothing is left over from the first."""
    o = RolloutOptions(envs=8, group=4, temperature=0.7, max_new_tokens=48)
    table = Table(fitted, tiny_models.new_env, o, Crew())
    one, two = (table.collect(fitted.weights(), (1,), 20) for _ in range(2))
    assert [s.tokens for s in one.steps] == [s.tokens for s in two.steps]


def test_a_picture_that_does_not_change_is_seen_once(vlm):
    seen = Seen(tiny_models.speechless(vlm))
    rollout = collect(seen.vlm, lambda: tiny_models.scripted("ezpoints"), steps=40)
    assert len(rollout.steps) >= 40
    different = {p.tobytes() for p in seen.pictures}
    deals = len({e.group for e in rollout.episodes})
    assert len(seen.pictures) == len(different) == len(rollout.features)
    # Deals are looked at some ahead, and each at most once, whatever the number of its steps.
    assert len(seen.pictures) <= deals + 8 < len(rollout.steps)
    for episode in rollout.episodes:
        assert len({s.picture for s in episode.steps}) == 1


def test_a_picture_that_changes_is_seen_anew(vlm):
    seen = Seen(tiny_models.speechless(vlm))
    make_env = lambda: tiny_models.scripted("points24", draw_formula=True)  # noqa: E731
    deals = [{"seed": 1, "options": {"hand": ["A", "2", "3", "4"]}}]
    rollout = collect(seen.vlm, make_env, deals=deals, group=1)
    (episode,) = rollout.episodes
    assert episode.success and len(episode.steps) >= 8
    pictures = [s.picture for s in episode.steps]
    assert len(set(pictures)) == len(pictures)  # the formula is drawn, and grows with every step
    assert len({f.numpy().tobytes() for f in rollout.features}) == len(rollout.features)
    assert len(seen.pictures) == len(rollout.features)
    # The hidden states are those of the changed picture, not of the first.
    hidden = torch.stack([s.hidden for s in episode.steps])
    weights = vlm.weights()
    prefix = vlm.prefix(weights, rollout.features[pictures], rollout.fixed, rollout.grid)
    for i, step in enumerate(episode.steps):
        out = vlm.suffix(weights, torch.tensor([step.suffix]), prefix.select(torch.tensor([i])))
        want = vlm.text.final_norm(weights, out[0, -1:])[0]
        torch.testing.assert_close(hidden[i], want, rtol=0, atol=1e-4)


def test_fresh_arrays_with_the_same_picture_are_seen_once(vlm):
    seen = Seen(tiny_models.speechless(vlm))
    deals = [{"seed": i} for i in range(3)]
    make_env = lambda: tiny_models.scripted("ezpoints", fresh_pictures=True)  # noqa: E731
    rollout = collect(seen.vlm, make_env, deals=deals, group=2, envs=2)
    assert len(rollout.episodes) == 6 and len(rollout.steps) == 6 * 4
    assert len(seen.pictures) == len(rollout.features) == 3


def test_a_truncated_end_keeps_its_final_observation(vlm):
    """Steps away from the target and back: the final picture is that behind the last action."""
    away = lambda env: "+" if env.attempts % 2 == 0 else "-"  # noqa: E731
    deals = [{"options": {"hand": [2, 0]}}, {"options": {"hand": [1, 5]}}]
    quiet = tiny_models.speechless(vlm)
    rollout = collect(
        quiet,
        lambda: tiny_models.scripted("numberline", away),
        deals=deals,
        group=1,
        max_new_tokens=4,
    )
    env = tiny_models.new_env("numberline")
    for episode, deal in zip(rollout.episodes, deals, strict=True):
        assert [s.truncated for s in episode.steps] == [False] * 9 + [True]
        picture, suffix = episode.final
        assert suffix == vlm.encode(suffix_text("- or +?"))
        env.reset(**deal)  # ten steps lead back to the start
        want, _ = vlm.see([env.render()])
        torch.testing.assert_close(rollout.features[picture], want[0], rtol=1e-4, atol=1e-5)
        assert picture != episode.steps[-1].picture
    arrived = collect(quiet, lambda: tiny_models.scripted("numberline"), deals=deals, group=1)
    assert all(e.success and e.final is None and e.steps[-1].terminated for e in arrived.episodes)
    assert [len(e.steps) for e in arrived.episodes] == [2, 4]


def test_a_legal_answer_without_its_end_is_too_long_and_is_not_played(vlm):
    talking = tiny_models.with_banned(vlm, [vlm.encode("x")[0]])  # never ends
    deals = [{"options": {"hand": [2, 0]}}]
    rollout = collect(
        talking,
        lambda: tiny_models.scripted("numberline"),
        deals=deals,
        group=1,
        max_new_tokens=3,
        format_invalid=-2.0,
    )
    (episode,) = rollout.episodes
    assert len(episode.steps) == 10 and not episode.success
    for step in episode.steps:
        assert len(step.tokens) == 3
        assert step.answer.error == "too long" and step.answer.action is None
        assert step.reward == -1.0 and step.format_reward == -2.0
        assert step.picture == episode.steps[0].picture  # nothing was executed


def test_an_illegal_answer_is_not_played(vlm):
    deals = [{"options": {"hand": [2, 0]}}]
    for choose, played in (
        (lambda env: "-", True),
        (lambda env: "- ", True),
        (lambda env: "-1", False),
    ):
        env_maker = lambda choose=choose: tiny_models.scripted("numberline", choose)  # noqa: E731
        (episode,) = collect(tiny_models.speechless(vlm), env_maker, deals=deals, group=1).episodes
        assert episode.success == played
        assert (episode.steps[0].answer.action == "-") == played


def test_deals_are_played_once_each(fitted):
    deals = [{"options": {"hand": [a, b]}} for a in range(6) for b in range(6) if a != b]
    rollout = tiny_models.play(fitted, deals=deals, group=1, envs=7)
    assert Counter(e.deal for e in rollout.episodes) == Counter(
        tuple(d["options"]["hand"]) for d in deals
    )
    few = tiny_models.play(fitted, deals=deals[:2], group=1, envs=7)
    assert sorted(e.deal for e in few.episodes) == [(0, 1), (0, 2)]
    assert tiny_models.play(fitted, deals=[], group=1, envs=7).episodes == []


class Alone(Crew):
    """A worker of two whose other one is not there."""

    def share(self, item):
        return [item]


def test_workers_share_the_deals_and_play_different_ones(fitted):
    deals = [{"seed": i} for i in range(5)]
    options = dict(envs=8, group=2, deals=deals)
    one, two = (collect(fitted, tiny_models.new_env, crew=Alone(r, 2), **options) for r in range(2))
    both = Counter(e.deal for r in (one, two) for e in r.episodes)
    env = tiny_models.new_env()
    want = Counter()
    for deal in deals:
        env.reset(**deal)
        want[env.deal_key()] += 2
    assert both == want
    one, two = (collect(fitted, tiny_models.new_env, crew=Alone(r, 2), steps=40) for r in range(2))
    assert len(one.steps) >= 20 and [s.tokens for s in one.steps] != [s.tokens for s in two.steps]
    assert len({e.group for e in one.episodes}) >= 1


def test_a_rollout_is_abandoned_when_somebody_asks(fitted):
    crew = Crew()
    o = RolloutOptions(envs=8, group=4, temperature=0.7, max_new_tokens=48)
    table = Table(fitted, tiny_models.new_env, o, crew)
    whole = table.collect(fitted.weights(), (0,), 40)
    own, passes = Decoder.advance, []

    def advance(self):
        passes.append(1)
        if len(passes) == 3:
            crew.ask_to_stop()
        return own(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "advance", advance)
        with pytest.raises(Abandoned):
            table.collect(fitted.weights(), (0,), 40)
        assert len(passes) == 3  # at once
        rollout = table.collect(fitted.weights(), (0,), 40, patient=True)  # goes on to its end
        assert len(rollout.steps) == len(whole.steps) and len(passes) > 4
    crew._asked.value = 0  # as in the next process: the same rollout from its beginning
    again = table.collect(fitted.weights(), (0,), 40)
    assert [s.tokens for s in again.steps] == [s.tokens for s in whole.steps]


def test_all_workers_abandon_a_rollout_or_none(fitted):
    class OtherAsked(Alone):
        def share(self, item):
            return [item, True]  # this worker was done when the other one saw the request

    with pytest.raises(Abandoned):
        collect(fitted, tiny_models.new_env, crew=OtherAsked(0, 2), steps=10)


def test_too_few_environments_are_refused(vlm):
    with pytest.raises(
        ValueError, match="7 environments are too few for 2 workers with groups of 4"
    ):
        collect(vlm, tiny_models.new_env, envs=7, crew=Crew(0, 2))


def test_environments_are_decoded_together(fitted):
    """Far fewer forward passes than answers, let alone tokens."""
    rollout = tiny_models.play(fitted, envs=16, steps=100, temperature=0.3)
    tokens = sum(len(s.tokens) for s in rollout.steps)
    assert rollout.passes < tokens / 10


@given(st.lists(st.integers(-(2**40), 2**63), min_size=1, max_size=4))
def test_mixed_seeds(numbers):
    seed = mix(*numbers)
    assert 0 <= seed < 2**63 and seed == mix(*numbers)
    assert seed != mix(*numbers, 0) and seed != mix(numbers[0] + 1, *numbers[1:])


def test_mixed_seeds_of_neighbours_differ():
    seeds = {
        mix(s, u, r, k) for s in range(8) for u in range(40) for r in range(4) for k in (0, 1, 7)
    }
    assert len(seeds) == 8 * 40 * 4 * 3
    assert mix(0, 1) != mix(1, 0)
