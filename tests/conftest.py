"""One thread for each test process; without a CUDA device Triton kernels are interpreted."""

import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("fuzz", deadline=None, max_examples=2_500)  # make test-fuzz
# Other work may share the cores; 16 tests of hostile input with 130 cases each are over 2,000.
settings.register_profile("unhurried", deadline=None, max_examples=130)
settings.load_profile("unhurried")  # unless --hypothesis-profile names another one
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
torch.set_num_threads(1)  # two processes share the cores; more threads would only contend


def pytest_collection_modifyitems(items):
    """Skip what is marked `gpu` where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
