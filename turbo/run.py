"""A training run: what it holds, how it is saved and restored, what its settings mean.

Left out: the order of training (`turbo.train`), console and log files (`turbo.scribe`).
"""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from turbo import checkpoint
from turbo.config import TrainConfig
from turbo.corrector import TOLD, Corrector, Usage
from turbo.envs.alfworld import find_games, games_folder
from turbo.envs.alfworld_engine import check_engine
from turbo.envs.base import VisualEnv
from turbo.envs.make import make, takes, tiny_kwargs
from turbo.faults import FaultLog, NumericalFault, diagnosis
from turbo.guidance import Examples
from turbo.hub import has_card, observation, open_model, plan_prompts
from turbo.log import read_jsonl
from turbo.lora import Lora, new_lora
from turbo.measure import evaluate
from turbo.memory import Plan
from turbo.model import ValueHead, VisionLanguageModel, Weights
from turbo.optimizer import load_optimizer, new_optimizer, optimizer_tensors
from turbo.parallel import Crew
from turbo.phases import Phases
from turbo.rollout import RolloutOptions, Table, mix
from turbo.sft_config import SftConfig
from turbo.teacher import Teacher, without
from turbo.update import Learner

PARTS = ("optimizer", "teacher", "examples", "value_head")  # of a checkpoint's state
SCORE_SEED = 777  # the deals that weigh checkpoints are not those of the evaluations


