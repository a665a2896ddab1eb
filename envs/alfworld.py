"""ALFWorld: household tasks in rooms of receptacles, seen in pictures, over 30 to 50 steps.

The games are those of ALFWorld (Shridhar et al. 2021), played by its own engine in a process of
its own. What is asked follows GTR (arXiv 2503.08525): the task, the commands given so far and the
admissible ones, and no words about the scene. The reward of a step is

    success_reward * won + goal conditions met (a share) - 1 if the answer is illegal

An episode is truncated, at `truncation_reward`, when there were more than `max_history` answers, or
when the last `repeat_limit` were the same command, or all of them illegal.

Left out: the engine (`alfworld_engine`, `alfworld_thor`), the making of games (`alfworld_games`),
drawing (`alfworld_draw`), the expert (`alfworld_expert`).
"""

import base64
import json
import os
import re
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import gymnasium as gym
import numpy as np
from PIL import Image

from turbo.envs import alfworld_expert as expert
from turbo.envs.alfworld_draw import draw_scene
from turbo.envs.alfworld_process import LastingGame, OwnGame
from turbo.envs.alfworld_scene import TASKS, Goal, Scene, conditions_met, read_scene, view
from turbo.envs.base import (
    Answer,
    Optimum,
    Prompt,
    Verdict,
    check_style,
    continue_answer,
    read_json_answer,
    word_after,
)
from turbo.envs.picture import as_array

KEYS = ("thoughts", "action")
MAX_ACTIONS = 256  # commands that are admissible at once; official games have at most about 90
TELLING = ("help", "inventory", "look")  # these, and `examine`, change nothing in the world
SPLITS = ("train", "valid_seen", "valid_unseen")
_UNSOLVABLE = re.compile(rb'"solvable":\s*false')


@dataclass(frozen=True)
class Game:
    """One game file and what its task is."""

    path: str
    goal: Goal


