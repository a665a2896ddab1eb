"""turbo/decode.py: whatever is guessed, answers are drawn from p, and log p is what is recorded."""

import itertools
import math

import pytest
import tiny_models
import torch
from family_models import folder
from tiny_models import suffix_text

from turbo.batch import SHORT, BatchSizes
from turbo.decode import Decoder, Request
from turbo.kernels.policy_head_sums import ban_bias
from turbo.kv_cache import KVCache
from turbo.model import Engine, load
from turbo.pace import Pace

LETTERS = "xyzw"  # what the models of the chi-square tests may say, beside the end
TEMPERATURE = 0.15  # makes a random model's nearly equal probabilities uneven


@pytest.fixture(scope="module")
def prompt(vlm):
    """A picture, the fixed part and a suffix."""
    env = tiny_models.new_env("ezpoints")
    picture, _ = env.reset(seed=0)
    return picture, env.prompt("short").fixed, vlm.encode(suffix_text(env.prompt("short").state))


def decoder_for(vlm, prompt, slots, *, temperature=TEMPERATURE, max_new=2, seed=0, lora=None):
    with torch.no_grad():
        weights = vlm.weights(lora)
        features, grid = vlm.see([prompt[0]])
        prefix = vlm.prefix(weights, features, prompt[1], grid)
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(vlm, weights, slots, temperature, max_new, generator)
    for slot in range(slots):
        decoder.show(slot, prefix, 0)
    return decoder


def finish(decoder):
    """Answers by slot."""
    out = {}
    while decoder.rows:
        out.update(decoder.advance())
    return out


def exact(vlm, prompt, tokens, temperature):
    """log p of `tokens` one after the other, by transformers' own forward pass."""
    with torch.no_grad():
        parameters = tiny_models.merged_parameters(vlm, None)
        logp, _ = tiny_models.own_answer(vlm, parameters, *prompt, tokens, temperature)
    return logp.gather(1, torch.tensor(tokens)[:, None])[:, 0]


@pytest.fixture(scope="module")
def limited(vlm):
    """The random model, which may say LETTERS or end."""
    letters = [vlm.encode(c)[0] for c in LETTERS]
    return tiny_models.with_banned(vlm, [*letters, vlm.end])


@pytest.fixture(scope="module")
def truth(limited, prompt):
    """The probability of every answer of at most two tokens."""
    letters = [limited.encode(c)[0] for c in LETTERS]
    answers = [(limited.end,), *itertools.product(letters, [*letters, limited.end])]
    p = {a: exact(limited, prompt, list(a), TEMPERATURE).sum().exp().item() for a in answers}
    assert math.fsum(p.values()) == pytest.approx(1, abs=1e-4)
    return p


def chi_square(counts, truth):
    n = sum(counts.values())
    assert counts.keys() <= truth.keys()
    return sum((counts.get(a, 0) - n * p) ** 2 / (n * p) for a, p in truth.items())


def guessers(truth, letter_of):
    """Guesses, from the best to the absurd; each continues what is written."""
    ranked = sorted(truth, key=truth.get)
    words = ["".join(letter_of.get(t, "") for t in a) for a in ranked]
    best, worst = words[-1], words[0] or words[1]

    def always(word):
        return lambda written: word if word.startswith(written) else written

    return {
        "right": always(best),
        "wrong": always(worst),
        "empty": lambda written: written,
        "nothing": lambda written: "",
        "banned": lambda written: written + "the",
        "long": lambda written: written + "x" * 40,
        "other letters": lambda written: written + LETTERS[len(written)] + "q",
    }


KINDS = ("right", "wrong", "empty", "nothing", "banned", "long", "other letters")
BOUND = 60.0  # 20 degrees of freedom: exceeded once in 140,000 by chance, and the seed is fixed


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_drawn_from_p_whatever_is_guessed(
    limited, prompt, truth, kind, large, monkeypatch
):
    monkeypatch.setattr(limited.text, "small", not large)  # a large model pauses now and then
    letter_of = {limited.encode(c)[0]: c for c in LETTERS}
    guess = guessers(truth, letter_of)[kind]
    slots, rounds = 400, 8
    decoder = decoder_for(limited, prompt, slots, seed=KINDS.index(kind))
    counts = {}
    for _ in range(rounds):
        for slot in range(slots):
            decoder.ask(slot, Request(prompt[2], guess))
        for sample in finish(decoder).values():
            counts[tuple(sample.tokens)] = counts.get(tuple(sample.tokens), 0) + 1
    assert sum(counts.values()) == slots * rounds
    assert chi_square(counts, truth) < BOUND
    # and the test would notice answers of a policy only a little colder
    colder = {a: p**1.2 for a, p in truth.items()}
    total = sum(colder.values())
    assert chi_square(counts, {a: p / total for a, p in colder.items()}) > BOUND
    if kind in ("right", "wrong", "long"):
        assert decoder.guessed > 0
    if kind in ("empty", "nothing"):
        assert decoder.guessed == 0


