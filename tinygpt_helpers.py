"""TinyGPT: a decoder-only transformer, from characters to generated text, in one file.

`make module` writes it from the finished cells of the pages that its headings name.
B: batch, T: tokens in a window, C: width (d_model), V: size of the vocabulary."""

import collections
import io
import json
import math
import operator
import os
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from itertools import groupby
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F

# -------------------------------------------------------- page 00: start here

def pick_device(name=None):
    """Return the `torch.device` to compute on: `name`, or if None CUDA, MPS (Apple) or
    the CPU. ValueError if it is not on this machine."""
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    name = name or next(kind for kind in backends if backends[kind].is_available())
    backend = backends.get(str(name).split(":")[0])
    if not (backend and backend.is_available()):
        raise ValueError(f"no device {name!r} here: 'cpu' always, maybe 'cuda', 'mps'")
    return torch.device(name)

# -------------------------------------------------------- page 01: text and tokenizer

DATA = Path(__file__).resolve().parent / "data"
PLAYS = "https://github.com/karpathy/char-rnn/raw/master/data/tinyshakespeare/input.txt"
PLAYS_HASH = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

def write_atomically(path, data):
    """Write bytes to a file: a reader finds the old content or the new, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

def load_corpus(name="tiny"):
    """Return a text to train on, as one string with "\\n" line ends.
    name: "tiny" (the course's own stories), "shakespeare" (1.1 MB, downloaded once, to
    ~/.cache/tinygpt or where TINYGPT_CACHE says), or the path of a UTF-8 text."""
    path = DATA / "tiny_corpus.txt" if name == "tiny" else Path(name).expanduser()
    if name == "shakespeare":
        folder = Path(os.environ.get("TINYGPT_CACHE", "~/.cache/tinygpt")).expanduser()
        path = folder / "tinyshakespeare.txt"
        if not path.exists() or sha256(path.read_bytes()).hexdigest() != PLAYS_HASH:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(PLAYS, path, PLAYS_HASH, progress=False)
            except (OSError, RuntimeError) as error:
                raise ConnectionError(
                    f"could not download {PLAYS} ({error}). Try again, name another"
                    f" folder by TINYGPT_CACHE, or put the file at {path}") from error
    if not path.is_file():
        raise FileNotFoundError(f"no text file '{path}'; known: tiny, shakespeare")
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: without Windows's mark
    except UnicodeDecodeError as error:
        raise ValueError(f"'{name}' is not UTF-8; save it as UTF-8: {error}") from None
    if not text.strip():
        raise ValueError(f"'{name}' is empty; a text to learn from needs a few pages")
    return text

def split_corpus(text, by_line=False):
    """Return `(train_text, val_text)`: the first 90 % and the last 10 %. by_line: cut
    between lines, so that no story is in both; else anywhere, usual on Shakespeare."""
    parts = text.splitlines(keepends=True) if by_line else text
    cut = int(0.9 * len(parts))
    return "".join(parts[:cut]), "".join(parts[cut:])

class CharTokenizer:
    """Text to ids and back: an id for each distinct character of `text`. ValueError: an
    unknown character or id, no text, a damaged file."""
    def __init__(self, text):
        if not text:
            raise ValueError("text is empty; a vocabulary needs at least one character")
        self.itos = dict(enumerate(sorted(set(text))))  # id -> character
        self.stoi = {ch: i for i, ch in self.itos.items()}  # character -> id
        self.vocab_size = len(self.itos)
        self.state = {"kind": "char", "characters": "".join(self.stoi)}

    def encode(self, s):
        if bad := [ch for ch in s if ch not in self.stoi]:
            place, known = s.index(bad[0]), "".join(self.stoi)
            raise ValueError(f"character {bad[0]!r} (position {place}) is not in the "
                             f"vocabulary of {len(known)}; known: {known!r}")
        return [self.stoi[ch] for ch in s]

    def decode(self, ids):
        ids = [int(i) for i in ids]  # a tensor's entries too
        if bad := [i for i in ids if i not in self.itos]:
            raise ValueError(f"id {bad[0]} is not in 0..{self.vocab_size - 1}")
        return "".join(self.itos[i] for i in ids)

    def save(self, path):
        write_atomically(path, json.dumps(self.state).encode())

    @classmethod
    def load(cls, path):
        try:
            return cls.from_state(json.loads(Path(path).read_text(encoding="utf-8")))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"'{path}' is damaged or foreign: {error!r}") from None

    @classmethod
    def from_state(cls, state):
        tokenizer = cls(state["characters"])
        if tokenizer.state != state:
            raise ValueError(f"{state} is not what a CharTokenizer would write")
        return tokenizer

TOKENIZERS = {"char": CharTokenizer}  # the kinds that a checkpoint may hold

# -------------------------------------------------------- page 02: windows and batches

class NextTokenDataset(torch.utils.data.Dataset):
    """Every window of `block_size` tokens, with the next tokens as targets: item i is
    `(x, y)`, both `(block_size,)` int64, from i and i + 1 on. ValueError: none fits."""
    def __init__(self, ids, block_size):
        self.ids = torch.as_tensor(ids, dtype=torch.long)
        self.block_size, n = block_size, len(self.ids)
        if not 1 <= block_size < n:  # the last token is a target only
            raise ValueError(f"block_size {block_size}: {n} tokens allow 1 to {n - 1}")

    def __len__(self):
        return len(self.ids) - self.block_size

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} is not in 0..{len(self) - 1}")
        window = self.ids[i : i + self.block_size + 1]
        return window[:-1], window[1:]

def sample_batch(ids, block_size, batch_size, generator=None, starts=None):
    """Return `batch_size` random items of NextTokenDataset: `(x, y)`, `(B, T)` int64.
    ids: 1-D int64. starts: where windows may begin, 1-D int64 (None: anywhere).
    generator: on the device of `ids`. ValueError if no window fits."""
    k = max(0, len(ids) - block_size) if starts is None else len(starts)
    if k < 1 or len(ids) < block_size + 1:
        raise ValueError(f"{len(ids)} tokens, {k} starts: no window of {block_size}")
    rows = torch.randint(k, (batch_size,), generator=generator, device=ids.device)
    rows = rows if starts is None else starts[rows]
    windows = ids.unfold(0, block_size + 1, 1).index_select(0, rows)  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]

# -------------------------------------------------------- page 03: the model

def attention_weights(q, k):
    """Return who looks at whom: softmax(q k^T / sqrt(d_head)), each at its past only.
    q, k: `(..., T, d_head)` -> `(..., T, T)`, rows sum to 1 (Vaswani et al. 2017)."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    future = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1)

