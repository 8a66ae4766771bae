"""Page 04: the loss, the optimiser, the loop, checkpoints, and a run that is resumed."""

import math
import os
import pickle
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

import tinygpt_helpers as gpt

ROOT = Path(__file__).resolve().parent.parent


def small_model(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return gpt.TinyGPT(vocab_size=7, d_model=16, n_heads=2, n_layers=2, max_len=8, dropout=dropout)


def some_ids(n, seed=0):
    return torch.randint(7, (n,), generator=torch.Generator().manual_seed(seed))


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def finite(model):
    return all(weight.isfinite().all() for weight in model.parameters())


def token_losses(model, x, y):
    """-log p of each target, by hand: `(B, T)`."""
    with torch.no_grad():
        return -model(x).log_softmax(-1).gather(-1, y[..., None])[..., 0]


def frozen(model):
    return torch.optim.SGD(model.parameters(), lr=0.0)


# ---------------------------------------------------------------- an epoch, a score


def test_the_loss_of_an_epoch_is_the_mean_over_tokens():
    model, before, seen = small_model(), weights_of(small_model()), []
    model.register_forward_pre_hook(lambda module, args: seen.extend(args[0].tolist()))
    # the last batch holds 1 window of 9, and another kind of text, so that its mean differs
    ds = gpt.NextTokenDataset(torch.cat([some_ids(12), torch.full((5,), 3)]), 8)
    loss = gpt.train_one_epoch(model, DataLoader(ds, batch_size=4), frozen(model), "cpu")
    assert seen == [x.tolist() for x, _ in ds]  # every window once
    losses = torch.stack([token_losses(model, *(part[None] for part in ds[i])) for i in range(9)])
    assert loss == pytest.approx(losses.mean().item(), rel=1e-5)
    by_batch = torch.stack([part.mean() for part in losses.split(4)]).mean().item()
    assert abs(loss - by_batch) > 1e-4  # the other mean is not the same here
    assert same(weights_of(model), before)


def test_an_epoch_teaches_in_training_mode():
    model, modes = small_model(dropout=0.1).eval(), []
    loader = DataLoader(gpt.NextTokenDataset(torch.arange(60) % 7, 8), batch_size=8)
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = [gpt.train_one_epoch(model, loader, opt, "cpu") for _ in range(4)]
    assert all(modes) and len(modes) == 4 * 7
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]
    with pytest.raises(ValueError, match="no batch.*drop_last"):
        gpt.train_one_epoch(model, [], opt, "cpu")


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_every_token_is_predicted_once(batch_size):
    model = small_model(dropout=0.5)
    for n in range(2, 3 * 8 + 1):
        ids, total = some_ids(n, seed=n), 0.0
        with gpt.eval_mode(model):
            for t in range(n - 1):  # one question at a time; its window begins at t // 8 * 8
                x, y = ids[t // 8 * 8 : t + 1], ids[t // 8 * 8 + 1 : t + 2]
                total += token_losses(model, x[None], y[None])[0, -1].item()
        assert gpt.evaluate(model, ids, batch_size) == pytest.approx(total / (n - 1), rel=1e-5)
        assert model.training
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"{n} tokens"):
            gpt.evaluate(model, some_ids(n))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_alone_also_after_an_error(training):
    model = small_model(dropout=0.5).train(training)
    assert gpt.evaluate(model, some_ids(30)) == gpt.evaluate(model, some_ids(30))
    assert model.training == model.dropout.training == training
    with pytest.raises(ValueError, match="vocabulary"):
        gpt.evaluate(model, some_ids(30) + 7)
    assert model.training == model.dropout.training == training
    with pytest.raises(KeyError), gpt.eval_mode(model):
        assert not model.training and not model.dropout.training
        raise KeyError
    assert model.training == model.dropout.training == training


# ---------------------------------------------------------------- a step


