"""turbo/train.py from the command line: what a run writes, bit-exact resume, refusals."""

import json
import math
import re
import shutil
import signal
import time
from dataclasses import asdict, replace

import pytest
import tiny_models
import torch
from kept_signals import kept_signals

from examples.corrector_server import serve
from turbo import checkpoint, train
from turbo.config import TrainConfig
from turbo.faults import NumericalFault
from turbo.log import METRICS, read_jsonl
from turbo.parallel import Crew, run_crew
from turbo.presets import GAME_DEFAULTS, defaults
from turbo.run import Run, pool
from turbo.scribe import Interrupt
from turbo.tiny import builtin_path
from turbo.update import StepData

SMALL = """
    --workers 1 --dtype float32 --envs 8 --group-size 4 --steps-per-update 16 --max-new-tokens 40
    --minibatch 16 --lora-rank 4 --lora-alpha 8 --save-every 1 --keep 10 --eval-episodes 0
    --updates 2 --temperature 0.8 --learning-rate 0.001 --final-learning-rate 0.0001 --epochs 1
    --advantage group --guidance kl --kl-placement loss --kl-estimator full --kl-coef 0.5
    --weighting ema --merge ties --skip-certain 0 --teacher-sample 4
"""
GTR = ("--guidance", "gtr", "--teacher-model", "expert")


def start(out, *more, model=None, game="numberline"):
    folder = model or tiny_models.fitted_folder()
    return train.main([game, "--model", str(folder), "--out", str(out), *SMALL.split(), *more])


def checkpoint_of(run, update):
    saved = checkpoint.load(run, update)
    return saved.adapter, saved.state


def plain(run):
    return [tiny_models.without_times(r) for r in read_jsonl(run / "metrics.jsonl")]


def rewind(run, copied, update):
    """A copy of a run that was killed behind the checkpoint of `update`."""
    shutil.copytree(run, copied)
    for folder in (copied / "checkpoints").iterdir():
        if int(folder.name) > update:
            shutil.rmtree(folder)
    return copied


