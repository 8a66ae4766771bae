"""Page 03: the model, held against PyTorch's own layers, its parts changed, and its pictures."""

import contextlib
import math
from dataclasses import astuple

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tinygpt_helpers as tiny
from tinygpt_helpers import AttentionRecorder, GPTConfig, TinyGPT, attention_weights

SIZES = dict(vocab_size=11, d_model=16, n_heads=4, n_layers=2, max_len=12)


def random_model(kind=TinyGPT, seed=0, **sizes):
    """A model whose weights are large enough that a mistake anywhere shows in the logits."""
    torch.manual_seed(seed)
    model = kind(**SIZES | sizes).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.4 + (weight.ndim == 1))
    return model


def with_recorder(model, idx):
    recorder = AttentionRecorder()
    return model(idx, recorder), recorder.weights


@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 5), (2, 12), (0, 4)])
def test_logits_for_every_position(B, T):
    model, idx = random_model(), torch.randint(11, (B, T))
    logits = model(idx)
    assert logits.shape == (B, T, 11) and logits.dtype == torch.float32
    assert torch.equal(model(idx.int()), logits)
    assert with_recorder(model, idx)[1].shape == (2, B, 4, T, T)


@pytest.mark.parametrize("sizes", [(65, 128, 4, 4, 64), (2, 8, 1, 1, 3), (1000, 24, 3, 2, 16)])
def test_the_number_of_weights(sizes):
    V, C, _, n, max_len = sizes
    count = sum(p.numel() for p in TinyGPT(*sizes).parameters())
    assert count == V * C + max_len * C + n * (12 * C * C + 4 * C) + 2 * C + C * V


def test_a_config_or_its_fields_make_the_same_model():
    config = GPTConfig(**SIZES, dropout=0.3)
    models = []
    for make in (lambda: TinyGPT(config), lambda: TinyGPT(**SIZES, dropout=0.3),
                 lambda: TinyGPT(*astuple(config)), lambda: TinyGPT(models[0].config)):
        torch.manual_seed(0)
        models.append(make())
        assert models[-1].config == config
        assert (models[-1].vocab_size, models[-1].max_len) == (11, 12)
        for ours, theirs in zip(models[-1].parameters(), models[0].parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("field", "value"), [
    *[(field, value) for field in SIZES for value in (0, -5)],
    ("d_model", 18), ("n_heads", 3), ("dropout", 1.0), ("dropout", -0.1)])
def test_sizes_that_make_no_model(field, value):
    for kind in (GPTConfig, TinyGPT):
        with pytest.raises(ValueError, match=rf"{field}={value}\b.*divisible by n_heads"):
            kind(**SIZES | {field: value})


def test_a_change_in_the_future_moves_nothing_before():
    model, idx = random_model(), torch.randint(11, (1, 12))
    for read in (model, lambda idx: with_recorder(model, idx)[0]):
        logits = read(idx)
        for t in range(12):
            other = idx.clone()
            other[0, t] = (idx[0, t] + 1) % 11
            moved = (read(other) - logits).abs().amax(-1)[0]
            assert (moved[:t] == 0).all() and (moved[t:] > 1e-4).all()


def test_texts_in_a_batch_do_not_see_each_other():
    model, idx = random_model(), torch.randint(11, (4, 9))
    assert_close(torch.cat([model(row[None]) for row in idx]), model(idx))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 8),
       st.sampled_from([0.1, 1.0, 30.0]), st.integers(0, 999))
def test_weights_are_shares_of_the_past(B, n_heads, T, d_head, scale, seed):
    torch.manual_seed(seed)
    # float64: scores in the hundreds cost float32 its last four digits, on either side
    q, k, v = (torch.randn(B, n_heads, T, d_head).double() * scale for _ in range(3))
    weights = attention_weights(q, k)
    assert_close(weights.sum(-1), torch.ones(B, n_heads, T).double())
    assert (weights.triu(1) == 0).all() and (weights >= 0).all()
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(weights @ v, fused, atol=1e-7, rtol=1e-7)


def test_weights_by_hand():
    q = torch.tensor([[1.0, 0, 0, 0], [0, 2.0, 0, 0]])
    k = torch.tensor([[0.0, math.log(3), 0, 0], [0, 0, 1.0, 0]])
    # the second row: scores (2 ln 3, 0) / sqrt(4) = (ln 3, 0), so 3 to 1
    assert_close(attention_weights(q, k), torch.tensor([[1.0, 0.0], [0.75, 0.25]]))


def test_a_recorder_changes_nothing_and_keeps_the_newest_weights():
    recorder = AttentionRecorder()
    for seed in range(3):
        model, idx = random_model(seed=seed), torch.randint(11, (3, 12))
        assert_close(model(idx, recorder), model(idx), atol=1e-5, rtol=1e-5)
        assert recorder.weights.shape == (2, 3, 4, 12, 12)
        # layer 0, by hand: a weight that moved to another layer, text or head would show
        x = model.blocks[0].norm1(model.tokens(idx) + model.positions.weight)
        q, k, _ = model.blocks[0].attention.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        assert_close(recorder.weights[0], attention_weights(q, k))


