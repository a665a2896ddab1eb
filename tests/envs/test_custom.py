"""envs/custom.py: environments of others are found, and what they lack is said beforehand."""

import importlib
import re
import sys
from dataclasses import replace

import numpy as np
import pytest

from turbo.envs import base, custom
from turbo.envs.make import check_env, find, is_name, make, takes, tiny_kwargs

COIN = '''
"""The smallest environment: say what the picture shows."""
import gymnasium as gym
import numpy as np
from turbo.envs import base

class Coin(gym.Env):
    TINY = {"size": 28}
    actions = ("dark", "bright")
    guess_answer, judge, snapshot = base.no_guess, base.no_verdict, base.copied
    optimum, deal_key = base.unknown_optimum, base.no_deal_key

    def __init__(self, size=56):
        self.size = size

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.bright, self.count = bool(self.np_random.random() < 0.5), 0
        return self.render(), {"success": False}

    def render(self):
        return np.full((self.size, self.size, 3), 255 * self.bright, np.uint8)

    def step(self, action):
        return self.end(action == self.bright)

    def step_illegal(self):
        return self.end(False)

    def end(self, right):
        self.count += 1
        return self.render(), float(right), right, self.count >= 3, {"success": right}

    def prompt(self, style):
        return base.Prompt("dark or bright?", "")

    def read_answer(self, text):
        return base.read_json_answer(text, ("thoughts", "action"), self.actions)

    def expert_answer(self, rng):
        return '{"thoughts": "seen", "action": "%s"}' % self.actions[self.bright]
'''


