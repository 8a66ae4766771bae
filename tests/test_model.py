"""Page 03: the model, held against PyTorch's own layers, and the picture of its attention."""

import math

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from tinygpt_helpers import (
    Block,
    CausalSelfAttention,
    TinyGPT,
    attention_weights,
    plot_attention,
    sinusoids,
)


def random_model(vocab_size=11, d_model=16, n_heads=4, n_layers=2, max_len=12, dropout=0.0, seed=0):
    """A model whose weights are large enough that a mistake anywhere shows in the logits."""
    torch.manual_seed(seed)
    model = TinyGPT(vocab_size, d_model, n_heads, n_layers, max_len, dropout).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.4 + (weight.ndim == 1))
    return model


# ---------------------------------------------------------------- shapes and sizes


def test_logits_for_every_position():
    model = random_model()
    for B, T in [(1, 1), (3, 5), (2, 12)]:
        idx = torch.randint(11, (B, T))
        logits = model(idx)
        assert logits.shape == (B, T, 11) and logits.dtype == torch.float32
        assert torch.equal(model(idx.int()), logits)
        again, weights = model(idx, return_attention=True)
        assert again.shape == (B, T, 11) and weights.shape == (2, B, 4, T, T)


@pytest.mark.parametrize("sizes", [(65, 128, 4, 4, 64), (2, 8, 1, 1, 3), (1000, 24, 3, 2, 16)])
def test_the_number_of_weights(sizes):
    V, C, n_heads, n, max_len = sizes
    count = sum(p.numel() for p in TinyGPT(*sizes).parameters())
    assert count == V * C + max_len * C + n * (12 * C * C + 4 * C) + 2 * C + C * V


def test_the_config_builds_the_same_model():
    model = TinyGPT(11, 16, 4, 2, 12, 0.3)
    assert model.config == dict(vocab_size=11, d_model=16, n_heads=4, n_layers=2, max_len=12,
                                dropout=0.3)
    assert (model.vocab_size, model.max_len) == (11, 12)
    twin = TinyGPT(**model.config).eval()
    twin.load_state_dict(model.state_dict())
    idx = torch.randint(11, (2, 12))
    assert torch.equal(twin(idx), model.eval()(idx))


# ---------------------------------------------------------------- what a position may see


def test_a_change_in_the_future_moves_nothing_before():
    model, idx = random_model(), torch.randint(11, (1, 12))
    logits, weights = model(idx, return_attention=True)
    fused = model(idx)
    for t in range(12):
        other = idx.clone()
        other[0, t] = (idx[0, t] + 1) % 11
        for new, old in [(model(other), fused), (model(other, return_attention=True)[0], logits)]:
            assert torch.equal(new[:, :t], old[:, :t])
            # and all from there on do see it
            assert ((new - old).abs().amax(-1)[0, t:] > 1e-4).all()


def test_no_gradient_comes_from_the_future():
    block, x = Block(16, 4).eval(), torch.randn(1, 7, 16, requires_grad=True)
    for fused in (True, False):
        y, _ = block(x, return_attention=not fused)
        for t in range(7):
            (grad,) = torch.autograd.grad(y[0, t].square().sum(), x, retain_graph=True)
            moved = grad[0].abs().amax(-1) > 0
            assert moved.tolist() == [True] * (t + 1) + [False] * (6 - t)


def test_texts_in_a_batch_do_not_see_each_other():
    model, idx = random_model(), torch.randint(11, (4, 9))
    together = model(idx)
    for b in range(4):
        torch.testing.assert_close(model(idx[b : b + 1]), together[b : b + 1])


# ---------------------------------------------------------------- attention


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 8),
       st.sampled_from([0.1, 1.0, 30.0]), st.integers(0, 999))
def test_weights_are_shares_of_the_past(B, n_heads, T, d_head, scale, seed):
    torch.manual_seed(seed)
    # float64: scores in the hundreds cost float32 its last four digits, on either side
    q, k, v = (torch.randn(B, n_heads, T, d_head).double() * scale for _ in range(3))
    weights = attention_weights(q, k)
    assert weights.shape == (B, n_heads, T, T)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, n_heads, T).double())
    assert (weights.triu(1) == 0).all() and (weights >= 0).all()
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(weights @ v, fused, atol=1e-7, rtol=1e-7)


