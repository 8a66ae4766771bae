"""TinyGPT: a decoder-only transformer, from characters to generated text, in one file.

Read it from top to bottom. Each section is built, step by step, on the page of the course that
its heading names, and a test holds the two together, word for word. Sizes are written as
B (batch), T (tokens in a window), C (d_model, the width of the model), V (vocabulary size).

    python tinygpt_helpers.py                         the whole demonstration, a minute and a half
    python tinygpt_helpers.py train --corpus my.txt   train on a text of your own
    python tinygpt_helpers.py generate --prompt "I love "
"""

import argparse
import collections
import copy
import hashlib
import http.client
import io
import json
import math
import os
import pickle
import shlex
import shutil
import sys
import textwrap
import time
import urllib.request
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------- page 00: start here


def pick_device(name=None):
    """Return the `torch.device` to compute on: the one asked for, else the best there is.

    name: "cpu", "cuda", "mps", or None for CUDA, then MPS (Apple), then the CPU.
    Raises ValueError if the device that was asked for is not on this machine. (Page 00.)
    """
    if name is None:
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    kind = str(name).split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device {name!r} is not known; choose 'cpu', 'cuda' or 'mps'")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but PyTorch finds no NVIDIA GPU here; "
                         "use 'cpu' (in Colab: Runtime > Change runtime type > GPU)")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' was asked for, but PyTorch finds no Apple GPU; use 'cpu'")
    return torch.device(name)


# ---------------------------------------------------------------- page 01: text and tokenizer

DATA = Path(__file__).resolve().parent / "data"
SHAKESPEARE = {
    "url": "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/"
           "tinyshakespeare/input.txt",
    "size": 1_115_394,
    "sha256": "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
}


def write_atomically(path, data):
    """Write bytes to a file so that a reader finds the old content or the new, never a part.

    The bytes go to a temporary file in the same folder, which then takes the name. (Page 01.)
    """
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


def fetch(url, path, size, sha256):
    """Return the bytes of a published file: from the cache at `path`, else from the network.

    A download that was cut off goes on where it stopped when you call again. Raises
    ConnectionError without a network, ValueError if the file is not the published one. (Page 01.)
    """
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path.read_bytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    have = have if have < size else 0  # a whole one that never got its name: begin anew
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            with open(part, "ab" if reply.status == 206 else "wb") as file:  # 206: the rest
                shutil.copyfileobj(reply, file)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"could not download {url} ({error}). Run it again when there is a "
                              f"network, or put the file at {path} yourself") from error
    data = part.read_bytes()
    if len(data) < size:
        raise ConnectionError(f"the download of {url} stopped at {len(data):,} of {size:,} bytes; "
                              "run it again to get the rest")
    part.unlink()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{url} gave {len(data):,} bytes that are not the {size:,} published "
                         f"ones (their sha256 begins {sha256[:12]}); run it again")
    write_atomically(path, data)
    return data


def load_corpus(name="tiny"):
    """Return a text to train on, as one string with "\\n" line ends.

    name: "tiny" (the course's own stories), "shakespeare" (1.1 MB, downloaded once to the folder
    that the environment variable TINYGPT_CACHE names, else to ~/.cache/tinygpt), or the path of
    your own UTF-8 text file. Raises FileNotFoundError, or ValueError if the file is empty or not
    UTF-8, ConnectionError if it has to be downloaded and there is no network. (Page 01.)
    """
    if name == "shakespeare":
        cache = Path(os.environ.get("TINYGPT_CACHE", Path.home() / ".cache" / "tinygpt"))
        data = fetch(path=cache / "tinyshakespeare.txt", **SHAKESPEARE)
    else:
        path = DATA / "tiny_corpus.txt" if name == "tiny" else Path(name).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no text file {str(path)!r}; give 'tiny', "
                                    "'shakespeare' or the path of a UTF-8 text file")
        data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")  # -sig: Windows editors put a mark at the start
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(name)!r} is not UTF-8: byte 0x{data[error.start]:02x} at position "
                         f"{error.start}; save it as UTF-8 in your editor") from None
    if not text.strip():
        raise ValueError(f"{str(name)!r} is empty; a text to learn from needs at least a few pages")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def split_corpus(text, by_line=False):
    """Return `(train_text, val_text)`: the first 90 % and the last 10 %.

    by_line=True cuts between lines, so that no story is in both (the tiny corpus has one story
    a line); otherwise the cut is at 90 % of the characters, as published figures for Tiny
    Shakespeare have it. (Page 01.)
    """
    if not by_line:
        cut = int(0.9 * len(text))
        return text[:cut], text[cut:]
    lines = text.splitlines(keepends=True)
    cut = int(0.9 * len(lines))
    return "".join(lines[:cut]), "".join(lines[cut:])


def read_json(path, key, valid):
    """Return what a JSON file has under `key` if valid(it), else raise ValueError. (Page 01.)"""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))[key]
        if valid(value):
            return value
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f"{str(path)!r} is damaged or foreign: no JSON with good {key!r}")


class CharTokenizer:
    """Text to ids and back: one id for each distinct character of `text`. (Page 01.)
    An unknown character or id, an empty text, a damaged file: ValueError."""

    def __init__(self, text):
        if not text:
            raise ValueError("text is empty; a vocabulary needs at least one character")
        self.itos = dict(enumerate(sorted(set(text))))  # id -> character
        self.stoi = {ch: i for i, ch in self.itos.items()}  # character -> id
        self.vocab_size = len(self.itos)

    def encode(self, s):
        for at, ch in enumerate(s):
            if ch not in self.stoi:
                raise ValueError(f"character {ch!r} (position {at}) is not in the vocabulary of "
                                 f"{self.vocab_size}; known: {''.join(self.stoi)!r}")
        return [self.stoi[ch] for ch in s]

    def decode(self, ids):
        ids = [int(i) for i in ids]  # a tensor's entries too
        if unknown := [i for i in ids if i not in self.itos]:
            raise ValueError(f"id {unknown[0]} is not in 0..{self.vocab_size - 1}, the vocabulary")
        return "".join(self.itos[i] for i in ids)

    def save(self, path):
        write_atomically(path, json.dumps({"characters": "".join(self.stoi)}).encode())

    @classmethod
    def load(cls, path):
        return cls(read_json(path, "characters", lambda text: "".join(sorted(set(text))) == text))


# ---------------------------------------------------------------- page 02: windows and batches


class NextTokenDataset(torch.utils.data.Dataset):
    """Every window of `block_size` tokens, with the tokens that come next as targets.

    Item i is `(x, y)`, both `(block_size,)` int64: x = ids[i : i + block_size], and y the same
    window one token later. ValueError if `ids` is too short for one window. (Page 02.)
    """

    def __init__(self, ids, block_size):
        self.ids = torch.as_tensor(ids, dtype=torch.long)
        self.block_size = block_size
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}; a window needs at least 1 token")
        if len(self.ids) < block_size + 1:
            raise ValueError(f"{len(self.ids)} tokens are too few for one window: block_size "
                             f"{block_size} needs {block_size + 1} (the last is a target only)")

    def __len__(self):
        return len(self.ids) - self.block_size

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"window {i} is not in 0..{len(self) - 1}")
        window = self.ids[i : i + self.block_size + 1]
        return window[:-1], window[1:]


def sample_batch(ids, block_size, batch_size, generator=None, starts=None):
    """Return `batch_size` windows at random places, `(x, y)`, both `(B, T)` int64.

    The same pairs as NextTokenDataset's, with replacement, and no Python for each window.
    ids: 1-D int64 tensor. starts: where windows may begin, 1-D int64 (None: anywhere).
    ValueError if `ids` is too short for one window. (Page 02.)
    """
    if len(ids) < block_size + 1:
        raise ValueError(f"{len(ids)} tokens are too few for one window: block_size {block_size} "
                         f"needs {block_size + 1}")
    places = len(ids) - block_size if starts is None else len(starts)
    at = torch.randint(places, (batch_size,), generator=generator).to(ids.device)
    at = at if starts is None else starts[at]
    windows = ids.unfold(0, block_size + 1, 1).index_select(0, at)  # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]


