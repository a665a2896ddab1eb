"""Sampling answers in a batch, exactly and speculatively.

Most tokens of an answer can be guessed: the JSON skeleton, the cards read a step ago, a plan once
it is made. A guess is verified, not believed. With p the model's own distribution (temperature
only, specials banned) and d the guessed token,

    accept d with probability p(d), otherwise draw from p without d, renormalised

which yields exactly a draw from p, whatever the guess (Leviathan et al. 2023, with a one-point
proposal). A whole guess is verified in one forward pass, so a step costs two or three passes in
place of forty, and the recorded log-probs are those of p. Guesses come from the environment
(`guess_answer`); a bad guess costs time, never correctness.

Rows do not wait for each other: every environment has a slot in the cache and is at its own place
in its answer, and one pass serves rows that read a prompt with a long guess beside rows that take
one token (in groups of similar length).

Left out: top-k, top-p, penalties (they would make the scored policy another one); when a large
model guesses (`turbo.pace`); how a pass runs on the slots (`turbo.kv_cache`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate, islice

import torch
import torch.nn.functional as F
from torch import Tensor

from turbo.attend import PrefixKV
from turbo.batch import LOGITS, ROWS_OF_FEW, SHORT, fits, micro_batches, round_up
from turbo.kernels.policy_head_sums import ban_bias
from turbo.kv_cache import KVCache
from turbo.model import VisionLanguageModel, Weights
from turbo.pace import Pace

AFTER_REFUSAL = 4  # tokens guessed behind a refused guess, beside as many as were right before it
UNBOUND = 1 << 30


@dataclass
class Request:
    """One answer to sample: the suffix tokens of its prompt, and the guesser of its answer."""

    suffix: list[int]
    guess: Callable[[str], str]


@dataclass
class Sample:
    """A sampled answer."""

    tokens: list[int]  # the end token included, where it was sampled
    logprobs: list[float]  # log p of each token under the sampled distribution
    hidden: Tensor  # [D] normed hidden state at the last prompt token, float32


@dataclass
class _Row:
    slot: int
    request: Request
    pending: list[int]  # tokens that are not in the cache yet
    position: int = 0  # tokens in the cache, behind the prefix
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    draft: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)  # the guess that the draft was cut from
    limit: int = UNBOUND  # longest draft: short after a refusal, free again after a confirmation
    right: int = 0  # guessed tokens that have come true since a refusal
    hidden: Tensor | None = None
    judged: Tensor | None = None  # [draft + 1] uniform numbers of this pass
    drawn: Tensor | None = None  # [1]

    @property
    def length(self) -> int:
        """Tokens that a pass computes of it."""
        return len(self.pending) + len(self.draft)


class Decoder:
    """Samples with fixed weights for `slots` environments.

    The additive `bias` bans specials, as the scorer does.
    """

    def __init__(
        self,
        vlm: VisionLanguageModel,
        weights: Weights,
        slots: int,
        temperature: float,
        max_new_tokens: int,
        generator: torch.Generator,
    ):
        if temperature <= 0:
            raise ValueError(
                f"temperature must be more than 0, got {temperature}; for near-greedy use 0.01"
            )
        self.vlm, self.weights, self.temperature = vlm, weights, temperature
        self.max_new, self.generator = max_new_tokens, generator
        self.bias = ban_bias(vlm.banned, vlm.text.dtype)
        self.cache = KVCache(vlm, slots, max_new_tokens)
        self.rows: dict[int, _Row] = {}
        self.passes = self.guessed = self.accepted = 0
        self.pace = Pace(vlm.text.small)

    def show(self, slot: int, prefix: PrefixKV, number: int) -> None:
        """Put prefix `number` into a slot; it stays for all requests until another is shown."""
        self.cache.put_prefix(slot, prefix, number)

    def ask(self, slot: int, request: Request) -> None:
        """Begin an answer in a slot that has none under way.

        ValueError where prompt and answer have no place in the model: nothing is cut off.
        """
        tokens, limit = self.cache.past + len(request.suffix), self.vlm.positions
        if limit is not None and tokens + self.max_new > limit:
            raise ValueError(
                f"a prompt has {tokens:,} tokens and its answer may have {self.max_new}: more than "
                f"the {limit:,} positions of the model; shorten the prompt, or --max-new-tokens"
            )
        # On a GPU, and where passes are recorded, the cache does not move while it is answered.
        if self.cache.ahead or self.cache.graphs is not None:
            self.cache.reserve(tokens + self.max_new)
        self.rows[slot] = _Row(slot, request, list(request.suffix))

    @torch.no_grad()
    def advance(self) -> list[tuple[int, Sample]]:
        """One forward pass for every row; the slots whose answers are complete, and the answers."""
        rows = list(self.rows.values())
        for row in rows:
            row.draft = [] if self.pace.rest and row.position else self._draft(row)
            if row.limit < UNBOUND:
                row.draft = row.draft[: self.pace.most(len(rows))]
        self._draw_noise(rows)
        fresh = [r for r in rows if not r.position]
        behind = [r for r in rows if r.position]
        short = [r for r in behind if r.length <= SHORT]
        long = [r for r in behind if r.length > SHORT]
        sizes = self.vlm.batches
        written = sum(len(r.tokens) + 1 for r in behind)
        for kind, most in ((fresh, 1), (short, ROWS_OF_FEW), (long, 1)):
            for group in _similar(kind, most * sizes.decode, sizes.decode_tokens):
                self._pass(group)
        came_true = sum(len(r.tokens) for r in behind) - written
        self.pace.consider(sum(bool(r.draft) for r in behind), came_true)
        done = []
        for row in rows:
            if row.tokens[-1] == self.vlm.end or len(row.tokens) >= self.max_new:
                del self.rows[row.slot]
                done.append((row.slot, Sample(row.tokens, row.logprobs, row.hidden)))
        return done

    def _draw_noise(self, rows: list[_Row]) -> None:
        """Uniform numbers: one for each guess and the token behind, and one to draw a token with.

        Drawn for all rows first: what is sampled does not depend on which rows run together.
        """
        counts = [len(r.draft) + 1 for r in rows]
        judged = torch.rand(sum(counts), generator=self.generator).split(counts)
        drawn = torch.rand(len(rows), 1, dtype=torch.float64, generator=self.generator)
        for row, numbers, number in zip(rows, judged, drawn, strict=True):
            row.judged, row.drawn = numbers, number

    def _pass(self, rows: list[_Row]) -> None:
        """One forward pass for these rows; one for each half of them where memory runs out."""
        self.passes += 1
        if not fits(lambda: self._verify(rows, *self._forward(rows))):
            self.cache.forget_graphs()
            tokens = sum(_lengths(rows, self.vlm.batches.decode_tokens))
            half = self.vlm.batches.halve("decode", len(rows), tokens)
            self._pass(rows[:half])
            self._pass(rows[half:])

    def _draft(self, row: _Row) -> list[int]:
        """Guessed tokens behind those already sampled; the end token is left to the model."""
        room = min(self.max_new - len(row.tokens) - 1, row.limit)
        n = len(row.tokens)
        if len(row.whole) <= n or row.whole[:n] != row.tokens:
            written = self.vlm.decode(row.tokens) if row.tokens else ""
            guess = row.request.guess(written)
            row.whole = self.vlm.encode(guess)
            if row.whole[:n] != row.tokens:  # the model splits the text otherwise
                row.whole = row.tokens + self.vlm.encode(guess[len(written) :])
        return row.whole[n : n + max(room, 0)]

    def _forward(self, rows: list[_Row]) -> tuple[Tensor, "list[_Part]"]:
        """Run pending and draft tokens.

        Returns normed hidden states [N', D] where a token is predicted, and what was guessed there.
        """
        inputs = [r.pending + r.draft for r in rows]
        layout = self.cache.layout(rows, max(map(len, inputs)))
        length = layout.length
        padded = [[self.vlm.pad] * length for _ in range(layout.count)]
        for place, tokens in zip(layout.places, inputs, strict=True):
            padded[place][: len(tokens)] = tokens
        select = [
            place * length + j
            for place, r in zip(layout.places, rows, strict=True)
            for j in range(len(r.pending) - 1, len(r.pending) + len(r.draft))
        ]
        select += [0] * (round_up(len(select), 64) - len(select))
        # Sent before the pass: what is sent behind it waits for its end.
        ids, places = (torch.tensor(x, device=self.vlm.device) for x in (padded, select))
        parts = _parts(rows, LOGITS // len(self.bias), self.vlm.device)
        hidden = self.cache.run(self.weights, ids, rows, layout)
        hidden = hidden.flatten(0, 1).index_select(0, places)
        return self.vlm.text.final_norm(self.weights, hidden), parts

    def _verify(self, rows: list[_Row], hidden: Tensor, parts: "list[_Part]") -> None:
        """Accept or replace the guesses of every row; append what was sampled."""
        sizes = [sum(part.counts) for part in parts]
        pieces = hidden[: sum(sizes)].split(sizes)
        found = [self._judge(part, x) for part, x in zip(parts, pieces, strict=True)]
        numbers = iter(torch.cat(found).tolist())  # fetched at once
        verdicts = [verdict for part in parts for verdict in part.verdicts(numbers)]
        if rows[0].hidden is None:  # all of them have read their prompts
            first = accumulate((len(row.draft) + 1 for row in rows[:-1]), initial=0)
            asked = torch.stack([hidden[i] for i in first]).float().cpu()
            for row, own in zip(rows, asked, strict=True):
                row.hidden = own
        for row, (logp, new, new_logp) in zip(rows, verdicts, strict=True):
            k = len(logp)
            row.tokens += [*row.draft[:k], new]
            row.logprobs += [*logp, new_logp]
            row.position += len(row.pending) + k
            row.pending = [new]
            refused = k < len(row.draft)
            row.right = 0 if refused else row.right + k
            is_sure = not refused and row.right >= self.pace.proof
            row.limit = UNBOUND if is_sure else AFTER_REFUSAL + k
            self.guessed += len(row.draft)
            self.accepted += k

    def _judge(self, part: "_Part", hidden: Tensor) -> Tensor:
        """What `_Part.verdicts` reads; hidden [N, D]."""
        head, guesses = self.weights.head, part.guesses
        if hidden.is_cuda and hidden.dtype != torch.float32:  # not rounded, as in `policy_head`
            logits = torch.mm(hidden, head.T, out_dtype=torch.float32).add_(self.bias)  # [N, V]
        else:
            logits = F.linear(hidden, head, self.bias).float()
        logprobs = torch.log_softmax(logits.div_(self.temperature), -1)
        del logits
        logp = logprobs.gather(1, guesses[:, None])[:, 0]
        accepted = part.judged < logp.exp()
        place = torch.arange(len(guesses), device=guesses.device)
        place = place.masked_fill_(accepted, len(guesses))
        first = torch.full_like(part.ends, len(guesses))
        first = first.scatter_reduce_(0, part.row, place, "amin")
        logprobs = logprobs.index_select(0, first)  # [R, V] where guesses were first refused
        refused, was_guess = guesses[first][:, None], (first != part.ends)[:, None]
        without = logprobs.gather(1, refused).masked_fill_(was_guess, -1e30)
        others = torch.softmax(logprobs.scatter(1, refused, without), -1)
        new = _draw(others, part.drawn)
        new_logp = logprobs.gather(1, new[:, None])[:, 0]
        return torch.cat([x.double() for x in (first, new, new_logp, logp)])


@dataclass
class _Part:
    """Rows that are judged together, R of N predicted tokens: what was guessed of these."""

    counts: list[int]  # of each row: its guess, and the token behind
    guesses: Tensor  # [N] int64; any token where none was guessed
    row: Tensor  # [N] the row of each
    ends: Tensor  # [R] where each row predicts the token behind its guess
    judged: Tensor  # [N] uniform numbers; more than any probability where none was guessed
    drawn: Tensor  # [R, 1] uniform numbers

    def verdicts(self, numbers: Iterator[float]) -> list[tuple[list[float], int, float]]:
        """Of every row: log-probs of the guesses that are accepted, the next token and its own."""
        rows, start, out = len(self.counts), 0, []
        first, new, new_logp = (list(islice(numbers, rows)) for _ in range(3))
        logp = list(islice(numbers, sum(self.counts)))
        for i, count in enumerate(self.counts):
            out.append((logp[start : int(first[i])], int(new[i]), new_logp[i]))
            start += count
        return out


def _parts(rows: list[_Row], most: int, device: torch.device) -> list[_Part]:
    """The rows in order, as many together as predict `most` tokens, or one."""
    groups: list[list[_Row]] = []
    size = 0
    for row in rows:
        size += len(row.draft) + 1
        if not groups or size > most:
            groups.append([])
            size = len(row.draft) + 1
        groups[-1].append(row)
    return [_part(group, device) for group in groups]


def _part(rows: list[_Row], device: torch.device) -> _Part:
    counts = [len(r.draft) + 1 for r in rows]
    guesses = [t for r in rows for t in [*r.draft, 0]]
    row = [i for i, count in enumerate(counts) for _ in range(count)]
    ends = [end - 1 for end in accumulate(counts)]
    judged = torch.cat([r.judged for r in rows]).double()
    judged[ends] = 2.0
    drawn = torch.cat([r.drawn for r in rows])
    sizes = [len(row), len(row), len(rows)]
    whole = torch.tensor([*guesses, *row, *ends], device=device).split(sizes)
    judged, drawn = torch.cat([judged, drawn]).to(device).split(sizes[1:])
    return _Part(counts, *whole, judged, drawn[:, None])


def _draw(p: Tensor, u: Tensor) -> Tensor:
    """[R] one token a row, by inversion of the distributions p [R, V] at u [R, 1] in [0, 1)."""
    below = p.double().cumsum_(-1)  # in place: it is the largest tensor of all here
    drawn = torch.searchsorted(below, u * below[:, -1:], right=True)[:, 0]
    return drawn.clamp_(max=p.shape[1] - 1)  # past the end where p is not a number


def _similar(rows: list[_Row], size: int, tokens: int) -> list[list[_Row]]:
    """Rows in groups of similar length: cache-sized work, or on a GPU what its memory holds."""
    groups = micro_batches(_lengths(rows, tokens), size, tokens=tokens)
    return [[rows[i] for i in group] for group in groups]


def _lengths(rows: list[_Row], tokens: int) -> list[int]:
    """What a pass computes of each row; as it is padded, where the tokens of a pass are bounded."""
    return [round_up(r.length) if tokens else r.length for r in rows]
