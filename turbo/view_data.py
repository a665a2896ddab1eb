"""What a page of `turbo.view` shows of a run, as data for JSON.

    name, env, settings, versions    from config.json
    ceilings                         the best possible play, from the environment's exact solver
    curves, evaluations              from metrics.jsonl, one list for each metric
    episodes, frames                 from episodes.jsonl, with what a filter asks for

A run that still trains may be read: a line that is being written is left out. Fields that an older
run did not record are not there.

An episode is marked `collapsed` where a thought of it is wrong and was said, word for word, in
another state too: it no longer looks at what it is about. Deals that cannot be won are not marked.

Left out: the page (`turbo.view`).
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from turbo import checkpoint
from turbo.batch import evenly
from turbo.envs.make import ENVIRONMENTS, make
from turbo.log import METRICS, read_jsonl
from turbo.measure import interval
from turbo.run import pool

FLAGS = ("success", "solvable")
TEXTS = ("frame", "state", "answer", "thought", "action", "error")  # of a step
NUMBERS = ("thought_tokens", "reward", "format_reward")


def read_run(path: Path, most: int) -> dict:
    """One run, with at most so many of its episodes, at even distances; 0: with none."""
    record = checkpoint.read_run(path)
    settings = {str(k): v for k, v in record["config"].items()}
    metrics = read_records(path / checkpoint.METRICS)
    episodes = read_records(path / checkpoint.EPISODES)
    marks = collapsed(episodes)
    chosen = evenly(len(episodes), most) if most else []
    shown = [episode(episodes[i]) | {"collapsed": marks[i]} for i in chosen]
    versions = record.get("versions")
    return {
        "name": path.resolve().name,
        "env": str(settings.get("env", "")),
        "settings": settings,
        "versions": versions if isinstance(versions, dict) else {},
        "ceilings": ceilings(settings),
        "curves": curves(metrics),
        "evaluations": columns([r for r in metrics if number(r.get("eval_success_rate"))]),
        "recorded": len(episodes),
        "episodes": shown,
        "frames": frames(episodes, shown),
    }


def state_of(path: Path) -> str:
    """What changes whenever a run's files do."""
    out = []
    for name in (checkpoint.CONFIG, checkpoint.METRICS, checkpoint.EPISODES):
        file = path / name
        stat = file.stat() if file.is_file() else None
        out.append(f"{stat.st_size}-{stat.st_mtime_ns}" if stat else "0")
    return ".".join(out)


def read_records(file: Path) -> list[dict]:
    """The records of a file that may not be there yet; each tells its update."""
    records = read_jsonl(file) if file.is_file() else []
    for line, record in enumerate(records, 1):
        if type(record.get("update")) is not int:
            raise ValueError(f"{file}, line {line} names no update: remove it")
    return records


def number(value: object) -> bool:
    """Whether a value is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def columns(records: list[dict]) -> dict[str, list]:
    """A list for every metric that the records name; None where one has no number."""
    names = [name for name in METRICS if any(number(r.get(name)) for r in records)]
    return {k: [r[k] if number(r.get(k)) else None for r in records] for k in names}


def curves(metrics: list[dict]) -> dict[str, list]:
    """What every update recorded, and the 95 % interval of its success (Wilson).

    Where no teacher guided by its KL, none was measured: the 0 that is recorded is no distance.
    """
    records = [r for r in metrics if number(r.get("success_rate"))]
    records = [r if r.get("teacher_kl_coef") else {**r, "teacher_kl": None} for r in records]
    out = columns(records)
    bands = [band(r["success_rate"], r.get("episodes")) for r in records]
    out["success_low"], out["success_high"] = [low for low, _ in bands], [high for _, high in bands]
    return out


def band(rate: float, episodes: object) -> tuple[float, float] | tuple[None, None]:
    """The interval of a success rate; nothing where the number of episodes is not known."""
    if not number(episodes) or not 0 <= rate <= 1 or not episodes >= 1:
        return None, None
    return interval(round(rate * episodes), round(episodes))


def ceilings(settings: dict) -> list[dict]:
    """The best possible success and return: of the deals trained on, and of all if those differ.

    Only the built-in environments are asked: to look at a run must not run code that it names.
    """
    name, hands, seed = (settings.get(k) for k in ("env", "hands", "seed"))
    if not isinstance(name, str) or name not in ENVIRONMENTS:
        return []
    asked = [("", {})]
    if name == "points24" and type(hands) is int and type(seed) is int and 0 < hands <= 715:
        asked = [("of the pool", {"hands": pool(hands, seed)}), ("of all hands", {})]
    out = []
    for label, options in asked:
        best = make(name, **options).optimum()
        own = {"success": best.success_rate, "return": best.episode_return, "source": best.source}
        out.append({"label": label, **own})
    return out


def steps_of(record: dict) -> list[dict]:
    """The steps of an episode's record, as far as they are steps."""
    steps = record.get("steps")
    return [s for s in steps if isinstance(s, dict)] if isinstance(steps, list) else []


