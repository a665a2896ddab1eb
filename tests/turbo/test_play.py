"""turbo/play.py: a person plays every game, what is watched is what an evaluation plays."""

import codecs
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import launch
import numpy as np
import pytest
import tiny_models
from rich.console import Console

from turbo import checkpoint, play
from turbo.envs.base import ACTION_KEY, Answer, Optimum, Prompt, Verdict
from turbo.envs.make import make
from turbo.eval import EvalConfig, check, open_source
from turbo.hub import model_sha256
from turbo.measure import fresh_deals
from turbo.parallel import Crew
from turbo.presets import defaults
from turbo.rollout import RolloutOptions, Table
from turbo.run import Run, env_maker
from turbo.terminal import HALF, Screen, printable
from turbo.tiny import GAMES

SMALL = ["--max-new-tokens", "40"]


def played(capsys, monkeypatch, lines, *argv):
    """What is printed where `lines` are piped in."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    capsys.readouterr()
    assert play.main([str(a) for a in argv]) == 0
    return capsys.readouterr().out


def expert_actions(game, deal):
    """What the expert does in a deal, start to end; the sum of the rewards."""
    env, rng = make(game), np.random.default_rng(0)
    env.reset(**deal)
    actions, total, over = [], 0.0, False
    while not over:
        answer = env.read_answer(env.expert_answer(rng))
        actions.append(answer.action)
        _, reward, terminated, truncated, _ = env.step(env.actions.index(answer.action))
        total, over = total + reward, terminated or truncated
    return actions, total


@pytest.mark.parametrize("game", GAMES)
def test_a_person_plays_every_game(game, capsys, monkeypatch):
    seed = 1 if game == "points24" else 0  # whose hand can make 24
    actions, total = expert_actions(game, fresh_deals(1, seed)[0])
    out = played(capsys, monkeypatch, actions, game, "--seed", seed)
    env = make(game)
    env.reset(seed=0)
    assert env.prompt("full").fixed.rstrip() in out
    end = re.search(r"^(won|lost): return (\S+) in (\d+) step", out, re.M)
    assert (float(end[2]), int(end[3])) == (total, len(actions))
    assert (end[1] == "won") == (total > 0)
    assert f"{int(total > 0)} of 1 won, mean return {total:g}" in out
    best = env.optimum()
    assert f"best possible: {best.success_rate:.1%} won" in out and best.source in out


def test_what_may_be_asked(capsys, monkeypatch):
    game, deal = "numberline", fresh_deals(1, 3)[0]
    env = make(game)
    env.reset(**deal)
    thought = json.loads(env.expert_answer(np.random.default_rng(0)))["thoughts"]
    out = played(capsys, monkeypatch, ["", "?", "q"], game, "--seed", 3)
    assert "> \n-  +\n" in out
    assert f"> ?\n{thought} -> " in out
    assert "won:" not in out and "lost:" not in out and "mean return" in out  # of the best play
    assert "the same deals again" not in out
    assert re.search(r"--seed \d+", played(capsys, monkeypatch, [], game))  # the end of the input


def test_input_that_is_closed_has_ended(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert play.main(["numberline", "--seed", "0"]) == 0
    out = capsys.readouterr().out
    assert "best possible: " in out and "won:" not in out and "lost:" not in out


def test_a_slip_is_told_and_costs_what_it_costs_the_policy(capsys, monkeypatch):
    env = make("blackjack")
    env.reset(seed=0)
    cost = env.step_illegal()[1]
    out = played(capsys, monkeypatch, ["Hit"], "blackjack", "--seed", 0)
    assert f"'Hit' is no action here, did you mean 'hit'?: reward {cost:g}\nlost: return -1" in out
    # numberline goes on after one: ten attempts are all there are
    out = played(capsys, monkeypatch, ["left"] * 12, "numberline", "--seed", 0)
    assert out.count("'left' is no action here: reward -1") == 10
    assert "lost: return -10 in 10 steps" in out


def test_pictures_are_saved(tmp_path, capsys, monkeypatch):
    out = played(
        capsys, monkeypatch, ["hit"] * 9, "blackjack", "--seed", 0, "--png", tmp_path / "shown"
    )
    cards = out.count("hit: reward")
    files = sorted((tmp_path / "shown").iterdir())
    assert len(files) == cards + 1  # each card that was dealt made another picture
    assert all(f"picture: {file}\n" in out for file in files)


class Doors:
    """A game whose actions change at every step: the way out is through ever new doors."""

    early_truncation = False

    def reset(self, *, seed=None, options=None):
        self.at, self.picture = 0, np.zeros((4, 4, 3), np.uint8)
        return self.picture, {"success": False}

    @property
    def actions(self):
        return ("stay", f"go to door {self.at + 1}")

    def step(self, action):
        self.at += action
        return self.picture, float(action), self.at == 3, False, {"success": self.at == 3}

    def step_illegal(self):
        return self.picture, -0.5, False, False, {"success": False}

    def prompt(self, style):
        return Prompt("Leave.\n", f"You are at door {self.at}.")

    def read_answer(self, text):
        return Answer(text, text, {}, None)

    def expert_answer(self, rng):
        return None if self.at == 0 else self.actions[1]

    def judge(self, answer):
        return Verdict(None, None, None)

    def optimum(self):
        return Optimum(1.0, None, "there is a door")


def test_actions_may_change_at_every_step(capsys, monkeypatch):
    lines = ["?", "", "go to door 2", "go to door 1", "?", "go to door 2", "stay", "go to door 3"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    env, screen = Doors(), Screen(Console())
    outcome = play.play_episode(env, play.Person(screen, 0), screen, {"seed": 1})
    assert outcome == play.Played(True, True, 2.5, 5)
    out = capsys.readouterr().out
    assert "the expert has nothing to say here" in out and "stay\ngo to door 1\n" in out
    assert "'go to door 2' is no action here, did you mean 'go to door 1'?: reward -0.5" in out
    assert "go to door 2 -> go to door 2" in out  # an answer without a field of thoughts
    assert play.summary(env, []) == "best possible: 100.0% won (there is a door)"
    assert play.describe(env.judge(None)) == "[no verdict]"


@pytest.mark.parametrize(("temperature", "seed"), [(0.2, 0), (1.0, 7)])
def test_what_is_watched_is_what_an_evaluation_plays(temperature, seed, capsys, monkeypatch):
    c = EvalConfig(str(tiny_models.fitted_folder()), env="numberline", workers=1)
    config = check(c)
    vlm, weights, _ = open_source(c, config)
    table = Table(vlm, env_maker(config), RolloutOptions(1, 1, temperature, 40), Crew())
    deals = fresh_deals(4, seed)
    rollout = table.collect(vlm.merged(weights), (seed, 2**31), deals=deals)
    flags = ["--seed", seed, "--temperature", temperature, "--episodes", 4, *SMALL]
    out = played(capsys, monkeypatch, [], "numberline", "--model", c.source, *flags)
    answers = [printable(s.answer.text).rstrip("\ufffd") for s in rollout.steps]
    assert len(set(answers)) > 4
    at = 0
    for text in answers:  # in this order
        at = out.index(text, at) + len(text)
    ends = [f"{'won' if e.success else 'lost'}: return" for e in rollout.episodes]
    assert re.findall(r"^(?:won|lost): return", out, re.M) == ends
    assert f"{sum(e.success for e in rollout.episodes)} of 4 won" in out
    wrong = sum(s.verdict.aim is False for s in rollout.steps)
    assert out.count("aims at what is right: no") == wrong


def test_a_thought_comes_in_pieces(fitted, monkeypatch):
    """What is shown in pieces is the answer, the action in another style."""
    c = play.PlayConfig("numberline", seed=0, max_new_tokens=40)
    env, screen, pieces = tiny_models.new_env(), Screen(Console(quiet=True)), []
    monkeypatch.setattr(screen, "stream", lambda piece, style: pieces.append((piece, style)))
    policy = play.Policy(fitted, fitted.weights(), screen, c, defaults("points24", "tiny"))
    picture, _ = env.reset(seed=0)
    policy.begin(env)
    answer = policy.answer(env, picture)
    assert "".join(piece for piece, _ in pieces) == answer.text and len(pieces) > 8
    thought = "".join(piece for piece, style in pieces if style == play.THOUGHT)
    assert answer.text.startswith(thought) and thought.endswith(", ")
    assert answer.text[len(thought) :].startswith('"action":')


def test_half_a_character_is_held_back(fitted, monkeypatch):
    shown, screen = [], Screen(Console(quiet=True))
    monkeypatch.setattr(screen, "stream", lambda piece, style: shown.append(piece))
    run = defaults("points24", "tiny")
    policy = play.Policy(fitted, fitted.weights(), screen, play.PlayConfig(seed=0), run)
    tokens = [t for byte in "é7".encode() for t in [fitted.token_bytes.index(bytes([byte]))]]
    for n in range(len(tokens)):
        policy._stream(tokens[: n + 1], n, ACTION_KEY)
    assert shown == ["é", "7"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of which nothing was trained; its teacher answers nonsense."""
    path = tmp_path_factory.mktemp("play") / "run"
    config = tiny_models.new_config(model=str(tiny_models.fitted_folder()))
    checkpoint.create_run(path, config, model_sha256(config))
    made = Run(config, path, Crew())
    made.lora.load_state_dict(tiny_models.noisy_lora(made.vlm, 1, 0.01).state_dict())
    made.teacher.push(0, tiny_models.noisy_lora(made.vlm, 2, 0.3), 0.5)
    made.update = 1
    made.save()
    return path


