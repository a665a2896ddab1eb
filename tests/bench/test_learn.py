"""bench/learn.py: what is on record stays there when the runs' folders are gone."""

import json
import shutil
from pathlib import Path

import pytest

from bench import learn
from turbo.hub import model_sha256

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def gather(what, out, seeds, capsys):
    argv = ["--what", what, "--seeds", *seeds, "--no-train", "--out", str(out)]
    status = learn.main([*argv, "--runs", str(out / "runs")])
    return status, capsys.readouterr()


@pytest.mark.parametrize("what", list(learn.DEMONSTRATIONS))
def test_the_committed_pages_are_those_of_the_committed_data(what, tmp_path, capsys):
    for name in ("settings.json", f"{what}.csv", f"{what}.md"):
        shutil.copy(RESULTS / name, tmp_path)
    status, told = gather(what, tmp_path, "0" if what == "alfworld" else "012", capsys)
    assert status == 0 and "on record: GTR-Turbo, seed 0" in told.out
    for name in ("settings.json", f"{what}.csv", f"{what}.md"):
        assert (tmp_path / name).read_bytes() == (RESULTS / name).read_bytes(), name
    assert (tmp_path / f"{what}.png").stat().st_size > 1e4


def test_other_seeds_stay_on_record(tmp_path, capsys):
    for name in ("settings.json", "ezpoints.csv", "ezpoints.md"):
        shutil.copy(RESULTS / name, tmp_path)
    status, told = gather("ezpoints", tmp_path, "1", capsys)
    assert status == 0 and told.out.count("on record: ") == 3
    assert (tmp_path / "ezpoints.csv").read_bytes() == (RESULTS / "ezpoints.csv").read_bytes()


@pytest.mark.parametrize("flags", ["ezpoints --eval-episodes 400", "ezpoints --kl-coef 3"])
def test_runs_of_other_settings_are_not_taken_and_not_dropped(flags, tmp_path, capsys, monkeypatch):
    for name in ("settings.json", "ezpoints.csv"):
        shutil.copy(RESULTS / name, tmp_path)
    plain = learn.DEMONSTRATIONS["ezpoints"]
    monkeypatch.setitem(learn.DEMONSTRATIONS, "ezpoints", [("GTR-Turbo", flags)])
    status, told = gather("ezpoints", tmp_path, "0", capsys)
    assert status == 1 and "no run is complete" in told.err
    monkeypatch.setitem(learn.DEMONSTRATIONS, "ezpoints", plain)
    known = json.loads((tmp_path / "settings.json").read_text())
    known["ezpoints/GTR-Turbo/1"]["kl_coef"] = "3"
    (tmp_path / "settings.json").write_text(json.dumps(known))
    status, told = gather("ezpoints", tmp_path, "0", capsys)
    assert status == 1 and "nothing is written: ezpoints/GTR-Turbo/1 of" in told.err
    assert (tmp_path / "ezpoints.csv").read_bytes() == (RESULTS / "ezpoints.csv").read_bytes()


def test_an_unfinished_run_is_not_taken_from_the_record(tmp_path, capsys):
    for name in ("settings.json", "ezpoints.csv"):
        shutil.copy(RESULTS / name, tmp_path)
    config = learn.settings("ezpoints", 0)
    model = model_sha256(config)
    learn.run_folder(tmp_path / "runs", "ezpoints", "GTR-Turbo", config, model).mkdir(parents=True)
    status, told = gather("ezpoints", tmp_path, "0", capsys)
    assert status == 1 and "incomplete, left out" in told.err and "nothing is written" in told.err