def test_matrices_decay_and_norms_do_not():
    model = small_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.uniform_(1, 2)
            weight.grad = torch.zeros_like(weight)
    optimizer, before = gpt.make_optimizer(model, lr=0.01, weight_decay=0.5), weights_of(model)
    optimizer.step()  # without gradients the decay is all that happens
    for name, weight in model.named_parameters():
        factor = 1 - 0.01 * 0.5 if weight.ndim == 2 else 1.0
        torch.testing.assert_close(weight.data, before[name] * factor)
    assert {p.ndim for p in model.parameters()} == {1, 2}
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))


def test_the_rate_rises_and_falls():
    rates = [gpt.get_lr(i / 1000, 0.004) for i in range(1001)]
    assert 0 < rates[0] < 0.2 * 0.004
    assert max(rates) == pytest.approx(0.004) and rates.index(max(rates)) == 50
    assert rates[:51] == sorted(rates[:51]) and rates[50:] == sorted(rates[50:], reverse=True)
    assert rates[25] == pytest.approx((rates[0] + rates[50]) / 2)  # a straight line
    assert rates[525] == pytest.approx(0.002)  # half way down the cosine
    assert rates[50 + 950 // 4] == pytest.approx(0.004 * (2 + math.sqrt(2)) / 4, rel=1e-2)
    assert rates[1000] == pytest.approx(0, abs=1e-9) == gpt.get_lr(1.7, 0.004)
    assert gpt.get_lr(0.1, 1.0, warmup=0.1) == pytest.approx(1.0)


def test_a_step_of_training_is_a_step_of_adamw():
    model, twin = small_model().eval(), small_model()
    x, y = gpt.sample_batch(some_ids(50), 8, 4)
    loss = gpt.train_step(model, gpt.make_optimizer(model, lr=1.0), x, y, lr=0.003, clip=1e9)
    theirs = gpt.make_optimizer(twin, lr=0.003)
    F.cross_entropy(twin(x).transpose(1, 2), y).backward()
    theirs.step()
    assert model.training and loss.ndim == 0 and not loss.requires_grad
    assert loss.item() == pytest.approx(token_losses(small_model(), x, y).mean().item(), rel=1e-5)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, twin.state_dict()[name])
    once = twin.head.weight.grad
    for _ in range(2):  # gradients of the step before are gone
        gpt.train_step(third := small_model(), frozen(third), x, y, lr=0.0, clip=1e9)
        torch.testing.assert_close(third.head.weight.grad, once)


@pytest.mark.parametrize(("factor", "clip"), [(1e4, 1.0), (1e4, 0.1), (1e-6, 1.0)])
def test_huge_gradients_are_scaled_down_and_small_ones_are_not(factor, clip):
    model, before = small_model(), weights_of(small_model())
    for weight in model.parameters():
        weight.register_hook(lambda grad: grad * factor)
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    gpt.train_step(model, sgd, *gpt.sample_batch(some_ids(50), 8, 4), lr=1.0, clip=clip)
    moved = math.hypot(*((w.data - before[name]).norm() for name, w in model.named_parameters()))
    assert moved == pytest.approx(clip, rel=1e-3) if factor > 1 else 0 < moved < 1e-3


# ---------------------------------------------------------------- fewer digits


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_step_in_mixed_precision_is_nearly_the_same_step(precision):
    x, y = gpt.sample_batch(some_ids(50), 8, 4)
    one, two, types = small_model(), small_model(), []
    two.head.register_forward_hook(lambda module, args, logits: types.append(logits.dtype))
    two.tokens.register_forward_hook(lambda module, args, x: types.append(x.dtype))
    scaler = torch.amp.GradScaler("cpu", enabled=precision == torch.float16)
    exact = gpt.train_step(one, frozen(one), x, y, lr=0.0, clip=1e9)
    rounded = gpt.train_step(two, frozen(two), x, y, 0.0, 1e9, precision, scaler)
    assert types == [torch.float32, precision]  # what adds up has all digits, products have few
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-3) and rounded != exact
    for (name, p), q in zip(one.named_parameters(), two.parameters()):
        assert q.dtype == q.grad.dtype == torch.float32
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.99, name
        assert q.grad.norm().item() == pytest.approx(p.grad.norm().item(), rel=0.05)  # scaled back


