"""What the public implementation of the paper gets wrong: one test for each fault.

Each shows what we do, computes the faulty thing too, and fails if the two cannot be told apart.
"""

import copy
import dataclasses
import json
from fractions import Fraction

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from torch import nn

import turbo.batch
import turbo.decode
import turbo.kernels.policy_head_loss
import turbo.model
import turbo.score
from turbo.envs.base import read_json_answer
from turbo.envs.cards import evaluate, tokenize
from turbo.gae import gae
from turbo.kernels.policy_head import apply_head, policy_head
from turbo.model import ValueHead
from turbo.parallel import Crew
from turbo.score import final_hidden, read_answers, teacher_kl
from turbo.teacher import Teacher
from turbo.update import Learner, StepData, old_logprobs, prepare, step_values

TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def vlm():
    """A model whose answers on numberline are partly legal."""
    return tiny_models.fitted_model()


@pytest.fixture(scope="module")
def played(vlm):
    """A rollout on numberline, the factors that played it, and the picture before each step."""
    lora = tiny_models.noisy_lora(vlm, 1, 0.02)
    rollout = tiny_models.play(vlm, lora, steps=40, temperature=TEMPERATURE)
    return rollout, lora, tiny_models.shown_pictures(rollout)


def new_teacher(vlm, **changes):
    return Teacher(vlm, tiny_models.noisy_lora(vlm), tiny_models.new_config(**changes))


