"""Page 02: every window with its targets, and batches of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tinygpt_helpers import NextTokenDataset, sample_batch


def test_a_window_and_the_tokens_that_come_next():
    ds = NextTokenDataset([10, 11, 12, 13, 14], 3)
    assert len(ds) == 2
    for i, (x, y) in enumerate([ds[0], ds[1]]):
        assert x.tolist() == [10 + i, 11 + i, 12 + i]
        assert y.tolist() == [11 + i, 12 + i, 13 + i]
        assert x.shape == y.shape == (3,) and x.dtype == y.dtype == torch.int64


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 30), st.data())
def test_y_is_x_one_token_later(block_size, extra, data):
    ids = data.draw(st.lists(st.integers(0, 99), min_size=extra + block_size,
                             max_size=extra + block_size))
    ds = NextTokenDataset(ids, block_size)
    assert len(ds) == extra
    for i in range(extra):
        x, y = ds[i]
        assert x.tolist() == ids[i : i + block_size]
        assert y.tolist() == ids[i + 1 : i + block_size + 1]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor, lambda x: torch.tensor(x).int()])
def test_ids_may_be_a_list_or_a_tensor(kind):
    x, y = NextTokenDataset(kind([1, 2, 3]), 2)[0]
    assert x.tolist() == [1, 2] and y.tolist() == [2, 3]
    assert x.dtype == y.dtype == torch.int64


@pytest.mark.parametrize("n", [0, 1, 4])
def test_too_few_tokens_are_refused_with_the_numbers(n):
    with pytest.raises(ValueError, match=f"{n} tokens.*block_size 4 needs 5"):
        NextTokenDataset(range(n), 4)
    with pytest.raises(ValueError, match=f"{n} tokens.*block_size 4 needs 5"):
        sample_batch(torch.arange(n), 4, 2)
    assert len(NextTokenDataset(range(5), 4)) == 1  # just enough


@pytest.mark.parametrize("block_size", [0, -3])
def test_a_window_of_no_token_is_refused(block_size):
    with pytest.raises(ValueError, match=f"block_size is {block_size}"):
        NextTokenDataset(range(5), block_size)


@pytest.mark.parametrize("i", [-1, 2, 100])
def test_a_window_outside_is_refused(i):
    with pytest.raises(IndexError, match=rf"{i} .*0\.\.1"):
        NextTokenDataset(range(5), 3)[i]


def test_a_loader_gives_every_window_once():
    ds = NextTokenDataset(torch.arange(50), 8)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(ds, batch_size=5, shuffle=True, generator=generator)
    batches = list(loader)
    assert [len(x) for x, _ in batches] == [5] * 8 + [2]
    assert all(x.shape == y.shape == (len(x), 8) and (y == x + 1).all() for x, y in batches)
    starts = [x[0].item() for batch, _ in batches for x in batch]
    assert sorted(starts) == list(range(42)) and starts != list(range(42))
    assert len(DataLoader(ds, batch_size=5, drop_last=True)) == 8


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 10), st.integers(1, 20), st.integers(1, 9), st.integers(0, 2**31))
def test_sampled_pairs_are_pairs_of_the_dataset(block_size, extra, batch_size, seed):
    ids = torch.randint(5, (block_size + extra,), generator=torch.Generator().manual_seed(seed))
    pairs = {(tuple(x.tolist()), tuple(y.tolist())) for x, y in
             map(NextTokenDataset(ids, block_size).__getitem__, range(extra))}
    x, y = sample_batch(ids, block_size, batch_size, torch.Generator().manual_seed(seed))
    assert x.shape == y.shape == (batch_size, block_size)
    assert x.dtype == y.dtype == torch.int64
    for row in zip(x.tolist(), y.tolist()):
        assert tuple(map(tuple, row)) in pairs


def test_every_window_is_sampled_about_equally_often():
    ids = torch.arange(13)  # windows begin at 0..8
    x, y = sample_batch(ids, 4, 9000, torch.Generator().manual_seed(1))
    assert (y == x + 1).all()
    counts = torch.bincount(x[:, 0])
    assert len(counts) == 9 and y.max() == 12  # the first, the last and none beyond
    assert (counts - 1000).abs().max() < 150  # 5 standard deviations


def test_a_seed_gives_the_same_batches_and_leaves_the_global_state():
    ids = torch.randint(65, (500,))
    before = torch.get_rng_state()
    one, two = (torch.Generator().manual_seed(7) for _ in range(2))
    batches = [sample_batch(ids, 16, 4, one) for _ in range(3)]
    for x, y in batches:
        again = sample_batch(ids, 16, 4, two)
        assert torch.equal(x, again[0]) and torch.equal(y, again[1])
    assert not torch.equal(batches[0][0], batches[1][0])
    assert torch.equal(torch.get_rng_state(), before)
    sample_batch(ids, 16, 4)
    assert not torch.equal(torch.get_rng_state(), before)
