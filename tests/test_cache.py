"""Page 07: the KV cache as a memory of the model."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinygpt_helpers import KVCache, TinyGPT, generate


def random_model(max_len=8, n_layers=2, n_heads=4, seed=0, dtype=torch.float64):
    """A model whose weights are all so large that every part of it matters."""
    torch.manual_seed(seed)
    model = TinyGPT(9, 16, n_heads, n_layers, max_len).eval().to(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.35 + (weight.ndim == 1))
    return model.requires_grad_(False)


def random_ids(B, T, seed=0):
    return torch.randint(9, (B, T), generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 2),
       st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_chunks_of_any_sizes_give_the_numbers_of_the_whole_text(B, chunks, spare, n_heads, seed):
    T = sum(chunks)
    model = random_model(T + spare, 1 + seed % 3, n_heads, seed)
    cache = KVCache(model, B)
    for k, v in zip(cache.k, cache.v):
        k.fill_(1e6), v.fill_(-1e6)  # nobody may see it; not nan: 0 * nan is nan
    for text in (seed, seed + 1):
        idx, parts = random_ids(B, T, text), []
        for chunk in idx.split(chunks, dim=1):
            parts.append(model(chunk, cache))
            assert cache.length == sum(part.size(1) for part in parts)
        torch.testing.assert_close(torch.cat(parts, 1), model(idx))  # float64: to 1e-7
        cache.length.zero_()  # used anew: it does not matter what it has held


def test_what_does_not_fit_is_refused_before_anything_is_written():
    model = random_model()
    cache = KVCache(model, 1)
    model(random_ids(1, 5), cache)
    before = torch.stack(cache.k + cache.v)
    with pytest.raises(ValueError, match=r"9 tokens pass max_len = 8"):
        model(random_ids(1, 4), cache)
    for idx in (torch.zeros(1, 0).long(), torch.tensor([[9]]), torch.zeros(1, 1)):
        with pytest.raises(ValueError, match="idx: integers|ids 9 to 9 do not fit"):
            model(idx, cache)
    assert cache.length == 5 and torch.equal(torch.stack(cache.k + cache.v), before)
    model(random_ids(1, 3), cache)  # just fits
    with pytest.raises(ValueError, match="9 tokens pass max_len = 8"):
        model(random_ids(1, 1), cache)


@pytest.mark.parametrize(("dtype", "tolerance"), [
    (torch.float32, 1e-5), (torch.float64, 1e-12), (torch.bfloat16, 0.2)])
@pytest.mark.parametrize(("n_layers", "B", "max_len", "n_heads"), [(2, 3, 8, 4), (1, 1, 5, 2)])
def test_type_and_shape(n_layers, B, max_len, n_heads, dtype, tolerance):
    model = random_model(max_len, n_layers, n_heads, dtype=dtype)
    cache = KVCache(model, B)
    assert cache.length.shape == (1,) and cache.length == 0
    logits = model(random_ids(B, 3), cache)
    for kept in (torch.stack(cache.k), torch.stack(cache.v)):
        assert kept.shape == (n_layers, B, n_heads, max_len, 16 // n_heads)
        assert logits.dtype == kept.dtype == dtype
    torch.testing.assert_close(logits, model(random_ids(B, 3)), atol=tolerance, rtol=tolerance)


def test_each_token_is_read_once():
    model, reads = random_model(), []
    model.norm.register_forward_hook(lambda module, args, out: reads.append(out[..., 0].numel()))
    for use_cache, expected in [(True, [3, 1, 1, 1, 1, 1, 8, 8, 8]),  # past max_len the window
                                (False, [3, 4, 5, 6, 7, 8, 8, 8, 8])]:
        reads.clear()
        generate(model, random_ids(1, 3), 9, use_cache=use_cache)
        assert reads == expected


def test_a_compiled_model_writes_the_same_from_three_graphs():
    """The graphs are counted and run as they are; page 07 has them translated, half a minute."""
    graphs = []

    def note(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model, prompt = random_model(n_layers=1).train(), random_ids(2, 2)
    compiled = torch.compile(model, backend=note, fullgraph=True)
    expected, out = (generate(m, prompt, 9, generator=torch.Generator().manual_seed(0))
                     for m in (model, compiled))
    torch.compiler.reset()
    assert torch.equal(out, expected) and model.training and compiled.training
    assert len(graphs) == 3  # the prompt, one more token whatever went before, the full window
