"""One won episode of ALFWorld in pictures: `python -m bench.alfworld_sheet`.

The searching expert plays a game that is made for it; the sheet of its frames, each with the
command that follows, is docs/results/alfworld_episode.png.

Left out: who learns from it (`turbo.sft`).
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from turbo.envs.alfworld import ALFWorld
from turbo.envs.alfworld_draw import contact_sheet
from turbo.envs.alfworld_games import generate
from turbo.flags import conclude, read_flags


@dataclass
class SheetConfig:
    """Draw one won episode of ALFWorld."""

    task: str = "pick_heat_then_place_in_recep"
    """type of the task"""
    seed: int = 0
    """seed of the game"""
    columns: int = 4
    """number of frames in a row"""
    out: str = "docs/results/alfworld_episode.png"
    """the picture that is written"""


def play(c: SheetConfig) -> tuple[list[np.ndarray], list[str]]:
    """The frames of an episode, and under each the command that was given then."""
    with tempfile.TemporaryDirectory() as folder:
        (game,) = generate(folder, 1, c.seed, "small", (c.task,))
        env, rng = ALFWorld(folder, own_process=False), np.random.default_rng(0)
        frame, _ = env.reset(options={"game": str(game)})
        frames, captions, won, truncated = [], [], False, False
        while not (won or truncated):
            command = env.read_answer(env.expert_answer(rng)).action
            frames.append(frame)
            captions.append(command)
            frame, _, won, truncated, _ = env.step(env.actions.index(command))
    return [*frames, frame], [*captions, f"{env.task}: {'won' if won else 'lost'}"]


def main(argv: list[str] | None = None) -> int:
    """Play and draw; the exit status."""
    try:
        c = read_flags(SheetConfig, sys.argv[1:] if argv is None else argv, "bench.alfworld_sheet")
        frames, captions = play(c)
        sheet = contact_sheet(frames, captions, c.columns)
        Path(c.out).parent.mkdir(parents=True, exist_ok=True)
        sheet.quantize(64, dither=Image.Dither.NONE).save(c.out, optimize=True)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(frames)} frames: {c.out}")
    return 0


if __name__ == "__main__":
    sys.exit(conclude(main))
