"""Page 04: the loss, the optimiser, the loop, checkpoints, and a run that is resumed."""

import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from nbclient import NotebookClient
from torch.utils.data import DataLoader

import tinygpt_helpers as helpers
from tinygpt_helpers import (
    CharTokenizer,
    MixedPrecision,
    NextTokenDataset,
    TinyGPT,
    evaluate,
    learning_rate,
    live_loss,
    load_checkpoint,
    load_corpus,
    make_optimizer,
    pick_precision,
    plot_loss,
    sample_batch,
    save_checkpoint,
    train,
    train_one_epoch,
    train_step,
)

ROOT = Path(__file__).resolve().parent.parent


def small_model(dropout=0.0, max_len=8, seed=0):
    torch.manual_seed(seed)
    return TinyGPT(vocab_size=7, d_model=16, n_heads=2, n_layers=2, max_len=max_len,
                   dropout=dropout)


def some_ids(n, seed=0):
    return torch.randint(7, (n,), generator=torch.Generator().manual_seed(seed))


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def token_losses(model, x, y):
    """-log p of each target, by hand: `(B, T)`."""
    with torch.no_grad():
        return -model(x).log_softmax(-1).gather(-1, y[..., None])[..., 0]


# ---------------------------------------------------------------- train_one_epoch


def test_the_loss_of_an_epoch_is_the_mean_over_tokens():
    model, before = small_model(), weights_of(small_model())
    # the last batch holds 1 window of 9, and another kind of text, so that its mean differs
    ds = NextTokenDataset(torch.cat([some_ids(12), torch.full((5,), 3)]), 8)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    loss = train_one_epoch(model, DataLoader(ds, batch_size=4), frozen, torch.device("cpu"))
    losses = torch.stack([token_losses(model, *(part[None] for part in ds[i])) for i in range(9)])
    assert loss == pytest.approx(losses.mean().item(), rel=1e-5)
    by_batch = torch.stack([part.mean() for part in losses.split(4)]).mean().item()
    assert abs(loss - by_batch) > 1e-4  # the other mean is not the same here
    assert same(weights_of(model), before)


def test_an_epoch_teaches_in_training_mode():
    model = small_model(dropout=0.1).eval()
    loader = DataLoader(NextTokenDataset(torch.arange(60) % 7, 8), batch_size=8)
    modes = []
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [train_one_epoch(model, loader, opt, "cpu") for _ in range(4)]
    assert all(modes) and len(modes) == 4 * 7
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]


def test_an_epoch_shows_every_window_once():
    seen = []
    model = small_model()
    model.register_forward_pre_hook(lambda module, args: seen.extend(args[0].tolist()))
    ds = NextTokenDataset(some_ids(30), 8)
    opt = torch.optim.SGD(model.parameters(), lr=0.0)
    train_one_epoch(model, DataLoader(ds, batch_size=4, shuffle=True), opt, "cpu")
    assert sorted(seen) == sorted(x.tolist() for x, _ in ds)


def test_a_loader_without_a_batch_is_refused():
    loader = DataLoader(NextTokenDataset(some_ids(10), 8), batch_size=4, drop_last=True)
    model = small_model()
    with pytest.raises(ValueError, match="no batch.*drop_last"):
        train_one_epoch(model, loader, torch.optim.SGD(model.parameters(), lr=0.0), "cpu")


# ---------------------------------------------------------------- evaluate


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 60), st.integers(1, 5), st.booleans())
def test_every_token_is_predicted_once(n, batch_size, training):
    model, ids = small_model(dropout=0.5).train(training), some_ids(n, seed=n)
    loss = evaluate(model, ids, batch_size)
    assert model.training == training
    model.eval()
    total = 0.0
    for begin in range(0, n - 1, 8):  # windows of max_len, the last one what is left
        x, y = ids[begin : begin + 8][: n - 1 - begin], ids[begin + 1 : begin + 9]
        total += token_losses(model, x[None], y[None]).sum().item()
    assert loss == pytest.approx(total / (n - 1), rel=1e-5)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_tokens_to_evaluate(n):
    with pytest.raises(ValueError, match=f"{n} tokens"):
        evaluate(small_model(), some_ids(n))