def peft_model(count):
    """A peft model of one linear layer with `count` adapters of different weights."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), config, adapter_name="a0")
    for k in range(1, count):
        model.add_adapter(f"a{k}", config)
    return model


def test_fault_01_the_teacher_changes_at_every_merge(vlm):
    teacher, seen = new_teacher(vlm), []
    for k in range(4):
        teacher.push(k, tiny_models.noisy_lora(vlm, k), 0.5)
        seen.append([t.clone() for t in teacher.weights.tensors()])
    for k in range(3):
        changed = [not torch.equal(a, b) for a, b in zip(seen[k], seen[k + 1], strict=True)]
        assert sum(changed) == 4 * vlm.text.layers  # q, k, v fused; o; gate and up; down
    # The fault: merging under a name that is there already does nothing, and does not say so.
    model = peft_model(3)
    model.add_weighted_adapter(["a0", "a1"], [0.5, 0.5], "teacher", combination_type="linear")
    layer = model.base_model.model[0]
    before = layer.lora_A["teacher"].weight.clone()
    model.add_weighted_adapter(["a1", "a2"], [0.5, 0.5], "teacher", combination_type="linear")
    assert torch.equal(before, layer.lora_A["teacher"].weight)


@pytest.mark.parametrize("merge", ["ties", "linear"])
def test_fault_02_identical_checkpoints_keep_their_strength(vlm, merge):
    lora, count = tiny_models.noisy_lora(vlm, 3), 4
    teacher = new_teacher(vlm, merge=merge, density=1.0, weighting="sma")
    for k in range(count):
        teacher.push(k, lora, 0.5)
    for name, (a, b) in lora.factors.items():
        tau = (lora.scale * (b @ a)).detach()
        base = vlm.matrices[name + ".weight"]
        torch.testing.assert_close(teacher.merged[name] - base, tau, rtol=0, atol=1e-6)
        # The fault: weights that sum to 1, divided by the number that agree once more.
        taus = torch.stack([tau] * count)
        weighted = (taus / count).sum(0) / (taus.sign() == tau.sign()).sum(0)
        torch.testing.assert_close(weighted, tau / count)
        assert (weighted - tau).abs().max() > 100 * (teacher.merged[name] - base - tau).abs().max()


def test_fault_03_the_products_are_merged_and_not_the_factors(vlm):
    loras = [tiny_models.noisy_lora(vlm, k) for k in range(3)]
    teacher = new_teacher(vlm, merge="linear", weighting="sma")
    for k, lora in enumerate(loras):
        teacher.push(k, lora, 0.5)
    for name in loras[0].factors:
        pairs = [lora.factors[name] for lora in loras]
        products = sum(2.0 * (b @ a) for a, b in pairs).detach() / 3
        factors = 2.0 * ((sum(b for _, b in pairs) / 3) @ (sum(a for a, _ in pairs) / 3)).detach()
        moved = teacher.merged[name] - vlm.matrices[name + ".weight"]
        torch.testing.assert_close(moved, products, rtol=0, atol=1e-6)
        assert (factors - products).norm() > 0.5 * products.norm()


def test_fault_04_the_kl_is_of_the_sampled_tokens_behind_their_own_prompt(vlm, played):
    """A teacher that is the policy is at distance 0.

    Without the picture, with other positions, one token off, or with other tokens it would not be.
    """
    rollout, lora, _ = played
    with torch.no_grad():
        weights = vlm.weights(lora)
    options = dict(token_range="all", temperature=TEMPERATURE)

    def distance(model, data):
        return teacher_kl(model, weights, weights, data, estimator="abs", **options).max().item()

    assert distance(vlm, rollout) < 1e-4
    blind = dataclasses.replace(rollout, features=torch.zeros_like(rollout.features))
    assert distance(vlm, blind) > 1e-2
    flat = copy.copy(vlm)
    flat.prefix = lambda *a: (lambda p: dataclasses.replace(p, next_position=p.length))(
        vlm.prefix(*a)
    )
    assert distance(flat, rollout) > 1e-2
    late = [dataclasses.replace(s, tokens=[*s.tokens[1:], s.tokens[0]]) for s in rollout.steps]
    assert distance(vlm, with_steps(rollout, late)) > 1e-1
    # Encoded again, the same text may fall into other tokens; a JSON dump is another text besides.
    warm = tiny_models.play(vlm, lora, steps=60, temperature=1.3)
    again = [[*vlm.encode(vlm.decode(s.tokens)), vlm.end] for s in warm.steps]
    assert any(a != s.tokens for a, s in zip(again, warm.steps, strict=True))
    legal, _ = tiny_models.legal_and_illegal(rollout)
    dumps = [vlm.encode(json.dumps(s.answer.fields, indent=1)) for s in legal]
    assert all(d != s.tokens[:-1] for d, s in zip(dumps, legal, strict=True))
    options["temperature"] = 1.3
    assert teacher_kl(vlm, weights, weights, warm, estimator="abs", **options).max() < 1e-4


def with_steps(rollout, steps):
    """The rollout with other steps, in the same episodes."""
    steps, episodes = iter(steps), []
    for e in rollout.episodes:
        episodes.append(dataclasses.replace(e, steps=[next(steps) for _ in e.steps]))
    return dataclasses.replace(rollout, episodes=episodes)


@torch.no_grad()
def test_fault_05_what_is_scored_is_what_was_sampled(vlm, played):
    from transformers.generation.logits_process import (
        RepetitionPenaltyLogitsProcessor,
        TopKLogitsWarper,
    )

    rollout, lora, shown = played
    parameters = tiny_models.merged_parameters(vlm, lora)
    penalty, top = RepetitionPenaltyLogitsProcessor(1.2), TopKLogitsWarper(5)
    wrong, outside = 0.0, 0
    for i in range(0, len(rollout.steps), 5):
        s = rollout.steps[i]
        place = (shown[i], rollout.fixed, s.suffix, s.tokens, TEMPERATURE)
        log_p, _ = tiny_models.own_answer(vlm, parameters, *place)
        chosen = torch.tensor(s.tokens)[:, None]
        scored = log_p.gather(1, chosen)[:, 0]
        assert (scored - torch.tensor(s.logprobs)).abs().max() < 1e-4
        # The fault: the distribution that is left by top-k 5 and the penalty is another one.
        for t in range(1, len(s.tokens)):
            bent = top(None, penalty(torch.tensor([s.tokens[:t]]), log_p[t : t + 1].clone()))
            bent = torch.log_softmax(bent, -1)[0]
            wrong = max(wrong, (bent.exp() - log_p[t].exp()).abs().max().item())
            outside += int((log_p[t] > log_p[t, s.tokens[t]]).sum() >= 5)
    assert wrong > 0.1
    assert outside > 0  # and some of our tokens it could never have sampled


def test_fault_06_every_step_is_scored_behind_its_own_prompt():
    """Formulas grow, and so do prompts; under the first of them the ratios would not be 1."""
    base = tiny_models.random_model()  # says letters; the environment plays the expert's actions
    vlm = tiny_models.with_banned(base, [*(base.encode(c)[0] for c in "xyzw"), base.end])
    rollout = tiny_models.play(
        vlm,
        deals=[{"seed": k} for k in range(4)],
        group=1,
        make_env=lambda: tiny_models.scripted("ezpoints"),
        temperature=1.0,
    )
    steps = rollout.steps
    assert {len(e.steps) for e in rollout.episodes} == {4}
    assert len({tuple(s.suffix) for s in rollout.episodes[0].steps}) == 4
    config = tiny_models.new_config(temperature=1.0, guidance="none")
    n = len(steps)
    old = old_logprobs(steps, config.thought_coef)
    data = StepData(torch.ones(n), torch.zeros(n), old, list(range(n)), 1.0, 0.0)
    learner = Learner(vlm, tiny_models.noisy_lora(vlm, 0, 0.0), None, Crew(), config)

    def apart(r):
        return learner.gradients(r, data, list(range(n)), n, None, 0.0)["approx_kl"].item()

    assert apart(rollout) < 1e-8
    first = [
        dataclasses.replace(s, suffix=e.steps[0].suffix) for e in rollout.episodes for s in e.steps
    ]
    assert apart(with_steps(rollout, first)) > 1e-5


def test_fault_07_values_stay_within_their_episode_and_see_the_whole_reward(vlm, played):
    rollout, lora, _ = played
    torch.manual_seed(0)
    # Hidden states that differ more than those of a tiny model, so that values do.
    noise = [dataclasses.replace(s, hidden=torch.randn(vlm.text.dim)) for s in rollout.steps]
    rollout = with_steps(rollout, noise)
    head = ValueHead(vlm.text.dim)
    nn.init.normal_(head.net[-1].weight, std=0.5)
    config = tiny_models.new_config(advantage="gae", kl_placement="reward")
    with torch.no_grad():
        weights = vlm.weights(lora)

    def returns(r, kl=None):
        return prepare(vlm, weights, r, kl, 0.5, head, Crew(), config).returns

    ours = returns(rollout)
    ends = torch.tensor([len(e.steps) for e in rollout.episodes]).cumsum(0) - 1
    final = final_hidden(vlm, weights, rollout)
    with torch.no_grad():
        for k, episode in enumerate(rollout.episodes):
            last = episode.steps[-1]
            future = 0.0 if last.terminated else head(final[k][None]).item()
            want = last.reward + config.gamma * future
            assert ours[ends[k]].item() == pytest.approx(want, abs=1e-4)
    # The fault: the value of whatever is played next, which belongs to another episode.
    values, _ = step_values(vlm, weights, rollout, head)
    following = torch.cat([values[1:], values[:1]])
    flags = [
        torch.tensor([getattr(s, k) for s in rollout.steps]) for k in ("terminated", "truncated")
    ]
    reward = torch.tensor([s.reward for s in rollout.steps])
    wrong = gae(reward, values, following, *flags, config.gamma, config.gae_lambda).returns
    truncated = flags[1].nonzero()[:, 0]
    assert len(truncated) > 1 and (wrong - ours)[truncated].abs().min() > 1e-3
    # Guidance and format terms are part of the stream that the critic learns.
    kl = torch.ones(len(rollout.steps))
    assert (returns(rollout, kl) - ours).max() < -0.4
    formatted = [dataclasses.replace(s, format_reward=3.0) for s in rollout.steps]
    assert (returns(with_steps(rollout, formatted)) - ours).min() > 2.9


def test_fault_08_formulas_are_exact():
    assert evaluate(tokenize("8/(3-8/3)")) == 24
    assert 8 / (3 - 8 / 3) != 24  # floating point says no
    assert evaluate(tokenize("1/3+1/3+1/3")) == Fraction(1)
    env = tiny_models.new_env("points24")
    env.reset(options={"hand": ["8", "3", "8", "3"]})
    for token in ("8", "/", "(", "3", "-", "8", "/", "3", ")", "="):
        _, reward, terminated, _, info = env.step(env.actions.index(token))
    assert (reward, terminated, info["success"]) == (10.0, True, True)


def test_fault_09_an_action_is_exactly_one_of_the_list_or_nothing_is_done(vlm):
    actions = ("go to cabinet 1", "go to cabinet 10")
    for action in actions:
        answer = read_json_answer(json.dumps({"action": action}), ["action"], actions)
        assert answer.action == action
    assert [a for a in actions if a in "go to cabinet 10"] == list(
        actions
    )  # the fault: both are found
    for text in ('{"action": "go to cabinet 100"}', '{"action": "cabinet 1"}', "go to cabinet 1"):
        assert read_json_answer(text, ["action"], actions).action is None
    # Played, an answer that names no action does nothing, and costs.
    rollout = tiny_models.play(
        tiny_models.speechless(vlm),
        deals=[{"options": {"hand": [2, 0]}}],
        group=1,
        make_env=lambda: tiny_models.scripted("numberline", lambda env: "go -"),
    )
    (episode,) = rollout.episodes
    assert {s.answer.action for s in episode.steps} == {None}
    assert "not in the list" in episode.steps[0].answer.error
    assert {s.reward for s in episode.steps} == {-1.0} and not episode.success
    assert len({s.picture for s in episode.steps} | {episode.final[0]}) == 1


def test_fault_10_only_answer_tokens_meet_the_vocabulary_and_environments_are_batched(
    vlm, played, monkeypatch
):
    rollout, lora, _ = played
    rows, logits, own = [], [], F.linear

    def counting(hidden, *arguments, **options):
        rows.append(len(hidden))
        return policy_head(hidden, *arguments, **options)

    def linear(x, weight, *bias):
        if weight.shape[0] == vlm.text.vocabulary:
            logits.append(len(x))
        return own(x, weight, *bias)

    def counting_pieces(sides, *arguments):
        rows.append(len(sides.hidden))
        return apply_head(sides, *arguments)

    monkeypatch.setattr(turbo.score, "policy_head", counting)
    monkeypatch.setattr(turbo.kernels.policy_head_loss, "apply_head", counting_pieces)
    config = tiny_models.new_config(temperature=TEMPERATURE)
    n = len(rollout.steps)
    old = old_logprobs(rollout.steps, config.thought_coef)
    data = StepData(torch.ones(n), torch.zeros(n), old, list(range(n)), 1.0, 0.0)
    with torch.no_grad():
        weights, teacher = vlm.weights(lora), vlm.weights(tiny_models.noisy_lora(vlm, 2))
    answers = sum(len(s.tokens) for s in rollout.steps)

    def projected():
        """Rows that meet the vocabulary in a minibatch, in scoring, and in playing."""
        rows.clear()
        reading = read_answers(vlm, teacher, rollout, list(range(n)))
        Learner(vlm, lora, None, Crew(), config).gradients(
            rollout, data, list(range(n)), n, reading, 0.5
        )
        minibatch = list(rows)
        rows.clear()
        options = dict(token_range="thought", temperature=TEMPERATURE)
        teacher_kl(vlm, weights, teacher, rollout, estimator="clip", **options)
        scoring = list(rows)
        with monkeypatch.context() as patch:
            logits.clear()
            patch.setattr(F, "linear", linear)
            again = tiny_models.play(vlm, lora, steps=40, temperature=TEMPERATURE)
        return minibatch, scoring, list(logits), again

    # Work is done in rounded sizes: an eighth and 64 rows more at most, for each piece of it.
    for pieces in projected()[:2]:
        assert answers <= sum(pieces) <= 1.125 * answers + 64 * len(pieces)
    # Unrounded it is exactly the answer tokens; in playing, one row for each guess and each draw.
    for module in (turbo.batch, turbo.decode, turbo.model):
        monkeypatch.setattr(module, "round_up", lambda n, step=8: n)
    minibatch, scoring, playing, again = projected()
    assert sum(minibatch) == sum(scoring) == answers
    drawn = sum(len(s.tokens) for s in again.steps) - again.accepted
    assert sum(playing) == again.guessed + drawn
    positions = sum(len(s.suffix) + len(s.tokens) - 1 for s in rollout.steps)
    prefixes = n * len(
        vlm.encode(tiny_models.prefix_text(rollout.fixed, rollout.features.shape[1]))
    )
    assert answers < 0.75 * positions < 0.5 * (positions + prefixes)  # what the fault projects

    # Environments answer together, and guessed tokens of an answer are verified together.
    assert rollout.passes < answers / 4
