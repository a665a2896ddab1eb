"""turbo/export.py --push: what is sent, what a refusal looks like, and that nothing else is sent.

A server on this machine stands for the Hugging Face Hub, and a port at which nobody answers.
"""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny_models

from turbo import checkpoint, export
from turbo.hub import model_sha256
from turbo.parallel import Crew
from turbo.run import Run

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of a random model whose factors are noise."""
    path = tmp_path_factory.mktemp("push") / "run"
    config = tiny_models.new_config(model=str(tiny_models.random_folder()), guidance="none")
    checkpoint.create_run(path, config, model_sha256(config))
    run = Run(config, path, Crew())
    run.lora.load_state_dict(tiny_models.noisy_lora(run.vlm).state_dict())
    run.save()
    return path


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files needs; `requests` are (path, body, key)."""

    requests: list[tuple[str, bytes, str]]
    refusal: str

    def do_GET(self) -> None:
        self._answer(404, {"error": "not here"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.requests.append((self.path, body, self.headers.get("Authorization", "")))
        if self.refusal:
            return self._answer(403, {"error": self.refusal})
        home = f"http://127.0.0.1:{self.server.server_port}/someone/policy"
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": [{**f, "shouldIgnore": False} for f in files]})
        if self.path.endswith("/commit/main"):
            return self._answer(200, {"commitOid": "1" * 40, "commitUrl": f"{home}/commit/1"})
        return self._answer(200, {"url": home, "errors": [], "warnings": []})

    def _answer(self, status: int, content: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *words) -> None:
        """Quiet."""


@pytest.fixture
def hub(monkeypatch):
    """A Hub of one's own, which huggingface_hub takes for the real one."""
    from huggingface_hub import constants

    handler = type("Mine", (Hub,), {"requests": [], "refusal": ""})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)  # CI sets it
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    yield handler
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("private", [True, False])
def test_every_file_is_sent_as_it_is(run, hub, tmp_path, capsys, private):
    out = tmp_path / "out"
    flags = ["--private"] * private
    argv = [str(run), "--out", str(out), "--what", "adapter", "--push", "someone/policy", *flags]
    assert export.main(argv) == 0
    assert "uploaded to someone/policy" in capsys.readouterr().out
    sent = {path.rsplit("/", 2)[-2]: body for path, body, _ in hub.requests}
    created = next(body for path, body, _ in hub.requests if path.endswith("/repos/create"))
    assert (b"private" in created) == private
    lines = [json.loads(line) for line in sent["commit"].splitlines()]
    files = {x["value"]["path"]: x["value"]["content"] for x in lines if x["key"] == "file"}
    assert {name: base64.b64decode(content) for name, content in files.items()} == {
        p.name: p.read_bytes() for p in out.iterdir()
    }
    assert all(key == "Bearer hf_secret" for _, _, key in hub.requests)


def test_a_refusal_is_one_line(run, hub, tmp_path, capsys):
    hub.refusal = "You have no rights\nto create a model here"
    argv = [str(run), "--out", str(tmp_path / "out"), "--push", "someone/policy"]
    capsys.readouterr()
    assert export.main(argv) == 1
    errors = capsys.readouterr().err.splitlines()
    lines = [line for line in errors if line and "Loading weights" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: someone/policy could not be uploaded: ")
    assert "403" in lines[0] and "is complete" in lines[0] and "hf_secret" not in lines[0]
    assert (tmp_path / "out" / "model.safetensors").is_file()


# Watches the interpreter's own report of every connection and every name that is looked up.
WATCHED = """
import contextlib, io, json, sys, time
looked = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        looked.append(event)
sys.addaudithook(hook)
from turbo import export
run, out = sys.argv[1:]
told = {"status": export.main([run, "--out", out + "-quiet"]), "quiet": list(looked)}
since, said = time.time(), io.StringIO()
with contextlib.redirect_stderr(said):
    told["pushed"] = export.main([run, "--out", out + "-pushed", "--push", "someone/policy"])
told |= {"seconds": time.time() - since, "said": said.getvalue(), "loud": looked}
print(json.dumps(told))
"""


@pytest.mark.slow
def test_the_network_is_used_to_push_alone(run, tmp_path):
    """Nothing is looked up without --push; where nobody answers the export stays, in seconds."""
    env = {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_secret"}
    env["HF_HUB_OFFLINE"] = "0"  # CI sets it
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(run), str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        check=True,
    )
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["status"], told["quiet"]) == (0, [])
    assert told["pushed"] == 1 and told["loud"]  # the watch does see connections
    lines = [line for line in told["said"].splitlines() if "Loading weights" not in line]
    assert len(lines) == 1 and lines[0].startswith("error: someone/policy could not be uploaded: ")
    assert "hf upload someone/policy" in lines[0] and "hf_secret" not in lines[0]
    assert told["seconds"] < 20
    for kind in ("quiet", "pushed"):
        assert (tmp_path / f"out-{kind}" / "model.safetensors").is_file()
