"""Environments of others: found by module:Class or entry point, and tried before they are played.

    python -m turbo.train mypackage.maze:Maze --model DIR

    [project.entry-points."gtr_turbo.envs"]          # in the pyproject.toml of another package
    maze = "mypackage.maze:Maze"                     # then: python -m turbo.train maze --model DIR

A class is asked for by name, so its module is imported, and what stands at its top is run. Before
training it must have every method of `VisualEnv`, and some episodes are played at random: they find
what would otherwise stop a run much later, or spoil it in silence.

Left out: what the methods mean (`turbo.envs.base`), the environments of this project.
"""

import importlib
import os
import re
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import entry_points

import gymnasium as gym
import numpy as np

from turbo.envs import base

GROUP = "gtr_turbo.envs"
PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
METHODS = tuple(name for name in vars(base.VisualEnv) if not name.startswith("_"))
DEFAULTS = {
    "expert_answer": base.no_expert,
    "guess_answer": base.no_guess,
    "judge": base.no_verdict,
    "snapshot": base.copied,
    "optimum": base.unknown_optimum,
    "deal_key": base.no_deal_key,
}
DEALS, STEPS, EXPERT_DEALS = 4, 1_000, 32


def is_path(name: str) -> bool:
    """Whether a name has the form module:Class."""
    return bool(PATH.fullmatch(name))


def installed() -> dict[str, str]:
    """The entry points of installed packages: name -> module:Class."""
    return {point.name: point.value for point in entry_points(group=GROUP)}


def load_class(name: str, path: str) -> type:
    """The class at module:Class, from what is installed or from the current directory."""
    module_name, _, class_name = path.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # for good: worker processes import it too
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # of somebody else's code, whatever it is
        if isinstance(error, ModuleNotFoundError) and error.name in _parents(module_name):
            remedy = "run in the folder that holds it, or install it"
            why = f"there is no module {error.name!r}; {remedy}"
        else:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            why = f"{type(error).__name__} in {frame.filename}, line {frame.lineno}: {error}"
        raise ValueError(f"environment {name!r} cannot be imported: {why}") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        what = "has nothing of that name" if found is None else "holds no class of that name"
        raise ValueError(f"environment {name!r}: module {module_name!r} {what}")
    return found


def _parents(module: str) -> list[str]:
    """a.b.c -> a, a.b, a.b.c"""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def missing_methods(env: object) -> list[str]:
    """Methods of `VisualEnv` that are not there, or are those that gymnasium leaves empty."""
    lacking = []
    for name in METHODS:
        method = getattr(env, name, None)
        empty = getattr(gym.Env, name, None)
        if not callable(method) or (empty and getattr(method, "__func__", None) is empty):
            lacking.append(name)
    return lacking


def _remedies(missing: list[str]) -> str:
    """The methods, each with the default that may stand for it."""
    known = {name: f" (or {name} = base.{d.__name__})" for name, d in DEFAULTS.items()}
    return ", ".join(f"{name}(){known.get(name, '')}" for name in missing)


def try_out(name: str, build: Callable[[], base.VisualEnv]) -> None:
    """Play some episodes of two new environments alike; ValueError says what cannot work."""

    def need(ok: bool, what: str) -> None:
        if not ok:
            raise ValueError(f"environment {name!r}: {what}")

    try:
        env, twin = build(), build()
    except TypeError as error:
        raise ValueError(f"environment {name!r} cannot be made: {error}") from error
    missing = missing_methods(env)
    need(not missing, f"it lacks {_remedies(missing)}; turbo/envs/base.py says what each one does")
    rng, fixed, shapes = np.random.default_rng(0), {}, set()
    for deal in range(DEALS):
        picture = _first_picture(env, deal, need)
        again = _first_picture(twin, deal, need)
        alike = np.array_equal(picture, again) and _asked(env, need) == _asked(twin, need)
        draw = "draw all that is random from self.np_random, after super().reset(seed=seed)"
        need(alike, f"reset(seed={deal}) does not deal the same twice: {draw}")
        for style in ("short", "full"):
            text = env.prompt(style).fixed
            moved = f"{fixed.setdefault(style, text)!r:.60} became {text!r:.60}"
            rule = "must be the same in every episode: put what changes into state"
            need(text == fixed[style], f"prompt({style!r}).fixed {rule}; {moved}")
        shapes.add(picture.shape)
        need(len(shapes) == 1, f"its pictures have several sizes, {sorted(shapes)}")
        _answers(env, need)
        _play(env, picture, need, lambda e: e.step(int(rng.integers(len(e.actions)))), "step")
        _play(twin, again, need, lambda e: e.step_illegal(), "step_illegal")


