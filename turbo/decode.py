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

On a GPU a pass over few tokens of most slots runs on all of them, in their order, and reads the
cache where it is: copying it costs more than rows that nobody asked for.

With `--decode-graphs` passes over few tokens are recorded and replayed (`turbo.graphs`). The cache
then grows in larger steps, and rows and lengths take few sizes, so that shapes recur.

Left out: top-k, top-p, penalties (they would make the scored policy another one); when a large
model guesses (`turbo.pace`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from turbo.attend import PrefixKV, additive, causal_mask
from turbo.batch import fits, micro_batches, round_up
from turbo.graphs import Graphs
from turbo.kernels.policy_head_sums import ban_bias
from turbo.model import VisionLanguageModel, Weights
from turbo.pace import Pace

CACHED = 32  # places of the cache are reserved in multiples of this,
RECORDED = 128  # or of this where passes are recorded
LOGITS = 1 << 26  # logits that are held at once while answers are sampled, about
AFTER_REFUSAL = 4  # tokens guessed behind a refused guess, beside as many as were right before it
UNBOUND = 1 << 30
MOST = 0.75  # share of the slots from which on all of them run, where the cache is read in place
SHORT = 8  # inputs of at most so many tokens run together, apart from longer ones


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
        self.cache = _Cache(vlm, slots)
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
        if self.cache.graphs is not None:  # so that the cache does not move while it is answered
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
        fresh = [r for r in rows if r.position == 0]
        short = [r for r in rows if r.position and len(r.pending) + len(r.draft) <= SHORT]
        long = [r for r in rows if r.position and len(r.pending) + len(r.draft) > SHORT]
        size, behind = self.vlm.batches.decode, [*short, *long]
        written = sum(len(r.tokens) + 1 for r in behind)
        for group in (*_similar(fresh, size), *_similar(short, 4 * size), *_similar(long, size)):
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
            half = self.vlm.batches.halve("decode", len(rows))
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

    def _forward(self, rows: list[_Row]) -> tuple[Tensor, list[int]]:
        """Run pending and draft tokens.

        Returns normed hidden states [N', D] where a token is predicted, and counts per row.
        """
        inputs = [r.pending + r.draft for r in rows]
        layout = self.cache.layout(rows, max(map(len, inputs)))
        length = layout.length
        padded = [[self.vlm.pad] * length for _ in range(layout.count)]
        for place, tokens in zip(layout.places, inputs, strict=True):
            padded[place][: len(tokens)] = tokens
        ids = torch.tensor(padded, device=self.vlm.device)
        hidden = self.cache.run(self.weights, ids, rows, layout)
        counts = [len(r.draft) + 1 for r in rows]
        select = [
            place * length + j
            for place, r in zip(layout.places, rows, strict=True)
            for j in range(len(r.pending) - 1, len(r.pending) + len(r.draft))
        ]
        select += [0] * (round_up(len(select), 64) - len(select))
        hidden = hidden.flatten(0, 1).index_select(0, torch.tensor(select, device=hidden.device))
        return self.vlm.text.final_norm(self.weights, hidden), counts

    def _verify(self, rows: list[_Row], hidden: Tensor, counts: list[int]) -> None:
        """Accept or replace the guesses of every row; append what was sampled."""
        verdicts: list[tuple[list[float], int, float]] = []
        first = at = 0
        while first < len(rows):  # as many rows at once as their logits have room
            last, n = first + 1, counts[first]
            while last < len(rows) and (n + counts[last]) * len(self.bias) <= LOGITS:
                n += counts[last]
                last += 1
            part = slice(first, last)
            verdicts += self._judge(rows[part], hidden[at : at + n], counts[part])
            first, at = last, at + n
        offset = 0
        for row, count, (logp, new, new_logp) in zip(rows, counts, verdicts, strict=True):
            k = len(logp)
            if row.hidden is None:
                row.hidden = hidden[offset].float().cpu()
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
            offset += count

    def _judge(
        self, rows: list[_Row], hidden: Tensor, counts: list[int]
    ) -> list[tuple[list[float], int, float]]:
        """Of every row: log-probs of the guesses that are accepted, the next token and its own."""
        head = self.weights.head
        if hidden.is_cuda and hidden.dtype != torch.float32:  # not rounded, as in `policy_head`
            logits = torch.mm(hidden, head.T, out_dtype=torch.float32).add_(self.bias)  # [N, V]
        else:
            logits = F.linear(hidden, head, self.bias).float()
        logprobs = torch.log_softmax(logits.div_(self.temperature), -1)
        device = logprobs.device
        n = torch.tensor(counts, device=device)
        end = n.cumsum(0) - 1  # where each row predicts the token behind its draft
        drafts = torch.tensor([t for r in rows for t in [*r.draft, 0]], device=device)
        logp = logprobs.gather(1, drafts[:, None])[:, 0]
        refused = torch.cat([r.judged for r in rows]).to(device) >= logp.exp()
        refused[end] = True  # nothing was guessed there
        place = torch.arange(len(drafts), device=device).masked_fill(~refused, len(drafts))
        row_of = torch.repeat_interleave(torch.arange(len(rows), device=device), n)
        first = torch.full_like(n, len(drafts)).scatter_reduce(0, row_of, place, "amin")
        logprobs = logprobs.index_select(0, first)  # [R, V] where guesses were first refused
        others = logprobs.clone()
        inside = (first != end).nonzero()[:, 0]
        others[inside, drafts[first[inside]]] = -1e30
        drawn = torch.stack([r.drawn for r in rows]).to(device)
        new = _draw(torch.softmax(others, -1), drawn)
        new_logp = logprobs.gather(1, new[:, None])[:, 0].tolist()
        starts, taken = (end + 1 - n).tolist(), first.tolist()  # accepted: what lies in between
        logp, new = logp.tolist(), new.tolist()
        return [(logp[starts[i] : taken[i]], new[i], new_logp[i]) for i in range(len(rows))]


def _draw(p: Tensor, u: Tensor) -> Tensor:
    """[R] one token a row, by inversion of the distributions p [R, V] at u [R, 1] in [0, 1)."""
    below = p.cumsum(-1, dtype=torch.float64)
    drawn = torch.searchsorted(below, u * below[:, -1:], right=True)[:, 0]
    return drawn.clamp_(max=p.shape[1] - 1)  # past the end where p is not a number


def _similar(rows: list[_Row], size: int) -> list[list[_Row]]:
    """Rows in groups of cache-sized work and similar length."""
    lengths = [len(r.pending) + len(r.draft) for r in rows]
    return [[rows[i] for i in group] for group in micro_batches(lengths, size)]


@dataclass(frozen=True)
class _Layout:
    """How rows stand in the batch of a pass."""

    places: list[int]  # of each row
    count: int  # rows that are computed
    length: int  # tokens that are computed of each
    whole: bool = False  # row i of the batch is slot i, for all slots


class _Cache:
    """Keys and values per slot, of prefix and the rest: per layer [slots, Hkv, width, hd]."""

    def __init__(self, vlm: VisionLanguageModel, slots: int):
        self.vlm, self.slots, self.width = vlm, slots, 0
        self.graphs = None if vlm.text.record is None else Graphs(vlm.text.record)
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.past = self.next_position = 0  # of the prefix

    def put_prefix(self, slot: int, prefix: PrefixKV, number: int) -> None:
        """Copy one prompt prefix into a slot."""
        if not self.keys:
            self.past, self.next_position = prefix.length, prefix.next_position
            _, heads, _, hd = prefix.keys[0].shape
            # One slot more than there are environments, for rows that only fill up a batch.
            empty = prefix.keys[0].new_zeros(self.slots + 1, heads, 0, hd)
            self.keys, self.values = [empty] * len(prefix.keys), [empty] * len(prefix.keys)
            self.reserve(self.past)
        for own, new in zip(self.keys, prefix.keys, strict=True):
            own[slot, :, : self.past] = new[number]
        for own, new in zip(self.values, prefix.values, strict=True):
            own[slot, :, : self.past] = new[number]

    def layout(self, rows: list[_Row], length: int) -> _Layout:
        """The batch of a pass over `rows`, of up to `length` tokens each; the rest is padding."""
        places, count = list(range(len(rows))), round_up(len(rows))
        if length > SHORT:
            return _Layout(places, count, round_up(length, 8))
        if self.graphs is None:
            length = round_up(length, 2)
        else:  # few sizes: every one is a graph
            length = max(2, 1 << (length - 1).bit_length())
            most = min(self.slots, 4 * self.vlm.batches.decode)
            step = round_up(-(-most // 4))
            count = -(-len(rows) // step) * step
        if self.vlm.text.in_place and len(rows) >= MOST * self.slots and rows[0].position:
            return _Layout([row.slot for row in rows], self.slots, length, whole=True)
        return _Layout(places, count, length)

    def forget_graphs(self) -> None:
        """Where there are any; their memory is free again."""
        if self.graphs is not None:
            self.graphs.clear()

    def reserve(self, tokens: int) -> int:
        """Make place for `tokens` in every slot; how many of them to attend to."""
        used = round_up(tokens, CACHED if self.graphs is None else RECORDED)
        if used > self.width:
            self.forget_graphs()
            for cache in (self.keys, self.values):  # layer by layer: never two whole caches
                for i, x in enumerate(cache):
                    cache[i] = F.pad(x, (0, 0, 0, used - x.shape[2]))
            self.width = used
        return used

    def _take(self, cache: Tensor, slot: Tensor, used: int, whole: bool) -> Tensor:
        """[R, Hkv, used, hd] of the slots; whole slots are copied four times as fast as parts."""
        if whole:
            return cache[: self.slots, :, :used]
        return cache.index_select(0, slot) if used == self.width else cache[slot, :, :used]

    def run(self, weights: Weights, ids: Tensor, rows: list[_Row], layout: _Layout) -> Tensor:
        """Hidden states [R, L, D] of ids [R, L] behind what each row has in the cache.

        They are cached too.
        """
        text, length = self.vlm.text, ids.shape[1]
        far = max(row.position for row in rows)
        slots, starts = [self.slots] * len(ids), [0] * len(ids)  # blank rows write to the last slot
        for place, row in zip(layout.places, rows, strict=True):
            slots[place], starts[place] = row.slot, row.position
        slot, start = (torch.tensor(numbers, device=ids.device) for numbers in (slots, starts))
        used = self.reserve(self.past + far + length)
        if far == 0:  # a prompt is read: everything lies in one piece
            return self._run_fresh(weights, text.embed(weights, ids), slot)
        inputs = (ids, slot, start)
        step = partial(self._run_behind, weights, used, layout.whole)
        if self.graphs is None or length > SHORT:
            return step(*inputs)
        text.use(weights)  # refuses weights that are gone, also where nothing but a replay follows
        return self.graphs.run((*ids.shape, used, layout.whole), step, inputs)

    def _run_behind(
        self, weights: Weights, used: int, whole: bool, ids: Tensor, slot: Tensor, start: Tensor
    ) -> Tensor:
        """Hidden states of ids [R, L] in the slots [R] from the places start [R] on.

        It can be recorded: nothing in here depends on values. (The built-in models' rotary table
        does; they are not recorded.)
        """
        text, length = self.vlm.text, ids.shape[1]
        x = text.embed(weights, ids)
        at = start[:, None] + torch.arange(length, device=ids.device)  # [R, L] behind the prefix
        rope = text.text_rope(at + self.next_position)
        at += self.past
        blocked = torch.arange(used, device=ids.device) > at[..., None]  # [R, L, S]
        mask = additive(blocked, text.dtype)[:, None, None]
        _, heads, width, hd = self.keys[0].shape
        place = slot[:, None] * heads + torch.arange(heads, device=ids.device)
        place = place[..., None] * width + at[:, None]
        place = place.flatten()  # [R * Hkv * L] rows of the cache as a matrix of hd columns

        def attend(i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            pair = []
            for cache, new in ((self.keys[i], k), (self.values[i], v)):
                cache.view(-1, hd).index_copy_(0, place, new.reshape(-1, hd))
                pair.append(self._take(cache, slot, used, whole))
            return pair[0], pair[1]

        return text.forward(weights, x, rope, mask, attend)

    def _run_fresh(self, weights: Weights, x: Tensor, slot: Tensor) -> Tensor:
        """Hidden states of embeddings x [R, L, D] right behind the prefixes of the slots."""
        text, past, length = self.vlm.text, self.past, x.shape[1]
        rope = text.text_rope(torch.arange(length, device=x.device) + self.next_position)

        def attend(i: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            pair = []
            for cache, new in ((self.keys[i], k), (self.values[i], v)):
                cache[slot, :, past : past + length] = new
                pair.append(torch.cat([cache[slot, :, :past], new], 2))
            return pair[0], pair[1]

        return text.forward(weights, x, rope, causal_mask(length, past, text), attend)