# ---------------------------------------------------------------- page 03: the model


def attention_weights(q, k):
    """Return who looks at whom: softmax(q k^T / sqrt(d_head)), each position at its past only.

    q, k: `(..., T, d_head)` -> `(..., T, T)`, rows sum to 1, zero above the diagonal.
    Vaswani et al. 2017, section 3.2.1. (Page 03.)
    """
    T = q.size(-2)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention: `(B, T, C)` -> `(B, T, C)`. (Page 03.)
    Returns also the weights `(B, n_heads, T, T)` with return_attention=True; otherwise PyTorch's
    fused kernel computes the same without ever storing them, and None stands in their place."""

    def __init__(self, d_model, n_heads, dropout=0.0):
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.proj = nn.Linear(d_model, d_model, bias=False)

    def split_heads(self, x):
        B, T, C = x.shape
        return [part.view(B, T, self.n_heads, C // self.n_heads).transpose(1, 2)
                for part in self.qkv(x).split(C, dim=-1)]  # q, k, v: each (B, n_heads, T, d_head)

    def forward(self, x, return_attention=False):
        q, k, v = self.split_heads(x)
        dropout, weights = self.dropout if self.training else 0.0, None
        if return_attention:
            weights = attention_weights(q, k)
            y = F.dropout(weights, dropout) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        y = self.proj(y.transpose(1, 2).reshape(x.shape))  # the heads side by side again
        return F.dropout(y, dropout), weights


class Block(nn.Module):
    """One pre-norm transformer block, `(B, T, C)` -> `(B, T, C)`: talk, then think. (Page 03.)

    Attention moves information between positions, the MLP works at each position alone; each
    reads a normalised copy of x and adds what it finds. Returns `(x, attention weights or None)`.
    """

    def __init__(self, d_model, n_heads, dropout=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = CausalSelfAttention(d_model, n_heads, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model, bias=False),
            nn.GELU(),
            nn.Linear(4 * d_model, d_model, bias=False),
            nn.Dropout(dropout),
        )

    def forward(self, x, return_attention=False):
        y, weights = self.attention(self.norm1(x), return_attention)
        x = x + y
        return x + self.mlp(self.norm2(x)), weights


def check_ids(idx, vocab_size, max_len):
    """Raise a ValueError that says what is wrong, unless a model can read idx. (Page 03.)"""
    if idx.ndim != 2 or idx.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"idx must be (B, T) integer ids, not {tuple(idx.shape)} {idx.dtype}")
    if not 1 <= idx.size(1) <= max_len:
        advice = f": crop to idx[:, -{max_len}:]" if idx.size(1) else ""
        raise ValueError(f"idx has T = {idx.size(1)} tokens; this model reads 1 to max_len = "
                         f"{max_len}{advice}")
    if idx.numel():
        low, high = (end.item() for end in idx.aminmax())
        if low < 0 or high >= vocab_size:
            raise ValueError(f"id {low if low < 0 else high} is outside the vocabulary of "
                             f"{vocab_size}: ids go from 0 to {vocab_size - 1}")


def sinusoids(length, width):
    """Return waves from fast to slow, `(length, width)`: neighbours are alike. (Page 03.)

    Vaswani et al. 2017, section 3.5, with 1,000 for 10,000: the texts here are short.
    """
    angles = torch.arange(length)[:, None] / 1000 ** (torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]


def init_weights(model):
    """Set the weights a model starts from: a first loss of ln V, and fast from there. (Page 03.)

    Matrices: normal, std 1 / sqrt(inputs), which keeps the size of a signal; smaller by
    sqrt(2 n_layers) where they add to the residual stream (GPT-2, section 2.3). Positions are
    learned, but start as waves. The head is so small that every token starts equally likely.
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            std = weight.size(1) ** -0.5
            if name.endswith(("proj.weight", "mlp.2.weight")):
                std = std / math.sqrt(2 * len(model.blocks))
            if name == "head.weight":
                std = 0.05 * std
            nn.init.normal_(weight, std=0.3 if name == "tokens.weight" else std)
    with torch.no_grad():
        model.positions.weight.copy_(0.4 * sinusoids(*model.positions.weight.shape))


class TinyGPT(nn.Module):
    """A decoder-only transformer: ids `(B, T)` -> logits `(B, T, vocab_size)`. (Page 03.)
    With return_attention=True also the attention weights `(n_layers, B, n_heads, T, T)`.
    ValueError: T > max_len, ids outside the vocabulary, sizes that make no model."""

    def __init__(self, vocab_size, d_model, n_heads, n_layers, max_len, dropout=0.0):
        super().__init__()
        sizes = dict(vocab_size=vocab_size, d_model=d_model, n_heads=n_heads, n_layers=n_layers,
                     max_len=max_len)
        if min(sizes.values()) < 1 or d_model % n_heads:
            raise ValueError(f"{sizes}: each must be 1 or more, and d_model divisible by n_heads")
        self.config = sizes | {"dropout": dropout}
        self.vocab_size, self.max_len = vocab_size, max_len
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.positions = nn.Embedding(max_len, d_model)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(d_model, n_heads, dropout) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        init_weights(self)

    def forward(self, idx, return_attention=False):
        check_ids(idx, self.vocab_size, self.max_len)
        x = self.dropout(self.tokens(idx) + self.positions.weight[: idx.size(1)])  # (B, T, C)
        maps = []
        for block in self.blocks:
            x, weights = block(x, return_attention)
            maps.append(weights)
        logits = self.head(self.norm(x))
        return (logits, torch.stack(maps)) if return_attention else logits


def plot_attention(weights, tokens, title="Who looks at whom"):
    """Draw attention maps, one for each head, and return the matplotlib figure. (Page 03.)

    weights: `(n_heads, T, T)` or one map `(T, T)`. tokens: the T characters, on both axes.
    Row = the position that looks, column = the position looked at; one colour scale for all.
    """
    maps = weights.detach().cpu().reshape(-1, *weights.shape[-2:]).numpy()
    if maps.shape[-1] != len(tokens):
        raise ValueError(f"{len(tokens)} tokens do not fit weights of T = {maps.shape[-1]}")
    columns = min(4, len(maps))
    rows = math.ceil(len(maps) / columns)
    side = min(6.0, max(2.6, 0.22 * len(tokens))) if len(maps) == 1 else 2.9
    figure, axes = plt.subplots(rows, columns, figsize=(side * columns + 0.9, side * rows + 0.6),
                                squeeze=False, layout="constrained")
    labels = [{" ": "␣", "\n": "↵"}.get(ch, ch) for ch in tokens]
    for head, ax in enumerate(axes.flat):
        if head >= len(maps):
            ax.axis("off")
            continue
        image = ax.imshow(maps[head], vmin=0, vmax=1, cmap="viridis")
        ax.set_xticks(range(len(labels)), labels, fontsize=7)
        ax.set_yticks(range(len(labels)), labels, fontsize=7)
        ax.set(xlabel="looked at", title=f"head {head}" if len(maps) > 1 else "")
    axes[0, 0].set_ylabel("looking")
    figure.colorbar(image, ax=axes, label="attention weight", shrink=0.8)
    figure.suptitle(title)
    return figure


# ---------------------------------------------------------------- page 04: training


def train_one_epoch(model, loader, optimizer, device):
    """Show the model every batch of `loader` once; return the mean loss, nats per token.

    The mean is over tokens, so a short last batch counts for no more than it holds. ValueError if
    the loader has no batch. (Page 04.)
    """
    model.train()
    total, count = 0.0, 0
    for x, y in loader:
        x, y = x.to(device), y.to(device)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())  # (B*T, V) against (B*T,)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() * y.numel()
        count += y.numel()
    if count == 0:
        raise ValueError("the loader has no batch: fewer windows than batch_size, with drop_last?")
    return total / count


