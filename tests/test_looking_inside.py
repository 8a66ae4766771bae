"""Page 06: heads that are scored and knocked out, the logit lens, and the trained model's diary."""

import json
import runpy
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
IDX = torch.randint(V, (4, T), generator=torch.Generator().manual_seed(1))
DIARY = json.loads((ROOT / "data" / "tiny_model.json").read_text(encoding="utf-8"))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = TinyGPT(V, d_model=16, n_heads=HEADS, n_layers=LAYERS, max_len=12).eval()
    with torch.no_grad():
        model.head.weight.mul_(20)  # a fresh model's head is so small that it would hide changes
    return model


def state(model):
    """All weights as one vector."""
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def test_head_scores_of_patterns_made_by_hand():
    rows, even = torch.arange(T), torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]
    previous, first = torch.eye(T)[(rows - 1).clamp(min=0)], torch.eye(T)[0 * rows]
    heads = torch.stack([previous, first, even, torch.eye(T)]).view(2, 1, 2, T, T)
    weights = heads.expand(2, 3, 2, T, T)  # 2 layers, 3 texts, 2 heads
    chance = even[1:, 0].mean().item()  # 1/2, 1/3, … of the weight on one character of the past
    for job, wanted in [(previous, [[1, 1 / 5], [chance, 0]]), (first, [[1 / 5, 1], [chance, 0]])]:
        targets = (job > 0) & (rows > 0)[:, None]  # the first row has no past
        assert_close(head_scores(weights, targets.expand(3, T, T)), torch.tensor(wanted))


def test_head_scores_tells_texts_rows_and_columns_apart(model):
    weights, targets = torch.zeros(1, 2, 1, T, T), torch.zeros(2, T, T, dtype=torch.bool)
    weights[0, 0, 0, 4, 1], weights[0, 0, 0, 4, 2], weights[0, 1, 0, 5, 3] = 0.5, 0.25, 0.5
    # the second is in the first one's row: they add up; the third is in another: the mean
    for at, wanted in [((0, 4, 1), 0.5), ((0, 4, 2), 0.75), ((1, 5, 3), 0.625)]:
        targets[at] = True
        assert head_scores(weights, targets).item() == pytest.approx(wanted)
    assert head_scores(weights, targets.flip(0)).item() == 0  # the other text's rows
    assert head_scores(weights, targets.mT).item() == 0
    model(IDX, recorder := AttentionRecorder())  # its weights on all of the past are 1
    past = torch.ones(4, T, T, dtype=torch.bool).tril()
    assert_close(head_scores(recorder.weights, past), torch.ones(LAYERS, HEADS))


@pytest.mark.parametrize("targets, message", [
    (torch.ones(4, T, T), "must be .4, 6, 6. bool.*float32"),
    (torch.ones(T, T, dtype=torch.bool), r"not \(6, 6\)"),
    (torch.zeros(4, T, T, dtype=torch.bool), "with a True in it"),
])
def test_head_scores_refuses(targets, message):
    with pytest.raises(ValueError, match=message):
        head_scores(torch.zeros(LAYERS, 4, HEADS, T, T), targets)


def test_an_ablated_heads_part_never_reaches_the_projection(model):
    before = model(IDX)
    with ablate(model, []):
        assert torch.equal(model(IDX), before)
    for layer, head in ALL:
        part = torch.arange(8) + 8 * head
        hook = model.blocks[layer].attention.proj.register_forward_pre_hook(
            lambda proj, inputs, part=part: inputs[0].index_fill(-1, part, 0.0))
        wanted = model(IDX)
        hook.remove()
        assert (wanted - before).abs().max() > 1e-3
        with ablate(model, [(layer, head)]):
            for memory in (None, AttentionRecorder(), tiny.KVCache(model, len(IDX))):
                assert_close(model(IDX, memory), wanted)


def test_the_model_is_whole_again_also_after_an_error(model):
    before, weights = model(IDX), state(model)
    proj = [block.attention.proj.weight for block in model.blocks]
    with ablate(model, [(0, 0)]), ablate(model, [(0, 1), (1, 1)]):  # both at once
        both, seen = model(IDX), [weight._version for weight in proj]
    assert torch.equal(state(model), weights)
    assert all(weight._version > version for weight, version in zip(proj, seen))  # engines notice
    with ablate(model, iter([(0, 0), (0, 1), (1, 1)])):  # pairs that can be read only once, too
        assert_close(model(IDX), both)
    with pytest.raises(KeyError), ablate(model, ALL):
        raise KeyError("something went wrong inside")
    assert torch.equal(state(model), weights) and torch.equal(model(IDX), before)
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("bad", [(LAYERS, 0), (0, HEADS), (-1, 0), (0, -1)])
def test_ablate_refuses_a_head_that_is_not_there(model, bad):
    weights = state(model)
    message = f"no head {bad[1]} in layer {bad[0]}; .*n_heads=2, n_layers=3"
    with pytest.raises(ValueError, match=message), ablate(model, [(0, 0), bad]):
        pass
    assert torch.equal(state(model), weights)


def test_the_lens_after_n_blocks_is_a_model_of_n_blocks(model):
    lens, blocks = logit_lens(model, IDX), model.blocks
    assert lens.shape == (LAYERS + 1, 4, T, V) and not lens.requires_grad
    with pytest.raises(ValueError, match="do not fit a vocabulary"):  # what the model refuses
        logit_lens(model, IDX + V)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())  # left behind
    for n in range(LAYERS + 1):
        model.blocks = blocks[:n]
        assert_close(lens[n], model(IDX))


def test_the_diary_is_whole():
    entries, skills = len(DIARY["step"]), ("spelled", "grammatical", "remembers", "counts")
    assert DIARY["step"] == sorted(set(DIARY["step"])) and DIARY["step"][0] == 0
    assert all(len(DIARY[key]) == entries for key in (*skills, "story_loss", "sample"))
    assert len(DIARY["train_loss"]) == DIARY["step"][-1]
    assert all(0 <= share <= 1 for skill in skills for share in DIARY[skill])
    assert min(DIARY["story_loss"]) > DIARY["floor"]  # no model beats the floor
    checkpoint = tiny.load_checkpoint(ROOT / "data" / "tiny_model.pt")
    assert checkpoint["step"] == DIARY["step"][-1]
    train_text = tiny.split_corpus(tiny.load_corpus("tiny"), by_line=True)[0]
    assert checkpoint["tokenizer"].state == tiny.CharTokenizer(train_text).state


def test_the_command_trains_this_very_model(tmp_path, monkeypatch):
    """The first 10 losses of the diary come again."""
    arguments = ["--steps", "10", "--quick", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["make_tiny_model.py", *arguments])
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(ROOT)])
    runpy.run_path(str(ROOT / "data" / "make_tiny_model.py"), run_name="__main__")
    assert str(ROOT) in sys.path  # the command finds the course from any folder
    again = json.loads((tmp_path / "tiny_model.json").read_text(encoding="utf-8"))
    assert again["step"] == [0, 10]
    assert again["train_loss"] == pytest.approx(DIARY["train_loss"][:10], abs=1e-3)
    assert tiny.load_checkpoint(tmp_path / "tiny_model.pt")["step"] == 10
