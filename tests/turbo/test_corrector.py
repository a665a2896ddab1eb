"""turbo/corrector.py: against the example's real server, and against hostile replies."""

import json
import random
import socket
import subprocess
import sys
import time
from email.utils import formatdate

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.corrector_server import serve
from turbo import corrector as module
from turbo.corrector import (
    MAX_BODY,
    MAX_TOKENS_TOLD,
    Corrector,
    Question,
    Usage,
    check_address,
    check_url,
    pause,
    read_body,
    seconds_to_wait,
    without_fence,
)
from turbo.envs.make import make, tiny_kwargs

BLANK = Question(np.zeros((4, 4, 3), np.uint8), "task", "answer")
HERE = "http://127.0.0.1:1/v1"


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 0.05)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def anything(number, text):
    return True


def number_lines(count):
    """Environments and questions of NumberLine, all different neighbours."""
    envs = []
    for seed in range(count):
        env = make("numberline", **tiny_kwargs("numberline"))
        env.reset(seed=seed)
        envs.append(env)
    return envs, [Question(env.render(), env.prompt("full").text, "{}") for env in envs]


def chat(text, **usage):
    return {"choices": [{"message": {"content": text}}], "usage": usage}


def replying(*replies, **options):
    """A corrector whose endpoint gives these replies in turn, the last one for ever."""
    left, requests = list(replies), []

    def answer(request):
        requests.append(json.loads(request.content))
        reply = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(reply, Exception):
            raise reply
        return reply if isinstance(reply, httpx.Response) else httpx.Response(200, json=reply)

    transport = httpx.MockTransport(answer)
    return Corrector(HERE, "m", transport=transport, concurrency=1, **options), requests


# --- against the real server