@torch.no_grad()
def evaluate(model, ids, batch_size=64):
    """Return the mean loss over all of `ids`, in nats per token, with dropout off. (Page 04.)

    The text is cut into windows of max_len that do not overlap, so each token but the first is
    predicted exactly once. ids: 1-D int64 tensor of at least 2 tokens, else ValueError.
    """
    if len(ids) < 2:
        raise ValueError(f"{len(ids)} tokens are too few to evaluate: 2 are needed")
    training, device = model.training, next(model.parameters()).device
    model.eval()
    T = min(model.max_len, len(ids) - 1)
    whole = (len(ids) - 1) // T * T  # the tokens that fill windows; the rest makes a short one
    x, y = ids[:whole].view(-1, T), ids[1 : whole + 1].view(-1, T)
    batches = list(zip(x.split(batch_size), y.split(batch_size)))
    if whole < len(ids) - 1:
        batches.append((ids[whole:-1].view(1, -1), ids[whole + 1 :].view(1, -1)))
    total = 0.0
    for x, y in batches:
        logits = model(x.to(device)).flatten(0, 1)
        total += F.cross_entropy(logits, y.to(device).flatten(), reduction="sum").item()
    model.train(training)
    return total / (len(ids) - 1)


def make_optimizer(model, lr, weight_decay=0.1):
    """Return AdamW that decays matrices only: not the gains and biases of the norms. (Page 04.)

    lr: the peak learning rate. Loshchilov and Hutter 2019; betas as nanoGPT has them for
    character models (0.99: longer than its usual 0.95, shorter than PyTorch's 0.999).
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)


def learning_rate(progress, peak, warmup=0.05):
    """Return the learning rate at `progress`, the share of the training that is done. (Page 04.)

    A straight line up to `peak` over the first `warmup`, then half a cosine down to zero
    (Loshchilov and Hutter 2017).
    """
    if progress < warmup:
        return peak * (progress + 0.01) / (warmup + 0.01)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


class MixedPrecision(torch.overrides.TorchFunctionMode):
    """Inside `with MixedPrecision(dtype):` linear layers multiply in `dtype`. (Page 04.)

    What they read is rounded, weights included; what they return is rounded too, but has the type
    of their input again. All else is left alone. dtype: torch.bfloat16, say. After Micikevicius et
    al. 2018, who used float16.
    """

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, args=(), kwargs=None):
        call = self.linear if function is F.linear else function
        return call(*args, **(kwargs or {}))

    def linear(self, input, weight, bias=None):
        bias = bias if bias is None else bias.to(self.dtype)
        return F.linear(input.to(self.dtype), weight.to(self.dtype), bias).to(input.dtype)


def pick_precision(device):
    """Return torch.bfloat16 if large products are faster with it here, else torch.float32.

    device: a torch.device. It asks the processor for bfloat16 in AVX-512 or AMX, as PyTorch 2.11
    and later can. GPUs and ARM stay in float32. (Page 04.)
    """
    able = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def train_step(model, optimizer, x, y, lr, step=0, clip=1.0, precision=None):
    """Take one step at learning rate `lr` on the batch `(x, y)`, both `(B, T)`; return its loss.

    Gradients with a norm above `clip` are scaled down to it (Pascanu et al. 2013). precision: see
    MixedPrecision; None is the weights' own. Raises FloatingPointError that names `step`, with the
    weights untouched, if the loss or the norm of the gradients is not finite. (Page 04.)
    """
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    with MixedPrecision(precision) if precision else nullcontext():
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    if not math.isfinite(loss.item() + norm.item()):
        raise FloatingPointError(f"step {step}: the loss is {loss.item()}, the norm of its gradient"
                                 f" {norm.item()}; the weights are those of the step before. Try "
                                 "a lower learning rate, or resume from the last checkpoint")
    optimizer.step()
    return loss.item()


def in_notebook():
    """Return whether this runs in a notebook, where an output can be drawn anew. (Page 04.)"""
    ipython = sys.modules.get("IPython")
    return hasattr(ipython and ipython.get_ipython(), "kernel")


class ProgressBar:
    """One line that says how far a long loop is: in a terminal, a notebook or a log. (Page 04.)"""

    def __init__(self, first=0.0):
        self.first, self.began, self.shown = first, time.perf_counter(), 0.0
        self.cell = None  # the notebook's output, redrawn in place

    def update(self, progress, message, last=False):
        now, notebook = time.perf_counter(), in_notebook()
        if now - self.shown < (0.2 if notebook or sys.stdout.isatty() else 10) and not last:
            return
        self.shown, spent, done = now, now - self.began, progress - self.first
        left = f", {spent / done * (1 - progress):.0f} s left" if done > 0.01 and not last else ""
        bar = ("=" * int(20 * progress)).ljust(20, ".")
        line = f"[{bar}] {message}  {spent:.0f} s{left}"
        if notebook:
            from IPython.display import display

            self.cell = self.cell or display({"text/plain": ""}, raw=True, display_id=True)
            self.cell.update({"text/plain": line}, raw=True)
        elif sys.stdout.isatty():
            print(f"\r{line:<99}", end="\n" if last else "", flush=True)
        else:
            print(line, flush=True)


def save_checkpoint(path, model, optimizer=None, step=0, tokenizer=None, generator=None,
                    history=None):
    """Write all that is needed to go on: model, optimiser, step, RNG states, tokenizer. (Page 04.)

    The file appears whole or not at all. generator: the torch.Generator that draws the batches.
    """
    on_gpu = next(model.parameters()).is_cuda
    buffer = io.BytesIO()
    torch.save({
        "format": "tinygpt-1",
        "config": model.config,
        "model": model.state_dict(),
        "optimizer": optimizer and optimizer.state_dict(),
        "step": step,
        "tokenizer": tokenizer and "".join(tokenizer.stoi),
        "rng": {"torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state() if on_gpu else None,
                "batches": generator and generator.get_state()},
        "history": history,
    }, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path, device="cpu"):
    """Read a checkpoint; return its dict with "model" and "tokenizer" as objects again.

    Only tensors and plain values are read (weights_only=True): a file from a stranger cannot run
    code. ValueError if it is damaged or not a checkpoint of this course. (Page 04.)
    """
    data = io.BytesIO(Path(path).read_bytes())
    try:
        if changed := zipfile.ZipFile(data).testzip():  # torch.load does not look at checksums
            raise ValueError(f"its part {changed} has changed")
        data.seek(0)
        state = torch.load(data, map_location="cpu", weights_only=True)
        if state["format"] != "tinygpt-1":
            raise KeyError(state["format"])
        model = TinyGPT(**state["config"])
        model.load_state_dict(state["model"])
        tokenizer = state["tokenizer"] and CharTokenizer(state["tokenizer"])
        if tokenizer and tokenizer.vocab_size != model.vocab_size:
            raise ValueError(f"{model.vocab_size} tokens, but {tokenizer.vocab_size} characters")
    except Exception as error:  # torch.load's errors for damaged files are of many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, pickle.UnpicklingError):  # torch advises to load it unsafely
            reason = "PyTorch cannot read it safely"
        raise ValueError(f"{str(path)!r} is damaged or no TinyGPT checkpoint: {reason}") from None
    state["model"], state["tokenizer"] = model.to(device), tokenizer
    return state


def start_run(model, lr, seed=0, resume=None):
    """Return `(optimizer, generator, history)` of a new run, or of one that goes on. (Page 04.)

    resume: what load_checkpoint returned; the weights, the optimiser and the states of all random
    number generators are put back. ValueError if it was saved without them.
    """
    optimizer, generator = make_optimizer(model, lr), torch.Generator().manual_seed(seed)
    if resume is None:
        return optimizer, generator, {"train_loss": [], "val_step": [], "val_loss": []}
    if not (resume["optimizer"] and resume["history"]):
        raise ValueError("this checkpoint holds a model alone: it can generate, but not resume")
    model.load_state_dict(resume["model"].state_dict())
    optimizer.load_state_dict(resume["optimizer"])
    rng = resume["rng"]
    generator.set_state(rng["batches"])
    torch.set_rng_state(rng["torch"])  # dropout draws from this one
    if rng["cuda"] is not None and next(model.parameters()).is_cuda:
        torch.cuda.set_rng_state(rng["cuda"])
    return optimizer, generator, copy.deepcopy(resume["history"])


def validate_and_save(model, validate, history, step, out=None, **state):
    """Add validate(model) to `history` as the validation loss; save last.pt and, if best, best.pt.

    out: the folder, or None to save nothing; state: what save_checkpoint takes beside. Raises
    FloatingPointError, with the files left as they were, if the loss is not finite. (Page 04.)
    """
    if step in history["val_step"]:  # measured just before the run was paused
        return
    loss = validate(model)
    if not math.isfinite(loss):
        raise FloatingPointError(f"step {step}: the validation loss is {loss}")
    history["val_step"].append(step)
    history["val_loss"].append(loss)
    if out:
        if loss == min(history["val_loss"]):  # first: last.pt says that this step is done
            save_checkpoint(Path(out) / "best.pt", model, step=step, history=history, **state)
        save_checkpoint(Path(out) / "last.pt", model, step=step, history=history, **state)


def train(model, train_ids, val_ids, steps=1000, batch_size=32, lr=3e-3, block_size=None,
          starts=None, validate=None, eval_every=200, max_seconds=math.inf, stop_at=None, out=None,
          tokenizer=None, resume=None, seed=0, on_eval=lambda history: None, precision=None):
    """Train; return {"train_loss": [...], "val_step": [...], "val_loss": [...]}. (Page 04.)

    Every `eval_every` steps: validate_and_save (None: evaluate on val_ids), on_eval(history). The
    learning rate falls to zero over `steps` or `max_seconds`; `stop_at` pauses before that step;
    `resume`, a loaded checkpoint, goes on. FloatingPointError if the loss is not finite; the last
    files stay. block_size: None is max_len; starts: see sample_batch; precision: see train_step.
    """
    validate = validate or partial(evaluate, ids=val_ids)
    if not min(steps, batch_size, eval_every, max_seconds) > 0:
        raise ValueError(f"{steps=}, {batch_size=}, {eval_every=}, {max_seconds=}: all must be > 0")
    optimizer, generator, history = start_run(model, lr, seed, resume)
    state = dict(out=out, optimizer=optimizer, tokenizer=tokenizer, generator=generator)
    T, device = block_size or model.max_len, next(model.parameters()).device
    bar, began = ProgressBar(len(history["train_loss"]) / steps), time.perf_counter()
    while True:
        step = len(history["train_loss"])
        progress = min(1.0, max(step / steps, (time.perf_counter() - began) / max_seconds))
        last = progress == 1 or step == stop_at
        if last or step % eval_every == 0:
            validate_and_save(model, validate, history, step, **state)
            on_eval(history)
        bar.update(progress, f"step {step:,}  {describe(history)}", last)
        if last:
            return history
        x, y = (a.to(device) for a in sample_batch(train_ids, T, batch_size, generator, starts))
        history["train_loss"].append(train_step(
            model, optimizer, x, y, learning_rate(progress, lr), step, precision=precision))


def describe(history):
    """Return "loss 1.23, validation 1.34": the mean of the last 50 steps, the newest. (Page 04.)"""
    recent = history["train_loss"][-50:]
    text = f"loss {sum(recent) / len(recent):.3f}" if recent else "not trained"
    return text + "".join(f", validation {loss:.3f}" for loss in history["val_loss"][-1:])


def plot_loss(history, floor=None, title="The loss falls"):
    """Draw the curves of a history that `train` returned; return the figure. (Page 04.)

    floor: nats per token that no model can beat on this text, drawn as a line, if it is known.
    The training loss of single steps is pale, its mean over 2 % of the run is drawn over it.
    """
    losses = torch.tensor(history["train_loss"] or [math.nan])
    width = max(1, len(losses) // 50)
    smooth = losses.unfold(0, width, 1).mean(1)
    figure, ax = plt.subplots(figsize=(7, 4), layout="constrained")
    ax.plot(losses, color="C0", alpha=0.25, linewidth=0.8)
    ax.plot(range(width - 1, len(losses)), smooth, color="C0", label="training")
    ax.plot(history["val_step"], history["val_loss"], "o--", color="C1", label="validation")
    if floor is not None:
        ax.axhline(floor, color="black", linestyle=":", label=f"floor of the text, {floor:.3f}")
    ax.set(xlabel="step", ylabel="loss (nats per token)", title=title, ylim=(0, None))
    ax.legend()
    return figure


def live_loss(floor=None, title="The loss falls"):
    """Return an `on_eval` for train: the curves of plot_loss, growing while it trains. (Page 04.)

    In a notebook it is one picture, drawn anew in its place; elsewhere nothing is drawn.
    """
    cell = None

    def on_eval(history):
        nonlocal cell
        if not in_notebook():
            return
        from IPython.display import display

        figure = plot_loss(history, floor, title)
        plt.close(figure)  # else the notebook shows it a second time when the cell is done
        if cell is None:
            cell = display(figure, display_id=True)
        else:
            cell.update(figure)

    return on_eval


# ---------------------------------------------------------------- page 05: generation


def next_token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """Turn logits `(B, V)` into the probabilities `(B, V)` to sample the next token from.

    temperature: divides the logits; 0 puts all on the largest (greedy). top_k: only the k most
    likely tokens stay. top_p: only the fewest most likely ones whose probabilities reach p, the
    one that crosses p included (Holtzman et al. 2020). ValueError if out of range. (Page 05.)
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}; it must be 0 (greedy) or more, and finite")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; at least 1 token must stay (None: all)")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1 (None: all)")
    if temperature == 0:
        top = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float).scatter(-1, top, 1.0)
    logits = (logits - logits.amax(-1, keepdim=True)).float() / max(temperature, 1e-30)
    if top_k is not None:
        kept = logits.topk(min(top_k, logits.size(-1))).indices
        logits = torch.full_like(logits, -math.inf).scatter(-1, kept, logits.gather(-1, kept))
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ranked, order = probs.sort(descending=True, stable=True)
        before = ranked.cumsum(-1) - ranked
        beyond = before >= max(top_p, 1e-30)  # the ones before it reach p already
        probs = probs.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
    return probs / probs.sum(-1, keepdim=True)


