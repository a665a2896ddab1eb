"""Expert traces as token ids, and the cross-entropy of their answers.

    loss = - sum over answer tokens of log p(token | picture, prompt, answer so far)

Left out: who is trained on them (`turbo.sft`, `turbo.finetune`).
"""

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from turbo.backprop import backward_rows
from turbo.envs.base import LabelledEnv
from turbo.model import VisionLanguageModel, Weights
from turbo.score import loss_of_answers
from turbo.tiny import OTHER_TARGETS


@dataclass
class Demonstration:
    """The expert's answers in one deal, as token ids, each behind its picture and the suffix of its
    prompt."""

    pictures: list[np.ndarray]  # the different ones, [H, W, 3] uint8
    shown: list[int]  # which of them each answer is about
    fixed: str
    suffixes: list[list[int]]
    answers: list[list[int]]
    labels: list[list[str]]  # what is in each picture, as an answer or the environment says


def perception_labels(fields: dict) -> list[str]:
    """What the picture shows, as the expert's answer names it.

    That is every field before the thoughts but the formula.
    """
    labels = []
    for key, value in fields.items():
        if key == "thoughts":
            break
        if key != "formula":
            labels += value if isinstance(value, list) else [value]
    return [str(v) for v in labels]


def demonstrate(
    env,
    vlm: VisionLanguageModel,
    seed: int,
    states: int = 0,
    other_targets: float = 0.0,
    style: str = "short",
    stray: float = 0.0,
) -> Demonstration:
    """Answers of the expert in one deal; deals without a demonstration are skipped.

    `states` 0 keeps every state of one episode. Else every one of so many states is of an episode
    of its own, the first state or a later one with equal chance. A share `other_targets` of these
    episodes asks for another target: one picture, many exercises. At a share `stray` of the steps
    a random action is played, with whose outcome the expert then has to deal.
    """
    rng = np.random.default_rng(seed)
    while True:
        deal, suffixes, answers, shown = int(rng.integers(2**31)), [], [], []
        pictures: dict[bytes, tuple[np.ndarray, list[str]]] = {}
        for _ in range(max(1, states)):
            target = None
            if rng.random() < other_targets:
                target = {"target": int(rng.integers(*OTHER_TARGETS))}
            first = env.reset(seed=deal, options=target)[0]
            rows = expert_rows(env, rng, style, first, stray)
            if states and rows:
                later = len(rows) > 1 and rng.random() < 0.5
                rows = [rows[int(rng.integers(1, len(rows))) if later else 0]]
            for picture, state, text, labels in rows:
                key = picture.tobytes()
                pictures.setdefault(key, (picture, labels))
                shown.append(list(pictures).index(key))
                suffixes.append(vlm.encode(vlm.frame.suffix(state)))
                answers.append([*vlm.encode(text), vlm.end])
        if answers:
            fixed = env.prompt(style).fixed
            different, labels = map(list, zip(*pictures.values(), strict=True))
            return Demonstration(different, shown, fixed, suffixes, answers, labels)


def expert_rows(
    env, rng: np.random.Generator, style: str, picture: np.ndarray, stray: float = 0.0
) -> list[tuple[np.ndarray, str, str, list[str]]]:
    """Picture, prompt, answer and what the picture shows in every state of an episode that the
    expert plays, from its first `picture` on; none without a plan."""
    rows, done = [], False
    while not done:
        text = env.expert_answer(rng)
        if text is None:
            break
        answer = env.read_answer(text)
        labelled = isinstance(env, LabelledEnv)
        labels = env.picture_labels() if labelled else perception_labels(answer.fields)
        rows.append((picture, env.prompt(style).state, text, labels))
        action = env.actions.index(answer.action)
        if stray and rng.random() < stray:
            action = int(rng.integers(len(env.actions)))
        picture, _, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
    return rows


def longest_answer(env, vlm: VisionLanguageModel, style: str = "short", deals: int = 64) -> int:
    """Tokens of the expert's longest answer in some deals, its end included."""
    demos = (demonstrate(env, vlm, seed, style=style) for seed in range(deals))
    return max(len(answer) for d in demos for answer in d.answers)


def pictures_of(demos: list[Demonstration]) -> list[np.ndarray]:
    """The pictures of all demonstrations, one after the other."""
    return [picture for d in demos for picture in d.pictures]


def backward_demos(
    vlm: VisionLanguageModel,
    weights: Weights,
    demos: list[Demonstration],
    features: Tensor,  # [U, tokens, D'] of `pictures_of(demos)`
    grid: Tensor,
    scale: float = 1.0,
) -> tuple[float, int]:
    """Accumulate the gradient of the summed cross-entropy, times `scale`, in the leaves `weights`
    and in the features, where they ask for one; the sum and the number of answer tokens."""
    fixed = {d.fixed for d in demos}
    if len(fixed) > 1:
        raise ValueError(
            "the fixed part of a prompt must be the same in every episode, and what differs stand "
            f"in its state; there are {len(fixed)}: {min(fixed)[:200]!r} and {max(fixed)[:200]!r}"
        )
    total = 0.0
    count = first = 0
    owner: list[int] = []  # picture of each row
    for d in demos:
        owner += [first + number for number in d.shown]
        first += len(d.pictures)

    def loss(w, hidden, batch, rows):
        nonlocal total, count
        h = vlm.text.final_norm(w, hidden.flatten(0, 1).index_select(0, batch.select))
        count += len(batch.targets)
        if vlm.text.small:  # the head is trained too
            logits = F.linear(h, w.head)[: len(batch.targets)].float()
            value = scale * F.cross_entropy(logits, batch.targets, reduction="sum")
        else:
            value = loss_of_answers(
                h, w.head, batch, lambda out, *_: -scale * out.logprob.sum(), want=("logprob",)
            )
        total += value.item() / scale
        return value

    backward_rows(
        vlm,
        weights,
        features,
        demos[0].fixed,
        grid,
        owner,
        [s for d in demos for s in d.suffixes],
        [a for d in demos for a in d.answers],
        loss,
    )
    return total, count
