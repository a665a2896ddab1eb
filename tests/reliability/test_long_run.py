"""A long run does not grow: 200 updates in one process, memory and open files watched."""

import os
from pathlib import Path

import pytest
import tiny_models
from trainer import FLAGS

from turbo import train


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """File descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("guidance", ["kl", "sft"])
def test_two_hundred_updates(tmp_path, monkeypatch, guidance):
    """Resident memory ends within 5 % of what it was after 20 updates; no file stays open."""
    own, memory, files = train.train_update, [], []

    def watched(run):
        memory.append(resident())
        files.append(open_files())
        return own(run)

    monkeypatch.setattr(train, "train_update", watched)
    flags = [*FLAGS.split(), "--model", str(tiny_models.fitted_folder()), "--updates", "200"]
    flags += ["--save-every", "20", "--guidance", guidance, "--sft-rows", "4", "--sft-max", "64"]
    flags += [
        "--envs",
        "4",
        "--group-size",
        "2",
        "--steps-per-update",
        "4",
        "--teacher-sample",
        "4",
    ]
    assert train.main(["numberline", "--out", str(tmp_path / "run"), *flags]) == 0
    assert len(memory) == 200
    print([f"{m / 1e6:.0f} MB" for m in memory[::20]], f"{memory[-1] / 1e6:.0f} MB")
    assert memory[-1] < 1.05 * memory[20]
    assert len(set(files[1:])) == 1
