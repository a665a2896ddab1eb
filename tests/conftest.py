"""One thread for each test process; without a CUDA device Triton kernels are interpreted."""

import fcntl
import os
import signal
import tempfile

import pytest
import torch
from hypothesis import settings
from kept_signals import kept_signals

settings.register_profile("fuzz", deadline=None, max_examples=2_900)  # make test-fuzz
# Other work may share the cores; 14 tests of hostile input with 130 cases each are some 1,800.
settings.register_profile("unhurried", deadline=None, max_examples=130)
settings.load_profile("unhurried")  # unless --hypothesis-profile names another one
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
torch.set_num_threads(1)  # two processes share the cores; more threads would only contend
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs behind it
    signal.signal(signal.SIGINT, signal.default_int_handler)  # our processes would inherit it


def pytest_configure(config):
    """A folder for what is made once for all test processes (tiny_models.py); a cache in it."""
    if not hasattr(config, "workerinput"):
        shared = tempfile.TemporaryDirectory(prefix="gtr-turbo-tests-")
        os.environ["GTR_TURBO_TESTS"] = shared.name
        os.environ["GTR_TURBO_CACHE"] = os.path.join(shared.name, "cache")
        config.add_cleanup(shared.cleanup)


def pytest_collection_modifyitems(items):
    """Skip what is marked `gpu` where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def signals():
    """A run takes over Ctrl-C; the tests give it back."""
    with kept_signals():
        yield


@pytest.fixture(scope="session")
def alfworld_games(tmp_path_factory):
    """A folder of small ALFWorld games, two of each task and half as many held out.

    Made once for all test processes, in one go by two makers.
    """
    pytest.importorskip("fast_downward", reason="needs pip install 'gtr-turbo[alfworld]'")
    from turbo.envs.alfworld_games import main

    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with (base / "alfworld.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # the first one makes them
        flags = ["--games", "12", "--held-out", "6", "--jobs", "2"]
        done = main(["--out", str(base / "alfworld"), *flags])
    assert done == 0
    return str(base / "alfworld")