def draw(probs, generator=None):
    """Draw one token from each row of probs `(B, V)`: `(B,)` int64. (Page 05.)

    It is drawn where the generator lives, so that a seed gives the same draws for every device.
    """
    place = generator.device if generator is not None else probs.device
    token = torch.multinomial(probs.to(place), 1, generator=generator)
    return token.squeeze(1).to(probs.device)


def uncached_reader(model):
    """Return `read(text)`: ids `(B, T)` of any length -> logits `(B, V)` of the next token.

    It reads the last max_len tokens, all of them anew at each call. (Page 05.)
    """
    return lambda text: model(text[:, -model.max_len :])[:, -1]


@torch.no_grad()
def generate(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None,
             stop_id=None, use_cache=True):
    """Append `max_new_tokens` sampled tokens to idx `(B, T)`; return `(B, T + max_new_tokens)`.

    The model sees the last max_len tokens. generator: a torch.Generator, for the same text again.
    stop_id: a row that has written it is filled up with it. use_cache: faster, same result (page
    07). temperature, top_k, top_p: see next_token_probs. ValueError for an empty prompt or a value
    out of range. The model's training mode is left as it was. (Page 05.)
    """
    if idx.ndim != 2 or idx.size(1) == 0 or max_new_tokens < 0 or idx.is_floating_point():
        raise ValueError(f"idx is {tuple(idx.shape)}, max_new_tokens {max_new_tokens}: idx must be "
                         "(B, T) ids with at least 1 token, max_new_tokens 0 or more")
    training, text = model.training, F.pad(idx.long(), (0, max_new_tokens), value=stop_id or 0)
    done = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
    read = cached_reader(model) if use_cache else uncached_reader(model)
    model.eval()
    try:
        for t in range(idx.size(1), text.size(1)):
            probs = next_token_probs(read(text[:, :t]), temperature, top_k, top_p)
            token = draw(probs, generator) if temperature else probs.argmax(-1)  # no dice for 0
            text[:, t] = token
            if stop_id is not None:
                text[done, t] = stop_id
                done |= token == stop_id
                if done.all():
                    break
    finally:
        model.train(training)
    return text


