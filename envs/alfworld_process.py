"""A game of ALFWorld in a process of its own, asked by lines of JSON, or in this one.

AI2-THOR touches what a process has once (threads, standard output, arguments), so each of its games
has a process. `send` and `receive` are apart: many games can work at once, and beside the model. No
pickle; a process that dies or hangs is named, with its last words, and replaced. A text game takes
less time than to ask a process for it, and can be played here as well.

Left out: what is asked (`alfworld_engine`).
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from turbo.envs.alfworld_engine import TextGame, answer

START_SECONDS = 120.0  # the first answer may have to translate a large game


class OwnGame:
    """A game in this process, by default a text game, behind the interface of `GameProcess`."""

    def __init__(self, game=None):
        self.game, self.told = game or TextGame(), {}

    def send(self, asked: dict) -> None:
        """Ask, and be answered at once."""
        self.told = answer(self.game, asked)

    def receive(self) -> dict:
        """The answer to what was sent."""
        return self.told

    def close(self) -> None:
        """Nothing is left behind."""


class Gone(RuntimeError):
    """The process of a game died or hung."""


class GameProcess:
    """One game; `kind` is "text" or "thor", or "make" for a process that makes games. `command` is
    what is run (empty: the engine here)."""

    def __init__(self, kind: str = "text", timeout: float = 60.0, command: Sequence[str] = ()):
        self.kind, self.timeout = kind, timeout
        self.words = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        own = [sys.executable, "-m", "turbo.envs.alfworld_engine", *([kind] * (kind != "text"))]
        # turbo may be imported from a checkout that is not the working directory
        root = str(Path(sys.modules["turbo"].__file__).resolve().parent.parent)
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.child = subprocess.Popen(
            list(command) or own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            env={**os.environ, "PYTHONPATH": path},
            # Ctrl-C is for this process to deal with; and what a simulator starts ends with it
            start_new_session=True,
        )
        self.begun, self.rest = False, b""

    def send(self, asked: dict) -> None:
        """Ask; the answer is fetched by `receive`."""
        try:
            self.child.stdin.write(json.dumps(asked).encode() + b"\n")
            self.child.stdin.flush()
        except (BrokenPipeError, ValueError) as error:
            raise Gone(self._end("ended")) from error

    def receive(self) -> dict:
        """The answer to what was sent; RuntimeError if the game failed, Gone if it died or hung."""
        seconds = self.timeout if self.begun else max(START_SECONDS, self.timeout)
        told = json.loads(self._line(seconds))
        self.begun = True
        if "error" in told:
            raise RuntimeError(f"ALFWorld's engine failed: {told['error']}")
        return told

    def ask(self, asked: dict) -> dict:
        """Send and receive."""
        self.send(asked)
        return self.receive()

    def _line(self, seconds: float) -> bytes:
        until, out = time.monotonic() + seconds, self.child.stdout.fileno()
        while b"\n" not in self.rest:
            left = until - time.monotonic()
            if left <= 0 or not _is_readable(out, left):
                self._kill()
                raise Gone(self._end(f"gave no answer for {seconds:.0f} seconds"))
            part = os.read(out, 1 << 20)
            if not part:
                raise Gone(self._end("ended"))
            self.rest += part
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    def _end(self, what: str) -> str:
        self.child.wait()
        self.words.seek(0)
        last = self.words.read().decode(errors="replace").strip().splitlines()[-3:]
        told = "; its last words: " + " | ".join(last) if last else ""
        return f"the process of an ALFWorld game {what} (status {self.child.returncode}){told}"

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)

    def close(self) -> None:
        """End the process. Closing again does nothing."""
        if self.child.poll() is None:
            self._kill()
        self.child.wait()
        for stream in (self.child.stdin, self.child.stdout, self.words):
            with contextlib.suppress(OSError):  # what was to be sent to a process that is gone
                stream.close()

    def __del__(self):
        if hasattr(self, "child"):
            self.close()


class LastingGame:
    """A game whose process is begun anew where it died or hung, and brought to where it was.

    Games are deterministic: told the same since its last reset, a new process is in the same
    state, and the episode goes on as if nothing had happened. A second failure is raised.
    """

    def __init__(self, kind: str = "text", timeout: float = 60.0, command: Sequence[str] = ()):
        self._begin = partial(GameProcess, kind, timeout, command)
        self.process, self.asked = self._begin(), []

    def send(self, asked: dict) -> None:
        """Ask; the answer is fetched by `receive`."""
        kept = [] if asked["do"] == "reset" else [a for a in self.asked if a["do"] != "plan"]
        self.asked = [*kept, asked]
        with contextlib.suppress(Gone):  # `receive` meets it again
            self.process.send(asked)

    def receive(self) -> dict:
        """The answer to what was sent; RuntimeError if the game failed, Gone if it died again."""
        try:
            return self.process.receive()
        except Gone as error:
            print(f"warning: {error}; another one takes its place", file=sys.stderr)
        self.close()
        self.process = self._begin()
        return [self.process.ask(asked) for asked in self.asked][-1]

    def close(self) -> None:
        """End the process."""
        self.process.close()


def _is_readable(file: int, seconds: float) -> bool:
    """Whether there is something to read, or the end, in time; file numbers may pass 1,024."""
    poll = select.poll()
    poll.register(file, select.POLLIN)
    return bool(poll.poll(max(1, seconds * 1000)))