def test_a_large_model_pauses_longer_after_every_vain_guess():
    small = Pace(small=True)
    small.consider(64, 0)
    assert small.rest == 0 and small.most(64) is None
    pace = Pace(small=False)
    for length in (1, 3, 7, 15, 31, 31):
        pace.consider(64, 31)
        assert pace.rest == length
        for left in reversed(range(length)):
            pace.consider(0, 0)
            assert pace.rest == left
    pace.consider(64, 32)
    assert pace.rest == 0
    pace.consider(64, 0)
    assert pace.rest == 1


def test_a_large_model_guesses_no_more_than_is_free(limited, prompt, monkeypatch):
    monkeypatch.setattr(limited.text, "small", False)
    slots, found = 100, []
    decoder = decoder_for(limited, prompt, slots, max_new=50)
    for slot in range(slots):
        decoder.ask(slot, Request(prompt[2], lambda w: w + "the" * 20))  # which cannot be said
    for _ in range(4):
        decoder.advance()
        found.append({len(row.draft) for row in decoder.rows.values()})
    assert decoder.accepted == 0 and min(found[0]) > 4  # with the prompt: all of it
    # 200 tokens in all; prompts and passes without a guess prove nothing
    assert found[1:] == [{1}, {0}, {1}]


def test_a_large_model_guesses_far_again_behind_guesses_that_came_true(vlm, prompt, monkeypatch):
    monkeypatch.setattr(vlm.text, "small", False)
    (token,) = set(vlm.encode("x" * 40))  # all that can be said
    word, slots = vlm.decode([token]), 64
    decoder = decoder_for(tiny_models.with_banned(vlm, [token]), prompt, slots, max_new=40)
    for slot in range(slots):
        guess = Request(prompt[2], lambda w: w + word * 60 if w else "the")
        decoder.ask(slot, guess)
    found = []
    while decoder.rows:
        rows = list(decoder.rows.values())
        decoder.advance()
        found.append({len(row.draft) for row in rows})
    assert found[1:3] == [{3}, {3}] and min(found[3]) > 20  # and then all of the rest


def test_rows_that_read_a_prompt_do_not_steer_the_others(limited, prompt, monkeypatch):
    """Vain guesses beside prompts would lengthen every pause, right ones would end it."""
    monkeypatch.setattr(limited.text, "small", False)
    decoder = decoder_for(limited, prompt, 8, max_new=6)
    told = []
    monkeypatch.setattr(decoder.pace, "consider", lambda *figures: told.append(figures))
    for turn in range(4):
        decoder.ask(turn, Request(prompt[2], lambda w: w + "the" * 20))  # one more every pass
        before = len(decoder.rows)
        decoder.advance()
        assert told[-1] == (before - 1, 0)


def test_a_guess_that_is_refused_is_not_drawn_again(limited, prompt, truth):
    """Without the renormalisation a refused guess would come back, and be too frequent."""
    first = {}
    for answer, p in truth.items():
        first[answer[0]] = first.get(answer[0], 0.0) + p
    letter = max((a for a in first if a != limited.end), key=first.get)
    p = first[letter]
    too_often = p + (1 - p) * p
    assert too_often - p > 0.15  # far outside what 3,200 draws leave open
    slots, hits, refused = 400, 0, 0
    decoder = decoder_for(limited, prompt, slots, max_new=2, seed=11)
    word = limited.decode([letter])
    for _ in range(8):
        before = decoder.accepted
        for slot in range(slots):
            decoder.ask(slot, Request(prompt[2], lambda w: w or word))
        done = finish(decoder)
        begun = sum(s.tokens[0] == letter for s in done.values())
        assert begun == decoder.accepted - before  # only by being accepted
        hits += begun
        refused += slots - begun
    assert abs(hits / (hits + refused) - p) < 0.04


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_recorded_logprobs_are_those_of_a_full_pass(fitted, temperature):
    """Whole answers with true guesses; every token's log p by transformers' pass."""
    lora = tiny_models.noisy_lora(fitted, size=0.01)
    rollout = tiny_models.play(fitted, lora, temperature=temperature)
    assert rollout.accepted > 0 and rollout.guessed > rollout.accepted
    parameters = {k: v.detach() for k, v in tiny_models.merged_parameters(fitted, lora).items()}
    shown = tiny_models.shown_pictures(rollout)
    for step, picture in list(zip(rollout.steps, shown, strict=True))[::3]:
        with torch.no_grad():
            logp, _ = tiny_models.own_answer(
                fitted, parameters, picture, rollout.fixed, step.suffix, step.tokens, temperature
            )
        want = logp.gather(1, torch.tensor(step.tokens)[:, None])[:, 0]
        assert (want - torch.tensor(step.logprobs)).abs().max() < 1e-4


