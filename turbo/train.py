"""Training: PPO on a LoRA policy, guided by a teacher merged from its own past checkpoints.

    for each update:
        play        whole episodes with the policy as it is            turbo.rollout
        score       KL of the thoughts to the merged teacher           turbo.score
        weigh       advantages: group baseline, or critic and GAE      turbo.gae, turbo.update
        write       with --guidance sft or gtr, the teacher's own      turbo.guidance
                    thoughts on some of the steps enter the dataset
        learn       minibatches: PPO loss + guidance, AdamW            turbo.update
        remember    the new checkpoint enters the history,             turbo.teacher
                    the teacher is merged anew
        record      metrics, a sample of episodes, a checkpoint        turbo.log, turbo.scribe

Run as `python -m turbo.train points24`; `--help` explains every setting. Left out: the warm start
(`turbo.sft`).
"""

import math
import shutil
import sys
import time
from pathlib import Path
from typing import IO

import torch

from turbo import checkpoint, lock
from turbo.arguments import parse
from turbo.batch import evenly
from turbo.config import TrainConfig
from turbo.corrector import TurnedAway, check_url
from turbo.faults import NumericalFault, diagnosis
from turbo.flags import conclude
from turbo.guidance import ask_corrector, write_answers
from turbo.hub import check_nf4, device_of, lack_of_memory, model_sha256, own_workers
from turbo.kl import auto_coefficient, kl_estimate
from turbo.machine import peak_bytes
from turbo.measure import all_episodes, certainty, outcomes, thoughts
from turbo.memory import GB
from turbo.model import Weights
from turbo.parallel import Crew, fail, run_crew
from turbo.rollout import Abandoned, Rollout, Step, mix
from turbo.run import Run, due, find_alfworld
from turbo.score import TeacherReading, read_answers, rescore, teacher_kl
from turbo.scribe import Scribe
from turbo.sinks import check_packages
from turbo.trajectory import sample_episodes
from turbo.update import Imitated, StepData, moments, old_logprobs, prepare


def train_update(run: Run) -> tuple[dict, list[dict]]:
    """One update, start to end; the metrics, and on worker 0 a sample of its episodes."""
    c, update, phases = run.config, run.update, run.phases

    # play: sampled from the policy as it is, temperature and all
    phases.restart("rollout")
    with torch.no_grad():
        weights = run.vlm.weights(run.lora)
    rollout = run.table.collect(run.vlm.merged(weights), (c.seed, update), c.steps_per_update)

    # score and weigh: KL of every thought to the teacher where the reward or the advantage needs
    # it; for a loss the teacher reads the answers that are trained on
    phases.begin("score")
    apart = scored_anew(run, weights, rollout) if c.rescore else {}
    guided = c.guidance == "kl" and run.teacher.weights is not None and run.beta > 0
    kl = teacher = None
    if guided and c.kl_placement != "loss":
        how = dict(estimator=c.kl_estimator, token_range=c.guidance_range)
        pair = weights, run.teacher.weights
        kl = teacher_kl(run.vlm, *pair, rollout, temperature=c.temperature, **how)
        measured = moments(kl, run.crew)
        steer(run, measured, rollout)
    data = prepare(run.vlm, weights, rollout, kl, run.beta, run.value_head, run.crew, c)
    if guided and c.kl_placement == "loss":
        teacher = read_answers(run.vlm, run.teacher.weights, rollout, data.rows)
    sample = sample_episodes(run, weights, rollout)  # to be recorded

    # write: thoughts of the teacher's own, to be imitated (sft, gtr) or only to be measured
    phases.begin("write")
    written = teacher_thoughts(run, rollout)

    # learn
    phases.begin("train")
    episodes = all_episodes(rollout.episodes, run.crew)
    if not c.score_episodes:  # the rollout was the newest checkpoint's
        run.teacher.rate(sum(e.success for e in episodes) / len(episodes))
    figures = learn(run, rollout, data, teacher) | apart
    if kl is not None:
        figures["teacher_kl"] = measured[0]

    # remember: this checkpoint becomes part of the teacher
    phases.begin("merge")
    if c.teaches and c.checkpoint_each == "update":
        run.teacher.push(update + 1, run.lora, run.score())
    phases.end()

    steps = [s for e in episodes for s in e.steps]
    counts = len(data.rows), rollout.guessed, rollout.accepted, data.faulty
    trained, guesses, accepted, faulty = run.crew.total(*counts)
    if faulty == len(steps):
        told = diagnosis(run.lora, {"the log-probabilities": math.nan})
        raise NumericalFault(f"no answer has a finite log-probability: {told}")
    run.update += 1
    run.env_steps += len(steps)
    run.elapsed += phases.elapsed
    metrics = {
        "update": run.update,
        "env_steps": run.env_steps,
        "elapsed": run.elapsed,
        **outcomes(episodes),
        **certainty(steps),
        "draft_accept_rate": accepted / max(1, guesses),
        **figures,
        **written,
        "teacher_kl_coef": run.beta if guided else 0.0,
        "teacher_age": run.teacher.age,
        "explained_variance": data.explained_variance,
        "trained_rows": trained,
        "dropped_rows": len(steps) - trained,
        "faulty_steps": faulty,
        **speed(run, steps),
    }
    if guided and c.kl_placement == "loss":  # known only now: it is for the next update
        steer(run, (metrics.get("teacher_kl", 0.0), 0.0), rollout)
    return metrics, sample


