"""Games of ALFWorld made here: seeded random rooms, with goals of all six types, and their plans.

    python -m turbo.envs.alfworld_games --out DIR --games 200 --seed 0

Each game is written as ALFWorld's own are, so that its tools read them:
DIR/json_2.1.1/SPLIT/TASK-OBJECT-None-RECEPTACLE-NUMBER/trial_T.../{traj_data.json, game.tw-pddl}.
The walkthrough is TextWorld's plan. What stands where is drawn in `alfworld_rooms`, and told to the
engine in `alfworld_pddl`. Left out: playing (`alfworld`), pictures.
"""

import fcntl
import json
import os
import random
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from turbo.envs.alfworld_engine import cache_folder, translation
from turbo.envs.alfworld_pddl import Planner, import_alfworld, problem, sentence, spelling
from turbo.envs.alfworld_process import GameProcess, OwnGame
from turbo.envs.alfworld_rooms import (
    ROOMS,
    SIZES,
    SPLITS,
    Game,
    fill_room,
    identity,
    is_held_out,
    room_text,
    sample_room,
    split_of,
)
from turbo.envs.alfworld_scene import TASKS

FOLDER = "json_2.1.1"  # as ALFWorld names it
RECORD = "games.json"  # with what settings the games were made
READY = "ready"  # in the user's cache, when all games are made
FORMAT = 1  # of what is drawn from a seed; to be raised when that changes
ATTEMPTS = 1_000  # to draw a game that is new, in the split, and has a plan
AHEAD = 8  # games that a maker may have been asked for
WORTH = 16  # games that are worth another process
EVERY = 50  # games after which it is told how far it is, where no bar is shown


@dataclass(frozen=True)
class Made:
    """A game on disk."""

    path: Path  # of its game.tw-pddl
    kept: bool  # it was there before
    without_plan: int  # draws before it that had no plan


def generate(
    out: str | Path,
    games: int = 200,
    seed: int = 0,
    size: str = "small",
    tasks: Sequence[str] = tuple(TASKS),
    split: str = "train",
    rooms: Sequence[str] = tuple(ROOMS),
) -> list[Path]:
    """Write the games of one split, the tasks in turn; games that are there are kept.

    Returns the paths of their game.tw-pddl, as TextWorld opens them.
    """
    with making(1) as makers:
        made = make_games(out, games, seed, size, tasks, split, rooms, makers)
        return [game.path for game in made]


class Maker:
    """Makes games that are asked for: here, or in a process of its own (`alfworld_engine`)."""

    @cached_property
    def planner(self) -> Planner:
        """TextWorld's, when it is first needed."""
        return Planner()

    def make(self, asked: dict) -> dict:
        """Plan and write one game, drawn anew from what names it; "made" says if it has a plan."""
        game = next(islice(draw_games(*asked["game"]), asked["draw"], None))
        walkthrough = self.planner.solve(game)
        if walkthrough:
            folder = Path(asked["folder"])
            write_game(folder, game, walkthrough, self.planner)
            translation(folder / "game.tw-pddl", apart=False)  # kept: playing it begins at once
        return {"made": bool(walkthrough)}


@contextmanager
def making(jobs: int) -> Iterator[list[OwnGame | GameProcess]]:
    """So many makers in processes of their own, or one in this process."""
    import_alfworld()
    if jobs == 1:
        yield [OwnGame(Maker())]
        return
    with ExitStack() as ended:
        yield [ended.enter_context(closing(GameProcess("make"))) for _ in range(jobs)]


def make_games(
    out: str | Path,
    games: int,
    seed: int,
    size: str,
    tasks: Sequence[str],
    split: str,
    rooms: Sequence[str],
    makers: Sequence[OwnGame | GameProcess],
) -> Iterator[Made]:
    """`generate`, one game after the other; each maker works ahead of what was yielded.

    Which games they are does not depend on the makers, with one exception: what replaces a draw
    that has no plan is none of the games that are under way.
    """
    check(games, seed, size, tasks, split, rooms)
    out, seen = Path(out), set()
    keep_record(out, dict(seed=seed, size=size, tasks=list(tasks), rooms=list(rooms)))
    ahead = AHEAD * len(makers) if len(makers) > 1 else 0
    # A draw without a plan is replaced here: the others are busy with the games behind it.
    here = makers[0] if len(makers) == 1 else OwnGame(Maker())
    turns, waiting = cycle(makers), deque()
    for number in range(games):
        wanted = _Wanted(
            out, (seed, size, tasks[number % len(tasks)], split, number, tuple(rooms)), seen
        )
        wanted.ask(next(turns))
        waiting.append(wanted)
        if len(waiting) > ahead:
            yield waiting.popleft().made(here)
    while waiting:
        yield waiting.popleft().made(here)


