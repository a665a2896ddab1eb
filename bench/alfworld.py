"""How fast ALFWorld plays: `python -m bench.alfworld`, into bench/results/.

    stock     TextWorld's environment with ALFWorld's wrappers, as ALFWorld itself plays
    in        our engine in this process, frames drawn
    apart     our engine, each game in a process of its own, frames drawn here

Rooms are small and realistic, environments 1 and 16; all play the same games by the same commands,
those of the stored walkthroughs, again and again. Resets are timed apart, of games that were played
before. 16 stock environments in one process are as fast as one, and are not measured.

Left out: the model that plays (`bench.train_step`).
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.harness import (
    alternate,
    append_rows,
    environment,
    measurement,
    read_settings,
    results_file,
    spread,
)
from turbo.envs.alfworld import ALFWorld
from turbo.envs.alfworld_games import generate

HORIZON = 1_000_000  # commands of an episode: none is truncated


@dataclass
class AlfworldBenchConfig:
    """Measure the steps a second of ALFWorld's engines, and what a reset takes."""

    games: int = 4
    """games of each size"""
    repeats: int = 5
    """number of measurements of each variant, in turn"""
    steps: int = 64
    """environment steps of a measurement of 1 environment; 16 play as many each"""
    stock_steps: int = 8
    """environment steps of a measurement of TextWorld's own environment, which takes its time"""
    save: bool = True
    """append the rows to bench/results/"""


class Stock:
    """ALFWorld's own text environment, behind the three calls that are measured."""

    def __init__(self):
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs import PddlEnv

        infos = textworld.EnvInfos(admissible_commands=True, won=True, facts=True)
        self.env, self.loaded = AlfredDemangler(PddlEnv(infos)), ""

    def reset(self, game: str) -> None:
        """Begin a game; another one is loaded first."""
        if game != self.loaded:
            self.env.load(game)
            self.loaded = game
        self.env.reset()

    def begin(self, command: str) -> None:
        """Do a command."""
        self.env.step(command)

    def end(self) -> None:
        """Nothing is under way."""


class Ours:
    """The environment of this project, with its frames."""

    def __init__(self, games: str, own_process: bool):
        self.env = ALFWorld(
            games, own_process=own_process, max_history=HORIZON, repeat_limit=HORIZON
        )

    def reset(self, game: str) -> None:
        """Begin a game."""
        self.env.reset(options={"game": game})

    def begin(self, command: str) -> None:
        """Ask for a command."""
        self.env.send(self.env.actions.index(command))

    def end(self) -> None:
        """Wait until it is done."""
        self.env.receive()


def walk(envs: list, plans: dict[str, list[str]], steps: int) -> tuple[float, float]:
    """(seconds of the steps, seconds of the resets) while every environment does `steps` steps."""
    names, stepping, resetting = list(plans), 0.0, 0.0
    for episode in range(1 << 30):
        started = time.perf_counter()
        own = [names[(episode + i) % len(names)] for i in range(len(envs))]
        for env, name in zip(envs, own, strict=True):
            env.reset(name)
        resetting += time.perf_counter() - started
        longest = max(map(len, plans.values()))
        started = time.perf_counter()
        for number in range(min(longest, steps)):
            for env, name in zip(envs, own, strict=True):
                env.begin(plans[name][number] if number < len(plans[name]) else "look")
            for env in envs:
                env.end()
        stepping += time.perf_counter() - started
        steps -= min(longest, steps)
        if steps <= 0:
            return stepping, resetting / (episode + 1)
    raise AssertionError("not reached")


def measure(size: str, count: int, c: AlfworldBenchConfig, folder: Path) -> list[dict]:
    """Rows of one size and number of environments."""
    paths = [str(p) for p in generate(folder / size, c.games, size=size)]
    plans = {p: json.loads(Path(p).read_text())["walkthrough"] for p in paths}
    made = {
        "stock": [Stock()] if count == 1 else [],
        "in": [Ours(str(folder / size), False) for _ in range(count)],
        "apart": [Ours(str(folder / size), True) for _ in range(count)],
    }
    asked = {name: c.stock_steps if name == "stock" else c.steps for name in made}

    def run(name: str) -> Callable[[], tuple[float, float]]:
        return lambda: walk(made[name], plans, asked[name])

    rows = []
    measured = alternate({name: run(name) for name, envs in made.items() if envs}, c.repeats)
    for name, found in measured.items():
        seconds = [told for _, told in found]
        figures = {
            ("steps_per_second", "steps/s"): [asked[name] * count / s for s, _ in seconds],
            ("seconds_reset", "s"): [r / count for _, r in seconds],
        }
        for (metric, unit), values in figures.items():
            s = spread(values)
            print(f"{size:10} {count:3} {name:6} {metric:17} {s.median:10.4g} {unit}", flush=True)
            shape = f"{size} rooms, {count} environments"
            rows.append(measurement("alfworld", name, shape, metric, unit, s))
    for env in made["apart"]:
        env.env.close()
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and append to the results; the exit status."""
    c = read_settings(AlfworldBenchConfig, argv, "bench.alfworld")
    where = environment()
    with tempfile.TemporaryDirectory() as folder:
        for size in ("small", "realistic"):
            for count in (1, 16):
                rows = measure(size, count, c, Path(folder))
                if c.save:
                    append_rows(results_file(), [where | row for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
