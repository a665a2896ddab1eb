"""A run as one page: `python -m turbo.view RUN [RUN2]` writes RUN/view.html.

Learning curves, and the sampled episodes with their pictures, prompts, thoughts and verdicts, of
one run or of several side by side. The file holds all that it shows: no server, no network. With
`--serve` the same page is served on this machine alone, and follows a run that still trains.

What a model wrote is data: it is escaped where it is embedded, the page makes text nodes of it, and
a content security policy lets no script run but the page's own, by its hash.

Left out: what is shown of a run (`turbo.view_data`), how it is drawn (turbo/page).
"""

import base64
import hashlib
import json
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

import tyro

from turbo import checkpoint
from turbo.flags import conclude, read_flags
from turbo.log import METRICS
from turbo.view_data import read_run, state_of
from turbo.view_seeds import by_seed, merged

PAGE = Path(__file__).parent / "page"
SCRIPTS = ("draw.js", "charts.js", "episodes.js", "main.js")
HOST = "127.0.0.1"
MOST, BROWSED = 6, 2  # runs of a page, as many as there are colours; those with episodes


@dataclass
class ViewConfig:
    """Show a run, or several side by side, as one HTML file that needs no network: learning curves,
    and a browser of sampled episodes with pictures, thoughts, KL to the teacher and verdicts.

    python -m turbo.view runs/first

    python -m turbo.view runs/first runs/second --out both.html --open

    python -m turbo.view runs/kl-* runs/none-* --mean       # two lines, means over seeds

    python -m turbo.view runs/first --serve 8000
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    """run directories of `turbo.train`, up to six to compare, such as seeds, of which the first two
    show their episodes; they are only read, and may still be training"""
    mean: bool = False
    """show runs that differ in their seed alone as one, of as many seeds as there are: means, and
    of three or more 95 % intervals (Student's t); the episodes are those of the first seed"""
    out: Annotated[str, tyro.conf.arg(metavar="FILE")] = ""
    """file to write (empty: view.html in the first run's directory)"""
    serve: Annotated[int | None, tyro.conf.arg(metavar="PORT")] = None
    """write no file, but serve the page at this port of 127.0.0.1 until Ctrl-C, following runs that
    still train (0: any free port)"""
    open: bool = False
    """open the page in the browser"""
    episodes: int = 2000
    """most episodes of each run in the page, at even distances over the run"""


def check(c: ViewConfig) -> list[Path]:
    """Refuse what cannot be shown; the run directories."""
    if not c.runs or (not c.mean and len(c.runs) > MOST):
        raise ValueError(
            f"give a run directory, or up to {MOST} to compare, got {len(c.runs)}; with --mean, "
            "those that differ in their seed alone are one"
        )
    if c.episodes < 1:
        raise ValueError(f"--episodes must be at least 1, got {c.episodes}")
    if c.serve is not None and not 0 <= c.serve <= 65_535:
        raise ValueError(f"--serve must be a port, 0 to 65535, got {c.serve}")
    if c.serve is not None and c.out:
        raise ValueError("--serve writes no file: leave --out or --serve out")
    runs = [Path(run) for run in c.runs]
    for run in runs:
        checkpoint.read_run(run)
    if (found := len(grouped(runs, c.mean))) > MOST:
        raise ValueError(f"--mean: up to {MOST} settings can be compared, these runs have {found}")
    return runs


def grouped(runs: Sequence[Path], mean: bool) -> list[list[Path]]:
    """What is shown together: seeds of one setting, or every run for itself."""
    return by_seed(runs) if mean else [[run] for run in runs]


def gather(runs: Sequence[Path], most: int, mean: bool = False) -> dict:
    """All data of a page."""
    state = ",".join(map(state_of, runs))  # before the files are read: what comes then is news
    shown = []
    for place, (first, *others) in enumerate(grouped(runs, mean)):
        with_episodes = read_run(first, most if place < BROWSED else 0)
        shown.append(merged([with_episodes, *(read_run(run, 0) for run in others)]))
    return {
        "state": state,
        "runs": shown,
        "metrics": {k: {"meaning": m.meaning, "unit": m.unit} for k, m in METRICS.items()},
    }


def embed(data: dict) -> str:
    """JSON that can stand in a script element: nothing in it can end the element."""
    return json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def page(data: dict, live: bool = False) -> str:
    """The HTML file; a live one asks the server that it came from for news."""
    style = (PAGE / "view.css").read_text(encoding="utf-8")
    script = "\n".join((PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    source = "'self'" if live else "'none'"
    policy = (
        f"default-src 'none'; script-src {fingerprint(script)}; style-src {fingerprint(style)}; "
        f"img-src data:; connect-src {source}; base-uri 'none'; "
        "form-action 'none'"
    )
    parts = {
        "POLICY": policy,
        "STYLE": style,
        "SCRIPT": script,
        "LIVE": "live" if live else "file",
        "DATA": embed(data),
    }
    html = (PAGE / "view.html").read_text(encoding="utf-8")
    for name, text in parts.items():  # the data comes last: nothing is looked for in it
        before, mark, after = html.partition("{{" + name + "}}")
        assert mark
        html = before + text + after
    return html


def fingerprint(text: str) -> str:
    """How a content security policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class Server:
    """The page of some runs on 127.0.0.1: `/` is the page, `/data.json` its data as it is now."""

    def __init__(self, runs: list[Path], most: int, port: int, mean: bool = False):
        self.runs, self.most, self.mean = runs, most, mean
        try:
            self.http = ThreadingHTTPServer((HOST, port), partial(_Request, self))
        except OSError as error:
            raise ValueError(
                f"port {port} cannot be used: {error}; choose another one, or --serve 0 for any"
            ) from error
        self.port = self.http.server_port
        self.address = f"http://{HOST}:{self.port}/"

    def answer(self, target: str) -> tuple[int, str, str]:
        """Status, kind and body of the answer to a request."""
        path, _, known = target.partition("?state=")
        if path not in ("/", "/data.json"):
            return 404, "text/plain", "there is / and /data.json"
        try:
            if path == "/":
                return 200, "text/html", page(gather(self.runs, self.most, self.mean), live=True)
            if known and known == ",".join(map(state_of, self.runs)):
                return 204, "text/plain", ""
            return 200, "application/json", embed(gather(self.runs, self.most, self.mean))
        except (ValueError, OSError) as error:  # such as a run that is being replaced
            return 503, "text/plain", str(error)


class _Request(BaseHTTPRequestHandler):
    """One request; only pages of this machine itself may ask."""

    def __init__(self, server: Server, *arguments):
        self.page_server = server
        super().__init__(*arguments)

    def do_GET(self) -> None:
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host in (HOST, "localhost"):
            status, kind, body = self.page_server.answer(self.path)
        else:  # a foreign name that was made to lead here
            status, kind, body = 403, "text/plain", f"ask {self.page_server.address}"
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        """The console stays as it is."""


def main(argv: list[str] | None = None) -> int:
    """Write or serve the page; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        c = read_flags(ViewConfig, argv, "turbo.view")
        runs = check(c)
        if c.serve is not None:
            return serve(Server(runs, c.episodes, c.serve, c.mean), c.open)
        out = Path(c.out) if c.out else runs[0] / "view.html"
        shown = page(gather(runs, c.episodes, c.mean))
        with checkpoint.writing(out):
            checkpoint.write_text(out, shown)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; open it in a browser")
    if c.open:
        webbrowser.open(out.resolve().as_uri())
    return 0


def serve(server: Server, show: bool) -> int:
    """Answer until Ctrl-C."""
    print(f"{server.address} shows the run as it goes on; Ctrl-C ends this", flush=True)
    if show:
        webbrowser.open(server.address)
    try:
        server.http.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.http.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(conclude(main))
