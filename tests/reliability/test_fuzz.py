"""Hostile text and files: nothing raises but the one clear error, and nothing takes long.

Some 1,800 cases run with the other tests; `make test-fuzz` runs 40,000, with those of the
exact evaluator (tests/envs/test_cards.py) and of the corrector's replies
(tests/turbo/test_corrector.py), which bear the same mark.
"""

import dataclasses
import functools
import json
import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from examples.corrector_server import Expert
from turbo import checkpoint
from turbo.config import TrainConfig, check
from turbo.envs.cards import evaluate, tokenize
from turbo.envs.make import make, tiny_kwargs
from turbo.log import read_jsonl
from turbo.prompts import SPECIAL_TOKENS
from turbo.saved import from_saved
from turbo.tiny import GAMES

pytestmark = pytest.mark.fuzz
SLOW = 2.0  # seconds that no single case may take

NASTY = st.sampled_from(
    [
        *SPECIAL_TOKENS,
        *("{" * 3_000, "[" * 3_000, '{"a":' * 1_000, "(" * 3_000, "1" * 1_000_000, "1/0", "0/0"),
        *(
            "1e999",
            "NaN",
            "-Infinity",
            "١٢٣",
            "²",
            "½",
            "\x00",
            "\ud800",
            "\\ud800",
            "\u202e",
            "\\",
        ),
        *('"action":', '"action": "', "```json", "```", "'; DROP TABLE", "__import__('os')"),
        *("(" * 400 + "1" + ")" * 400, "-" * 500 + "1", "1+" * 500 + "1", "9**9**9"),
    ]
)
text = st.lists(st.text(max_size=20) | NASTY, max_size=4).map("".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)
ENVS = [make(name, **tiny_kwargs(name)) for name in GAMES]


@functools.cache
def expert():
    return Expert("points24")


def quick(call, *arguments):
    """The result, in time."""
    began = time.perf_counter()
    result = call(*arguments)
    assert time.perf_counter() - began < SLOW
    return result


def read_and_judge(env, answer_text):
    answer = env.read_answer(answer_text)
    assert (answer.action is None) == (answer.error is not None)
    assert answer.action is None or answer.action in env.actions
    assert env.judge(answer).right in (True, False)
    assert env.guess_answer(answer_text, answer_text).startswith(answer_text)


@given(st.sampled_from(ENVS), st.integers(0, 50), text)
def test_any_text_as_an_answer(env, seed, answer):
    env.reset(seed=seed)
    quick(read_and_judge, env, answer)


@given(st.sampled_from(ENVS), st.integers(0, 50), st.integers(0, 200), st.integers(0, 30), text)
def test_an_experts_answer_that_is_garbled(env, seed, at, cut, noise):
    env.reset(seed=seed)
    expert = env.expert_answer(np.random.default_rng(seed)) or '{"thoughts": "", "action": "1"}'
    quick(read_and_judge, env, expert[:at] + noise + expert[at + cut :])


@given(st.sampled_from(ENVS), st.integers(0, 50), values, values, values)
def test_any_values_in_an_answers_fields(env, seed, one, two, three):
    env.reset(seed=seed)
    fields = {"cards": one, "formula": two, "current number": one, "target number": two}
    for action in (three, env.actions[0]):
        written = json.dumps({**fields, "thoughts": three, "action": action})
        quick(read_and_judge, env, written)


@given(st.lists(NASTY | st.text("0123456789+-*/() .e_", max_size=12), max_size=5).map("".join))
def test_any_text_as_a_formula(formula):
    """No exception but the one of `tokenize`, and in time; whatever the value is."""

    def work():
        try:
            tokens = tokenize(formula)
        except ValueError:
            return
        evaluate(tokens)

    quick(work)


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=10), values, max_size=4))
def test_any_settings_in_a_saved_run(changes):
    """They are taken, or refused by name; what is taken can be checked like any settings."""
    saved = {**dataclasses.asdict(TrainConfig()), **changes}
    try:
        check(quick(from_saved, saved, "run"))
    except ValueError as error:
        assert str(error).startswith(("run", "--")), error


@given(text)
def test_any_text_as_config_json(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("run")
    (path / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(checkpoint.CheckpointError):
        quick(checkpoint.read_run, path)


NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, -1, 1e308, math.nan])


@given(
    st.dictionaries(
        st.sampled_from([n for n, f in FIELDS.items() if f.type in (int, float, "int", "float")]),
        NUMBERS,
        max_size=5,
    )
)
def test_any_numbers_in_the_settings(changes):
    """They are accepted, or refused by the name of a flag."""
    c = TrainConfig(**changes)
    try:
        quick(check, c)
    except ValueError as error:
        assert str(error).startswith("--")


@given(st.binary(max_size=300), st.sampled_from(["adapter", "state", "meta", "manifest"]))
def test_any_bytes_in_a_checkpoint(tmp_path_factory, content, name):
    run = tmp_path_factory.mktemp("run")
    folder = run / "checkpoints" / "00000001"
    folder.mkdir(parents=True)
    names = ["adapter.safetensors", "state.safetensors", "meta.json"]
    for file in names:
        (folder / file).write_bytes(content if file.startswith(name) else b"{}")
    files = {file: checkpoint._fingerprint(folder / file) for file in names}
    manifest = json.dumps({"files": files}).encode()  # even one that vouches for them
    (folder / "manifest.json").write_bytes(content if name == "manifest" else manifest)
    with pytest.raises(checkpoint.CheckpointError):
        quick(checkpoint.load, run)


@given(st.lists(st.binary(max_size=60) | values.map(lambda v: json.dumps(v).encode()), max_size=4))
def test_any_lines_in_the_record_of_a_run(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    try:
        records = quick(read_jsonl, path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert all(isinstance(r, dict) for r in records)


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3))))
def test_any_picture_for_the_example_corrector(picture):
    """The example reads pictures of other people: it refuses in one line what is not its own."""
    try:
        quick(expert().correct, picture, 'The formula so far: ""', "{}")
    except ValueError as error:
        assert str(error)
