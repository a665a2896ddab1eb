"""EMA: the list and the LoRA form against fp64, stochastic rounding, repeatability, errors."""

import pytest
import torch

from tests.kernels.devices import device_of
from turbo.kernels import ema

SHAPES = [(), (1,), (127,), (507, 3), (3, 4, 5), (9_001,)]
PAIRS = [  # dtype of the average, of what is averaged
    (torch.float32, torch.float32),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
IMPLS = ["torch", "reference", "triton"]


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def in_fp64(average, new, alpha):
    return average.double() + alpha * (new.double() - average.double())


def units(dtype):
    """Half a unit in the last place, relative, and a little for the sum itself."""
    return 0.51 * torch.finfo(dtype).eps + 2**-22


@pytest.mark.parametrize("alpha", [0.001, 0.3, 1.0])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_list_equals_fp64_rounded_once(impl, pair, alpha):
    device = device_of(impl)
    average = [normal(*s, dtype=pair[0], seed=i).to(device) for i, s in enumerate(SHAPES)]
    new = [normal(*s, dtype=pair[1], seed=50 + i).to(device) for i, s in enumerate(SHAPES)]
    expected = [in_fp64(a, n, alpha) for a, n in zip(average, new, strict=True)]
    places = [tensor.data_ptr() for tensor in average]
    ema.ema_update_(average, new, alpha, impl=impl)
    assert [tensor.data_ptr() for tensor in average] == places
    for got, wanted in zip(average, expected, strict=True):
        # where both cancel, the error is one of the inputs' size
        torch.testing.assert_close(got.double(), wanted, rtol=units(pair[0]), atol=2**-21)


@pytest.mark.parametrize("rounding", ema.ROUNDINGS)
@pytest.mark.parametrize("dtypes", PAIRS[:1] + PAIRS[2:4], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 507, 3), (127, 66, 4), (130, 257, 40)])
def test_the_lora_form_equals_fp64(shape, impl, dtypes, rounding):
    rows, columns, rank = shape
    device = device_of(impl)
    average = normal(rows, columns, dtype=dtypes[0]).to(device)
    base, a, b = (
        normal(*size, dtype=dtypes[1], seed=7 + i).to(device)
        for i, size in enumerate([(rows, columns), (rank, columns), (rows, rank)])
    )
    wanted = in_fp64(average, base.double() + 0.5 * (b.double() @ a.double()), 0.25)
    ema.ema_update_lora_(average, base, a, b, 0.5, 0.25, rounding=rounding, impl=impl)
    unit = units(dtypes[0]) * (2 if rounding == "stochastic" else 1)
    torch.testing.assert_close(average.double(), wanted, rtol=unit, atol=2e-5)


def test_random_bits_are_even_and_independent():
    """Of all entries of a Philox number, neighbours, spans and seeds: chi-square and correlation.

    Bounds are some five standard deviations, and the seeds are fixed.
    """
    pytest.importorskip("triton")
    from tests.kernels.probe_kernels import note_bits

    block, blocks, spans = 1024, 8, 16
    drawn = []
    for seed in (5, 5 + spans):  # spans of one call are seeds, too: these do not meet
        bits = torch.zeros(spans, blocks * block, dtype=torch.int32, device=device_of("triton"))
        note_bits[(spans,)](bits, seed, block, blocks)
        drawn.append(bits.cpu().double())
    bits = drawn[0]
    assert bits.min() >= 0 and bits.max() < 1 << 16 and not torch.equal(*drawn)
    for shift in (0, 8):  # the upper and the lower half of the bits
        half = (bits.long() >> (8 - shift)) & 0xFF
        counts = half.flatten().bincount(minlength=256).double()
        expected = half.numel() / 256
        assert (counts - expected).square().sum() / expected < 255 + 5 * (2 * 255) ** 0.5
    even = (bits - 32767.5) / (65536 / 12**0.5)  # mean 0, variance 1
    for lane in even.view(-1, 8).T:  # of 128 bits each entry has its own 16
        assert lane.mean().abs() < 5 / lane.numel() ** 0.5
    pairs = [(even[:, step:], even[:, :-step]) for step in (1, 2, 4, 8, block)]
    pairs += [(even[1:], even[:-1]), (even, (drawn[1] - 32767.5) / (65536 / 12**0.5))]
    for one, two in pairs:
        assert (one * two).mean().abs() < 5 / one.numel() ** 0.5


@pytest.mark.parametrize("impl", IMPLS)
def test_stochastic_rounding_follows_an_fp64_average_where_nearest_stalls(impl):
    """1,000 steps at alpha 0.001 from 1 towards values about 2: the way of a slow teacher."""
    steps, alpha, size = (1_000 if impl != "triton" else 100), 0.001, 4_000
    exact = torch.ones(size, dtype=torch.float64, device=device_of(impl))
    stochastic, nearest = exact.bfloat16(), exact.bfloat16()
    bits = torch.Generator().manual_seed(3)
    for step in range(steps):
        new = 2 + 0.1 * normal(size, seed=step).to(exact.device)
        exact = in_fp64(exact, new, alpha)
        options = dict(alpha=alpha, impl=impl)
        ema.ema_update_([stochastic], [new], rounding="stochastic", generator=bits, **options)
        ema.ema_update_([nearest], [new], **options)
    assert (nearest == 1).all()  # a step of 0.001 is under half a unit, 0.0039
    drift = (stochastic.double() - exact).mean() / (exact.mean() - 1)
    assert abs(drift) < 0.03
    spread = (stochastic.double() - exact).std()
    assert spread < 0.0079 * (steps * alpha) ** 0.5 / alpha**0.5  # a random walk of units


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_probability_of_going_up_is_the_remainder(sign):
    low, unit = 1.0, 2.0**-7
    values = torch.full((200_000,), sign * (low + 0.3 * unit))
    rounded = ema.round_stochastically(values, torch.Generator().manual_seed(0)).double() * sign
    assert set(rounded.unique().tolist()) == {low, low + unit}
    share = (rounded > low).double().mean().item()
    assert abs(share - 0.3) < 5 * (0.3 * 0.7 / len(values)) ** 0.5


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_what_bf16_can_hold_stays_and_special_values_too(impl):
    held = torch.tensor([0.0, -0.0, 1.5, -3e38, 1e-30, float("inf"), float("-inf")]).bfloat16()
    held = held.to(device_of(impl))
    kept = held.clone()
    ema.ema_update_([kept], [held.clone()], 1.0, rounding="stochastic", impl=impl)
    finite = held.isfinite()
    assert kept[finite].eq(held[finite]).all()
    broken = torch.tensor([float("nan"), float("inf"), 1.0]).to(held)
    ema.ema_update_([broken], [torch.ones_like(broken)], 0.5, rounding="stochastic", impl=impl)
    assert broken.isnan().tolist()[0] and broken[1] == float("inf") and broken[2] == 1