def test_a_gradient_too_large_for_float16_is_left_out():
    model = small_model()
    scaler, before = torch.amp.GradScaler("cpu"), weights_of(model)
    handle = model.norm.weight.register_hook(lambda grad: grad * math.inf)
    optimizer, batch = gpt.make_optimizer(model, 0.01), gpt.sample_batch(some_ids(50), 8, 4)
    scale = [scaler.get_scale()]
    for keeps in (True, False):
        gpt.train_step(model, optimizer, *batch, 0.01, precision=torch.float16, scaler=scaler)
        scale.append(scaler.get_scale())
        assert same(weights_of(model), before) == keeps and finite(model)
        handle.remove()
    assert scale[0] > scale[1] == scale[2]


@pytest.mark.parametrize(("device", "able", "expected"), [
    ("cpu", {"avx512_bf16": True}, torch.bfloat16), ("cpu", {"amx_bf16": True}, torch.bfloat16),
    ("cpu", {"avx512_bf16": False, "avx2": True}, torch.float32), ("cpu", {}, torch.float32),
    ("cpu", None, torch.float32),  # a PyTorch that does not know the processor
    ("cuda", True, torch.bfloat16), ("cuda", False, torch.float16), ("mps", None, torch.float32),
])
def test_bfloat16_only_where_the_chip_is_faster_with_it(device, able, expected, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    if device == "cpu" and able is not None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",  # imitated it is everywhere
                        lambda including_emulation=True: including_emulation or able)
    assert gpt.pick_precision(torch.device(device)) is expected


# ---------------------------------------------------------------- train


def run(model=None, steps=12, **options):
    options = dict(batch_size=2, lr=0.01, eval_every=5) | options
    return gpt.train(model or small_model(), some_ids(60), some_ids(20, 1), steps=steps, **options)


def record(monkeypatch, name, seen):
    """Let `gpt.name` note its arguments in `seen`."""
    function = getattr(gpt, name)

    def noting(*args, **options):
        seen.append((args, options))
        return function(*args, **options)

    monkeypatch.setattr(gpt, name, noting)


def test_the_history_and_the_files_of_a_run(tmp_path, capsys, monkeypatch):
    calls, model = [], small_model()
    history = run(model, out=tmp_path / "new" / "run",
                  on_eval=lambda h: calls.append((len(h["train_loss"]), list(h["val_step"]))))
    assert len(history["train_loss"]) == 12 and all(map(math.isfinite, history["train_loss"]))
    assert history["val_step"] == [0, 5, 10, 12] and len(history["val_loss"]) == 4
    assert calls == [(0, [0]), (5, [0, 5]), (10, [0, 5, 10]), (12, [0, 5, 10, 12])]
    assert sorted(os.listdir(tmp_path / "new" / "run")) == ["best.pt", "last.pt"]
    last = gpt.load_checkpoint(tmp_path / "new" / "run" / "last.pt")
    assert last["step"] == 12 and last["history"] == history
    assert same(weights_of(last["model"]), weights_of(model))
    assert history["val_loss"][-1] == gpt.evaluate(model, some_ids(20, 1))
    out = capsys.readouterr().out
    assert "step 12  loss" in out and f"validation {history['val_loss'][-1]:.3f}" in out
    monkeypatch.chdir(tmp_path / "new")
    assert run() == history and os.listdir() == ["run"]  # without a folder nothing is written