def _first_picture(env, deal: int, need: Callable) -> np.ndarray:
    result = env.reset(seed=deal, options=None)
    pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)
    need(pair, f"reset must return (picture, info), got {type(result).__name__}")
    _check_picture(result[0], "reset", need)
    return result[0]


def _check_picture(picture: object, method: str, need: Callable) -> None:
    good = isinstance(picture, np.ndarray) and picture.dtype == np.uint8
    good = good and picture.ndim == 3 and picture.shape[2] == 3
    got = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture)
    need(good, f"{method} must give a picture, uint8 [height, width, 3], got {got}")


def _asked(env, need: Callable) -> tuple:
    prompts = tuple(env.prompt(style) for style in ("short", "full"))
    kind = all(isinstance(prompt, base.Prompt) for prompt in prompts)
    need(kind, f"prompt must return a turbo.envs.base.Prompt, got {type(prompts[0]).__name__}")
    actions = getattr(env, "actions", None)
    good = isinstance(actions, tuple | list) and len(set(actions)) == len(actions) > 0
    good = good and all(isinstance(action, str) for action in actions)
    need(good, f"actions must be a tuple of different texts, got {actions!r:.80}")
    return prompts


def _answers(env, need: Callable) -> None:
    """What is no answer is read as none, judged, and guessed on from."""
    text = "neither this nor that"
    answer = env.read_answer(text)
    good = isinstance(answer, base.Answer) and answer.action is None and bool(answer.error)
    rule = "an Answer without an action and with an error, for a text that is no answer"
    need(good, f"read_answer must return {rule}, got {answer!r:.120}")
    need(isinstance(env.judge(answer), base.Verdict), "judge must return a turbo.envs.base.Verdict")
    guess = env.guess_answer(text, None)
    good = isinstance(guess, str) and guess.startswith(text)
    need(good, f"guess_answer must return what is written and how it goes on, got {guess!r:.80}")


def _play(env, picture: np.ndarray, need: Callable, act: Callable, method: str) -> None:
    """One episode; the pictures stay as they were, and what was asked as it was."""
    for _ in range(STEPS):
        before, asked, still = picture.copy(), _asked(env, need), env.snapshot()
        shown = np.array_equal(env.render(), picture)
        need(shown, "render() must give the picture that reset and step gave last")
        result = act(env)
        five = isinstance(result, tuple) and len(result) == 5 and isinstance(result[4], dict)
        need(five, f"{method} must return (picture, reward, terminated, truncated, info)")
        _check_picture(result[0], method, need)
        same = np.array_equal(before, picture)
        need(same, f"{method} wrote to the picture that it gave before: draw a new array")
        sizes = f"{before.shape} and {result[0].shape}"
        need(result[0].shape == before.shape, f"its pictures have several sizes, {sizes}")
        success = result[4].get("success")
        need(isinstance(success, bool | np.bool_), f"info['success'] is no bool after {method}")
        kept = _asked(still, need) == asked and np.array_equal(still.render(), before)
        need(kept, f"what snapshot gave changed with {method}: copy all that changes")
        if result[2] or result[3]:
            return
        picture = result[0]
    count = "count the attempts and truncate the episode"
    need(False, f"an episode had not ended after {STEPS} times {method}: {count}")


def check_expert(name: str, env: base.VisualEnv) -> None:
    """ValueError where an expert shows nothing that a warm start could learn from."""
    for deal in range(EXPERT_DEALS):
        env.reset(seed=deal)
        text = env.expert_answer(np.random.default_rng(deal))
        if text is None:
            continue
        answer, key = env.read_answer(text), base.action_key(env)
        if answer.action is None:
            why = f"its expert wrote {text!r:.200}, which it does not read: {answer.error}"
            raise ValueError(f"environment {name!r}: {why}")
        if key not in text:
            rule = "end answers with it, or set action_key to what begins the action"
            raise ValueError(f"environment {name!r}: its expert's answer has no {key!r}: {rule}")
        return
    raise ValueError(
        f"environment {name!r} has no expert: expert_answer gave None in {EXPERT_DEALS} deals. A "
        "warm start needs one; without, train a model that can play as it is: "
        f"python -m turbo.train {name} --model FOLDER_OR_ID"
    )