def test_answers_come_in_the_order_of_the_questions():
    envs, questions = number_lines(64)
    with serve("numberline", delay=0.01) as url:
        corrector = Corrector(url, "expert")
        answers = corrector.correct(questions, anything)
    for env, answer in zip(envs, answers, strict=True):
        assert env.judge(env.read_answer(answer)).right
    assert len(set(answers)) > 10
    usage = corrector.usage
    assert (usage.requests, usage.retries, usage.failed, usage.unreadable) == (64, 0, 0, 0)
    assert usage.completion_tokens == sum(-(-len(answer) // 4) for answer in answers)
    assert usage.prompt_tokens > 64 * 300


def test_requests_run_at_the_same_time():
    _, questions = number_lines(16)
    with serve("numberline", delay=0.3) as url:
        corrector = Corrector(url, "expert", concurrency=16)
        corrector.correct(questions, anything)
    assert 0.3 <= corrector.usage.seconds < 16 * 0.3 / 2


def test_failures_are_tried_again_and_then_skipped():
    _, questions = number_lines(6)
    with serve("numberline", fail=1.0) as url:
        corrector = Corrector(url, "expert", attempts=3)
        assert corrector.correct(questions, anything) == [None] * 6
    usage = corrector.usage
    assert (usage.requests, usage.retries, usage.failed) == (18, 12, 6)
    assert corrector.problem


def test_with_some_failures_every_question_is_answered():
    random.seed(0)
    envs, questions = number_lines(40)
    with serve("numberline", fail=0.3) as url:
        corrector = Corrector(url, "expert", attempts=12)
        answers = corrector.correct(questions, anything)
    assert all(
        env.judge(env.read_answer(answer)).right for env, answer in zip(envs, answers, strict=True)
    )
    assert corrector.usage.retries > 0 == corrector.usage.failed


def test_a_hanging_endpoint_is_skipped():
    _, questions = number_lines(3)
    with serve("numberline", delay=5.0) as url:
        corrector = Corrector(url, "expert", timeout=0.2, attempts=2)
        started = time.perf_counter()
        assert corrector.correct(questions, anything) == [None] * 3
    assert time.perf_counter() - started < 4
    assert corrector.usage.failed == 3 and "Timeout" in corrector.problem


def test_no_endpoint_at_all_is_skipped():
    corrector = Corrector(HERE, "expert", attempts=2)
    assert corrector.correct([BLANK], anything) == [None]
    assert corrector.usage.failed == 1 and corrector.usage.retries == 1


def test_a_wrong_key_is_fatal_and_never_shown():
    _, questions = number_lines(40)
    with serve("numberline", key="right") as url:
        corrector = Corrector(url, "expert", key="a-secret", concurrency=2)
        with pytest.raises(ValueError, match=r"HTTP 401.*give a valid key") as caught:
            corrector.correct(questions, anything)
        assert url in str(caught.value) and "a-secret" not in str(caught.value)
        assert corrector.usage.requests <= 4
        answers = Corrector(url, "expert", key="right\n").correct(questions, anything)
        assert None not in answers


def test_a_wrong_path_is_fatal():
    with serve("numberline") as url:
        corrector = Corrector(url.removesuffix("/v1"), "expert")
        with pytest.raises(ValueError, match=r"HTTP 404.*ends before /chat/completions"):
            corrector.correct([BLANK], anything)


# --- against replies in turn


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_after_an_answer_is_only_counted(status):
    corrector, _ = replying(chat("yes"), httpx.Response(status, text="no"))
    assert corrector.correct([BLANK, BLANK], anything) == ["yes", None]
    assert corrector.correct([BLANK], anything) == [None]
    assert corrector.usage.failed == 2 and corrector.usage.retries == 0
    assert str(status) in corrector.problem


def test_a_bad_request_is_not_tried_again():
    corrector, _ = replying(httpx.Response(400, text="no pictures, key sesame"), key="sesame")
    assert corrector.correct([BLANK], anything) == [None]
    assert corrector.usage == Usage(requests=1, failed=1, seconds=corrector.usage.seconds)
    assert "no pictures" in corrector.problem and "sesame" not in corrector.problem


@pytest.mark.parametrize(
    "failure",
    [
        *(httpx.Response(status) for status in (408, 409, 429, 500, 502, 503, 529)),
        httpx.Response(429, headers={"Retry-After": "0.01"}),
        httpx.ConnectError("no"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("cut off"),
        httpx.Response(200, text="<html>"),
        httpx.Response(200, content=b" " * (MAX_BODY + 1)),
        chat(None),
        chat(""),
        {"choices": []},
    ],
    ids=repr,
)
def test_a_failed_attempt_is_made_again(failure):
    corrector, _ = replying(failure, chat("yes"))
    assert corrector.correct([BLANK], anything) == ["yes"]
    usage = corrector.usage
    assert (usage.requests, usage.retries, usage.failed) == (2, 1, 0)


def test_an_unreadable_answer_is_asked_for_once_more():
    corrector, requests = replying(chat("mumble"), chat("clear"))
    assert corrector.correct([BLANK], lambda number, text: text == "clear") == ["clear"]
    assert corrector.usage.unreadable == 1 and corrector.usage.failed == 0
    roles = [message["role"] for message in requests[1]["messages"]]
    assert roles == ["system", "user", "assistant", "user"]

    corrector, requests = replying(chat("mumble"))
    assert corrector.correct([BLANK], lambda number, text: False) == [None]
    assert corrector.usage.unreadable == len(requests) == 2 and corrector.usage.failed == 0


def test_what_is_sent():
    corrector, requests = replying(chat("yes"), max_tokens=99, temperature=0.5)
    corrector.correct([BLANK], anything)
    (request,) = requests
    assert (request["model"], request["max_tokens"], request["temperature"]) == ("m", 99, 0.5)
    picture, text = request["messages"][1]["content"]
    assert picture["image_url"]["url"].startswith("data:image/png;base64,")
    assert "<task>\ntask\n</task>" in text["text"] and "<answer>\nanswer\n</answer>" in text["text"]


def test_the_time_limit_holds_for_the_whole_reply():
    def drip():
        for _ in range(100):
            time.sleep(0.02)
            yield b" "

    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=drip()))
    corrector = Corrector(HERE, "m", timeout=0.1, attempts=1, transport=transport)
    assert corrector.correct([BLANK], anything) == [None]
    assert corrector.usage.seconds < 1 and "no complete reply in 0.1 s" in corrector.problem


def test_usage_adds_up():
    corrector, _ = replying(chat("yes", prompt_tokens=300, completion_tokens=50))
    corrector.correct([BLANK] * 4, anything)
    corrector.correct([], anything)
    assert corrector.usage.prompt_tokens == 1200 and corrector.usage.completion_tokens == 200


def test_an_error_of_the_caller_is_not_swallowed():
    corrector, _ = replying(chat("yes"))
    with pytest.raises(ZeroDivisionError):
        corrector.correct([BLANK] * 3, lambda number, text: 1 / 0)


# --- hostile replies

NUMBERS = st.integers() | st.floats() | st.just(10**400)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "message", "content", "text", "usage", "prompt_tokens"]),
            inner,
            max_size=4,
        )
    ),
)
SHAPED = st.builds(
    lambda content, usage: {"choices": [{"message": {"content": content}}], "usage": usage},
    JSON,
    JSON,
)
DUMPED = (JSON | SHAPED).map(lambda value: json.dumps(value).encode())
HEADERS = st.dictionaries(
    st.sampled_from(["Content-Encoding", "Content-Type", "Location", "Retry-After", "Set-Cookie"]),
    st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0")) | st.just("gzip"),
)


@pytest.fixture(scope="module")
def hostile():
    """A corrector that was answered once, and the list whose last entry is its next reply."""
    replies = [httpx.Response(200, json=chat("yes"))]
    transport = httpx.MockTransport(lambda request: replies[-1])
    corrector = Corrector(HERE, "m", attempts=1, transport=transport)
    assert corrector.correct([BLANK], anything) == ["yes"]
    return corrector, replies


