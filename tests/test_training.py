"""Page 04: the loss, the optimiser, the loop, checkpoints, and a run that is resumed."""

import math
import os
import pickle
import sys
import zipfile
from functools import partial
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F

import tinygpt_helpers as gpt


def small_model(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return gpt.TinyGPT(7, d_model=16, n_heads=2, n_layers=2, max_len=8, dropout=dropout)


def some_ids(n, seed=0):
    return torch.randint(7, (n,), generator=torch.Generator().manual_seed(seed))


def some_batch():
    return gpt.sample_batch(some_ids(50), 8, 4, torch.Generator().manual_seed(0))


def plain(value):
    """A copy that == compares to the last bit: tensors as lists, objects as what they hold."""
    if isinstance(value, torch.nn.Module):
        value = value.state_dict()
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    return getattr(value, "state", value)  # a tokenizer's


# ---------------------------------------------------------------- a score, a step


def test_an_epoch_takes_a_step_a_batch_and_returns_the_mean_over_tokens():
    model, twin, seen = small_model().eval(), small_model(), []
    model.register_forward_pre_hook(lambda m, args: seen.append((m.training, args[0].tolist())))
    # the last batch holds 1 window of 9, and another kind of text, so that its mean differs
    ds = gpt.NextTokenDataset(torch.cat([some_ids(12), torch.full((5,), 3)]), 8)
    loader = torch.utils.data.DataLoader(ds, batch_size=4)
    optimizer, same = gpt.make_optimizer(model, lr=0.01), gpt.make_optimizer(twin, lr=0.01)
    loss = gpt.train_one_epoch(model, loader, optimizer, "cpu")
    means = [gpt.train_step(twin, same, x, y, 0.01, clip=1e9).item() for x, y in loader]
    assert seen == [(True, x.tolist()) for x, _ in loader]
    assert plain(model) == plain(twin)
    assert loss == pytest.approx((4 * means[0] + 4 * means[1] + means[2]) / 9, rel=1e-5)
    assert abs(loss - sum(means) / 3) > 1e-4  # the other mean is not the same here
    with pytest.raises(ValueError, match="no batch.*drop_last"):
        gpt.train_one_epoch(model, [], optimizer, "cpu")


def test_every_token_is_predicted_once_and_the_mode_is_left_alone():
    learning, model = small_model(dropout=0.5), small_model(dropout=0.5).eval()
    for n in range(2, 3 * 8 + 1):
        ids, total = some_ids(n, seed=n), 0.0
        for t in range(n - 1):  # one question at a time; its window begins at t // 8 * 8
            logits = model(ids[None, t // 8 * 8 : t + 1])[0, -1]
            total -= logits.log_softmax(-1)[ids[t + 1]].item()
        for one, batch_size in [(model, 1), (model, 2), (model, 64), (learning, 64)]:
            assert gpt.evaluate(one, ids, batch_size) == pytest.approx(total / (n - 1), rel=1e-5)
    for wrong, words in [(ids[:0], "0 tokens"), (ids[:1], "1 tokens"), (ids + 7, "vocabulary")]:
        with pytest.raises(ValueError, match=words):
            gpt.evaluate(learning, wrong)
    assert learning.training and learning.dropout.training and not model.training


def test_parts_of_a_text_are_each_read_from_their_start():
    """Up to max_len, 8 here; what comes before the first is left out."""
    model, ids, starts = small_model(), some_ids(40), [3, 5, 17, 30]
    parts = [ids[a : b + 1][: 8 + 1] for a, b in zip(starts, [*starts[1:], 39])]
    total = sum(gpt.evaluate(model, part) * (len(part) - 1) for part in parts)
    loss = gpt.evaluate(model, ids, batch_size=3, starts=torch.tensor(starts))
    assert loss == pytest.approx(total / (2 + 8 + 8 + 8), rel=1e-5)


def test_a_run_that_is_past_its_stop_ends_at_once(tmp_path, monkeypatch):
    run(out=tmp_path, stop_at=5)
    state, line = gpt.load_checkpoint(tmp_path / "last.pt"), Mock(wraps=gpt.progress_line)
    monkeypatch.setattr(gpt, "progress_line", line)
    assert run(resume=state, stop_at=3) == state["history"]
    line.assert_called_once_with(5 / 12)  # from where it goes on, the time left is reckoned


@pytest.mark.parametrize("decay", [{}, {"weight_decay": 0.5}], ids=str)
def test_training_steps_are_steps_of_adamw_that_decay_matrices_only(decay):
    model, twin, (x, y) = small_model().eval(), small_model(), some_batch()
    matrices, vectors = ([p for p in twin.parameters() if p.ndim == n] for n in (2, 1))
    theirs = torch.optim.AdamW([{"params": vectors, "weight_decay": 0.0},
                                {"params": matrices} | ({"weight_decay": 0.1} | decay)],
                               lr=0.01, betas=(0.9, 0.99))
    optimizer = gpt.make_optimizer(model, lr=1.0, **decay)
    for _ in range(3):
        loss = gpt.train_step(model, optimizer, x, y, lr=0.01, clip=1e9)
        expected = F.cross_entropy(twin(x).transpose(1, 2), y)
        assert model.training and loss.ndim == 0 and not loss.requires_grad
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        theirs.zero_grad()
        expected.backward()
        theirs.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize(("factor", "clip"), [(1e4, 1.0), (1e4, 0.1), (1e-6, 1.0)])
def test_huge_gradients_are_scaled_down_and_small_ones_are_not(factor, clip):
    model, before = small_model(), small_model()
    for weight in model.parameters():
        weight.register_hook(lambda grad: grad * factor)
    sgd = torch.optim.SGD(model.parameters())
    gpt.train_step(model, sgd, *some_batch(), lr=1.0, clip=clip)
    pairs = zip(model.parameters(), before.parameters())
    moved = math.hypot(*((new - old).norm().item() for new, old in pairs))
    assert moved == pytest.approx(clip, rel=1e-3) if factor > 1 else 0 < moved < 1e-3


def test_the_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    rates = [gpt.get_lr(i / 1000, 0.004) for i in range(1001)]
    assert 0 < rates[0] < 0.2 * 0.004
    line = [rates[0] + (0.004 - rates[0]) * i / 50 for i in range(50)]
    cosine = [0.002 * (1 + math.cos(math.pi * i / 950)) for i in range(951)]
    assert rates == pytest.approx(line + cosine, abs=1e-12)
    assert gpt.get_lr(1.7, 0.004) == rates[1000] and gpt.get_lr(0.1, 1.0, warmup=0.1) == 1.0


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_step_in_mixed_precision_is_nearly_the_same_step(precision):
    one, two, types, (x, y) = small_model(), small_model(), [], some_batch()
    two.head.register_forward_hook(lambda module, args, logits: types.append(logits.dtype))
    two.tokens.register_forward_hook(lambda module, args, x: types.append(x.dtype))
    for block in two.blocks:
        block.attention.proj.register_forward_pre_hook(lambda module, y: types.append(y[0].dtype))
    scaler = torch.amp.GradScaler("cpu", enabled=precision == torch.float16)
    exact = gpt.train_step(one, gpt.make_optimizer(one, 0.0), x, y, lr=0.0, clip=0.01)
    rounded = gpt.train_step(two, gpt.make_optimizer(two, 0.0), x, y, 0.0, 0.01, precision, scaler)
    # What adds up has all digits, products have few; on a CPU attention is left out of that.
    assert types == 3 * [torch.float32] + [precision]
    assert rounded.item() == pytest.approx(exact.item(), rel=1e-3) and rounded != exact
    for (name, p), q in zip(one.named_parameters(), two.parameters()):
        assert q.dtype == q.grad.dtype == torch.float32
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.99, name
        assert q.grad.norm().item() == pytest.approx(p.grad.norm().item(), rel=0.05)  # scaled back


def test_a_gradient_too_large_for_float16_is_left_out():
    model, scaler = small_model(), torch.amp.GradScaler("cpu")
    handle = model.norm.weight.register_hook(lambda grad: grad * math.inf)
    optimizer, scale = gpt.make_optimizer(model, 0.01), [scaler.get_scale()]
    for keeps in (True, False):
        gpt.train_step(model, optimizer, *some_batch(), 0.01, 1.0, torch.float16, scaler)
        scale.append(scaler.get_scale())
        assert (plain(model) == plain(small_model())) == keeps
        handle.remove()
    assert scale[0] > scale[1] == scale[2]
    assert all(weight.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize(("device", "able", "expected"), [
    ("cpu", {"avx512_bf16": True}, torch.bfloat16), ("cpu", {"amx_bf16": True}, torch.bfloat16),
    ("cpu", {"avx512_bf16": False, "avx2": True}, torch.float32), ("cpu", {}, torch.float32),
    ("cpu", None, torch.float32),  # a PyTorch that does not know the processor
    ("cuda", True, torch.bfloat16), ("cuda", False, torch.float16), ("mps", None, torch.float32),
])
def test_bfloat16_only_where_the_chip_is_faster_with_it(device, able, expected, monkeypatch):
    names = {"get_capabilities": lambda: able} if isinstance(able, dict) else {}
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(**names))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",  # imitated it is everywhere
                        lambda including_emulation=True: including_emulation or able)
    assert gpt.pick_precision(torch.device(device)) is expected


# ---------------------------------------------------------------- a run, its curve, its line


def run(model=None, steps=12, **options):
    options = dict(batch_size=2, lr=0.01, eval_every=5) | options
    return gpt.train(model or small_model(), some_ids(60), some_ids(20, 1), steps=steps, **options)


def test_the_history_and_the_files_of_a_run(tmp_path, capsys):
    folder, calls, states, script = tmp_path / "new" / "run", [], [], [3.0, 1.5, 2.0, 1.8]
    history = run(
        out=folder, on_eval=lambda h: calls.append((len(h["train_loss"]), len(h["val_loss"]))),
        validate=lambda model: states.append(plain(model)) or script[len(states) - 1])
    assert calls == [(0, 1), (5, 2), (10, 3), (12, 4)]
    assert history["val_step"] == [0, 5, 10, 12] and history["val_loss"] == script
    assert sorted(os.listdir(folder)) == ["best.pt", "last.pt"]
    best, last = (gpt.load_checkpoint(folder / name) for name in ("best.pt", "last.pt"))
    assert (best["step"], last["step"]) == (5, 12) and last["history"] == history
    assert plain(best["model"]) == states[1] != states[3] == plain(last["model"])
    assert "validation 1.800" in capsys.readouterr().out.partition("step 12  loss")[2]


def rate_of(folder):  # the learning rate of the last step that is saved there
    return gpt.load_checkpoint(folder / "last.pt")["optimizer"]["param_groups"][0]["lr"]


def test_the_settings_reach_the_steps(tmp_path, monkeypatch):
    model, text = small_model(), torch.arange(60) % 7
    batches, rates = [], []
    model.register_forward_pre_hook(lambda m, args: batches.append(args[0]) if m.training else None)
    history = gpt.train(model, text, text[:20], torch.tensor([3, 4]), out=tmp_path / "run",
                        on_eval=lambda history: rates.append(rate_of(tmp_path / "run")), steps=80,
                        eval_every=2, batch_size=2, lr=0.02, block_size=4)
    assert rates[1:] == [gpt.get_lr(i / 80, 0.02) for i in range(1, 80, 2)]
    assert all(x.shape == (2, 4) for x in batches)
    assert {x[0].item() for pair in batches for x in pair} == {3, 4}  # where windows begin
    assert history["val_loss"][-1] == gpt.evaluate(model, text[:20])
    assert history["train_loss"][-1] < 0.1 * history["train_loss"][0]  # it learns
    monkeypatch.chdir(tmp_path)
    run(model, steps=1)
    assert batches[-1].shape == (2, 8)  # as long as the model reads
    assert run() == run() and run(seed=1)["train_loss"] != run()["train_loss"]  # other batches
    assert os.listdir() == ["run"]  # without a folder nothing is written


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_run_in_mixed_precision(precision, tmp_path):
    fine, coarse = run(), run(precision=precision, out=tmp_path)
    assert coarse["train_loss"] != fine["train_loss"]
    assert coarse["train_loss"] == pytest.approx(fine["train_loss"], rel=0.05)
    assert coarse["val_loss"][0] == fine["val_loss"][0]  # it is measured in float32
    last = gpt.load_checkpoint(tmp_path / "last.pt")
    assert bool(last["scaler"]) == (precision == torch.float16)


def test_a_compiled_model_learns_the_same(monkeypatch):
    """Its graphs are not translated to C++, which takes long: that is done for its writing."""
    quick = Mock(wraps=partial(torch.compile, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr(torch, "compile", quick)
    plainly = run(steps=3)["train_loss"]
    assert run(steps=3, compile=True)["train_loss"] == pytest.approx(plainly, abs=1e-4, rel=0)
    assert quick.call_count == 1
    torch.compiler.reset()


def test_a_run_ends_in_time_and_saves(tmp_path, monkeypatch):
    ticks = [i / 100 for i in range(9999)]
    monkeypatch.setattr(gpt, "time", Mock(perf_counter=Mock(side_effect=ticks)))
    history = run(steps=3000, max_seconds=2.0, eval_every=3000, out=tmp_path)
    n = len(history["train_loss"])
    assert 20 < n < 200 and history["val_step"] == [0, n]
    assert gpt.load_checkpoint(tmp_path / "last.pt")["step"] == n
    assert rate_of(tmp_path) < 0.1 * 0.01  # decayed over the time that there was
    assert run(max_seconds=1e-9, out=tmp_path)["train_loss"] == []  # no time, no step: a file
    assert gpt.load_checkpoint(tmp_path / "best.pt")["step"] == 0


@pytest.mark.parametrize("name", ["steps", "batch_size", "lr", "eval_every", "max_seconds",
                                  "stop_at"])
def test_what_makes_no_run_is_refused(name, tmp_path):
    for start in (gpt.TrainConfig, partial(run, out=tmp_path)):
        for value in (0, -1, math.nan):
            with pytest.raises(ValueError, match=f"{name} is {value}"):
                start(**{name: value})
    with pytest.raises(ValueError, match="ids 1 to 9 do not fit"):
        gpt.train(small_model(), torch.tensor([1, 2, 9] * 9), some_ids(20), out=tmp_path)
    with pytest.raises(TypeError, match="epochs"):
        run(out=tmp_path, epochs=3)
    with pytest.raises(FloatingPointError, match="step 0: the validation loss is nan"):
        run(out=tmp_path, validate=lambda model: math.nan)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("eval_every", "kept"), [(5, 5), (1000, 0)])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, eval_every, kept):
    model, grads = small_model(), []
    model.head.weight.register_hook(
        lambda grad: grads.append(grad) or (grad * math.nan if len(grads) == 7 else grad))
    with pytest.raises(FloatingPointError, match="step 7: loss nan; try a lower"):
        run(model, steps=100, out=tmp_path, eval_every=eval_every)
    assert len(grads) == 10 and model.head.weight.isnan().any()  # seen within ten steps
    best, last = (gpt.load_checkpoint(tmp_path / name) for name in ("best.pt", "last.pt"))
    assert last["step"] == len(last["history"]["train_loss"]) == kept
    assert math.isfinite(gpt.evaluate(best["model"], some_ids(20)))
    assert len(run(resume=last)["train_loss"]) == 12  # and goes on from there
    with pytest.raises(FloatingPointError, match="step 5: the validation loss is inf"):
        run(out=tmp_path / "other", validate=Mock(side_effect=[3.0, math.inf]))
    assert gpt.load_checkpoint(tmp_path / "other" / "last.pt")["history"]["val_step"] == [0]


def test_the_curves_are_the_history():
    history = {"train_loss": [4.0 - i / 50 for i in range(100)], "val_step": [0, 50, 100],
               "val_loss": [4.1, 3.1, 2.2]}
    (ax,) = gpt.plot_loss(history, floor=0.25, title="It falls").axes
    labels = ax.get_title(), ax.get_xlabel(), ax.get_ylabel(), ax.get_ylim()[0]
    assert labels == ("It falls", "step", "loss (nats per token)", 0)
    single, smooth, val, floor = ([*line.get_ydata()] for line in ax.lines)
    means = [(a + b) / 2 for a, b in zip(history["train_loss"], history["train_loss"][1:])]
    assert single == pytest.approx(history["train_loss"]) and smooth == pytest.approx(means)
    assert [*ax.lines[1].get_xdata()] == [*range(1, 100)]  # 2 % of the run: two steps
    assert val == history["val_loss"] and [*ax.lines[2].get_xdata()] == history["val_step"]
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert words == ["training", "validation", "floor of the text, 0.250"] and floor == [0.25] * 2
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
    out = capsys.readouterr().out
    lines = ["[============........] so far  5 s, 20 s left",
             "[===============.....] so far  30 s, 30 s left",
             "[====================] so far  60 s, 0 s left"]
    if live:  # written over, and only the last ends
        assert out == "".join(f"\r{line:<95}" for line in lines) + "\n"
    else:  # in a log: every 10 seconds, and the last
        assert out.splitlines() == lines[1:]


# ---------------------------------------------------------------- checkpoints, a run that goes on


@pytest.fixture
def saved(tmp_path):
    """What a run leaves after its first step: the path of a checkpoint, and what is in it."""
    model, tokenizer = small_model(dropout=0.1), gpt.CharTokenizer("abcdé g")
    history = run(model, out=tmp_path, stop_at=1, tokenizer=tokenizer)
    return SimpleNamespace(path=tmp_path / "last.pt", model=model, step=1, seed=0,
                           history=history, tokenizer=tokenizer)


def alter(saved, **changes):
    """Write the checkpoint anew with other parts, or other entries in them."""
    state = torch.load(saved.path, weights_only=True)
    for part, change in changes.items():
        state[part] = state[part] | change if change and isinstance(change, dict) else change
    torch.save(state, saved.path)


def test_a_checkpoint_gives_everything_back(saved, tmp_path):
    """The optimiser and the random numbers, too: see the run that is resumed."""
    state = gpt.load_checkpoint(saved.path)
    for name in ("model", "step", "seed", "history", "tokenizer"):
        assert plain(state[name]) == plain(getattr(saved, name)), name
    assert state["model"].config == saved.model.config
    assert all(weight.requires_grad for weight in state["model"].parameters())
    gpt.save_checkpoint(tmp_path / "model.pt", saved.model)
    state = gpt.load_checkpoint(tmp_path / "model.pt")
    assert state["tokenizer"] is None and state["step"] == 0
    gpt.save_checkpoint(tmp_path / "more.pt", saved.model, gpt.make_optimizer(saved.model, 0.1))
    for alone in (state, gpt.load_checkpoint(tmp_path / "more.pt")):
        with pytest.raises(ValueError, match="model alone"):
            run(resume=alone)


@pytest.mark.filterwarnings("ignore")  # torch wonders about the files too
def test_none_of_600_damaged_checkpoints_is_taken_for_a_good_one(saved):
    """Where it can be read, the damage was to something that says nothing, such as a date."""
    content = saved.path.read_bytes()
    good = plain(gpt.load_checkpoint(saved.path))
    weight = content.index(saved.model.head.weight.detach().numpy().tobytes()) + 40
    for at in [0, weight, len(content) - 1, *torch.randint(len(content), (197,)).tolist()]:
        zeros = content[:at] + bytes(50) + content[at + 50 :]
        flipped = content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]
        for wrong in (content[:at], zeros[: len(content)], flipped):
            saved.path.write_bytes(wrong)
            try:
                state = gpt.load_checkpoint(saved.path)
            except ValueError as error:
                assert "last.pt' is damaged" in str(error) and "\n" not in str(error)
            else:
                assert plain(state) == good and len(wrong) == len(content)


class Malice:
    def __reduce__(self):
        return os.mkdir, ("was run",)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("foreign", [
    b"", b"Once upon a time\n", b"\x80\x02.", b'{"format": "tinygpt-2"}', {"a": 1}, [1, 2],
    torch.zeros(3), {"format": "tinygpt-1"}, {"format": "tinygpt-2"}, torch.nn.Linear(2, 2),
    Malice(), pickle.dumps(Malice()), {"format": "tinygpt-2", "step": Malice()},
], ids=range(13))
def test_a_foreign_file_is_named_and_its_code_is_not_run(foreign, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open("foreign.pt", "wb") as file:
        file.write(foreign) if isinstance(foreign, bytes) else torch.save(foreign, file)
    with pytest.raises(ValueError, match="foreign.pt.*no TinyGPT checkpoint") as caught:
        gpt.load_checkpoint("foreign.pt")
    for advice in ("weights_only", "only if you", "\x1b"):  # torch advises to load it unsafely
        assert advice not in str(caught.value)
    assert os.listdir() == ["foreign.pt"]


def check_refused(path, words):
    """It is refused before memory is taken."""
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=words):
        gpt.load_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**5  # KB, on Linux


@pytest.mark.parametrize("changes", [
    {"config": {"d_model": 32}}, {"config": {"n_heads": 3}}, {"config": {"colour": 1}},
    {"config": {"n_layers": 1}}, {"config": {"n_layers": 3}}, {"config": {"n_layers": 10**7}},
    {"config": {"n_layers": 10**5}, "history": {"padding": "a" * 300_000}},
    {"config": {"max_len": 10**8}}, {"config": {"d_model": 10**6}}, {"model": 7},
    {"tokenizer": 5}, {"tokenizer": "abc"}, {"tokenizer": {"kind": "words"}},
    {"tokenizer": {"characters": "ab"}},  # 2 tokens, the model has 7
    {"model": {"norm.bias": None}}, {"model": {"norm.bias": torch.zeros(3)}},
    {"model": {"head.weight": torch.zeros(1).expand(7, 16)}},  # one number, said to be many
    {"model": {"head.weight": torch.empty(7, 16, device="meta")}},  # none
    {"config": {"max_len": 10**8}, "model": {"positions.weight": torch.ones(1).expand(10**8, 16)}},
    {"format": "tinygpt-1"},
], ids=range(20))
def test_parts_that_do_not_fit_are_refused(saved, changes):
    alter(saved, **changes)
    check_refused(saved.path, "too small for GPTConfig" if len(changes) > 1 else "last.pt")


def test_a_zip_that_unpacks_to_more_than_it_holds_is_refused(saved):
    with zipfile.ZipFile(saved.path, "a", zipfile.ZIP_DEFLATED) as parts:
        parts.writestr(parts.namelist()[0] + "0", bytes(10**8))
    check_refused(saved.path, "changed or packed")


@pytest.mark.parametrize(("stop_at", "kind"), [(3, "float16"), (20, "float32"), (21, "bfloat16")])
def test_a_run_paused_and_resumed_is_the_same_run(tmp_path, stop_at, kind):
    """In one process; the test of `train.py` resumes in a new one."""
    def go(name, seed=0, **options):
        history = run(small_model(dropout=0.2, seed=seed), steps=40, eval_every=7,
                      precision=getattr(torch, kind), out=tmp_path / name, **options)
        return history, gpt.load_checkpoint(tmp_path / name / "last.pt")

    one, whole = go("whole")
    before, half = go("parts", stop_at=stop_at)
    for group in half["optimizer"]["param_groups"]:  # the run's own settings count, not the file's:
        group |= {"amsgrad": True, "weight_decay": 9.0}  # amsgrad keeps a tensor more, of any size
    two, parts = go("parts", seed=1, resume=half)  # what was drawn meanwhile does not matter
    assert before["train_loss"] == one["train_loss"][:stop_at]
    for name in ("model", "optimizer", "scaler", "rng"):
        assert plain(whole[name]) == plain(parts[name]), name  # all bits
    assert len(one["train_loss"]) == 40 and one["train_loss"] == two["train_loss"]
    assert two["val_step"] == sorted({*range(0, 40, 7), 40, stop_at})  # and nothing twice
    val = dict(zip(two["val_step"], two["val_loss"]))
    assert [val[step] for step in one["val_step"]] == one["val_loss"]
    assert half["history"] == before  # the loaded one is left as it was
    assert go("parts", resume=half, stop_at=stop_at)[0] == before  # nothing to do
    with pytest.raises(ValueError, match="seed is 1.* 0"):
        run(resume=half, seed=1)


@pytest.mark.parametrize(("part", "lie"), [
    *(("rng", lie) for lie in (None, 5, {}, {"batches": None}, {"torch": None}, {"torch": "abc"},
                               {"batches": torch.zeros(9)}, {"batches": [1, 2]},
                               {"torch": torch.zeros(9, dtype=torch.uint8)})),
    *(("optimizer", {"exp_avg": lie}) for lie in (torch.zeros(2, 2), "abc", None,
                                                  torch.zeros(1).expand(7, 16))),
    ("optimizer", {"exp_avg_sq": torch.zeros(2, 2)}), ("optimizer", {"step": torch.zeros(3)}),
], ids=range(15))
def test_what_cannot_be_put_back_is_refused(saved, part, lie):
    """The fused optimiser would write past the end of a tensor that is too small."""
    if part == "optimizer":
        states = gpt.load_checkpoint(saved.path)["optimizer"]["state"]
        assert states[0]["exp_avg"].shape == (7, 16)
        lie = {"state": states | {0: states[0] | lie}}
    alter(saved, **{part: lie})
    with pytest.raises(ValueError, match="the run is damaged"):
        run(resume=gpt.load_checkpoint(saved.path), stop_at=1)  # a step may crash Python


def test_the_best_model_outlives_a_stop_between_the_two_files(tmp_path, monkeypatch):
    """The machine stops after one of the two files of step 5, the best so far."""
    ends = [DEFAULT] * 3 + [KeyboardInterrupt] + [DEFAULT] * 9
    monkeypatch.setattr(gpt, "save_checkpoint", Mock(wraps=gpt.save_checkpoint, side_effect=ends))
    again = partial(run, out=tmp_path, validate=Mock(side_effect=[3.0, 1.0, 1.0, 2.0, 2.5]))
    with pytest.raises(KeyboardInterrupt):
        again()
    again(resume=gpt.load_checkpoint(tmp_path / "last.pt"))
    assert gpt.load_checkpoint(tmp_path / "best.pt")["step"] == 5