class ALFWorld(gym.Env):
    """`reset(options={"game": path})` plays one game of one's choice.

    An action is the number of an admissible command in `actions`, which change from step to step;
    `info["action_mask"]` marks the numbers that name one. Any other number is an illegal answer.
    """

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 2}

    def __init__(
        self,
        games: str = "",  # folder of games; empty: $ALFWORLD_DATA, else small ones made once
        split: str = "train",
        tasks: Sequence[str] = (),  # task types that are played; empty: all
        backend: Literal["text", "thor"] = "text",
        canvas: tuple[int, int] = (300, 300),
        success_reward: float = 50.0,
        goal_reward: Literal["rate", "change"] = "rate",  # share that is met, or what it gained
        illegal_penalty: float = -1.0,
        truncation_reward: float = -3.0,
        max_history: int = 40,
        repeat_limit: int = 5,
        history_length: int = 40,  # newest commands that the prompt shows
        telling: bool = True,  # offer look, examine, inventory, help: a picture tells as much
        scene_text: bool = False,  # say in words what is seen, as RL4VLM does
        own_process: bool = True,  # the game runs beside this process; False: text games, in it
        timeout: float = 60.0,  # seconds until a game that does not answer is given up
        render_mode: str | None = None,
        fresh_pictures: bool = False,
    ):
        self.games = find_games(games, split, tuple(tasks))
        self.backend, self.canvas, self.timeout = backend, tuple(canvas), timeout
        self.success_reward, self.goal_reward = success_reward, goal_reward
        self.illegal_penalty, self.truncation_reward = illegal_penalty, truncation_reward
        self.max_history, self.repeat_limit = max_history, repeat_limit
        self.history_length, self.telling, self.scene_text = history_length, telling, scene_text
        self.render_mode, self.fresh_pictures = render_mode, fresh_pictures
        self.early_truncation = False
        self.is_remote = own_process or backend == "thor"
        self.process: LastingGame | OwnGame | None = None
        self.actions: tuple[str, ...] = ()
        self.action_space = gym.spaces.Discrete(MAX_ACTIONS)
        shape = (self.canvas[1], self.canvas[0], 3)
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)

    # --- playing

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        super().reset(seed=seed)
        chosen = (options or {}).get("game")
        if chosen is not None:
            self.game = read_game(str(chosen))
        else:
            self.game = self.games[int(self.np_random.integers(len(self.games)))]
        if self.process is None:
            remote = self.is_remote
            self.process = LastingGame(self.backend, self.timeout) if remote else OwnGame()
        told = self._ask({"do": "reset", "game": self.game.path})
        self.task, self.holds = told["task"], told["holds"]
        self.history: list[str] = []
        self.tried: list[str] = []  # with illegal ones, for repetitions
        self._read(told)
        self.rate = told.get("goal_rate", self._rate())
        return self._observe(), self._info()

    def step(self, action: int) -> tuple:
        """Do command number `action`; a number that names none is an illegal answer."""
        self.send(action)
        return self.receive()

    def step_illegal(self) -> tuple:
        self.send(None)
        return self.receive()

    def send(self, action: int | None) -> None:
        """Begin a step, or an illegal one (None); `receive` ends it. Games work side by side."""
        legal = action is not None and 0 <= action < len(self.actions)
        self.under_way = self.actions[action] if legal else None
        if legal:
            self.process.send({"do": "step", "action": self.under_way})

    def receive(self) -> tuple:
        """The outcome of the step that `send` began."""
        command, before = self.under_way, self.rate
        if command is not None:
            told = self.process.receive()
            self.history.append(command)
            self._read(told)
            self.rate = told.get("goal_rate", self._rate())
        self.tried.append(command or "")
        won = self.won
        gained = self.rate if self.goal_reward == "rate" else self.rate - before
        reward = self.success_reward * won + gained
        reward += 0.0 if command is not None else self.illegal_penalty
        last = self.tried[-self.repeat_limit :]
        stuck = len(last) == self.repeat_limit and len(set(last)) == 1
        truncated = not won and (stuck or len(self.tried) > self.max_history)
        reward = self.truncation_reward if truncated else reward
        return self._observe(), float(reward), won, truncated, self._info()

    def _ask(self, asked: dict) -> dict:
        self.process.send(asked)
        return self.process.receive()

    def _read(self, told: dict) -> None:
        """Take over what the engine says."""
        self.scene: Scene = read_scene(map(tuple, told["facts"]))
        self.seen = view(self.scene)
        self.won = told["won"]
        self.frame = None
        if "frame" in told:
            pixels = np.frombuffer(base64.b64decode(told["frame"]), np.uint8)
            frame = Image.fromarray(pixels.reshape(told["shape"]))
            self.frame = as_array(frame.resize(self.canvas, Image.Resampling.LANCZOS))
        offered = [a for a in told["actions"] if self.telling or not _tells(a)]
        self.actions = tuple(offered[:MAX_ACTIONS])

    def _rate(self) -> float:
        met, total = conditions_met(self.scene, self.game.goal)
        return met / total

    def _info(self) -> dict:
        mask = np.zeros(MAX_ACTIONS, np.int8)
        mask[: len(self.actions)] = 1
        return {
            "success": bool(self.won),
            "won": bool(self.won),
            "goal_rate": self.rate,
            "task_type": self.game.goal.task,
            "task": self.task,
            "executed": tuple(self.history),
            "admissible": self.actions,
            "action_mask": mask,
            "game": self.game.path,
        }

    def _observe(self) -> np.ndarray:
        return self.render().copy() if self.fresh_pictures else self.render()

    def render(self) -> np.ndarray:
        """What the agent sees: the simulator's frame, or a drawing of it."""
        return draw_scene(self.seen, self.canvas) if self.frame is None else self.frame

    def plan(self) -> list[str]:
        """The planner's commands from here to the goal; it knows where everything is."""
        return self._ask({"do": "plan"})["plan"]

    def close(self) -> None:
        if self.process is not None:
            self.process.close()
            self.process = None

    # --- being asked

    def prompt(self, style: str = "full") -> Prompt:
        check_style(style)
        done = self.history[-self.history_length :] if self.history_length else []
        seen = f"{expert.perception(self.seen)}\n" if self.scene_text else ""
        if style == "short":
            state = (
                f"{self.task}\n{seen}done: {', '.join(done) or 'nothing'}\n"
                f"can: {', '.join(self.actions)}"
            )
            return Prompt("Do the task. Reply in JSON.\n", state)
        listed = ", ".join(f'"{command}"' for command in done) or "none yet"
        offered = "\n".join(f'"{command}"' for command in self.actions)
        state = (
            f"Your task is to {self.task}.\n{seen}Commands given so far: {listed}.\n"
            f"Commands that are possible now:\n{offered}\nWhich one do you choose?"
        )
        return Prompt(_FULL_RULES, state)

    def longest_prompt(self, style: str) -> Prompt:
        """An upper bound on this game's prompts: a full history of its longest commands, and as
        many more of them possible as things lie in the fullest place."""
        longest = max((*self.actions, *self._commands()), key=len)
        most = max((len(place.contents) for place in self.scene.places), default=0)
        full = copy(self)
        full.history = [longest] * self.max_history
        full.actions = (*self.actions, *[longest] * (2 * most + 6))
        return full.prompt(style)

    def _commands(self) -> list[str]:
        """The longest commands there can be: a thing is brought to or taken from a place."""
        things = [t.name for p in self.scene.places for t in p.contents]
        places = [p.name for p in self.scene.places]
        if not things:
            return []
        thing, place = max(things, key=len), max(places, key=len)
        return [f"take {thing} from {place}", f"clean {thing} with {place}"]

    def read_answer(self, text: str) -> Answer:
        """Exact match with an admissible command, after case and spaces are made equal."""
        read = read_json_answer(text, KEYS, self.actions)
        action = read.fields.get("action")
        if read.action is None and isinstance(action, str):
            plain = " ".join(action.lower().split())
            if plain in self.actions and all(key in read.fields for key in KEYS):
                return Answer(text, plain, read.fields, None)
        return read

    def expert_answer(self, rng: np.random.Generator) -> str | None:
        """The searching expert's thought and command; None where it knows no way on."""
        actions = self._next_actions()
        if not actions:
            return None
        return self._answer(actions[0])

    def _answer(self, action: str) -> str:
        text = expert.thought(self._situation(), action)
        return f'{{"thoughts": {json.dumps(text)}, "action": {json.dumps(action)}}}'

    def _situation(self) -> expert.Situation:
        history = tuple(self.history)
        return expert.Situation(self.game.goal, self.seen, history, self.actions, self.holds)

    def _next_actions(self) -> list[str]:
        return expert.next_actions(self._situation()) if self.frame is None else []

    def guess_answer(self, written: str, previous: str | None) -> str:
        """The expert's answer as far as it agrees with what is written; the thought's command."""
        actions = self._next_actions()

        def guess_thought(values: list[str], rest: str) -> str | None:
            for action in actions:
                text = expert.thought(self._situation(), action)
                if text.startswith(rest):
                    return text
            return None

        def guess_action(values: list[str], rest: str) -> str | None:
            return rest or word_after(values[-1], expert.SO)

        return continue_answer(
            written, [('{"thoughts": "', guess_thought), ('", "action": "', guess_action)]
        )

    def judge(self, answer: Answer) -> Verdict:
        """It names what is seen and held; the command it aims at leads on; it is the action."""
        if self.frame is not None:
            return Verdict(None, None, None, judged=False)
        thoughts = answer.fields.get("thoughts")
        text = thoughts if isinstance(thoughts, str) else ""
        read = text.startswith(expert.perception(self.seen) + expert.WANT)
        if answer.action is None:
            return Verdict(read, False, False)
        named = word_after(text, expert.SO)
        if named is None:
            return Verdict(read, None, None)
        return Verdict(read, named in self._next_actions(), named == answer.action)

    def picture_labels(self) -> list[str]:
        """What the picture shows, slot by slot: the place, open or closed, the hand, four things;
        of each its kind and its number, of what is held its state too."""
        here, held = self.seen.here[0] if self.seen.here else None, self.seen.held
        things = [thing.name for thing in here.contents] if here else []
        things = [*things, "- -", "- -", "- -", "- -"][:4]
        named = [here.name if here else "room -", held.name if held else "- -", *things]
        state = "-" if here is None else "shows" if here.shows else "closed"
        flags = " ".join(sorted(held.flags)) if held else ""
        return [state, flags, *(part for name in named for part in name.rsplit(" ", 1))]

    def snapshot(self) -> "ALFWorld":
        found = copy(self)
        found.history, found.tried, found.process = list(self.history), list(self.tried), None
        return found

    def meeting(self) -> tuple:
        """Where the agent is, what is there, what it holds, and how much of the goal is met."""
        return (self.seen.at, self.seen.here, self.seen.held, self.rate)

    def optimum(self) -> Optimum:
        return Optimum(1.0, None, "every game is solvable by construction")

    def deal_key(self) -> tuple:
        return (self.game.goal.task, self.game.path)