@pytest.mark.fuzz
@given(status=st.integers(200, 599), body=st.binary() | DUMPED, headers=HEADERS)
def test_no_reply_raises(hostile, status, body, headers):
    corrector, replies = hostile
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    replies.append(httpx.Response(status, headers=raw, stream=httpx.ByteStream(body)))
    before = corrector.usage.failed
    (text,) = corrector.correct([BLANK], anything)
    assert text is None or text.encode()
    assert corrector.usage.failed == before + (text is None)


def read_in_time(body):
    began = time.perf_counter()
    reply = read_body(body)
    assert time.perf_counter() - began < 2.0
    return reply


@pytest.mark.fuzz
@given(st.binary() | DUMPED)
def test_no_body_raises(body):
    reply = read_in_time(body)
    assert (reply.text is None) == bool(reply.problem)
    assert reply.text is None or isinstance(reply.text, str)
    assert 0 <= reply.prompt_tokens <= MAX_TOKENS_TOLD


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5_000, b"\xff\xfe"])
def test_bodies_made_to_break_the_parser(body):
    assert read_in_time(body).text is None


def test_content_in_parts_and_lone_surrogates():
    parts = [{"type": "text", "text": '{"a"'}, {"type": "image"}, 3, {"text": ": 1}"}]
    assert read_body(json.dumps(chat(parts)).encode()).text == '{"a": 1}'
    assert read_body(json.dumps(chat("a\ud800b")).encode()).text == "a?b"


def test_absurd_token_counts_are_not_believed():
    for number in (-1, 10**30, 1.5, True, "7", None):
        reply = read_body(json.dumps(chat("yes", prompt_tokens=number)).encode())
        assert reply.text == "yes" and reply.prompt_tokens == 0


# --- small parts


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("```json\n{}\n```", "{}"),
        ("```\n{}\n```\n", "{}"),
        ("```{}```", "{}"),
        ("```json{}```", "{}"),
        (" {} ", "{}"),
        ("Here: ```{}```", "Here: ```{}```"),
        ("```", "```"),
        ("``````", ""),
    ],
)
def test_fences(text, inside):
    assert without_fence(text) == inside


def test_pauses_double_and_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.5)
    monkeypatch.setattr(module, "LONGEST_PAUSE", 30.0)
    assert 0.25 <= pause(0, 0.0) <= 0.75 and 1.0 <= pause(2, 0.0) <= 3.0
    assert pause(0, 7.0) == 7.0 and pause(0, 3600.0) == 30.0 and pause(2_000, 0.0) == 30.0


def test_retry_after_is_read():
    assert seconds_to_wait("12") == 12.0
    assert 50 < seconds_to_wait(formatdate(time.time() + 60, usegmt=True)) <= 60
    for header in ("", "-3", "soon", "nan", "Wed, 99 Abc 2020", formatdate(0), "²"):
        assert seconds_to_wait(header) == 0.0


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://a/v1", "http://", "http://a:99999999"]
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="--teacher-url"):
        check_url(url)
    check_address("https://example.org/v1")


def test_an_endpoint_that_nobody_listens_at_is_refused_before_the_run(monkeypatch):
    with serve("numberline") as alive:
        check_url(alive)
    with pytest.raises(ValueError, match=r"cannot be reached: Connection refused; start the"):
        check_url(alive)  # it has ended
    with pytest.raises(ValueError, match=r"'http://a\.\.b' cannot be reached: "):
        check_url("http://a..b")
    Corrector(alive, "m").close()  # one that ends later is no error

    asked = []

    def connect(address, timeout):
        asked.append(address)
        raise result

    monkeypatch.setattr(module.socket, "create_connection", connect)
    result = socket.gaierror(-2, "Name or service not known")
    with pytest.raises(ValueError, match="cannot be reached: Name or service not known"):
        check_url("https://gone.example/v1")
    for other in (TimeoutError("timed out"), OSError(113, "No route to host")):
        result = other
        check_url("http://slow.example/v1")  # is tried again in the run
    assert asked == [(b"gone.example", 443), *2 * [(b"slow.example", 80)]]


def test_a_proxy_is_left_to_find_the_endpoint(monkeypatch):
    def connect(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(module.socket, "create_connection", connect)
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    check_url("https://gone.example/v1")
    monkeypatch.setenv("no_proxy", "gone.example")
    with pytest.raises(AssertionError, match=r"gone\.example"):
        check_url("https://gone.example/v1")


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="concurrency 0"):
        Corrector(HERE, "m", concurrency=0)
    with pytest.raises(ValueError, match="key"):
        Corrector(HERE, "m", key="line\nbreak")


def test_it_needs_no_torch():
    code = "import sys, turbo.corrector; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