@dataclass
class GPTConfig:
    """The sizes of a model; ValueError for sizes that make none."""
    vocab_size: int
    d_model: int  # the width of the residual stream
    n_heads: int  # attention heads in each block; d_head = d_model / n_heads
    n_layers: int
    max_len: int  # the longest text that it reads, in tokens
    dropout: float = 0.0

    def __post_init__(self):
        sizes = self.vocab_size, self.d_model, self.n_heads, self.n_layers, self.max_len
        if min(sizes) < 1 or self.d_model % self.n_heads or not 0 <= self.dropout < 1:
            raise ValueError(f"{self}: sizes > 0, n_heads divides d_model, dropout < 1")

class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention, `(B, T, C)` -> `(B, T, C)`, by memory.attend;
    memory None: each token looks at this call's up to itself, by a fused kernel."""
    def __init__(self, config, layer=0):
        super().__init__()
        self.layer, self.n_heads, self.dropout = layer, config.n_heads, config.dropout
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model, bias=False)
        self.proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x, memory=None):
        B, T, C = x.shape  # q, k and v become (B, n_heads, T, d_head) each
        heads = self.qkv(x).view(B, T, 3 * self.n_heads, C // self.n_heads)
        q, k, v = heads.transpose(1, 2).split(self.n_heads, dim=1)
        p = self.dropout if self.training else 0.0
        if memory is None:
            q, k, v = (t.type_as(x) if x.is_cpu else t for t in (q, k, v))  # page 04
            with torch.autocast("cpu", enabled=False):
                y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
        else:
            y = memory.attend(self.layer, q, k, v)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return F.dropout(self.proj(y), p) if p else self.proj(y)

class Block(nn.Module):
    """A pre-norm block, `(B, T, C)` -> `(B, T, C)`: attention and MLP add to x."""
    def __init__(self, config, layer=0):
        super().__init__()
        C, p = config.d_model, config.dropout
        self.norm1 = nn.LayerNorm(C)
        self.attention = CausalSelfAttention(config, layer)
        self.norm2 = nn.LayerNorm(C)
        self.mlp = nn.Sequential(
            nn.Linear(C, 4 * C, bias=False), nn.GELU(), nn.Linear(4 * C, C, bias=False),
            *([nn.Dropout(p)] if p else []))

    def forward(self, x, memory=None):
        x = x + self.attention(self.norm1(x), memory)
        return x + self.mlp(self.norm2(x))

def check_ids(idx, V):
    """Raise a ValueError unless idx is `(B, T)` ids below V. To look at values stops a
    GPU or a compiled graph: generate, train and Engine check on the CPU, once."""
    if idx.ndim != 2 or idx.size(1) == 0 or idx.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"idx: integers (B, T), T > 0, not {[*idx.shape]} {idx.dtype}")
    if idx.is_cpu and not torch.compiler.is_compiling() and idx.numel():
        low, high = (end.item() for end in idx.aminmax())
        if low < 0 or high >= V:
            raise ValueError(f"ids {low} to {high} do not fit a vocabulary, 0..{V - 1}")

def sinusoids(length, width):
    """Return waves from fast to slow, `(length, width)`: neighbours are alike. Vaswani
    et al. 2017, section 3.5, with 1,000 for 10,000: the texts here are short."""
    angles = torch.arange(length)[:, None] / 1000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]

@torch.no_grad()
def init_weights(model):
    """Set the weights a model starts from: a first loss of ln V, and fast from there.
    Matrices: normal, std 1 / sqrt(inputs); less by sqrt(2 n_layers) where they add to
    the residual stream (GPT-2, section 2.3); tiny in the head: it says nothing yet."""
    for name, weight in model.named_parameters():
        if weight.ndim > 1:  # the norms begin as PyTorch has them: gain 1, bias 0
            std = 0.3 if name == "tokens.weight" else weight.size(1) ** -0.5
            if name.endswith(("proj.weight", "mlp.2.weight")):
                std = std / math.sqrt(2 * len(model.blocks))
            weight.normal_(std=0.05 * std if name == "head.weight" else std)
    model.positions.weight.copy_(0.4 * sinusoids(*model.positions.weight.shape))

class TinyGPT(nn.Module):
    """A decoder-only transformer of a GPTConfig, or its fields: ids `(B, T)` -> logits
    `(B, T, V)`. memory: place(idx) says where the tokens stand, attend(layer, q, k, v)
    lets them look (AttentionRecorder, KVCache, PagedBatch); None: they are the whole
    text. ValueError: T > max_len, ids outside the vocabulary."""
    def __init__(self, *sizes, **named_sizes):
        super().__init__()
        whole = len(sizes) == 1 and isinstance(sizes[0], GPTConfig) and not named_sizes
        self.config = config = sizes[0] if whole else GPTConfig(*sizes, **named_sizes)
        self.vocab_size, self.max_len = config.vocab_size, config.max_len
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.max_len, config.d_model)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        init_weights(self)

    def forward(self, idx, memory=None):
        check_ids(idx, self.vocab_size)
        T = idx.size(1)
        if memory is None and T > self.max_len:
            raise ValueError(f"T = {T} > max_len: crop to idx[:, -{self.max_len}:]")
        here = torch.arange(T, device=idx.device)
        places = here if memory is None else memory.place(idx)
        x = self.dropout(self.tokens(idx) + self.positions(places))  # (B, T, C)
        for block in self.blocks:
            x = block(x, memory)
        return self.unembed(x)

    def unembed(self, x):
        """Return the logits `(..., V)` of a residual stream `(..., C)`."""
        return self.head(self.norm(x))