class _Wanted:
    """A game that is to be made, by the first of its draws that is new and has a plan."""

    def __init__(self, out: Path, named: tuple, seen: set):
        self.out, self.named, self.seen = out, named, seen
        self.draws, self.without_plan = enumerate(draw_games(*named)), 0

    def ask(self, maker: OwnGame | GameProcess) -> None:
        """Draw, and ask the maker for the game unless it is there."""
        draw, game = next(drawn for drawn in self.draws if identity(drawn[1]) not in self.seen)
        self.seen.add(identity(game))
        _, _, _, split, number, _ = self.named
        self.folder = game_folder(self.out, game, split, number)
        self.maker = None if is_complete(self.folder) else maker
        if self.maker:
            asked = {"do": "make", "game": self.named, "draw": draw, "folder": str(self.folder)}
            self.maker.send(asked)

    def made(self, here: OwnGame | GameProcess) -> Made:
        """Wait for the game; where it has no plan, ask the maker `here`, which is free, for the
        next one."""
        while self.maker and not self.maker.receive()["made"]:
            self.without_plan += 1
            self.ask(here)
        return Made(self.folder / "game.tw-pddl", self.maker is None, self.without_plan)


def draw_games(
    seed: int, size: str, task: str, split: str, number: int, rooms: Sequence[str]
) -> Iterator[Game]:
    """Games of a split for one number, until one of them serves.

    A game of valid_seen stands in the room of the training game with its number.
    """
    held_out = split == "valid_unseen"
    rng = random.Random(f"room {seed} {size} {number} {held_out}")
    while is_held_out(room := sample_room(rng, task, size, rooms)) != held_out:
        pass
    rng = random.Random(f"objects {seed} {size} {number} {split}")
    for _ in range(ATTEMPTS):
        game = fill_room(rng, room, task, size)
        if split_of(game) == split:
            yield game
    raise RuntimeError(
        f"game {number + 1} of {split}, {task}, is nowhere to be found in the {size} "
        f"{room_text(room)}: ask for fewer games, or for larger ones with --size"
    )


def game_folder(out: Path, game: Game, split: str, number: int) -> Path:
    """Where a game is written; the last part holds its hash."""
    goal = game.goal
    name = (
        f"{goal.task}-{spelling(goal.thing)}-None-{spelling(goal.place or goal.lamp)}-{number + 1}"
    )
    return out / FOLDER / split / name / f"trial_T{identity(game)[:12]}"


