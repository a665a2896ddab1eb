"""One thread for each test process, and tests that need a CUDA device skipped without one."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("unhurried", deadline=None)  # other work may share the cores
settings.load_profile("unhurried")
torch.set_num_threads(1)  # two processes share the cores; more threads would only contend


def pytest_collection_modifyitems(items):
    """Skip what is marked `gpu` where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
