"""GTR's external corrector: an OpenAI-compatible chat endpoint that corrects the student's answers.

    POST {url}/chat/completions      one request a question: picture, task, the student's answer

The endpoint may be slow, overloaded or wrong at any time. Time-outs, broken connections, HTTP 408,
409, 429, 5xx and replies without text are tried again with growing pauses; then the question is
skipped and counted. Fatal are two things only, for neither must make a run unguided in silence: an
endpoint that nobody listens at before the run starts, and one that has never answered and refuses
with 401, 403 or 404, for a wrong key or model.

Left out: what becomes of a corrected answer (guidance); streaming; models that do not know
`max_tokens` or `temperature`; repair of broken JSON.
"""

import base64
import io
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.request import getproxies, proxy_bypass

import httpx
import numpy as np
from PIL import Image

MAX_BODY = 1_000_000  # bytes of a reply; a longer one is a failed attempt
MAX_TOKENS_TOLD = 10_000_000  # a reply that tells of more tokens is not believed
REACHED_IN = 5.0  # seconds to connect, before a run starts
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds
RETRIED = frozenset({408, 409, 429})  # and 5xx
REFUSED = {
    401: "give a valid key",
    403: "give a key that may use this model",
    404: "check the model's name, and that --teacher-url ends before /chat/completions",
}
FENCE = "```"

SYSTEM = """You correct the answers of a student who plays a game that is seen in a picture. You \
get the picture, the task as the student got it, and the student's answer.
First read the picture yourself, and check whether the student has read it properly. Then check \
the reasoning: is every step true, does it lead to the goal from where the game stands, and is the \
action allowed and the one that the reasoning leads to?
Write the corrected answer: one JSON object and nothing else, without remarks and without a code \
fence. It has exactly the keys of the student's answer in the form that the task describes; where \
the student's answer is not such an object, it has the keys that the task asks for. Write it in \
the student's own way: the same wording, notation, order and length. Keep what is right word for \
word, change what is wrong, and let the action follow from the reasoning. Write it as an answer to \
the task; say nothing about the student or about mistakes. If nothing is wrong, repeat the \
student's answer."""

AGAIN = """This cannot be read as an answer to the task. Write the corrected answer again: one \
JSON object in the form that the task describes, and nothing before or after it."""


@dataclass(frozen=True)
class Question:
    """One answer to be corrected."""

    picture: np.ndarray  # [H, W, 3] uint8
    prompt: str  # what the student was asked, env.prompt("full").text
    answer: str  # what the student answered


class TurnedAway(ValueError):
    """An endpoint refuses all that is asked; the message says why, and the remedy."""


@dataclass
class Usage:
    """Running totals. A question without an answer is in `failed`, or twice in `unreadable`."""

    requests: int = 0  # sent, retries included
    retries: int = 0  # sent again after a failed attempt
    failed: int = 0  # questions that were given up
    unreadable: int = 0  # answers that came and could not be read
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0  # wall-clock time spent in correct()


