"""turbo/view.py: the page as a file, the server on this machine, what is refused."""

import base64
import hashlib
import http.client
import json
import re
import shutil
import threading

import pytest
import tiny_runs

from turbo import view

HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> \u2028 &amp; ]]>"


@pytest.fixture(scope="module")
def run():
    return tiny_runs.trained("viewed", "--workers", "1", "--updates", "3")


def data_of(html):
    """What the page has embedded, as a browser finds the end of a script element."""
    (found,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script', html, re.DOTALL
    )
    return json.loads(found)


def test_the_file(run, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert view.main([str(run), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    html = out.read_text(encoding="utf-8")
    data = data_of(html)
    assert [r["name"] for r in data["runs"]] == [run.name]
    assert data["runs"][0]["curves"]["update"] == [1, 2, 3]
    assert data["metrics"]["self_bleu"]["unit"] == "0..1"
    assert not re.search(r"{{[A-Z]+}}", html)
    assert not re.search(r"""(src|href)\s*=\s*["']?(?!data:)[\w/.:]""", html)  # all is in the file
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html.partition('id="data"')[0])
    assert 'data-source="file"' in html and "connect-src 'none'" in html


def test_without_out_it_is_in_the_run(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    assert view.main([str(other)]) == 0 == view.main([str(other)])
    assert data_of((other / "view.html").read_text(encoding="utf-8"))["runs"][0]["name"] == "other"


def test_two_runs(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    html = view.page(view.gather([run, other], 3))
    assert [len(r["episodes"]) for r in data_of(html)["runs"]] == [3, 3]


def test_scripts_of_the_page_alone_may_run(run):
    html = view.page(view.gather([run], 1))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for kind, tag in (("script-src", "script"), ("style-src", "style")):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy


def test_of_several_runs_the_first_two_show_their_episodes(run):
    data = view.gather([run] * 3, 10)
    assert [len(r["episodes"]) > 0 for r in data["runs"]] == [True, True, False]
    first, _, third = data["runs"]
    assert third["frames"] == {} and third["recorded"] == first["recorded"] > 0
    assert third["curves"] == first["curves"] != {}


def test_what_a_model_writes_stays_data(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    record = {"update": 1, "deal": [HOSTILE], "steps": [{"answer": HOSTILE, "thought": HOSTILE}]}
    (other / "episodes.jsonl").write_text(json.dumps(record) + "\n")
    html = view.page(view.gather([other], 10))
    assert html.count("<script") == 2 and html.count("</script>") == 2
    assert "<img" not in html and "<!--" not in html
    shown = data_of(html)["runs"][0]["episodes"][0]
    assert shown["deal"] == shown["steps"][0]["answer"] == HOSTILE


def test_the_pages_scripts_make_no_markup_of_text():
    for name in view.SCRIPTS:
        script = (view.PAGE / name).read_text(encoding="utf-8")
        for word in ("innerHTML", "outerHTML", "insertAdjacent", "document.write", "eval("):
            assert word not in script
        assert "</" not in script and "{{" not in script


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a run directory, or up to 6"),
        (list("abcdefg"), "got 7"),
        (list("abcdefg"), "with --mean, those that differ in their seed alone are one"),
        (["nowhere"], "nowhere is not a run directory"),
        (["{run}", "nowhere"], "nowhere is not a run directory"),
        (["{run}", "{run}", "--mean"], "have one seed, 0: give one"),
        (["{run}", "--episodes", "0"], "--episodes must be at least 1, got 0"),
        (["{run}", "--serve", "70000"], "--serve must be a port"),
        (["{run}", "--serve", "0", "--out", "x.html"], "leave --out or --serve out"),
        (["{run}", "--out", "/proc/x.html"], "--out /proc/x.html cannot be written: [Errno 2]"),
    ],
)
def test_refusals(run, capsys, arguments, words):
    assert view.main([a.replace("{run}", str(run)) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and words in err and err.count("\n") == 1 and not out


def test_a_flag_that_does_not_exist(run, capsys):
    assert view.main([str(run), "--episoeds", "3"]) == 2
    assert "--episoeds is unknown: did you mean --episodes?" in capsys.readouterr().err


@pytest.fixture
def served(run, tmp_path):
    """A copy of a run that may be changed, and its server."""
    path = tmp_path / "served"
    shutil.copytree(run, path)
    server = view.Server([path], 100, 0)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield path, server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


def ask(server, target, **headers):
    connection = http.client.HTTPConnection(view.HOST, server.port, timeout=30)
    connection.request("GET", target, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, body


def test_the_server(served):
    path, server = served
    assert server.http.server_address[0] == "127.0.0.1"
    status, html = ask(server, "/")
    assert status == 200 and 'data-source="live"' in html and "connect-src 'self'" in html
    state = data_of(html)["state"]
    assert ask(server, f"/data.json?state={state}") == (204, "")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 4, "success_rate": 0.5, "episodes": 8}\n{"update": 5, "succ')
    status, body = ask(server, f"/data.json?state={state}")
    news = json.loads(body)
    assert status == 200 and news["state"] != state
    assert news["runs"][0]["curves"]["update"] == [1, 2, 3, 4]  # the half line is left out
    assert ask(server, "/config.json")[0] == ask(server, "/../config.json")[0] == 404


def test_the_server_shows_seeds_as_one(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("checkpoints"))
    record = json.loads((other / "config.json").read_text())
    record["config"]["seed"] = 7
    (other / "config.json").write_text(json.dumps(record))
    server = view.Server([run, other], 10, 0, mean=True)
    try:
        status, _, body = server.answer("/data.json")
        (shown,) = json.loads(body)["runs"]
        assert status == 200 and shown["seeds"] == 2 and shown["settings"]["seed"] == [0, 7]
        assert shown["name"] == f"{run.name} and 1 more" in server.answer("/")[2]
    finally:
        server.http.server_close()


def test_foreign_names_are_refused(served):
    """A page elsewhere whose name was made to lead here."""
    _, server = served
    assert ask(server, "/data.json", Host="evil.example:80")[0] == 403
    assert ask(server, "/data.json", Host=f"localhost:{server.port}")[0] == 200


def test_a_run_that_is_being_replaced(served):
    path, server = served
    (path / "config.json").unlink()
    status, body = ask(server, "/data.json")
    assert status == 503 and "is not a run directory" in body


def test_a_port_that_is_taken(served, capsys):
    path, server = served
    assert view.main([str(path), "--serve", str(server.port)]) == 2
    assert f"port {server.port} cannot be used" in capsys.readouterr().err