class AttentionRecorder:
    """A memory like None that keeps what the fused kernel never stores: after
    model(idx, recorder), recorder.weights is `(n_layers, B, n_heads, T, T)`."""
    def place(self, idx):
        self.maps = []
        return torch.arange(idx.size(1), device=idx.device)

    def attend(self, layer, q, k, v):
        self.maps.append(attention_weights(q, k))
        return self.maps[-1] @ v

    @property
    def weights(self):
        return torch.stack(self.maps)

# -------------------------------------------------------- page 04: training

def train_one_epoch(model, loader, optimizer, device):
    """Train on each batch of `loader` once; return the mean loss, in nats per token."""
    model.train()
    total, count = 0.0, 0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # (B*T, V), (B*T,)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * y.numel()
        count += y.numel()
    if count == 0:
        raise ValueError("the loader has no batch: too few windows, with drop_last?")
    return total / count

@contextmanager
def eval_mode(model):
    """Switch dropout off inside a `with` block; afterwards the mode is what it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

@torch.no_grad()
def evaluate(model, ids, batch_size=64, starts=None):
    """Return the mean loss over `ids`, 1-D int64, in nats per token, with dropout off.
    Windows, of max_len at most, follow one another, or begin at `starts`, rising."""
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} tokens are too few to evaluate: 2 are needed")
    last, T, total = len(ids) - 1, model.max_len, 0.0
    cuts = [*(range(0, last, T) if starts is None else starts.tolist()), last]
    parts = [ids[a : min(a + T, b) + 1] for a, b in zip(cuts, cuts[1:])]
    parts = nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-100)
    with eval_mode(model):
        for part in parts.to(model.head.weight.device).split(batch_size):
            x, y = part[:, :-1].clamp(min=0), part[:, 1:]  # (B, T); -100 does not count
            logits = model(x).flatten(0, 1)
            total += F.cross_entropy(logits, y.flatten(), reduction="sum").item()
    return total / (parts[:, 1:] >= 0).sum().item()

def make_optimizer(model, lr, weight_decay=0.1):
    """Return AdamW (Loshchilov and Hutter 2019) that decays matrices, not the norms'
    vectors. lr: the peak. The betas are nanoGPT's for character models."""
    params = [*model.parameters()]
    groups = [dict(params=[p for p in params if p.ndim > 1], weight_decay=weight_decay),
              dict(params=[p for p in params if p.ndim < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr, betas=(0.9, 0.99), fused=True)
    count = torch.autograd.graph.increment_version  # the fused kernel does not: page 08
    optimizer.register_step_post_hook(lambda *step: [count(p) for p in params])
    return optimizer

def get_lr(done, peak, warmup=0.05):
    """Return the learning rate when a share `done` of the training is over: to `peak`
    within `warmup`, then half a cosine to 0 (Loshchilov and Hutter 2017)."""
    if done < warmup:
        return peak * (done + 0.01) / (warmup + 0.01)
    return peak / 2 * (1 + math.cos(math.pi * min(1, (done - warmup) / (1 - warmup))))

def pick_precision(device):
    """Return the dtype in which training multiplies on this torch.device: bfloat16 if
    the chip knows it, else on CUDA float16, else float32 (Micikevicius et al. 2018)."""
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if able else torch.float16
    can = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    able = can.get("avx512_bf16") or can.get("amx_bf16")
    return torch.bfloat16 if able else torch.float32

def train_step(model, optimizer, x, y, lr, clip=1.0, precision=torch.float32,
               scaler=None):
    """Take a step at learning rate `lr` on a batch `(x, y)`, both `(B, T)`; return the
    loss, a tensor: to fetch it makes a GPU wait. Gradients of a norm above `clip` are
    scaled down to it (Pascanu et al. 2013). scaler: a GradScaler, for float16."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad()
    scaler = scaler or torch.amp.GradScaler(enabled=False)  # one that does nothing
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    scaler.step(optimizer)
    scaler.update()
    return loss.detach()

def progress_line(first=0.0):
    """Return `show(progress, message, last=False)`, which prints how far from 0 to 1
    a loop is that began at `first`: in one line, or in a log in a new one each 10 s."""
    live = sys.stdout.isatty() or "ipykernel" in sys.modules
    began, shown = time.perf_counter(), 0.0

    def show(progress, message, last=False):
        nonlocal shown
        spent = time.perf_counter() - began
        if last or spent - shown > (0.2 if live else 10):
            shown, left = spent, spent / max(progress - first, 0.001) * (1 - progress)
            message = f"{message}  {spent:.0f} s, {left:.0f} s left"
            line = f"[{'=' * int(20 * progress):.<20}] {message}"
            end = "" if live and not last else "\n"
            print(f"\r{line:<95}" if live else line, end=end, flush=True)

    return show

def save_checkpoint(path, model, optimizer=None, step=0, tokenizer=None, generator=None,
                    history=None, scaler=None, seed=None):
    """Write all that a run needs to go on. generator: the one of the batches."""
    buffer, device = io.BytesIO(), model.head.weight.device
    gpu = None if device.type == "cpu" else torch.get_device_module(device)
    torch.save({
        "format": "tinygpt-2", "config": asdict(model.config), "history": history,
        "model": model.state_dict(), "optimizer": optimizer and optimizer.state_dict(),
        "scaler": scaler and scaler.state_dict(), "step": step, "seed": seed,
        "tokenizer": tokenizer and tokenizer.state,
        "rng": {"torch": torch.get_rng_state(),
                "gpu": gpu and gpu.get_rng_state(device),
                "batches": generator and generator.get_state()},
    }, buffer)
    write_atomically(path, buffer.getvalue())

def load_checkpoint(path, device="cpu"):
    """Read a checkpoint; return its dict, "model" and "tokenizer" as objects again. A
    file can run no code nor fill the memory. ValueError if it is damaged or foreign."""
    data = Path(path).read_bytes()
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as parts:
            size = sum(part.file_size for part in parts.infolist())
            if size > len(data) or parts.testzip():  # torch.load looks at no checksum
                raise ValueError("parts are changed or packed")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if state["format"] != "tinygpt-2":
            raise ValueError(f"its format is {state['format']!r}, not 'tinygpt-2'")
        config, weights = GPTConfig(**state["config"]), state["model"].values()
        whole = all(w.is_contiguous() and not w.is_meta for w in weights)
        if not whole or config.n_layers > len(weights):
            raise ValueError(f"it is too small for {config}")
        with torch.device("meta"):  # shapes alone
            model = TinyGPT(config)
        model.load_state_dict(state["model"], assign=True)
        if (tokenizer := state["tokenizer"]) is not None:
            tokenizer = TOKENIZERS[tokenizer["kind"]].from_state(tokenizer)
            if tokenizer.vocab_size != config.vocab_size:
                raise ValueError(f"{tokenizer.vocab_size} tokens do not fit {config}")
    except Exception as error:  # torch.load's for damaged files are of many kinds
        why = f"{type(error).__name__}, {error}".splitlines()[0][:90]
        raise ValueError(f"'{path}' is damaged, no TinyGPT checkpoint: {why}") from None
    return state | {"model": model.to(device), "tokenizer": tokenizer}

def resume_run(state, model, optimizer, generator, scaler, seed):
    """Put back a run that load_checkpoint read; return its history. ValueError: no run,
    another seed, or optimiser states past whose end the fused kernel would write."""
    if not (state["optimizer"] and state["history"]):
        raise ValueError("it holds a model alone, which can generate, but not resume")
    if state["seed"] != seed:
        raise ValueError(f"seed is {seed}; this run began with {state['seed']}")
    try:
        model.load_state_dict(state["model"].state_dict())
        groups = optimizer.state_dict()["param_groups"]  # our settings, not the file's
        optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        for p, kept in optimizer.state.items():
            for m in (kept["exp_avg"], kept["exp_avg_sq"]):
                if m.shape != p.shape or not m.is_contiguous() or kept["step"].ndim:
                    raise ValueError("its optimiser's states do not fit its weights")
        scaler.load_state_dict(state["scaler"])
        generator.set_state(state["rng"]["batches"])
        torch.set_rng_state(state["rng"]["torch"])  # dropout draws here or on the GPU
        if (kept := state["rng"]["gpu"]) is not None:
            device = generator.device  # torch.cuda's functions, or torch.mps's
            torch.get_device_module(device).set_rng_state(kept, device)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"the run is damaged, or not from here: {error!r}") from None
    return {name: list(values) for name, values in state["history"].items()}

def validate_and_save(model, validate, history, step, out=None, **rest):
    """Add validate(model) to `history`; save last.pt and, if it is the best, best.pt in
    `out`, with `rest`. FloatingPointError, and no file touched, if not finite."""
    if step in history["val_step"]:  # measured just before the run was paused
        return
    history["val_step"].append(step)
    history["val_loss"].append(validate(model))
    if not math.isfinite(loss := history["val_loss"][-1]):
        raise FloatingPointError(f"step {step}: the validation loss is {loss}")
    for name in ("best.pt", "last.pt") if out else ():  # last.pt last: the step is done
        if name == "last.pt" or loss == min(history["val_loss"]):
            save_checkpoint(Path(out) / name, model, step=step, history=history, **rest)

@dataclass
class TrainConfig:
    """How to train; ValueError for a number that cannot be."""
    steps: int = 1000
    batch_size: int = 32
    lr: float = 3e-3  # the highest: see get_lr
    block_size: int | None = None  # tokens in a window; None: the model's max_len
    eval_every: int = 200  # steps from one validation, and checkpoint, to the next
    max_seconds: float = math.inf  # end after so many, with the rate down by then
    stop_at: float = math.inf  # pause before this step
    seed: int = 0  # of the batches
    precision: torch.dtype = torch.float32  # see pick_precision
    compile: bool = False  # by torch.compile: slow to start, then faster

    def __post_init__(self):
        for name in "steps batch_size lr eval_every max_seconds stop_at".split():
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be above 0")

def train(model, train_ids, val_ids, starts=None, validate=None, out=None,
          tokenizer=None, resume=None, on_eval=lambda history: None, **settings):
    """Train; return {"train_loss": [...], "val_step": [...], "val_loss": [...]}.
    settings: TrainConfig's fields. Every `eval_every` steps: validate_and_save to the
    folder `out`, if any (validate None: evaluate on val_ids), then on_eval(history).
    starts: see sample_batch. resume: a loaded checkpoint to go on from. A loss that is
    not finite: FloatingPointError within 10 steps; the files stay as they were."""
    run, device = TrainConfig(**settings), next(model.parameters()).device
    check_ids(train_ids[None].cpu(), model.vocab_size)
    train_ids, T = train_ids.to(device), run.block_size or model.max_len
    starts = None if starts is None else starts.to(device)
    validate = validate or partial(evaluate, ids=val_ids)
    optimizer = make_optimizer(model, run.lr)
    generator = torch.Generator(device).manual_seed(run.seed)
    scaler = torch.amp.GradScaler(device.type, enabled=run.precision == torch.float16)
    history = {"train_loss": [], "val_step": [], "val_loss": []}
    if resume:
        history = resume_run(resume, model, optimizer, generator, scaler, run.seed)
    state = dict(out=out, optimizer=optimizer, tokenizer=tokenizer, generator=generator,
                 scaler=scaler, seed=run.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, for what stays in float32
    mode = "max-autotune-no-cudagraphs"
    learner = torch.compile(model, mode=mode) if run.compile else model
    step, losses = len(history["train_loss"]), []  # losses: still on the device
    show, began = progress_line(step / run.steps), time.perf_counter()
    while True:
        spent = time.perf_counter() - began
        progress = min(1.0, max(step / run.steps, spent / run.max_seconds))
        last = progress == 1 or step >= run.stop_at
        evaluating = last or step % run.eval_every == 0
        if losses and (evaluating or len(losses) == 10):
            history["train_loss"] += torch.stack(losses).tolist()
            for at in range(step - len(losses), step):
                if not math.isfinite(loss := history["train_loss"][at]):
                    raise FloatingPointError(f"step {at}: loss {loss}; try a lower lr")
            losses = []
        if evaluating:
            validate_and_save(model, validate, history, step, **state)
            on_eval(history)
        mean = torch.tensor(history["train_loss"][-50:]).mean()  # nan before the first
        newest = history["val_loss"][-1]
        show(progress, f"step {step:,}  loss {mean:.3f}, validation {newest:.3f}", last)
        if last:
            return history
        x, y = sample_batch(train_ids, T, run.batch_size, generator, starts)
        losses.append(train_step(learner, optimizer, x, y, get_lr(progress, run.lr),
                                 precision=run.precision, scaler=scaler))
        step += 1

def plot_loss(history, floor=None, title="The loss falls"):
    """Draw a history that `train` returned, single steps pale, means of 2 % of the run
    dark; return the figure. floor: nats per token that no model beats on average."""
    losses = torch.tensor(history["train_loss"] or [math.nan])
    w = max(1, len(losses) // 50)
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.plot(losses, color="C0", alpha=0.25, linewidth=0.8)
    ax.plot(range(w - 1, len(losses)), losses.unfold(0, w, 1).mean(1), label="training")
    ax.plot(history["val_step"], history["val_loss"], "C1o--", label="validation")
    if floor is not None:
        ax.axhline(floor, color="k", ls=":", label=f"floor of the text, {floor:.3f}")
    ax.set(xlabel="step", ylabel="loss (nats per token)", title=title, ylim=(0, None))
    ax.legend()
    return figure

# -------------------------------------------------------- page 05: generation

def next_token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """Turn logits `(B, V)` into probabilities `(B, V)` to sample the next token from.
    temperature divides the logits; 0 puts all on the largest (greedy). top_k: the k
    likeliest stay; top_p: the fewest that together reach p (Holtzman et al. 2020)."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be finite, 0 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; at least 1 token must stay (None: all)")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0, at most 1 (None: all)")
    logits = logits.float()  # first: half precision would round differences
    highest, best = logits.max(-1, keepdim=True)
    if not math.isfinite(highest.abs().max().item()):
        raise ValueError("the logits are nan or infinite: training spoilt the weights")
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    logits = (logits - highest) / max(temperature, 1e-30)  # float32 takes less for 0
    if top_k is not None:
        values, kept = logits.topk(min(top_k, logits.size(-1)))
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept, values)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ranked, order = probs.sort(descending=True, stable=True)
        beyond = ranked.cumsum(-1) - ranked >= max(top_p, 1e-30)  # p is reached before
        probs = probs.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
    return probs / probs.sum(-1, keepdim=True)