def games_folder(folder: str) -> Path:
    """`folder`; without one $ALFWORLD_DATA, which must hold games, else small ones, made once."""
    if folder:
        return Path(folder)
    if own := os.environ.get("ALFWORLD_DATA"):
        if any(Path(own).glob("json_*")):
            return Path(own)
        raise ValueError(
            f"ALFWORLD_DATA={own} holds no games, no json_*: correct it, or unset it to play small "
            "games that are made here"
        )
    from turbo.envs.alfworld_games import default_games

    return default_games()


def _tells(command: str) -> bool:
    return command in TELLING or command.startswith("examine ")


@lru_cache(maxsize=16)
def find_games(folder: str, split: str, tasks: tuple[str, ...] = ()) -> tuple[Game, ...]:
    """The games of a split, in the order of their paths; ValueError where there are none.

    A folder as ALFWorld has it: json_2.1.1/<split>/<task>/<trial>/{game.tw-pddl, traj_data.json}.
    Without `folder` it is $ALFWORLD_DATA, or else small games that are made once and kept. Games
    with sliced objects, and those that ALFWorld marks as not solvable, are left out as by itself.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is unknown: use {', '.join(SPLITS)}")
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f"task {task!r} is unknown: use {', '.join(TASKS)}")
    root = games_folder(folder)
    files = sorted(root.glob(f"json_*/{split}/*/*/game.tw-pddl"))
    found = []
    for file in files:
        name = file.parent.parent.name
        kind = name.split("-")[0]
        if kind not in TASKS or "Sliced" in name or (tasks and kind not in tasks):
            continue
        if _UNSOLVABLE.search(file.read_bytes()) is None:
            found.append(str(file))
    if not found:
        of = f" of {', '.join(tasks)}" if tasks else ""
        raise ValueError(
            f"{root} holds no ALFWorld game{of} in {split}: make some with "
            f"`python -m turbo.envs.alfworld_games --out {root}`"
        )
    return tuple(read_game(path) for path in found)


@lru_cache(maxsize=1 << 16)
def read_game(path: str) -> Game:
    """A game and its goal, as its traj_data.json states it."""
    file = Path(path)
    file = file / "game.tw-pddl" if file.is_dir() else file
    try:
        found = json.loads((file.parent / "traj_data.json").read_text())
        told = found["pddl_params"]
        kinds = (told[f"{name}_target"].lower() for name in ("object", "parent", "toggle"))
        thing, place, lamp = kinds
        goal = Goal(found["task_type"], thing, place, lamp)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{file} is no ALFWorld game: {error}") from error
    if goal.task not in TASKS:
        raise ValueError(f"{file} has a task that is not played: {goal.task}")
    return Game(str(file), goal)


_FULL_RULES = """You are a robot in a household and are given a task. The picture shows what is \
before you: the whole room at first, later the piece of furniture that you went to, what lies in \
it or on it unless it is closed, and what you hold in your hand. You can hold one thing at a time. \
Closed furniture must be opened before you can see or reach what is inside. To clean a thing hold \
it and go to a sink basin, to heat it go to a microwave, to cool it go to a fridge.
In every turn you choose one of the commands that are possible. Any other one is not obeyed.
Reply with one JSON object and nothing else, in this form:
{"thoughts": "what you see, what you hold, what you still need, and what to do next", "action": \
"one of the possible commands, word for word"}
"""