def sample_stories(model, tokenizer, n, prompt="", temperature=1.0, seed=0, max_chars=180):
    """Return `n` stories as strings: what the model writes from a line's start to its end.

    Each begins with `prompt`; one without an end after `max_chars` more characters is cut there.
    The tiny corpus has one story a line, so a line end is both start and stop. (Page 05.)
    """
    newline, device = tokenizer.stoi["\n"], next(model.parameters()).device
    idx = torch.tensor([tokenizer.encode("\n" + prompt)] * n, device=device)
    generator = torch.Generator().manual_seed(seed)
    out = generate(model, idx, max_chars, temperature, generator=generator, stop_id=newline)
    return [tokenizer.decode(row.tolist()).strip("\n") for row in out]


@torch.no_grad()
def story_loss(model, tokenizer, text, batch_size=64):
    """Return the mean loss of whole stories, in nats per character: comparable with the floor.

    text: one story a line. Each is read from its start, as the floor is counted; `evaluate` cuts
    anywhere, and pays for the beginnings it hides. What lies past max_len is left out. (Page 05.)
    """
    training, device, total, count = model.training, next(model.parameters()).device, 0.0, 0
    model.eval()
    stories = sorted(text.splitlines(), key=len)  # neighbours of about one length: little padding
    for i in range(0, len(stories), batch_size):
        rows = [tokenizer.encode(f"\n{story}\n")[: model.max_len + 1]
                for story in stories[i : i + batch_size]]
        T = max(map(len, rows)) - 1
        x = torch.tensor([row[:-1] + [0] * (T + 1 - len(row)) for row in rows])
        y = torch.tensor([row[1:] + [-100] * (T + 1 - len(row)) for row in rows])  # -100: no target
        logits = model(x.to(device)).flatten(0, 1)
        total += F.cross_entropy(logits, y.to(device).flatten(), reduction="sum").item()
        count += (y != -100).sum().item()
    model.train(training)
    return total / count


def corpus_tools():
    """Return data/make_tiny_corpus.py, which knows the floor and judges stories. (Page 05.)"""
    if str(DATA) not in sys.path:
        sys.path.append(str(DATA))
    import make_tiny_corpus

    return make_tiny_corpus


def report(model, tokenizer, val_text):
    """Print how a model of the tiny corpus did: loss and floor, four skills, samples. (Page 05.)"""
    judge = corpus_tools()
    loss, floor = story_loss(model, tokenizer, val_text), judge.floor(val_text)
    print(f"\nStories it has never seen cost it {loss:.3f} nats per character "
          f"({loss / math.log(2):.3f} bits).\nThe floor, which no model can beat, is {floor:.3f}: "
          f"this one ends {loss / floor - 1:.0%} above it.\n\nOf 200 stories that it writes "
          "(at temperature 0.7):")
    scores = judge.score_stories(sample_stories(model, tokenizer, 200, temperature=0.7))
    for skill, meaning in [("spelled", "have only words of the corpus"),
                           ("grammatical", "are whole stories without a grammar mistake"),
                           ("remembers", "remember, of those that should or are ungrammatical"),
                           ("counts", "count right, of those that should or are ungrammatical")]:
        print(f"  {scores[skill]:4.0%} {meaning}")
    print("\nThree more:")
    for seed, prompt in enumerate(["I love ", "", ""]):
        story = sample_stories(model, tokenizer, 1, prompt, temperature=0.7, seed=seed)[0]
        print(textwrap.fill(story, 92, initial_indent="  ", subsequent_indent="    "))


def run_folder(corpus, resume=False):
    """Return a new folder for a run on a corpus, or that of the newest one to resume. (Page 05.)"""
    name, n = Path(corpus).stem, 1
    folders = [Path("runs") / name]
    while folders[-1].exists():
        n += 1
        folders.append(Path("runs") / f"{name}-{n}")
    return folders[-2] if resume and n > 1 else folders[-1]


def open_run(args):
    """Return `(out, device, tokenizer, model, train_ids, val_ids, resume)` for args. (Page 05.)

    ValueError if --out holds another run: nothing that was trained is ever overwritten.
    """
    device = pick_device(args.device)
    out = Path(args.out) if args.out else run_folder(args.corpus, args.resume)
    if (out / "last.pt").exists() and not args.resume:
        raise ValueError(f"{out} holds a run already: add --resume, or choose another --out")
    resume = load_checkpoint(out / "last.pt", device) if args.resume else None
    train_text, val_text = split_corpus(load_corpus(args.corpus), by_line=args.corpus == "tiny")
    tokenizer = resume["tokenizer"] if resume else CharTokenizer(train_text)
    known = "".join(ch for ch in val_text if ch in tokenizer.stoi)
    if len(known) < len(val_text):
        print(f"{len(val_text) - len(known)} characters of the validation text do not occur in the "
              "training text; they are left out")
    torch.manual_seed(args.seed)
    model = resume["model"] if resume else TinyGPT(
        tokenizer.vocab_size, args.d_model, args.n_heads, args.n_layers, args.max_len, args.dropout)
    ids = [torch.tensor(tokenizer.encode(text)) for text in (train_text, known)]
    NextTokenDataset(ids[0], model.max_len)  # too short for one window: an error before any file
    return out, device, tokenizer, model.to(device), *ids, resume


def train_command(args):
    """Train as the command line asks; keep checkpoints and the plot in one folder. (Page 05.)"""
    out, device, tokenizer, model, train_ids, val_ids, resume = open_run(args)
    n, V = sum(p.numel() for p in model.parameters()), tokenizer.vocab_size
    precision = getattr(torch, args.precision) if args.precision else pick_precision(device)
    starts = validate = floor = None
    if args.corpus == "tiny":  # windows begin with a story; whole stories are what is judged
        starts = (train_ids[: -model.max_len] == tokenizer.stoi["\n"]).nonzero().squeeze(1)
        val_text = tokenizer.decode(val_ids.tolist())
        floor = corpus_tools().floor(val_text)
        validate = partial(story_loss, tokenizer=tokenizer, text=val_text)
    print(f"{len(train_ids):,} characters to learn from, {len(val_ids):,} to test on, {V} kinds.\n"
          f"A model of {n:,} weights, on {device} ({precision}). "
          f"A blind guess costs ln {V} = {math.log(V):.2f} nats a character.\n")
    try:
        history = train(model, train_ids, val_ids, args.steps, args.batch_size, args.lr,
                        starts=starts, validate=validate, out=out, tokenizer=tokenizer,
                        eval_every=args.eval_every, max_seconds=args.max_seconds, resume=resume,
                        stop_at=args.stop_at, seed=args.seed, precision=precision)
    except KeyboardInterrupt:
        if not (out / "last.pt").exists():
            raise
        sys.exit(f"\nStopped. {out / 'last.pt'} has all up to the last validation; go on with\n  "
                 f"python tinygpt_helpers.py {args.again} --resume --out {shlex.quote(str(out))}")
    if floor:
        report(model, tokenizer, val_text)
    plot_loss(history, floor).savefig(out / "loss.png", dpi=150)
    best, prompt = out / "best.pt", ' --prompt "I love "' if floor else ""
    print(f"\nThe loss curve is {out / 'loss.png'}, the model {best}. Let it write:\n"
          f"  python tinygpt_helpers.py generate --checkpoint {shlex.quote(str(best))}{prompt}")


