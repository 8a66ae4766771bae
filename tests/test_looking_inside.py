"""Page 06: heads that are scored and knocked out, the logit lens, and the trained model's diary."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import tinygpt_helpers as tiny
from tinygpt_helpers import AttentionRecorder, TinyGPT, ablate, head_scores, logit_lens

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


@torch.no_grad()
def read(model, idx, memory=None):
    return model(idx, memory)


def state(model):
    """All weights as one vector."""
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_head_scores_of_patterns_made_by_hand():
    rows, even = torch.arange(T), torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    previous, first = torch.eye(T)[(rows - 1).clamp(min=0)], torch.eye(T)[0 * rows]
    heads = torch.stack([previous, first, even, torch.eye(T)]).view(2, 1, 2, T, T)
    weights = heads.expand(2, 3, 2, T, T)  # 2 layers, 3 texts, 2 heads
    chance = even[1:, 0].mean().item()  # 1/2, 1/3, … of the weight on one character of the past
    for job, wanted in [(previous, [[1, 1 / 5], [chance, 0]]), (first, [[1 / 5, 1], [chance, 0]])]:
        targets = (job > 0) & (rows > 0)[:, None]  # the first row has no past
        assert_close(head_scores(weights, targets.expand(3, T, T)), torch.tensor(wanted))


def test_head_scores_tells_texts_rows_and_columns_apart():
    weights, targets = torch.zeros(1, 2, 1, T, T), torch.zeros(2, T, T, dtype=torch.bool)
    weights[0, 0, 0, 4, 1], weights[0, 0, 0, 4, 2], weights[0, 1, 0, 5, 3] = 0.5, 0.25, 0.5
    # the second is in the first one's row: they add up; the third is in another: the mean
    for at, wanted in [((0, 4, 1), 0.5), ((0, 4, 2), 0.75), ((1, 5, 3), 0.625)]:
        targets[at] = True
        assert head_scores(weights, targets).item() == pytest.approx(wanted)
    assert head_scores(weights, targets.flip(0)).item() == 0  # the other text's rows
    assert head_scores(weights, targets.mT).item() == 0


def test_head_scores_fits_a_recorders_weights(model, idx):
    read(model, idx, recorder := AttentionRecorder())
    past = torch.ones(4, T, T, dtype=torch.bool).tril()
    assert_close(head_scores(recorder.weights, past), torch.ones(LAYERS, HEADS))


@pytest.mark.parametrize("targets, message", [
    (torch.ones(4, T, T), "must be .4, 6, 6. bool.*float32"),
    (torch.ones(T, T, dtype=torch.bool), r"not \(6, 6\)"),
    (torch.zeros(4, T, T, dtype=torch.bool), "False everywhere"),
])
def test_head_scores_refuses(targets, message):
    with pytest.raises(ValueError, match=message):
        head_scores(torch.zeros(LAYERS, 4, HEADS, T, T), targets)


def test_an_ablated_heads_part_never_reaches_the_projection(model, idx):
    before = read(model, idx)
    with ablate(model, []):
        assert torch.equal(read(model, idx), before)
    for layer, head in ALL:
        def silence(proj, inputs):
            return inputs[0].index_fill(-1, torch.arange(8) + 8 * head, 0.0)  # noqa: B023

        hook = model.blocks[layer].attention.proj.register_forward_pre_hook(silence)
        wanted = read(model, idx)
        hook.remove()
        assert (wanted - before).abs().max() > 1e-3
        with ablate(model, [(layer, head)]):
            assert_close(read(model, idx), wanted)
            assert_close(read(model, idx, AttentionRecorder()), wanted)


def test_ablation_holds_with_a_cache_and_while_writing(model, idx):
    def write(use_cache):
        return tiny.generate(model, idx, 20, temperature=0, use_cache=use_cache)  # past max_len

    whole = write(True)
    with ablate(model, [(0, 1), (2, 0)]):
        cache = tiny.KVCache(model, len(idx))
        parts = [read(model, part, cache) for part in idx.split(4, 1)]
        assert_close(torch.cat(parts, 1), read(model, idx))
        texts = write(True), write(False)
    assert torch.equal(*texts) and not torch.equal(texts[0], whole)


def test_the_model_is_whole_again_also_after_an_error(model, idx):
    before, weights = read(model, idx), state(model)
    proj = [block.attention.proj.weight for block in model.blocks]
    with ablate(model, [(0, 0)]), ablate(model, [(0, 1), (1, 1)]):  # both at once
        both, seen = read(model, idx), [weight._version for weight in proj]
    assert torch.equal(state(model), weights)
    assert all(weight._version > version for weight, version in zip(proj, seen))  # engines notice
    with ablate(model, iter([(0, 0), (0, 1), (1, 1)])):  # pairs that can be read only once, too
        assert_close(read(model, idx), both)
    with pytest.raises(KeyError), ablate(model, ALL):
        raise KeyError("something went wrong inside")
    assert torch.equal(state(model), weights) and torch.equal(read(model, idx), before)
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("bad", [(LAYERS, 0), (0, HEADS), (-1, 0), (0, -1)])
def test_ablate_refuses_a_head_that_is_not_there(model, bad):
    weights = state(model)
    message = f"no head {bad[1]} in layer {bad[0]}: .* 0 to 2 .* 0 to 1"
    with pytest.raises(ValueError, match=message):
        with ablate(model, [(0, 0), bad]):
            pass
    assert torch.equal(state(model), weights)


def test_the_lens_after_n_blocks_is_a_model_of_n_blocks(model, idx):
    lens, blocks = logit_lens(model, idx), model.blocks
    assert lens.shape == (LAYERS + 1, 4, T, V) and not lens.requires_grad and not hooks(model)
    assert_close(lens[-1], read(model, idx))
    for n in range(LAYERS + 1):
        model.blocks = blocks[:n]
        assert_close(lens[n], read(model, idx))


@pytest.mark.parametrize("idx, message", [
    (torch.zeros(1, 13, dtype=torch.long), "max_len"),
    (torch.full((1, 2), V), "outside the vocabulary"),
    (torch.zeros(3, dtype=torch.long), "must be .B, T."),
])
def test_the_lens_refuses_what_the_model_refuses(model, idx, message):
    with pytest.raises(ValueError, match=message):
        logit_lens(model, idx)
    assert not hooks(model)


@pytest.fixture(scope="module")
def diary():
    return json.loads((ROOT / "data" / "tiny_model.json").read_text(encoding="utf-8"))


def test_the_diary_is_whole(diary):
    entries, skills = len(diary["step"]), ("spelled", "grammatical", "remembers", "counts")
    assert diary["step"] == sorted(set(diary["step"])) and diary["step"][0] == 0
    assert all(len(diary[key]) == entries for key in (*skills, "story_loss", "sample"))
    assert len(diary["train_loss"]) == diary["step"][-1]
    assert all(0 <= share <= 1 for skill in skills for share in diary[skill])
    assert min(diary["story_loss"]) > diary["floor"]  # no model beats the floor
    checkpoint = tiny.load_checkpoint(ROOT / "data" / "tiny_model.pt")
    assert checkpoint["step"] == diary["step"][-1]
    train_text = tiny.split_corpus(tiny.load_corpus("tiny"), by_line=True)[0]
    assert checkpoint["tokenizer"].state == tiny.CharTokenizer(train_text).state


def test_the_command_trains_this_very_model(diary, tmp_path):
    """The first 20 losses of the diary come again."""
    command = [sys.executable, ROOT / "data" / "make_tiny_model.py", "--steps", "20", "--quick"]
    done = subprocess.run([*command, "--folder", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "tiny_model.json").read_text(encoding="utf-8"))
    assert again["step"] == [0, 20]
    assert again["train_loss"] == pytest.approx(diary["train_loss"][:20], abs=1e-3)
    assert tiny.load_checkpoint(tmp_path / "tiny_model.pt")["step"] == 20