class Run:
    """All that a run holds: model, LoRA, critic, optimizer, teacher, dataset, games, counters."""

    def __init__(self, config: TrainConfig, path: Path, crew: Crew):
        self.config, self.path, self.crew = config, path, crew
        self.vlm = open_model(config)
        seed = mix(config.seed, 0) % 2**31
        self.lora: Lora = new_lora(self.vlm.matrices, config.lora_rank, config.lora_alpha, seed)
        torch.manual_seed(seed)
        critic = config.advantage == "gae"
        self.value_head = ValueHead(self.vlm.text.dim).to(self.vlm.device) if critic else None
        self.learner = Learner(self.vlm, self.lora, self.value_head, crew, config)
        self.optimizer = new_optimizer(self.learner, config)
        self.teacher = Teacher(self.vlm, self.lora, config)
        self.faults = FaultLog(path / checkpoint.FAULTS, config.max_faults, crew.rank)
        self.examples = Examples(config.sft_max)
        self.corrector = new_corrector(config, crew.size) if config.guidance == "gtr" else None
        self.asked = dict.fromkeys(TOLD, 0)  # of an external teacher, by all workers until now
        self.phases = Phases()  # of the update under way
        make_env, options = env_maker(config), rollout_options(config)
        self.table = Table(self.vlm, make_env, options, crew, self.phases)
        self.plan = check_prompts(self.vlm, self.table.scout, config)
        self.beta = 1.0 if config.kl_coef == "auto" else float(config.kl_coef)
        self.update, self.env_steps, self.elapsed = 0, 0, 0.0
        self.best = -1, -1.0  # evaluation of the policy: its update, the success rate
        self.saved: Path | None = None  # the checkpoint that was loaded or saved last
        # What an interrupted evaluation owes: the record of its update, {} before the first one
        self.owed: dict | None = {} if config.eval_start else None
        self.is_over = False  # all updates done, and the last evaluation written

    def save(self) -> None:
        """Write a checkpoint from which `restore` continues bit for bit."""
        if not all(p.isfinite().all() for p in self.learner.parameters()):  # alike in all workers
            raise NumericalFault(f"not saved: {diagnosis(self.lora, {})}")
        if not self.crew.leads:
            return
        teacher, teacher_data = self.teacher.state_dict()
        state = {f"teacher/{k}": v for k, v in teacher.items()}
        state |= optimizer_tensors(self.optimizer)
        state |= {f"examples/{k}": v for k, v in self.examples.state_dict().items()}
        if self.value_head is not None:
            state |= {f"value_head/{k}": v for k, v in self.value_head.state_dict().items()}
        meta = {
            "update": self.update,
            "env_steps": self.env_steps,
            "elapsed": self.elapsed,
            "beta": self.beta,
            "asked": self.asked,
            "moments": sum(k.startswith("optimizer/") for k in state),
            "teacher": teacher_data,
        }
        where, keep = (self.path, self.update), self.config.keep
        others = dict(before=self.saved, best=self.best[0])
        self.saved = checkpoint.save(*where, self.lora.state_dict(), state, meta, keep, **others)

    def checkpoint_bytes(self) -> tuple[int, int, int]:
        """About what a checkpoint takes at the end of the run: without the history, the history,
        and how much of that it does not share with the one before.

        Factors and their two moments, the teacher's sums, the dataset, the critic.
        """
        c, size = self.config, lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
        trained = size(self.learner.parameters())
        own = 3 * trained
        history = fresh = 0
        if kept := c.kept_checkpoints:
            dense = 4 * sum(matrix.numel() for matrix in self.teacher.base.values())
            sums = (4 if c.merge == "ties" else 1) * dense
            own += dense if self.teacher.small else 0
            if self.teacher.streaming:
                own += sums
            else:
                numbers = sum(p.numel() for p in self.lora.parameters())
                entry = numbers * self.teacher.kept_dtype.itemsize
                fresh = min(kept, c.checkpoints_an_update * c.save_every) * entry
                history = kept * entry
        if c.imitates:
            examples = c.updates * (c.sft_rows or 2 * c.steps_per_update)
            examples = min(c.sft_max or examples, examples)
            places = 32 if self.vlm.text.small else 4 * 128  # with those of deeper layers
            own += examples * 4 * (places * self.vlm.text.dim + 2 * c.max_new_tokens)
        return own, history, fresh

    def lack_of_space(self) -> str:
        """What is missing where the disk has no room for this run's checkpoints; else nothing."""
        keep = self.config.keep
        # A new one is whole before the oldest goes; the best one may be older.
        count = keep + 1 + (self.config.eval_every > 0)
        own, history, fresh = self.checkpoint_bytes()
        needed, free = count * own + history, shutil.disk_usage(self.path).free
        if self.config.history_max:  # what it drops stays in the older ones
            needed += keep * fresh
        if needed <= free + checkpoint.disk_bytes(self.path):  # what is there makes room in time
            return ""
        return (
            f"{self.path} has {megabytes(free)} free, and {count} checkpoints take about "
            f"{megabytes(needed)}: make room, choose another --out, or lower --keep or "
            "--history-max"
        )

    def restore(self) -> None:
        """Continue from the run's newest checkpoint, or from the start where it has none yet;
        metrics written after it are dropped."""
        problem = ""
        try:
            if checkpoint.checkpoints(self.path):
                saved = checkpoint.load_to_go_on(self.path)
                self._load(saved)
                problems = [f"{told}; going on from {saved.folder}" for told in saved.problems]
                problems += [
                    f"{told}, and so it is in every checkpoint: the teacher goes on without it"
                    for told in saved.lost.values()
                ]
                for told in problems if self.crew.leads else ():
                    print(f"warning: {told}", file=sys.stderr)
        except checkpoint.CheckpointError as error:
            problem = str(error)
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            problem = (
                f"the checkpoint of {self.path} is not of these settings: {error}; resume it with "
                "the program and the model that made it"
            )
        if problem := self.crew.problem(problem):  # maybe of one worker alone
            raise ValueError(problem)
        records = []
        written = (checkpoint.EPISODES, checkpoint.WARNINGS, checkpoint.METRICS)
        for name in written if self.crew.leads else ():
            file = self.path / name
            if file.exists():
                records = [r for r in read_jsonl(file) if r["update"] <= self.update]
                if name == checkpoint.METRICS:
                    records = self._take_owed(records)
                    for record in records:
                        self.note_evaluation(record["update"], record.get("eval_success_rate"))
                checkpoint.write_text(file, "".join(json.dumps(r) + "\n" for r in records))
        known = self.owed, self.is_over, self.best
        self.owed, self.is_over, self.best = self.crew.share(known)[0]

    def _load(self, saved: checkpoint.Checkpoint) -> None:
        state, meta = saved.state, saved.meta
        odd = [k for k in state if k.split("/")[0] not in PARTS]
        count = sum(k.startswith("optimizer/") for k in state)
        if odd or count != meta["moments"]:
            raise ValueError(f"its state has {odd[0]!r}" if odd else f"{count} moments were saved")
        self.lora.load_state_dict(saved.adapter)
        load_optimizer(self.optimizer, state)
        if self.value_head is not None:
            self.value_head.load_state_dict(checkpoint.section(state, "value_head/"))
        self.examples.load_state_dict(checkpoint.section(state, "examples/"))
        teacher = without(meta["teacher"], saved.lost) if saved.lost else meta["teacher"]
        self.teacher.load_state_dict(checkpoint.section(state, "teacher/"), teacher)
        self.update, self.env_steps = meta["update"], meta["env_steps"]
        self.elapsed, self.beta = meta["elapsed"], meta["beta"]
        self.asked |= meta.get("asked", {})  # older runs began anew
        if self.corrector is not None and self.crew.leads:
            self.corrector.usage = Usage(**self.asked)
        self.saved = saved.folder

    def note_evaluation(self, update: int, success_rate: float | None) -> None:
        """Hear of an evaluation of the policy; the first of the best ones counts."""
        if update and success_rate is not None and success_rate > self.best[1]:
            self.best = update, success_rate

    def _take_owed(self, records: list[dict]) -> list[dict]:
        """The records, less the last one where its evaluation is due and was not finished."""
        c, last = self.config, records[-1] if records else None
        self.owed = None
        if last is None:
            self.owed = {} if c.eval_start else None
        elif "eval_success_rate" not in last and due(c, self.update):
            self.owed = records.pop()
        else:
            final = "success_rate" not in last and self.update > 0
            self.is_over = final and self.update >= c.updates
        return records

    def evaluate(self, teacher: bool = False) -> dict[str, float]:
        """Figures of the policy, or of the merged teacher, on fresh deals.

        The deals are of the environment's own distribution.
        """
        c = self.config
        self.phases.restart("evaluate teacher" if teacher else "evaluate policy")
        with torch.no_grad():
            weights = self.teacher.weights if teacher else self.vlm.weights(self.lora)
        figures = self._play(weights, c.eval_episodes, c.seed, held_out(c.env))
        self.phases.end()
        return figures

    def score(self) -> float | None:
        """The policy's success on the fixed deals that weigh checkpoints; None where none are."""
        c = self.config
        if c.weighting != "score" or not c.score_episodes:
            return None
        with torch.no_grad():
            weights = self.vlm.weights(self.lora)
        # An update that has begun to learn is finished: this is part of it.
        # What weighs the teacher is not what it is evaluated on.
        figures = self._play(weights, c.score_episodes, c.seed + SCORE_SEED, "all", patient=True)
        return figures["success_rate"]

    def _play(
        self, weights: Weights, episodes: int, seed: int, split: str, patient: bool = False
    ) -> dict:
        c = self.config
        return evaluate(
            self.vlm,
            weights,
            env_maker(dataclasses.replace(c, hands=0), split),
            episodes=episodes,
            seed=seed,
            temperature=c.eval_temperature,
            max_new_tokens=c.max_new_tokens,
            prompt_style=prompt_style(c),
            crew=self.crew,
            envs=c.envs,
            patient=patient,
            phases=self.phases,
        )


