"""One policy update on a rollout: which steps count, their advantages, a minibatch's gradient.

    loss = - mean min(ratio A, clip(ratio) A)  +  beta * mean_thought KL(policy || teacher)
           + c_v * value loss  +  c_s * cross-entropy of the teacher's thoughts (`turbo.guidance`)

The rejection-sampling baseline replaces the first term by the cross-entropy of the policy's own
successes: no advantages, no ratio (RAFT, Dong et al. 2023).

Left out: playing (`turbo.rollout`), the order of things (`turbo.train`).
"""

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from turbo.backprop import backward_rows
from turbo.batch import TokenBatch, fits, pad_to
from turbo.config import TrainConfig
from turbo.envs.base import MeetingEnv
from turbo.gae import explained_variance, gae, group_advantages, state_advantages
from turbo.guidance import Examples
from turbo.kernels.policy_head import PolicyHeadOutput
from turbo.kl import kl_estimate, mean_over
from turbo.lora import Lora
from turbo.model import VisionLanguageModel, Weights
from turbo.parallel import Crew
from turbo.ppo import ppo_loss, step_logprob, value_loss
from turbo.rollout import Rollout, Step
from turbo.score import (
    EXACT_KL,
    TeacherReading,
    final_hidden,
    guided_tokens,
    local_pictures,
    loss_of_answers,
)

NOTHING = 1e-4  # an advantage as small as that, of about 1, is rounding: its step is not trained on
FIGURES = ("policy_loss", "clip_fraction", "approx_kl", "teacher_kl", "value_loss", "sft_loss")


@dataclass
class StepData:
    """Per environment step of a rollout, N of them."""

    advantages: Tensor  # [N]
    returns: Tensor  # [N] target of the critic; zeros with group baselines
    old_logprob: Tensor  # [N] weighted log-probability of the answer when it was sampled
    rows: list[int]  # the steps that are trained on
    explained_variance: float
    faulty: int = 0  # steps left out since something about them is not finite


def prepare(
    vlm: VisionLanguageModel,
    weights: Weights,
    rollout: Rollout,
    kl: Tensor | None,  # [N] guidance as reward or in the advantage
    beta: float,
    value_head: nn.Module | None,
    crew: Crew,
    c: TrainConfig,
) -> StepData:
    """Advantages and old log-probabilities of all steps, and the choice of steps to train on."""
    steps, count = rollout.steps, [len(e.steps) for e in rollout.episodes]
    reward = torch.tensor([s.reward + s.format_reward for s in steps])
    if kl is not None and c.kl_placement == "reward":
        reward = reward - beta * kl
    returns, explained = torch.zeros(len(steps)), float("nan")
    if c.advantage == "gae":
        values, following = step_values(vlm, weights, rollout, value_head)
        ends = [torch.tensor([getattr(s, k) for s in steps]) for k in ("terminated", "truncated")]
        out = gae(reward, values, following, *ends, c.gamma, c.gae_lambda)
        mean, deviation = moments(out.advantages, crew)
        advantages, returns = (out.advantages - mean) / (deviation + 1e-8), out.returns
        explained = explained_variance(values, returns).item()
    else:
        episode = torch.repeat_interleave(torch.arange(len(count)), torch.tensor(count))
        total = torch.zeros(len(count)).index_add(0, episode, reward)
        groups = [e.group for e in rollout.episodes]
        if c.baseline == "state":
            advantages = state_advantages(reward, count, groups, [state(s) for s in steps])
        else:
            advantages = group_advantages(total, torch.tensor(groups), c.baseline)[episode]
        advantages = advantages / (moments(total, crew)[1] + 1e-6)
    if kl is not None and c.kl_placement == "advantage":
        # Its mean tells no answer from another: left in, it would push down all that was sampled.
        advantages = advantages - beta * (kl - moments(kl, crew)[0])
    old = old_logprobs(steps, c.thought_coef)
    surprise = torch.tensor([-sum(s.logprobs) for s in steps])
    finite = old.isfinite() & surprise.isfinite() & advantages.isfinite()
    kept = finite.clone()
    if c.advantage != "gae":  # a critic learns of sure steps too: they are the later ones
        kept &= surprise >= c.skip_certain
    if c.objective == "rejection":
        kept &= torch.tensor(first_successes(rollout))
    else:
        kept &= advantages.abs() > NOTHING
    rows, faulty = kept.nonzero()[:, 0].tolist(), len(steps) - int(finite.sum())
    return StepData(advantages, returns, old, rows, explained, faulty)


def state(s: Step) -> Hashable:
    """Where a step was taken: equal where episodes of a deal can be compared."""
    return s.asked.meeting() if isinstance(s.asked, MeetingEnv) else (s.picture, tuple(s.suffix))


