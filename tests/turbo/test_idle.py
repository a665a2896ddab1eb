"""turbo/idle.py: flags that would do nothing are refused; presets and older runs are not.

That the study's table is accepted is tested with it (tests/bench/test_study.py).
"""

import dataclasses
import json
from pathlib import Path

import pytest

from turbo import checkpoint, train
from turbo.config import TrainConfig
from turbo.idle import check_idle
from turbo.presets import GAME_DEFAULTS, PRESETS, defaults

URL = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (f"--teacher-url {URL}", f"--teacher-url {URL} is for --guidance gtr"),
        ("--guidance sft --teacher-model m", "--teacher-model m is for --guidance gtr"),
        ("--guidance none --teacher initial", "--teacher initial has no use with --guidance none"),
        (
            f"--guidance gtr --teacher-url {URL} --teacher-model m --teacher initial",
            "--teacher initial has no use with --guidance gtr",
        ),
        ("--density 0", "--density 0.0 keeps no entry.*give more than 0"),
        ("--history-length 10", "--history-length 10 is for alfworld alone"),
        ("--critic-learning-rate 1e-3", "--critic-learning-rate 0.001.*add --advantage gae"),
        ("--preset paper --kl-placement loss", "--kl-placement loss makes no KL of .*clip: add"),
        ("--gamma 0.5", "--gamma 0.5 is for the critic: add --advantage gae"),
        ("--kl-share 0.2", "--kl-share 0.2 is for --kl-coef auto"),
        ("--weighting sma --ema-alpha 0.3", "--ema-alpha 0.3 is for --weighting ema"),
    ],
)
def test_a_flag_that_does_nothing_is_refused(flags, told):
    with pytest.raises(ValueError, match=told):
        train.parse(["numberline", *flags.split()])


@pytest.mark.parametrize(
    "flags",
    [
        f"numberline --guidance gtr --teacher-url {URL} --teacher-model m",
        "numberline --teacher initial",
        "numberline --guidance sft --teacher initial --density 0.01",
        "alfworld --history-length 10",
        "numberline --advantage gae --critic-learning-rate 1e-3",
        "numberline --preset paper --critic-learning-rate 1e-4",
        "numberline --preset paper --advantage group --group-size 4",  # the preset sets the rate
        "--preset paper --guidance none numberline",
        "numberline --guidance none --kl-coef 20",  # one of several runs with the same flags
        "numberline --advantage gae --gamma 0.5 --skip-certain 0",
        "numberline --kl-estimator k3",
        "numberline --guidance none --kl-estimator k1",
    ],
)
def test_a_flag_that_does_something_is_not(flags):
    train.parse(flags.split())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("env", GAME_DEFAULTS)
def test_what_a_preset_sets_is_accepted(env, preset):
    base = defaults(env, preset)
    check_idle(base, base)


def test_the_runs_of_the_study_that_were_saved_are_accepted():
    root = Path(__file__).resolve().parents[2]
    saved = json.loads((root / "docs/study/settings.json").read_text(encoding="utf-8"))
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    assert saved
    for settings in saved.values():
        c = TrainConfig(**{k: v for k, v in settings.items() if k in known and k != "model"})
        check_idle(c, TrainConfig())


def test_an_older_run_with_idle_settings_goes_on(tmp_path):
    old = dict(density=0.0, teacher_url=URL, history_length=3, critic_learning_rate=1.0, out="x")
    run = tmp_path / "run"
    config = dataclasses.replace(defaults("numberline", "tiny"), **old)
    checkpoint.create_run(run, config, "")
    c = train.parse(["numberline", "--resume", str(run), "--updates", "99"])
    assert (c.updates, c.density, c.out) == (99, 0.0, "x")
    with pytest.raises(ValueError, match="--teacher-model '', not m"):
        train.parse(["numberline", "--resume", str(run), "--teacher-model", "m"])


def test_out_beside_resume_is_refused(tmp_path, capsys):
    """The run goes on in its own folder, whatever that was called when it was made."""
    run = str(tmp_path / "run")
    checkpoint.create_run(tmp_path / "run", defaults("numberline", "tiny"), "")
    for out in (str(tmp_path / "other"), run):
        assert train.main(["numberline", "--resume", run, "--out", out]) == 2
        said = capsys.readouterr().err
        assert said == f"error: --out {out} is for a new run: leave it out with --resume\n"
    assert not (tmp_path / "other").exists()
