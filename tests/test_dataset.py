"""Page 02: every window with its targets, and batches of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from tinygpt_helpers import NextTokenDataset, sample_batch


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 10), st.integers(1, 20), st.integers(1, 9), st.integers(0, 2**31),
       st.sampled_from([list, tuple, torch.tensor, lambda ids: torch.tensor(ids).int()]))
def test_y_is_x_one_token_later(block_size, n_windows, batch_size, seed, kind):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, (block_size + n_windows,), generator=generator).tolist()
    dataset = NextTokenDataset(kind(ids), block_size)
    pairs = [(ids[i : i + block_size], ids[i + 1 : i + block_size + 1]) for i in range(n_windows)]
    assert len(dataset) == n_windows
    assert [(x.tolist(), y.tolist()) for x, y in dataset] == pairs
    sampled = sample_batch(torch.tensor(ids), block_size, batch_size, generator)
    for x, y in [*dataset, sampled]:
        assert x.shape == y.shape and x.dtype == y.dtype == torch.int64
    assert sampled[0].shape == (batch_size, block_size)
    assert all(pair in pairs for pair in zip(sampled[0].tolist(), sampled[1].tolist()))


@pytest.mark.parametrize("n", [0, 1, 4])
def test_too_few_tokens_are_refused_with_the_numbers(n):
    for cut in (lambda: NextTokenDataset(range(n), 4), lambda: sample_batch(torch.arange(n), 4, 2),
                lambda: sample_batch(torch.arange(n), 4, 2, starts=torch.tensor([0]))):
        words = f"{n} tokens( allow 1 to {n - 1}|, [01] starts: no window of 4)$"
        with pytest.raises(ValueError, match=words):
            cut()
    with pytest.raises(ValueError, match="50 tokens, 0 starts: no window of 4"):
        sample_batch(torch.arange(50), 4, 2, starts=torch.arange(0))


def test_a_window_outside_or_of_no_token_is_refused():
    for i in (-1, 2, 100):
        with pytest.raises(IndexError, match=rf"{i} .*0\.\.1"):
            NextTokenDataset(range(5), 3)[i]
    for block_size in (0, -3):
        with pytest.raises(ValueError, match=f"block_size {block_size}: 5 tokens"):
            NextTokenDataset(range(5), block_size)


@pytest.mark.parametrize("starts", [None, torch.tensor([0, 3, 8])])
def test_every_place_is_sampled_about_equally_often(starts):
    x, y = sample_batch(torch.arange(13), 4, 9000, torch.Generator().manual_seed(1), starts)
    places = torch.arange(9) if starts is None else starts  # the last id is a target only
    assert (y == x + 1).all()
    found, counts = x[:, 0].unique(return_counts=True)
    assert torch.equal(found, places) and y.max() == 12
    expected = 9000 / len(places)
    assert (counts - expected).abs().max() < 5 * expected**0.5  # 5 standard deviations


def test_a_loader_gives_every_window_once():
    batches = list(DataLoader(NextTokenDataset(torch.arange(50), 8), batch_size=5, shuffle=True))
    assert [x.shape for x, _ in batches] == [y.shape for _, y in batches] == [(5, 8)] * 8 + [(2, 8)]
    assert sorted(x[0].item() for batch, _ in batches for x in batch) == list(range(42))


def test_a_seed_gives_the_same_batches_and_leaves_the_global_state():
    ids, before = torch.arange(500), torch.get_rng_state()
    one, two = (torch.Generator().manual_seed(7) for _ in range(2))
    batches = [torch.stack(sample_batch(ids, 16, 4, one)) for _ in range(3)]
    assert all(torch.equal(batch, torch.stack(sample_batch(ids, 16, 4, two))) for batch in batches)
    assert not torch.equal(batches[0], batches[1])
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):  # everything that does not name its device is made elsewhere
        x, y = sample_batch(ids, 16, 4)  # without a seed
    assert x.device == y.device == ids.device and (y == x + 1).all()
    assert not torch.equal(torch.get_rng_state(), before)