def first_successes(rollout: Rollout) -> list[bool]:
    """Which steps are of an episode that succeeded; of equal answers in one state the first."""
    seen, marks = set(), []
    for episode in rollout.episodes:
        for s in episode.steps:
            key = (s.picture, tuple(s.suffix), tuple(s.tokens))
            marks.append(episode.success and key not in seen)
            if episode.success:
                seen.add(key)
    return marks


def moments(values: Tensor, crew: Crew) -> tuple[float, float]:
    """Mean and standard deviation of all workers' values, those left out that are not finite."""
    x = values[values.isfinite()].double()
    n, total, squares = crew.total(len(x), x.sum().item(), x.square().sum().item())
    mean = total / max(n, 1)
    return mean, max(squares / max(n, 1) - mean * mean, 0.0) ** 0.5


def old_logprobs(steps: list[Step], thought_coef: float) -> Tensor:
    """[N] c * thought + action log-probability of each step, as sampled."""
    row = torch.repeat_interleave(
        torch.arange(len(steps)), torch.tensor([len(s.tokens) for s in steps])
    )
    tokens = torch.tensor([p for s in steps for p in s.logprobs])
    return step_logprob(tokens, guided_tokens(steps, "thought"), row, len(steps), thought_coef)


@torch.no_grad()
def step_values(
    vlm: VisionLanguageModel, weights: Weights, rollout: Rollout, value_head: nn.Module
) -> tuple[Tensor, Tensor]:
    """Values [N] of all steps and of their successors.

    The successor of a truncated episode's last step is the final observation.
    """
    values = value_head(torch.stack([s.hidden for s in rollout.steps]).to(vlm.device)).cpu()
    following = torch.cat([values[1:], values.new_zeros(1)])
    ends = torch.tensor([len(e.steps) for e in rollout.episodes]).cumsum(0) - 1
    following[ends] = 0.0
    for i, hidden in final_hidden(vlm, weights, rollout).items():
        following[ends[i]] = value_head(hidden[None].to(vlm.device))[0].cpu()
    return values, following


@dataclass
class Imitated:
    """Examples that enter a minibatch beside the policy's own steps."""

    examples: Examples
    rows: list[int]  # this worker's
    total: int  # of the minibatch, over all workers
    coef: float


@dataclass
class Learner:
    """What a minibatch's gradient needs beside the data."""

    vlm: VisionLanguageModel
    lora: Lora
    value_head: nn.Module | None
    crew: Crew
    config: TrainConfig

    def parameters(self) -> list[Tensor]:
        """All that is trained."""
        critic = [] if self.value_head is None else list(self.value_head.parameters())
        return self.lora.parameters() + critic

    def gradients(
        self,
        rollout: Rollout,
        data: StepData,
        rows: list[int],  # this worker's steps of the minibatch
        total: int,  # steps of the minibatch, over all workers
        teacher: TeacherReading | None,  # of these rows at least
        beta: float,
        imitated: Imitated | None = None,
    ) -> dict[str, Tensor]:
        """Set the `.grad` of LoRA factors and critic, summed over the crew; figures for the log."""
        sums = {name: torch.zeros((), device=self.vlm.device) for name in FIGURES}
        examples = imitated if imitated and imitated.rows else None  # another worker may have all

        def accumulate() -> None:
            for p in self.parameters():
                p.grad = torch.zeros_like(p)
            for value in sums.values():
                value.zero_()
            if not (rows or examples):
                return
            weights = self.vlm.weights(self.lora)
            part = _Minibatch(self, rollout, data, rows, total, teacher, beta, weights.cut(), sums)
            if rows:
                part.run()
            if examples:
                part.imitate(examples)
            weights.backward(part.weights)

        while not fits(accumulate):  # sums that are half done are begun anew
            self.vlm.batches.halve("train", self.vlm.batches.train)
        self.crew.sum_([p.grad for p in self.parameters()] + list(sums.values()))
        return sums


