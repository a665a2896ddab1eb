"""An external teacher that misbehaves in every way, over real HTTP: training goes on, what it did
not get is counted, and its key is written nowhere."""

import itertools
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny_models
from trainer import FLAGS

from turbo import train
from turbo.log import read_jsonl

KEY = "sk-secret-4711"


def chat(text):
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


def slow(handler):
    time.sleep(1.5)
    handler.reply(200, chat("{}"))


def too_many(handler):
    handler.reply(429, b"slow down", {"Retry-After": "0"})


def fails(handler):
    handler.reply(500, f"internal error; your key was {KEY}".encode())


def cut(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def invalid(handler):
    handler.reply(200, b'{"choices": [')


def huge(handler):
    handler.reply(200, b'{"choices": "' + b"x" * 3_000_000)


def schema(handler):
    handler.reply(200, json.dumps({"choices": {"message": [1, 2]}, "usage": "many"}).encode())


def mumbles(handler):
    handler.reply(200, chat(f"As a language model with key {KEY}, I would say: plus."))


def answers(handler):
    written = '{"current number": "1", "target number": "4", "thoughts": "4 is more than 1, so +", '
    handler.reply(200, chat(written + '"action": "+"}'))


WAYS = (slow, too_many, fails, cut, invalid, huge, schema, mumbles, answers)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        with self.server.lock:
            way = next(self.server.ways)
            self.server.met[way.__name__] = self.server.met.get(way.__name__, 0) + 1
        way(self)

    def reply(self, status, body, headers=()):
        try:
            self.send_response(status)
            for name, value in dict(headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:  # the client is gone
            self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def teacher():
    """The endpoint: one misbehaviour after the other."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.ways, server.lock, server.met = itertools.cycle(WAYS), threading.Lock(), {}
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_training_goes_on(teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.setattr("turbo.corrector.FIRST_PAUSE", 0.01)
    run, url = tmp_path / "run", f"http://127.0.0.1:{teacher.server_port}/v1"
    flags = f"""
        --model {tiny_models.fitted_folder()} --out {run} --updates 3 --guidance gtr --sft-rows 16
        --teacher-url {url} --teacher-model m --teacher-key-env TEACHER_KEY --teacher-timeout 1
        --sft-batch 4 --tensorboard
    """
    assert train.main(["numberline", *FLAGS.split(), *flags.split()]) == 0
    assert set(teacher.met) == {way.__name__ for way in WAYS}  # every one of them was met
    records = [r for r in read_jsonl(run / "metrics.jsonl") if "success_rate" in r]
    assert [r["update"] for r in records] == [1, 2, 3]
    last = records[-1]
    assert last["teacher_failed"] + last["sft_examples"] <= 48  # the rest was unreadable twice
    assert last["teacher_failed"] >= 1 and last["sft_examples"] >= 1 and last["sft_loss"] > 0
    # On busy cores a request may be given up before it arrives.
    assert last["teacher_requests"] >= sum(teacher.met.values()) > 48
    out, err = capsys.readouterr()
    assert "questions to the teacher went unanswered: " in out
    assert KEY not in out + err
    written = [p for p in run.rglob("*") if p.is_file()]
    assert len(written) > 8
    for path in written:
        assert KEY.encode() not in path.read_bytes(), path