def space(run: Run) -> str:
    """What a checkpoint takes and what is free where it goes, in words."""
    free = shutil.disk_usage(run.path).free
    own, _, fresh = run.checkpoint_bytes()
    return f"a checkpoint takes about {megabytes(own + fresh)}, {megabytes(free)} free"


def megabytes(count: int) -> str:
    """A number of bytes, for people."""
    return f"{count / 1e6:,.1f} MB"


def due(c: TrainConfig, update: int) -> bool:
    """Whether there is an evaluation along the way after so many updates."""
    return bool(c.eval_every) and update > 0 and update % c.eval_every == 0 and update < c.updates


def new_corrector(c: TrainConfig, workers: int) -> Corrector:
    """The client of the external model; its requests at once are shared by the workers."""
    return Corrector(
        c.teacher_url,
        c.teacher_model,
        key=os.environ.get(c.teacher_key_env, ""),
        concurrency=max(1, c.teacher_concurrency // workers),
        timeout=c.teacher_timeout,
        max_tokens=2 * c.max_new_tokens,
        temperature=c.teacher_temperature,
    )


def env_maker(c: TrainConfig, split: str = "all", **more):
    """A function that makes one environment as the settings want it, and with `more` options.

    `split` is "all" for what is trained on, "seen" or "unseen" for deals that are told apart.
    """
    options = tiny_kwargs(c.env) if observation(c) == "small" else {}
    if c.env == "alfworld":
        options |= {**alfworld_options(c, SPLITS[split]), "backend": c.backend}
    if c.env == "points24":
        options["split"] = split
        if c.hands:
            options["hands"] = pool(c.hands, c.seed)
    if c.env not in ("numberline", "alfworld") and takes(c.env, "early_truncation"):
        options["early_truncation"] = c.early_truncation
    return lambda: make(c.env, **options, **more)


LARGEST = 8  # games whose longest prompts are tried before training
SPLITS = {"all": "train", "seen": "valid_seen", "unseen": "valid_unseen"}  # ALFWorld's names


def alfworld_options(c: TrainConfig | SftConfig, split: str) -> dict:
    """What settings say of ALFWorld's games."""
    tasks = tuple(task.strip() for task in c.tasks.split(",") if task.strip())
    return {
        "games": c.games,
        "split": split,
        "tasks": tasks,
        "history_length": c.history_length,
    }


def find_alfworld(c: TrainConfig | SftConfig, *splits: str) -> None:
    """Find the games that the settings ask for, or make those that all settings have.

    Before workers start: one process makes them. ValueError where a split ("all", "seen",
    "unseen"; none named: those of training and of its evaluations) has none, and without the
    engine.
    """
    if c.env != "alfworld":
        return
    check_engine()
    if isinstance(c, TrainConfig):  # a run that is resumed plays the same ones
        c.games = str(games_folder(c.games).resolve())
    for split in splits or (("all", held_out(c.env)) if c.eval_episodes else ("all",)):
        options = alfworld_options(c, SPLITS[split])
        find_games(options["games"], options["split"], options["tasks"])


def check_prompts(vlm: VisionLanguageModel, env: VisualEnv, c: TrainConfig) -> Plan | None:
    """The plan of a run's memory by the prompts that `env` gives; None where none is made.

    ValueError where it does not fit, or where a prompt, in ALFWorld the longest of its largest
    games, and its answer have no place in the model. Prompts grow with the history; better to learn
    so before the first step than after an hour. What comes longer all the same is refused where it
    comes (`turbo.decode`).
    """
    is_planned = not vlm.text.small and has_card(c)
    if not is_planned and vlm.positions is None:
        return None
    prefix, suffix = prompt_tokens(vlm, env, c)
    tokens = prefix + suffix
    if vlm.positions is not None and tokens + c.max_new_tokens > vlm.positions:
        what, ways = "a prompt has", "--max-new-tokens, or take --observation small"
        if c.env == "alfworld":
            what = f"a prompt with {min(c.history_length, env.max_history)} commands has up to"
            ways = "--history-length or --max-new-tokens, or take smaller games"
        raise ValueError(
            f"{what} {tokens:,} tokens and its answer {c.max_new_tokens}: more than the "
            f"{vlm.positions:,} positions of the model. Lower {ways}"
        )
    return plan_prompts(vlm, c, prefix, suffix) if is_planned else None


def prompt_tokens(vlm: VisionLanguageModel, env: VisualEnv, c: TrainConfig) -> tuple[int, int]:
    """Tokens of a prompt's prefix, picture and rules, and of the rest: of a first prompt, or the
    most in ALFWorld's largest games."""
    deals, ask = [dict(seed=0)], env.prompt
    if c.env == "alfworld":
        largest = sorted(env.games, key=lambda game: Path(game.path).stat().st_size)[-LARGEST:]
        deals, ask = [dict(options={"game": game.path}) for game in largest], env.longest_prompt
    prefix = suffix = 0
    for deal in deals:
        picture, _ = env.reset(**deal)
        prompt = ask(prompt_style(c))
        image = vlm.see([picture])[0].shape[1]
        prefix = max(prefix, vlm.prefix_length(prompt.fixed, image))
        suffix = max(suffix, len(vlm.encode(vlm.frame.suffix(prompt.state))))
    if c.env == "alfworld":
        env.close()  # its game's process
    return prefix, suffix


def held_out(env: str) -> str:
    """The split on which policies are evaluated: what they never played, where there is such."""
    return "unseen" if env == "alfworld" else "all"


def pool(size: int, seed: int) -> list[tuple[int, ...]]:
    """A fixed random pool of `size` multisets of four values, drawn as hands are dealt."""
    if not 1 <= size <= 715:
        raise ValueError(f"--hands must be between 1 and 715 multisets (0: all hands), got {size}")
    rng = np.random.default_rng([seed, 24])
    chosen: dict[tuple[int, ...], None] = {}
    while len(chosen) < size:
        ranks = np.minimum(rng.integers(1, 14, size=4), 10)
        chosen[tuple(sorted(int(r) for r in ranks))] = None
    return list(chosen)


def prompt_style(c: TrainConfig) -> str:
    """How the environment words its prompts."""
    return "short" if observation(c) == "small" else "full"


def rollout_options(c: TrainConfig) -> RolloutOptions:
    """The part of the settings that playing needs."""
    return RolloutOptions(
        envs=c.envs,
        group=c.group_size,
        temperature=c.temperature,
        max_new_tokens=c.max_new_tokens,
        prompt_style=prompt_style(c),
        format_valid=c.format_valid,
        format_invalid=c.format_invalid,
    )