@pytest.mark.parametrize("sizes", [(16, 4, 2), (24, 3, 1), (8, 1, 3)])
def test_the_same_numbers_as_pytorchs_own_layers(sizes):
    C, n_heads, n_layers = sizes
    model = random_model(d_model=C, n_heads=n_heads, n_layers=n_layers)
    idx, mask = torch.randint(11, (3, 10)), nn.Transformer.generate_square_subsequent_mask(10)
    x = model.tokens.weight[idx] + model.positions.weight[torch.arange(10)]
    names = {"self_attn.in_proj_weight": "attention.qkv.weight",
             "self_attn.out_proj.weight": "attention.proj.weight",
             "linear1.weight": "mlp.0.weight", "linear2.weight": "mlp.2.weight"}
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(C, n_heads, 4 * C, dropout=0.0, activation="gelu",
                                           norm_first=True, batch_first=True).eval()
        ours = block.state_dict()
        layer.load_state_dict({name: ours.get(names.get(name, name), torch.zeros_like(value))
                               for name, value in layer.state_dict().items()})  # no biases
        x = layer(x, src_mask=mask, is_causal=True)
    x = F.layer_norm(x, (C,), model.norm.weight, model.norm.bias)
    assert_close(model(idx), x @ model.head.weight.T, atol=2e-5, rtol=1e-4)


