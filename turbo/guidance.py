"""Thoughts that a teacher writes where the policy has been, and the dataset that they make.

    loss = - mean over thought tokens of log p_policy(token | picture, prompt, answer so far)

The states are the policy's own, the thoughts are the teacher's: DAgger (Ross et al. 2011), as GTR
(arXiv 2503.08525) and GTR-Turbo's SFT variant (arXiv 2512.13043) use it. The teacher is the merged
one, or an external corrector (`turbo.corrector`). The action stays the policy's own: it is no
target, and since nothing is predicted behind it, an example ends with the thought.

Left out: the gradient of this loss (`turbo.update`), guidance by KL (`turbo.score`).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from turbo.batch import run_batches
from turbo.corrector import Corrector, Question, TurnedAway
from turbo.decode import Decoder, Request
from turbo.envs.base import action_key
from turbo.memory import KEPT
from turbo.model import VisionLanguageModel, Weights
from turbo.parallel import Crew
from turbo.prefixes import Prefixes
from turbo.rollout import Episode, Rollout, Step, enough, mix, read_answer
from turbo.score import local_pictures

SLOTS = 256  # answers that are written at once


@torch.no_grad()
def write_answers(
    vlm: VisionLanguageModel,
    weights: Weights,
    rollout: Rollout,
    rows: Sequence[int],
    *,
    temperature: float,
    max_new_tokens: int,
    seed: tuple[int, ...],
    slots: int = SLOTS,
) -> list[Episode]:
    """The steps `rows` as other weights, the teacher's, would have answered them, one an episode.

    An answer that cannot be read is written once more.
    """
    if not rows:
        return []
    weights = vlm.merged(weights)
    steps = rollout.select(rows)
    pictures, owner = local_pictures(steps)
    prefixes = Prefixes(vlm, weights, rollout.fixed)
    run_batches(
        [1] * len(pictures),
        vlm.batches,
        "decode",
        lambda part: prefixes.add(rollout.features[[pictures[i] for i in part]], rollout.grid),
    )
    generator = torch.Generator().manual_seed(mix(*seed))
    slots = min(len(steps), slots)
    decoder = Decoder(vlm, weights, slots, temperature, max_new_tokens, generator)
    waiting, busy, again = list(range(len(steps)))[::-1], {}, set()
    out: dict[int, Step] = {}

    def begin(slot: int) -> None:
        i = busy[slot] = waiting.pop()
        asked, answer = steps[i].asked, steps[i].answer.text

        def guess(written: str) -> str:  # what the policy answered is the best guess there is
            return asked.guess_answer(written, answer)

        soon = [owner[j] for j in waiting[: -1 - KEPT : -1]]
        decoder.show(slot, *prefixes.get(owner[i], soon))
        decoder.ask(slot, Request(steps[i].suffix, guess))

    free = list(range(slots))
    while decoder.rows or waiting:
        if enough(vlm, len(free), len(decoder.rows)):
            while free and waiting:
                begin(free.pop(0))
        for slot, sample in decoder.advance():
            i = busy[slot]
            out[i] = _answered(vlm, steps[i], sample.tokens, sample.logprobs)
            if out[i].answer.action is None and i not in again:
                again.add(i)
                waiting.append(i)
            free.append(slot)
    return told(rollout, rows, [out[i] for i in range(len(steps))])


def ask_corrector(
    vlm: VisionLanguageModel,
    corrector: Corrector,
    rollout: Rollout,
    rows: Sequence[int],
    crew: Crew,
) -> list[Episode]:
    """The steps `rows` as an external model corrects them; those it did not answer are left out.

    TurnedAway in all workers where it refuses one.
    """
    steps = rollout.select(rows)
    questions = [
        Question(s.asked.render(), s.asked.prompt("full").text, s.answer.text) for s in steps
    ]

    def readable(number: int, text: str) -> bool:
        return steps[number].asked.read_answer(text).action is not None

    problem = ""
    try:
        texts = corrector.correct(questions, readable)
    except TurnedAway as error:
        problem = str(error)
    if problem := crew.problem(problem):
        raise TurnedAway(problem)
    answered = [
        None if text is None else _answered(vlm, step, [*vlm.encode(text), vlm.end], [])
        for step, text in zip(steps, texts, strict=True)
    ]
    return told(rollout, rows, answered)


def told(rollout: Rollout, rows: Sequence[int], steps: Sequence[Step | None]) -> list[Episode]:
    """Each of the `steps` as an episode of one, of the deal that row `rows` was played in."""
    owner = [episode for episode in rollout.episodes for _ in episode.steps]
    pairs = zip(rows, steps, strict=True)
    return [replace(owner[i], steps=[s], final=None) for i, s in pairs if s is not None]


def _answered(
    vlm: VisionLanguageModel, step: Step, tokens: list[int], logprobs: list[float]
) -> Step:
    answer = read_answer(vlm, step.asked, tokens)
    return replace(
        step,
        tokens=tokens,
        logprobs=logprobs,
        thought=vlm.thought_tokens(tokens, action_key(step.asked)),
        answer=answer,
        verdict=step.asked.judge(answer),
    )


class Examples:
    """The growing dataset: pictures, prompts, and the thoughts to be learned."""

    def __init__(self, limit: int = 0):
        self.limit = limit  # the newest so many are kept (0: all)
        self.features: list[Tensor] = []  # [n, D] a picture's vision features
        self.rows: list[tuple[int, list[int], list[int]]] = []  # picture, suffix, thought tokens

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, rollout: Rollout, written: Sequence[Episode], crew: Crew) -> None:
        """Take the readable answers of all workers; every worker holds the same dataset."""
        usable = [s for e in written for s in e.steps if s.answer.action is not None and s.thought]
        pictures, owner = local_pictures(usable)
        own = (
            rollout.features[pictures].float().cpu().numpy() if usable else np.empty(0),
            [(p, s.suffix, s.tokens[: s.thought]) for p, s in zip(owner, usable, strict=True)],
        )
        for features, rows in crew.share(own):
            first = len(self.features)
            self.features += list(torch.from_numpy(np.array(features)))
            self.rows += [(first + picture, *rest) for picture, *rest in rows]
        if self.limit and len(self.rows) > self.limit:
            self._keep(self.rows[-self.limit :])

    def _keep(self, rows: list[tuple[int, list[int], list[int]]]) -> None:
        used = sorted({picture for picture, _, _ in rows})
        place = {picture: i for i, picture in enumerate(used)}
        self.features = [self.features[picture] for picture in used]
        self.rows = [(place[picture], *rest) for picture, *rest in rows]

    def pick(self, count: int, generator: torch.Generator) -> list[int]:
        """Numbers of `count` random examples, as many as there are at most."""
        count = min(count, len(self.rows))
        return torch.randperm(len(self.rows), generator=generator)[:count].tolist()

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors for a safetensors file."""
        if not self.rows:
            return {}
        tokens = [t for _, suffix, thought in self.rows for t in (*suffix, *thought)]
        sizes = [[p, len(suffix), len(thought)] for p, suffix, thought in self.rows]
        return {
            "features": torch.stack(self.features),
            "tokens": torch.tensor(tokens, dtype=torch.int32),
            "sizes": torch.tensor(sizes, dtype=torch.int32),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self.features, self.rows = [], []
        if not state:
            return
        self.features = list(state["features"])
        tokens, at = state["tokens"].tolist(), 0
        for picture, suffix, thought in state["sizes"].tolist():
            middle, end = at + suffix, at + suffix + thought
            self.rows.append((picture, tokens[at:middle], tokens[middle:end]))
            at = end
