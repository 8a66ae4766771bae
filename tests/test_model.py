"""Page 03: the model, held against PyTorch's own layers, its parts changed, and its pictures."""

import contextlib
import math
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tinygpt_helpers as tiny
from tinygpt_helpers import AttentionRecorder, GPTConfig, TinyGPT, attention_weights

SIZES = dict(vocab_size=11, d_model=16, n_heads=4, n_layers=2, max_len=12)


def random_model(kind=TinyGPT, **sizes):
    """A model whose weights are large enough that a mistake anywhere shows in the logits."""
    torch.manual_seed(0)
    model = kind(**SIZES | sizes).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.4 + (weight.ndim == 1))
    return model


def test_a_config_or_its_fields_make_the_same_model():
    config = GPTConfig(**SIZES, dropout=0.3)
    for model in (TinyGPT(config), TinyGPT(**vars(config)), TinyGPT(*vars(config).values())):
        assert (model.config, model.vocab_size, model.max_len) == (config, 11, 12)


@pytest.mark.parametrize(("field", "value"), [
    *[(field, value) for field in SIZES for value in (0, -5)],
    ("d_model", 18), ("n_heads", 3), ("dropout", 1.0), ("dropout", -0.1)])
def test_sizes_that_make_no_model(field, value):
    for kind in (GPTConfig, TinyGPT):
        with pytest.raises(ValueError, match=rf"{field}={value}\b.*n_heads divides d_model"):
            kind(**SIZES | {field: value})


