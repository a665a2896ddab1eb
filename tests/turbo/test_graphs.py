"""turbo/graphs.py: recorded decode steps replay what the step itself would compute.

There is no GPU here, so steps are recorded by `make_fx`: the operations of one call, on the tensors
of that call, with nothing of Python in between. Much of what a CUDA graph needs, it needs too: a
step that asks for a value is refused, as is one that makes a tensor of Python's numbers (a copy
from the host), and one that reads a tensor that has moved replays old contents.
"""

import pytest
import tiny_models
import torch
from family_models import FAMILIES, model
from test_decode import decoder_for, finish
from torch.fx.experimental.proxy_tensor import make_fx

from turbo import modules, train
from turbo.attend import grouped_attention
from turbo.decode import Request
from turbo.graphs import Graphs
from turbo.kv_cache import RECORDED, KVCache


class Recorder:
    """Records steps without a GPU."""

    def __init__(self):
        self.sizes = []  # rows and tokens of what was recorded
        self.replays = 0

    def __call__(self, step, inputs):
        self.sizes.append(tuple(inputs[0].shape))
        recorded = make_fx(step)(*inputs)
        assert not [n for n in recorded.graph.nodes if "lift_fresh" in str(n.target)]

        def replay():
            self.replays += 1
            return recorded(*inputs)

        return replay


@pytest.mark.parametrize("groups", [1, 2, 7])
def test_grouped_heads_attend_as_if_keys_were_repeated(groups):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, shared, length, keys, hd = 3, 2, 5, 11, 4
    query, key = normal(rows, groups * shared, length, hd), normal(rows, shared, keys, hd)
    value, mask = normal(rows, shared, keys, hd), normal(rows, 1, length, keys)
    repeated = [x.repeat_interleave(groups, 1) for x in (key, value)]
    scores = 0.3 * query @ repeated[0].transpose(2, 3) + mask
    wanted = scores.softmax(-1) @ repeated[1]
    got = grouped_attention(query, key, value, mask, 0.3)
    torch.testing.assert_close(got, wanted)
    got = grouped_attention(query, key, value, mask[:1], 0.3)
    assert (got[1:] - wanted[1:]).abs().max() > 1e-3  # every row has its own mask


def test_a_step_is_recorded_the_second_time_and_replayed_on_new_inputs():
    state, second, calls = torch.tensor([10.0, 20.0]), torch.tensor([1]), []

    def step(x):
        calls.append(1)
        state.index_add_(0, second, x)
        return state * 2

    recorder = Recorder()
    graphs = Graphs(lambda: recorder)
    given = torch.tensor([1.0])
    assert graphs.run("a", step, (given,)).tolist() == [20.0, 42.0]
    assert not recorder.sizes
    graphs.run("a", step, (given,))
    for add, want in ((5.0, [20.0, 54.0]), (-2.0, [20.0, 50.0])):
        state[1] = 22.0 if add > 0 else 27.0
        assert graphs.run("a", step, (torch.tensor([add]),)).tolist() == want
    assert len(calls) == 2 and given.item() == 1.0 and len(recorder.sizes) == 1
    for _ in range(2):
        graphs.run("b", step, (given,))
    assert len(recorder.sizes) == 2
    graphs.clear()
    for _ in range(3):
        graphs.run("a", step, (given,))
    assert len(recorder.sizes) == 3


@pytest.mark.parametrize(
    "step,why",
    [
        (lambda x: x * 2 if x.sum().item() > 0 else x, r"data-dependent|item"),
        (lambda x: x + torch.tensor([1.0, 2.0]), "lift_fresh"),
    ],
)
def test_a_step_that_cannot_be_recorded_is_refused(step, why):
    with pytest.raises((RuntimeError, AssertionError), match=why):
        Recorder()(step, (torch.ones(2),))


# An episode of blackjack ends with a random model's first answer, which cannot be read.
PLAYED = dict(game="blackjack", steps=24, envs=12, max_new_tokens=20)


