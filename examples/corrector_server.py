"""A corrector endpoint on this machine: GTR's guidance without a key, a bill or a large model.

    python -m examples.corrector_server --env points24 --port 8000

It speaks the part of the OpenAI chat protocol that `turbo.corrector` uses, and it knows nothing but
what it is sent. The cards are read from the picture: at the start a few hundred labelled pictures
are drawn, and a card is the one of them that it correlates with best. The formula so far is read
from the task. The environment is put into that state, and its exact expert writes the answer, in
the tiny model's own way of writing. Where the expert has nothing to show, because the cards cannot
make the target, the student's answer comes back as it was.

`usage` counts a token for every 4 characters of JSON, and one for every 28 x 28 pixels of picture.
Left out: Blackjack, streaming, everything else of the protocol.
"""

import argparse
import base64
import io
import json
import random
import re
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from turbo.envs.cards import tokenize
from turbo.envs.make import make, tiny_kwargs

CARDS = {"points24": 4, "ezpoints": 2}  # in a picture, each in its own column
READ = (*CARDS, "numberline")
PICTURES = 400  # drawn for the reader to learn from
LIMIT = 10_000_000  # bytes of a request


class PictureReader:
    """Reads what is dealt from pictures of one size: the nearest of the labelled ones says it."""

    def __init__(self, name: str, width: int, height: int):
        options = tiny_kwargs(name)
        if (width, height) != options["canvas"]:
            options = {"canvas": (width, height)}  # a large model's picture
        env = make(name, **options)
        seen = {}
        for seed in range(PICTURES):
            picture, info = env.reset(seed=seed)
            dealt = info.get("hand") or [(env.current, env.target)]
            for piece, label in zip(self._pieces(picture, name), dealt, strict=True):
                seen[piece.tobytes()] = piece, label
        self.name, self.shape = name, piece.shape
        self.labels = [label for _, label in seen.values()]
        self.examples = np.stack([_normal(piece) for piece, _ in seen.values()])  # [N, pixels]

    def read(self, picture: np.ndarray) -> list:
        """What is dealt, as `env.reset(options={"hand": ...})` takes it."""
        pieces = self._pieces(picture, self.name)
        if any(piece.shape != self.shape for piece in pieces):
            raise ValueError(f"the picture shows no cards of {self.name}: send its own picture")
        labels = [self.labels[int(np.argmax(self.examples @ _normal(p)))] for p in pieces]
        return labels if self.name in CARDS else list(labels[0])

    @staticmethod
    def _pieces(picture: np.ndarray, name: str) -> list[np.ndarray]:
        """The parts of a picture that are read one by one; red and black ink look the same."""
        if name not in CARDS:
            return [picture.min(axis=-1)]
        return [card_top(cell) for cell in np.array_split(picture, CARDS[name], axis=1)]