def test_the_settings_reach_the_steps(monkeypatch):
    batches, steps = [], []
    record(monkeypatch, "sample_batch", batches)
    record(monkeypatch, "train_step", steps)
    run(steps=100, lr=0.02, eval_every=100, block_size=4, starts=torch.tensor([3, 4]))
    assert [args[4] for args, _ in steps] == [gpt.get_lr(i / 100, 0.02) for i in range(100)]
    assert all(args[1:3] == (4, 2) and args[4].tolist() == [3, 4] for args, _ in batches)
    assert {options["precision"] for _, options in steps} == {torch.float32}
    run(steps=1, precision=torch.bfloat16)
    assert batches[-1][0][1:3] == (8, 2)  # windows as long as the model reads
    assert steps[-1][1]["precision"] == torch.bfloat16


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_run_in_mixed_precision(precision, tmp_path):
    fine, coarse = run(), run(precision=precision, out=tmp_path)
    assert coarse["train_loss"] != fine["train_loss"]
    assert coarse["train_loss"] == pytest.approx(fine["train_loss"], rel=0.05)
    assert coarse["val_loss"][0] == fine["val_loss"][0]  # it is measured in float32
    last = gpt.load_checkpoint(tmp_path / "last.pt")
    assert bool(last["scaler"]) == (precision == torch.float16)
    assert len(run(precision=precision, steps=14, resume=last)["train_loss"]) == 14


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="no C++ compiler")
def test_a_compiled_model_learns_the_same():
    sizes = dict(vocab_size=7, d_model=8, n_heads=1, n_layers=1, max_len=8)
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        losses.append(run(gpt.TinyGPT(**sizes), steps=3, compile=compiled)["train_loss"])
    torch.testing.assert_close(*map(torch.tensor, losses), atol=1e-4, rtol=0)


def test_best_is_the_lowest_validation_loss_and_last_is_the_last(tmp_path):
    script, states = iter([3.0, 1.5, 2.0, 1.8]), []

    def scripted(model):
        states.append(weights_of(model))
        return next(script)

    assert run(out=tmp_path, validate=scripted)["val_loss"] == [3.0, 1.5, 2.0, 1.8]
    best, last = (gpt.load_checkpoint(tmp_path / name) for name in ("best.pt", "last.pt"))
    assert (best["step"], last["step"]) == (5, 12)
    assert same(weights_of(best["model"]), states[1])
    assert same(weights_of(last["model"]), states[3])
    assert not same(states[1], states[3])


def test_a_run_ends_in_time_and_saves(tmp_path, monkeypatch):
    ticks, rates = iter(range(10**6)), []
    clock = SimpleNamespace(perf_counter=lambda: next(ticks) * 0.01)
    monkeypatch.setattr(gpt, "time", clock)
    record(monkeypatch, "train_step", rates)
    history = run(steps=3000, max_seconds=2.0, eval_every=3000, out=tmp_path)
    n = len(history["train_loss"])
    assert 20 < n < 200 and history["val_step"] == [0, n]
    assert gpt.load_checkpoint(tmp_path / "last.pt")["step"] == n
    rates = [args[4] for args, _ in rates]
    assert rates[-1] < 0.1 * max(rates)  # decayed over the time that there was
    assert run(max_seconds=1e-9, out=tmp_path)["train_loss"] == []  # no time, no step: a file
    assert gpt.load_checkpoint(tmp_path / "best.pt")["step"] == 0


@pytest.mark.parametrize("value", [0, -1, math.nan])
@pytest.mark.parametrize("name", ["steps", "batch_size", "lr", "eval_every", "max_seconds"])
def test_settings_that_make_no_run(name, value, tmp_path):
    for start in (gpt.TrainConfig, lambda **wrong: run(out=tmp_path, **wrong)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            start(**{name: value})
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="id 9 is outside"):
        gpt.train(small_model(), torch.tensor([1, 2, 9] * 9), some_ids(20), out=tmp_path)
    with pytest.raises(TypeError, match="epochs"):
        run(out=tmp_path, epochs=3)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("eval_every", [5, 1000])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, eval_every):
    model, count = small_model(), []

    def poison(module, args, output):
        count.append(module.training)
        return output * math.nan if sum(count) == 8 and module.training else output

    model.head.register_forward_hook(poison)
    with pytest.raises(FloatingPointError, match="step 7: the loss is nan; try a lower"):
        run(model, steps=100, out=tmp_path, eval_every=eval_every)
    assert sum(count) == 10 and not finite(model)  # seen within ten steps
    last = gpt.load_checkpoint(tmp_path / "last.pt")
    assert last["step"] == len(last["history"]["train_loss"]) == (5 if eval_every == 5 else 0)
    assert finite(last["model"]) and finite(gpt.load_checkpoint(tmp_path / "best.pt")["model"])
    assert len(run(small_model(), resume=last)["train_loss"]) == 12  # and goes on from there


