"""Scoring a rollout again: the teacher's KL on the thoughts, values of final observations.

One teacher forward pass over the very tokens that were sampled, with the picture and the prompt of
that step; nothing is decoded and nothing is encoded again. Rows run in micro-batches of similar
length, and only answer tokens reach the head.

Left out: gradients (`turbo.backprop`); what the scores are used for (`turbo.train`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from turbo.attend import PrefixKV
from turbo.backprop import pictures_at_once, rows_of
from turbo.batch import TokenBatch, pad_to, run_batches
from turbo.kernels.policy_head import PolicyHeadOutput, policy_head
from turbo.kernels.policy_head_loss import policy_head_loss
from turbo.kl import kl_estimate, mean_over
from turbo.model import VisionLanguageModel, Weights
from turbo.rollout import Rollout, Step

EXACT_KL = {"full": "reverse_kl", "forward": "forward_kl"}  # estimator -> output of the head


def guided_tokens(steps: list[Step], token_range: str) -> Tensor:
    """[N] bool: which answer tokens are guided, all steps' answers end to end."""
    if token_range == "all":
        return torch.ones(sum(len(s.tokens) for s in steps), dtype=torch.bool)
    lengths = torch.tensor([n for s in steps for n in (s.thought, len(s.tokens) - s.thought)])
    return torch.repeat_interleave(torch.tensor([True, False]).repeat(len(steps)), lengths)


def local_pictures(steps: "Sequence[Step | _Asked]") -> tuple[list[int], list[int]]:
    """The pictures that `steps` use, and the place of each step's picture among them."""
    pictures = sorted({s.picture for s in steps})
    place = {p: i for i, p in enumerate(pictures)}
    return pictures, [place[s.picture] for s in steps]


def answer_hidden(
    vlm: VisionLanguageModel, w: Weights, prefix: PrefixKV, owner: list[int], batch: TokenBatch
) -> Tensor:
    """Normed hidden states [N', D] at the places that predict answer tokens."""
    own = pad_to(torch.tensor(owner), batch.padded_rows).to(vlm.device)
    hidden = vlm.suffix(w, batch.ids, prefix.select(own))
    return vlm.text.final_norm(w, hidden.flatten(0, 1).index_select(0, batch.select))


def read_steps(
    vlm: VisionLanguageModel, w: Weights, rollout: Rollout, steps: "Sequence[Step | _Asked]"
) -> tuple[Tensor, TokenBatch]:
    """The `answer_hidden` of some steps of a rollout [N', D], and their rows."""
    pictures, owner = local_pictures(steps)
    prefix = vlm.prefix(w, rollout.features[pictures], rollout.fixed, rollout.grid)
    batch = rows_of(vlm, [s.suffix for s in steps], [s.tokens for s in steps])
    return answer_hidden(vlm, w, prefix, owner, batch), batch


def score_answers(hidden: Tensor, head: Tensor, batch: TokenBatch, **options) -> PolicyHeadOutput:
    """`policy_head` on the answer tokens; what a round size added beyond them is cut off."""
    out = policy_head(hidden, head, pad_to(batch.targets, len(hidden)), **options)
    return _first(out, len(batch.targets))


def _first(out: PolicyHeadOutput, n: int) -> PolicyHeadOutput:
    return PolicyHeadOutput(**{k: None if v is None else v[:n] for k, v in vars(out).items()})


def loss_of_answers(
    hidden: Tensor,
    head: Tensor,
    batch: TokenBatch,
    loss: Callable[[PolicyHeadOutput, Tensor, slice], Tensor],
    **options,
) -> Tensor:
    """`policy_head_loss` of the answers, a scalar: the sum of `loss` over pieces of the rows.

    `loss(outputs, row of each token, rows)` gets the tokens of the rows of a slice; the first of
    them is row 0.
    """
    ends = [0, *accumulate(batch.counts)]
    beyond = len(hidden) - ends[-1]  # what a round size added: with the last row, and cut off
    lengths = [*batch.counts[:-1], batch.counts[-1] + beyond]

    def of_piece(out: PolicyHeadOutput, rows: slice) -> Tensor:
        row = batch.row[ends[rows.start] : ends[rows.stop]] - rows.start
        return loss(_first(out, len(row)), row, rows)

    targets = pad_to(batch.targets, len(hidden))
    return policy_head_loss(hidden, head, targets, of_piece, lengths=lengths, **options)


def in_batches(
    vlm: VisionLanguageModel,
    rollout: Rollout,
    steps: "Sequence[Step | _Asked]",
    work: Callable[[list[int]], None],
) -> None:
    """`work` on all steps in micro-batches of similar length.

    For a large model, a few pictures after the other: half of its tokens are for their prefixes.
    """
    lengths = [len(s.suffix) + len(s.tokens) for s in steps]
    if vlm.text.small:
        run_batches(lengths, vlm.batches, "score", work)
        return
    size = pictures_at_once(vlm, rollout.features, rollout.fixed)
    pictures = sorted({s.picture for s in steps})
    for first in range(0, len(pictures), size):
        some = set(pictures[first : first + size])
        rows = [i for i, s in enumerate(steps) if s.picture in some]
        run_batches(
            [lengths[i] for i in rows],
            vlm.batches,
            "score",
            lambda part, rows=rows: work([rows[i] for i in part]),
        )


@dataclass
class TeacherReading:
    """What a teacher makes of a rollout's answers: read once, used in every epoch."""

    hidden: dict[int, Tensor]  # step -> normed hidden states [T, D] that predict its answer tokens
    head: Tensor  # [V, D]

    def of(self, steps: list[int]) -> Tensor:
        """The hidden states of these steps' answer tokens end to end, [N, D]."""
        return torch.cat([self.hidden[i] for i in steps])


