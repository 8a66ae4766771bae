"""What the module does on a GPU, on machines without one: see pretend_gpu.py.

FakeTensorMode says on which device a result would be, but a backward pass on "cuda" ends Python
where PyTorch was built for CPUs alone. So all runs on the pretended device, with real numbers, and
must give what the CPU gives; a tensor left on the CPU raises CUDA's own error."""

import math
import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pretend_gpu
import pytest
import torch

import tinygpt_helpers as tiny

TEXT = "a cat sat. a dog ran. a cow ate.\n" * 8
TOKENIZER = tiny.CharTokenizer(TEXT)
IDS = torch.tensor(TOKENIZER.encode(TEXT))
STARTS = (IDS[:-17] == TOKENIZER.encode("\n")[0]).nonzero()[:, 0]


def small_model(device="cpu", dropout=0.0):
    torch.manual_seed(0)
    return tiny.TinyGPT(TOKENIZER.vocab_size, 16, 2, 2, 16, dropout=dropout).to(device)


@pytest.fixture
def gpu():
    with pretend_gpu.on():
        yield


def test_the_pretended_device_refuses_what_cuda_refuses(gpu):
    here, there = torch.arange(3.0), torch.arange(3.0, device="cuda")
    for wrong in (lambda: here + there, lambda: here[there.long()], lambda: there.add_(here),
                  lambda: torch.stack([here, there]), lambda: there.index_select(0, here.long()),
                  lambda: torch.rand(3, device="cuda", generator=torch.Generator()),
                  lambda: torch.rand(3, generator=torch.Generator("cuda"))):
        with pytest.raises(RuntimeError, match="device"):
            wrong()
    for wrong in (there.numpy, there.__array__):
        with pytest.raises(TypeError, match="Use Tensor.cpu"):
            wrong()
    for right in (there + here[1], there[here.long()], there[[0]], there.clone().copy_(here),
                  torch.zeros_like(here, device="cuda"), here.to("cuda"), here.cuda()):
        assert right.is_cuda and right.device == torch.device("cuda:0")
    assert there.cpu().equal(here) and there.to("cuda") is there and there.tolist() == [0, 1, 2]
    assert f"{there[1]:.1f}" == "1.0" and torch.tensor([there[2], 5]).tolist() == [2, 5]
    layer = torch.nn.Linear(2, 2).cuda()
    assert layer.weight.is_cuda and layer.cpu().bias.is_cpu and layer.weight.grad is None
    with torch.device("meta"):
        assert torch.zeros(3).is_meta  # shapes alone, as load_checkpoint asks for


