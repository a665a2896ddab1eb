"""Begins a process otherwise than `subprocess` does: with a limit on the size of files (as on a
disk that is full), or with the terminal on its standard input as the one that controls it.

A program of its own, in place of `preexec_fn` and `fork`: what runs between a fork and an exec of a
process with threads may wait forever for a lock that one of them held.
"""

import fcntl
import os
import resource
import signal
import sys
import termios


def with_file_limit(size: int, command: list[str]) -> list[str]:
    """The command, none of whose files grows beyond `size` bytes."""
    return [sys.executable, __file__, "limit", str(size), *command]


def in_terminal(command: list[str]) -> list[str]:
    """The command, which Ctrl-C in the terminal on its standard input reaches.

    It must lead a session: give `start_new_session=True` to `Popen`.
    """
    return [sys.executable, __file__, "terminal", "", *command]


if __name__ == "__main__":
    _, kind, size, *argv = sys.argv
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    else:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run behind nohup
    os.execv(argv[0], argv)