def test_a_validation_loss_that_is_not_finite_is_never_saved(tmp_path):
    model = small_model()
    model.head.weight.data[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="step 0: the validation loss is nan"):
        run(model, out=tmp_path)
    assert os.listdir(tmp_path) == []
    script = iter([3.0, math.inf])
    with pytest.raises(FloatingPointError, match="step 5: the validation loss is inf"):
        run(out=tmp_path, validate=lambda model: next(script))
    assert gpt.load_checkpoint(tmp_path / "last.pt")["history"]["val_step"] == [0]


def test_the_loss_falls_on_the_tiny_corpus():
    text = gpt.load_corpus()[:20_000]
    tok = gpt.CharTokenizer(text)
    ids = torch.tensor(tok.encode(text))
    torch.manual_seed(0)
    model = gpt.TinyGPT(tok.vocab_size, d_model=32, n_heads=4, n_layers=2, max_len=32)
    history = gpt.train(model, ids[:18_000], ids[18_000:], steps=60, batch_size=16, lr=0.01)
    assert history["val_loss"][0] == pytest.approx(math.log(tok.vocab_size), rel=0.02)
    assert history["val_loss"][-1] < 2.9  # the frequencies alone give 3.1
    assert history["train_loss"][-1] < 2.9


# ---------------------------------------------------------------- checkpoints


@pytest.fixture
def saved(tmp_path):
    """A checkpoint with everything in it, and what it was made of."""
    torch.manual_seed(3)
    model, generator = small_model(dropout=0.1), torch.Generator().manual_seed(5)
    optimizer = gpt.make_optimizer(model, lr=0.01)
    batch = gpt.sample_batch(some_ids(60), 8, 2, generator)
    loss = gpt.train_step(model, optimizer, *batch, lr=0.01)
    history = {"train_loss": [loss.item()], "val_step": [0], "val_loss": [1.9]}
    path, tokenizer = tmp_path / "model.pt", gpt.CharTokenizer("abcdé g")
    gpt.save_checkpoint(path, model, optimizer, 1, tokenizer, generator, history, seed=0,
                    scaler=torch.amp.GradScaler("cpu", enabled=False))
    return SimpleNamespace(**{k: v for k, v in locals().items() if k not in ("loss", "batch")})


def alter(saved, **changes):
    """Write the checkpoint anew with other entries."""
    torch.save(torch.load(saved.path, weights_only=True) | changes, saved.path)


def test_a_checkpoint_gives_everything_back(saved):
    states = torch.get_rng_state(), saved.generator.get_state()
    state = gpt.load_checkpoint(saved.path)
    assert same(weights_of(state["model"]), weights_of(saved.model))
    assert state["model"].config == saved.model.config
    assert state["step"] == 1 and state["seed"] == 0 and state["history"] == saved.history
    assert state["tokenizer"].state == saved.tokenizer.state
    assert torch.equal(state["rng"]["torch"], states[0])
    assert torch.equal(state["rng"]["batches"], states[1])
    old, new = saved.optimizer.state_dict(), state["optimizer"]
    assert old["param_groups"] == new["param_groups"] and old["state"]
    assert all(same(moments, new["state"][i]) for i, moments in old["state"].items())
    idx = torch.randint(7, (2, 8))
    assert torch.equal(state["model"].eval()(idx), saved.model.eval()(idx))
    assert all(weight.requires_grad for weight in state["model"].parameters())
    assert os.listdir(saved.path.parent) == ["model.pt"]


def test_a_model_alone_can_be_saved_but_not_resumed(tmp_path):
    gpt.save_checkpoint(tmp_path / "m.pt", small_model())
    state = gpt.load_checkpoint(tmp_path / "m.pt")
    assert state["tokenizer"] is None and state["step"] == 0
    with pytest.raises(ValueError, match="model alone"):
        run(resume=state)
    with pytest.raises(FileNotFoundError, match="none.pt"):
        gpt.load_checkpoint(tmp_path / "none.pt")


