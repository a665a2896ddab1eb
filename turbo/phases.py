"""Where an update stands, and where its time went: phases, their progress, their seconds.

Left out: showing them (`turbo.console`); the other workers, whose phases are much the same.
"""

import time


class Phases:
    """The phases of an update, one after the other; `restart` forgets them for the next update."""

    def __init__(self):
        self.restart("")

    def restart(self, name: str) -> None:
        """An update begins, with this phase."""
        self.name = name  # of the phase under way; nothing between two updates
        self.done, self.total = 0, 0  # steps, episodes or minibatches; 0 of 0 where not counted
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def begin(self, name: str) -> None:
        """A phase begins, and the one before it ends."""
        self.end()
        self.name = name
        self.expect(0)

    def expect(self, total: int) -> None:
        """So much is to be done in this phase; `done` counts it."""
        self.done, self.total = 0, total

    def end(self) -> None:
        """The phase under way is over."""
        now = time.perf_counter()
        if self.name:
            self.seconds[self.name] = now - self._last
        self.name, self._last = "", now

    @property
    def elapsed(self) -> float:
        """Seconds since the update began."""
        return time.perf_counter() - self._start
