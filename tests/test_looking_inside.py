"""Page 06: heads that are scored and knocked out, the logit lens, and the trained model's diary."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tinygpt_helpers import (
    CharTokenizer,
    KVCache,
    TinyGPT,
    ablate,
    forward_cached,
    generate,
    head_scores,
    load_checkpoint,
    load_corpus,
    logit_lens,
    split_corpus,
)

ROOT = Path(__file__).resolve().parent.parent
T, V, LAYERS, HEADS = 6, 11, 3, 2
ALL = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = TinyGPT(V, d_model=16, n_heads=HEADS, n_layers=LAYERS, max_len=12).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # a fresh model's head is so small that it would hide changes
    return model


@pytest.fixture
def idx():
    return torch.randint(V, (4, T), generator=torch.Generator().manual_seed(1))


def read(model, idx):
    with torch.no_grad():
        return model(idx)


def state(model):
    """All weights as one vector."""
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


# ---------------------------------------------------------------- head_scores


def previous():
    """A head that looks only at the character before (the first at itself), `(T, T)`."""
    return torch.eye(T).roll(-1, 1).tril().index_put((torch.tensor(0), torch.tensor(0)),
                                                     torch.tensor(1.0))


def first():
    return torch.eye(T)[[0] * T]


def evenly():
    return torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]


def job(pattern):
    """What a head with this pattern looks at, from row 1 on, `(T, T)` bool."""
    targets = pattern > 0
    targets[0] = False
    return targets


def test_head_scores_of_patterns_made_by_hand():
    one, two = torch.stack([previous(), first()]), torch.stack([evenly(), torch.eye(T)])
    weights = torch.stack([one, two])[:, None].expand(2, 3, 2, T, T)  # 2 layers, 3 texts, 2 heads
    even = evenly()[1:, 0].mean().item()  # 1/2, 1/3, … of the weight on one character of the past
    for pattern, wanted in [(previous(), [[1, 1 / 5], [even, 0]]), (first(), [[1 / 5, 1],
                                                                             [even, 0]])]:
        scores = head_scores(weights, job(pattern).expand(3, T, T))
        assert_close(scores, torch.tensor(wanted))


def test_head_scores_tells_texts_rows_and_columns_apart():
    weights = torch.zeros(1, 2, 1, T, T)
    weights[0, 0, 0, 4, 1], weights[0, 0, 0, 4, 2], weights[0, 1, 0, 5, 3] = 0.5, 0.25, 0.5
    targets = torch.zeros(2, T, T, dtype=torch.bool)
    targets[0, 4, 1] = True
    assert head_scores(weights, targets).item() == 0.5
    targets[0, 4, 2] = True  # two characters in one row: their weights add up
    assert head_scores(weights, targets).item() == 0.75
    targets[1, 5, 3] = True  # a second row: the mean over both
    assert head_scores(weights, targets).item() == pytest.approx(0.625)
    assert head_scores(weights, targets.flip(0)).item() == 0  # the other text's rows
    assert head_scores(weights, targets.mT).item() == 0


def test_head_scores_fits_a_models_weights(model, idx):
    with torch.no_grad():
        weights = model(idx, return_attention=True)[1]
    past = torch.ones(T, T, dtype=torch.bool).tril().expand(4, T, T)
    assert_close(head_scores(weights, past), torch.ones(LAYERS, HEADS))  # nobody looks elsewhere


@pytest.mark.parametrize("targets, message", [
    (torch.ones(4, T, T), "must be .4, 6, 6. bool.*float32"),
    (torch.ones(T, T, dtype=torch.bool), r"not \(6, 6\)"),
    (torch.zeros(4, T, T, dtype=torch.bool), "False everywhere"),
])
def test_head_scores_refuses(targets, message):
    with pytest.raises(ValueError, match=message):
        head_scores(torch.zeros(LAYERS, 4, HEADS, T, T), targets)


# ---------------------------------------------------------------- ablate


def test_ablating_no_head_changes_nothing(model, idx):
    before = read(model, idx)
    with ablate(model, []):
        assert torch.equal(read(model, idx), before)


def test_an_ablated_heads_part_never_reaches_the_projection(model, idx):
    before = read(model, idx)
    for layer, head in ALL:
        part = slice(head * 16 // HEADS, (head + 1) * 16 // HEADS)

        def silence(proj, inputs):
            return inputs[0].index_fill(-1, torch.arange(16)[part], 0.0)  # noqa: B023

        hook = model.blocks[layer].attention.proj.register_forward_pre_hook(silence)
        wanted = read(model, idx)
        hook.remove()
        assert (wanted - before).abs().max() > 1e-3
        with ablate(model, [(layer, head)]):
            assert_close(read(model, idx), wanted)


def test_ablating_all_heads_of_a_layer_is_the_model_without_that_attention(model, idx):
    class Nothing(torch.nn.Module):
        def forward(self, x, return_attention=False):
            return torch.zeros_like(x), None

    for layer, block in enumerate(model.blocks):
        attention, block.attention = block.attention, Nothing()
        wanted = read(model, idx)
        block.attention = attention
        with ablate(model, [(layer, head) for head in range(HEADS)]):
            assert_close(read(model, idx), wanted)


def test_a_model_without_heads_knows_the_last_token_only(model, idx):
    other = idx.clone()
    other[:, 0] = (idx[:, 0] + 1) % V
    with ablate(model, ALL):
        assert_close(read(model, idx)[:, -1], read(model, other)[:, -1])
    assert (read(model, idx)[:, -1] - read(model, other)[:, -1]).abs().max() > 1e-3


def test_ablation_holds_with_a_cache_and_while_writing(model, idx):
    def with_cache():
        cache = KVCache(model, len(idx))
        parts = [forward_cached(model, idx[:, :4], cache), forward_cached(model, idx[:, 4:], cache)]
        return torch.cat(parts, 1)

    def write(use_cache):
        return generate(model, idx, 20, temperature=0, use_cache=use_cache)  # past max_len, too

    whole = write(True)
    with ablate(model, [(0, 1), (2, 0)]):
        assert_close(with_cache(), read(model, idx))
        texts = write(True), write(False)
    assert torch.equal(*texts) and not torch.equal(texts[0], whole)


def test_the_model_is_whole_again_also_after_an_error(model, idx):
    before, weights = read(model, idx), state(model)
    with ablate(model, [(0, 0)]), ablate(model, [(0, 1), (1, 1)]):  # both at once
        both = read(model, idx)
    assert torch.equal(state(model), weights)
    with ablate(model, iter([(0, 0), (0, 1), (1, 1)])):  # pairs that can be read only once, too
        assert_close(read(model, idx), both)
    with pytest.raises(KeyError), ablate(model, ALL):
        raise KeyError("something went wrong inside")
    assert torch.equal(state(model), weights) and torch.equal(read(model, idx), before)
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("bad", [(LAYERS, 0), (0, HEADS), (-1, 0), (0, -1)])
def test_ablate_refuses_a_head_that_is_not_there(model, bad):
    weights = state(model)
    message = f"no head {bad[1]} in layer {bad[0]}: .* 0 to 2 .* 0 to 1"
    with pytest.raises(ValueError, match=message):
        with ablate(model, [(0, 0), bad]):
            pass
    assert torch.equal(state(model), weights)


# ---------------------------------------------------------------- logit_lens


def test_the_lens_ends_with_the_models_own_logits(model, idx):
    lens = logit_lens(model, idx)
    assert lens.shape == (LAYERS + 1, 4, T, V)
    assert_close(lens[-1], read(model, idx))
    assert not lens.requires_grad


def test_the_lens_after_n_blocks_is_a_model_of_n_blocks(model, idx):
    lens, blocks = logit_lens(model, idx), model.blocks
    for n in range(LAYERS + 1):
        model.blocks = blocks[:n]
        assert_close(lens[n], read(model, idx))
    model.blocks = blocks


@pytest.mark.parametrize("idx, message", [
    (torch.zeros(1, 13, dtype=torch.long), "max_len"),
    (torch.full((1, 2), V), "outside the vocabulary"),
    (torch.zeros(3, dtype=torch.long), "must be .B, T."),
])
def test_the_lens_refuses_what_the_model_refuses(model, idx, message):
    with pytest.raises(ValueError, match=message):
        logit_lens(model, idx)


# ---------------------------------------------------------------- data/tiny_model.json

SKILLS = ("spelled", "grammatical", "remembers", "counts")


@pytest.fixture(scope="module")
def diary():
    return json.loads((ROOT / "data" / "tiny_model.json").read_text(encoding="utf-8"))


def test_the_diary_is_whole(diary):
    entries = len(diary["step"])
    assert diary["step"] == sorted(set(diary["step"])) and diary["step"][0] == 0
    assert all(len(diary[key]) == entries for key in (*SKILLS, "story_loss", "sample"))
    assert len(diary["train_loss"]) == diary["step"][-1]
    assert all(0 <= share <= 1 for skill in SKILLS for share in diary[skill])
    assert min(diary["story_loss"]) > diary["floor"]  # no model beats the floor
    checkpoint = load_checkpoint(ROOT / "data" / "tiny_model.pt")
    assert checkpoint["step"] == diary["step"][-1]
    train_text = split_corpus(load_corpus("tiny"), by_line=True)[0]
    assert checkpoint["tokenizer"].itos == CharTokenizer(train_text).itos


def test_the_command_trains_this_very_model(diary, tmp_path):
    """The first 20 losses of the diary come again."""
    command = [sys.executable, ROOT / "data" / "make_tiny_model.py", "--steps", "20", "--quick"]
    done = subprocess.run([*command, "--folder", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "tiny_model.json").read_text(encoding="utf-8"))
    assert again["step"] == [0, 20]
    assert again["train_loss"] == pytest.approx(diary["train_loss"][:20], abs=1e-3)
    assert load_checkpoint(tmp_path / "tiny_model.pt")["step"] == 20