def test_weights_by_hand():
    q = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0]])
    k = torch.tensor([[0.0, math.log(3), 0, 0], [0, 0, 1.0, 0]])
    # the second row: scores (2 ln 3, 0) / sqrt(4) = (ln 3, 0), so 3 to 1
    expected = torch.tensor([[1.0, 0.0], [0.75, 0.25]])
    torch.testing.assert_close(attention_weights(q, k), expected)


def test_both_paths_agree():
    for seed in range(3):
        model = random_model(seed=seed)
        idx = torch.randint(11, (3, 12))
        logits, weights = model(idx, return_attention=True)
        torch.testing.assert_close(model(idx), logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4, 12))
        assert (weights.triu(1) == 0).all()


@pytest.mark.parametrize("sizes", [(16, 4, 2), (24, 3, 1), (8, 1, 3)])
def test_the_same_numbers_as_pytorchs_own_layers(sizes):
    d_model, n_heads, n_layers = sizes
    model = random_model(11, d_model, n_heads, n_layers)
    layers = []
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(d_model, n_heads, 4 * d_model, dropout=0.0,
                                           activation="gelu", norm_first=True, batch_first=True)
        theirs = layer.state_dict()
        theirs = {name: torch.zeros_like(value) for name, value in theirs.items()}  # no biases
        theirs |= {
            "self_attn.in_proj_weight": block.attention.qkv.weight,
            "self_attn.out_proj.weight": block.attention.proj.weight,
            "linear1.weight": block.mlp[0].weight, "linear2.weight": block.mlp[2].weight,
            "norm1.weight": block.norm1.weight, "norm1.bias": block.norm1.bias,
            "norm2.weight": block.norm2.weight, "norm2.bias": block.norm2.bias,
        }
        layer.load_state_dict(theirs)
        layers.append(layer.eval())
    idx = torch.randint(11, (3, 10))
    x = model.tokens.weight[idx] + model.positions.weight[torch.arange(10)]
    mask = nn.Transformer.generate_square_subsequent_mask(10)
    for layer in layers:
        x = layer(x, src_mask=mask, is_causal=True)
    x = F.layer_norm(x, (d_model,), model.norm.weight, model.norm.bias)
    torch.testing.assert_close(model(idx), x @ model.head.weight.T, atol=2e-5, rtol=1e-4)


# ---------------------------------------------------------------- the start


@pytest.mark.parametrize("V", [2, 65, 1000])
@pytest.mark.parametrize("sizes", [(128, 4, 4, 64), (32, 2, 1, 16), (96, 3, 6, 32)])
def test_the_first_loss_is_that_of_a_blind_guess(V, sizes):
    for seed in range(3):
        torch.manual_seed(seed)
        model = TinyGPT(V, *sizes)
        idx = torch.randint(V, (8, sizes[-1] + 1))
        loss = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten()).item()
        assert abs(loss / math.log(V) - 1) < 0.02
        assert model(idx[:, :-1]).std() > 0.01  # small, not zero: the layers below learn at once


def test_matrices_that_write_into_the_residual_stream_start_smaller():
    """Signals keep their size through a matrix; what 2 n_layers of them add up to is 1 again."""
    model = TinyGPT(65, 64, 4, 8, 32)
    for block in model.blocks:
        for layer, factor in [(block.attention.qkv, 1), (block.mlp[0], 1),
                              (block.attention.proj, 1 / 4), (block.mlp[2], 1 / 4)]:
            std = factor / math.sqrt(layer.in_features)
            assert layer.weight.std().item() == pytest.approx(std, rel=0.1)
        assert (block.norm1.weight == 1).all() and (block.norm2.bias == 0).all()


