"""turbo/guidance.py: what a teacher writes is its own, is read like any answer, and is kept."""

import dataclasses

import pytest
import tiny_models
import torch

from examples.corrector_server import serve
from turbo.batch import evenly
from turbo.corrector import Corrector
from turbo.envs.base import Answer
from turbo.guidance import Examples, ask_corrector, told, write_answers
from turbo.measure import light, thoughts
from turbo.parallel import Crew

OPTIONS = dict(temperature=0.7, max_new_tokens=48, seed=(0, 1))


@pytest.fixture(scope="module")
def rollout(fitted):
    return tiny_models.play(fitted, steps=40)


@torch.no_grad()
def written_by(vlm, lora, rollout, rows, **changes):
    return write_answers(vlm, vlm.weights(lora), rollout, rows, **{**OPTIONS, **changes})


def test_what_is_written_is_of_the_teachers_distribution(fitted, rollout):
    """Its log-probabilities are those of transformers' own pass with the teacher's weights."""
    teacher = tiny_models.noisy_lora(fitted, 3, 0.05)
    rows = evenly(len(rollout.steps), 6)
    episodes = written_by(fitted, teacher, rollout, rows)
    pictures = tiny_models.shown_pictures(rollout)
    parameters = tiny_models.merged_parameters(fitted, teacher)
    assert len(episodes) == len(rows)
    for i, episode in zip(rows, episodes, strict=True):
        (step,) = episode.steps
        asked = rollout.steps[i]
        assert step.suffix == asked.suffix and step.picture == asked.picture
        place = (pictures[i], rollout.fixed, step.suffix, step.tokens, OPTIONS["temperature"])
        log_p, _ = tiny_models.own_answer(fitted, parameters, *place)
        want = log_p.gather(1, torch.tensor(step.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(step.logprobs), want, rtol=0, atol=1e-4)
        assert step.thought == fitted.thought_tokens(step.tokens)
        assert step.answer.text == fitted.decode(step.tokens)


def test_writing_repeats_itself_and_needs_no_more_slots_than_there_are(
    fitted, rollout, monkeypatch
):
    rows = list(range(12))
    first = written_by(fitted, None, rollout, rows)
    again = written_by(fitted, None, rollout, rows)
    assert [e.steps[0].tokens for e in first] == [e.steps[0].tokens for e in again]
    monkeypatch.setattr("turbo.guidance.SLOTS", 3)
    few = written_by(fitted, None, rollout, rows)
    assert len(few) == 12 and all(e.steps[0].tokens for e in few)
    assert written_by(fitted, None, rollout, []) == []


def test_an_unreadable_answer_is_written_once_more(fitted, rollout, monkeypatch):
    read = []

    def unreadable(vlm, env, tokens):
        read.append(tokens)
        return Answer("", None, {}, "garbled")

    monkeypatch.setattr("turbo.guidance.read_answer", unreadable)
    episodes = written_by(fitted, None, rollout, [0, 3])
    assert len(read) == 4 and len(episodes) == 2
    examples = Examples()
    examples.add(rollout, episodes, Crew())
    assert len(examples) == 0  # and then it is left out of the dataset


def test_the_verdict_is_of_the_state_that_was_asked(fitted, rollout):
    """The expert's answer in that state is right, though the episode went on since."""
    for step in rollout.steps[:10]:
        expert = step.asked.expert_answer(None)
        assert step.asked.judge(step.asked.read_answer(expert)).right
    figures = thoughts(written_by(fitted, None, rollout, list(range(8))))
    assert 0 <= figures["reasoning_score"] <= 1 and figures["legal_rate"] > 0


def test_told_keeps_deal_and_order_and_drops_what_is_missing(rollout):
    steps = rollout.steps
    rows = [0, 2, len(steps) - 1]
    episodes = told(rollout, rows, [steps[0], None, steps[-1]])
    assert [e.steps for e in episodes] == [[steps[0]], [steps[-1]]]
    assert episodes[0].deal == rollout.episodes[0].deal
    assert episodes[1].deal == rollout.episodes[-1].deal


def legal(rollout, count):
    rows = [i for i, s in enumerate(rollout.steps) if s.answer.action is not None][:count]
    return told(rollout, rows, [rollout.steps[i] for i in rows])


def test_examples_end_with_the_thought(rollout):
    examples = Examples()
    episodes = legal(rollout, 5)
    examples.add(rollout, episodes, Crew())
    assert len(examples) == 5
    for (picture, suffix, tokens), episode in zip(examples.rows, episodes, strict=True):
        (step,) = episode.steps
        assert suffix == step.suffix and tokens == step.tokens[: step.thought]
        assert len(tokens) < len(step.tokens)  # the action is no target
        assert torch.equal(examples.features[picture], rollout.features[step.picture])


def test_the_dataset_grows_and_forgets_beyond_its_limit(rollout):
    examples, short = Examples(), Examples(limit=7)
    for _ in range(3):
        for dataset in (examples, short):
            dataset.add(rollout, legal(rollout, 4), Crew())
    assert len(examples) == 12 and len(short) == 7
    for (p, *one), (q, *two) in zip(short.rows, examples.rows[-7:], strict=True):
        assert one == two and torch.equal(short.features[p], examples.features[q])
    used = {p for p, _, _ in short.rows}
    assert used == set(range(len(short.features)))  # no picture is kept for nothing


def test_all_workers_hold_the_same(rollout):
    """What two workers send each other is taken in the order of the ranks."""
    halves = [legal(rollout, 4)[:2], legal(rollout, 4)[2:]]
    sent = []

    class Half(Crew):
        def share(self, item):
            sent.append(item)
            return sent[:2] if len(sent) == 2 else [item]

    alone = Examples()
    for half in halves:
        alone.add(rollout, half, Crew())
    together = Examples()
    Examples().add(rollout, halves[0], Half())
    together.add(rollout, halves[1], Half())
    assert [r[1:] for r in together.rows] == [r[1:] for r in alone.rows]
    assert all(
        torch.equal(together.features[p[0]], alone.features[q[0]])
        for p, q in zip(together.rows, alone.rows, strict=True)
    )


def test_the_dataset_comes_back(rollout):
    examples, other = Examples(), Examples()
    assert examples.state_dict() == {}
    other.load_state_dict({})
    assert len(other) == 0
    examples.add(rollout, legal(rollout, 6), Crew())
    other.load_state_dict({k: v.clone() for k, v in examples.state_dict().items()})
    assert other.rows == examples.rows
    assert all(torch.equal(a, b) for a, b in zip(other.features, examples.features, strict=True))


def test_picks_are_different_and_repeatable(rollout):
    examples = Examples()
    examples.add(rollout, legal(rollout, 6), Crew())
    one, two = (examples.pick(4, torch.Generator().manual_seed(3)) for _ in range(2))
    assert one == two and len(set(one)) == 4
    assert sorted(examples.pick(99, torch.Generator())) == list(range(6))


def test_snapshots_do_not_travel(rollout):
    step = light(rollout.steps[0])
    assert step.asked is None and step.hidden is None
    assert dataclasses.replace(step).tokens == rollout.steps[0].tokens


def test_the_corrector_answers_from_the_solver(fitted, rollout):
    """Over HTTP, from the picture and the prompt alone; its thoughts are right."""
    rows = evenly(len(rollout.steps), 12)
    with serve("numberline") as url:
        corrector = Corrector(url, "expert")
        episodes = ask_corrector(fitted, corrector, rollout, rows, Crew())
        corrector.close()
    assert len(episodes) == len(rows) and corrector.usage.requests == len(rows)
    assert all(s.verdict.right for e in episodes for s in e.steps)
    examples = Examples()
    examples.add(rollout, episodes, Crew())
    assert len(examples) == len(rows)
    for i, (_, suffix, tokens) in zip(rows, examples.rows, strict=True):
        assert suffix == rollout.steps[i].suffix
        assert fitted.decode(tokens).startswith('{"current number": "')


def test_questions_without_an_answer_are_left_out(fitted, rollout):
    with serve("numberline", fail=1.0) as url:
        corrector = Corrector(url, "expert", attempts=1)
        assert ask_corrector(fitted, corrector, rollout, [0, 1, 2], Crew()) == []
        corrector.close()
    assert corrector.usage.failed == 3