@pytest.fixture(params=FAMILIES)
def vlm(request):
    return model(request.param)


def rollouts(vlm, lora, **options):
    """The same one twice: every step by itself, and recorded ones; and what was recorded."""
    with torch.no_grad():
        plain = tiny_models.play(vlm, lora, **options)
        recorder = Recorder()
        vlm.text.record = lambda: recorder
        return plain, tiny_models.play(vlm, lora, **options), recorder


def test_recorded_decoding_samples_the_same_answers(vlm):
    lora = tiny_models.noisy_lora(vlm)
    plain, recorded, recorder = rollouts(vlm, lora, **PLAYED)
    assert [s.tokens for s in recorded.steps] == [s.tokens for s in plain.steps]
    for one, two in zip(plain.steps, recorded.steps, strict=True):
        torch.testing.assert_close(one.logprobs, two.logprobs, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.hidden, two.hidden, rtol=0, atol=1e-3)
    assert recorder.replays > len(recorder.sizes) > 0
    assert {rows for rows, _ in recorder.sizes} <= {8, 16}
    assert {length for _, length in recorder.sizes} <= {2, 4, 8}


@pytest.mark.parametrize("record", [False, True])
def test_the_cache_is_read_where_it_is(vlm, record, monkeypatch):
    """As on a GPU: most slots run together, whole, and no key is copied for them."""
    lora, options = tiny_models.noisy_lora(vlm), PLAYED
    with torch.no_grad():
        plain = tiny_models.play(vlm, lora, **options)
    vlm.text.in_place, layouts, grouped = True, [], []
    recorder, layout, attend = Recorder(), KVCache.layout, modules.grouped_attention
    if record:
        vlm.text.record = lambda: recorder

    def note(self, rows, length):
        layouts.append((len(rows), layout(self, rows, length)))
        return layouts[-1][1]

    monkeypatch.setattr(KVCache, "layout", note)
    monkeypatch.setattr(modules, "grouped_attention", lambda *a: grouped.append(1) or attend(*a))
    with torch.no_grad():
        placed = tiny_models.play(vlm, lora, **options)
    assert [s.tokens for s in placed.steps] == [s.tokens for s in plain.steps]
    for one, two in zip(plain.steps, placed.steps, strict=True):
        torch.testing.assert_close(one.logprobs, two.logprobs, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.hidden, two.hidden, rtol=0, atol=1e-3)
    whole = [(rows, found) for rows, found in layouts if found.whole]
    assert len(whole) > len(layouts) / 4
    assert all(found.count == 12 and rows >= 9 for rows, found in whole)
    c = vlm.text.decoder.config
    assert bool(grouped) == (c.num_key_value_heads < c.num_attention_heads)
    assert recorder.replays > 0 or not record


def test_a_base_in_nf4_is_recorded_unmerged():
    vlm = model("qwen2_5_vl", quantize="nf4")
    lora = tiny_models.noisy_lora(vlm)
    plain, recorded, recorder = rollouts(vlm, lora, steps=4, envs=4, max_new_tokens=12)
    assert [s.tokens for s in recorded.steps] == [s.tokens for s in plain.steps]
    assert recorder.replays > 0


def letters(vlm, prompt, record=None):
    """A decoder of few letters that has been asked."""
    vlm.text.record = None if record is None else lambda: record
    decoder = decoder_for(vlm, prompt, 3, temperature=1.0, max_new=20)
    for slot in range(3):
        decoder.ask(slot, Request(prompt[2], lambda w: w))
    return decoder


