"""Speed as ratios: both sides of each in one run, on one machine, in turns.

    make bench                       all
    make bench ARGS="--only training --quick"

Nothing here passes or fails: times depend on the machine and on what else it does. Each ratio is
one of medians over interleaved repetitions, so that a slow minute falls on both sides.
"""

import argparse
import math
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tinygpt_helpers import (  # noqa: E402
    CharTokenizer,
    Engine,
    NextTokenDataset,
    TinyGPT,
    evaluate,
    generate,
    load_corpus,
    make_optimizer,
    pick_precision,
    sample_batch,
    split_corpus,
    train,
    train_step,
)


def compare(one, two, repetitions):
    """Median seconds of `one()` and of `two()`, called in turns after one call of each."""
    times = {one: [], two: []}
    one(), two()
    for i in range(repetitions):
        for function in ((one, two), (two, one))[i % 2]:  # neither is always the first
            began = time.perf_counter()
            function()
            times[function].append(time.perf_counter() - began)
    return statistics.median(times[one]), statistics.median(times[two])


# ---------------------------------------------------------------- drawing batches


def batches(quick):
    """One gather for all windows, against a DataLoader that asks for each window."""
    ids, T, n = torch.randint(65, (200_000,)), 64, 20 if quick else 100
    ds = NextTokenDataset(ids, T)
    for B, aim in [(12, ""), (64, "20 or more"), (256, "20 or more")]:
        # with replacement, as sample_batch draws: no time goes into shuffling all windows first
        sampler = torch.utils.data.RandomSampler(ds, replacement=True, num_samples=B * n)
        loader = torch.utils.data.DataLoader(ds, batch_size=B, sampler=sampler)

        def vectorised(B=B):
            for _ in range(n):
                sample_batch(ids, T, B)

        def one_by_one(loader=loader):
            for _ in loader:
                pass

        fast, slow = compare(vectorised, one_by_one, 5 if quick else 15)
        yield (f"batches of {B} x {T}", f"{1e6 * fast / n:.0f} us a batch, sample_batch",
               f"{1e6 * slow / n:.0f} us, DataLoader", slow / fast, aim)


# ---------------------------------------------------------------- a step of training