def speed(run: Run, steps: list[Step]) -> dict[str, float]:
    """What an update of so many steps took: throughput, seconds of its phases, memory."""
    phases = run.phases
    return {
        "steps_per_second": len(steps) / phases.elapsed,
        "tokens_per_second": sum(len(s.tokens) for s in steps) / phases.seconds["rollout"],
        **{f"seconds_{name}": value for name, value in phases.seconds.items()},
        "seconds_other": phases.elapsed - sum(phases.seconds.values()),
        "peak_memory_gb": peak_bytes(run.vlm.device) / GB,
    }


def scored_anew(run: Run, weights: Weights, rollout: Rollout) -> dict[str, float]:
    """Log-probabilities from a pass like training's, and what those of decoding were off."""
    c = run.config
    played = old_logprobs(rollout.steps, c.thought_coef)
    rescore(run.vlm, weights, rollout, c.temperature)
    apart = kl_estimate(played, old_logprobs(rollout.steps, c.thought_coef), "k3")
    return {"sampling_kl": moments(apart, run.crew)[0]}


def teacher_thoughts(run: Run, rollout: Rollout) -> dict[str, float]:
    """Let the teacher answer some of the steps: examples to imitate, figures of its thoughts."""
    c, imitated = run.config, run.config.imitates
    wanted = c.sft_rows if imitated else c.teacher_sample
    absent = run.teacher.weights is None and c.guidance != "gtr"
    if c.guidance == "none" or absent or not (imitated or wanted):
        return {}
    rows = evenly(len(rollout.steps), -(-wanted // run.crew.size))
    if c.guidance == "gtr":
        written = ask_corrector(run.vlm, run.corrector, rollout, rows, run.crew)
    else:
        written = write_answers(
            run.vlm,
            run.teacher.weights,
            rollout,
            rows,
            temperature=c.teacher_temperature,
            max_new_tokens=c.max_new_tokens,
            seed=(c.seed, run.update, 11, run.crew.rank),
            slots=max(1, c.envs // run.crew.size),
        )
    told = all_episodes(written, run.crew)
    figures = {f"teacher_{name}": value for name, value in thoughts(told).items()}
    if imitated:
        run.examples.add(rollout, written, run.crew)
        figures["sft_examples"] = len(run.examples)
    if c.guidance == "gtr":
        return figures | usage(run)
    entropy = certainty([s for e in told for s in e.steps])["thought_entropy"]
    return figures | {"teacher_thought_entropy": entropy}


def usage(run: Run) -> dict[str, float]:
    """What the external teacher has been asked so far, by all workers, and what it cost."""
    c, own, names = run.config, run.corrector.usage, list(run.asked)
    totals = run.crew.total(*(getattr(own, name) for name in names))
    run.asked = dict(zip(names, map(int, totals), strict=True))
    prompt, completion = run.asked["prompt_tokens"], run.asked["completion_tokens"]
    cost = (prompt * c.teacher_price_in + completion * c.teacher_price_out) / 1e6
    return {f"teacher_{name}": n for name, n in run.asked.items()} | {"teacher_cost": cost}


def learn(
    run: Run, rollout: Rollout, data: StepData, teacher: TeacherReading | None
) -> dict[str, float]:
    """The PPO epochs of one update; mean figures over its minibatches."""
    c = run.config
    for group in run.optimizer.param_groups:
        group["lr"] = group["scale"] * learning_rate(c, run.update)
    order = torch.Generator().manual_seed(mix(c.seed, run.update, 7, run.crew.rank))
    sizes = [int(n) for n in run.crew.share(len(data.rows))]
    count = max(1, min(max(sizes), round(sum(sizes) / c.minibatch)))  # minibatches of an epoch
    totals: dict[str, float] = {}
    batches, faults, before, first = 0, run.faults, run.faults.total, 0.0
    total = c.epochs * count if sum(sizes) else 0
    run.phases.expect(total)
    for epoch_batch in range(total):
        b, run.phases.done = epoch_batch % count, epoch_batch
        if b == 0:
            rows = [data.rows[i] for i in torch.randperm(len(data.rows), generator=order)]
        size = sum(len(range(b, n, count)) for n in sizes)
        sums = run.learner.gradients(
            rollout, data, rows[b::count], size, teacher, run.beta, imitated(run, order)
        )
        for group in run.optimizer.param_groups:
            norm = torch.nn.utils.clip_grad_norm_(group["params"], c.grad_clip)
            sums[group["norm"]] = norm
        found = dict(zip(sums, torch.stack(list(sums.values())).tolist(), strict=True))
        if all(map(math.isfinite, found.values())):
            run.optimizer.step()
            faults.passed()
            first = first if batches else found["approx_kl"]
            totals = {name: totals.get(name, 0.0) + value for name, value in found.items()}
            batches += 1
        else:  # the same in all workers
            name = f"{run.update + 1:08d}-{epoch_batch:04d}"
            args = (rollout, data, rows[b::count], teacher, run.beta, found)
            faults.note(name, run.learner, *args)
        is_last = c.target_kl > 0 and found["approx_kl"] > c.target_kl
        if c.checkpoint_each == "epoch" and c.teaches and (b == count - 1 or is_last):
            run.teacher.push(run.update + 1, run.lora, run.score())
            run.phases.expect(total)  # to be scored, it may have played
        if is_last:
            break
    for p in run.learner.parameters():
        p.grad = None  # nothing but the next minibatch needs them
    means = {name: value / batches for name, value in totals.items()}
    more = {"skipped_batches": faults.total - before, "sampling_kl": first}
    return {**means, **more, "learning_rate": learning_rate(c, run.update)}


def imitated(run: Run, generator: torch.Generator) -> Imitated | None:
    """This worker's share of the examples that enter a minibatch; None without a dataset."""
    c, size = run.config, run.crew.size
    if not len(run.examples) or c.sft_coef == 0:
        return None
    total = min(c.sft_batch, len(run.examples))
    own = len(range(run.crew.rank, total, size))
    return Imitated(run.examples, run.examples.pick(own, generator), total, c.sft_coef)


def learning_rate(c: TrainConfig, update: int) -> float:
    """Cosine from the peak to the final rate over the run's updates."""
    done = min(1.0, update / max(1, c.updates))
    share = 0.5 * (1 + math.cos(math.pi * done))
    return c.final_learning_rate + (c.learning_rate - c.final_learning_rate) * share


def steer(run: Run, kl: tuple[float, float], rollout: Rollout) -> None:
    """With `--kl-coef auto`, set the coefficient from mean and deviation of the KL."""
    c = run.config
    if c.kl_coef != "auto":
        return
    mean, deviation = kl
    if c.kl_placement == "reward":  # it stands beside returns
        returns = torch.tensor([e.episode_return for e in rollout.episodes])
        size, spread = math.hypot(mean, deviation), moments(returns, run.crew)[1]
    else:  # beside advantages of spread 1; in them only its differences count
        size, spread = deviation if c.kl_placement == "advantage" else mean, 1.0
    run.beta = auto_coefficient(size, spread, c.kl_share, run.beta)


def run_folder(c: TrainConfig) -> tuple[Path, IO[str]]:
    """The run's directory, made new or that of the run to be resumed, and the lock on it."""
    model = model_sha256(c)
    if c.resume:
        path = Path(c.resume)
        if checkpoint.read_run(path).get("model_sha256") != model:
            raise ValueError(f"{path} was trained from another model than {c.model!r} is now")
        held = lock.acquire(path)
        if not checkpoint.checkpoints(path):
            print(f"warning: {path} has no checkpoint yet: it starts anew", file=sys.stderr)
        return path, held
    name = c.env.rpartition(":")[2]
    path = Path(c.out or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    with checkpoint.writing(path):
        checkpoint.occupied(path, c.overwrite)
        held = lock.acquire(path)
        checkpoint.create_run(path, c, model)
    return path, held


def main(argv: list[str] | None = None) -> int:
    """Read the settings and train; returns the exit status."""
    try:
        c = parse(sys.argv[1:] if argv is None else argv)
        c.workers = own_workers(c, max(1, c.envs // c.group_size))
        if c.envs < c.workers * c.group_size:
            raise ValueError(
                f"--envs must be at least --workers * --group-size = {c.workers * c.group_size}, "
                f"got {c.envs}"
            )
        if c.decode_graphs and device_of(c).type != "cuda":
            raise ValueError(
                "--decode-graphs needs a GPU, and this model runs on the CPU: --no-decode-graphs"
            )
        if c.guidance == "gtr":
            check_url(c.teacher_url)
        check_packages(c)
        check_nf4(c)
        if refusal := lack_of_memory(c):
            raise ValueError(refusal)
        find_alfworld(c)
        path, held = run_folder(c)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with held:
        return run_crew(c.workers, train, c, path)


def train(crew: Crew, c: TrainConfig, path: Path) -> int:
    """What every worker runs; worker 0 also talks, logs and saves."""
    try:
        run = Run(c, path, crew)
        problem = run.lack_of_space()
    except (ValueError, OSError) as error:  # a model that does not fit its settings, or its file
        problem = str(error)
    if problem := crew.problem(problem):  # maybe of one worker alone
        if crew.leads and not c.resume:
            shutil.rmtree(path)  # nothing is in it yet
        return fail(crew, problem, 2)
    if c.resume:
        try:
            run.restore()
        except ValueError as error:  # in all workers, though one alone may have it
            return fail(crew, error, 2)
        if run.is_over:
            if crew.leads and not (c.quiet or c.json):
                more = f"go on to a larger number, such as --updates {2 * run.update}"
                print(f"{path} is complete: {run.update} updates; {more}")
            return 0
        if crew.leads:
            try:
                checkpoint.keep_settings(path, c)
            except OSError as error:
                print(f"warning: --updates {c.updates} is not kept: {error}", file=sys.stderr)
    if c.teaches and c.guide_first and run.teacher.count == run.update == 0:
        run.teacher.push(0, run.lora, run.score())  # the warm start itself
    with Scribe(run) as scribe:
        try:
            if run.owed is not None:
                scribe.report(run.owed)
            while run.update < c.updates and not scribe.must_stop():
                metrics, sample = train_update(run)
                scribe.tell(metrics, sample)
                if due(c, run.update):
                    scribe.report(metrics)
                else:
                    scribe.write(metrics)
                if run.update % c.save_every == 0 or run.update == run.best[0]:
                    scribe.save()
            if not scribe.interrupted:
                scribe.save()
                scribe.report()
        except Abandoned:  # a rollout, when the user stops the run: what was before it counts
            scribe.must_stop()
        except (NumericalFault, TurnedAway) as error:
            return fail(crew, f"{error}; the last checkpoint can be resumed", 1)
        if scribe.interrupted:
            scribe.save()
            scribe.end(f"continue with: python -m turbo.train {c.env} --resume {path}")
            return 128 + scribe.interrupted
        if scribe.unsaved:
            return 1
        update, rate = run.best
        kept = path / checkpoint.CHECKPOINTS / f"{update:08d}"
        if update != run.update and kept.is_dir():
            scribe.say(f"best evaluation: {rate:.1%}, kept as {kept}")
        ways = f"python -m turbo.eval {path}; look at it with: python -m turbo.view {path}"
        scribe.end(f"evaluate it with: {ways}")
    return 0


if __name__ == "__main__":
    sys.exit(conclude(main))