def episode(record: dict) -> dict:
    """An episode as the page shows it; what is not of its kind is left out."""
    steps = [step(s) for s in steps_of(record)]
    deal = record.get("deal")
    return {
        "update": record["update"],
        "number": record.get("episode", 0),
        "deal": " ".join(map(str, deal)) if isinstance(deal, list) else "",
        **{k: record[k] for k in FLAGS if type(record.get(k)) is bool},
        "return": record["return"] if number(record.get("return")) else None,
        "prompt": str(record.get("prompt", "")),
        "left_out": record["left_out"] if number(record.get("left_out")) else 0,
        "illegal": any(s.get("action") is None for s in steps),
        "steps": steps,
    }


def step(record: dict) -> dict:
    """A step as the page shows it; its tokens tell the answer where they are there."""
    out = {k: record[k] for k in TEXTS if isinstance(record.get(k), str)}
    out |= {k: record[k] for k in NUMBERS if number(record.get(k))}
    tokens, kl, verdict = (record.get(k) for k in ("tokens", "kl", "verdict"))
    if isinstance(verdict, dict):
        out["verdict"] = {k: v for k, v in verdict.items() if isinstance(v, bool)}
    if isinstance(tokens, list) and tokens:
        out["tokens"] = [str(token) for token in tokens]
        out.pop("answer", None)
    if isinstance(kl, list):
        out["kl"] = [x if number(x) else None for x in kl]
    return out


def frames(records: Iterable[dict], shown: list[dict]) -> dict[str, str]:
    """The pictures that the shown steps name: PNG in base64, by name."""
    wanted = {s.get("frame") for e in shown for s in e["steps"]}
    out = {}
    for record in records:
        own = record.get("frames")
        for name, data in own.items() if isinstance(own, dict) else ():
            if name in wanted and isinstance(data, str):
                out[name] = data
    return out


def collapsed(records: list[dict]) -> list[bool]:
    """Which episodes say a wrong thought that was said in another state too."""
    said: dict[str, set] = defaultdict(set)  # thought -> the states in which it was
    wrong: list[set[str]] = []
    for record in records:
        mine = set()
        for place, step in enumerate(steps_of(record)):
            thought = step.get("thought")
            if not isinstance(thought, str):
                continue
            said[thought].add(state(record, place, step))
            if record.get("solvable") is not False and not may_be_right(step):
                mine.add(thought)
        wrong.append(mine)
    return [any(len(said[thought]) > 1 for thought in mine) for mine in wrong]


def state(record: dict, place: int, step: dict) -> tuple:
    """What a step was asked about, as far as it was recorded."""
    if "frame" in step and "state" in step:
        return str(record.get("deal")), str(step["frame"]), str(step["state"])
    return str(record.get("deal")), str(place)


def may_be_right(step: dict) -> bool:
    """Whether the exact solver finds nothing wrong with a thought, and finds something right."""
    verdict = step.get("verdict")
    parts = list(verdict.values()) if isinstance(verdict, dict) else []
    return any(part is True for part in parts) and all(part in (True, None) for part in parts)
