"""What answers Ctrl-C, SIGTERM and SIGHUP: a run in the tests' own process takes it over."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def kept_signals() -> Iterator[None]:
    """Afterwards the handlers are those that were there before."""
    before = [signal.getsignal(n) for n in NUMBERS]
    try:
        yield
    finally:
        for number, handler in zip(NUMBERS, before, strict=True):
            signal.signal(number, handler)
