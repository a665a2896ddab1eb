"""What holds for every environment: gymnasium's checker, seeds, reading answers, guessing."""

import json
import pickle
import typing
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from turbo.envs.base import MAX_ANSWER_CHARS, read_json_answer
from turbo.envs.make import ENVIRONMENTS, make, register_envs, tiny_kwargs
from turbo.envs.numberline import NumberLine

NAMES = tuple(name for name in ENVIRONMENTS if name != "alfworld")  # it has its own tests
KEYS = ("thoughts", "action")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@pytest.mark.parametrize("name", NAMES)
def test_gymnasium_checks_every_environment(name):
    register_envs()
    register_envs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        env = gym.make(f"gtr_turbo/{ENVIRONMENTS[name].__name__}-v0", render_mode="rgb_array")
        check_env(env.unwrapped)
        check_env(make(name, fresh_pictures=True, **tiny_kwargs(name)))


@pytest.mark.parametrize("name", NAMES)
def test_seeds_decide_everything_and_copies_survive_pickling(name):
    one = make(name, **tiny_kwargs(name))
    two = pickle.loads(pickle.dumps(one))
    actions = np.random.default_rng(0).integers(0, len(one.actions), 40)
    for seed in range(5):
        a, b = one.reset(seed=seed), two.reset(seed=seed)
        assert np.array_equal(a[0], b[0]) and a[1] == b[1] and one.deal_key() == two.deal_key()
        for action in actions:
            a, b = one.step(int(action)), two.step(int(action))
            assert np.array_equal(a[0], b[0]) and a[1:] == b[1:]
            if a[2] or a[3]:
                break
    pictures = [make(name).reset(seed=seed)[0].tobytes() for seed in range(6)]
    assert len(set(pictures)) > 2


@pytest.mark.parametrize("name", NAMES)
def test_tiny_pictures_are_multiples_of_28(name):
    env = make(name, **tiny_kwargs(name))
    observation, info = env.reset(seed=0)
    assert observation.dtype == np.uint8 and observation.shape in ((56, 112, 3), (56, 56, 3))
    assert observation.shape[0] % 28 == observation.shape[1] % 28 == 0
    assert info["success"] is False
    assert {style: bool(env.prompt(style).text) for style in ("short", "full")}
    assert len(env.prompt("short").text) < len(env.prompt("full").text)
    assert all(f'"{action}"' in env.prompt("full").fixed for action in env.actions)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"blackjack.*Did you mean 'points24'"):
        make("point24")
    with pytest.raises(ValueError, match="'zzz' is unknown"):
        make("zzz")


@pytest.mark.parametrize("name", NAMES)
def test_an_expert_answer_is_read_also_in_a_fence(name):
    env = make(name, **tiny_kwargs(name))
    env.reset(seed=2)
    text = env.expert_answer(np.random.default_rng(0))
    plain = env.read_answer(text)
    assert plain.error is None and plain.action in env.actions
    for fenced in (f"```json\n{text}\n```", f"```\n{text}\n```", f"  {text}\n"):
        assert env.read_answer(fenced).action == plain.action
    for wrong in (f"Sure: {text}", text + text, text[:-1], f"```json\n{text}", "```", ""):
        assert env.read_answer(wrong).action is None


@given(st.text(max_size=60) | json_values.map(json.dumps))
def test_reading_never_raises(text):
    for env in _ALL:
        answer = env.read_answer(text)
        assert (answer.action is None) == (answer.error is not None)
        assert env.judge(answer).right in (True, False)
        assert env.guess_answer(text, text).startswith(text)


@given(json_values, json_values, json_values)
def test_reading_and_judging_any_fields_never_raises(one, two, three):
    for env in _ALL:
        fields = dict.fromkeys(("cards", "formula", "current number", "target number"), one)
        for action in (three, env.actions[0]):
            answer = env.read_answer(json.dumps({**fields, "thoughts": two, "action": action}))
            assert env.judge(answer).right in (True, False)