def card_top(cell: np.ndarray) -> np.ndarray:
    """The upper half of the card in a cell: where its rank is, however it was shifted."""
    card = np.abs(cell.astype(int) - cell[0, 0]).max(axis=-1) > 30  # [H, W]; a corner shows felt
    rows = card.any(axis=1)
    top = int(rows.argmax())
    height = int((~rows[top:]).argmax()) or len(rows) - top
    columns = np.flatnonzero(card[top : top + height].any(axis=0))
    if not columns.size:
        raise ValueError("a cell of the picture is empty: send the environment's own picture")
    return cell[top : top + height // 2, columns[0] : columns[-1] + 1].min(axis=-1)


def _normal(piece: np.ndarray) -> np.ndarray:
    flat = piece.astype(float).ravel()
    flat -= flat.mean()
    return flat / max(float(np.linalg.norm(flat)), 1e-9)


class Expert:
    """Answers for one environment, from nothing but the picture and the texts."""

    def __init__(self, name: str):
        if name not in READ:
            raise ValueError(f"pictures of {name!r} cannot be read here: use {', '.join(READ)}")
        self.name, self._lock = name, threading.Lock()
        self._readers: dict[tuple, PictureReader] = {}
        self.reader(*tiny_kwargs(name)["canvas"])

    def reader(self, width: int, height: int) -> PictureReader:
        """The reader of one picture size, made when the size is first seen."""
        if not 56 <= min(width, height) <= max(width, height) <= 1_024:
            raise ValueError(f"a picture of {width} x {height}: send sides of 56 to 1024 pixels")
        with self._lock:
            if (width, height) not in self._readers:
                self._readers[width, height] = PictureReader(self.name, width, height)
            return self._readers[width, height]

    def correct(self, picture: np.ndarray, task: str, student: str) -> str:
        """The expert's answer, or the student's where there is nothing to correct it with."""
        height, width, _ = picture.shape
        env = self._environment(self.reader(width, height).read(picture), task)
        # As a model at temperature 0: the same question has the same answer.
        rng = np.random.default_rng(zlib.crc32(picture.tobytes() + task.encode()))
        return student if env is None else env.expert_answer(rng) or student

    def _environment(self, hand: list, task: str):
        """The environment in the state that the task tells; None where no play leads there."""
        options, deck = {"hand": hand}, {}
        if self.name == "points24":
            deck = {"faces_ten": "J counts 11" not in task}
            target = re.search(r"The target is (\d+)", task)
            options |= {"target": int(target[1])} if target else {}
        env = make(self.name, **tiny_kwargs(self.name), **deck)
        env.reset(seed=0, options=options)
        if self.name not in CARDS:
            return env
        formula = re.search(r'The formula so far: "([^"]*)"\s*$', task)
        if not formula:
            raise ValueError('the task does not end in The formula so far: "...": send its prompt')
        for token in tokenize(formula[1]):
            if token not in env.actions:
                return None
            env.step(env.actions.index(token))
        return env if env.game.formula == formula[1] else None


def read_request(request: dict) -> tuple[np.ndarray, str, str]:
    """(picture, task, the student's answer) of a chat request. ValueError if one is not there."""
    try:
        parts = next(m["content"] for m in request["messages"] if m["role"] == "user")
        url = next(part["image_url"]["url"] for part in parts if part["type"] == "image_url")
        text = next(part["text"] for part in parts if part["type"] == "text")
        file = io.BytesIO(base64.b64decode(url.partition("base64,")[2], validate=True))
        picture = np.array(Image.open(file, formats=["PNG"]).convert("RGB"))
    except (KeyError, TypeError, AttributeError, StopIteration, OSError) as error:
        raise ValueError(f"not a picture and a text in chat form: {error!r}") from None
    found = re.search(r"<task>\n(.*?)\n</task>.*?<answer>\n(.*)\n</answer>", text, re.DOTALL)
    if not found:
        raise ValueError("the text has no <task> and <answer>: send what turbo.corrector sends")
    return picture, found[1], found[2]


def chat_reply(request: dict, expert: Expert) -> dict:
    """The reply to a chat request, with token counts made from lengths."""
    picture, task, student = read_request(request)
    answer = expert.correct(picture, task, student)
    asked = len(re.sub(r"data:image/png;base64,[^\"]*", "", json.dumps(request["messages"])))
    prompt_tokens = asked // 4 + -(-picture[..., 0].size // 28**2)
    message = {"role": "assistant", "content": answer}
    return {
        "model": str(request.get("model")),
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": -(-len(answer) // 4)},
    }


class Server(ThreadingHTTPServer):
    """Listens on this machine alone, and holds what its connections share."""

    request_queue_size = 128  # connections that come at once

    def __init__(self, port: int, expert: Expert, delay: float, fail: float, key: str):
        super().__init__(("127.0.0.1", port), Handler)
        self.expert, self.delay, self.fail, self.key = expert, delay, fail, key


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"  # connections stay open
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        """Answer a chat request."""
        body = self.rfile.read(min(int(self.headers.get("Content-Length") or 0), LIMIT))
        time.sleep(self.server.delay)
        if self.path != "/v1/chat/completions":
            return self._error(404, f"no such path: {self.path}")
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            return self._error(401, "wrong key")
        if random.random() < self.server.fail:
            return self._error(503, "busy") if random.random() < 0.5 else self._write(200, b"[")
        try:
            return self._write(200, chat_reply(json.loads(body), self.server.expert))
        except ValueError as error:
            return self._error(400, str(error))

    def _error(self, status: int, message: str) -> None:
        self._write(status, {"error": {"message": message}})

    def _write(self, status: int, reply: dict | bytes) -> None:
        body = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:  # the client has given up
            self.close_connection = True

    def log_message(self, *args) -> None:
        """Say nothing for each request."""


@contextmanager
def serve(
    env: str = "points24", *, port: int = 0, delay: float = 0.0, fail: float = 0.0, key: str = ""
) -> Iterator[str]:
    """Run the endpoint in a thread, on a free port unless one is given; gives its URL."""
    try:
        server = Server(port, Expert(env), delay, fail, key)
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"port {port} cannot be used: {error}; choose another one, or --port 0 for any"
        ) from error
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


def main() -> int:
    """Serve until interrupted; returns the exit status."""
    defaults = argparse.ArgumentDefaultsHelpFormatter  # shows them
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=defaults)
    parser.add_argument("--env", choices=READ, default="points24", help="the game that is played")
    parser.add_argument("--port", type=int, default=8000, help="port (0: a free one)")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that each answer takes")
    parser.add_argument("--fail", type=float, default=0.0, help="share of 503 and broken replies")
    parser.add_argument("--key", default="", help="the key that is asked for; empty for none")
    options = vars(parser.parse_args())
    try:
        with suppress(KeyboardInterrupt), serve(**options) as url:
            print(f"--teacher-url {url}", flush=True)
            threading.Event().wait()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