class SwiGLU(nn.Module):
    def __init__(self, C):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(C, 32), nn.Linear(C, 32), nn.Linear(32, C)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Llamalike(TinyGPT):
    """Other norms and another MLP, put in where the old ones were."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        C = self.config.d_model
        for block in self.blocks:
            block.norm1, block.norm2, block.mlp = nn.RMSNorm(C), nn.RMSNorm(C), SwiGLU(C)
        self.norm = nn.RMSNorm(C)
        tiny.init_weights(self)


def test_a_model_of_other_parts_runs_everywhere():
    """No function has a copy of the model's computation: each goes through the parts it finds."""
    model = random_model(Llamalike).double()
    idx = torch.randint(11, (3, 5))
    whole = model(idx)
    x = model.tokens(idx) + model.positions.weight[:5]  # the parts by hand
    for block in model.blocks:
        x = x + block.attention(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    assert_close(whole, model.head(model.norm(x)))
    assert_close(with_recorder(model, idx)[0], whole)
    lens = tiny.logit_lens(model, idx)
    assert lens.shape == (3, 3, 5, 11)
    assert_close(lens[-1], whole)

    def write(use_cache):  # past max_len
        return tiny.generate(model, idx, 20, temperature=0, use_cache=use_cache)

    text = write(True)
    assert torch.equal(text, write(False))
    with tiny.ablate(model, [(0, 1), (1, 3)]):
        assert not torch.allclose(model(idx), whole, atol=1e-3)
        assert_close(tiny.logit_lens(model, idx)[-1], model(idx))
        assert torch.equal(write(True), write(False))
    assert torch.equal(model(idx), whole)
    engine = tiny.Engine(model, max_batch=2, page_size=4, n_pages=8, chunk_size=3)
    greedy = [engine.submit(row.tolist(), 8, temperature=0) for row in idx]
    drawn = engine.submit(idx[0].tolist(), 8, seed=7)
    served = engine.run()
    assert torch.equal(torch.tensor([served[i] for i in greedy]), text[:, 5:13])
    alone = tiny.generate(model, idx[:1], 8, generator=torch.Generator().manual_seed(7))
    assert served[drawn] == alone[0, 5:].tolist()


class Devices(TorchDispatchMode):
    """Notes where the result of every operation lies."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {t.device.type for t in tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


def test_every_tensor_is_made_where_the_model_is(monkeypatch):
    """Tensors without numbers: to fetch one is an error, too. PyTorch without CUDA cannot write
    into a fake CUDA tensor; on the "meta" device all works but autocast and AdamW."""
    with torch.device("meta"):
        model = TinyGPT(**SIZES)
    idx, devices = torch.zeros(2, 8, dtype=torch.long, device="meta"), Devices()
    monkeypatch.setattr(torch, "autocast", lambda *args, **named: contextlib.nullcontext())
    optimizer, devices.seen = torch.optim.SGD(model.parameters()), set()
    with devices:
        assert with_recorder(model, idx)[0].shape == model(idx).shape == (2, 8, 11)
        tiny.logit_lens(model, idx)
        with tiny.ablate(model, [(0, 0)]):
            model(idx)
        cache, pool = tiny.KVCache(model, 2), tiny.PagePool(model, 4, 4)
        for part in idx.split([5, 1, 2], 1):
            model(part, cache)
        model(idx[:1], tiny.PagedBatch(pool, [(0, 4, [0]), (3, 2, [1, 2]), (5, 2, [1, 3])]))
        tiny.train_step(model, optimizer, idx, idx, lr=1e-3)
    assert devices.seen == {"meta"}

    fake, devices.seen = FakeTensorMode(), set()
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            weight = FakeTensor(fake, weight.detach(), torch.device("cuda"))
            setattr(module, name, nn.Parameter(weight, requires_grad=False))
    with fake, devices:
        idx = torch.zeros(2, 8, dtype=torch.long, device="cuda")
        assert with_recorder(model, idx)[0].shape == model(idx).shape == (2, 8, 11)
        tiny.logit_lens(model, idx)
    assert devices.seen == {"cuda"}


@pytest.mark.parametrize("V", [2, 65, 1000])
@pytest.mark.parametrize("sizes", [(128, 4, 4, 64), (32, 2, 1, 16), (96, 3, 6, 32)])
def test_the_first_loss_is_that_of_a_blind_guess(V, sizes):
    for seed in range(3):
        torch.manual_seed(seed)
        model = TinyGPT(V, *sizes)
        x, y = torch.randint(V, (2, 8, sizes[-1]))
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
        assert abs(loss / math.log(V) - 1) < 0.02
        assert logits.std() > 0.01  # small, not zero: the layers below learn at once


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
    waves = [[(math.cos if i % 2 else math.sin)(t / 1000 ** (i // 2 * 2 / width))
              for i in range(width)] for t in range(length)]
    assert_close(tiny.sinusoids(length, width), torch.tensor(waves), atol=1e-5, rtol=0)
    table = TinyGPT(5, width, 1, 1, length).positions.weight
    assert torch.equal(table.data, 0.4 * tiny.sinusoids(length, width)) and table.requires_grad


def test_dropout_is_everywhere_and_while_training_only():
    """Embeddings, attention weights, attention output, MLP output."""
    torch.manual_seed(0)
    model, idx = random_model(max_len=50, dropout=0.5), torch.zeros(1, 50, dtype=torch.long)
    assert torch.equal(model(idx), model(idx))
    assert not torch.equal(model.train()(idx), model(idx))
    still = random_model().train()
    assert torch.equal(still(idx[:, :12]), still(idx[:, :12]))

    def dropped(x):
        return pytest.approx((x == 0).float().mean().item(), abs=0.1)

    x, seen = torch.randn(1, 50, 16), []
    assert dropped(model.blocks[0].mlp(x)) == 0.5
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(idx)
    assert dropped(seen[0]) == 0.5
    attention = tiny.CausalSelfAttention(GPTConfig(**SIZES, dropout=0.5)).train()
    assert dropped(attention(x)) == 0.5
    # the first position sees itself alone: each head is dropped whole or doubled
    attention.proj.weight.data = torch.eye(16)
    attention.qkv.weight.data = torch.eye(16).repeat(3, 1)
    assert dropped(torch.cat([attention(x)[0, 0] for _ in range(200)])) == 0.75


@pytest.mark.parametrize(
    ("idx", "words"),
    [
        (torch.zeros(1, 13).long(), ["T = 13", "max_len = 12", "idx[:, -12:]"]),
        (torch.zeros(1, 0).long(), ["T at least 1", "(1, 0)"]),
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


@pytest.mark.parametrize("shape", [(5, 5), (1, 5, 5), (3, 5, 5), (6, 5, 5)])
def test_an_attention_map_for_each_head(shape):
    weights = torch.rand(shape, requires_grad=True)
    figure = tiny.plot_attention(weights, "ab \nc", title="A finding")
    assert isinstance(figure, Figure) and figure.get_suptitle() == "A finding"
    drawn, maps = [ax for ax in figure.axes if ax.images], weights.detach().view(-1, 5, 5)
    for ax, weight in zip(drawn, maps, strict=True):
        assert_close(torch.tensor(ax.images[0].get_array().data), weight)
        assert ax.images[0].get_clim() == (0, 1)  # one scale for all
        assert ax.get_xlabel() == "looked at"
        for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
            assert [label.get_text() for label in labels] == ["a", "b", "␣", "↵", "c"]
    assert drawn[0].get_ylabel() == "looking"
    assert "attention weight" in [ax.get_ylabel() for ax in figure.axes]  # the colour bar's
    plt.close(figure)


@pytest.mark.parametrize("tokens", ["ab", "abcd", ""])
def test_tokens_that_do_not_fit_the_map(tokens):
    with pytest.raises(ValueError, match=f"{len(tokens)} tokens.*T = 3"):
        tiny.plot_attention(torch.eye(3), tokens)