def _reset_all() -> list:
    envs = [make(name, **tiny_kwargs(name)) for name in NAMES]
    for env in envs:
        env.reset(seed=0)
    return envs


_ALL = _reset_all()


@pytest.mark.parametrize("name", NAMES)
def test_a_snapshot_stays_where_it_was_taken(name):
    """It asks, guesses, shows and judges as the environment did, wherever that has gone since."""
    rng = np.random.default_rng(0)
    env = make(name, **{**tiny_kwargs(name), "early_truncation": False})
    for seed in range(8):
        env.reset(seed=seed)
        taken, ended = [], False
        while not ended:
            text = env.expert_answer(np.random.default_rng(1)) or ""
            answer = env.read_answer(text)
            known = (
                env.prompt("full"),
                env.prompt("short"),
                env.render().copy(),
                env.guess_answer("", None),
                env.judge(answer),
                text,
            )
            taken.append((env.snapshot(), known, answer))
            action = int(rng.integers(len(env.actions)))
            _, _, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
        for still, (full, short, picture, guess, verdict, text), answer in taken:
            assert still.prompt("full") == full and still.prompt("short") == short
            assert np.array_equal(still.render(), picture)
            assert still.guess_answer("", None) == guess and still.judge(answer) == verdict
            assert (still.expert_answer(np.random.default_rng(1)) or "") == text


@given(st.text(max_size=30), st.integers(0, 150))
def test_a_guess_starts_with_what_is_written(noise, cut):
    for env in _ALL:
        expert = env.expert_answer(np.random.default_rng(0)) or ""
        for written in (expert[:cut], expert[:cut] + noise):
            assert env.guess_answer(written, None).startswith(written)
            assert env.guess_answer(written, expert).startswith(written)


@pytest.mark.parametrize(
    "text,error",
    [
        ("[" * 4_000 + "]" * 3_999, "JSON"),
        ('{"a":' * 1_300, "JSON"),
        ('{"thoughts": "", "action": ' + "9" * 5_000 + "}", "JSON"),
        ('{"thoughts": "", "action": ' + "[" * 900 + "]" * 900 + "}", "list"),
        ('{"thoughts": "", "action": "hit", "action": "stand"}', "twice"),
        ('{"thoughts": ""}', "missing keys: action"),
        ('{"action": "hit"}', "missing keys: thoughts"),
        ("[1]", "list"),
        ('{"thoughts": "", "action": "Hit"}', "'Hit' is not in the list"),
        ('{"thoughts": "", "action": "go to cabinet 10"}', "not in the list"),
        ('{"thoughts": "", "action": "\ud800"}', "not in the list"),
        ("x" * (MAX_ANSWER_CHARS + 1), "8000"),
        ("```" + " " * 7_000, "JSON"),
    ],
)
def test_bad_answers_say_why(text, error):
    answer = read_json_answer(text, KEYS, ("hit", "stand", "go to cabinet 1"))
    assert answer.action is None and error in answer.error


def test_extra_keys_are_allowed():
    text = '{"thoughts": "", "action": "go to cabinet 1", "mood": [1]}'
    answer = read_json_answer(text, KEYS, ("go to cabinet 1", "go to cabinet 10"))
    assert answer.action == "go to cabinet 1" and answer.fields["mood"] == [1]


class Own(NumberLine):
    """A game that is made of one that is there."""


class Bare(NumberLine):
    def __init__(self):
        super().__init__()


class Kept(NumberLine):
    TINY: typing.ClassVar = {"canvas": (84, 56)}


def test_a_game_made_of_another_has_its_small_pictures():
    named = {kind: f"{__name__}:{kind.__name__}" for kind in (Own, Bare, Kept)}
    assert tiny_kwargs(named[Own]) == tiny_kwargs("numberline") != {}
    assert tiny_kwargs(named[Bare]) == {}  # it takes no such options
    assert tiny_kwargs(named[Kept]) == Kept.TINY