# ---------------------------------------------------------------- the optimiser and its rate


def test_matrices_decay_and_norms_do_not():
    model = small_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(1, 2)
    optimizer, before = make_optimizer(model, lr=0.01, weight_decay=0.5), weights_of(model)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # without gradients the decay is all that happens
    for name, weight in model.named_parameters():
        factor = 1 - 0.01 * 0.5 if weight.ndim == 2 else 1.0
        torch.testing.assert_close(weight.data, before[name] * factor)
    assert {p.ndim for p in model.parameters()} == {1, 2}


def test_the_rate_rises_and_falls():
    rates = [learning_rate(i / 1000, 0.004) for i in range(1001)]
    assert 0 < rates[0] < 0.2 * 0.004
    assert max(rates) == pytest.approx(0.004) and rates.index(max(rates)) == 50
    assert rates[:51] == sorted(rates[:51]) and rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[25] == pytest.approx((rates[0] + rates[50]) / 2)  # a straight line
    assert rates[525] == pytest.approx(0.002)  # half way down the cosine
    assert rates[50 + 950 // 4] == pytest.approx(0.004 * (2 + math.sqrt(2)) / 4, rel=1e-2)
    assert rates[1000] == pytest.approx(0, abs=1e-9)
    assert learning_rate(1.7, 0.004) == pytest.approx(0, abs=1e-9)
    assert learning_rate(0.1, 1.0, warmup=0.1) == pytest.approx(1.0)


def test_a_step_of_training_is_a_step_of_adamw():
    model, twin = small_model(), small_model()
    x, y = sample_batch(some_ids(50), 8, 4)
    loss = train_step(model, make_optimizer(model, lr=1.0), x, y, lr=0.003, clip=1e9)
    theirs = make_optimizer(twin, lr=0.003)
    F.cross_entropy(twin(x).transpose(1, 2), y).backward()
    theirs.step()
    assert loss == pytest.approx(token_losses(small_model(), x, y).mean().item(), rel=1e-5)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, twin.state_dict()[name])


def test_gradients_of_the_step_before_are_gone():
    model = small_model()
    x, y = sample_batch(some_ids(50), 8, 4)
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    grads = []
    for _ in range(2):
        train_step(model, frozen, x, y, lr=0.0, clip=1e9)
        grads.append(model.head.weight.grad.clone())
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("clip", [1.0, 0.1])
def test_huge_gradients_are_scaled_down_and_small_ones_are_not(clip):
    x, y = sample_batch(some_ids(50), 8, 4)
    for factor in (1e4, 1e-6):
        model = small_model()
        for weight in model.parameters():
            weight.register_hook(lambda grad, factor=factor: grad * factor)
        before = weights_of(model)
        train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), x, y, lr=1.0, clip=clip)
        step = [weight.data - before[name] for name, weight in model.named_parameters()]
        step = torch.cat([part.flatten() for part in step])
        if factor > 1:
            assert step.norm().item() == pytest.approx(clip, rel=1e-3)
        else:
            assert 0 < step.norm().item() < 1e-3 * clip


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(bad, where):
    model = small_model()
    x, y = sample_batch(some_ids(50), 8, 4)
    optimizer = make_optimizer(model, lr=0.01)
    train_step(model, optimizer, x, y, lr=0.01)
    before = weights_of(model)
    if where == "loss":
        model.head.register_forward_hook(lambda *args: args[-1] * bad)
    else:
        model.norm.weight.register_hook(lambda grad: grad * bad)
    with pytest.raises(FloatingPointError, match="step 17"):
        train_step(model, optimizer, x, y, lr=0.01, step=17)
    assert same(weights_of(model), before)


# ---------------------------------------------------------------- fewer digits


def rounded_to_bfloat16(tensor):
    return torch.equal(tensor, tensor.bfloat16().to(tensor.dtype))


