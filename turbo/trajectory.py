"""The sampled episodes of an update, as RUN/episodes.jsonl keeps them and `turbo.view` shows them.

A record is one episode of worker 0:

    update, episode, deal, success, solvable, return
    prompt      the unchanging text behind the picture
    frames      name -> PNG in base64, of the pictures that no earlier record of this update has
    left_out    steps at its end for which there was no room
    steps       answer, thought, action, error, reward, format_reward, verdict, and
                frame             name of the picture; null where there was no room for it
                state             the rest of the prompt
                tokens            the answer, piece by piece as it was sampled
                thought_tokens    how many of them are thought; the others are action
                kl                exact KL(policy || teacher) at each token, in nats; null where
                                  there is no teacher

The KL is that of the weights that played, before they learned. Some episodes at even distances are
taken, and what is written is bounded in steps and in bytes.

Left out: writing the file (`turbo.scribe`), pages (`turbo.view`).
"""

import base64
import codecs
import hashlib
import io
import json
import math

import numpy as np
from PIL import Image

from turbo.batch import evenly
from turbo.measure import thought
from turbo.model import VisionLanguageModel, Weights
from turbo.rollout import Episode, Rollout, Step
from turbo.run import Run, prompt_style
from turbo.score import token_kl

PARTS = ("perception", "aim", "follows")  # of a verdict
EPISODES = 8  # of an update
STEPS = 64  # of them, in all
BYTES = 1_000_000  # of an update's records
FRAME_BYTES = 20_000  # of one picture; a larger one loses colours, then size


def sample_episodes(run: Run, policy: Weights, rollout: Rollout) -> list[dict]:
    """The sample of the update that played `rollout` with these weights; empty but on worker 0."""
    c = run.config
    if not run.crew.leads:
        return []
    return episode_records(
        run.vlm,
        policy,
        run.teacher.weights if c.teaches else None,
        rollout,
        update=run.update + 1,
        temperature=c.temperature,
        prompt_style=prompt_style(c),
    )


def episode_records(
    vlm: VisionLanguageModel,
    policy: Weights,
    teacher: Weights | None,
    rollout: Rollout,
    *,
    update: int,
    temperature: float,
    prompt_style: str,
) -> list[dict]:
    """The records of some of a rollout's episodes."""
    chosen = choose(rollout.episodes)
    kl = {}
    if teacher is not None:
        rows = [row for own in chosen.values() for row in own]
        kl = token_kl(vlm, policy, teacher, rollout, rows, temperature=temperature)
    steps, records, room = rollout.steps, [], BYTES
    for number, own in chosen.items():
        episode = rollout.episodes[number]
        record = episode_record(update, number, episode, rollout.fixed)
        room -= size(record)
        shown = []  # pictures of the steps
        for row in own:
            told = step_record(vlm, steps[row], kl.get(row), prompt_style)
            room -= size(told)
            if room >= 0:
                record["steps"].append(told)
                shown.append(steps[row].picture)
        record["left_out"] = len(episode.steps) - len(shown)
        if shown:
            records.append((record, shown))
    add_frames(records, rollout.pictures, room)
    return [record for record, _ in records]


def choose(episodes: list[Episode]) -> dict[int, range]:
    """Numbers of some episodes at even distances, and which steps of the rollout are theirs.

    They have at most STEPS steps in all: the last episode may be cut short.
    """
    starts = [0]
    for episode in episodes:
        starts.append(starts[-1] + len(episode.steps))
    chosen, left = {}, STEPS
    for number in evenly(len(episodes), EPISODES):
        own = range(starts[number], starts[number + 1])[:left]
        left -= len(own)
        if own:
            chosen[number] = own
    return chosen


def episode_record(update: int, number: int, episode: Episode, prompt: str) -> dict:
    """One episode, its steps left out."""
    return {
        "update": update,
        "episode": number,
        "deal": [str(v) for v in episode.deal],
        "success": episode.success,
        "solvable": episode.solvable,
        "return": episode.episode_return,
        "prompt": prompt,
        "frames": {},
        "left_out": 0,
        "steps": [],
    }


def step_record(
    vlm: VisionLanguageModel, step: Step, kl: list[float] | None, prompt_style: str
) -> dict:
    """One step, its picture left out."""
    return {
        "frame": None,
        "state": step.asked.prompt(prompt_style).state,
        "tokens": pieces(vlm, step.tokens),
        "thought_tokens": step.thought,
        "kl": None if kl is None else [rounded(x) for x in kl],
        "answer": step.answer.text,
        "thought": thought(step),
        "action": step.answer.action,
        "error": step.answer.error,
        "reward": step.reward,
        "format_reward": step.format_reward,
        "verdict": {part: getattr(step.verdict, part) for part in PARTS},
    }


def pieces(vlm: VisionLanguageModel, tokens: list[int]) -> list[str]:
    """The text of each token, the end of the turn by its name.

    A character of several tokens stands with the last of them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    out = [decoder.decode(vlm.token_bytes[i]) for i in tokens]
    out[-1] += decoder.decode(b"", final=True)
    return out


def rounded(x: float) -> float | None:
    """Four digits are enough; None in place of what JSON cannot say."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


def size(record: dict) -> int:
    """Bytes of a record in the file."""
    return len(json.dumps(record)) + 2


def add_frames(
    records: list[tuple[dict, list[int]]], pictures: list[np.ndarray], room: int
) -> None:
    """Name the picture of every step; each is stored where it is shown first, while there is room.

    A record comes with the numbers of its steps' pictures.
    """
    names: dict[int, str | None] = {}
    for record, shown in records:
        for step, number in zip(record["steps"], shown, strict=True):
            if number not in names:
                name, data = frame(pictures[number])
                cost = len(data) + len(name) + 8
                names[number] = name if cost <= room else None
                if cost <= room:
                    room -= cost
                    record["frames"][name] = data
            step["frame"] = names[number]


def frame(picture: np.ndarray) -> tuple[str, str]:
    """Name and PNG, in base64, of a picture [H, W, 3]; at most FRAME_BYTES before the coding."""
    name = hashlib.sha256(picture.tobytes()).hexdigest()[:16]
    image = Image.fromarray(picture)
    data = png(image)
    while len(data) > FRAME_BYTES and min(image.size) > 1:
        palette = png(image.quantize(256, Image.Quantize.FASTOCTREE))  # the others are slow
        if len(palette) <= FRAME_BYTES:
            data = palette
            break
        image = image.reduce(2)
        data = png(image)
    return name, base64.b64encode(data).decode()


def png(image: Image.Image) -> bytes:
    """A picture as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
