"""turbo/update.py: advantages as defined, gradients of the loss as it is written down."""

import dataclasses
import math

import pytest
import tiny_models
import torch

import turbo.score
import turbo.update
from turbo.gae import gae, state_advantages
from turbo.guidance import Examples, told
from turbo.model import ValueHead
from turbo.parallel import Crew
from turbo.rollout import Episode, Rollout, Step
from turbo.score import read_answers
from turbo.update import (
    FIGURES,
    Imitated,
    Learner,
    StepData,
    moments,
    old_logprobs,
    prepare,
    step_values,
)

ESTIMATORS = ("full", "forward", "clip", "abs", "k1", "k3")


@pytest.fixture(scope="module")
def played(fitted):
    """A rollout with the factors that played it, and the picture before each step."""
    lora = tiny_models.noisy_lora(fitted, 1, 0.02)
    rollout = tiny_models.play(fitted, lora, steps=40, format_valid=0.5, format_invalid=-0.25)
    return rollout, lora, tiny_models.shown_pictures(rollout)


@pytest.fixture
def pieces(fitted, monkeypatch):
    """The head's loss is taken of one or two answers at a time; which ones, in a list."""
    seen, whole = [], turbo.score.policy_head_loss

    def in_pieces(hidden, weight, targets, loss, **options):
        def noted(out, some):
            seen.append(some)
            return loss(out, some)

        few = 60 * fitted.text.vocabulary
        return whole(hidden, weight, targets, noted, piece_elements=few, **options)

    monkeypatch.setattr(turbo.score, "policy_head_loss", in_pieces)
    return seen


def trained_head(vlm, seed=0):
    """A critic that is not zero."""
    torch.manual_seed(seed)
    head = ValueHead(vlm.text.dim)
    torch.nn.init.normal_(head.net[-1].weight, std=0.3)
    return head


def data_of(rollout, config, seed=0):
    """Random advantages and returns."""
    generator = torch.Generator().manual_seed(seed)
    n = len(rollout.steps)
    noise = torch.randn(2, n, generator=generator)
    old = old_logprobs(rollout.steps, config.thought_coef)
    return StepData(noise[0], noise[1], old, list(range(n)), 1.0, 0.0)


def plain_loss(vlm, lora, head, rollout, shown, data, rows, config, teacher, beta):
    """The loss of a minibatch by transformers' own pass, one step after the other.

    The old log-probabilities are set to the new ones plus noise, so that some ratios are clipped.
    """
    noise = torch.Generator().manual_seed(1)
    policy = tiny_models.merged_parameters(vlm, lora)
    with torch.no_grad():
        other = None if teacher is None else tiny_models.merged_parameters(vlm, teacher)
    total = 0.0
    for i in rows:
        step = rollout.steps[i]
        place = (shown[i], rollout.fixed, step.suffix, step.tokens, config.temperature)
        log_p, hidden = tiny_models.own_answer(vlm, policy, *place)
        chosen = log_p.gather(1, torch.tensor(step.tokens)[:, None])[:, 0]
        weighted = config.thought_coef * chosen[: step.thought].sum() + chosen[step.thought :].sum()
        data.old_logprob[i] = weighted.detach() + 0.3 * torch.randn((), generator=noise)
        ratio = (weighted - data.old_logprob[i]).exp()
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        loss = -torch.minimum(ratio * data.advantages[i], clipped * data.advantages[i])
        if teacher is not None:
            with torch.no_grad():
                log_q, _ = tiny_models.own_answer(vlm, other, *place)
            theirs = log_q.gather(1, torch.tensor(step.tokens)[:, None])[:, 0]
            d = chosen - theirs
            tokens = {
                "full": (log_p.exp() * (log_p - log_q)).sum(-1),
                "forward": (log_q.exp() * (log_q - log_p)).sum(-1),
                "clip": d.clamp(min=0),
                "abs": d.abs(),
                "k1": d,
                "k3": (-d).exp() - 1 + d,
            }[config.kl_estimator]
            count = step.thought if config.guidance_range == "thought" else len(tokens)
            loss = loss + beta * tokens[:count].mean()
        if head is not None:
            loss = loss + config.value_coef * 0.5 * (head(hidden[None])[0] - data.returns[i]) ** 2
        total = total + loss
    return total / len(rows)