@pytest.fixture
def coin(tmp_path, monkeypatch, request):
    """The name of a fresh module in the current directory, and its class."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = "coin_" + re.sub(r"\W", "_", request.node.name)
    (tmp_path / f"{name}.py").write_text(COIN)
    return name, find(f"{name}:Coin")


def test_a_class_of_the_current_directory(coin):
    name = f"{coin[0]}:Coin"
    check_env(name, needs_expert=True)
    assert is_name(name) and find(name) is coin[1]
    assert tiny_kwargs(name) == {"size": 28} and make(name, size=84).reset()[0].shape == (84, 84, 3)
    assert takes(name, "size") and not takes(name, "early_truncation")
    env = make(name)
    env.reset(seed=0)
    assert env.judge(env.read_answer("")) == base.Verdict(None, None, None, judged=False)
    assert env.optimum().success_rate == 1.0 and env.deal_key() == ()


def test_an_entry_point(coin, tmp_path, monkeypatch):
    """As an installed package brings it: a folder of metadata beside its modules."""
    info = tmp_path / "coin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: coin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{custom.GROUP}]\ntoss = {coin[0]}:Coin\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert is_name("toss") and find("toss") is coin[1]
    check_env("toss", needs_expert=True)
    with pytest.raises(ValueError, match=r"'tos' is unknown: .*toss, or module:Class.*'toss'\?"):
        find("tos")
    find.cache_clear()  # the name goes with the folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maze", "environment 'maze' is unknown: use points24, ezpoints, "),
        ("no_such_module:Maze", "no module 'no_such_module'; run in the folder that holds it"),
        ("json.no_such:Maze", "no module 'json.no_such'; run in the folder"),
        ("json:Maze", "module 'json' has nothing of that name"),
        ("json:dumps", "module 'json' holds no class of that name"),
        ("json:JSONDecoder", "it lacks reset(), step(), step_illegal(), render(), prompt(), "),
        ("gymnasium:Env", "it lacks reset(), step(), step_illegal(), render(), prompt(), "),
    ],
)
def test_names_that_lead_to_no_environment(name, message):
    with pytest.raises(ValueError) as caught:
        check_env(name)
    assert f"environment '{name}'" in str(caught.value) and message in str(caught.value)


def test_a_module_that_fails_is_named_with_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_maze.py").write_text("import json\n\nraise OSError('no screen')\n")
    with pytest.raises(ValueError, match=r"OSError in .*broken_maze.py, line 3: no screen"):
        find("broken_maze:Maze")
    (tmp_path / "needy_maze.py").write_text("import no_such_simulator\n")
    with pytest.raises(ValueError, match=r"line 1: No module named 'no_such_simulator'"):
        find("needy_maze:Maze")


def test_missing_methods_are_named_with_what_may_stand_for_them(coin):
    for name in custom.METHODS:
        broken = type("Broken", (coin[1],), {name: None})
        with pytest.raises(ValueError) as caught:
            custom.try_out("b:Broken", broken)
        message = str(caught.value)
        assert f"it lacks {name}()" in message and message.count("()") == 1
        default = custom.DEFAULTS.get(name)
        assert default is None or f"{name} = base.{default.__name__}" in message
    assert set(custom.DEFAULTS) < set(custom.METHODS)


def counting(self):
    """Another picture at every call: nothing that a seed decides."""
    counting.n = getattr(counting, "n", 0) + 1
    return np.full((28, 28, 3), counting.n % 251, np.uint8)


def in_place(self):
    if not hasattr(self, "kept"):
        self.kept = np.zeros((28, 28, 3), np.uint8)
    self.kept += 1
    return self.kept


def seen(self, **options):
    """A reset and an end, for a class that shows no more than they return."""
    self.bright, self.count = False, 0
    return np.zeros((28, 28, 3), np.uint8), {}


def ends(self, right):
    self.count += 1
    return np.zeros((28, 28, 3), np.uint8), 0.0, self.count > 2, False, {"success": right}


def growing(self, right):
    self.count += 1
    self.size = 28 + self.count
    return self.render(), 0.0, self.count > 2, False, {"success": right}


FAULTS = {
    "arguments": (dict(__init__=lambda self, level: None), "cannot be made: "),
    "actions": (dict(actions=("a", "a")), "actions must be a tuple of different texts"),
    "reset": (dict(reset=lambda self, **k: 0), "reset must return (picture, info), got int"),
    "floats": (
        dict(render=lambda self: np.zeros((4, 4, 3))),
        "uint8 [height, width, 3], got fl",
    ),
    "chance": (dict(render=counting), "reset(seed=0) does not deal the same twice"),
    "rules": (
        dict(prompt=lambda s, style: base.Prompt(str(s.bright), "")),
        "put what changes",
    ),
    "prompt": (
        dict(prompt=lambda self, style: "go"),
        "must return a turbo.envs.base.Prompt",
    ),
    "reading": (dict(read_answer=lambda self, text: None), "read_answer must return an Answer"),
    "judging": (
        dict(judge=lambda self, answer: True),
        "judge must return a turbo",
    ),
    "guess": (
        dict(guess_answer=lambda self, w, p: "x"),
        "guess_answer must return what is",
    ),
    "in place": (dict(render=in_place), "wrote to the picture that it gave before"),
    "render": (dict(render=lambda s: None, reset=seen, end=ends), "render() must give the picture"),
    "four": (dict(step=lambda s, a: s.end(True)[:4]), "step must return (picture, reward, termin"),
    "success": (
        dict(step_illegal=lambda s: (*s.end(False)[:4], {})),
        "info['success'] is no bool after step_illegal",
    ),
    "growing": (dict(end=growing), "its pictures have several sizes, (56, 56, 3) and (29"),
    "endless": (
        dict(step_illegal=lambda s: (s.render(), 0.0, False, False, {"success": False})),
        "an episode had not ended after 1000 times step_illegal: count the attempts",
    ),
    "snapshot": (
        dict(
            snapshot=lambda self: self,
            prompt=lambda self, style: base.Prompt("", str(self.count)),
        ),
        "what snapshot gave changed with step",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_trial_finds(coin, fault):
    changes, message = FAULTS[fault]
    custom.try_out("c:Coin", coin[1])  # without the fault there is none
    broken = type("Coin", (coin[1],), changes)
    with pytest.raises(ValueError) as caught:
        custom.try_out("c:Coin", broken)
    assert str(caught.value).startswith("environment 'c:Coin'") and message in str(caught.value)


def test_pictures_of_several_sizes(coin):
    class Growing(coin[1]):
        def render(self):
            side = 28 + 28 * self.bright
            return np.full((side, side, 3), 7, np.uint8)

    with pytest.raises(ValueError, match="its pictures have several sizes"):
        custom.try_out("g:Growing", Growing)


def test_experts_that_teach_nothing(coin):
    env = coin[1]()
    custom.check_expert("c:Coin", env)
    for answer, message in (
        (None, "has no expert: expert_answer gave None in 32 deals"),
        ("bright", "its expert wrote 'bright', which it does not read: not one JSON object"),
        ('{"thoughts": "", "action" : "dark"}', """its expert's answer has no '"action":'"""),
    ):
        env.expert_answer = lambda rng, answer=answer: answer
        with pytest.raises(ValueError) as caught:
            custom.check_expert("c:Coin", env)
        assert message in str(caught.value)
    env.expert_answer = lambda rng: base.no_expert(env, rng)
    with pytest.raises(ValueError, match="has no expert"):
        custom.check_expert("c:Coin", env)


def test_guesses_follow_the_expert_as_far_as_it_is_followed(coin):
    env = coin[1]()
    env.reset(seed=0)
    answer = env.expert_answer(np.random.default_rng(0))
    assert base.guess_expert(env, answer[:9], None) == base.guess_expert(env, "", None) == answer
    for other in ("{'", answer + " "):
        assert base.guess_expert(env, other, answer) == base.no_guess(env, other, answer) == other
    env.expert_answer = lambda rng: None
    assert base.guess_expert(env, "", None) == ""


def test_answers_in_a_form_of_their_own(coin):
    env = coin[1]()
    assert base.action_key(env) == '"action":'
    env.action_key = "<do>"
    env.expert_answer = lambda rng: "seen<do>dark"
    env.read_answer = lambda text: replace(coin[1]().read_answer(""), action="dark", error=None)
    custom.check_expert("c:Coin", env)
    assert base.action_key(env) == "<do>"