class PlainBlock(nn.Module):
    """A block as one writes it first: three projections, scores, mask and softmax by hand."""

    def __init__(self, d_model, n_heads, T):
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.q, self.k, self.v, self.proj = (nn.Linear(d_model, d_model, bias=False)
                                             for _ in range(4))
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)
        self.register_buffer("mask", torch.ones(T, T).tril())

    def forward(self, x):
        B, T, C = x.shape
        h = self.norm1(x)
        q, k, v = (layer(h).view(B, T, self.n_heads, -1).transpose(1, 2)
                   for layer in (self.q, self.k, self.v))  # (B, n_heads, T, d_head)
        scores = q @ k.transpose(-2, -1) / math.sqrt(C // self.n_heads)
        scores = scores.masked_fill(self.mask[:T, :T] == 0, float("-inf"))
        y = F.softmax(scores, dim=-1) @ v
        x = x + self.proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class PlainGPT(nn.Module):
    """The same model with none of the module's care for speed."""

    def __init__(self, V, d_model, n_heads, n_layers, T):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, d_model), nn.Embedding(T, d_model)
        self.blocks = nn.ModuleList(PlainBlock(d_model, n_heads, T) for _ in range(n_layers))
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, V, bias=False)

    def forward(self, idx):
        x = self.tokens(idx) + self.positions(torch.arange(idx.size(1), device=idx.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def copy_from(self, model):
        """Take the weights of a TinyGPT, so that both must compute the same."""
        weights = {}
        for name, value in model.state_dict().items():
            name = name.replace("mlp.0", "up").replace("mlp.2", "down")
            if "qkv" in name:
                for part, rows in zip("qkv", value.chunk(3)):
                    weights[name.replace("attention.qkv", part)] = rows
            else:
                weights[name.replace("attention.", "")] = value
        missing, unexpected = self.load_state_dict(weights, strict=False)
        assert not unexpected and all(name.endswith("mask") for name in missing)


def training(quick):
    """train_step in float32, compiled, and as make train takes it, against the plain model."""
    best = pick_precision(torch.device("cpu"))
    for precision in dict.fromkeys([torch.float32, best]):
        yield training_step(quick, precision)
        if can_compile():
            yield training_step(quick, precision, compiled=True)


def can_compile():
    """Whether there is the C++ compiler that torch.compile needs on a CPU."""
    return any(map(shutil.which, ("g++", "clang++", "cl")))


def training_step(quick, precision, compiled=False):
    """One line of the table: a step in this precision, against the plain model's in float32."""
    V, C, n_heads, n_layers, T, B = 65, 128, 4, 4, 64, 12
    torch.manual_seed(0)
    model, plain = TinyGPT(V, C, n_heads, n_layers, T), PlainGPT(V, C, n_heads, n_layers, T)
    plain.copy_from(model)
    x, y = sample_batch(torch.randint(V, (5000,)), T, B)
    with torch.no_grad():
        exact = plain(x)
        torch.testing.assert_close(model(x), exact, atol=1e-5, rtol=1e-4)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            off = ((model(x) - exact).norm() / exact.norm()).item()
    assert off < 0.03, f"the logits of {precision} are off by {off:.1%} of their size"
    ours, theirs = make_optimizer(model, 1e-3), torch.optim.AdamW(plain.parameters(), lr=1e-3)
    losses, n = ([], []), 3 if quick else 10
    learner = torch.compile(model, mode="max-autotune-no-cudagraphs") if compiled else model

    def module():
        for _ in range(n):
            loss = train_step(learner, ours, x, y, lr=1e-3, precision=precision)
            losses[0].append(loss.item())

    def by_hand():
        for _ in range(n):
            loss = F.cross_entropy(plain(x).view(-1, V), y.reshape(-1))
            theirs.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            theirs.step()
            losses[1].append(loss.item())

    fast, slow = compare(module, by_hand, 5 if quick else 11)
    if precision == torch.float32:
        assert abs(losses[0][0] - losses[1][0]) < 1e-5, "the two sides do not compute the same"
    tokens, kind = n * B * T, str(precision).removeprefix("torch.")
    kind += ", compiled" if compiled else ""
    aim = "1.2 or more" if precision == torch.float32 else "1.9 or more"
    return (f"training in {kind}, {n_layers} layers, {n_heads} heads, {C} wide, {B} x {T}",
            f"{tokens / fast:,.0f} tokens/s, train_step",
            f"{tokens / slow:,.0f} tokens/s, plain, float32", slow / fast, aim)


# ---------------------------------------------------------------- generation


def generation(quick):
    """generate with the KV cache, against reading the whole text anew for each token."""
    torch.manual_seed(0)
    model = TinyGPT(65, 128, 4, 4, max_len=256)
    for T, new in [(8, 248), (128, 128)] if not quick else [(8, 60)]:
        prompt, texts = torch.randint(65, (1, T)), {}

        def write(use_cache, prompt=prompt, new=new, texts=texts):
            texts[use_cache] = generate(model, prompt, new, 0, use_cache=use_cache)

        fast, slow = compare(lambda: write(True), lambda: write(False), 5)  # noqa: B023
        same = "the same text" if torch.equal(*texts.values()) else "DIFFERENT TEXTS"
        yield (f"generation, {T} + {new} tokens, {same}", f"{new / fast:.0f} tokens/s, cache",
               f"{new / slow:.0f} tokens/s, no cache", slow / fast, "")


def warmed_up(model, prompt, new):
    """Text of a compiled model that has its graphs: whether they fit is not asked each time."""
    with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
        return generate(model, prompt, new, temperature=0)


def transformers(quick):
    """One request: generate against page 05's loop, and against Hugging Face's with its cache."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        print("  Hugging Face is left out; `python -m pip install transformers==4.57.1` with the\n"
              "  course's Python brings it in")
        GPT2LMHeadModel = None
    torch.manual_seed(0)
    for end, aim in [(512, "8 or more"), (1024, "20 or more")][: 1 if quick else 2]:
        model, prompt = TinyGPT(65, 128, 4, 4, max_len=end).eval(), torch.randint(65, (1, 8))
        new, repetitions = end - 8, 1 if quick else 5
        ways = {"eager": partial(generate, model, prompt, new, temperature=0)}
        if can_compile():
            # freezing: the weights become constants; for a model that will not be trained further
            options = dict(freezing=True, cpp_wrapper=True, max_autotune=True,  # a minute, once
                           autotune_num_choices_displayed=0)
            with torch._inductor.config.patch(options):
                fast_model = torch.compile(model, fullgraph=True)
                ids = generate(fast_model, prompt, new, temperature=0)
                assert torch.equal(ids, ways["eager"]()), "other ids when compiled"
            ways["compiled"] = partial(warmed_up, fast_model, prompt, new)
        loop = partial(generate, model, prompt, new, temperature=0, use_cache=False)
        fast, slow = compare(ways["eager"], loop, repetitions)
        yield (f"one request, 8 + {new} tokens", f"{new / fast:,.0f} tokens/s, eager",
               f"{new / slow:,.0f}, page 05's loop", slow / fast, aim)
        if GPT2LMHeadModel is None:
            continue
        config = GPT2Config(vocab_size=65, n_positions=end, n_embd=128, n_layer=4, n_head=4,
                            bos_token_id=0, eos_token_id=None)
        theirs = GPT2LMHeadModel(config).eval()

        def hugging_face(theirs=theirs, prompt=prompt, new=new):
            out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt),
                                  min_new_tokens=new, max_new_tokens=new, do_sample=False,
                                  use_cache=True, pad_token_id=0)
            assert out.shape == (1, 8 + new)

        for way, ours in ways.items():
            fast, slow = compare(ours, hugging_face, repetitions)
            yield (f"one request, 8 + {new} tokens", f"{new / fast:,.0f} tokens/s, {way}",
                   f"{new / slow:,.0f}, transformers", slow / fast,
                   {"eager": "2.2 or more", "compiled": "4 or more"}[way] if end == 512 else "")


# ---------------------------------------------------------------- serving


def serve(engine, requests, static=False, watch=None):
    """Serve `[(arrival in seconds, prompt, new tokens), ...]`; return when all is done.

    The clock advances by what each step takes and jumps over the time in which there is nothing to
    do. static: nobody is let in before all of the last batch are done, and every row is decoded
    until the longest is, as in a batched `generate`; what it writes beyond its own length is waste.
    """
    coming, now = list(requests), 0.0
    while coming or engine.queue or engine.running:
        idle = not engine.queue and not engine.running
        if idle:
            now = max(now, coming[0][0])
        arrived = sum(at <= now for at, _, _ in coming)
        joining = coming[: arrived if not static else idle * min(arrived, engine.max_batch)]
        del coming[: len(joining)]
        longest = max((n for _, _, n in joining), default=0)
        for _, prompt, n in joining:
            engine.submit(prompt, longest if static else n, temperature=0)
        began = time.perf_counter()
        engine.step()
        now += time.perf_counter() - began
        if watch:
            watch(engine)
    return now


def serving(quick):
    """64 requests of 5 to 100 + 10 to 120 tokens arrive over time; engine of 32 seats."""
    torch.manual_seed(0)
    model, dice = TinyGPT(65, 128, 4, 4, max_len=256).eval(), random.Random(0)
    n, repetitions = (16, 1) if quick else (64, 5)
    began = time.perf_counter()
    generate(model, torch.zeros(1, 1, dtype=torch.long), 50)
    gap = 4 * (time.perf_counter() - began) / 50  # four tokens' time between two arrivals
    requests, at = [], 0.0
    for _ in range(n):
        prompt = torch.randint(65, (dice.randint(5, 100),)).tolist()
        requests.append((at, prompt, dice.randint(10, 120)))
        at += dice.expovariate(1 / gap)
    engine = partial(Engine, model, page_size=4, n_pages=2048, chunk_size=128)
    kinds = {"continuous": (32, False), "static batches": (32, True),
             "one after another": (1, False)}
    aims = {"static batches": 1.6, "one after another": 5}
    ends = {kind: [] for kind in kinds}
    for i in range(repetitions + 1):
        for kind, (seats, static) in kinds.items():
            end = serve(engine(max_batch=seats), requests, static)
            if i:  # the first round only warms up
                ends[kind].append(end)
    tokens = sum(new for _, _, new in requests)
    speed = {kind: tokens / statistics.median(times) for kind, times in ends.items()}
    for kind in list(kinds)[1:]:
        yield (f"serving {n} requests, {tokens:,} new tokens",
               f"{speed['continuous']:,.0f} tokens/s, continuous", f"{speed[kind]:,.0f}, {kind}",
               speed["continuous"] / speed[kind], f"{aims[kind]} or more")
    paged, reserved = [], []

    def watch(engine):
        if engine.running:
            stats, held = engine.stats, sum(r.n_read for r in engine.running)
            paged.append(stats["unused slots"] / (4 * stats["used pages"]))
            reserved.append(1 - held / (model.max_len * len(engine.running)))

    serve(engine(max_batch=32), requests, watch=watch)
    one, two = statistics.mean(paged), statistics.mean(reserved)
    yield ("memory reserved but unused, mean of all steps", f"{one:.1%}, pages of 4",
           f"{two:.1%}, max_len for each", two / one, "4 % at most")


# ---------------------------------------------------------------- how well a model learns


def find_shakespeare():
    """The text, or None: from the cache, from a copy beside the repository, or downloaded."""
    copy = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    with tempfile.TemporaryDirectory() as folder:
        if copy.is_file():
            shutil.copy(copy, folder)
            os.environ["TINYGPT_CACHE"] = folder
        try:
            return load_corpus("shakespeare")
        except (OSError, ValueError) as error:
            print(f"  skipped, there is no Tiny Shakespeare: {error}")
            return None
        finally:
            if copy.is_file():
                del os.environ["TINYGPT_CACHE"]


def shakespeare(quick, lr=6e-3):
    """2,000 steps of 12 windows of 64 characters; the loss over the whole last tenth."""
    text = find_shakespeare()
    if text is None:
        return
    train_text, val_text = split_corpus(text)
    tok, steps = CharTokenizer(text), 100 if quick else 2000
    train_ids, val_ids = (torch.tensor(tok.encode(part)) for part in (train_text, val_text))
    torch.manual_seed(0)
    model = TinyGPT(tok.vocab_size, 128, 4, 4, max_len=64)
    began = time.perf_counter()
    train(model, train_ids, val_ids, steps=steps, batch_size=12, lr=lr, eval_every=steps)
    spent, loss = time.perf_counter() - began, evaluate(model, val_ids)
    yield (f"Tiny Shakespeare, {steps:,} steps of 12 x 64, lr {lr}",
           f"validation loss {loss:.3f}", f"{spent:.0f} s", None,
           "1.82 or less" if not quick else "")


BENCHES = {f.__name__: f for f in (batches, training, generation, transformers, serving,
                                       shakespeare)}


def main():
    parser = argparse.ArgumentParser(description="Measure speed, as ratios.")
    parser.add_argument("--only", choices=BENCHES, help="this one alone")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, less exact")
    args = parser.parse_args()
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
          f"{os.cpu_count()} cores{load}")
    rows = []
    for name in [args.only] if args.only else BENCHES:
        print(f"{name}: {BENCHES[name].__doc__}", flush=True)
        rows += BENCHES[name](args.quick)
    print()
    head = ("what", "here", "compared with", "ratio", "aim")
    table = [head] + [(*row[:3], f"{row[3]:.2f} x" if row[3] else "", row[4]) for row in rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    table.insert(1, tuple("-" * width for width in widths))
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())


if __name__ == "__main__":
    main()
