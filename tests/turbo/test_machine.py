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