def is_complete(folder: Path) -> bool:
    """Whether both files of a game are there and whole."""
    try:
        json.loads((folder / "traj_data.json").read_text(encoding="utf-8"))
        return bool(json.loads((folder / "game.tw-pddl").read_text("utf-8"))["walkthrough"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_game(folder: Path, game: Game, walkthrough: list[str], planner: Planner) -> None:
    """Write both files of a game, that with the walkthrough last."""
    goal = game.goal
    trajectory = {
        "task_type": goal.task,
        "task_id": folder.name,
        "pddl_params": {
            "object_target": spelling(goal.thing),
            "parent_target": spelling(goal.place),
            "toggle_target": spelling(goal.lamp),
            "mrecep_target": "",
            "object_sliced": False,
        },
        "made_by": {"command": "turbo.envs.alfworld_games", "room": room_text(game.room)},
    }
    content = {
        "pddl_domain": planner.domain,
        "grammar": planner.grammar.replace("UNKNOWN GOAL", sentence(game)),
        "pddl_problem": problem(game),
        "solvable": True,
        "walkthrough": walkthrough,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "traj_data.json", trajectory)
    write_json(folder / "game.tw-pddl", content)


def write_json(path: Path, content: dict) -> None:
    """Write a file as a whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def keep_record(out: Path, settings: dict) -> None:
    """Note with what settings games are made in a folder; ValueError if with others before."""
    settings = {"format": FORMAT, **settings}
    if (out / RECORD).exists():
        before = read_record(out)
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{out} holds games of {name} {before.get(name)}, not {value}: "
                    "choose another --out, or --overwrite them"
                )
        return
    if any((out / FOLDER / split).exists() for split in SPLITS):
        raise ValueError(f"{out} holds games that were not made here: choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECORD, settings)


def read_record(out: Path) -> dict:
    """The settings with which the games of a folder were made."""
    try:
        return dict(json.loads((out / RECORD).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{out / RECORD} cannot be read ({error}): --overwrite it") from error


def remove_games(out: Path) -> None:
    """Remove the games of a folder if they were made here."""
    if (out / RECORD).exists():
        for split in SPLITS:
            shutil.rmtree(out / FOLDER / split, ignore_errors=True)
        (out / RECORD).unlink()


DEFAULT_GAMES, DEFAULT_HELD_OUT = 600, 120  # of those that are made where a user has none


def default_games() -> Path:
    """A folder of small games in the user's cache, made when it is first asked for."""
    out = cache_folder() / "alfworld-small"
    if (out / READY).exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # of several processes the first one makes them
        if not (out / READY).exists():
            what = f"{DEFAULT_GAMES + 2 * DEFAULT_HELD_OUT} small games of ALFWorld in {out}, once"
            print(f"making {what}; it takes minutes, Ctrl-C keeps what is made", file=sys.stderr)
            print(run(GamesConfig(str(out), DEFAULT_GAMES, DEFAULT_HELD_OUT)), file=sys.stderr)
            (out / READY).touch()
    return out


# --- the command


@dataclass
class GamesConfig:
    """Make games of ALFWorld: household tasks in random rooms, for training and for evaluation."""

    out: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """folder for the games; set ALFWORLD_DATA to it to play them. Games in it are kept"""
    games: int = 200
    """number of games for training"""
    held_out: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """number of games for each of two evaluations: valid_unseen, in rooms that training never uses,
    and valid_seen, in rooms of training with other layouts (None: a fifth of --games)"""
    seed: int = 0
    """of everything that is random"""
    size: Literal["small", "medium", "realistic"] = "small"
    """receptacles and objects of a room; small: 6-8 and 6-9, of few kinds; medium: 13-17 and 18-22;
    realistic: 33-38 and 42-48"""
    tasks: tuple[str, ...] = tuple(TASKS)
    """types of the tasks, taken in turn"""
    rooms: tuple[str, ...] = tuple(ROOMS)
    """kinds of the rooms"""
    jobs: int = 0
    """games made at once, each in a process of its own (0: one a core)"""
    overwrite: bool = False
    """make all games of DIR anew"""


def check(
    games: int, seed: int, size: str, tasks: Sequence[str], split: str, rooms: Sequence[str]
) -> None:
    """ValueError for settings that cannot be."""
    if games < 0 or seed < 0:
        raise ValueError(f"numbers of games and seeds are not negative, got {games} and {seed}")
    for what, named, known in (
        ("size", [size], SIZES),
        ("task", tasks, TASKS),
        ("split", [split], SPLITS),
        ("room", rooms, ROOMS),
    ):
        if not named:
            raise ValueError(f"no {what} is named: use {', '.join(known)}")
        for name in named:
            if name not in known:
                raise ValueError(f"{what} {name!r} is unknown: use {', '.join(known)}")
    for task in tasks:
        sample_room(random.Random(0), task, size, rooms)


def run(c: GamesConfig) -> str:
    """Make all games; what to say of it."""
    held_out = c.games // 5 if c.held_out is None else c.held_out
    numbers = dict(zip(SPLITS, (c.games, held_out, held_out), strict=True))
    for split, number in numbers.items():
        check(number, c.seed, c.size, c.tasks, split, c.rooms)
    if c.games < max(1, held_out):
        raise ValueError(f"--games must be at least 1 and --held-out, got {c.games}, {held_out}")
    if c.jobs < 0:
        raise ValueError(f"--jobs must be at least 0, got {c.jobs}")
    jobs = c.jobs or len(os.sched_getaffinity(0))
    jobs = min(jobs, 1 + sum(numbers.values()) // WORTH)
    console, started, made = Console(stderr=True), time.perf_counter(), []
    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        making(jobs) as makers,
        Progress(
            *columns,
            TextColumn("{task.description}"),
            console=console,
            redirect_stdout=False,  # the translator redirects it itself
            disable=not console.is_terminal,
        ) as bar,
    ):
        if c.overwrite:  # the engine is there
            remove_games(Path(c.out))
        shown = bar.add_task("", total=sum(numbers.values()))
        for split, number in numbers.items():
            bar.update(shown, description=split)
            settings = (number, c.seed, c.size, c.tasks, split, c.rooms)
            for game in make_games(c.out, *settings, makers):
                made.append(game)
                bar.advance(shown)
                if bar.disable and len(made) % EVERY == 0 and not game.kept:
                    told = how_far(made, sum(numbers.values()), time.perf_counter() - started)
                    print(told, file=sys.stderr)
    new = sum(not game.kept for game in made)
    rate = new / (time.perf_counter() - started)
    return (
        f"{', '.join(f'{number} {split}' for split, number in numbers.items())} games in {c.out}: "
        f"{len(made) - new} kept, {new} new ({rate:.1f} a second), "
        f"{sum(game.without_plan for game in made)} drawn again for want of a plan"
    )


def how_far(made: Sequence[Made], total: int, seconds: float) -> str:
    """How many games there are, and how long the others will take at the rate of the new ones."""
    each = seconds / max(1, sum(not game.kept for game in made))
    return f"{len(made)} of {total} games, {(total - len(made)) * each / 60:.1f} minutes left"


def main(argv: list[str] | None = None) -> int:
    """Make games; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    c = tyro.cli(GamesConfig, args=argv, prog="turbo.envs.alfworld_games")
    try:
        print(run(c))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | OSError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