def sample(probs, generator=None):
    """Draw one token from each row of probs `(B, V)`: `(B,)` int64. It is drawn where
    the generator lives: a seed gives the same random numbers for every device."""
    place = generator.device if generator else probs.device
    return probs.to(place).multinomial(1, generator=generator)[:, 0].to(probs.device)

def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
             generator=None, stop_id=None, use_cache=True):
    """Append max_new_tokens tokens to idx `(B, T)`: `(B, T + max_new_tokens)`. The
    model, compiled or not, sees the last max_len. temperature to top_p: see
    next_token_probs. generator: for the same text again. stop_id: fills a row that has
    written it. use_cache: read each token once. ValueError: no prompt, a bad value."""
    check_ids(idx.cpu(), model.vocab_size)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    idx = F.pad(idx.long(), (0, max_new_tokens), value=stop_id or 0)
    done, n_read = idx.new_zeros(len(idx), dtype=torch.bool), 0
    cache = KVCache(model, len(idx)) if use_cache else None
    with eval_mode(model), torch.inference_mode():
        for t in range(idx.size(1) - max_new_tokens, idx.size(1)):
            if cache is not None and t <= model.max_len:
                logits = model(idx[:, n_read:t], cache)
                n_read = t
            else:
                logits = model(idx[:, max(0, t - model.max_len) : t])  # positions move
            probs = next_token_probs(logits[:, -1], temperature, top_k, top_p)
            idx[:, t] = sample(probs, generator) if temperature else probs.argmax(-1)
            if stop_id is not None:
                idx[done, t] = stop_id
                done |= idx[:, t] == stop_id
                if done.all():
                    break
    return idx