def test_linear_layers_multiply_rounded_numbers_and_all_else_is_left_alone():
    torch.manual_seed(0)
    x, w, b = torch.randn(5, 8), torch.randn(3, 8), torch.randn(3)
    low = F.linear(x.bfloat16(), w.bfloat16(), b.bfloat16()).float()
    exact, product, norm = F.linear(x, w, b), x @ w.T, F.layer_norm(x, (8,))
    with MixedPrecision(torch.bfloat16):
        for got in (F.linear(x, w, b), F.linear(x, w, bias=b), F.linear(input=x, bias=b, weight=w)):
            assert torch.equal(got, low)
        assert torch.equal(F.linear(x, w), F.linear(x, w, torch.zeros(3)))
        assert F.linear(x.double(), w.double()).dtype == torch.float64
        assert torch.equal(x @ w.T, product)
        assert torch.equal(F.layer_norm(input=x, normalized_shape=(8,)), norm)
    assert torch.equal(F.linear(x, w, b), exact) and not torch.equal(low, exact)


def test_mixed_precision_ends_with_its_block_whatever_happens():
    x, w = torch.randn(5, 8), torch.randn(3, 8)
    exact = F.linear(x, w)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        with MixedPrecision(torch.bfloat16):
            F.linear(x, w.T)
    assert torch.equal(F.linear(x, w), exact) and not rounded_to_bfloat16(exact)


@pytest.mark.parametrize("precision", [None, torch.float32])
def test_the_weights_own_precision_changes_nothing(precision):
    x, y = sample_batch(some_ids(50), 8, 4)
    one, two = small_model(), small_model()
    train_step(one, make_optimizer(one, lr=0.01), x, y, lr=0.01)
    train_step(two, make_optimizer(two, lr=0.01), x, y, lr=0.01, precision=precision)
    assert same(weights_of(one), weights_of(two))


def test_a_step_in_mixed_precision_is_nearly_the_same_step(monkeypatch):
    x, y = sample_batch(some_ids(50), 8, 4)
    one, two, types = small_model(), small_model(), []
    attend = F.scaled_dot_product_attention

    def noting(q, k, v, **options):
        types.append((q.dtype, k.dtype, v.dtype))
        return attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noting)
    frozen = [torch.optim.SGD(model.parameters(), lr=0.0) for model in (one, two)]
    exact = train_step(one, frozen[0], x, y, lr=0.0, clip=1e9)
    rounded = train_step(two, frozen[1], x, y, lr=0.0, clip=1e9, precision=torch.bfloat16)
    assert rounded == pytest.approx(exact, rel=1e-3) and rounded != exact
    assert types == [(torch.float32,) * 3] * 4  # two layers, two steps
    for (name, p), q in zip(one.named_parameters(), two.parameters()):
        assert q.dtype == q.grad.dtype == torch.float32 and not rounded_to_bfloat16(p.grad)
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.99
        if "qkv" in name or "proj" in name or "mlp" in name or "head" in name:
            assert rounded_to_bfloat16(q.grad), name  # the backward products too