def test_a_checkpoint_and_its_teacher(run, capsys, monkeypatch):
    flags = ["numberline", "--checkpoint", run, "--seed", 0, "--episodes", 3, *SMALL]
    policy = played(capsys, monkeypatch, [], *flags)
    teacher = played(capsys, monkeypatch, [], *flags, "--teacher")
    garbled = "not one JSON object"
    assert '"current number": "' in policy and "episode 3 of 3" in policy
    assert garbled not in policy
    assert teacher.count(garbled) == 30 and "0 of 3 won, mean return -10" in teacher
    assert played(capsys, monkeypatch, [], *flags[1:]) == policy  # the run knows its environment


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--episodes", "0"], "--episodes must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be zero or more, got -1"),
        (["--delay", "nan"], "--delay must be 0 to 10 seconds, got nan"),
        (["--teacher"], "--teacher needs --checkpoint RUN"),
        (["--model", "tiny", "--checkpoint", "runs/x"], "give one of the two"),
        (["--checkpoint", "runs/absent"], "--checkpoint runs/absent is no run directory"),
        (["--model", "tiny", "--temperature", "0"], "--temperature must be more than 0"),
        (["--episode", "3"], "did you mean --episodes?"),
        (["points24", "--checkpoint", "RUN"], "on numberline: name that, not points24"),
        (["--checkpoint", "RUN", "--games", "x"], "are for alfworld alone"),
        (["--games", "x"], "--games is for alfworld alone"),
    ],
)
def test_what_cannot_be_played_is_refused(run, argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert play.main([str(run) if a == "RUN" else a for a in argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and message in err


class Terminal:
    """A process in a terminal of 100 x 40 with 24-bit colours."""

    def __init__(self, *argv):
        main, end = pty.openpty()
        fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
        colours = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        unset = ("NO_COLOR", "COLUMNS", "LINES")  # they would count for more than the terminal
        environment = {k: v for k, v in os.environ.items() if k not in unset} | colours
        self.process = subprocess.Popen(
            launch.in_terminal([sys.executable, "-m", "turbo.play", *argv]),
            stdin=end,
            stdout=end,
            stderr=end,
            env=environment,
            start_new_session=True,
        )
        os.close(end)
        self.main, self.text = main, ""
        self.decoder = codecs.getincrementaldecoder("utf-8")()

    def until(self, wanted, seconds=120.0):
        """What is printed up to `wanted`."""
        end = time.monotonic() + seconds
        while wanted not in self.text:
            assert time.monotonic() < end, f"{wanted!r} did not come: {self.text[-2000:]!r}"
            if select.select([self.main], [], [], 1.0)[0]:
                self.text += self.decoder.decode(os.read(self.main, 1 << 16))
        before, _, self.text = self.text.partition(wanted)
        return before

    def type(self, keys):
        os.write(self.main, keys.encode())

    def interrupt(self):
        """Ctrl-C, as often as it takes: one that comes just before Python begins to wait for input
        is known to it after the next input alone."""
        for _ in range(20):
            self.type("\x03")
            try:
                return self.status(5.0)
            except TimeoutError:
                pass
        raise AssertionError(f"Ctrl-C did not end it: {self.text[-2000:]!r}")

    def status(self, seconds=120.0):
        """The exit status, once the rest is read."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self.main], [], [], 0.1)[0]:
                try:
                    self.text += self.decoder.decode(os.read(self.main, 1 << 16))
                except OSError:  # how Linux says that the other end is closed
                    os.close(self.main)
                    return self.process.wait(30)
        raise TimeoutError(f"still running: {self.text[-2000:]!r}")


@pytest.mark.slow
def test_in_a_terminal():
    """A picture in colours, answers to keys, Ctrl-C; nothing of it is mocked."""
    terminal = Terminal("numberline", "--seed", "0", "--episodes", "2")
    before = terminal.until("\r\n> ")
    rows = [line.count(HALF) for line in before.splitlines() if HALF in line]
    assert len(rows) == 25 and set(rows) == {100}  # 112 x 56 pixels, as wide as the terminal
    assert "\x1b[38;2;" in before and "48;2;" in before
    assert "number line" in before
    terminal.type("\n")
    assert "-  +" in terminal.until("\r\n> ")
    actions, _ = expert_actions("numberline", fresh_deals(1, 0)[0])
    for action in actions:
        terminal.type(action + "\n")
    assert HALF in terminal.until("episode 2 of 2")  # the end of the first one
    terminal.until("\r\n> ")
    assert terminal.interrupt() == 128 + signal.SIGINT
    assert "interrupted" in terminal.text and "Traceback" not in terminal.text


@pytest.mark.slow
def test_watched_in_a_terminal():
    """The built-in model's thought comes token by token, and the picture as the model sees it."""
    flags = ["--model", "tiny", "--seed", "1", "--delay", "0.01"]
    terminal = Terminal("points24", *flags)
    text = terminal.until("best possible")
    assert terminal.status() == 0
    assert [line.count(HALF) for line in text.splitlines() if HALF in line] == [100] * 25
    assert text.count("\x1b[3;36m") > 20  # each token of the thoughts by itself
    assert re.search(r"(won|lost): return", text)


def test_deals_of_a_person_are_those_of_an_evaluation(capsys, monkeypatch):
    """The hand that the expert talks about is that of the evaluation's first deal."""
    c = defaults("points24", "tiny")
    env = env_maker(c)()
    env.reset(**fresh_deals(1, 5)[0])
    out = played(capsys, monkeypatch, ["?", "q"], "points24", "--seed", 5)
    said = env.expert_answer(np.random.default_rng(5))
    thought = json.loads(said)["thoughts"] if said else "the expert has nothing to say here"
    assert thought in out