@pytest.mark.parametrize(("length", "width"), [(20, 8), (7, 5), (1, 1)])
def test_positions_start_as_waves(length, width):
    waves = sinusoids(length, width)
    assert waves.shape == (length, width)
    for t in range(length):
        for i in range(width):
            angle = t / 1000 ** (i // 2 * 2 / width)
            expected = math.cos(angle) if i % 2 else math.sin(angle)
            assert waves[t, i].item() == pytest.approx(expected, abs=1e-5)
    model = TinyGPT(5, width, 1, 1, length)
    assert torch.equal(model.positions.weight.data, 0.4 * waves)
    assert model.positions.weight.requires_grad  # and are learned from there


def test_dropout_is_there_while_training_only():
    idx = torch.randint(11, (4, 12))
    model = random_model(dropout=0.5)
    assert torch.equal(model(idx), model(idx))
    model.train()
    assert not torch.equal(model(idx), model(idx))
    still = random_model(dropout=0.0).train()
    assert torch.equal(still(idx), still(idx))


def test_dropout_is_at_every_place():
    """Embeddings, attention weights (both paths), attention output, MLP output."""
    torch.manual_seed(0)
    x = torch.randn(1, 50, 16)
    model = random_model(max_len=50, dropout=0.5).train()
    assert (model.blocks[0].mlp(x) == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    attention = CausalSelfAttention(16, 4, 0.5).train()
    for return_attention in (False, True):
        y = attention(x, return_attention)[0]
        assert (y == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
        # the first position sees itself alone: each head is dropped whole or doubled
        attention.proj.weight.data = torch.eye(16)
        attention.qkv.weight.data = torch.eye(16).repeat(3, 1)
        first = torch.cat([attention(x, return_attention)[0][0, 0] for _ in range(200)])
        assert (first == 0).float().mean().item() == pytest.approx(0.75, abs=0.04)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(torch.zeros(1, 50, dtype=torch.long))
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("idx", "words"),
    [
        (torch.zeros(1, 13).long(), ["T = 13", "max_len = 12", "idx[:, -12:]"]),
        (torch.zeros(1, 0).long(), ["T = 0"]),
        (torch.tensor([[0, 11]]), ["id 11", "vocabulary of 11", "0 to 10"]),
        (torch.tensor([[5, -1]]), ["id -1", "vocabulary of 11"]),
        (torch.zeros(3).long(), ["(B, T)", "(3,)"]),
        (torch.zeros(1, 2, 3).long(), ["(B, T)", "(1, 2, 3)"]),
        (torch.zeros(1, 3), ["integer", "torch.float32"]),
        (torch.zeros(1, 3).bool(), ["integer", "torch.bool"]),
    ],
)
def test_ids_that_cannot_be_read(idx, words):
    with pytest.raises(ValueError) as caught:
        random_model()(idx)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(("d_model", "n_heads"), [(130, 4), (16, 0), (16, -4), (0, 4)])
def test_a_width_that_the_heads_cannot_share(d_model, n_heads):
    with pytest.raises(ValueError, match=f"'d_model': {d_model}.*'n_heads': {n_heads}"):
        TinyGPT(65, d_model, n_heads, 4, 64)


@pytest.mark.parametrize("size", ["vocab_size", "n_layers", "max_len"])
def test_a_size_that_makes_no_model(size):
    sizes = dict(vocab_size=65, d_model=16, n_heads=4, n_layers=4, max_len=64)
    for wrong in (0, -5):
        with pytest.raises(ValueError, match=f"'{size}': {wrong}"):
            TinyGPT(**sizes | {size: wrong})


# ---------------------------------------------------------------- the picture


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize("n_heads", [1, 3, 4, 6])
def test_an_attention_map_for_each_head(n_heads):
    q, k = torch.randn(2, n_heads, 5, 4)
    weights = attention_weights(q, k)
    figure = plot_attention(weights, "ab \nc", title="A finding")
    assert isinstance(figure, Figure) and figure.get_suptitle() == "A finding"
    drawn = [ax for ax in figure.axes if ax.images]
    assert len(drawn) == n_heads
    for head, ax in enumerate(drawn):
        torch.testing.assert_close(torch.tensor(ax.images[0].get_array().data), weights[head])
        assert ax.images[0].get_clim() == (0, 1)  # one scale for all
        assert ax.get_xlabel() == "looked at"
        for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
            assert [label.get_text() for label in labels] == ["a", "b", "␣", "↵", "c"]
    assert drawn[0].get_ylabel() == "looking"
    assert "attention weight" in [ax.get_ylabel() for ax in figure.axes]  # the colour bar's


def test_one_map_without_heads_and_with_a_gradient():
    weights = torch.eye(3, requires_grad=True)
    (image,) = plot_attention(weights, ["x", "y", "z"]).axes[0].images
    assert image.get_array().tolist() == torch.eye(3).tolist()


@pytest.mark.parametrize("tokens", ["ab", "abcd", ""])
def test_tokens_that_do_not_fit_the_map(tokens):
    with pytest.raises(ValueError, match=f"{len(tokens)} tokens.*T = 3"):
        plot_attention(torch.eye(3), tokens)