def sample_stories(model, tokenizer, n, prompt="", temperature=1.0, seed=0,
                   max_chars=180):
    """Return `n` stories as strings: what the model writes from a line's start to its
    end. Each begins with `prompt`; after `max_chars` more tokens it is cut."""
    [newline] = tokenizer.encode("\n")
    start = torch.tensor(tokenizer.encode("\n" + prompt)).to(model.head.weight.device)
    idx = generate(model, start.expand(n, -1), max_chars, temperature, stop_id=newline,
                   generator=torch.Generator().manual_seed(seed))
    return [tokenizer.decode(row.tolist()).strip("\n") for row in idx]

# -------------------------------------------------------- page 06: looking inside

def head_scores(weights, targets):
    """Return how well each head does a job, `(n_layers, n_heads)`, from 0 to 1: its
    weights `(n_layers, B, n_heads, T, T)` on the targets, a mean over rows with any.
    targets: `(B, T, T)` bool, True where a row's position is to look at a column's."""
    shape = tuple(weights[0, :, 0].shape)
    if targets.dtype != torch.bool or targets.shape != shape or not targets.any():
        raise ValueError(f"targets must be {shape} bool with a True in it, not "
                         f"{tuple(targets.shape)} {targets.dtype} with {targets.sum()}")
    hits = (weights * targets[:, None]).sum(-1).transpose(1, 2)  # (layers, heads, B, T)
    return hits[:, :, targets.any(-1)].mean(-1)