@pytest.mark.parametrize("damage", ["empty", "cut", "last byte", "zeros", "a bit"])
def test_a_damaged_checkpoint_is_never_taken_for_a_good_one(saved, damage):
    content = saved.path.read_bytes()
    at = content.index(saved.model.head.weight.detach().numpy().tobytes()) + 40
    wrong = {"empty": b"", "cut": content[:at], "last byte": content[:-1],
             "zeros": content[:at] + bytes(50) + content[at + 50 :],
             "a bit": content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]}[damage]
    saved.path.write_bytes(wrong)
    with pytest.raises(ValueError, match="model.pt' is damaged") as caught:
        gpt.load_checkpoint(saved.path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.filterwarnings("ignore")  # torch wonders about the files too
@pytest.mark.parametrize("foreign", [
    b"Once upon a time\n", b"\x80\x02.", b'{"format": "tinygpt-2"}', {"a": 1}, [1, 2],
    torch.zeros(3), {"format": "tinygpt-1"}, {"format": "tinygpt-2"}, torch.nn.Linear(2, 2),
], ids=str)
def test_a_foreign_file_is_named(tmp_path, foreign):
    path = tmp_path / "foreign.pt"
    if isinstance(foreign, bytes):
        path.write_bytes(foreign)
    else:
        torch.save(foreign, path)
    with pytest.raises(ValueError, match="foreign.pt.*no TinyGPT checkpoint") as caught:
        gpt.load_checkpoint(path)
    for advice in ("weights_only", "only if you", "\x1b"):  # torch advises to load it unsafely
        assert advice not in str(caught.value)


@pytest.mark.parametrize("change", [
    {"config": {"d_model": 32}}, {"config": {"n_heads": 3}}, {"config": {"colour": 1}},
    {"config": {"n_layers": 1}}, {"config": {"n_layers": 3}},
    {"config": {"n_layers": 10**7}}, {"config": {"max_len": 10**8}}, {"config": {"d_model": 10**6}},
    {"tokenizer": 5}, {"tokenizer": "abc"},
    {"tokenizer": {"kind": "char", "characters": "ab"}},  # 2 tokens, the model has 7
    {"tokenizer": {"kind": "words", "characters": "abcdefg"}},
    {"model": {"norm.bias": None}}, {"model": {"norm.bias": torch.zeros(3)}}, {"model": 7},
    {"model": {"head.weight": torch.zeros(1).expand(7, 16)}},  # one number, said to be many
    {"model": {"head.weight": torch.empty(7, 16, device="meta")}},  # none
], ids=range(17))
def test_parts_that_do_not_fit_are_refused_before_memory_is_taken(saved, change):
    [(part, value)] = change.items()
    if part != "tokenizer" and isinstance(value, dict):
        value = torch.load(saved.path, weights_only=True)[part] | value
    alter(saved, **{part: value})
    check_refused(saved.path, "model.pt")


def check_refused(path, words):
    """It is refused at once, and without much memory."""
    resource = pytest.importorskip("resource")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError, match=words):
        gpt.load_checkpoint(path)
    assert time.perf_counter() - began < 5 and path.stat().st_size < 10**6
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**5  # KB, on Linux


def test_sizes_that_the_file_does_not_hold_are_refused(saved):
    weights = saved.model.state_dict() | {"positions.weight": torch.zeros(1).expand(10**8, 16)}
    alter(saved, config=vars(saved.model.config) | {"max_len": 10**8}, model=weights)
    check_refused(saved.path, "too small for GPTConfig")


def test_a_zip_that_unpacks_to_more_than_it_holds_is_refused(saved):
    with zipfile.ZipFile(saved.path) as parts:
        content = {name: parts.read(name) for name in parts.namelist()}
    with zipfile.ZipFile(saved.path, "w", zipfile.ZIP_DEFLATED) as parts:
        for name, data in (content | {next(iter(content)) + "0": bytes(10**8)}).items():
            parts.writestr(name, data)
    check_refused(saved.path, "unpack to more than it holds")


