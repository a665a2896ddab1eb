"""turbo/score.py: the KL to the teacher of the sampled tokens, against transformers' own pass."""

import copy
import dataclasses

import pytest
import tiny_models
import torch

from turbo.lora import new_lora
from turbo.score import final_hidden, guided_tokens, local_pictures, rescore, teacher_kl

TEMPERATURE = 0.7
ESTIMATORS = ("full", "forward", "clip", "abs", "k1", "k3")


@pytest.fixture(scope="module")
def played(fitted):
    """A rollout, the factors of policy and teacher, exact log p and log q [T, V] of some steps."""
    policy = tiny_models.noisy_lora(fitted, 1, 0.02)
    teacher = tiny_models.noisy_lora(fitted, 2, 0.1)
    rollout = tiny_models.play(fitted, policy, temperature=TEMPERATURE)
    shown = tiny_models.shown_pictures(rollout)
    exact = {}
    with torch.no_grad():
        both = [tiny_models.merged_parameters(fitted, lora) for lora in (policy, teacher)]
        for i in range(0, len(shown), max(1, len(shown) // 12)):
            s = rollout.steps[i]
            place = (shown[i], rollout.fixed, s.suffix, s.tokens, TEMPERATURE)
            exact[i] = [tiny_models.own_answer(fitted, p, *place)[0] for p in both]
    return rollout, policy, teacher, exact


def by_hand(step, log_p, log_q, kind, token_range):
    """The mean estimate over the guided tokens of one step, as defined."""
    count = step.thought if token_range == "thought" else len(step.tokens)
    log_p, log_q = log_p[:count].double(), log_q[:count].double()
    if kind == "full":
        tokens = (log_p.exp() * (log_p - log_q)).sum(-1)
    elif kind == "forward":
        tokens = (log_q.exp() * (log_q - log_p)).sum(-1)
    else:
        place = torch.tensor(step.tokens[:count])[:, None]
        d = (log_p.gather(1, place) - log_q.gather(1, place))[:, 0]
        tokens = {"k1": d, "abs": d.abs(), "clip": d.clamp(min=0), "k3": (-d).exp() - 1 + d}[kind]
    return tokens.mean().item()


@pytest.mark.parametrize("kind", ESTIMATORS)
@pytest.mark.parametrize("token_range", ["thought", "all"])
def test_kl_is_that_of_transformers_passes(fitted, played, kind, token_range):
    rollout, policy, teacher, exact = played
    with torch.no_grad():
        weights = [fitted.weights(lora) for lora in (policy, teacher)]
    options = dict(estimator=kind, token_range=token_range, temperature=TEMPERATURE)
    got = teacher_kl(fitted, *weights, rollout, **options)
    assert got.shape == (len(rollout.steps),)
    wanted = {i: by_hand(rollout.steps[i], *pair, kind, token_range) for i, pair in exact.items()}
    for i, want in wanted.items():
        assert got[i].item() == pytest.approx(want, abs=1e-4)
    assert max(abs(v) for v in wanted.values()) > 0.01  # there is something to be measured


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_a_policy_is_at_no_distance_from_itself(fitted, played, kind):
    rollout, policy, teacher, _ = played
    with torch.no_grad():
        own, other = fitted.weights(policy), fitted.weights(teacher)
    options = dict(estimator=kind, token_range="thought", temperature=TEMPERATURE)
    assert teacher_kl(fitted, own, own, rollout, **options).abs().max() < 1e-4
    assert teacher_kl(fitted, own, other, rollout, **options).abs().max() > 1e-2


def test_the_picture_and_the_temperature_matter(fitted, played):
    rollout, policy, teacher, _ = played
    with torch.no_grad():
        weights = [fitted.weights(lora) for lora in (policy, teacher)]
    options = dict(estimator="k1", token_range="thought")
    right = teacher_kl(fitted, *weights, rollout, temperature=TEMPERATURE, **options)
    blind = dataclasses.replace(rollout, features=torch.zeros_like(rollout.features))
    for other, temperature in ((blind, TEMPERATURE), (rollout, 1.0)):
        kl = teacher_kl(fitted, *weights, other, temperature=temperature, **options)
        assert (kl - right).abs().max() > 1e-3


def test_rescoring_finds_what_was_sampled(fitted, played):
    rollout, policy = played[:2]
    again = copy.copy(rollout)
    again.episodes = [
        dataclasses.replace(e, steps=[dataclasses.replace(s, logprobs=[]) for s in e.steps])
        for e in rollout.episodes
    ]
    with torch.no_grad():
        rescore(fitted, fitted.weights(policy), again, TEMPERATURE)
    for old, new in zip(rollout.steps, again.steps, strict=True):
        assert new.logprobs == pytest.approx(old.logprobs, abs=1e-4) and len(new.logprobs) > 0


def test_guided_tokens(fitted, played):
    steps = played[0].steps[:5]
    marks = guided_tokens(steps, "thought")
    want = [i < s.thought for s in steps for i in range(len(s.tokens))]
    assert marks.tolist() == want and not all(want)
    assert guided_tokens(steps, "all").tolist() == [True] * len(want)


def test_local_pictures(played):
    step = played[0].steps[0]
    steps = [dataclasses.replace(step, picture=n) for n in (7, 2, 7, 5)]
    pictures, owner = local_pictures(steps)
    assert pictures == [2, 5, 7] and owner == [2, 0, 2, 1]


@torch.no_grad()
def test_the_value_of_a_truncated_end_is_asked_of_its_final_observation(fitted, played):
    rollout, policy = played[:2]
    weights = fitted.weights(policy)
    got = final_hidden(fitted, weights, rollout)
    assert set(got) == {i for i, e in enumerate(rollout.episodes) if e.steps[-1].truncated}
    assert len(got) > 0
    parameters, env = tiny_models.merged_parameters(fitted, policy), tiny_models.new_env()
    for i in list(got)[:4]:
        env.reset(options={"hand": rollout.episodes[i].deal})
        for step in rollout.episodes[i].steps:
            legal = step.answer.action is not None
            env.step(env.actions.index(step.answer.action)) if legal else env.step_illegal()
        place = (env.render(), rollout.fixed, rollout.episodes[i].final[1], [0], TEMPERATURE)
        want = tiny_models.own_answer(fitted, parameters, *place)[1]
        torch.testing.assert_close(got[i], want, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_rollout_without_truncated_ends_needs_no_pass(fitted, played):
    rollout = played[0]
    ended = [e for e in rollout.episodes if e.final is None]
    assert (
        final_hidden(fitted, fitted.weights(), dataclasses.replace(rollout, episodes=ended)) == {}
    )


def test_fresh_factors_are_the_base(fitted, played):
    """With B = 0 the policy is the base, so the KL between them is 0."""
    lora = new_lora(fitted.matrices, 4, 8.0, 0)
    with torch.no_grad():
        base, policy = fitted.weights(), fitted.weights(lora)
    options = dict(estimator="full", token_range="all", temperature=1.0)
    assert teacher_kl(fitted, policy, base, played[0], **options).abs().max() < 1e-6
