"""bench/learn.py: what is on record stays there when the runs' folders are gone."""

import shutil
from pathlib import Path

import pytest

from bench import learn

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def gather(what, out, seeds, capsys):
    argv = ["--what", what, "--seeds", *seeds, "--no-train", "--out", str(out)]
    status = learn.main([*argv, "--runs", str(out / "runs")])
    return status, capsys.readouterr()


@pytest.mark.parametrize(
    ("what", "seeds"), [("ezpoints", "012"), ("points24", "012"), ("alfworld", "0")]
)
def test_the_committed_pages_are_those_of_the_committed_data(what, seeds, tmp_path, capsys):
    for end in ("csv", "md"):
        shutil.copy(RESULTS / f"{what}.{end}", tmp_path)
    status, told = gather(what, tmp_path, seeds, capsys)
    assert status == 0 and f"on record: GTR-Turbo, seed {seeds[-1]}, of commit " in told.out
    for end in ("csv", "md"):
        name = f"{what}.{end}"
        assert (tmp_path / name).read_bytes() == (RESULTS / name).read_bytes(), name
    assert (tmp_path / f"{what}.png").stat().st_size > 1e4


def test_what_was_evaluated_otherwise_is_not_taken(tmp_path, capsys, monkeypatch):
    shutil.copy(RESULTS / "ezpoints.csv", tmp_path)
    for flags in ("ezpoints --eval-episodes 400", "ezpoints --updates 31"):
        monkeypatch.setitem(learn.DEMONSTRATIONS, "ezpoints", [("GTR-Turbo", flags)])
        status, told = gather("ezpoints", tmp_path, "0", capsys)
        assert status == 1 and "no run is complete" in told.err
    data = (tmp_path / "ezpoints.csv").read_bytes()
    assert data == (RESULTS / "ezpoints.csv").read_bytes()