@pytest.mark.parametrize(("device", "able", "expected"), [
    ("cpu", {"avx512_bf16": True}, torch.bfloat16), ("cpu", {"amx_bf16": True}, torch.bfloat16),
    ("cpu", {"avx512_bf16": False, "avx2": True}, torch.float32), ("cpu", {}, torch.float32),
    ("cuda", {"avx512_bf16": True}, torch.float32), ("mps", {"amx_bf16": True}, torch.float32),
])
def test_bfloat16_only_where_the_processor_is_faster_with_it(device, able, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert pick_precision(torch.device(device)) is expected


def test_a_pytorch_that_does_not_know_the_processor(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert pick_precision(torch.device("cpu")) is torch.float32


# ---------------------------------------------------------------- train


def run(model=None, steps=12, **options):
    options = dict(batch_size=2, lr=0.01, eval_every=5) | options
    return train(model or small_model(), some_ids(60), some_ids(20, 1), steps, **options)


def record(monkeypatch, name, seen):
    """Let `helpers.name` note its arguments in `seen`."""
    function = getattr(helpers, name)

    def noting(*args, **options):
        seen.append((args, options))
        return function(*args, **options)

    monkeypatch.setattr(helpers, name, noting)


def test_the_history_and_the_files_of_a_run(tmp_path, capsys):
    calls, model = [], small_model()
    history = run(model, out=tmp_path / "new" / "run",
                  on_eval=lambda h: calls.append((len(h["train_loss"]), list(h["val_step"]))))
    assert len(history["train_loss"]) == 12 and all(map(math.isfinite, history["train_loss"]))
    assert history["val_step"] == [0, 5, 10, 12] and len(history["val_loss"]) == 4
    assert calls == [(0, [0]), (5, [0, 5]), (10, [0, 5, 10]), (12, [0, 5, 10, 12])]
    assert sorted(os.listdir(tmp_path / "new" / "run")) == ["best.pt", "last.pt"]
    last = load_checkpoint(tmp_path / "new" / "run" / "last.pt")
    assert last["step"] == 12 and last["history"] == history
    assert same(weights_of(last["model"]), weights_of(model))
    assert history["val_loss"][-1] == evaluate(model, some_ids(20, 1))
    out = capsys.readouterr().out
    assert "step 12  loss" in out and f"validation {history['val_loss'][-1]:.3f}" in out


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run()
    assert os.listdir(tmp_path) == []


def test_warm_up_and_decay_reach_the_optimiser(monkeypatch):
    rates, seen = [], []
    step = torch.optim.AdamW.step

    def noting(self, *args):
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    record(monkeypatch, "sample_batch", seen)
    run(steps=100, lr=0.02, eval_every=100, block_size=4)
    expected = [learning_rate(i / 100, 0.02) for i in range(100)]
    assert [rate[0] for rate in rates] == pytest.approx(expected)
    assert all(len(set(rate)) == 1 for rate in rates)  # all groups
    assert max(expected) == 0.02 and expected[-1] < 1e-4
    assert all(args[1:3] == (4, 2) for args, _ in seen)


def test_the_precision_reaches_every_step(monkeypatch):
    seen = []
    record(monkeypatch, "train_step", seen)
    coarse = run(precision=torch.bfloat16)
    assert [options["precision"] for _, options in seen] == [torch.bfloat16] * 12
    fine = run()
    assert [options["precision"] for _, options in seen[12:]] == [None] * 12
    assert coarse["train_loss"] != fine["train_loss"]
    assert coarse["train_loss"] == pytest.approx(fine["train_loss"], rel=0.05)
    assert coarse["val_loss"][0] == fine["val_loss"][0]  # it is measured in float32


def test_windows_are_as_long_as_the_model_reads(monkeypatch):
    seen = []
    record(monkeypatch, "sample_batch", seen)
    run(steps=1)
    assert seen[0][0][1:3] == (8, 2)


def test_best_is_the_lowest_validation_loss_and_last_is_the_last(tmp_path, monkeypatch):
    script, states = iter([3.0, 1.5, 2.0, 1.8]), []

    def scripted(model, ids, *options):
        states.append(weights_of(model))
        return next(script)

    monkeypatch.setattr(helpers, "evaluate", scripted)
    run(out=tmp_path)
    best, last = (load_checkpoint(tmp_path / name) for name in ("best.pt", "last.pt"))
    assert (best["step"], last["step"]) == (5, 12)
    assert same(weights_of(best["model"]), states[1])
    assert same(weights_of(last["model"]), states[3])
    assert not same(states[1], states[3])


def test_a_run_ends_in_time_and_saves(tmp_path, monkeypatch):
    ticks, rates = iter(range(10**6)), []
    clock = SimpleNamespace(perf_counter=lambda: next(ticks) * 0.01)
    monkeypatch.setattr(helpers, "time", clock)
    record(monkeypatch, "train_step", rates)
    history = run(steps=3000, max_seconds=2.0, eval_every=3000, out=tmp_path)
    n = len(history["train_loss"])
    assert 20 < n < 200 and history["val_step"] == [0, n]
    assert load_checkpoint(tmp_path / "last.pt")["step"] == n
    rates = [args[4] for args, _ in rates]
    assert rates[-1] < 0.1 * max(rates)  # decayed over the time that there was


def test_a_run_of_no_time_ends_and_saves(tmp_path):
    history = run(steps=500, max_seconds=1e-9, out=tmp_path)
    assert history["train_loss"] == [] and load_checkpoint(tmp_path / "best.pt")["step"] == 0


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"batch_size": 0}, {"eval_every": 0},
                                   {"max_seconds": 0.0}, {"steps": -1}, {"batch_size": -1}])