@torch.no_grad()
def read_answers(
    vlm: VisionLanguageModel, w: Weights, rollout: Rollout, rows: list[int]
) -> TeacherReading:
    """Read the answers of the steps `rows` with other weights, the teacher's."""
    steps, hidden = rollout.select(rows), {}

    def work(group: list[int]) -> None:
        mine = [steps[i] for i in group]
        read, batch = read_steps(vlm, w, rollout, mine)
        parts = read[: len(batch.targets)].split([len(s.tokens) for s in mine])
        if not vlm.text.small:  # of a whole update: on the host
            parts = [part.cpu() for part in parts]
        hidden.update(zip([rows[i] for i in group], parts, strict=True))

    in_batches(vlm, rollout, steps, work)
    return TeacherReading(hidden, w.head)


@torch.no_grad()
def teacher_kl(
    vlm: VisionLanguageModel,
    policy: Weights,
    teacher: Weights,
    rollout: Rollout,
    *,
    estimator: str,
    token_range: str,
    temperature: float,
) -> Tensor:
    """[steps] mean KL estimate of each step's guided tokens between policy and teacher, in nats."""
    steps = rollout.steps

    kl = torch.empty(len(steps))

    def work(rows: list[int]) -> None:
        mine = [steps[i] for i in rows]
        tokens, row = answer_kl(vlm, policy, teacher, rollout, mine, estimator, temperature)
        mask = guided_tokens(mine, token_range).to(vlm.device)
        kl[torch.tensor(rows)] = mean_over(tokens, mask, row, len(mine)).cpu()

    in_batches(vlm, rollout, steps, work)
    return kl


@torch.no_grad()
def token_kl(
    vlm: VisionLanguageModel,
    policy: Weights,
    teacher: Weights,
    rollout: Rollout,
    rows: list[int],
    *,
    temperature: float,
) -> dict[int, list[float]]:
    """The exact KL(policy || teacher) in nats at every answer token of the steps `rows`."""
    steps, kl = rollout.select(rows), {}

    def work(group: list[int]) -> None:
        mine = [steps[i] for i in group]
        tokens, _ = answer_kl(vlm, policy, teacher, rollout, mine, "full", temperature)
        parts = tokens.split([len(s.tokens) for s in mine])
        kl.update(zip([rows[i] for i in group], [p.tolist() for p in parts], strict=True))

    in_batches(vlm, rollout, steps, work)
    return kl


def answer_kl(
    vlm: VisionLanguageModel,
    policy: Weights,
    teacher: Weights,
    rollout: Rollout,
    mine: list[Step],
    estimator: str,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """[N] KL at the answer tokens of the steps `mine`, end to end, and the step of each. [N]"""
    pictures, owner = local_pictures(mine)
    features = rollout.features[pictures]
    batch = rows_of(vlm, [s.suffix for s in mine], [s.tokens for s in mine])
    shared = dict(temperature=temperature, banned=vlm.banned)
    prefix = vlm.prefix(teacher, features, rollout.fixed, rollout.grid)
    hidden = answer_hidden(vlm, teacher, prefix, owner, batch)
    if estimator in EXACT_KL:
        want = EXACT_KL[estimator]
        prefix = vlm.prefix(policy, features, rollout.fixed, rollout.grid)
        own = answer_hidden(vlm, policy, prefix, owner, batch)
        pair = dict(teacher_hidden=hidden, teacher_weight=teacher.head)
        out = score_answers(own, policy.head, batch, want=(want,), **pair, **shared)
        return getattr(out, want), batch.row
    out = score_answers(hidden, teacher.head, batch, want=("logprob",), **shared)
    sampled = torch.tensor([p for s in mine for p in s.logprobs], device=vlm.device)
    return kl_estimate(sampled, out.logprob, estimator), batch.row


@torch.no_grad()
def rescore(vlm: VisionLanguageModel, w: Weights, rollout: Rollout, temperature: float) -> None:
    """Put log-probabilities that are computed as they are for training in the place of those that
    were recorded in decoding.

    The passes of decoding have other shapes, for which a GPU has other kernels: in 16 bits, divided
    by a low temperature and summed over an answer, that can move a ratio by more than PPO clips.
    """
    steps = rollout.steps

    def work(rows: list[int]) -> None:
        mine = [steps[i] for i in rows]
        hidden, batch = read_steps(vlm, w, rollout, mine)
        options = dict(temperature=temperature, banned=vlm.banned, want=("logprob",))
        found = score_answers(hidden, w.head, batch, **options).logprob.cpu()
        for step, own in zip(mine, found.split([len(s.tokens) for s in mine]), strict=True):
            step.logprobs = own.tolist()

    in_batches(vlm, rollout, steps, work)


class _Asked(NamedTuple):
    """A prompt without an answer, in the form of a step: one token stands where it would begin."""

    picture: int
    suffix: list[int]
    tokens: list[int]


@torch.no_grad()
def final_hidden(vlm: VisionLanguageModel, w: Weights, rollout: Rollout) -> dict[int, Tensor]:
    """Hidden state [D] at the last prompt token of final observations, by episode number.

    Only truncated episodes have one.
    """
    numbers = [i for i, e in enumerate(rollout.episodes) if e.final is not None]
    asked = [_Asked(*rollout.episodes[i].final, [vlm.pad]) for i in numbers]
    out = {}

    def work(group: list[int]) -> None:
        hidden, _ = read_steps(vlm, w, rollout, [asked[i] for i in group])
        last = hidden[: len(group)].float().cpu()  # what predicts that one token
        out.update(zip([numbers[i] for i in group], last, strict=True))

    in_batches(vlm, rollout, asked, work)
    return out