def test_hidden_is_that_of_the_last_prompt_token(vlm, prompt):
    decoder = decoder_for(vlm, prompt, 2, temperature=1.0, max_new=5)
    decoder.ask(0, Request(prompt[2], lambda w: w))
    decoder.ask(1, Request(prompt[2], lambda w: w + "12345678"))
    done = finish(decoder)
    weights = decoder.weights
    with torch.no_grad():
        features, grid = vlm.see([prompt[0]])
        prefix = vlm.prefix(weights, features, prompt[1], grid)
        hidden = vlm.suffix(weights, torch.tensor([prompt[2]]), prefix)[:, -1]
    want = vlm.text.final_norm(weights, hidden)[0]
    for sample in done.values():
        torch.testing.assert_close(sample.hidden, want, rtol=0, atol=1e-4)


def test_specials_are_never_sampled(vlm, prompt):
    decoder = decoder_for(vlm, prompt, 64, temperature=50.0, max_new=40)
    for slot in range(64):
        decoder.ask(slot, Request(prompt[2], lambda w: w))
    tokens = [t for s in finish(decoder).values() for t in s.tokens]
    # At this temperature all tokens are about equally likely: 6 of 640 are banned.
    assert len(tokens) >= 2200
    assert not vlm.banned[torch.tensor(tokens)].any()
    assert len(set(tokens)) > 500
    assert (ban_bias(vlm.banned, vlm.text.dtype) < 0).sum() == 6
    free = tiny_models.with_banned(vlm, list(range(640)))
    decoder = decoder_for(free, prompt, 64, temperature=50.0, max_new=40)
    for slot in range(64):
        decoder.ask(slot, Request(prompt[2], lambda w: w))
    tokens = [t for s in finish(decoder).values() for t in s.tokens]
    assert vlm.banned[torch.tensor(tokens)].any()  # so the ban is what keeps them out


def test_rows_do_not_wait_for_each_other(fitted):
    """Rows of different length and guesses, asked at different times, are scored as if alone."""
    env = tiny_models.new_env()
    picture, _ = env.reset(options={"hand": [1, 4]})
    fixed, answer = env.prompt("short").fixed, env.expert_answer(None)
    states = ["- or +?", "longer: - or +? 1 2 3 4 5 6", "- or +?", "- or +?"]
    suffixes = [fitted.encode(suffix_text(s)) for s in states]
    guesses = [
        lambda w: w,
        lambda w: w + answer[len(w) :],
        lambda w: w + "abc",
        lambda w: w + "x" * 60,
    ]
    decoder = decoder_for(fitted, (picture, fixed), 4, temperature=1.2, max_new=48)
    done, order = {}, []

    def note(finished):
        for slot, sample in finished:
            order.append(slot)
            done.setdefault(slot, []).append(sample)

    for i in (1, 0, 3, 2):  # one more at every pass
        decoder.ask(i, Request(suffixes[i], guesses[i]))
        note(decoder.advance())
    while decoder.rows:
        note(decoder.advance())
        if order and len(done[order[0]]) == 1 and order[0] not in decoder.rows:
            decoder.ask(order[0], Request(suffixes[order[0]], guesses[order[0]]))  # a freed slot
    assert sorted(set(order)) == [0, 1, 2, 3] and len(order) == 5
    passes = {slot: order.index(slot) for slot in range(4)}
    assert passes[1] < passes[0]  # whose guess was good is done before who took token by token
    lengths = {len(s.tokens) for samples in done.values() for s in samples}
    assert len(lengths) > 1
    for slot, samples in done.items():
        for sample in samples:
            want = exact(fitted, (picture, fixed, suffixes[slot]), sample.tokens, 1.2)
            assert (want - torch.tensor(sample.logprobs)).abs().max() < 1e-4


def test_the_limit_of_new_tokens_holds_with_any_guess(vlm, prompt):
    for limit in (1, 2, 5):
        decoder = decoder_for(vlm, prompt, 3, temperature=1.0, max_new=limit)
        for slot, guess in enumerate((lambda w: w, lambda w: w + "1" * 50, lambda w: w + "the ")):
            decoder.ask(slot, Request(prompt[2], guess))
        for sample in finish(decoder).values():
            assert len(sample.tokens) == len(sample.logprobs) <= limit
            ended = sample.tokens[-1] == vlm.end
            assert ended or len(sample.tokens) == limit


@pytest.mark.parametrize("length", [120, 257, 300, 333])
def test_long_prompts_fit_whatever_the_work_is_rounded_to(vlm, prompt, length):
    suffix = (prompt[2] * 70)[:length]
    decoder = decoder_for(vlm, prompt, 2, temperature=1.0, max_new=2)
    decoder.ask(0, Request(suffix, lambda w: w + "12"))
    decoder.ask(1, Request(prompt[2], lambda w: w))
    for slot, sample in finish(decoder).items():
        place = (*prompt[:2], suffix if slot == 0 else prompt[2])
        want = exact(vlm, place, sample.tokens, 1.0)
        assert (want - torch.tensor(sample.logprobs)).abs().max() < 1e-4