BETA = 4.0
CASES = [
    dict(guidance="none"),
    dict(guidance="none", thought_coef=0.2, temperature=1.3),
    dict(guidance="none", advantage="gae"),
    *(dict(kl_estimator=kind) for kind in ESTIMATORS),
    dict(kl_estimator="full", guidance_range="all", advantage="gae", value_coef=0.3),
]


@pytest.mark.parametrize("changes", CASES, ids=lambda c: "-".join(map(str, c.values())))
def test_gradients_are_those_of_the_loss_written_down_plainly(fitted, played, pieces, changes):
    rollout, _, shown = played
    config = tiny_models.new_config(clip=0.2, **changes)
    lora = tiny_models.noisy_lora(fitted, 2, 0.05)  # not the one that played: ratios differ from 1
    head = trained_head(fitted) if config.advantage == "gae" else None
    teacher = tiny_models.noisy_lora(fitted, 3, 0.1) if config.guidance == "kl" else None
    data = data_of(rollout, config)
    rows = list(range(0, len(rollout.steps), max(1, len(rollout.steps) // 9)))
    loss = plain_loss(fitted, lora, head, rollout, shown, data, rows, config, teacher, BETA)
    parameters = lora.parameters() + ([] if head is None else list(head.parameters()))
    wanted = torch.autograd.grad(loss, parameters)

    with torch.no_grad():
        weights = None if teacher is None else fitted.weights(teacher)
    reading = None if teacher is None else read_answers(fitted, weights, rollout, rows)
    learner = Learner(fitted, lora, head, Crew(), config)
    assert [id(p) for p in learner.parameters()] == [id(p) for p in parameters]
    sums = learner.gradients(rollout, data, rows, len(rows), reading, BETA)
    assert len(pieces) > 3 and pieces[-1].start > 0
    for p, want in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-3, atol=1e-5)
    largest = max(w.abs().max().item() for w in wanted)
    assert largest > 3e-3  # so 1e-5 is small; which answers were sampled differs between processors
    got = sums["policy_loss"]
    if teacher is not None:
        got = got + BETA * sums["teacher_kl"]
    if head is not None:
        got = got + config.value_coef * sums["value_loss"]
    assert got.item() == pytest.approx(loss.item(), abs=1e-4)
    assert 0 < sums["clip_fraction"] < 1  # some steps are held back, others not
    if teacher is not None:
        learner.gradients(rollout, data, rows, len(rows), None, BETA)
        guidance = [(p.grad - w).abs().max() for p, w in zip(parameters, wanted, strict=True)]
        assert max(guidance) > 1e-3  # a good part of the gradient is the teacher's


def test_the_gradient_of_imitation_is_that_of_its_cross_entropy(fitted, played, pieces):
    rollout, _, shown = played
    config = tiny_models.new_config(guidance="sft")
    lora = tiny_models.noisy_lora(fitted, 2, 0.05)
    rows = [i for i, s in enumerate(rollout.steps) if s.answer.action is not None][:7]
    examples = Examples()
    examples.add(rollout, told(rollout, rows, [rollout.steps[i] for i in rows]), Crew())
    policy, total, chosen = tiny_models.merged_parameters(fitted, lora), 0.0, [0, 2, 3, 6]
    for k in chosen:
        step = rollout.steps[rows[k]]
        place = (shown[rows[k]], rollout.fixed, step.suffix, step.tokens, config.temperature)
        log_p, _ = tiny_models.own_answer(fitted, policy, *place)
        taken = log_p.gather(1, torch.tensor(step.tokens)[:, None])[:, 0]
        total = total - taken[: step.thought].mean() / 5  # the fifth is another worker's
    wanted = torch.autograd.grad(2.0 * total, lora.parameters())
    learner = Learner(fitted, lora, None, Crew(), config)
    imitated = Imitated(examples, chosen, 5, coef=2.0)
    data = data_of(rollout, config)
    sums = learner.gradients(rollout, data, [], 1, None, 0.0, imitated)
    assert len(pieces) > 1
    assert sums["sft_loss"].item() == pytest.approx(total.item(), rel=1e-4)
    for p, want in zip(lora.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-3, atol=1e-6)
    sums = learner.gradients(rollout, data, [], 1, None, 0.0, Imitated(examples, [], 5, 2.0))
    assert sums["sft_loss"] == 0  # all examples are other workers'
    assert not any(p.grad.any() for p in lora.parameters())
    both = [g.clone() for g in wanted]
    learner.gradients(rollout, data, rows, len(rows), None, 0.0)
    both = [g + p.grad for g, p in zip(both, lora.parameters(), strict=True)]
    learner.gradients(rollout, data, rows, len(rows), None, 0.0, imitated)
    for p, want in zip(lora.parameters(), both, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-3, atol=1e-5)


def test_rejection_sampling_is_cross_entropy_on_ones_own_successes(fitted, played, pieces):
    rollout, _, shown = played
    config = tiny_models.new_config(guidance="none", objective="rejection")
    with torch.no_grad():
        weights = fitted.weights()
    data = prepare(fitted, weights, rollout, None, 0.0, None, Crew(), config)
    won = [e.success for e in rollout.episodes for _ in e.steps]
    keys = [(s.picture, tuple(s.suffix), tuple(s.tokens)) for s in rollout.steps]
    wanted = {k for k, w in zip(keys, won, strict=True) if w}
    assert 0 < len(data.rows) < len(rollout.steps)
    assert all(won[i] for i in data.rows)
    assert sorted(keys[i] for i in data.rows) == sorted(wanted)  # each answer of a state once
    lora = tiny_models.noisy_lora(fitted, 2, 0.05)
    policy, loss = tiny_models.merged_parameters(fitted, lora), 0.0
    rows = data.rows[:6]
    for i in rows:
        step = rollout.steps[i]
        place = (shown[i], rollout.fixed, step.suffix, step.tokens, config.temperature)
        log_p, _ = tiny_models.own_answer(fitted, policy, *place)
        loss = loss - log_p.gather(1, torch.tensor(step.tokens)[:, None]).mean() / len(rows)
    wanted = torch.autograd.grad(loss, lora.parameters())
    learner = Learner(fitted, lora, None, Crew(), config)
    sums = learner.gradients(rollout, data, rows, len(rows), None, 0.0)
    assert sums["policy_loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    for p, want in zip(lora.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-3, atol=1e-6)


def test_two_workers_sum_to_one(fitted, played):
    rollout, lora, _ = played
    config = tiny_models.new_config(advantage="gae")
    head, data = trained_head(fitted), data_of(rollout, config)
    with torch.no_grad():
        teacher = fitted.weights(tiny_models.noisy_lora(fitted, 3, 0.02))
    learner = Learner(fitted, lora, head, Crew(), config)

    def gradient(rows, total):
        sums = learner.gradients(rollout, data, rows, total, reading, 0.5)
        return [p.grad.clone() for p in learner.parameters()], sums

    rows = list(range(21))
    reading = read_answers(fitted, teacher, rollout, rows)
    whole, sums = gradient(rows, 21)
    parts = [gradient(rows[:13], 21), gradient(rows[13:], 21), gradient([], 21)]
    for i, want in enumerate(whole):
        torch.testing.assert_close(sum(p[0][i] for p in parts), want, rtol=1e-3, atol=1e-6)
    for name in FIGURES:
        assert sum(p[1][name] for p in parts).item() == pytest.approx(sums[name].item(), abs=1e-5)
    assert not any(g.any() for g in parts[2][0])  # a worker without steps adds nothing


def test_the_ratio_before_the_first_step_is_one(fitted, played, monkeypatch):
    """Thoughts at half weight, temperature 0.7, specials banned: scored as it was sampled."""
    rollout, lora, _ = played
    config = tiny_models.new_config(thought_coef=0.5, temperature=0.7, guidance="none")
    data, seen = data_of(rollout, config), []
    own = turbo.update.ppo_loss
    monkeypatch.setattr(turbo.update, "ppo_loss", lambda *a: seen.append(own(*a)) or seen[-1])

    def ratios(c, factors=lora, model=fitted):
        seen.clear()
        rows = list(range(len(rollout.steps)))
        Learner(model, factors, None, Crew(), c).gradients(
            rollout, data, rows, len(rows), None, 0.0
        )
        return torch.cat([s.ratio for s in seen])

    ratio = ratios(config)
    assert len(ratio) == len(rollout.steps) >= 40
    assert (ratio - 1).abs().max() < 1e-4
    # Each of these is noticed: another temperature, specials not banned, other factors.
    assert (ratios(dataclasses.replace(config, temperature=1.0)) - 1).abs().max() > 1e-2
    unbanned = tiny_models.with_banned(fitted, list(range(len(fitted.banned))))
    assert (ratios(config, model=unbanned) - 1).abs().max() > 1e-4
    assert (ratios(config, tiny_models.noisy_lora(fitted, 5, 0.02)) - 1).abs().max() > 1e-2


def test_the_teacher_has_no_gradient(fitted, played):
    """With no advantage and a teacher that is the policy, the gradient of the KL vanishes."""
    rollout, lora, _ = played
    config = tiny_models.new_config(kl_estimator="full")
    data = data_of(rollout, config)
    data.advantages.zero_()
    with torch.no_grad():
        teacher = fitted.weights(lora)
    learner = Learner(fitted, lora, None, Crew(), config)
    reading = read_answers(fitted, teacher, rollout, list(range(10)))
    learner.gradients(rollout, data, list(range(10)), 10, reading, 1.0)
    assert max(p.grad.abs().max() for p in learner.parameters()) < 1e-4


def test_values_of_successors(fitted, played):
    rollout, lora, _ = played
    head = trained_head(fitted)
    with torch.no_grad():
        weights = fitted.weights(lora)
    values, following = step_values(fitted, weights, rollout, head)
    at = 0
    ends = {"terminated": 0, "truncated": 0}
    for episode in rollout.episodes:
        for i, step in enumerate(episode.steps):
            assert values[at].item() == pytest.approx(head(step.hidden[None]).item(), abs=1e-5)
            if i + 1 < len(episode.steps):
                assert following[at] == values[at + 1]
            elif step.terminated:
                assert following[at] == 0
                ends["terminated"] += 1
            else:
                picture, suffix = episode.final
                with torch.no_grad():
                    one = rollout.features[picture][None]
                    prefix = fitted.prefix(weights, one, rollout.fixed, rollout.grid)
                    hidden = fitted.suffix(weights, torch.tensor([suffix]), prefix)[0, -1:]
                    want = head(fitted.text.final_norm(weights, hidden))
                assert following[at].item() == pytest.approx(want.item(), abs=1e-4)
                assert following[at] != 0
                ends["truncated"] += 1
            at += 1
    assert all(ends.values())


def prepared(fitted, played, kl=None, head=None, beta=0.5, **changes):
    rollout, lora, _ = played
    with torch.no_grad():
        weights = fitted.weights(lora)
    config = tiny_models.new_config(**changes)
    return prepare(fitted, weights, rollout, kl, beta, head, Crew(), config)


def rewards(rollout):
    return torch.tensor([s.reward + s.format_reward for s in rollout.steps])


@pytest.mark.parametrize("placement", ["reward", "advantage", "loss"])
def test_advantages_of_a_critic(fitted, played, placement):
    rollout, lora, _ = played
    kl = torch.rand(len(rollout.steps), generator=torch.Generator().manual_seed(0))
    head = trained_head(fitted)
    given = None if placement == "loss" else kl
    got = prepared(fitted, played, given, head, advantage="gae", kl_placement=placement)
    with torch.no_grad():
        values, following = step_values(fitted, fitted.weights(lora), rollout, head)
    reward = rewards(rollout) - (0.5 * kl if placement == "reward" else 0.0)
    ends = [
        torch.tensor([getattr(s, k) for s in rollout.steps]) for k in ("terminated", "truncated")
    ]
    out = gae(reward, values, following, *ends, 0.9, 0.95)
    a = out.advantages
    want = (a - a.mean()) / (a.std(correction=0) + 1e-8)
    if placement == "advantage":
        want = want - 0.5 * (kl - kl.mean())
    torch.testing.assert_close(got.advantages, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.returns, out.returns)
    residual = (out.returns - values).var(correction=0) / out.returns.var(correction=0)
    assert got.explained_variance == pytest.approx(1 - residual.item(), abs=1e-4)


@pytest.mark.parametrize("baseline", ["loo", "mean"])
@pytest.mark.parametrize("placement", ["reward", "advantage", "loss"])
def test_advantages_of_a_group(fitted, played, baseline, placement):
    rollout, *_ = played
    kl = torch.rand(len(rollout.steps), generator=torch.Generator().manual_seed(0))
    given = None if placement == "loss" else kl
    got = prepared(fitted, played, given, baseline=baseline, kl_placement=placement)
    reward = rewards(rollout) - (0.5 * kl if placement == "reward" else 0.0)
    totals, at = [], 0
    for episode in rollout.episodes:
        totals.append(reward[at : at + len(episode.steps)].sum().item())
        at += len(episode.steps)
    mean = sum(totals) / len(totals)
    spread = math.sqrt(sum((t - mean) ** 2 for t in totals) / len(totals))
    want = []
    for total, episode in zip(totals, rollout.episodes, strict=True):
        same = [
            t for t, e in zip(totals, rollout.episodes, strict=True) if e.group == episode.group
        ]
        others = sum(same) - total
        base = others / (len(same) - 1) if baseline == "loo" else sum(same) / len(same)
        want += [(total - base) / (spread + 1e-6)] * len(episode.steps)
    want = torch.tensor(want) - (0.5 * (kl - kl.mean()) if placement == "advantage" else 0.0)
    torch.testing.assert_close(got.advantages, want, rtol=1e-4, atol=1e-5)
    assert not got.returns.any() and math.isnan(got.explained_variance)
    assert want.abs().max() > 0.1


def test_advantages_where_episodes_meet(fitted, played):
    rollout, *_ = played
    got = prepared(fitted, played, None, baseline="state")
    lengths = [len(e.steps) for e in rollout.episodes]
    states = [(s.picture, tuple(s.suffix)) for s in rollout.steps]
    groups = [e.group for e in rollout.episodes]
    want = state_advantages(rewards(rollout), lengths, groups, states)
    totals = torch.stack([part.sum() for part in rewards(rollout).split(lengths)])
    torch.testing.assert_close(
        got.advantages, want / totals.std(correction=0), rtol=1e-4, atol=1e-5
    )
    whole = prepared(fitted, played, None, baseline="loo").advantages
    first = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    torch.testing.assert_close(got.advantages[first], whole[first], rtol=1e-4, atol=1e-5)
    assert (got.advantages != whole).any()


def test_a_coarser_state_is_taken_from_an_environment_that_has_one(played):
    step = played[0].steps[0]
    assert turbo.update.state(step) == (step.picture, tuple(step.suffix))

    class Room:
        def meeting(self):
            return "at the desk"

    assert turbo.update.state(dataclasses.replace(step, asked=Room())) == "at the desk"


def test_an_equal_kl_of_all_answers_changes_no_advantage(fitted, played):
    kl = torch.full((len(played[0].steps),), 3.0)
    plain = prepared(fitted, played, None)
    got = prepared(fitted, played, kl, kl_placement="advantage")
    torch.testing.assert_close(got.advantages, plain.advantages)
    assert got.rows == plain.rows


def test_a_kl_that_is_not_finite_costs_its_own_step_alone(fitted, played):
    kl = torch.rand(len(played[0].steps), generator=torch.Generator().manual_seed(0))
    whole = prepared(fitted, played, kl, kl_placement="advantage")
    kl[3] = torch.nan
    got = prepared(fitted, played, kl, kl_placement="advantage")
    assert got.faulty == 1 and 3 not in got.rows
    others = [i for i in range(len(kl)) if i != 3]
    torch.testing.assert_close(got.advantages[others], whole.advantages[others], rtol=0, atol=0.05)


def hand_made(groups, totals, logprobs):
    """One-step episodes with given returns and log-probs; one of two tokens is thought."""
    episodes = []
    for group, total, logprob in zip(groups, totals, logprobs, strict=True):
        step = Step(
            picture=0,
            suffix=[1],
            tokens=[5, 6],
            logprobs=[logprob, logprob],
            thought=1,
            hidden=torch.zeros(4),
            reward=total,
            format_reward=0.0,
            answer=None,
            verdict=None,
            terminated=True,
            truncated=False,
        )
        episodes.append(Episode(group, (), [step]))
    return Rollout(episodes, torch.empty(0), torch.empty(0), "")


def test_steps_that_teach_nothing_are_left_out():
    """Equal returns within a group, and answers that were all but certain."""
    rollout = hand_made(
        [0, 0, 1, 1, 2, 2], [1.0, 1.0, 0.0, 1.0, 0.0, 1.0], [-1, -1, -1, -1e-3, -1, -1]
    )
    config = tiny_models.new_config(skip_certain=0.02)
    data = prepare(None, None, rollout, None, 0.0, None, Crew(), config)
    assert data.rows == [2, 4, 5]
    assert data.advantages[:2].tolist() == [0, 0] and data.advantages[3] > 0
    everything = dataclasses.replace(config, skip_certain=0.0)
    assert prepare(None, None, rollout, None, 0.0, None, Crew(), everything).rows == [2, 3, 4, 5]


def test_a_critic_learns_of_steps_that_are_sure(fitted, played):
    surprise = [-sum(s.logprobs) for s in played[0].steps]
    bound = sorted(surprise)[len(surprise) // 2]
    sure = {i for i, s in enumerate(surprise) if s < bound}
    grouped = prepared(fitted, played, skip_certain=bound)
    assert grouped.rows and not sure & set(grouped.rows)
    weighed = prepared(
        fitted, played, head=trained_head(fitted), advantage="gae", skip_certain=bound
    )
    assert sure < set(weighed.rows)
    assert grouped.faulty == weighed.faulty == 0
    won = prepared(
        fitted, played, head=trained_head(fitted), advantage="gae", objective="rejection"
    )
    assert won.faulty == 0 and len(won.rows) < len(surprise)


def test_old_logprobs_weigh_the_thoughts():
    rollout = hand_made([0, 0], [1.0, 0.0], [-2.0, -0.5])
    assert old_logprobs(rollout.steps, 0.5).tolist() == [-3.0, -0.75]
    assert old_logprobs(rollout.steps, 0.0).tolist() == [-2.0, -0.5]


def test_moments():
    mean, deviation = moments(torch.tensor([1.0, 2.0, 6.0]), Crew())
    assert mean == 3.0 and deviation == pytest.approx(math.sqrt(14 / 3))
    assert moments(torch.tensor([]), Crew()) == (0.0, 0.0)
    # A million away from zero the spread is still there: sums are in double precision.
    assert moments(torch.tensor([1e6, 1e6 + 1]), Crew())[1] == pytest.approx(0.5, rel=1e-3)
