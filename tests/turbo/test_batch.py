"""turbo/batch.py: rows are padded without losing or moving a token."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from turbo.batch import MICRO_ROWS, evenly, micro_batches, pad_rows, pad_to, round_up

PAD = 0
tokens = st.lists(st.integers(1, 9), min_size=1, max_size=40)
row_lists = st.lists(st.tuples(tokens, tokens), min_size=1, max_size=20)


@given(row_lists)
def test_every_answer_token_is_predicted_where_it_should_be(rows):
    suffixes, answers = [s for s, _ in rows], [a for _, a in rows]
    batch = pad_rows(suffixes, answers, PAD)
    assert batch.rows == len(rows) <= batch.padded_rows == batch.ids.shape[0]
    assert batch.targets.tolist() == [t for a in answers for t in a]
    assert batch.row.tolist() == [i for i, a in enumerate(answers) for _ in a]
    width = batch.ids.shape[1]
    flat, n = batch.ids.flatten().tolist(), 0
    for i, (suffix, answer) in enumerate(rows):
        whole = suffix + answer
        assert batch.ids[i].tolist() == whole[:-1] + [PAD] * (width - len(whole) + 1)
        assert batch.last_prompt[i] == i * width + len(suffix) - 1
        for j in range(len(answer)):
            place = batch.select[n].item()
            # the token at the selected place is the one before the target, in the same row
            assert place // width == i and place % width == len(suffix) - 1 + j
            assert flat[place] == whole[len(suffix) + j - 1]
            n += 1
    assert len(batch.select) >= n
    assert (batch.ids[len(rows) :] == PAD).all()


@given(row_lists)
def test_little_is_padded(rows):
    """Rows and lengths are rounded to a multiple of 8, answer tokens to one of 64."""
    batch = pad_rows([s for s, _ in rows], [a for _, a in rows], PAD)
    longest = max(len(s) + len(a) - 1 for s, a in rows)
    assert batch.padded_rows < len(rows) + 8 and batch.ids.shape[1] < longest + 8
    assert len(batch.select) < max(len(batch.targets) + 64, 1.125 * len(batch.targets) + 1)


@given(st.integers(1, 100_000), st.sampled_from([2, 8, 16, 64]))
def test_round_up(n, step):
    size = round_up(n, step)
    assert n <= size < max(n + step, 1.125 * n + 1)
    assert size % step == 0 and round_up(size, step) == size
    assert round_up(n + 1, step) >= size


def test_few_sizes_are_left():
    assert len({round_up(n) for n in range(1, 2049)}) <= 16 + 8 * 4


def test_pad_to_repeats_the_first_entry():
    x = torch.tensor([[1, 2], [3, 4]])
    assert pad_to(x, 4).tolist() == [[1, 2], [3, 4], [1, 2], [1, 2]]
    assert pad_to(x, 2) is x


@given(st.lists(st.integers(1, 200), max_size=100), st.integers(1, 64))
def test_micro_batches_hold_every_row_once(lengths, size):
    batches = micro_batches(lengths, size)
    assert sorted(i for b in batches for i in b) == list(range(len(lengths)))
    assert all(0 < len(b) <= size for b in batches)
    assert all(len(b) == size for b in batches[:-1])
    for one, two in itertools.pairwise(batches):  # from short to long
        assert max(lengths[i] for i in one) <= min(lengths[i] for i in two)
    assert len(micro_batches([5] * 100)[0]) == MICRO_ROWS


def test_numbers_at_even_distances():
    assert evenly(10, 5) == [0, 2, 4, 6, 8]
    assert evenly(3, 8) == [0, 1, 2] == evenly(3, 0)
    assert evenly(0, 4) == []