def test_a_change_in_the_future_moves_nothing_before():
    model, idx = random_model(), torch.randint(11, (1, 12)).repeat(12, 1)
    changed = (idx + torch.eye(12).long()) % 11  # text t is another at position t alone
    moves = torch.ones(12, 12).bool().triu()
    for memory in (None, AttentionRecorder()):
        moved = (model(changed, memory) - model(idx, memory)).abs().amax(-1)
        assert (moved[~moves] == 0).all() and (moved[moves] > 1e-4).all()


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 4, 9, 8), (2, 1, 7, 3), (6, 2)])
def test_attention_weights_are_the_fused_kernels(shape, scale):
    # float64: scores in the hundreds cost float32 its last four digits, on either side
    q, k = torch.randn(2, *shape).double() * scale
    weights, units = attention_weights(q, k), torch.eye(shape[-2]).double()
    assert (weights.triu(1) == 0).all()
    fused = F.scaled_dot_product_attention(q, k, units.expand_as(weights), is_causal=True)
    assert_close(weights, fused, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize(("C", "n_heads", "n_layers", "B", "T"), [
    (16, 4, 2, 3, 10), (24, 3, 1, 2, 12), (8, 1, 3, 3, 7), (16, 4, 2, 1, 1)])
def test_the_same_numbers_as_pytorchs_own_layers(C, n_heads, n_layers, B, T):
    model = random_model(d_model=C, n_heads=n_heads, n_layers=n_layers)
    count = 11 * C + 12 * C + n_layers * (12 * C * C + 4 * C) + 2 * C + C * 11
    assert sum(weight.numel() for weight in model.parameters()) == count  # none beside PyTorch's
    names = {"self_attn.in_proj_weight": "attention.qkv.weight", "linear1.weight": "mlp.0.weight",
             "self_attn.out_proj.weight": "attention.proj.weight", "linear2.weight": "mlp.2.weight"}
    idx, maps = torch.randint(11, (B, T)), []
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    x = model.tokens.weight[idx] + model.positions.weight[:T]
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(C, n_heads, 4 * C, dropout=0.0, activation="gelu",
                                           norm_first=True, batch_first=True).eval()
        ours = block.state_dict()
        layer.load_state_dict({name: ours.get(names.get(name, name), torch.zeros_like(value))
                               for name, value in layer.state_dict().items()})  # no biases
        maps.append(layer.self_attn(*3 * [layer.norm1(x)], attn_mask=mask,
                                    average_attn_weights=False)[1])
        x = layer(x, src_mask=mask, is_causal=True)
    x = F.layer_norm(x, (C,), model.norm.weight, model.norm.bias)
    assert_close(model(idx), x @ model.head.weight.T, atol=2e-5, rtol=1e-4)
    assert torch.equal(model(idx.int()), model.train()(idx))  # no dropout unless asked for
    recorder = AttentionRecorder()
    assert model(idx[:0, :3], recorder).shape == (0, min(T, 3), 11)
    assert_close(model(idx, recorder), model(idx), atol=1e-5, rtol=1e-5)
    assert_close(recorder.weights, torch.stack(maps))  # of the newest text


class Llamalike(TinyGPT):
    """Other norms and another MLP, put in where the old ones were."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        C = self.config.d_model
        for block in self.blocks:
            block.norm1, block.norm2 = nn.RMSNorm(C), nn.RMSNorm(C)
            block.mlp = nn.Sequential(nn.Dropout(0), nn.Linear(C, 64), nn.GLU(), nn.Linear(32, C))
        self.norm = nn.RMSNorm(C)
        tiny.init_weights(self)


def test_a_model_of_other_parts_runs_everywhere():
    """No function has a copy of the model's computation: each goes through the parts it finds."""
    model, idx = random_model(Llamalike).double(), torch.randint(11, (3, 5))
    whole = model(idx)
    x = model.tokens(idx) + model.positions.weight[:5]  # the parts by hand
    for block in model.blocks:
        x = x + block.attention(block.norm1(x))
        x = x + block.mlp(block.norm2(x))
    assert_close(whole, model.head(model.norm(x)))
    assert_close(model(idx, AttentionRecorder()), whole)
    assert_close(tiny.logit_lens(model, idx)[-1], whole)
    write = partial(tiny.generate, model, idx, 20, temperature=0)  # past max_len
    text = write()
    assert torch.equal(text, write(use_cache=False))
    with tiny.ablate(model, [(0, 1), (1, 3)]):
        assert not torch.allclose(model(idx), whole, atol=1e-3)
        assert_close(tiny.logit_lens(model, idx)[-1], model(idx))
        assert torch.equal(write(), write(use_cache=False)) and not torch.equal(write(), text)
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
    model, devices = TinyGPT(**SIZES).to("meta"), Devices()
    idx = torch.zeros(2, 8, dtype=torch.long, device="meta")
    monkeypatch.setattr(torch, "autocast", lambda *args, **named: contextlib.nullcontext())
    optimizer, devices.seen = torch.optim.SGD(model.parameters()), set()
    with devices:
        assert model(idx, AttentionRecorder()).shape == model(idx).shape == (2, 8, 11)
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
        assert model(idx, AttentionRecorder()).shape == model(idx).shape == (2, 8, 11)
        tiny.logit_lens(model, idx)
    assert devices.seen == {"cuda"}


@pytest.mark.parametrize("sizes", [(2, 128, 4, 4, 64), (65, 32, 2, 1, 16), (1000, 96, 3, 6, 32)])
def test_the_weights_a_model_starts_from(sizes):
    """The first loss is that of a blind guess. Signals keep their size through a matrix; where
    2 n_layers of them add up in the residual stream, the sum keeps it."""
    for seed in range(3):
        torch.manual_seed(seed)
        model, V = TinyGPT(*sizes), sizes[0]
        x, y = torch.randint(V, (2, 8, sizes[-1]))
        logits = model(x)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
        assert abs(loss / math.log(V) - 1) < 0.02
        assert logits.std() > 0.01  # small, not zero: the layers below learn at once
        smaller = (2 * len(model.blocks)) ** -0.5
        for block in model.blocks:
            for layer, factor in [(block.attention.qkv, 1), (block.mlp[0], 1),
                                  (block.attention.proj, smaller), (block.mlp[2], smaller)]:
                size = layer.weight.std() * math.sqrt(layer.in_features)
                assert size.item() == pytest.approx(factor, rel=0.1)
            assert (block.norm1.weight == 1).all() and (block.norm2.bias == 0).all()


@pytest.mark.parametrize(("length", "width"), [(20, 8), (7, 5), (1, 1)])
def test_positions_start_as_waves(length, width):
    waves = [[(math.cos if i % 2 else math.sin)(t / 1000 ** (i // 2 * 2 / width))
              for i in range(width)] for t in range(length)]
    assert_close(tiny.sinusoids(length, width), torch.tensor(waves), atol=1e-5, rtol=0)
    table = TinyGPT(5, width, 1, 1, length).positions.weight
    assert torch.equal(table.data, 0.4 * tiny.sinusoids(length, width)) and table.requires_grad


def test_dropout_is_everywhere_and_while_training_only():
    """Embeddings, MLP output, attention output, attention weights."""
    torch.manual_seed(0)
    model, idx = random_model(max_len=50, dropout=0.5), torch.zeros(1, 50, dtype=torch.long)
    assert torch.equal(model(idx), model(idx))
    assert not torch.equal(model.train()(idx), model(idx))
    x, outputs, block = torch.randn(1, 50, 16), [], model.blocks[0]
    block.register_forward_pre_hook(lambda module, args: outputs.append(args[0]))
    model(idx)
    outputs += [block.mlp(x), block.attention(x)]
    # the first position sees itself alone: each head is dropped whole or doubled
    block.attention.proj.weight.data = torch.eye(16)
    block.attention.qkv.weight.data = torch.eye(16).repeat(3, 1)
    outputs.append(torch.cat([block.attention(x)[0, 0] for _ in range(200)]))
    for output, share in zip(outputs, [0.5, 0.5, 0.5, 0.75], strict=True):
        assert (output == 0).float().mean().item() == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize(("idx", "message"), [
    (torch.zeros(1, 13).long(), r"T = 13 > max_len.*idx\[:, -12:\]"),
    (torch.zeros(1, 0).long(), r"T > 0.*\[1, 0\]"),
    (torch.tensor([[0, 11]]), "ids 0 to 11 .*vocabulary, 0..10"),
    (torch.tensor([[5, -1]]), "ids -1 to 5 .*vocabulary, 0..10"),
    (torch.zeros(3).long(), r"\(B, T\).*\[3\]"),
    (torch.zeros(1, 2, 3).long(), r"\(B, T\).*\[1, 2, 3\]"),
    (torch.zeros(1, 3), "integer.*torch.float32"),
    (torch.zeros(1, 3).bool(), "integer.*torch.bool")])
def test_ids_that_cannot_be_read(idx, message):
    with pytest.raises(ValueError, match=message):
        random_model()(idx)