@contextmanager
@torch.no_grad()
def ablate(model, heads):
    """Knock heads out inside a `with` block: nothing that they gather gets through
    (Michel et al. 2019). heads: pairs (layer, head); their columns of `proj` are zero.
    The model is whole again afterwards. ValueError if it has no such head."""
    c, heads = model.config, list(heads)
    for layer, head in heads:
        if not (0 <= layer < c.n_layers and 0 <= head < c.n_heads):
            raise ValueError(f"no head {head} in layer {layer}; counted from 0 in {c}")
    weights = [block.attention.proj.weight for block in model.blocks]  # each (C, C)
    kept, d_head = [weight.clone() for weight in weights], c.d_model // c.n_heads
    try:
        for layer, head in heads:
            weights[layer][:, head * d_head : (head + 1) * d_head] = 0
        yield
    finally:
        for weight, whole in zip(weights, kept):
            weight.copy_(whole)

@torch.no_grad()
def logit_lens(model, idx):
    """Return the logits that each layer would give, `(n_layers + 1, B, T, V)`: n reads
    the residual stream after n blocks. For a model in eval mode. nostalgebraist 2020"""
    stream, parts = [], [model.dropout, *model.blocks]  # hooks see what these return
    hooks = [part.register_forward_hook(lambda part, x, out: stream.append(out))
             for part in parts]
    try:
        model(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return model.unembed(torch.stack(stream))

# -------------------------------------------------------- page 07: the KV cache

class KVCache:
    """A memory of the keys and values of all that was read: model(idx, cache) reads new
    tokens, idx `(B, T)`, and gives the last T rows of model(all). k, v: for each layer
    `(B, n_heads, max_len, d_head)`, `length` in use. On a CPU: ValueError if full."""
    def __init__(self, model, batch_size):
        c, weight = model.config, model.head.weight
        shape = batch_size, c.n_heads, c.max_len, c.d_model // c.n_heads
        self.k = [weight.new_zeros(shape) for _ in range(c.n_layers)]
        self.v = [weight.new_zeros(shape) for _ in range(c.n_layers)]
        self.length = torch.zeros(1, dtype=torch.long, device=weight.device)

    def place(self, idx):
        T, max_len, device = idx.size(1), self.k[0].size(2), idx.device
        self.places, self.end = self.length + torch.arange(T, device=device), max_len
        if device.type == "cpu" and not torch.compiler.is_compiling():
            self.end = self.length.item() + T  # no need to look at what is empty
            if self.end > max_len:
                raise ValueError(f"{self.end} tokens pass max_len = {max_len}")
        self.mask = None  # the last token of a text may look at all of it
        if T > 1 or self.end == max_len:
            future = torch.arange(self.end, device=device) > self.places[:, None]
            self.mask = self.k[0].new_zeros(future.shape).masked_fill(future, -math.inf)
        self.length += T
        return self.places

    def attend(self, layer, q, k, v):
        k = self.k[layer].index_copy_(2, self.places, k).narrow(2, 0, self.end)
        v = self.v[layer].index_copy_(2, self.places, v).narrow(2, 0, self.end)
        return F.scaled_dot_product_attention(q, k, v, self.mask)

# -------------------------------------------------------- page 08: serving

class PagePool:
    """Memory for keys and values in pages of page_size tokens. A page without users is
    free (ref_count 0); a full one is found by its text until it is lent again. Kwon et
    al. 2023, section 4. kv: `(n_layers, n_pages, page_size, 2, n_heads, d_head)`."""
    def __init__(self, model, n_pages, page_size):
        c, self.page_size = model.config, page_size
        shape = c.n_layers, n_pages, page_size, 2, c.n_heads, c.d_model // c.n_heads
        self.kv = model.head.weight.new_zeros(shape)
        self.ref_count = [0] * n_pages
        self.free = dict.fromkeys(range(n_pages))  # ordered: the longest free first
        self.known = {}  # the tokens of a text up to the end of a full page -> the page
        self.prefix = {}  # the way back

    def allocate(self):
        """Lend the page that has been free the longest; forget the text in it."""
        page = next(iter(self.free))
        self.known.pop(self.prefix.pop(page, None), None)
        return self.share(page)

    def share(self, page):
        """Add one user to a page."""
        self.free.pop(page, None)
        self.ref_count[page] += 1
        return page

    def release(self, pages):
        """Take one user from each page, the last first: a beginning stays known."""
        for page in reversed(pages):
            self.ref_count[page] -= 1
            if self.ref_count[page] == 0:
                self.free[page] = None

    def remember(self, page, text):
        """Note that a full page holds the last page_size tokens of `text`."""
        prefix = tuple(text)
        if prefix not in self.known:
            self.known[prefix], self.prefix[page] = page, prefix

    def match_prefix(self, text):
        """Return the known pages with the first tokens of `text`, whole pages only."""
        pages = []
        for end in range(self.page_size, len(text) + 1, self.page_size):
            if (page := self.known.get(tuple(text[:end]))) is None:
                break
            pages.append(page)
        return pages

class PagedBatch:
    """A memory for pieces of texts side by side: model(idx, batch), idx `(1, N)`.
    pieces: (start, n, pages) of each: where its n new tokens start, its pages in order.
    Neighbours with the same n attend together, up to 16, as wide as the longest."""
    def __init__(self, pool, pieces):
        size, device = pool.page_size, pool.kv.device
        where = [(at, pages[at // size] * size + at % size)
                 for start, n, pages in pieces for at in range(start, start + n)]
        places, slots = torch.tensor(where, device=device).T  # (N,): in text, in pool
        self.pool, self.places, self.slots, self.groups = pool, places, slots, []
        for n, alike in groupby(pieces, key=lambda piece: piece[1]):
            alike = list(alike)
            for rows in (alike[i : i + 16] for i in range(0, len(alike), 16)):
                now, places = places[: n * len(rows)], places[n * len(rows) :]
                P = max(start + n - 1 for start, n, _ in rows) // size + 1
                tables = [(pages + P * [0])[:P] for _, _, pages in rows]  # 0: masked
                future = torch.arange(P * size, device=device) > now.view(-1, 1, n, 1)
                mask = pool.kv.new_zeros(future.shape).masked_fill(future, -math.inf)
                self.groups.append((torch.tensor(tables, device=device), mask))

    def place(self, idx):
        return self.places

    def attend(self, layer, q, k, v):
        memory = self.pool.kv[layer]  # (n_pages, page_size, 2, H, d)
        memory.flatten(0, 1)[self.slots] = torch.stack([k[0], v[0]]).permute(2, 0, 1, 3)
        queries = q[0].split([mask[..., 0].numel() for _, mask in self.groups], dim=1)
        gathered = []
        for q, (tables, mask) in zip(queries, self.groups):
            past = memory.index_select(0, tables.flatten()).unflatten(0, tables.shape)
            k, v = past.flatten(1, 2).permute(2, 0, 3, 1, 4)  # (rows, H, P * size, d)
            q = q.unflatten(1, (len(tables), -1)).transpose(0, 1)  # (rows, H, n, d)
            y = F.scaled_dot_product_attention(q, k, v, mask)
            gathered.append(y.transpose(0, 1).flatten(1, 2))
        return torch.cat(gathered, 1)[None]  # (1, H, N, d)

@dataclass(eq=False)
class Request:
    """One text that the engine writes: what was asked for, and how far it is."""
    id: int
    idx: list  # the ids of the prompt, then what was written
    n_prompt: int
    max_new_tokens: int
    sampling: tuple  # temperature, top_k, top_p
    generator: torch.Generator
    stop_ids: frozenset
    pages: list = field(default_factory=list)
    n_read: int = 0  # how many tokens have their keys and values in the pages
    state: str = "queued"  # prefill, decode, done; preempted (queued again), cancelled

class Engine:
    """Serve many requests with one model; it knows ids, not text. A step is one
    forward: a token of each text being written, at most chunk_size tokens of prompts
    (Agrawal et al. 2023, SARATHI). Requests come and go between steps (Yu et al. 2022,
    Orca), at most max_batch at once. Prompts that begin alike share whole pages. If all
    n_pages of page_size tokens are in use, the youngest is preempted, and read anew."""
    def __init__(self, model, max_batch=8, page_size=16, n_pages=64, chunk_size=64,
                 max_queue=1000, sharing=True):
        if min(max_batch, page_size, n_pages, chunk_size, max_queue) < 1:
            raise ValueError(f"{max_batch=}, {page_size=}, {n_pages=}, {chunk_size=}, "
                             f"{max_queue=}: each must be at least 1")
        self.model, self.pool = model, PagePool(model, n_pages, page_size)
        self.max_batch, self.max_queue, self.sharing = max_batch, max_queue, sharing
        self.chunk_size, self.next_id, self.version = chunk_size, 1, None
        self.queue, self.running = collections.deque(), []  # by age
        keys = "steps", "tokens read", "tokens shared", "preempted", "done", "cancelled"
        self.counts = dict.fromkeys(keys, 0)

    def submit(self, prompt_ids, max_new_tokens, temperature=1.0, top_k=None,
               top_p=None, seed=None, stop_ids=()):
        """Queue a request, to end after max_new_tokens or a stop id; return its id. In
        float32 it writes what `generate` does with this seed, but for near ties. Value-
        or TypeError: it can never be served; RuntimeError: the queue is full."""
        idx, model, pool = list(map(operator.index, prompt_ids)), self.model, self.pool
        max_new_tokens = operator.index(max_new_tokens)
        stop_ids = frozenset(map(operator.index, stop_ids))
        check_ids(torch.tensor([idx], dtype=torch.long), model.vocab_size)
        next_token_probs(torch.zeros(1, model.vocab_size), temperature, top_k, top_p)
        room = min(len(pool.ref_count) * pool.page_size, model.max_len) - len(idx) + 1
        if not 1 <= max_new_tokens <= room:  # + 1: the last token needs no place
            raise ValueError(f"max_new_tokens is {max_new_tokens}: must be 1 or more; "
                             f"a prompt of {len(idx)} leaves room for {max(0, room)}")
        if len(self.queue) >= self.max_queue:
            raise RuntimeError(f"the queue is full: {len(self.queue)} requests wait")
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        self.queue.append(Request(self.next_id, idx, len(idx), max_new_tokens,
                                  (temperature, top_k, top_p), generator, stop_ids))
        self.next_id += 1
        return self.queue[-1].id

    def cancel(self, request_id):
        """End a request; return what it has written. ValueError if it is not here."""
        for request in [*self.queue, *self.running]:
            if request.id == request_id:
                self.leave(request, "cancelled")
                return request.idx[request.n_prompt :]
        raise ValueError(f"request {request_id} neither waits nor runs")

    def leave(self, request, state):
        """Take a request out and release its pages. A preempted one is next again."""
        (self.running if request in self.running else self.queue).remove(request)
        self.pool.release(request.pages)
        self.counts[state] += 1
        request.pages, request.n_read, request.state = [], 0, state
        if state == "preempted":
            self.queue.appendleft(request)

    def admit(self):
        """Let requests in while seats and pages last, with a reserve for those in."""
        pool, size, running = self.pool, self.pool.page_size, self.running
        while self.queue and len(running) < self.max_batch:
            request = self.queue[0]
            known = pool.match_prefix(request.idx[:-1])  # the last must be read
            in_use = sum(pool.ref_count[page] > 0 for page in known)  # cost nothing
            needed = math.ceil(len(request.idx) / size) - in_use
            kept = sum(math.ceil(len(r.idx) / size) + 1 - len(r.pages) for r in running)
            if needed + kept > len(pool.free):
                break
            running.append(self.queue.popleft())
            request.pages, request.state = [pool.share(p) for p in known], "prefill"
            request.n_read = len(known) * size
            self.counts["tokens shared"] += request.n_read

    def allocate(self, request, end):
        """Give a request pages up to token `end`; False if it had to be preempted."""
        missing = math.ceil(end / self.pool.page_size) - len(request.pages)
        while missing > len(self.pool.free):
            self.leave(youngest := self.running[-1], "preempted")
            if youngest is request:
                return False
        request.pages += [self.pool.allocate() for _ in range(missing)]
        return True

    def schedule(self):
        """Choose what to read next: [(n tokens, request), ...], alike side by side."""
        budget, plan = self.chunk_size, []
        for request in list(self.running):
            if request.state == "preempted":  # by an older one; so are all that follow
                break
            todo = len(request.idx) - request.n_read
            n = 1 if todo == 1 else min(todo, budget)
            if n and self.allocate(request, request.n_read + n):
                plan.append((n, request))
                budget -= n if todo > 1 else 0
        return sorted(plan, key=lambda job: (job[0], job[1].n_read))

    @torch.inference_mode()
    def read(self, plan):
        """Read the plan in one forward; return its ends' logits `(len(plan), V)`."""
        pool, size, device = self.pool, self.pool.page_size, self.pool.kv.device
        idx = [i for n, r in plan for i in r.idx[r.n_read : r.n_read + n]]
        batch = PagedBatch(pool, [(r.n_read, n, r.pages) for n, r in plan])
        ends = torch.tensor([n for n, _ in plan]).cumsum(0) - 1
        with eval_mode(self.model):
            logits = self.model(torch.tensor([idx], device=device), batch)[0, ends]
        self.counts["tokens read"] += len(idx)
        for n, r in plan:
            full, r.n_read = r.n_read // size, r.n_read + n
            for i in range(full, r.n_read // size if self.sharing else 0):
                pool.remember(r.pages[i], r.idx[: (i + 1) * size])
        return logits

    def write(self, requests, logits):
        """Sample next tokens, end who is done; return [(request id, token), ...]."""
        written = []
        for sampling in dict.fromkeys(r.sampling for r in requests):
            alike = [row for row, r in enumerate(requests) if r.sampling == sampling]
            probs = next_token_probs(logits[alike], *sampling).cpu()
            if sampling[0] > 0:  # the largest p / time, as torch.multinomial does
                probs = probs / torch.stack([torch.empty(probs.size(1)).exponential_(
                    generator=requests[row].generator) for row in alike])
            written += zip([requests[row] for row in alike], probs.argmax(-1).tolist())
        for r, token in written:
            r.idx.append(token)
            r.state = "decode"
            if len(r.idx) - r.n_prompt == r.max_new_tokens or token in r.stop_ids:
                self.leave(r, "done")
        return [(r.id, token) for r, token in written]

    def step(self):
        """Admit, schedule, read, write; return what is new, [(request id, token), ...].
        If weights were changed in place, what was read with the old ones is dropped."""
        version = sum(weight._version for weight in self.model.parameters())
        if version != self.version:
            self.version, self.pool.known, self.pool.prefix = version, {}, {}
            while self.running:
                self.leave(self.running[-1], "preempted")
        self.admit()
        self.counts["steps"] += 1
        if not (plan := self.schedule()):
            return []
        logits = self.read(plan)
        ready = [row for row, (_, r) in enumerate(plan) if r.n_read == len(r.idx)]
        return self.write([plan[row][1] for row in ready], logits[ready])

    def stream(self):
        """Yield each (request id, token) as it is written, until all are done."""
        while self.queue or self.running:
            yield from self.step()

    def run(self):
        """Serve until all are done; return {request id: new ids} of those in now."""
        requests = [*self.running, *self.queue]
        list(self.stream())
        return {request.id: request.idx[request.n_prompt :] for request in requests}

    @property
    def stats(self):
        """What happened so far, and what memory holds now, as a dict."""
        size = self.pool.page_size
        held = {page: min(size, r.n_read - i * size)
                for r in self.running for i, page in enumerate(r.pages)}
        return {**self.counts, "queued": len(self.queue), "running": len(self.running),
                "free pages": len(self.pool.free), "used pages": len(held),
                "unused slots": len(held) * size - sum(held.values())}