def generate_command(args):
    """Print a text that a checkpoint writes after the prompt. (Page 05.)"""
    found = sorted(Path("runs").glob("*/best.pt"), key=lambda path: path.stat().st_mtime)
    if not (args.checkpoint or found):
        raise ValueError("there is no model in runs/ yet: run 'python tinygpt_helpers.py' first")
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.checkpoint or found[-1], device)
    model, tokenizer = checkpoint["model"], checkpoint["tokenizer"]
    if tokenizer is None:
        raise ValueError(f"{str(args.checkpoint or found[-1])!r} holds no tokenizer to read with")
    prompt = args.prompt
    if prompt is None:
        prompt = "\n" if "\n" in tokenizer.stoi else tokenizer.itos[0]
    idx = torch.tensor([tokenizer.encode(prompt)], dtype=torch.long, device=device)
    generator = None if args.seed is None else torch.Generator().manual_seed(args.seed)
    out = generate(model, idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p,
                   generator)
    print(tokenizer.decode(out[0].tolist()))


TRAIN_OPTIONS = {  # name: (value if not given, what it is)
    "corpus": ("tiny", "'tiny', 'shakespeare' or the path of your own UTF-8 text file"),
    "steps": (1700, "how many batches to learn from"),
    "batch-size": (16, "windows in a batch"),
    "max-len": (128, "how far the model can look back, in characters"),
    "d-model": (96, "the width of the model"),
    "n-heads": (3, "attention heads in each layer"),
    "n-layers": (2, "how many blocks are stacked"),
    "dropout": (0.0, "the share of activations left out while training"),
    "lr": (7e-3, "the highest learning rate"),
    "eval-every": (500, "steps from one validation, and checkpoint, to the next"),
    "max-seconds": (math.inf, "end after about so many seconds, counted anew with --resume"),
    "seed": (0, "another number gives another start and other batches"),
}


def command_line():
    """Return the parser of the command line: `train`, `generate`, their options. (Page 05.)"""
    parser = argparse.ArgumentParser(
        prog="tinygpt_helpers.py", description="Train a tiny GPT and let it write. Without a "
        "command it trains on the course's own stories and shows what it learned, all in about a "
        "minute and a half.", epilog="'train --help' and 'generate --help' explain their options.")
    commands = parser.add_subparsers(dest="command", metavar="{train,generate}")
    add = commands.add_parser("train", help="train a model on a text").add_argument
    for name, (default, meaning) in TRAIN_OPTIONS.items():
        add(f"--{name}", type=type(default), default=default, help=f"{meaning} (default {default})")
    add("--out", help="the folder for checkpoints and plot (default: a new one in runs/)")
    add("--resume", action="store_true", help="go on with the newest run, or the one in --out")
    add("--stop-at", type=int, help="pause before this step; --resume goes on")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    add("--precision", choices=["float32", "bfloat16"], help="what linear layers multiply in while "
        "they learn (default: bfloat16 where this processor is faster with it, so the same seed "
        "can give other numbers on another machine)")
    add = commands.add_parser("generate", help="let a trained model write").add_argument
    add("--checkpoint", help="the model's file (default: the newest runs/*/best.pt)")
    add("--prompt", help="what the text begins with (default: a new line)")
    add("--max-new-tokens", type=int, default=200, help="how much to write (default 200)")
    add("--temperature", type=float, default=0.7, help="0: the likeliest always; 1: as learned "
        "(default 0.7)")
    add("--top-k", type=int, help="draw from the k likeliest tokens only")
    add("--top-p", type=float, help="draw from the likeliest tokens that together reach p only")
    add("--seed", type=int, help="a number, for the same text again")
    add("--device", help="cpu, cuda or mps (default: the best there is)")
    return parser


def main(argv=None):
    """Run the command line; without arguments, the whole demonstration. (Page 05.)"""
    argv = sys.argv[1:] if argv is None else argv
    argv = argv or ["train", "--steps", "6000", "--max-seconds", "85"]
    args = command_line().parse_args(argv)
    args.again = shlex.join(argv)  # the same options, for a run that was stopped
    if args.command is None:
        command_line().error("a command is missing: train or generate")
    try:
        {"train": train_command, "generate": generate_command}[args.command](args)
    except KeyboardInterrupt:
        sys.exit("\nStopped.")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


# ---------------------------------------------------------------- page 06: looking inside


def head_scores(weights, targets):
    """Return how well each head does a job, `(n_layers, n_heads)`, from 0 to 1. (Page 06.)

    weights: `(n_layers, B, n_heads, T, T)`, as a model returns them. targets: `(B, T, T)` bool,
    True where the character of the column is what the job asks the row's to look at. The score
    is the weight on these, averaged over the rows that have any; ValueError if no row has.
    """
    if targets.dtype != torch.bool or targets.shape != weights[0, :, 0].shape:
        raise ValueError(f"targets must be {tuple(weights[0, :, 0].shape)} bool, to fit the "
                         f"weights, not {tuple(targets.shape)} {targets.dtype}")
    rows = targets.any(-1)  # (B, T)
    if not rows.any():
        raise ValueError("targets is False everywhere: no position has anything to look at")
    hits = (weights * targets[:, None]).sum(-1).transpose(1, 2)  # (n_layers, n_heads, B, T)
    return hits[:, :, rows].mean(-1)


@contextmanager
def ablate(model, heads):
    """Knock heads out inside a `with` block: nothing that they gather gets through. (Page 06.)

    heads: pairs (layer, head). Their columns of `proj` are zero meanwhile, for all that the model
    does: reading, writing, with a cache or without. It is whole again afterwards, also after an
    error. ValueError if it has no such head. Michel et al. 2019 knock heads out like this.
    """
    n_layers, n_heads = model.config["n_layers"], model.config["n_heads"]
    heads, d_head = list(heads), model.config["d_model"] // n_heads
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(f"there is no head {head} in layer {layer}: the model has layers 0 "
                             f"to {n_layers - 1} of heads 0 to {n_heads - 1}")
    weights = [block.attention.proj.weight.data for block in model.blocks]  # each (C, C)
    kept = [weight.clone() for weight in weights]
    try:
        for layer, head in heads:
            weights[layer][:, head * d_head : (head + 1) * d_head] = 0
        yield
    finally:
        for weight, whole in zip(weights, kept):
            weight.copy_(whole)


@torch.no_grad()
def logit_lens(model, idx):
    """Return the logits that each layer would give, `(n_layers + 1, B, T, V)`. (Page 06.)

    Entry 0 reads the embeddings, entry n what stands in the residual stream after n blocks; the
    last is `model(idx)`. For a model in eval mode; raises what the model raises for ids that it
    cannot read. nostalgebraist 2020, "interpreting GPT: the logit lens".
    """
    check_ids(idx, model.vocab_size, model.max_len)
    stream = [model.tokens(idx) + model.positions.weight[: idx.size(1)]]
    for block in model.blocks:
        stream.append(block(stream[-1])[0])
    return model.head(model.norm(torch.stack(stream)))


# ---------------------------------------------------------------- page 07: the KV cache


def block_weights(model):
    """Return a list of each block's eight weights, matrices turned for `x @ weight`. (Page 07.)"""
    return [[weight.t() for weight in block.parameters()] for block in model.blocks]


