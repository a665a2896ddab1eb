"""What the machine has, and what this process took of it."""

import os
import re
import resource
import sys
from pathlib import Path

import torch

# Where Linux tells what a container may use: a number of bytes, or "max"; of both its versions
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_bytes() -> int:
    """Memory of this machine, or of the container that this is in, where that may use less."""
    told = [Path(name).read_text().strip() for name in LIMITS if Path(name).is_file()]
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *(int(text) for text in told if text.isdigit())])


def peak_bytes(device: torch.device) -> int:
    """Most memory that was held so far: reserved on the GPU, or resident of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage counts a parent's memory too
        found = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)
        if found:
            return 1024 * int(found[1])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
