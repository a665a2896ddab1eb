"""One writer a run directory: a lock that the operating system lets go with its holder.

The lock is `flock` on RUN/lock, held as long as the process lives, however it ends: a lock that was
left behind is free, and is taken over. The file says who holds it, for the error message alone.

Left out: systems without `flock` (Windows); file systems that do not pass it on between machines.
"""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from turbo.checkpoint import LOCK


def acquire(run: Path) -> IO[str]:
    """Lock a run directory, which is made if it is missing; the lock goes when the file closes.

    ValueError if another process has it, naming that process.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = (run / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        holder = _holder(file.read(1000))
        file.close()
        raise ValueError(
            f"{run} is in use by {holder}: wait for its end, stop it, or choose another --out"
        ) from None
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    json.dump({"process": os.getpid(), "host": socket.gethostname(), "since": since}, file)
    file.flush()
    return file


def _holder(text: str) -> str:
    try:
        known = json.loads(text)
        return f"process {known['process']} on {known['host']} since {known['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
