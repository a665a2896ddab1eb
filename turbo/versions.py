"""What made a result: the versions that it depends on, as every record of a run has them.

Left out: the record itself (`turbo.checkpoint`), devices (`bench.harness`).
"""

import contextlib
import platform
import re
import subprocess
from pathlib import Path

import numpy
import torch

import turbo


def processor() -> str:
    """The processor's name as the operating system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def versions() -> dict[str, str]:
    """What a result depends on: versions, Python, processor, the commit of a source checkout."""
    import transformers  # which takes a while

    root = Path(__file__).resolve().parent.parent
    commit = ""
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        with contextlib.suppress(OSError):  # no git
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            commit = done.stdout.strip()
    return {
        "gtr-turbo": turbo.__version__,
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": numpy.__version__,
        "processor": processor(),
    }