@pytest.mark.parametrize("large", [False, True])
def test_a_pass_has_no_more_tokens_than_memory_is_planned_for(vlm, prompt, monkeypatch, large):
    """Rows that are guessed whole are cut into passes; what is sampled is the same.

    Counted as they are padded. A large model computes no blank rows.
    """
    passes = []

    def watched(cache, weights, ids, rows, layout):
        passes.append((len(rows), layout.count, layout.length))
        return run(cache, weights, ids, rows, layout)

    run = KVCache.run
    monkeypatch.setattr(KVCache, "run", watched)
    if large:
        vlm = load(folder("qwen2_5_vl"), torch.float32, Engine("modules"))
    said = []
    for tokens in (0, 4096, 200):
        sizes = BatchSizes(tokens=tokens, decode_tokens=tokens)
        monkeypatch.setattr(vlm, "batches", sizes)
        decoder = decoder_for(vlm, prompt, 13, temperature=1.0, max_new=40)
        for slot in range(13):
            more = vlm.encode("1 2 3 4 5 6 7"[: slot % 5])
            decoder.ask(slot, Request(prompt[2] + more, lambda w: w + "1 + 2 - 3 " * 8))
        passes.clear()
        done = finish(decoder)
        said.append([done[slot].tokens for slot in range(13)])
        most = max(rows * length for rows, _, length in passes)
        assert most <= tokens if tokens == 200 else most > 600
        if large:
            assert all(rows == count for rows, count, length in passes if length > SHORT)
            assert len(passes) < 100
    assert said[0] == said[1] == said[2]


def test_on_a_gpu_the_cache_has_room_for_an_answer_from_the_start(vlm, prompt, monkeypatch):
    """Where it is read in place it is made once; elsewhere it grows, and answers are the same."""
    widths, reserve = set(), KVCache.reserve

    def watched(cache, tokens):
        used = reserve(cache, tokens)
        widths.add(cache.width)
        return used

    monkeypatch.setattr(KVCache, "reserve", watched)
    said, times = [], []
    for in_place in (False, True):
        own = load(folder("qwen2_5_vl"), torch.float32, Engine("modules"))
        own.text.in_place = in_place
        decoder = decoder_for(own, prompt, 3, temperature=5.0, max_new=70)
        for slot in range(3):
            decoder.ask(slot, Request(prompt[2], lambda w: w))
        said.append([sample.tokens for _, sample in sorted(finish(decoder).items())])
        times.append(len(widths))
        widths.clear()
        longest = decoder.cache.past + len(prompt[2]) + max(map(len, said[-1]))
        assert longest <= decoder.cache.width
    assert said[0] == said[1] and max(map(len, said[0])) > 64
    assert times[0] > times[1] == 1
    decoder.ask(0, Request(prompt[2] * 40, lambda w: w))  # longer than there was room for
    place = decoder.cache.width
    finish(decoder)
    assert widths == {place} and place >= decoder.cache.past + 40 * len(prompt[2]) + 70


def test_the_end_closes_an_answer(limited, prompt):
    decoder = decoder_for(limited, prompt, 64, temperature=3.0, max_new=30)
    for slot in range(64):
        decoder.ask(slot, Request(prompt[2], lambda w: w + "x"))
    for sample in finish(decoder).values():
        assert limited.end not in sample.tokens[:-1]


def test_a_changed_picture_replaces_the_prefix(vlm, prompt):
    env = tiny_models.new_env("ezpoints")
    other = (env.reset(seed=5)[0], *prompt[1:])
    decoder = decoder_for(vlm, prompt, 1, temperature=1.0, max_new=3)
    decoder.ask(0, Request(prompt[2], lambda w: w))
    first = finish(decoder)[0]
    with torch.no_grad():
        features, grid = vlm.see([other[0]])
        prefix = vlm.prefix(decoder.weights, features, prompt[1], grid)
    decoder.show(0, prefix, 0)
    decoder.ask(0, Request(prompt[2], lambda w: w))
    second = finish(decoder)[0]
    assert (first.hidden - second.hidden).abs().max() > 1e-3
    for sample, place in ((first, prompt), (second, other)):
        want = exact(vlm, place, sample.tokens, 1.0)
        assert (want - torch.tensor(sample.logprobs)).abs().max() < 1e-4


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_of_zero_is_refused(vlm, prompt, temperature):
    with pytest.raises(ValueError, match="temperature must be more than 0"):
        decoder_for(vlm, prompt, 1, temperature=temperature)
