"""examples/corrector_server.py: what it reads, what it answers, and how it fails when told to."""

import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from examples.corrector_server import READ, Expert, PictureReader, main, serve
from turbo.corrector import Corrector, Question, chat_messages
from turbo.envs.make import make, tiny_kwargs

ROOT = Path(__file__).resolve().parents[2]
FRESH = 10_000  # the readers learn from the seeds below 400
WRONG = '{"cards": [], "action": "?"}'


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture(scope="module")
def url():
    with serve("points24") as address:
        yield address


def dealt(env, info):
    return list(info.get("hand") or (env.current, env.target))


def wander(env, rng):
    """Play up to seven of an expert's steps; whether there is still something to answer."""
    for _ in range(int(rng.integers(8))):
        answer = env.expert_answer(rng)
        if answer is None or env.step(env.actions.index(env.read_answer(answer).action))[2]:
            return False
    return env.expert_answer(rng) is not None


def question(env, answer=WRONG):
    return Question(env.render(), env.prompt("full").text, answer)


def ask(url, messages, **headers):
    body = {"model": "expert", "messages": messages}
    return httpx.post(f"{url}/chat/completions", json=body, headers=headers)


@pytest.mark.parametrize("name", READ)
def test_fresh_tiny_pictures_are_read(name):
    env = make(name, **tiny_kwargs(name))
    reader = PictureReader(name, *env.canvas)
    right = []
    for seed in range(FRESH, FRESH + 500):
        picture, info = env.reset(seed=seed)
        right += [a == b for a, b in zip(reader.read(picture), dealt(env, info), strict=True)]
    assert np.mean(right) >= 0.995


def test_large_pictures_are_read_with_the_formula_below():
    env = make("ezpoints")
    reader = PictureReader("ezpoints", *env.canvas)
    for seed in range(FRESH, FRESH + 50):
        _, info = env.reset(seed=seed)
        env.step(1)
        assert reader.read(env.render()) == dealt(env, info)


@pytest.mark.parametrize("name", READ)
def test_200_answers_are_right(name):
    rng, envs = np.random.default_rng(0), []
    for seed in range(FRESH, FRESH + 1_000):
        env = make(name, **tiny_kwargs(name))
        env.reset(seed=seed)
        if wander(env, rng) and len(envs) < 200:
            envs.append(env)
    with serve(name) as url:
        corrector = Corrector(url, "expert")
        answers = corrector.correct([question(env) for env in envs], lambda number, text: True)
    right = [
        env.judge(env.read_answer(answer)).right for env, answer in zip(envs, answers, strict=True)
    ]
    assert len(right) == 200 and np.mean(right) >= 0.99
    assert corrector.usage.requests == 200 and corrector.usage.failed == 0


@pytest.mark.parametrize(
    ("hand", "tokens"),
    [
        (["A", "A", "A", "A"], []),
        (["10", "4", "5", "A"], ["10", "10"]),
        (["10", "4", "5", "A"], [")"]),
    ],
)
def test_where_the_expert_has_nothing_to_show_the_answer_comes_back(url, hand, tokens):
    env = make("points24", **tiny_kwargs("points24"))
    env.reset(seed=0, options={"hand": hand})
    for token in tokens:
        env.game.tokens.append(token)
    assert Corrector(url, "expert").correct([question(env)], lambda number, text: True) == [WRONG]


def test_other_targets_and_other_decks_are_read_from_the_task(url):
    for options, target in (({"faces_ten": False}, 24), ({}, 36)):
        env = make("points24", **tiny_kwargs("points24"), **options)
        hand = ["K", "Q", "A", "2"] if options else ["9", "4", "10", "10"]
        env.reset(seed=0, options={"hand": hand, "target": target})
        answer = Corrector(url, "expert").correct([question(env)], lambda number, text: True)[0]
        assert env.judge(env.read_answer(answer)).right


def test_the_same_question_has_the_same_answer(url):
    env = make("points24", **tiny_kwargs("points24"))
    env.reset(seed=FRESH)
    answers = Corrector(url, "x").correct([question(env)] * 8, lambda number, text: True)
    assert len(set(answers)) == 1


def test_what_cannot_be_read_is_refused(url):
    env = make("points24", **tiny_kwargs("points24"))
    picture, _ = env.reset(seed=0)
    task = env.prompt("full").text
    for strange, why in (
        (Question(np.zeros((56, 112, 3), np.uint8), task, ""), "empty"),
        (Question(picture[:8, :8], task, ""), "8 x 8"),
        (Question(picture[:, ::-1].repeat(2, 0), task, ""), "no cards"),
        (Question(picture, "Which card is this?", ""), "formula so far"),
    ):
        reply = ask(url, chat_messages(strange))
        assert reply.status_code == 400 and why in reply.json()["error"]["message"]
    for messages in (None, [], [{"role": "user", "content": "hello"}], [{"role": "user"}]):
        assert ask(url, messages).status_code == 400
    assert httpx.post(f"{url}/models").status_code == 404


def test_blackjack_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="'blackjack' cannot be read here: use points24"):
        Expert("blackjack")


def test_a_key_is_asked_for():
    env = make("numberline", **tiny_kwargs("numberline"))
    env.reset(seed=0)
    messages = chat_messages(question(env))
    with serve("numberline", key="sesame") as url:
        assert ask(url, messages).status_code == 401
        assert ask(url, messages, Authorization="Bearer sesame").status_code == 200


def test_the_reply_counts_tokens_by_length(url):
    env = make("points24", **tiny_kwargs("points24"))
    env.reset(seed=FRESH)
    messages = chat_messages(question(env))
    reply = ask(url, messages).json()
    text = reply["choices"][0]["message"]["content"]
    assert reply["usage"]["completion_tokens"] == -(-len(text) // 4)
    texts = len(messages[0]["content"]) + len(messages[1]["content"][1]["text"])
    assert texts / 4 < reply["usage"]["prompt_tokens"] < texts / 4 + 100


def test_it_runs_by_itself():
    command = [sys.executable, "-m", "examples.corrector_server", "--env", "numberline"]
    env = make("numberline", **tiny_kwargs("numberline"))
    env.reset(seed=0)
    with subprocess.Popen(
        [*command, "--port", "0"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            address = server.stdout.readline().removeprefix("--teacher-url ").strip()
            corrector = Corrector(address, "expert")
            answer = corrector.correct([question(env)], lambda number, text: True)[0]
        finally:
            server.terminate()
    assert env.judge(env.read_answer(answer)).right


def test_a_port_that_is_taken_is_told_in_one_line(url, capsys, monkeypatch):
    for port in (url.removesuffix("/v1").rpartition(":")[2], "65536"):
        argv = ["corrector_server", "--env", "numberline", "--port", port]
        monkeypatch.setattr(sys, "argv", argv)
        assert main() == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1
        assert err.startswith(f"error: port {port} cannot be used: ") and "--port 0 for any" in err