def test_no_nan_is_rounded_into_a_number():
    """Added to a NaN whose bits are all ones, random bits would carry over into a zero."""
    ones = torch.full((3,), -1, dtype=torch.int32).view(torch.float32)  # NaN, NaN, NaN
    values = torch.cat([ones, torch.tensor([float("inf"), 3e38, 3e38, -0.0, 1.5])])
    rounded = ema.round_stochastically(values, torch.Generator().manual_seed(0))
    assert rounded.isnan().tolist() == [True] * 3 + [False] * 5
    assert rounded[3] == float("inf") and rounded[6:].tolist() == [0.0, 1.5]
    assert rounded[4:6].isfinite().all()  # though their sum is not


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_same_seed_gives_the_same_bits_and_another_does_not(impl):
    def run(seed):
        average = [normal(n).bfloat16().to(device_of(impl)) for n in (9_001, 33)]
        new = [normal(n, seed=n).to(device_of(impl)) for n in (9_001, 33)]
        bits = torch.Generator().manual_seed(seed)
        ema.ema_update_(average, new, 0.01, rounding="stochastic", generator=bits, impl=impl)
        return torch.cat(average)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))


def test_a_strided_average_is_updated_in_place():
    whole = torch.zeros(6, 4)
    ema.ema_update_([whole[:, ::2]], [torch.ones(6, 2)], 0.5, impl="torch")
    assert whole[:, ::2].eq(0.5).all() and whole[:, 1::2].eq(0).all()
    ema.ema_update_([whole.T], [torch.ones(4, 6, dtype=torch.float64)], 1.0)
    assert whole.eq(1).all()


def test_a_list_of_many_dtypes_is_each_tensor_alone():
    """Tensors of one dtype go through one call, the others do not; the order does not matter."""
    pairs = [
        (normal(5 + i, dtype=a), normal(5 + i, dtype=n, seed=9)) for i, (a, n) in enumerate(PAIRS)
    ]
    together, alone = ([a.clone() for a, _ in pairs] for _ in range(2))
    ema.ema_update_(together, [n for _, n in pairs], 0.3, impl="torch")
    for a, (_, n) in zip(alone, pairs, strict=True):
        ema.ema_update_([a], [n], 0.3, impl="torch")
    assert all(torch.equal(x, y) for x, y in zip(together, alone, strict=True))
    assert not any(torch.equal(x, a) for x, (a, _) in zip(together, pairs, strict=True))


def test_an_empty_list_is_nothing_to_do():
    ema.ema_update_([], [], 0.5)
    none = torch.zeros(0, device=device_of("triton"))
    ema.ema_update_([none], [none], 0.5, impl="triton")


ONE = torch.zeros(2, 3)
BAD = {
    r"alpha: expected a number in \(0, 1\], got 0": dict(alpha=0),
    r"alpha: .*got nan": dict(alpha=float("nan")),
    "rounding: expected one of .*got 'up'": dict(rounding="up"),
    "new: expected 1 tensors like average, got 0": dict(new=[]),
    r"new\[0\] shape, device: expected .*\(2, 3\)": dict(new=[torch.zeros(3, 2)]),
    r"new\[0\]: expected a floating point tensor": dict(new=[ONE.int()]),
    r"new\[1\]: expected a floating point tensor": dict(average=[ONE, ONE], new=[ONE, ONE.int()]),
    r"average\[0\]: expected bfloat16": dict(average=[ONE.half()], rounding="stochastic"),
    "impl: expected one of": dict(impl="cuda"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(message):
    good = dict(average=[ONE.clone()], new=[ONE], alpha=0.5)
    with pytest.raises(ValueError, match=message):
        ema.ema_update_(**good | BAD[message])


def test_bad_factors_are_named():
    a, b = torch.zeros(2, 3), torch.zeros(2, 2)
    for broken, message in (
        (dict(lora_a=a[:1]), r"lora_a\[0\], lora_b\[0\]: expected"),
        (dict(lora_b=b.fill_diagonal_(torch.nan)), r"lora_b\[0\]: expected finite"),
    ):
        arguments = dict(average=ONE.clone(), base=ONE, lora_a=a, lora_b=b.clone(), scale=1.0)
        with pytest.raises(ValueError, match=message):
            ema.ema_update_lora_(**arguments | broken, alpha=0.5)


def test_what_is_no_tensor_is_named():
    with pytest.raises(ValueError, match=r"average\[0\]: expected a floating point tensor, got"):
        ema.ema_update_([1.0], [torch.ones(1)], 0.5)