class Malice:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["torch", "pickle", "inside"])
def test_code_in_a_checkpoint_is_not_run(saved, kind):
    mark = saved.path.parent / "was run"
    {"inside": lambda: alter(saved, step=Malice(mark)),
     "torch": lambda: torch.save(Malice(mark), saved.path),
     "pickle": lambda: saved.path.write_bytes(pickle.dumps(Malice(mark)))}[kind]()
    with pytest.raises(ValueError, match="model.pt"):
        gpt.load_checkpoint(saved.path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Malice(mark)))
    assert mark.exists()  # it would have been made


# ---------------------------------------------------------------- resume

def forty_steps(out, resume=None, **options):
    model = small_model(dropout=0.2)
    torch.rand(1000 if resume else 1)  # whatever was drawn meanwhile must not matter
    return run(model, steps=40, eval_every=7, out=out, resume=resume, **options)


def test_a_run_paused_and_resumed_in_a_new_process_is_the_same_run(tmp_path):
    one, two = forty_steps(tmp_path / "whole"), forty_steps(tmp_path / "parts", stop_at=20)
    assert two["train_loss"] == one["train_loss"][:20]
    program = f"""import sys; sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]}
import test_training as t; out = sys.argv[1]
t.forty_steps(out, t.gpt.load_checkpoint(out + "/last.pt"))"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "parts")], check=True)
    whole, parts = (gpt.load_checkpoint(tmp_path / n / "last.pt") for n in ("whole", "parts"))
    one, two = whole["history"], parts["history"]
    assert len(one["train_loss"]) == 40 and one["train_loss"] == two["train_loss"]  # all bits
    assert two["val_step"] == [0, 7, 14, 20, 21, 28, 35, 40]  # one more, at the pause
    val = dict(zip(two["val_step"], two["val_loss"]))
    assert [val[step] for step in one["val_step"]] == one["val_loss"]
    assert same(weights_of(whole["model"]), weights_of(parts["model"]))
    assert all(torch.equal(whole["rng"][n], parts["rng"][n]) for n in ("torch", "batches"))


def test_a_resumed_run_measures_nothing_twice(tmp_path):
    run(out=tmp_path, stop_at=5)
    state = gpt.load_checkpoint(tmp_path / "last.pt")
    assert state["history"]["val_step"] == [0, 5]
    assert run(resume=state)["val_step"] == [0, 5, 10, 12]
    assert state["history"]["val_step"] == [0, 5]  # the loaded one is left as it was
    with pytest.raises(ValueError, match="seed is 1.* 0"):
        run(resume=state, seed=1)
    assert run(resume=state, stop_at=5) == state["history"]  # nothing to do


@pytest.mark.parametrize("rng", [
    None, 5, {}, {"batches": None}, {"torch": None}, {"torch": "abc"}, {"batches": torch.zeros(9)},
    {"torch": torch.zeros(9, dtype=torch.uint8)}, {"batches": [1, 2]},
], ids=str)
def test_random_numbers_that_cannot_be_put_back(saved, rng):
    good = torch.load(saved.path, weights_only=True)["rng"]
    alter(saved, rng=good | rng if rng and rng != 5 else rng)
    with pytest.raises(ValueError, match="cannot go on"):
        run(resume=gpt.load_checkpoint(saved.path))


@pytest.mark.parametrize("lie", [
    {"exp_avg": torch.zeros(2, 2)}, {"exp_avg_sq": torch.zeros(2, 2)}, {"step": torch.zeros(3)},
    {"exp_avg": torch.zeros(1).expand(7, 16)}, {"exp_avg": "abc"}, {"exp_avg": None},
], ids=range(6))
def test_an_optimiser_of_other_shapes_is_refused(saved, lie):
    """The fused kernel would write past the end of a tensor that is too small."""
    optimizer = torch.load(saved.path, weights_only=True)["optimizer"]
    assert optimizer["state"][0]["exp_avg"].shape == (7, 16)
    optimizer["state"][0] |= lie
    alter(saved, optimizer=optimizer)
    with pytest.raises(ValueError, match="cannot go on"):
        run(resume=gpt.load_checkpoint(saved.path), stop_at=1)  # a step may crash Python


def test_the_settings_of_the_optimiser_are_not_the_files(saved, monkeypatch):
    """AMSGrad keeps one tensor more for each weight, of any size that the file says."""
    optimizer = torch.load(saved.path, weights_only=True)["optimizer"]
    make, made = gpt.make_optimizer, []
    monkeypatch.setattr(gpt, "make_optimizer", lambda *args: made.append(make(*args)) or made[0])
    optimizer["param_groups"][0]["amsgrad"] = True
    alter(saved, optimizer=optimizer)
    run(resume=gpt.load_checkpoint(saved.path), stop_at=1)
    assert not made[0].param_groups[0]["amsgrad"]


def test_the_best_model_outlives_a_stop_between_the_two_files(tmp_path, monkeypatch):
    """The machine stops after one of the two files of step 5, the best so far."""
    script = iter([3.0, 1.0, 1.0, 2.0, 2.5])
    save, count = gpt.save_checkpoint, []

    def stopping(*args, **options):
        count.append(args[0])
        if len(count) == 4:
            raise KeyboardInterrupt
        save(*args, **options)

    monkeypatch.setattr(gpt, "save_checkpoint", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path, validate=lambda model: next(script))
    run(out=tmp_path, validate=lambda model: next(script),
        resume=gpt.load_checkpoint(tmp_path / "last.pt"))
    assert gpt.load_checkpoint(tmp_path / "best.pt")["step"] == 5


# ---------------------------------------------------------------- the curve, the line


def test_the_curves_are_the_history():
    history = {"train_loss": [4.0 - i / 50 for i in range(100)], "val_step": [0, 50, 100],
               "val_loss": [4.1, 3.1, 2.2]}
    (ax,) = gpt.plot_loss(history, floor=0.25, title="It falls").axes
    assert ax.get_title() == "It falls" and ax.get_ylim()[0] == 0
    assert ax.get_xlabel() == "step" and ax.get_ylabel() == "loss (nats per token)"
    single, smooth, val, floor = ax.lines
    assert single.get_ydata().tolist() == pytest.approx(history["train_loss"])
    means = [(a + b) / 2 for a, b in zip(history["train_loss"], history["train_loss"][1:])]
    assert list(smooth.get_ydata()) == pytest.approx(means)  # 2 % of the run: two steps
    assert list(val.get_xdata()) == [0, 50, 100] and list(val.get_ydata()) == history["val_loss"]
    assert list(floor.get_ydata()) == [0.25, 0.25]
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words[:2] == ["training", "validation"] and "floor" in words[2] and "0.250" in words[2]
    for losses in ([], [3.0], [3.0, 2.0]):  # short runs, and no floor that nobody knows
        (ax,) = gpt.plot_loss({"train_loss": losses, "val_step": [0], "val_loss": [3.0]}).axes
        assert len(ax.lines) == 3 and len(ax.get_legend().get_texts()) == 2
    plt.close("all")


@pytest.mark.parametrize("live", [False, True])
def test_the_line_says_how_much_time_is_left(monkeypatch, capsys, live):
    now = [100.0]
    monkeypatch.setattr(gpt.time, "perf_counter", lambda: now[0])
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if live:
        monkeypatch.setitem(sys.modules, "ipykernel", object())
    show = gpt.progress_line(first=0.5)  # a run that is resumed halfway
    for seconds, progress in [(0.1, 0.5), (5, 0.6), (30, 0.75), (60, 1.0)]:
        now[0] = 100.0 + seconds
        show(progress, "so far", last=progress == 1)
    out, lines = capsys.readouterr().out, [
        "[============........] so far  5 s, 20 s left",
        "[===============.....] so far  30 s, 30 s left",
        "[====================] so far  60 s, 0 s left",
    ]
    if live:  # written over, and only the last ends
        assert out == "".join(f"\r{line:<95}" for line in lines) + "\n"
    else:  # in a log: every 10 seconds, and the last
        assert out.splitlines() == lines[1:]