def everything(device):
    """Use all that reads with a model; return the tensors and lists that come out, by name."""
    model, out = small_model(device).eval(), {}
    x, y = tiny.sample_batch(IDS.to(device), 16, 4, torch.Generator(device).manual_seed(1),
                             STARTS.to(device))
    out["x"], out["y"], out["logits"] = x, y, model(x).detach()
    out["loss"] = [tiny.evaluate(model, IDS.to(device)), tiny.evaluate(model, IDS, 2, STARTS)]
    assert tiny.evaluate(model, IDS.to(device), 2, STARTS.to(device)) == out["loss"][1]
    recorder, cache = tiny.AttentionRecorder(), tiny.KVCache(model, 4)
    model(x, recorder)
    out["maps"], out["lens"] = recorder.weights.detach(), tiny.logit_lens(model, x)
    out["scores"] = tiny.head_scores(out["maps"], out["maps"][0, :, 0] > 0)
    with tiny.ablate(model, [(0, 1)]), torch.no_grad():
        out["ablated"] = model(x)
    with torch.no_grad():
        out["cached"] = torch.cat([model(part, cache) for part in x.split([5, 1, 10], 1)], 1)
    assert cache.length.device == cache.k[0].device == x.device
    out["drawn"] = tiny.sample(out["logits"][:, 0].softmax(-1), torch.Generator().manual_seed(3))
    prompt = x[:2, :3]
    for name, how in dict(greedy=dict(temperature=0), nucleus=dict(top_k=9, top_p=0.9),
                          plain=dict(use_cache=False), stop=dict(stop_id=5)).items():
        generator = torch.Generator().manual_seed(2)
        out[name] = tiny.generate(model, prompt, 15, generator=generator, **how)
    assert tiny.generate(model, prompt, 2).device == x.device  # drawn by the device's own numbers
    for use in (tiny.generate, lambda model, ids, n: tiny.train(model, ids[0], IDS)):
        with pytest.raises(ValueError, match="do not fit"):  # these look at values, once
            use(model, x + 99, 1)
    out["stories"] = tiny.sample_stories(model, TOKENIZER, 3, max_chars=6)
    engine = tiny.Engine(model, max_batch=3, page_size=4, n_pages=7, chunk_size=6)
    for seed in range(5):
        engine.submit(IDS[: 5 + seed % 2].tolist(), 8, temperature=seed % 2, top_p=0.9, seed=seed)
    out["step"], out["served"], stats = engine.step(), engine.run(), engine.stats
    assert stats["preempted"] and stats["tokens shared"] and stats["done"] == 5
    assert engine.pool.kv.device == x.device
    loader = torch.utils.data.DataLoader(tiny.NextTokenDataset(IDS[:40], 16), 8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    out["epoch"] = [tiny.train_one_epoch(model, loader, optimizer, x.device)]
    return out


def test_all_that_reads_gives_what_the_cpu_gives(gpu):
    there, here = everything("cuda"), everything("cpu")
    for name, value in here.items():
        if isinstance(value, torch.Tensor):
            assert there[name].is_cuda, name
            torch.testing.assert_close(there[name].cpu(), value)
        else:
            close = pytest.approx(value) if name in ("loss", "epoch") else value
            assert there[name] == close, name


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_run_and_its_files(gpu, tmp_path, precision):
    """Without dropout it learns what it learns on a CPU. A run in two parts gives the whole one's
    bits, with the dropout of the device's own random numbers."""
    def run(device, dropout=0.0, **options):
        model = small_model(device, dropout)
        history = tiny.train(model, IDS, IDS, STARTS, batch_size=2, lr=0.01, steps=4, eval_every=2,
                             precision=precision, tokenizer=TOKENIZER, **options)
        assert {weight.device for weight in model.parameters()} == {torch.ones(1).to(device).device}
        assert all(weight.dtype == torch.float32 for weight in model.parameters())
        return history

    assert torch.get_float32_matmul_precision() == "highest"
    here = run("cpu")
    assert torch.get_float32_matmul_precision() == "highest"  # TF32 is CUDA's
    close = dict(rel=1e-6) if precision == torch.float32 else dict(rel=0.02)
    assert run("cuda")["train_loss"] == pytest.approx(here["train_loss"], **close)
    assert torch.get_float32_matmul_precision() == "high"
    whole = run("cuda", 0.2)
    run("cuda", 0.2, out=tmp_path, stop_at=2)
    half = tiny.load_checkpoint(tmp_path / "last.pt", "cuda")
    assert half["model"].head.weight.is_cuda  # all else as it must be without a GPU, too
    assert half["optimizer"]["state"][0]["exp_avg"].is_cpu
    torch.manual_seed(99)  # all generators, the device's too
    assert run("cuda", 0.2, resume=half, out=tmp_path) == whole
    saved = torch.load(tmp_path / "last.pt", map_location="cpu", weights_only=True)
    assert bool(saved["scaler"]) == (precision == torch.float16)
    best = tiny.load_checkpoint(tmp_path / "best.pt")["model"]  # a CPU reads a GPU's file
    assert best.head.weight.device.type == "cpu" and math.isfinite(tiny.evaluate(best, IDS))


@pytest.mark.parametrize("place", ["cuda:1", "mps:0"])
def test_the_random_numbers_of_the_models_own_device(place, tmp_path):
    """Not of the GPU that happens to be the current one; and of an Apple GPU, too."""
    device, state = torch.device(place), torch.arange(16, dtype=torch.uint8)
    model, backend = small_model(), Mock(**{"get_rng_state.return_value": state})
    optimizer, generator = tiny.make_optimizer(model, 0.1), torch.Generator()
    tiny.train_step(model, optimizer, IDS[None, :9], IDS[None, 1:10], 0.1)
    scaler = torch.amp.GradScaler(enabled=False)
    with patch.object(torch, device.type, backend):
        head = SimpleNamespace(weight=SimpleNamespace(device=device))
        abroad = SimpleNamespace(config=model.config, head=head, state_dict=model.state_dict)
        tiny.save_checkpoint(tmp_path / "a.pt", abroad, optimizer, generator=generator,
                             history={"train_loss": [1.0]}, scaler=scaler, seed=0)
        backend.get_rng_state.assert_called_once_with(device)
        there = Mock(device=device, set_state=generator.set_state)
        tiny.resume_run(tiny.load_checkpoint(tmp_path / "a.pt"), model, optimizer, there, scaler, 0)
        (new, where), _ = backend.set_rng_state.call_args
    assert new.equal(state) and where == device


# What PyTorch says of a machine, and what it is told to use: device, dtype, GradScaler, TF32.
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
MACHINES = {
    "T4, 7.5": (dict(cuda=True, bf16=False), "cuda", F16, True, "high"),
    "A100, 8.0": (dict(cuda=True, bf16=True), "cuda", BF16, False, "high"),
    "H100, 9.0": (dict(cuda=True, bf16=True), "cuda", BF16, False, "high"),
    "CPU with bfloat16": (dict(cpu={"amx_bf16": True}), "cpu", BF16, False, "highest"),
    "CPU without": (dict(cpu={"avx2": True}), "cpu", F32, False, "highest"),
    "Apple GPU": (dict(mps=True), "mps", F32, False, "highest"),
}


@pytest.mark.parametrize("name", MACHINES)
def test_what_each_machine_is_told_to_use(name, monkeypatch):
    says, kind, precision, scaled, matmul = MACHINES[name]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: says.get("mps", False))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: says.get("cpu", {}), raising=False)
    train_step = Mock(wraps=tiny.train_step)
    monkeypatch.setattr(tiny, "train_step", train_step)
    with pretend_gpu.on(says["bf16"]) if "cuda" in says else nullcontext():
        device = tiny.pick_device()
        assert (device.type, tiny.pick_precision(device)) == (kind, precision)
        if kind == "mps":  # there is nothing to pretend one; what train asks for is there
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                torch.autocast("mps", precision, enabled=False)
                assert not torch.amp.GradScaler("mps", enabled=precision == F16).is_enabled()
            return
        model, types = small_model(device), []
        model.blocks[1].attention.proj.register_forward_pre_hook(
            lambda module, y: types.append(y[0].dtype) if module.training else None)
        tiny.train(model, IDS, IDS, steps=1, batch_size=2, precision=precision)
        assert types == [precision if kind == "cuda" else F32]  # in which attention is computed
        assert train_step.call_args.kwargs["scaler"].is_enabled() == scaled
        assert torch.get_float32_matmul_precision() == matmul
