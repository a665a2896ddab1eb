"""What the machine has, and what this process took."""

from pathlib import Path

import torch

from turbo import machine


def test_peak_bytes_grow_with_what_is_held(monkeypatch):
    before = machine.peak_bytes(torch.device("cpu"))
    held = torch.ones(before // 4)  # as many bytes again, on top of what is resident now
    assert machine.peak_bytes(torch.device("cpu")) >= max(before, held.nbytes)
    monkeypatch.setattr(machine, "Path", lambda name: Path("absent"))
    assert machine.peak_bytes(torch.device("cpu")) > 0  # where there is no /proc


def test_the_host_has_more_than_a_gigabyte():
    assert 1 << 30 < machine.host_bytes() < 1 << 50


def test_a_container_may_have_less_than_the_machine(tmp_path, monkeypatch):
    files = [tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"]
    monkeypatch.setattr(machine, "LIMITS", [str(file) for file in files])
    physical = machine.host_bytes()  # neither file is there
    files[0].write_text("max\n")
    files[1].write_text(f"{physical * 8}\n")
    assert machine.host_bytes() == physical
    files[0].write_text("3000000000\n")
    assert machine.host_bytes() == 3_000_000_000