def test_options_that_make_no_run(wrong, tmp_path):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        run(out=tmp_path, **wrong)
    assert os.listdir(tmp_path) == []


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model, count = small_model(), []

    def poison(module, args, output):
        count.append(module.training)
        return output * math.nan if sum(count) == 8 else output

    model.head.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match="step 7:.*lower learning rate"):
        run(model, out=tmp_path)
    for name in ("last.pt", "best.pt"):
        saved = load_checkpoint(tmp_path / name)
        assert saved["step"] == 5 or name == "best.pt"
        assert all(weight.isfinite().all() for weight in saved["model"].parameters())
    assert all(weight.isfinite().all() for weight in model.parameters())
    history = run(small_model(), resume=load_checkpoint(tmp_path / "last.pt"))
    assert len(history["train_loss"]) == 12  # and goes on from step 5


def test_a_learning_rate_that_is_far_too_high(tmp_path):
    model = small_model()
    with pytest.raises(FloatingPointError, match=r"step \d+"):
        run(model, lr=1e30, steps=50, out=tmp_path)
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert load_checkpoint(tmp_path / "last.pt")["step"] % 5 == 0


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path):
    model = small_model()
    model.head.weight.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="step 0"):
        run(model, out=tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_loss_falls_on_the_tiny_corpus():
    text = load_corpus()[:20_000]
    tok = CharTokenizer(text)
    ids = torch.tensor(tok.encode(text))
    torch.manual_seed(0)
    model = TinyGPT(tok.vocab_size, d_model=32, n_heads=4, n_layers=2, max_len=32)
    history = train(model, ids[:18_000], ids[18_000:], steps=60, batch_size=16, lr=0.01)
    assert history["val_loss"][0] == pytest.approx(math.log(tok.vocab_size), rel=0.02)
    assert history["val_loss"][-1] < 2.9  # the frequencies alone give 3.1
    assert history["train_loss"][-1] < 2.9


def test_a_model_can_learn_one_batch_by_heart():
    model = small_model()
    x, y = sample_batch(some_ids(60), 8, 2)
    optimizer = make_optimizer(model, lr=0.02)
    for _ in range(80):
        loss = train_step(model, optimizer, x, y, lr=0.02)
    # the first token of each window has no past; all the others can be told
    assert loss < 0.15


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with everything in it, and what it was made of."""
    torch.manual_seed(3)
    model, generator = small_model(dropout=0.1), torch.Generator().manual_seed(5)
    optimizer = make_optimizer(model, lr=0.01)
    x, y = sample_batch(some_ids(60), 8, 2, generator)
    loss = train_step(model, optimizer, x, y, lr=0.01)
    history = {"train_loss": [loss], "val_step": [0], "val_loss": [1.9]}
    path, tokenizer = tmp_path / "model.pt", CharTokenizer("abcdé g")
    save_checkpoint(path, model, optimizer, 1, tokenizer, generator, history)
    return SimpleNamespace(**{k: v for k, v in locals().items() if k not in ("x", "y", "loss")})


def test_a_checkpoint_gives_everything_back(saved):
    states = torch.get_rng_state(), saved.generator.get_state()
    state = load_checkpoint(saved.path)
    assert same(weights_of(state["model"]), weights_of(saved.model))
    assert state["model"].config == state["config"] == saved.model.config
    assert state["step"] == 1 and state["history"] == saved.history
    assert state["tokenizer"].stoi == saved.tokenizer.stoi
    assert torch.equal(state["rng"]["torch"], states[0])
    assert torch.equal(state["rng"]["batches"], states[1])
    optimizer = make_optimizer(state["model"], lr=0.5)
    optimizer.load_state_dict(state["optimizer"])
    old, new = saved.optimizer.state_dict(), optimizer.state_dict()
    assert old["param_groups"] == new["param_groups"] and old["state"]
    for i, moments in old["state"].items():
        assert same(moments, new["state"][i])
    idx = torch.randint(7, (2, 8))
    assert torch.equal(state["model"].eval()(idx), saved.model.eval()(idx))
    assert os.listdir(saved.path.parent) == ["model.pt"]


def test_a_model_alone_can_be_saved_but_not_resumed(tmp_path):
    save_checkpoint(tmp_path / "m.pt", small_model())
    state = load_checkpoint(tmp_path / "m.pt")
    assert state["tokenizer"] is None and state["step"] == 0
    with pytest.raises(ValueError, match="model alone"):
        run(resume=state)


def damaged(content):
    """(what was done, bytes): cut at many places, or a bit flipped, or zeros in the middle."""
    for cut in (0, 1, 3, 100, len(content) // 2, len(content) - 1000, len(content) - 22,
                len(content) - 1):
        yield f"cut at {cut}", content[:cut]
    directory, end = content.index(b"PK\x01\x02"), content.rindex(b"PK\x05\x06")
    middle = len(content) // 2
    yield "zeros in the middle", content[:middle] + bytes(50) + content[middle + 50 :]
    for at in [*range(40, directory, 211), directory, end, end + 1, *range(directory + 1, end, 97)]:
        yield f"flipped at {at}", content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


def test_a_damaged_checkpoint_is_never_taken_for_a_good_one(saved):
    content, good = saved.path.read_bytes(), weights_of(saved.model)
    refused = 0
    for what, wrong in damaged(content):
        saved.path.write_bytes(wrong)
        try:
            state = load_checkpoint(saved.path)
        except ValueError as error:
            assert "model.pt" in str(error) and "damaged" in str(error)
            assert len(str(error).splitlines()) == 1
            refused += 1
        else:  # such as the date of a part
            assert "flipped" in what and same(weights_of(state["model"]), good), what
    assert refused > 0.6 * len(list(damaged(content))), refused


@pytest.mark.filterwarnings("ignore")  # torch wonders about the files too
@pytest.mark.parametrize(
    "foreign",
    [b"Once upon a time\n", b"\x80\x02.", json.dumps({"format": "tinygpt-1"}).encode(),
     {"a": 1}, [1, 2], torch.zeros(3), {"format": "tinygpt-9"}, {"format": "tinygpt-1"},
     torch.nn.Linear(2, 2)],
    ids=str,
)
def test_a_foreign_file_is_named(tmp_path, foreign):
    path = tmp_path / "foreign.pt"
    if isinstance(foreign, bytes):
        path.write_bytes(foreign)
    else:
        torch.save(foreign, path)
    with pytest.raises(ValueError, match="foreign.pt.*no TinyGPT checkpoint") as caught:
        load_checkpoint(path)
    for advice in ("weights_only", "only if you", "\x1b"):  # torch advises to load it unsafely
        assert advice not in str(caught.value)


def test_weights_that_do_not_fit_the_config_are_refused(saved):
    state = torch.load(saved.path, weights_only=True)
    for change in ({"config": state["config"] | {"d_model": 32}}, {"tokenizer": 5},
                   {"tokenizer": "abc"},
                   {"model": {k: v for k, v in state["model"].items() if k != "norm.bias"}}):
        torch.save(state | change, saved.path)
        with pytest.raises(ValueError, match="model.pt"):
            load_checkpoint(saved.path)


class Malice:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["torch", "pickle", "inside"])
def test_code_in_a_checkpoint_is_not_run(saved, kind):
    mark = saved.path.parent / "was run"
    if kind == "pickle":
        saved.path.write_bytes(pickle.dumps(Malice(mark)))
    else:
        good = torch.load(saved.path, weights_only=True)
        torch.save(Malice(mark) if kind == "torch" else good | {"step": Malice(mark)}, saved.path)
    with pytest.raises(ValueError, match="model.pt"):
        load_checkpoint(saved.path)
    assert not mark.exists()
    if kind == "pickle":  # the mark would have been made
        pickle.loads(saved.path.read_bytes())
        assert mark.exists()


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt"):
        load_checkpoint(tmp_path / "none.pt")


# ---------------------------------------------------------------- resume

RESUME = """
import sys, torch, tinygpt_helpers as helpers
text = helpers.load_corpus()[:3000]
tok = helpers.CharTokenizer(text)
ids = torch.tensor(tok.encode(text))
command, out = sys.argv[1:]
torch.manual_seed(0)
model = helpers.TinyGPT(tok.vocab_size, 16, 2, 2, 16, dropout=0.2)
resume = helpers.load_checkpoint(out + "/last.pt") if command == "resume" else None
if resume:
    torch.rand(1000)  # whatever was drawn meanwhile must not matter
helpers.train(model, ids[:2500], ids[2500:], steps=40, batch_size=4, eval_every=7, lr=0.01,
              stop_at=20 if command == "pause" else None, out=out, tokenizer=tok, resume=resume)
"""


def test_a_run_paused_and_resumed_in_a_new_process_is_the_same_run(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def start(command, out):
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, "-c", RESUME, command, str(out)], env=env,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    both = [start("whole", whole), start("pause", parts)]
    for process in [*both, start]:
        process = start("resume", parts) if process is start else process
        assert process.wait() == 0, process.stdout.read()
        process.stdout.close()
    one, two = (load_checkpoint(folder / "last.pt") for folder in (whole, parts))
    assert len(one["history"]["train_loss"]) == 40
    assert one["history"]["train_loss"] == two["history"]["train_loss"]  # to the last bit
    assert two["history"]["val_step"] == [0, 7, 14, 20, 21, 28, 35, 40]  # one more, at the pause
    val = dict(zip(two["history"]["val_step"], two["history"]["val_loss"]))
    assert [val[step] for step in one["history"]["val_step"]] == one["history"]["val_loss"]
    assert same(weights_of(one["model"]), weights_of(two["model"]))
    assert torch.equal(one["rng"]["torch"], two["rng"]["torch"])


def test_a_resumed_run_measures_nothing_twice(tmp_path):
    run(out=tmp_path, stop_at=5)
    state = load_checkpoint(tmp_path / "last.pt")
    steps = state["history"]["val_step"]
    assert steps == [0, 5]
    history = run(resume=state)
    assert history["val_step"] == [0, 5, 10, 12]
    assert state["history"]["val_step"] == [0, 5]  # the loaded one is left as it was


def test_the_best_model_outlives_a_stop_between_the_two_files(tmp_path, monkeypatch):
    """The machine stops after one of the two files of step 5, the best so far."""
    script = iter([3.0, 1.0, 1.0, 2.0, 2.5])
    monkeypatch.setattr(helpers, "evaluate", lambda *args, **kwargs: next(script))
    save, count = helpers.save_checkpoint, []

    def stopping(*args, **options):
        count.append(args[0])
        if len(count) == 4:
            raise KeyboardInterrupt
        save(*args, **options)

    monkeypatch.setattr(helpers, "save_checkpoint", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path)
    run(out=tmp_path, resume=load_checkpoint(tmp_path / "last.pt"))
    assert load_checkpoint(tmp_path / "best.pt")["step"] == 5


# ---------------------------------------------------------------- the curve


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_the_curves_are_the_history():
    history = {"train_loss": [4.0 - i / 50 for i in range(100)], "val_step": [0, 50, 100],
               "val_loss": [4.1, 3.1, 2.2]}
    figure = plot_loss(history, floor=0.25, title="It falls")
    assert isinstance(figure, Figure)
    (ax,) = figure.axes
    assert ax.get_title() == "It falls" and ax.get_ylim()[0] == 0
    assert ax.get_xlabel() == "step" and ax.get_ylabel() == "loss (nats per token)"
    single, smooth, val, floor = ax.lines
    assert single.get_ydata().tolist() == pytest.approx(history["train_loss"])
    means = [(a + b) / 2 for a, b in zip(history["train_loss"], history["train_loss"][1:])]
    assert list(smooth.get_ydata()) == pytest.approx(means)  # 2 % of the run: two steps
    assert list(smooth.get_xdata()) == list(range(1, 100))
    assert list(val.get_xdata()) == [0, 50, 100] and list(val.get_ydata()) == history["val_loss"]
    assert list(floor.get_ydata()) == [0.25, 0.25]
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words[:2] == ["training", "validation"] and "0.250" in words[2] and "floor" in words[2]


@pytest.mark.parametrize("losses", [[], [3.0], [3.0, 2.0]])
def test_short_runs_have_a_curve_and_no_floor_that_nobody_knows(losses):
    (ax,) = plot_loss({"train_loss": losses, "val_step": [0], "val_loss": [3.0]}).axes
    assert len(ax.lines) == 3 and len(ax.get_legend().get_texts()) == 2


LIVE_PAGE = """
import sys
sys.path.insert(0, {root!r})
import torch
from tinygpt_helpers import TinyGPT, live_loss, train
seen = []
curve = live_loss(floor=0.5, title="It grows")
def note(history):
    seen.append(list(history["val_step"]))
    curve(history)
ids = torch.randint(5, (200,), generator=torch.Generator().manual_seed(0))
history = train(TinyGPT(5, 8, 2, 1, 8), ids, ids, steps=6, batch_size=2, eval_every=2, on_eval=note)
assert seen == [[0], [0, 2], [0, 2, 4], [0, 2, 4, 6]]
"""


def test_the_live_curve_ends_as_one_picture_in_a_notebook():
    page = nbformat.v4.new_notebook(cells=[
        nbformat.v4.new_code_cell(LIVE_PAGE.format(root=str(ROOT)))])
    NotebookClient(page, timeout=120, kernel_name="python3").execute()
    pictures = [out for out in page.cells[0].outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 1 and len(page.cells[0].outputs) == 2  # and the bar's last line


def test_the_live_curve_changes_its_picture_in_place(monkeypatch):
    drawn, updated = [], []
    handle = SimpleNamespace(update=updated.append)
    monkeypatch.setattr(helpers, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display",
                        lambda figure, display_id: drawn.append(figure) or handle)
    on_eval = live_loss(floor=0.25, title="It grows")
    for n in (1, 2, 3):
        on_eval({"train_loss": [3.0] * n, "val_step": list(range(n)), "val_loss": [3.0] * n})
    assert len(drawn) == 1 and len(updated) == 2 and not plt.get_fignums()
    single, _, val, floor = updated[-1].axes[0].lines
    assert len(single.get_ydata()) == 3 == len(val.get_ydata())
    assert list(floor.get_ydata()) == [0.25, 0.25]
    assert updated[-1].axes[0].get_title() == "It grows"


def test_outside_a_notebook_no_curve_is_drawn():
    live_loss()({"train_loss": [], "val_step": [0], "val_loss": [3.0]})
    assert not plt.get_fignums() and not helpers.in_notebook()


def test_the_bar_says_how_much_time_is_left(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(helpers.time, "perf_counter", lambda: now[0])
    bar = helpers.ProgressBar(first=0.5)  # a run that is resumed halfway
    for seconds, progress in [(0, 0.5), (5, 0.6), (30, 0.75), (60, 1.0)]:
        now[0] = 100.0 + seconds
        bar.update(progress, "so far", last=progress == 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [  # in a log: at once, then every 10 seconds, and the last
        "[==========..........] so far  0 s",
        "[===============.....] so far  30 s, 30 s left",
        "[====================] so far  60 s",
    ]
