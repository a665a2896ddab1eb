"""turbo/faults.py, turbo/replay.py: what is not finite trains nothing, is kept, and is named."""

import json
import math

import pytest
import tiny_models
import torch
from safetensors.torch import load_file

from turbo import replay, train
from turbo.faults import FaultLog, NumericalFault
from turbo.parallel import Crew
from turbo.run import Run
from turbo.update import Learner, prepare


@pytest.fixture
def run(tmp_path):
    """A run that has not been trained yet, in a folder of its own."""
    settings = tiny_models.new_config(model=str(tiny_models.fitted_folder()), guidance="none")
    train.checkpoint.create_run(tmp_path / "run", settings, "hash")
    return Run(settings, tmp_path / "run", Crew())


def played(run, seed=0):
    with torch.no_grad():
        weights = run.vlm.weights(run.lora)
    rollout = run.table.collect(weights, (seed,), 16)
    return rollout, prepare(run.vlm, weights, rollout, None, 0.0, None, run.crew, run.config)


def test_a_bad_minibatch_is_skipped_and_the_others_train(run, monkeypatch):
    rollout, data = played(run)
    own, calls = Learner.gradients, []
    before = [p.clone() for p in run.lora.parameters()]

    def gradients(self, *arguments):
        sums = own(self, *arguments)
        calls.append(len(calls))
        if len(calls) == 2:
            self.parameters()[3].grad[0, 0] = math.nan
        if len(calls) == 3:
            sums["policy_loss"] = torch.tensor(math.inf)
        return sums

    monkeypatch.setattr(Learner, "gradients", gradients)
    run.config.minibatch, run.config.epochs = 4, 2
    figures = train.learn(run, rollout, data, None)
    assert len(calls) >= 4 and figures["skipped_batches"] == 2
    assert all(math.isfinite(v) for v in figures.values())
    assert all(p.isfinite().all() for p in run.lora.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, run.lora.parameters(), strict=True))
    steps = [s["step"] for s in run.optimizer.state_dict()["state"].values()]
    assert all(step == len(calls) - 2 for step in steps)  # the moments never saw them
    files = sorted(p.name for p in (run.path / "faults").iterdir())
    assert files == [
        f"00000001-{batch}-worker0.{kind}"
        for batch in ("0001", "0002")
        for kind in ("json", "safetensors")
    ]
    about = json.loads((run.path / "faults" / files[2]).read_text())
    assert about["figures"]["policy_loss"] == "inf"


def test_a_recorded_minibatch_is_replayed_step_by_step(run, capsys):
    rollout, data = played(run)
    data.advantages[data.rows[1]] = math.inf  # one step spoils its minibatch
    figures = train.learn(run, rollout, data, None)
    assert figures["skipped_batches"] == 1
    (file,) = (run.path / "faults").glob("*.json")
    tensors = load_file(file.with_suffix(".safetensors"))
    assert 8 <= len(tensors["advantages"]) < len(data.rows)  # that minibatch alone
    found = replay.replay(file)
    assert len(found) == 1
    number, text, what = found[0]
    assert tensors["advantages"][number] == math.inf and "gradient" in what
    assert text == rollout.steps[data.rows[1]].answer.text
    assert replay.main([str(file)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[0])["answer"] == text and out[-1].startswith("1 steps give no finite")


def test_replay_refuses_what_it_cannot_read(tmp_path, capsys):
    assert replay.main([str(tmp_path / "absent.json")]) == 2
    assert "cannot be replayed" in capsys.readouterr().err
    assert replay.main([]) == 2


def test_too_many_in_a_row_stop_the_run(run, monkeypatch):
    rollout, data = played(run)
    data.advantages[:] = math.nan
    run.config.minibatch, run.config.max_faults = 4, 3
    run.faults.limit = 3
    with pytest.raises(NumericalFault, match=r"^3 minibatches in a row .*LoRA factors are finite"):
        train.learn(run, rollout, data, None)
    with torch.no_grad():
        run.lora.parameters()[0][0, 0] = math.nan
    run.faults = FaultLog(run.path / "faults", 1, 0)
    with pytest.raises(NumericalFault, match=r"the LoRA factors of .*q_proj are not finite"):
        train.learn(run, rollout, data, None)


def test_single_faults_never_stop_a_run(run, monkeypatch):
    rollout, data = played(run)
    run.config.minibatch, run.config.epochs, run.faults.limit = 4, 4, 2
    own, calls = Learner.gradients, []

    def every_second(self, *arguments):
        calls.append(1)
        sums = own(self, *arguments)
        sums["policy_loss"] = sums["policy_loss"] * (math.nan if len(calls) % 2 else 1.0)
        return sums

    monkeypatch.setattr(Learner, "gradients", every_second)
    assert train.learn(run, rollout, data, None)["skipped_batches"] == -(-len(calls) // 2) >= 3


def test_steps_without_a_finite_log_probability_are_left_out(run):
    rollout, _ = played(run)
    rollout.steps[0].logprobs[0] = math.nan
    rollout.steps[2].logprobs[-1] = -math.inf
    with torch.no_grad():
        weights = run.vlm.weights(run.lora)
    data = prepare(run.vlm, weights, rollout, None, 0.0, None, run.crew, run.config)
    assert data.faulty == 2 and not {0, 2} & set(data.rows) and data.rows


@pytest.mark.parametrize(
    ("save_every", "told"),
    [("1", "not saved: the LoRA"), ("100", "no answer has a finite log-probability: the LoRA")],
)
def test_a_policy_that_is_not_a_number_ends_with_one_line(
    tmp_path, monkeypatch, capsys, save_every, told
):
    """The factors are spoiled after an update: they are not saved, and give no probabilities."""
    own = train.learn

    def spoiled(r, *arguments):
        out = own(r, *arguments)
        with torch.no_grad():
            for p in r.lora.parameters():
                p.fill_(math.nan)
        return out

    monkeypatch.setattr(train, "learn", spoiled)
    flags = f"""
        --model {tiny_models.fitted_folder()} --out {tmp_path}/run --save-every {save_every}
        --workers 1 --dtype float32 --envs 8 --group-size 4 --steps-per-update 16 --guidance none
        --eval-episodes 0 --max-new-tokens 40
    """
    assert train.main(["numberline", *flags.split()]) == 1
    err = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(err) == 1 and told in err[0] and "of 13 more are not finite" in err[0]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_faults_do_not_fill_the_disk(run, monkeypatch):
    monkeypatch.setattr("turbo.faults.KEPT", 2)
    rollout, data = played(run)
    data.advantages[:] = math.nan
    run.config.minibatch, run.faults.limit = 4, 10**6
    assert train.learn(run, rollout, data, None)["skipped_batches"] > 2
    assert len(list((run.path / "faults").glob("*.json"))) == 2