def answers(decoder, prompt):
    """To a prompt, to one that needs a larger cache, and to one as long as the first."""
    said = [finish(decoder)]
    for suffix in (prompt[2] * (1 + RECORDED // len(prompt[2])), prompt[2][::-1]):
        for slot in range(3):
            decoder.ask(slot, Request(suffix, lambda w: w))
        said.append(finish(decoder))
    return [sample for one in said for _, sample in sorted(one.items())]


@pytest.fixture
def asked():
    vlm = model("qwen2_5_vl")
    env = tiny_models.new_env("ezpoints")
    picture, _ = env.reset(seed=0)
    text = env.prompt("short")
    suffix = vlm.encode(tiny_models.suffix_text(text.state))
    say = [vlm.encode(c)[0] for c in "xyzw"]  # never the end
    return tiny_models.with_banned(vlm, say), (picture, text.fixed, suffix)


def test_slots_that_nobody_asked_run_too_and_stay_as_they_are(asked):
    vlm, prompt = asked
    said = []
    for vlm.text.in_place in (False, True):
        decoder = decoder_for(vlm, prompt, 4, temperature=1.0, max_new=12)
        kept = decoder.cache.keys[0][1].clone()
        for slot in (0, 2, 3):
            decoder.ask(slot, Request(prompt[2], lambda w: w))
        said.append(finish(decoder))
        after = decoder.cache.keys[0][1]
        assert torch.equal(after[:, : kept.shape[1]], kept) and not after[:, kept.shape[1] :].any()
    for slot, plain in said[0].items():
        assert said[1][slot].tokens == plain.tokens
        assert said[1][slot].logprobs == pytest.approx(plain.logprobs, abs=1e-4)


def test_a_cache_that_moves_is_recorded_anew(asked):
    plain = answers(letters(*asked), asked[1])
    recorder = Recorder()
    decoder = letters(*asked, recorder)
    first = decoder.cache.width
    said = answers(decoder, asked[1])
    assert decoder.cache.width > first and first % RECORDED == 0
    assert recorder.replays > len(recorder.sizes) > len(set(recorder.sizes))
    for one, two in zip(plain, said, strict=True):
        assert two.tokens == one.tokens
        assert two.logprobs == pytest.approx(one.logprobs, abs=1e-4)
    # The test would notice a graph that is kept: it writes to where the cache was.
    decoder = letters(*asked, Recorder())
    decoder.cache.graphs.clear = lambda: None
    stale = answers(decoder, asked[1])
    pairs = zip(plain, stale, strict=True)
    assert any(a.logprobs != pytest.approx(b.logprobs, abs=1e-3) for a, b in pairs)


def test_where_memory_runs_out_the_graphs_are_given_up(asked, monkeypatch):
    plain = finish(letters(*asked))
    recorder = Recorder()
    decoder = letters(*asked, recorder)
    forward, failed = decoder._forward, []

    def scarce(rows):
        if recorder.replays > 4 and not failed:
            failed.append(len(recorder.sizes))
            raise torch.OutOfMemoryError
        return forward(rows)

    monkeypatch.setattr(decoder, "_forward", scarce)
    done = finish(decoder)
    assert len(recorder.sizes) > failed[0] > 0  # the same shapes anew
    assert len(set(recorder.sizes)) < len(recorder.sizes)
    assert [done[i].tokens for i in range(3)] == [plain[i].tokens for i in range(3)]


def test_weights_that_are_gone_are_refused_before_a_replay(asked):
    vlm, prompt = asked
    lora = tiny_models.noisy_lora(vlm)
    decoder = letters(vlm, prompt, Recorder())
    with torch.no_grad():
        decoder.weights = vlm.merged(vlm.weights(lora))
        for _ in range(3):
            decoder.advance()
        vlm.merged(vlm.weights(lora))  # something else fills the scratch
        with pytest.raises(RuntimeError, match="merge them again"):
            decoder.advance()


def test_on_a_cpu_the_flag_is_refused(tmp_path, capsys):
    out = ["--out", str(tmp_path / "run"), "--device", "cpu"]
    assert train.main(["numberline", "--decode-graphs", *out]) == 2
    assert "--no-decode-graphs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