class _Minibatch:
    """One worker's steps of a minibatch."""

    def __init__(self, learner, rollout, data, rows, total, teacher, beta, weights, sums):
        self.l, self.rollout, self.data = learner, rollout, data
        self.steps = rollout.select(rows)
        self.index = torch.tensor(rows)
        self.total, self.teacher, self.beta = total, teacher, beta
        self.weights, self.sums, self.value_head = weights, sums, learner.value_head

    def run(self) -> None:
        """Forward and backward over all micro-batches."""
        vlm, rollout = self.l.vlm, self.rollout
        pictures, owner = local_pictures(self.steps)
        features = rollout.features[pictures]
        backward_rows(
            vlm,
            self.weights,
            features,
            rollout.fixed,
            rollout.grid,
            owner,
            [s.suffix for s in self.steps],
            [s.tokens for s in self.steps],
            self.loss,
        )

    def imitate(self, imitated: Imitated) -> None:
        """Forward and backward of the cross-entropy of a teacher's thoughts."""
        vlm, c, examples = self.l.vlm, self.l.config, imitated.examples
        chosen = [examples.rows[i] for i in imitated.rows]
        pictures = sorted({picture for picture, _, _ in chosen})
        features = torch.stack([examples.features[p] for p in pictures])

        def loss(w: Weights, hidden: Tensor, batch: TokenBatch, rows: list[int]) -> Tensor:
            h = vlm.text.final_norm(w, hidden.flatten(0, 1).index_select(0, batch.select))
            options = dict(temperature=c.temperature, banned=vlm.banned, want=("logprob",))
            return loss_of_answers(h, w.head, batch, of_thoughts, **options)

        def of_thoughts(out: PolicyHeadOutput, row: Tensor, some: slice) -> Tensor:
            every = torch.ones_like(row, dtype=torch.bool)
            count = some.stop - some.start
            value = -mean_over(out.logprob, every, row, count).sum() / imitated.total
            self._add("sft_loss", value, 1.0)
            return imitated.coef * value

        rollout = self.rollout
        backward_rows(
            vlm,
            self.weights,
            features,
            rollout.fixed,
            rollout.grid,
            [pictures.index(picture) for picture, _, _ in chosen],
            [suffix for _, suffix, _ in chosen],
            [thought for _, _, thought in chosen],
            loss,
        )

    def loss(self, w: Weights, hidden: Tensor, batch: TokenBatch, rows: list[int]) -> Tensor:
        """This micro-batch's part of the minibatch's mean loss."""
        c, vlm = self.l.config, self.l.vlm
        flat = hidden.flatten(0, 1)
        h = vlm.text.final_norm(w, flat.index_select(0, batch.select))

        def of_answers(out: PolicyHeadOutput, row: Tensor, some: slice) -> Tensor:
            return self.answers_loss(out, row, rows[some])

        loss = loss_of_answers(h, w.head, batch, of_answers, **self._wanted(h, rows))
        if self.value_head is not None:
            returns = self.data.returns[self.index[rows]].to(vlm.device)
            values = self.value_head(vlm.text.final_norm(w, flat[batch.last_prompt]))
            v = value_loss(values, returns)
            share = len(rows) / self.total
            loss = loss + c.value_coef * v * share
            self._add("value_loss", v, share)
        return loss

    def answers_loss(self, out: PolicyHeadOutput, row: Tensor, rows: list[int]) -> Tensor:
        """The part of the steps `rows`: the policy's objective, and the guidance as a loss."""
        c, device = self.l.config, self.l.vlm.device
        steps, index = [self.steps[i] for i in rows], self.index[rows]
        old, advantages = (
            x[index].to(device) for x in (self.data.old_logprob, self.data.advantages)
        )
        share = len(rows) / self.total
        thought = guided_tokens(steps, "thought").to(device)
        logprob = step_logprob(out.logprob, thought, row, len(rows), c.thought_coef)
        ppo = ppo_loss(logprob, old, advantages, c.clip)
        policy_loss = ppo.loss
        if c.objective == "rejection":
            every = torch.ones_like(thought)
            policy_loss = -mean_over(out.logprob, every, row, len(rows)).mean()
        loss = policy_loss * share
        self._add("policy_loss", policy_loss, share)
        self._add("clip_fraction", ppo.clip_fraction, share)
        self._add("approx_kl", ppo.approx_kl, share)
        if self.teacher is not None:
            tokens = self._token_kl(out)
            mask = guided_tokens(steps, c.guidance_range).to(device)
            kl = mean_over(tokens, mask, row, len(rows)).mean()
            loss = loss + self.beta * kl * share
            self._add("teacher_kl", kl, share)
        return loss

    def _wanted(self, h: Tensor, rows: list[int]) -> dict:
        """What is asked of the head: log-probs, and what the guidance needs of the teacher."""
        vlm, c = self.l.vlm, self.l.config
        shared = dict(temperature=c.temperature, banned=vlm.banned)
        if self.teacher is None:
            return dict(want=("logprob",), **shared)
        theirs = pad_to(self.teacher.of(self.index[rows].tolist()).to(h.device), len(h))
        kind = EXACT_KL.get(c.kl_estimator, "teacher_logprob")
        pair = dict(teacher_hidden=theirs, teacher_weight=self.teacher.head)
        return dict(want=("logprob", kind), **pair, **shared)

    def _token_kl(self, out: PolicyHeadOutput) -> Tensor:
        kind = self.l.config.kl_estimator
        if kind in EXACT_KL:
            return getattr(out, EXACT_KL[kind])
        return kl_estimate(out.logprob, out.teacher_logprob, kind)

    def _add(self, name: str, value: Tensor, share: float) -> None:
        self.sums[name] += value.detach() * share