# What of it a run tells
TOLD = ("requests", "failed", "unreadable", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Reply:
    """What one request brought. `text` is None when it failed, and `problem` says why."""

    text: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    problem: str = ""
    again: bool = True  # whether a failed attempt is worth another
    after: float = 0.0  # seconds that the endpoint asks to wait before it
    refusal: str = ""  # status and remedy, where the status is one of REFUSED


class Corrector:
    """Asks the endpoint, many questions at a time. `problem` tells of the latest failure."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        concurrency: int = 16,
        timeout: float = 60.0,
        attempts: int = 4,
        max_tokens: int = 256,
        temperature: float = 0.0,
        transport: httpx.BaseTransport | None = None,
    ):
        check_address(url)
        _check_positive(
            concurrency=concurrency, timeout=timeout, attempts=attempts, max_tokens=max_tokens
        )
        self.url, self.model, self.key = url.rstrip("/"), model, _read_key(key)
        self.concurrency, self.timeout, self.attempts = concurrency, timeout, attempts
        self.max_tokens, self.temperature = max_tokens, temperature
        self.usage, self.problem = Usage(), ""
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._answered, self._refusal = False, ""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        self._client = httpx.Client(
            headers=headers, timeout=timeout, limits=limits, transport=transport
        )

    def correct(
        self, questions: Sequence[Question], readable: Callable[[int, str], bool]
    ) -> list[str | None]:
        """The corrected answers in the order of the questions.

        None where the endpoint gave none that can be read: `readable` says whether a text answers
        the question of that number.
        """
        started = time.perf_counter()
        self._refusal = ""
        self._stopped.clear()
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                numbers = range(len(questions))
                answers = list(pool.map(lambda i: self._answer(i, questions[i], readable), numbers))
            except BaseException:  # an interrupt does not wait for pauses and further attempts
                self._stopped.set()
                raise
            finally:
                self.usage.seconds += time.perf_counter() - started
        if self._turned_away():
            raise TurnedAway(
                f"--teacher-url {self.url!r} refuses model {self.model!r}: {self._refusal}"
            )
        return answers

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _turned_away(self) -> bool:
        """Whether the endpoint refuses and has never answered anything."""
        return bool(self._refusal) and not self._answered

    def _answer(
        self, number: int, question: Question, readable: Callable[[int, str], bool]
    ) -> str | None:
        messages = chat_messages(question)
        for _ in range(2):
            text = self._ask(messages)
            if text is None:
                self._count(failed=1)
                return None
            if readable(number, text):
                return text
            self._count(unreadable=1)
            # At temperature 0 the same question would bring the same answer.
            again = [{"role": "assistant", "content": text}, {"role": "user", "content": AGAIN}]
            messages += again
        return None

    def _ask(self, messages: list[dict]) -> str | None:
        """The text of a reply, after as many attempts as are allowed; None if all failed."""
        request = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        body = json.dumps(request).encode()
        for attempt in range(self.attempts):
            if self._stopped.is_set() or self._turned_away():
                return None
            self._count(requests=1, retries=int(attempt > 0))
            reply = self._send(body)
            self._note(reply)
            if reply.text is not None or not reply.again:
                return reply.text
            if attempt + 1 < self.attempts:
                self._stopped.wait(pause(attempt, reply.after))
        return None

    def _send(self, body: bytes) -> Reply:
        """One attempt. The time limit holds for the whole reply, not for each piece of it."""
        deadline, held = time.monotonic() + self.timeout, bytearray()
        try:
            with self._client.stream("POST", f"{self.url}/chat/completions", content=body) as reply:
                for piece in reply.iter_bytes():
                    held += piece
                    if time.monotonic() > deadline:
                        return Reply(problem=f"no complete reply in {self.timeout:g} s")
                    if len(held) > MAX_BODY:
                        break
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            return Reply(problem=f"{type(error).__name__} {error}".strip())
        if reply.is_success:
            return read_body(bytes(held))
        status = reply.status_code
        excerpt = bytes(held[:200]).decode(errors="replace")
        if self.key:
            excerpt = excerpt.replace(self.key, "***")
        problem = f"HTTP {status} {excerpt!r}"
        return Reply(
            problem=problem,
            again=status in RETRIED or status >= 500,
            after=seconds_to_wait(reply.headers.get("Retry-After", "")),
            refusal=f"{problem}; {REFUSED[status]}" if status in REFUSED else "",
        )

    def _note(self, reply: Reply) -> None:
        self._count(prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)
        with self._lock:
            self.problem = reply.problem or self.problem
            self._refusal = reply.refusal or self._refusal
            self._answered = self._answered or reply.text is not None

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                setattr(self.usage, name, getattr(self.usage, name) + number)


def check_url(url: str) -> None:
    """ValueError where `url` is not the address of an endpoint, or nobody listens there."""
    check_address(url)
    address = httpx.URL(url)
    if behind_proxy(address):
        return  # which knows the way
    port = address.port or {"http": 80, "https": 443}[address.scheme]
    try:
        socket.create_connection((address.raw_host, port), REACHED_IN).close()
    except (socket.gaierror, ConnectionRefusedError) as error:
        raise ValueError(
            f"--teacher-url {url!r} cannot be reached: {error.strerror}; start the endpoint, or "
            "give another address"
        ) from error
    except OSError:
        pass  # slow, or busy: questions are tried again


def behind_proxy(address: httpx.URL) -> bool:
    """Whether the environment names a proxy for this address, as httpx will heed it."""
    proxies = getproxies()
    return bool(proxies.get(address.scheme) or proxies.get("all")) and not proxy_bypass(
        address.host
    )


def check_address(url: str) -> None:
    """ValueError where `url` is not the address of an endpoint."""
    try:
        address = httpx.URL(url)
        usable = address.scheme in ("http", "https") and bool(address.host)
        usable = usable and (address.port or 0) < 65_536
    except (httpx.InvalidURL, TypeError):
        usable = False
    if not usable:
        raise ValueError(
            f"--teacher-url {url!r} is not an address: give one such as http://localhost:8000/v1"
        )


def chat_messages(question: Question) -> list[dict]:
    """The conversation that puts one question to the corrector."""
    task = (
        f"<task>\n{question.prompt}\n</task>\n\n"
        f"The student's answer:\n<answer>\n{question.answer}\n</answer>"
    )
    content = [
        {"type": "image_url", "image_url": {"url": picture_url(question.picture)}},
        {"type": "text", "text": task},
    ]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]


def picture_url(picture: np.ndarray) -> str:
    """A picture, [H, W, 3] uint8, as the data URL of a PNG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def read_body(body: bytes) -> Reply:
    """The text and the token counts of a reply. Never raises."""
    if len(body) > MAX_BODY:
        return Reply(problem=f"a reply of more than {MAX_BODY} bytes")
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        return Reply(problem=f"a reply that is not JSON: {str(error)[:120]}")
    usage = _member(fields, "usage")
    tokens = [_token_count(_member(usage, f"{kind}_tokens")) for kind in ("prompt", "completion")]
    choices = _member(fields, "choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    text = _content_text(_member(_member(first, "message"), "content"))
    return Reply(text or None, *tokens, problem="" if text else "a reply without text")


def _member(fields: object, name: str) -> object:
    return fields.get(name) if isinstance(fields, dict) else None


def _token_count(number: object) -> int:
    return number if type(number) is int and 0 <= number <= MAX_TOKENS_TOLD else 0


def _content_text(content: object) -> str:
    """Text, or a list of parts of which some hold text; without fences and lone surrogates."""
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [_member(part, "text") for part in parts]
    text = "".join(text for text in texts if isinstance(text, str))
    return without_fence(text.encode("utf-8", "replace").decode())


def without_fence(text: str) -> str:
    """The text inside a ``` fence that is around all of it; other text as it is."""
    text = text.strip()
    if len(text) < 2 * len(FENCE) or not (text.startswith(FENCE) and text.endswith(FENCE)):
        return text
    inside = text[len(FENCE) : -len(FENCE)].strip()
    language, _, rest = inside.partition("\n")
    return (rest if language.strip().isalpha() else inside.removeprefix("json")).strip()


def pause(attempt: int, asked: float) -> float:
    """Seconds before the next attempt: doubled each time, never in step with other threads."""
    own = FIRST_PAUSE * 2 ** min(attempt, 10) * random.uniform(0.5, 1.5)
    return min(max(own, asked), LONGEST_PAUSE)


def seconds_to_wait(header: str) -> float:
    """A Retry-After header, seconds or a date, as seconds; 0 where it says neither."""
    try:
        if header.strip().isdecimal():
            return float(header)
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _read_key(key: str) -> str:
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError("the corrector's key has characters that no key has: give it again")
    return key


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise ValueError(f"{name} {number!r} of the corrector is not positive: give 1 or more")