class KVCache:
    """The keys and values of every token read so far, for one batch of texts. (Page 07.)

    kv: `(n_layers, 2, B, n_heads, max_len, d_head)`, keys then values, the first `length`
    positions in use; k and v are views of its halves. Bytes: 2 * n_layers * B * max_len * d_model
    * 4 in float32. layers: the weights of each block.
    """

    def __init__(self, model, batch_size):
        c, weight = model.config, model.head.weight
        self.kv = weight.new_zeros(c["n_layers"], 2, batch_size, c["n_heads"], c["max_len"],
                                   c["d_model"] // c["n_heads"])
        self.k, self.v = self.kv.unbind(1)
        self.length = 0
        self.layers = block_weights(model)


def run_blocks(model, x, layers, attend):
    """Send the embeddings x `(N, C)` of N tokens through the blocks; return logits `(N, V)`.

    attend(layer, qkv) takes queries, keys and values `(N, 3 C)` side by side and returns what the
    tokens gather, `(N, C)`: all that tokens have to do with one another. (Page 07.)
    """
    width = x.shape[1:]
    for layer, (gain1, bias1, qkv, proj, gain2, bias2, up, down) in enumerate(layers):
        y = attend(layer, F.layer_norm(x, width, gain1, bias1) @ qkv)
        x = torch.addmm(x, y, proj)  # x + y @ proj
        x = torch.addmm(x, F.gelu(F.layer_norm(x, width, gain2, bias2) @ up), down)
    return model.head(model.norm(x))


@torch.inference_mode()
def forward_cached(model, idx, cache):
    """Read the new tokens idx `(B, T)` after those in `cache`; return logits `(B, T, V)`.

    The same numbers as the last T rows of `model(all tokens)`, for the work of T tokens. The
    cache grows by T. For a model in eval mode. ValueError if it would pass max_len. (Page 07.)
    """
    check_ids(idx, model.vocab_size, model.max_len)
    (B, T), start = idx.shape, cache.length
    end = start + T
    if end > model.max_len:
        raise ValueError(f"{T} tokens after the {start} in the cache would pass max_len = "
                         f"{model.max_len}: only {model.max_len - start} more fit")
    # token i of the chunk stands at start + i and sees every position up to itself
    mask = torch.ones(T, end, dtype=torch.bool, device=idx.device).tril(start) if T > 1 else None

    def attend(layer, qkv):
        memory = cache.kv[layer]
        qkv = qkv.view(B, T, 3, memory.size(2), -1).permute(2, 0, 3, 1, 4)
        memory[:, :, :, start:end] = qkv[1:]
        k, v = memory[:, :, :, :end]  # (B, n_heads, end, d_head)
        y = F.scaled_dot_product_attention(qkv[0], k, v, mask)
        return y.transpose(1, 2).reshape(B * T, -1)

    x = F.embedding(idx, model.tokens.weight) + model.positions.weight[start:end]  # (B, T, C)
    logits = run_blocks(model, x.flatten(0, 1), cache.layers, attend)
    cache.length = end
    return logits.view(B, T, -1)


def cached_reader(model):
    """Return `read(text)` as uncached_reader does, but each token is read only once. (Page 07.)

    Each text must go on from the one before: only what is new in it is read.
    Past max_len every position moves by one with each new token, so nothing that was stored
    still holds: from there on the window is read anew, as without a cache.
    """
    cache = None

    def read(text):
        nonlocal cache
        if text.size(1) > model.max_len:
            return model(text[:, -model.max_len :])[:, -1]
        cache = cache or KVCache(model, len(text))
        return forward_cached(model, text[:, cache.length :], cache)[:, -1]

    return read


# ---------------------------------------------------------------- page 08: serving


class PagePool:
    """Memory for keys and values in pages of `page_size` tokens, lent out on demand. (Page 08.)

    kv: `(n_layers, n_pages, page_size, 2 C)`, a token's key and value side by side. A page may have
    several users; one without a user is free, but what it holds can still be found until it is
    lent again. Kwon et al. 2023 (PagedAttention), section 4.
    """

    def __init__(self, model, n_pages, page_size):
        c, weight = model.config, model.head.weight
        self.page_size = page_size
        self.layers = block_weights(model)
        self.kv = weight.new_zeros(c["n_layers"], n_pages, page_size, 2 * c["d_model"])
        self.users = [0] * n_pages
        self.free = dict.fromkeys(range(n_pages))  # an ordered set: the longest unused comes first
        self.known = {}  # page -> (the page before it in its text or None, the tokens it holds)
        self.after = {}  # page or None -> the known pages that go on from it

    def take(self):
        """Lend the page that has been free the longest to one user; what it held is forgotten."""
        self.forget(page := next(iter(self.free)))
        return self.share(page)

    def share(self, page):
        """Add one user to a page."""
        self.free.pop(page, None)
        self.users[page] += 1
        return page

    def release(self, pages):
        """Take one user from each page, the last page first: beginnings stay known the longest."""
        for page in reversed(pages):
            self.users[page] -= 1
            if self.users[page] == 0:
                self.free[page] = None

    def remember(self, before, page, tokens):
        """Note that `page`, which follows the page `before` (None: none), holds `tokens`."""
        self.known[page] = (before, tokens)
        self.after.setdefault(before, {})[page] = None

    def forget(self, page):
        """Forget what a page holds, and with it all that was known to go on from it."""
        gone = [page]
        for page in gone:  # the list grows while it is read
            gone += self.after.pop(page, ())
            before, _ = self.known.pop(page, (None, None))
            self.after.get(before, {}).pop(page, None)

    def find(self, text):
        """Return `(pages, n)`: known pages that hold the first n tokens of `text`, n the most."""
        pages, n, size = [], 0, self.page_size
        while n == len(pages) * size:  # all pages so far are full
            alike = {page: len(os.path.commonprefix([self.known[page][1], text[n : n + size]]))
                     for page in self.after.get(pages[-1] if pages else None, ())}
            best = max(alike, key=alike.get, default=None)
            if not alike.get(best):
                break
            n += alike[best]
            pages.append(best)
        return pages, n


@torch.inference_mode()
def forward_paged(model, idx, starts, tables, pool):
    """Read idx `(B, T)`, row b at positions starts[b] ... starts[b] + T - 1; logits `(B, T, V)`.

    starts: `(B,)`. tables: `(B, P)`, the pages of each row's text in order, filled up with any
    page: what lies beyond a row's own tokens is masked. For a model in eval mode. (Page 08.)
    """
    (B, T), size, H = idx.shape, pool.page_size, model.config["n_heads"]
    positions = starts[:, None] + torch.arange(T, device=idx.device)  # (B, T)
    pages, slots, groups = tables.gather(1, positions // size), positions % size, []
    for i in range(0, B, 16):  # groups of rows, each as wide as its longest text
        last = positions[i : i + 16, None, :, None]
        n = last.max().item() // size + 1
        future = torch.arange(n * size, device=idx.device) > last  # (rows, 1, T, n * size)
        mask = pool.kv.new_zeros(future.shape).masked_fill(future, -math.inf)
        groups.append((slice(i, i + 16), tables[i : i + 16, :n].flatten(), mask))

    def attend(layer, qkv):
        q, new = qkv.view(B, T, -1).tensor_split([qkv.size(-1) // 3], dim=-1)
        pool.kv[layer][pages, slots] = new  # (B, T, 2 C)
        q, gathered = q.view(B, T, H, -1).transpose(1, 2), []  # (B, H, T, d_head)
        for rows, table, mask in groups:
            past = pool.kv[layer].index_select(0, table).view(len(mask), -1, 2, H, q.size(-1))
            k, v = past.permute(2, 0, 3, 1, 4)  # (rows, H, n * size, d_head)
            gathered.append(F.scaled_dot_product_attention(q[rows], k, v, mask))
        return torch.cat(gathered).transpose(1, 2).reshape(B * T, -1)

    x = F.embedding(idx, model.tokens.weight) + F.embedding(positions, model.positions.weight)
    return run_blocks(model, x.flatten(0, 1), pool.layers, attend).view(B, T, -1)


@dataclass(eq=False)
class Request:
    """One text that the engine writes: what was asked for, and how far it is. (Page 08.)"""

    id: int
    text: list  # the prompt, then what was written
    n_prompt: int
    max_new_tokens: int
    sampling: tuple  # temperature, top_k, top_p
    generator: torch.Generator
    stop_ids: frozenset
    pages: list = field(default_factory=list)
    n_read: int = 0  # how many tokens of the text have their keys and values in the pages
    state: str = "queued"  # then prefill, decode, done; preempted: queued for the second time


class Engine:
    """Serve many requests with one model, token by token. (Page 08.)

    Each step reads one more token of every text that is being written, and at most chunk_size
    tokens of prompts. Requests join and leave between steps. Those that begin alike share pages
    until one writes (copy-on-write); when the n_pages pages of page_size tokens run out, the
    youngest gives its back and is read again later (preemption). It knows ids, not text.
    """

    def __init__(self, model, max_batch=8, page_size=16, n_pages=64, chunk_size=64, max_queue=1000,
                 sharing=True):
        if min(max_batch, page_size, n_pages, chunk_size, max_queue) < 1:
            raise ValueError(f"max_batch {max_batch}, page_size {page_size}, n_pages {n_pages}, "
                             f"chunk_size {chunk_size}, max_queue {max_queue}: each at least 1")
        self.model, self.pool = model.eval(), PagePool(model, n_pages, page_size)
        self.max_batch, self.chunk_size, self.max_queue = max_batch, chunk_size, max_queue
        self.sharing, self.next_id, self.counts = sharing, 1, collections.Counter()
        self.queue, self.running, self.finished = collections.deque(), [], {}  # by age

    def submit(self, prompt_ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None,
               stop_ids=()):
        """Queue a request and return its id. It ends after max_new_tokens or with a stop id. The
        same ids as `generate` draws with a generator of this seed, whoever else is served.
        ValueError for what could never be served; RuntimeError if the queue is full."""
        if any(isinstance(i, (str, float)) for i in [*prompt_ids, *stop_ids]):
            raise ValueError("prompt_ids and stop_ids must be whole numbers: encode the text first")
        text, model = [int(i) for i in prompt_ids], self.model
        check_ids(torch.tensor([text], dtype=torch.long), model.vocab_size, model.max_len)
        next_token_probs(torch.zeros(1, model.vocab_size), temperature, top_k, top_p)
        room = min(len(self.pool.users) * self.pool.page_size, model.max_len)
        if not 1 <= max_new_tokens <= room - len(text) + 1:  # the last token is never read
            raise ValueError(f"max_new_tokens is {max_new_tokens}; after a prompt of {len(text)}, "
                             f"1 to {room - len(text) + 1} fit: max_len and pages hold {room}")
        if len(self.queue) >= self.max_queue:
            raise RuntimeError(f"the queue is full: {len(self.queue)} requests wait; try later")
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        request = Request(self.next_id, text, len(text), max_new_tokens,
                          (temperature, top_k, top_p), generator, frozenset(map(int, stop_ids)))
        self.queue.append(request)
        self.next_id += 1
        return request.id

    def cancel(self, request_id):
        """End a request now and return the ids it has written; ValueError if it is not there."""
        for request in [*self.queue, *self.running]:
            if request.id == request_id:
                self.leave(request, "cancelled")
                return request.text[request.n_prompt :]
        raise ValueError(f"request {request_id} neither waits nor runs: it is unknown or done")

    def leave(self, request, state):
        """Take a request out of the queue or the batch; its pages are free again."""
        (self.running if request in self.running else self.queue).remove(request)
        self.pool.release(request.pages)
        self.counts[state] += 1
        request.pages, request.n_read, request.state = [], 0, state

    def admit(self):
        """Move requests from the queue into the batch while there are seats and pages for them."""
        pool = self.pool
        while self.queue and len(self.running) < self.max_batch:
            request = self.queue[0]
            pages, n = pool.find(request.text[:-1])
            needed = -(-len(request.text) // pool.page_size) - len(pages)
            if needed > len(pool.free) - sum(pool.users[page] == 0 for page in pages):
                break
            self.running.append(self.queue.popleft())
            request.pages, request.n_read = [pool.share(page) for page in pages], n
            request.state = "prefill"
            self.counts["tokens shared"] += n

    def make_room(self, request, n):
        """Give a request pages of its own for its next n tokens; False if it had to stand back."""
        pool, pages, size = self.pool, request.pages, self.pool.page_size
        for i in range(request.n_read // size, -(-(request.n_read + n) // size)):
            while i == len(pages) or pool.users[pages[i]] > 1:  # missing, or others read it too
                if not pool.free:
                    youngest = self.running[-1]
                    self.leave(youngest, "preempted")
                    self.queue.appendleft(youngest)
                    if youngest is request:
                        return False
                    continue
                page = pool.take()
                if i < len(pages):  # copy on write
                    pool.kv[:, page] = pool.kv[:, pages[i]]
                    pool.release([pages[i]])
                    self.counts["pages copied"] += 1
                pages[i : i + 1] = [page]
            if len(pool.known.get(pages[i], (0, ()))[1]) > max(0, request.n_read - i * size):
                pool.forget(pages[i])  # what it was known to hold is about to be written over
        return True

    def step(self):
        """Admit, read, draw: return the new tokens, `[(request id, token), ...]`."""
        self.admit()
        budget, plan, written = self.chunk_size, {}, []
        for request in list(self.running):
            if request.state == "preempted":  # by an older one; so are all that follow
                break
            todo = len(request.text) - request.n_read
            n = 1 if todo == 1 else min(todo, budget)
            if n and self.make_room(request, n):
                budget -= n if todo > 1 else 0
                plan.setdefault(n, []).append(request)
        for n, requests in plan.items():
            requests.sort(key=lambda r: r.n_read)  # neighbours of about one length: little padding
            logits = self.read(requests, n)
            ready = [row for row, r in enumerate(requests) if r.n_read == len(r.text)]
            written += self.write([requests[row] for row in ready], logits[ready])
        self.counts["steps"] += 1
        return written

    def read(self, requests, n):
        """Read the next n tokens of each request; return the logits `(B, V)` after the last."""
        pool, size = self.pool, self.pool.page_size
        width = max(len(r.pages) for r in requests)
        tables = [r.pages + [0] * (width - len(r.pages)) for r in requests]
        rows = [r.text[r.n_read : r.n_read + n] for r in requests]
        idx, starts, tables = (torch.tensor(part, device=pool.kv.device) for part in
                               (rows, [r.n_read for r in requests], tables))
        logits = forward_paged(self.model, idx, starts, tables, pool)
        for r in requests:
            r.n_read += n
            touched = range((r.n_read - n) // size, -(-r.n_read // size))
            for i in touched if self.sharing else ():
                held = r.text[i * size : min(r.n_read, (i + 1) * size)]
                pool.remember(r.pages[i - 1] if i else None, r.pages[i], held)
        self.counts["tokens read"] += n * len(requests)
        return logits[:, -1]

    def write(self, requests, logits):
        """Draw each request's next token with its own generator: `[(request id, token), ...]`."""
        written = []
        for sampling in dict.fromkeys(r.sampling for r in requests):
            alike = [row for row, r in enumerate(requests) if r.sampling == sampling]
            probs = next_token_probs(logits[alike], *sampling).cpu()
            if sampling[0] > 0:  # a race, as in torch.multinomial
                probs = probs / torch.stack([torch.empty(probs.size(1)).exponential_(
                    generator=requests[row].generator) for row in alike])
            for request, token in zip([requests[row] for row in alike], probs.argmax(-1).tolist()):
                request.text.append(token)
                request.state = "decode"
                written.append((request.id, token))
                n_new = len(request.text) - request.n_prompt
                if n_new >= request.max_new_tokens or token in request.stop_ids:
                    self.finished[request.id] = request.text[request.n_prompt :]
                    self.leave(request, "done")
        return written

    def stream(self):
        """Yield (request id, token) as tokens are written, until all requests are done."""
        while self.queue or self.running:
            yield from self.step()

    def run(self):
        """Serve until all is done; return the new ids, {request id: list}, of all that ended."""
        collections.deque(self.stream(), maxlen=0)
        finished, self.finished = self.finished, {}
        return finished

    @property
    def stats(self):
        """What happened so far, and what memory holds now, as a dict."""
        size, by_length = self.pool.page_size, sorted(self.running, key=lambda r: r.n_read)
        held = {page: min(size, r.n_read - i * size)  # the longest of those who share it counts
                for r in by_length for i, page in enumerate(r.pages)}
        return {**self.counts, "queued": len(self.queue), "running": len(self.running),
                "free pages": len(self.pool.free), "used pages": len(held),
                "unused slots": len(held) * size - sum(held.values())}


if __name__ == "__main__":
    main()
