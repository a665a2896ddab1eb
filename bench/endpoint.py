"""The local corrector of examples/, run beside what asks it: an external teacher without a bill.

Left out: what it answers (`examples.corrector_server`) and who asks (`turbo.corrector`).
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PORT = 8765
URL = f"http://127.0.0.1:{PORT}/v1"


@contextmanager
def corrector(needed: bool = True, port: int = PORT) -> Iterator[None]:
    """The endpoint in a process of its own, for as long as the block runs, if it is needed.

    At URL unless another port is given. RuntimeError where it does not start.
    """
    if not needed:
        yield
        return
    program = [sys.executable, "-m", "examples.corrector_server", "--port", str(port)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as server:
        try:
            if f"http://127.0.0.1:{port}/v1" not in server.stdout.readline():
                raise RuntimeError(f"the corrector did not start: is port {port} in use?")
            yield
        finally:
            server.terminate()