def assert_same_run(one, two, update):
    for a, b in zip(checkpoint_of(one, update), checkpoint_of(two, update), strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name
    meta = [json.loads((r / f"checkpoints/{update:08d}/meta.json").read_text()) for r in (one, two)]
    for m in meta:
        del m["elapsed"]
    assert meta[0] == meta[1]
    assert plain(one) == plain(two)
    assert (one / "episodes.jsonl").read_text() == (two / "episodes.jsonl").read_text()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four updates with the teacher in the loss, evaluated at both ends and after the second."""
    path = tmp_path_factory.mktemp("train") / "run"
    options = ["--updates", "4", "--eval-episodes", "4", "--eval-every", "2"]
    with kept_signals():
        assert start(path, *options) == 0
    return path


ALWAYS = """
    update env_steps elapsed episodes success_rate success_solvable episode_return episode_length
    legal_rate card_rate reasoning_score thought_length distinct_thoughts thought_entropy
    skipped_batches faulty_steps aim_rate follow_rate self_bleu action_entropy draft_accept_rate
    policy_loss clip_fraction approx_kl sampling_kl teacher_kl value_loss
    grad_norm learning_rate teacher_kl_coef explained_variance trained_rows dropped_rows
    steps_per_second tokens_per_second seconds_rollout seconds_score seconds_train seconds_merge
    seconds_other peak_memory_gb seconds_write sft_loss teacher_legal_rate teacher_card_rate
    teacher_reasoning_score teacher_aim_rate teacher_follow_rate teacher_thought_length
    teacher_thought_entropy teacher_distinct_thoughts teacher_self_bleu teacher_age
"""
EVALUATED = ("success_rate", "success_low", "success_high", "episode_return", "reasoning_score")


def test_metrics(run):
    records = read_jsonl(run / "metrics.jsonl")
    assert [r["update"] for r in records] == [0, 1, 2, 3, 4, 4]
    policy = {f"eval_{k}" for k in EVALUATED}
    teacher = {f"eval_teacher_{k}" for k in EVALUATED}
    place = {"update", "env_steps", "elapsed"}
    for r in records:
        assert set(r) <= set(METRICS)
    assert set(records[0]) == place | policy  # there is no teacher before the first update
    assert set(records[5]) == place | policy | teacher
    for r in records[1:5]:
        assert set(r) - policy - teacher == set(ALWAYS.split())
        assert (set(r) >= policy | teacher) == (r["update"] == 2)
        assert r["trained_rows"] + r["dropped_rows"] >= 16
        assert all(v >= 0 for k, v in r.items() if k.startswith("seconds_"))
        assert r["approx_kl"] < 0.1 and r["grad_norm"] > 0
        assert 0 <= r["sampling_kl"] < 1e-4 and r["sampling_kl"] < r["approx_kl"]
    steps = [r["env_steps"] for r in records]
    assert steps == sorted(steps) and steps[1] >= 16
    assert [r["teacher_kl_coef"] for r in records[1:5]] == [0.5, 0.5, 0.5, 0.5]
    assert records[1]["teacher_kl"] > 0 and records[4]["teacher_kl"] > 0  # to the warm start first
    rates = [r["learning_rate"] for r in records[1:5]]
    assert rates[0] == 0.001 and rates == sorted(rates, reverse=True) and rates[3] > 1e-4


def test_rescoring_tells_what_decoding_was_off(tmp_path, monkeypatch):
    """Every answer's last token is 0.1 nats less likely than recorded."""

    def rescore(vlm, weights, rollout, temperature):
        for step in rollout.steps:
            step.logprobs = [*step.logprobs[:-1], step.logprobs[-1] - 0.1]

    monkeypatch.setattr(train, "rescore", rescore)
    assert start(tmp_path / "run", "--updates", "1", "--rescore", "--thought-coef", "1") == 0
    (r,) = [r for r in read_jsonl(tmp_path / "run" / "metrics.jsonl") if "sampling_kl" in r]
    assert r["sampling_kl"] == pytest.approx(math.exp(-0.1) - 1 + 0.1, abs=1e-5)


def test_config_json(run):
    record = json.loads((run / "config.json").read_text())
    c = TrainConfig(**record["config"])
    assert (c.env, c.updates, c.lora_rank, c.dtype, c.workers) == ("numberline", 4, 4, "float32", 1)
    assert c.model == str(tiny_models.fitted_folder())
    assert c.guidance == "kl" and c.kl_placement == "loss"
    assert re.fullmatch("[0-9a-f]{64}", record["model_sha256"])
    assert record["versions"]["torch"] == torch.__version__ and "commit" in record["versions"]


def test_episodes_jsonl(run):
    records = [json.loads(line) for line in (run / "episodes.jsonl").read_text().splitlines()]
    assert [r["update"] for r in records] == [u for u in (1, 2, 3, 4) for _ in range(8)]
    for r in records:
        about = {"update", "episode", "deal", "success", "solvable", "return", "prompt"}
        assert set(r) == about | {"frames", "left_out", "steps"}
        assert r["left_out"] or r["return"] == sum(s["reward"] for s in r["steps"])
        for s in r["steps"]:
            judged = {"thought", "action", "error", "reward", "format_reward", "verdict"}
            assert set(s) == judged | {"answer", "frame", "state", "tokens", "thought_tokens", "kl"}
            assert (s["action"] is None) == (s["error"] is not None)
            assert set(s["verdict"]) == {"perception", "aim", "follows"}
    assert any(s["action"] for r in records for s in r["steps"])


def test_training_moves_the_policy_and_the_teacher_follows(run):
    adapters = [checkpoint_of(run, u)[0] for u in (1, 2, 3, 4)]
    states = [checkpoint_of(run, u)[1] for u in (1, 2, 3, 4)]
    merged = [{k: v for k, v in s.items() if k.startswith("teacher/merged/")} for s in states]
    for k in range(3):
        assert any(not torch.equal(adapters[k][n], adapters[k + 1][n]) for n in adapters[0])
        assert all(not torch.equal(merged[k][n], merged[k + 1][n]) for n in merged[0])
    assert len(merged[0]) == 14


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(run, tmp_path, capsys):
    resumed = rewind(run, tmp_path / "resumed", 2)
    assert len(read_jsonl(resumed / "metrics.jsonl")) == 6  # written behind the checkpoint: dropped
    assert train.main(["numberline", "--resume", str(resumed)]) == 0
    assert_same_run(run, resumed, 4)
    assert "before training" not in capsys.readouterr().out


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_run_that_was_ended_before_its_first_checkpoint_starts_anew(
    run, tmp_path, capsys, evaluated
):
    resumed = rewind(run, tmp_path / "resumed", 0)
    if not evaluated:  # not even that before training
        (resumed / "metrics.jsonl").write_text("")
    assert train.main(["numberline", "--resume", str(resumed)]) == 0
    out, err = capsys.readouterr()
    assert err == f"warning: {resumed} has no checkpoint yet: it starts anew\n"
    assert ("before training" in out) != evaluated
    assert_same_run(run, resumed, 4)


@pytest.mark.parametrize(
    "options",
    [
        "--advantage gae --kl-placement reward --kl-estimator clip --kl-coef auto "
        "--format-invalid -0.5 --rescore",
        "--kl-placement advantage --kl-estimator k3 --weighting score --merge linear "
        "--history-max 2 --merge-every 2",
        "--guidance none --advantage gae --epochs 2 --target-kl 0.01",
        "--guidance sft --sft-rows 12 --sft-batch 8 --sft-max 20",
        "--teacher initial --kl-estimator forward",
        "--weighting score --score-episodes 4 --checkpoint-each epoch --epochs 2",
        "--guidance none --objective rejection",
    ],
    ids=["gae-reward-auto", "history", "none", "sft", "initial", "score-epoch", "rejection"],
)
def test_other_runs_resume_bit_for_bit(tmp_path, options):
    whole = tmp_path / "whole"
    assert start(whole, "--updates", "3", *options.split()) == 0
    resumed = rewind(whole, tmp_path / "resumed", 2)
    assert train.main(["numberline", "--resume", str(resumed)]) == 0
    assert_same_run(whole, resumed, 3)
    records = read_jsonl(whole / "metrics.jsonl")
    _, state = checkpoint_of(whole, 3)
    if "--guidance none" in options:
        assert not any(k.startswith("teacher/") for k in state)
        assert all(r.get("teacher_kl_coef", 0) == 0 for r in records)
    elif "sft" in options:
        assert any(k.startswith("teacher/merged/") for k in state)
        assert [r["sft_examples"] for r in records[1:4]] == [12, 20, 20]
        assert all(r["sft_loss"] > 0 and r["teacher_kl"] == 0 for r in records[1:4])
        assert state["examples/sizes"].shape == (20, 3)
    elif "initial" in options:
        assert not any(k.startswith("teacher/") for k in state)
        assert records[3]["teacher_kl"] > records[1]["teacher_kl"]  # it is left behind
    else:
        assert any(k.startswith("teacher/merged/") for k in state)
        assert records[3]["teacher_kl"] != 0
    if "--checkpoint-each" in options:  # the warm start, and two of each update
        meta = json.loads((whole / "checkpoints/00000003/meta.json").read_text())
        scores = [e["score"] for e in meta["teacher"]["history"]["entries"]]
        assert len(scores) == 7 and all(0 <= s <= 1 for s in scores)
        assert len(set(scores)) > 1  # each has played
        updates = [e["update"] for e in meta["teacher"]["history"]["entries"]]
        assert updates == [0, 1, 1, 2, 2, 3, 3]
    if "--weighting score" in options:  # with a history, of which a checkpoint writes what is new
        for path in (whole, resumed):
            links = [f.stat().st_nlink for f in path.glob("checkpoints/00000003/history-*")]
            assert len(links) > links.count(1) == (2 if "epoch" in options else 1)
    assert any(k.startswith("value_head/") for k in state) == ("gae" in options)
    if "gae" in options:
        assert records[2]["value_loss"] > 0 and records[2]["explained_variance"] is not None
    if "auto" in options:
        assert records[3]["teacher_kl_coef"] not in (0.0, 1.0)


def test_a_run_goes_on_without_a_damaged_entry_of_its_history(tmp_path, capsys):
    """It is shared by all checkpoints: the teacher loses it, the run nothing else."""
    run = tmp_path / "run"
    assert start(run, "--updates", "2", "--weighting", "score") == 0
    entry = run / "checkpoints" / "00000002" / "history-00000001.safetensors"
    with entry.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")
    assert entry.samefile(run / "checkpoints" / "00000001" / entry.name)
    shutil.rmtree(run / "checkpoints" / "00000000", ignore_errors=True)  # from before that entry
    capsys.readouterr()
    assert train.main(["numberline", "--resume", str(run), "--updates", "3"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and str(entry) in told[0] and "goes on without it" in told[0]
    newest, problems = checkpoint.newest(run)
    assert newest.name == "00000003" and not problems
    assert sorted(p.name[8:16] for p in newest.glob("history-*")) == [
        "00000000",
        "00000002",
        "00000003",
    ]


def test_a_steered_coefficient_is_made_of_the_kl_it_multiplies(tmp_path, monkeypatch):
    """In the advantage its deviation has at most the share that was asked for, in every update."""
    used, prepare = [], train.prepare

    def watched(vlm, weights, rollout, kl, beta, *rest):
        if kl is not None:
            used.append((beta, beta * kl.std(correction=0).item()))
        return prepare(vlm, weights, rollout, kl, beta, *rest)

    monkeypatch.setattr(train, "prepare", watched)
    flags = "--kl-placement advantage --kl-estimator abs --kl-coef auto --kl-share 0.3 --updates 4"
    assert start(tmp_path / "run", *flags.split(), "--learning-rate", "0.02") == 0
    assert len(used) == 4 and len({beta for beta, _ in used}) == 4
    assert all(term < 0.3001 for _, term in used) and max(term for _, term in used) > 0.2
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [r["teacher_kl_coef"] for r in records if "episodes" in r] == [b for b, _ in used]


def test_a_run_with_an_external_corrector(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OWN_KEY", "right")
    prices = "--teacher-price-in 1000000 --teacher-price-out 2000000"
    options = f"--guidance gtr --teacher-model expert --sft-rows 10 --sft-batch 8 {prices}".split()
    with serve("numberline", key="right") as url:
        asked = [*options, "--teacher-url", url, "--teacher-key-env", "OWN_KEY"]
        assert start(tmp_path / "run", *asked) == 0
        capsys.readouterr()
        assert start(tmp_path / "other", *options, "--teacher-url", url) == 1
        err = capsys.readouterr().err
        assert re.fullmatch(r"error: .* refuses model 'expert'.*401.*valid key.*\n", err)
        assert start(tmp_path / "two", *options, "--teacher-url", url, "--workers", "2") == 1
        assert capsys.readouterr().err == err  # once
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")[1:3]
    assert (
        [r["sft_examples"] for r in records] == [10, 20] == [r["teacher_requests"] for r in records]
    )
    for r in records:
        assert r["teacher_reasoning_score"] == 1.0 and r["sft_loss"] > 0
        assert r["teacher_failed"] == 0
        tokens = r["teacher_prompt_tokens"] + 2 * r["teacher_completion_tokens"]
        assert r["teacher_cost"] == tokens > 0
    _, state = checkpoint_of(tmp_path / "run", 2)
    assert not any(k.startswith("teacher/") for k in state)
    assert "right" not in (tmp_path / "run" / "config.json").read_text()  # the key is not kept


def test_what_a_corrector_was_asked_is_known_after_a_resume(tmp_path, capsys):
    options = [*GTR, "--sft-rows", "6", "--teacher-price-in", "1"]
    with serve("numberline") as url:
        whole = tmp_path / "whole"
        assert start(whole, *options, "--teacher-url", url, "--workers", "1") == 0
        resumed = rewind(whole, tmp_path / "resumed", 1)
        assert train.main(["numberline", "--resume", str(resumed)]) == 0
    assert [r["teacher_requests"] for r in plain(resumed)[1:3]] == [6, 12]
    names = [n for n in plain(whole)[2] if n.startswith("teacher_")]
    assert {"teacher_unreadable", "teacher_prompt_tokens", "teacher_cost"} < set(names)
    assert [plain(resumed)[2][n] for n in names] == [plain(whole)[2][n] for n in names]


def test_a_limit_on_the_step_leaves_its_checkpoint_to_the_teacher(tmp_path):
    options = "--checkpoint-each epoch --epochs 4 --target-kl 1e-9 --weighting score"
    assert start(tmp_path / "run", *options.split()) == 0
    meta = json.loads((tmp_path / "run/checkpoints/00000002/meta.json").read_text())
    entries = meta["teacher"]["history"]["entries"]
    assert [e["update"] for e in entries] == [0, 1, 2]  # an update ends with its first step


def test_a_corrector_that_fails_is_told_of_and_stops_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("turbo.corrector.FIRST_PAUSE", 0.01)
    options = [*GTR, "--sft-rows", "4", "--teacher-timeout", "5"]
    with serve("numberline", fail=1.0) as url:
        assert start(tmp_path / "run", *options, "--teacher-url", url) == 0
    out = capsys.readouterr().out
    assert out.count("4 questions to the teacher went unanswered: ") == 2
    records = read_jsonl(tmp_path / "run" / "metrics.jsonl")[1:3]
    assert [r["teacher_failed"] for r in records] == [4, 8]
    assert [r["sft_examples"] for r in records] == [0, 0]


def test_a_dead_endpoint_is_refused_before_anything_is_made(tmp_path, capsys):
    with serve("numberline") as url:
        pass
    out = tmp_path / "run"
    asked = [*GTR, "--teacher-url", url, "--out", out]
    err = refused(capsys, ["numberline", "--model", tiny_models.fitted_folder(), *asked])
    assert f"--teacher-url {url!r} cannot be reached: Connection refused" in err
    assert not out.exists()


def test_an_endpoint_that_dies_after_the_start_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("turbo.corrector.FIRST_PAUSE", 0.01)
    with serve("numberline") as url:
        pass
    monkeypatch.setattr(train, "check_url", lambda url: None)  # it lived then
    asked = [*GTR, "--sft-rows", "4", "--updates", "1"]
    assert start(tmp_path / "run", *asked, "--teacher-url", url) == 0
    record = read_jsonl(tmp_path / "run" / "metrics.jsonl")[1]
    assert (record["teacher_failed"], record["sft_examples"]) == (4, 0)


def test_a_run_repeats_itself_and_another_seed_does_not(tmp_path):
    for name, seed in (("one", "3"), ("two", "3"), ("other", "4")):
        assert start(tmp_path / name, "--updates", "1", "--seed", seed) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two", 1)
    assert plain(tmp_path / "one") != plain(tmp_path / "other")


def test_an_interrupted_run_saves_and_goes_on(run, tmp_path, monkeypatch, capsys):
    path, own = tmp_path / "with [brackets]", train.train_update

    def update_and_interrupt(r):
        out = own(r)
        if r.update == 2:
            signal.raise_signal(signal.SIGINT)
        return out

    options = ["--updates", "4", "--eval-episodes", "4", "--eval-every", "2", "--save-every", "100"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_update", update_and_interrupt)
        assert start(path, *options) == 130
    out, err = capsys.readouterr()
    assert "stopping: saving what is done" in err
    assert f"continue with: python -m turbo.train numberline --resume {path}" in out
    assert [p.name for p in (path / "checkpoints").iterdir()] == ["00000002"]
    assert train.main(["numberline", "--resume", str(path)]) == 0
    assert_same_run(run, path, 4)


def test_the_second_signal_ends_at_once(monkeypatch):
    asked, told, ended = [], [], []
    monkeypatch.setattr("turbo.scribe.os._exit", ended.append)
    interrupt = Interrupt(lambda: asked.append(True), told.append)
    assert not interrupt.asked
    signal.raise_signal(signal.SIGTERM)
    assert interrupt.asked == signal.SIGTERM and asked == [True] and not ended
    assert len(told) == 1 and "once more to stop at once" in told[0]
    signal.raise_signal(signal.SIGHUP)
    assert not ended
    signal.raise_signal(signal.SIGINT)
    assert ended == [130]


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_closed_terminal_is_heard_unless_nohup_says_otherwise(before, monkeypatch):
    ended = []
    monkeypatch.setattr("turbo.scribe.os._exit", ended.append)
    signal.signal(signal.SIGHUP, before)
    interrupt = Interrupt(lambda: None, lambda text: None)
    for _ in range(2):  # a shell that ends passes its own on
        signal.raise_signal(signal.SIGHUP)
    assert interrupt.asked == (signal.SIGHUP if before == signal.SIG_DFL else 0) and not ended


def test_the_time_limit_ends_a_run_and_saves(tmp_path):
    path = tmp_path / "run"
    assert start(path, "--updates", "50", "--minutes", "0.001") == 0
    last = read_jsonl(path / "metrics.jsonl")[-1]["update"]
    assert 1 <= last < 50
    assert checkpoint_of(path, last)


def refused(capsys, argv):
    """The one line that is printed when `argv` is refused."""
    capsys.readouterr()
    assert train.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def test_an_existing_run_is_not_touched(run, tmp_path, capsys):
    model = tiny_models.fitted_folder()
    before = (run / "metrics.jsonl").read_text()
    err = refused(capsys, ["numberline", "--model", model, "--out", run])
    assert "already exists" in err and "--resume" in err and "--overwrite" in err
    assert (run / "metrics.jsonl").read_text() == before
    (tmp_path / "letter").write_text("dear")
    err = refused(capsys, ["numberline", "--model", model, "--out", tmp_path, "--overwrite"])
    assert "is not a run directory" in err and (tmp_path / "letter").exists()
    err = refused(capsys, ["numberline", "--model", model, "--out", tmp_path / "letter"])
    assert "already exists: choose another --out" in err


def test_overwrite_replaces_a_run(tmp_path):
    for seed in ("1", "2"):
        assert start(tmp_path / "run", "--updates", "1", "--overwrite", "--seed", seed) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["seed"] == 2 and len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 3


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("numberline --seed 1", ["--seed 0, not 1"]),
        (
            "numberline --learning-rate 0.1 --density 0.5",
            ["--learning-rate 0.001, not 0.1", "--density 0.8, not 0.5"],
        ),
        ("numberline --kl-coef auto", ["--kl-coef 0.5, not auto"]),
        ("ezpoints", ["the environment numberline, not ezpoints"]),
    ],
)
def test_a_resumed_run_keeps_its_settings(run, capsys, options, named):
    err = refused(capsys, [*options.split(), "--resume", run])
    assert f"{run} was begun with " in err and "leave that out" in err
    assert all(text in err for text in named)


def test_a_preset_is_for_a_new_run(run, capsys):
    err = refused(capsys, ["numberline", "--preset", "paper", "--resume", run])
    assert "--preset paper is for a new run" in err


def test_resume_may_be_written_with_an_equals_sign_and_without_the_environment(run, tmp_path):
    for i, argv in enumerate((["numberline", "--resume={}"], ["--resume", "{}"])):
        resumed = rewind(run, tmp_path / str(i), 3)
        assert train.main([a.format(resumed) for a in argv]) == 0
        assert_same_run(run, resumed, 4)


def test_a_run_of_another_model_is_refused(run, tmp_path, capsys):
    model = shutil.copytree(tiny_models.random_folder(), tmp_path / "model")
    path = tmp_path / "run"
    assert start(path, "--updates", "1", model=model) == 0
    shutil.copy(tiny_models.fitted_folder() / "model.safetensors", model)
    assert "was trained from another model" in refused(capsys, ["numberline", "--resume", path])
    (model / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refused(capsys, ["numberline", "--resume", path])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chess"], "environment 'chess' is unknown: use points24, ezpoints"),
        (["numberline", "--updates", "-1"], "--updates must be .*, got -1"),
        (["numberline", "--envs", "-8"], "--envs must be .*, got -8"),
        (
            ["numberline", "--learning-rate", "-0.1"],
            "--learning-rate must be zero or more, got -0.1",
        ),
        (["numberline", "--temperature", "0"], "--temperature must be more than 0, got 0.0"),
        (["numberline", "--density", "nan"], "--density must be a finite number, got nan"),
        (["numberline", "--group-size", "1"], "--group-size must be at least 2"),
        (
            ["numberline", "--kl-estimator", "k1"],
            "--kl-estimator k1 has not the gradient of a KL as a loss: use full, forward or k3",
        ),
        (
            ["numberline", "--advantage", "gae", "--skip-certain", "0.1"],
            "--skip-certain 0.1 has no use with --advantage gae",
        ),
        (
            ["numberline", "--model", "qwen2.5-vl-7b"],
            "does not exist: its weights are Qwen/Qwen2.5-VL-7B-Instruct on the Hub",
        ),
        (["numberline", "--hands", "5"], "--hands must be 0 except with points24"),
        (["numberline", "--preset", "huge"], "preset 'huge' is unknown: use tiny or paper"),
        (["numberline", "--guidance", "gtr"], "--teacher-url must be the address of an endpoint"),
        (
            ["numberline", "--guidance", "gtr", "--teacher-url", "http://x/v1"],
            "--teacher-model must be a model's name",
        ),
        (
            ["numberline", "--guidance", "gtr", "--teacher-url", "ftp:x", "--teacher-model", "m"],
            "--teacher-url 'ftp:x' is not an address",
        ),
        (
            ["numberline", "--model", "absent-folder"],
            "'absent-folder' does not exist: give a folder with a model",
        ),
        (["numberline", "--resume", "absent-folder"], "absent-folder is not a run directory"),
        (
            ["numberline", "--envs", "2", "--group-size", "4", "--workers", "1"],
            "--envs must be at least .* = 4, got 2",
        ),
        (
            ["numberline", "--envs", "8", "--group-size", "4", "--workers", "3"],
            "--envs must be at least .* = 12, got 8",
        ),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_cannot_work_is_refused(capsys, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    if "--model" not in argv:
        argv = [*argv, "--model", tiny_models.fitted_folder()]
    assert re.search(message, refused(capsys, argv))
    assert list(tmp_path.iterdir()) == []  # and nothing is left behind


def test_flags_that_do_not_exist_are_refused(capsys):
    assert "--no-such-flag" in refused(capsys, ["numberline", "--no-such-flag", "1"])
    assert "did you mean --learning-rate?" in refused(capsys, ["--lerning-rate", "1"])
    assert "did you mean --preset?" in refused(capsys, ["--prest", "paper"])


def test_settings_of_preset_and_game():
    c = train.parse(["ezpoints", "--preset", "paper", "--updates", "7"])
    assert (c.env, c.advantage, c.lora_rank, c.updates) == ("ezpoints", "gae", 128, 7)
    assert train.parse([]) == TrainConfig()
    own = GAME_DEFAULTS["ezpoints"]
    assert own and all(getattr(TrainConfig(), k) != v for k, v in own.items())
    for argv in (["ezpoints", "--seed", "1"], ["--seed", "1", "ezpoints"]):  # wherever it stands
        assert train.parse(argv) == TrainConfig(env="ezpoints", seed=1, **own)


def test_the_preset_is_that_of_the_model(tmp_path):
    """A large one is not trained with the rate and the short answers of a tiny one."""
    large = tmp_path / "large"
    large.mkdir()
    with (large / "model.safetensors").open("wb") as file:
        file.truncate(300_000_000)
    for model in (str(large), "owner/name"):
        for argv in (["ezpoints", "--model", model], ["--model", model, "ezpoints"]):
            assert train.parse(argv) == replace(defaults("ezpoints", "paper"), model=model)
    wanted = replace(defaults("ezpoints", "paper"), model="qwen2.5-vl-7b", random_weights=True)
    assert train.parse(["ezpoints", "--random-weights", "--model", "qwen2.5-vl-7b"]) == wanted
    for model, more in ((large, ["--preset", "tiny"]), (builtin_path("numberline"), [])):
        c = train.parse(["numberline", "--model", str(model), *more])
        assert c == replace(defaults("numberline", "tiny"), model=str(model))
    with pytest.raises(ValueError, match="preset '' is unknown"):
        train.parse(["numberline", "--preset"])


def test_a_rate_alone_brings_its_end_along():
    base = TrainConfig()
    share = base.final_learning_rate / base.learning_rate
    for argv in (["--learning-rate", "1e-4"], ["--learning_rate=1e-2"]):
        c = train.parse(["points24", *argv])
        assert c.final_learning_rate == pytest.approx(share * c.learning_rate)
    c = train.parse(["points24", "--learning-rate", "1e-3", "--final-learning-rate", "3e-4"])
    assert (c.learning_rate, c.final_learning_rate) == (1e-3, 3e-4)
    assert train.parse(["points24", "--final-learning-rate", "1e-5"]).learning_rate == 7e-4


def test_a_run_with_the_settings_of_another(run, tmp_path, capsys):
    theirs = json.loads((run / "config.json").read_text())["config"]
    c = train.parse(["--like", str(run), "--seed", "5", "--updates", "1"])
    assert (c.env, c.seed, c.updates, c.out, c.resume) == ("numberline", 5, 1, "", "")
    same = {k: v for k, v in asdict(c).items() if k not in ("seed", "updates", "out", "overwrite")}
    assert same == {k: theirs[k] for k in same}
    out = tmp_path / "again"
    assert train.main(["--like", str(run), "--out", str(out)]) == 0
    assert plain(out) == plain(run)
    for more, told in (
        (["--preset", "paper"], "--preset paper and --like"),
        (["--resume", str(run)], "is for a new run: leave it out with --resume"),
    ):
        assert told in refused(capsys, ["numberline", "--like", run, *more])
    assert "is not a run directory" in refused(capsys, ["--like", tmp_path / "absent"])


def test_what_a_resumed_run_is_given_counts_from_then_on(tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    assert start(run, "--updates", "1") == 0
    real, seen = train.train_update, []

    def once(state):
        seen.append(state.update)
        if len(seen) > 1:
            raise NumericalFault("stopped")
        return real(state)

    monkeypatch.setattr(train, "train_update", once)
    assert train.main(["numberline", "--resume", str(run), "--updates", "3"]) == 1
    monkeypatch.setattr(train, "train_update", real)
    capsys.readouterr()
    assert train.main(["numberline", "--resume", str(run)]) == 0  # to the third one
    assert plain(run)[-1]["update"] == 3
    saved = json.loads((run / "config.json").read_text())["config"]
    assert (saved["updates"], saved["out"], saved["resume"]) == (3, str(run), "")
    assert train.main(["numberline", "--resume", str(run), "--json", "--keep", "3"]) == 0
    saved = json.loads((run / "config.json").read_text())["config"]
    assert not saved["json"]
    capsys.readouterr()
    assert train.main(["numberline", "--resume", str(run)]) == 0
    assert "3 updates; go on to a larger number, such as --updates 6" in capsys.readouterr().out


def test_the_checkpoint_of_the_best_evaluation_is_kept(tmp_path, capsys, monkeypatch):
    run, rates, real = tmp_path / "run", [0.9, 0.2, 0.6, 0.6, 0.1, 0.3, 0.5], Run.evaluate

    def told(state, teacher=False):
        return real(state, teacher) | {"success_rate": rates[state.update]}

    monkeypatch.setattr(Run, "evaluate", told)
    flags = "--eval-every 1 --eval-episodes 4 --updates 4 --save-every 10 --keep 1"
    assert start(run, *flags.split(), "--guidance", "none") == 0
    assert [int(p.name) for p in checkpoint.checkpoints(run)] == [2, 4]  # not of the warm start
    said = f"best evaluation: 60.0%, kept as {run / 'checkpoints' / '00000002'}\n"
    assert said in capsys.readouterr().out
    assert train.main(["numberline", "--resume", str(run), "--updates", "6"]) == 0
    assert [int(p.name) for p in checkpoint.checkpoints(run)] == [2, 6]
    assert said in capsys.readouterr().out
    rates += [0.7, 0.4]
    assert train.main(["numberline", "--resume", str(run), "--updates", "8"]) == 0
    assert [int(p.name) for p in checkpoint.checkpoints(run)] == [7, 8]  # a better one
    rates += [0.8, 0.1, 0.2]
    for updates in (9, 11):  # the last evaluation of a sitting is the best one
        assert train.main(["numberline", "--resume", str(run), "--updates", str(updates)]) == 0
    assert [int(p.name) for p in checkpoint.checkpoints(run)] == [9, 11]


def test_learning_rate_is_a_cosine():
    c = TrainConfig(updates=10, learning_rate=1.0, final_learning_rate=0.1)
    rates = [train.learning_rate(c, u) for u in range(12)]
    assert rates[0] == 1.0 and rates[5] == pytest.approx(0.55)
    assert rates[10] == rates[11] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)


def test_a_pool_of_hands_is_fixed_and_drawn_as_dealt():
    one = pool(30, 0)
    assert one == pool(30, 0) != pool(30, 1)
    assert len(set(one)) == 30 and one[:10] == pool(10, 0)
    assert all(tuple(sorted(h)) == h and all(1 <= v <= 10 for v in h) for h in one)
    assert sum(v == 10 for h in one for v in h) > 20  # 10, J, Q and K: four of thirteen
    assert len(pool(715, 0)) == 715
    with pytest.raises(ValueError, match="between 1 and 715"):
        pool(716, 0)


def test_minibatches_cover_every_kept_step_once_an_epoch(tmp_path, monkeypatch):
    seen = []
    own = train.learn

    def learn(run, rollout, data, teacher):
        gradients = run.learner.gradients

        def noted(rollout, data, rows, total, *rest):
            assert total == len(rows)
            seen.append(list(rows))
            return gradients(rollout, data, rows, total, *rest)

        run.learner.gradients = noted
        out = own(run, rollout, data, teacher)
        kept.append(list(data.rows))
        run.learner.gradients = gradients
        return out

    kept = []
    monkeypatch.setattr(train, "learn", learn)
    assert start(tmp_path / "run", "--updates", "1", "--epochs", "2", "--minibatch", "7") == 0
    (rows,) = kept
    assert sorted(r for batch in seen for r in batch) == sorted(rows * 2)
    sizes = [len(b) for b in seen]
    assert len(seen) == 2 * max(1, round(len(rows) / 7)) and max(sizes) - min(sizes) <= 1
    half = len(seen) // 2
    assert [r for b in seen[:half] for r in b] != [
        r for b in seen[half:] for r in b
    ]  # shuffled anew


@pytest.mark.parametrize(
    ("sizes", "minibatch", "count"),
    [((5, 5), 1, 5), ((5, 0), 2, 2), ((4, 7), 4, 3), ((2, 2), 100, 1)],
)
def test_no_minibatch_is_empty_however_the_steps_are_spread(tmp_path, sizes, minibatch, count):
    """An optimiser step without a gradient would still move the policy, by its momentum."""
    settings = tiny_models.new_config(model=str(tiny_models.fitted_folder()), minibatch=minibatch)
    run = Run(settings, tmp_path, Crew())
    seen = []
    run.crew.share = lambda item: list(sizes)  # as worker 0 of two sees it

    def gradients(rollout, data, rows, total, teacher, beta, imitated):
        seen.append((len(rows), total))
        for p in run.learner.parameters():
            p.grad = torch.zeros_like(p)
        return {"policy_loss": torch.zeros(()), "approx_kl": torch.zeros(())}

    run.learner.gradients = gradients
    n = sizes[0]
    train.learn(run, None, StepData(None, None, None, list(range(n)), 1.0, 0.0), None)
    assert len(seen) == count
    assert sum(rows for rows, _ in seen) == n and sum(total for _, total in seen) == sum(sizes)
    assert all(total > 0 for _, total in seen)


@pytest.mark.slow
def test_two_processes_repeat_themselves(tmp_path):
    for name in ("one", "two"):
        options = ["--workers", "2", "--updates", "1"]
        assert start(tmp_path / name, *options) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two", 1)
    records = read_jsonl(tmp_path / "one" / "metrics.jsonl")
    assert [r["update"] for r in records] == [0, 1, 1]
    assert records[1]["episodes"] >= 8 and records[1]["trained_rows"] >= 8  # of both workers


def test_beta_and_counters_start_where_they_should(tmp_path):
    run = Run(tiny_models.new_config(model=str(tiny_models.fitted_folder())), tmp_path, Crew())
    assert (run.update, run.env_steps, run.elapsed, run.beta) == (0, 0, 0.0, 0.5)
    assert run.value_head is None and run.teacher.weights is None


@pytest.mark.slow
def test_what_fails_in_one_worker_alone_ends_the_run_at_once(tmp_path, monkeypatch, capsys):
    """The first worker waited half an hour for one that had no model, say, and said nothing."""
    (tmp_path / "odd.py").write_text(
        "import multiprocessing\n"
        "from turbo.envs.numberline import NumberLine\n"
        "class Odd(NumberLine):\n"
        "    def __init__(self, **options):\n"
        "        super().__init__(**options)\n"
        "        if multiprocessing.parent_process():\n"
        "            raise ValueError('the second worker has none of these')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tiny_models.fitted_folder()
    capsys.readouterr()  # where it is made here, it tells of its progress
    started = time.perf_counter()
    assert start(tmp_path / "run", "--workers", "2", game="odd:Odd") == 2
    assert time.perf_counter() - started < 120
    assert capsys.readouterr().err == "error: the second worker has none of these\n"
    assert not (tmp_path / "run").exists()


def restored_alone(crew, c, paths):
    try:
        Run(c, paths[crew.rank], crew).restore()
    except ValueError as error:
        return str(error)
    return "restored"


@pytest.mark.slow
def test_a_checkpoint_that_one_worker_alone_cannot_read(run, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    for folder in (damaged / "checkpoints").iterdir():
        (folder / "state.safetensors").write_bytes(b"")
    c = TrainConfig(**json.loads((run / "config.json").read_text())["config"])
    started = time.perf_counter()
    told = run_crew(2, restored_alone, c, (run, damaged))
    assert time.perf_counter() - started < 120
    assert "has no checkpoint that is whole" in told and str(damaged) in told
