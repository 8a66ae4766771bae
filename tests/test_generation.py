"""Page 05: what is sampled, the text that is written, stories and their loss."""

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygpt_helpers as tiny
from tinygpt_helpers import CharTokenizer, generate, load_corpus, next_token_probs


def random_model(vocab_size=9, max_len=8, n_layers=2, seed=0, **options):
    """A model with weights so large that it prefers some tokens clearly."""
    torch.manual_seed(seed)
    model = tiny.TinyGPT(vocab_size, 16, 4, n_layers, max_len, **options).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.35 + (weight.ndim == 1))
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


rows_of_logits = st.integers(2, 12).flatmap(lambda V: st.lists(
    st.lists(st.floats(-20, 20, width=32), min_size=V, max_size=V), min_size=1, max_size=3))
temperatures = st.floats(0.5, 5)

# ---------------------------------------------------------------- next_token_probs


@settings(deadline=None, max_examples=60)
@given(rows_of_logits, temperatures)
def test_temperature_divides_the_logits_and_near_0_it_is_greedy(rows, temperature):
    logits = torch.tensor(rows)
    before, ones = logits.clone(), torch.ones(len(rows))
    probs = next_token_probs(logits, temperature)
    torch.testing.assert_close(probs, (logits.double() / temperature).softmax(-1).float())
    best = next_token_probs(logits, 0)
    assert torch.equal(best.argmax(-1), logits.argmax(-1))
    assert torch.equal(best.sum(-1), ones) and (best.max(-1).values == 1).all()
    for cold in (1e-30, 1e-44, 1e-300):  # float32 ends at 1e-45
        probs = next_token_probs(logits, cold)
        torch.testing.assert_close(probs.sum(-1), ones)
        assert (probs[logits < logits.amax(-1, keepdim=True) - 1e-6] == 0).all()
    assert torch.equal(logits, before)


@settings(deadline=None, max_examples=150)
@given(rows_of_logits, temperatures, st.none() | st.integers(1, 20), st.none() | st.floats(0.01, 1))
def test_the_fewest_likeliest_tokens_stay(rows, temperature, k, p):
    logits = torch.tensor(rows)
    full, kept = next_token_probs(logits, temperature), next_token_probs(logits, temperature, k, p)
    torch.testing.assert_close(kept.sum(-1), torch.ones(len(rows)))
    for before, after in zip(full.double(), kept.double()):
        stays = after > 0
        assert stays.any() and before[stays].max() == before.max()
        assert stays.all() or before[stays].min() >= before[~stays].max()
        expected = torch.where(stays, before, 0.0) / before[stays].sum()
        torch.testing.assert_close(after, expected, atol=1e-6, rtol=1e-4)
        top = before.sort(descending=True).values[:k]  # k beyond V: all
        if p is None:
            assert stays.sum() == len(top)
        else:  # they reach p of what k leaves, and fewer would not
            share = before[stays] / top.sum()
            assert share.sum() >= p - 1e-5 or stays.sum() == len(top)
            assert p == 1 or share.sum() - share.min() < p + 1e-5


@pytest.mark.parametrize(("options", "expected"), [
    ({"top_p": 0.4}, [0, 1, 0, 0]), ({"top_p": 0.6}, [0, 2, 0, 1]),
    ({"top_p": 0.8}, [0, 10, 3, 5]), ({"top_p": 0.95}, [2, 10, 3, 5]),
    ({"top_p": 1.0}, [2, 10, 3, 5]), ({"top_p": 5e-324}, [0, 1, 0, 0]),
    ({"top_k": 2, "top_p": 0.65}, [0, 1, 0, 0]),  # first k, then p of what is left: 2/3 and 1/3
    ({"temperature": 0, "top_k": 3, "top_p": 0.9}, [0, 1, 0, 0]),
])  # fmt: skip
def test_top_k_and_top_p_by_hand(options, expected):
    logits, expected = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log(), torch.tensor([expected])
    torch.testing.assert_close(next_token_probs(logits, **options), expected / expected.sum())


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9999}, {"temperature": 3.0}])
def test_half_precision_is_widened_before_anything_is_lost(options):
    logits = torch.tensor([[8.0, -0.0303, -0.0200]], dtype=torch.bfloat16)
    probs = next_token_probs(logits, **options)  # 8.0303 and 8.0200 are one bfloat16
    assert probs.dtype == torch.float32 and probs[0, 2] > probs[0, 1]
    assert torch.equal(probs, next_token_probs(logits.float(), **options))
    assert torch.equal(probs > 0, torch.tensor([[True, "top_k" not in options, True]]))


BAD = [("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", 0),
       ("top_k", -3), ("top_p", 0.0), ("top_p", -1), ("top_p", 1.01), ("top_p", math.nan)]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_out_of_range_is_named(name, value):
    model = random_model().train()
    for call in (lambda **bad: next_token_probs(torch.zeros(1, 3), **bad),
                 lambda **bad: generate(model, torch.zeros(1, 2).long(), 3, **bad)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            call(**{name: value})
    assert model.training


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_of_nan_are_refused(temperature):
    logits = torch.tensor([[1.0, 2.0], [math.nan, 1.0]])
    with pytest.raises(ValueError, match="nan"):
        next_token_probs(logits, temperature)
    model = random_model()
    model.head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="nan"):
        generate(model, torch.tensor([[1]]), 3, temperature)


# ---------------------------------------------------------------- generate


@settings(deadline=None, max_examples=60, derandomize=True)  # nearly equal tokens could differ
@given(st.integers(1, 3), st.integers(1, 14), st.integers(0, 14), st.integers(0, 99))
def test_the_text_is_the_one_that_forward_gives(B, T, new, seed):
    model, prompt = random_model(seed=seed % 5), torch.randint(9, (B, T), generator=seeded(seed))
    before = prompt.clone()
    out, plain = (generate(model, prompt, new, 0, use_cache=use) for use in (True, False))
    assert torch.equal(out, plain) and out.shape == (B, T + new) and out.dtype == torch.int64
    for t in range(T, T + new):  # by hand: the last max_len tokens, the last position, the largest
        last = model(out[:, max(0, t - 8) : t])[:, -1]
        assert torch.equal(last.argmax(-1), out[:, t])
    sampled = [generate(model, prompt, new, generator=seeded(seed), use_cache=use)
               for use in (True, False)]
    assert torch.equal(*sampled) and torch.equal(sampled[0][:, :T], before)
    out[0, 0] = 8 - out[0, 0]
    assert torch.equal(prompt, before)  # a copy, not a view


@pytest.mark.parametrize(("backend", "T", "new"), [
    ("eager", 2, 5),  # the graphs alone: of the prompt, of a token, of the window
    pytest.param("inductor", 1, 3, marks=pytest.mark.skipif(
        not (shutil.which("g++") or shutil.which("clang++")),
        reason="torch.compile needs a C++ compiler, and there is none here"))])  # fmt: skip
def test_a_compiled_model_writes_the_same(backend, T, new):
    model, prompt = random_model(max_len=4, n_layers=1).train(), torch.tensor([[1, 2][:T]])
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected, out = (generate(m, prompt, new, generator=seeded()) for m in (model, compiled))
    assert torch.equal(out, expected) and model.training and compiled.training


@pytest.mark.parametrize(
    ("idx", "new", "words"),
    [(torch.zeros(1, 0).long(), 3, r"\(1, 0\)"), (torch.zeros(3).long(), 3, r"\(3,\)"),
     (torch.zeros(1, 2).long(), -1, "max_new_tokens is -1"), (torch.tensor([[1.7]]), 3, "float32"),
     (torch.tensor([[1, 9]]), 3, "id 9 is outside the vocabulary of 9")])  # fmt: skip
def test_a_prompt_that_cannot_be_continued(idx, new, words):
    with pytest.raises(ValueError, match=words):
        generate(random_model(), idx, new)


@pytest.mark.parametrize("training", [True, False])
def test_the_training_mode_is_left_as_it_was(training):
    model, modes = random_model(dropout=0.5).train(training), []
    mlp = model.blocks[0].mlp
    mlp.register_forward_pre_hook(lambda *args: modes.append(mlp.training))
    generate(model, torch.tensor([[1]]), 12, generator=seeded())
    assert model.training == training and modes and not any(modes)
    model.norm.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, torch.tensor([[1]]), 3)
    assert model.training == training


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"temperature": 0}, {"stop_id": 2}])
def test_the_text_can_be_changed_and_trained_on(options):
    model = random_model()
    out = generate(model, torch.tensor([[1, 2]]), 5, **options)
    assert not (out.is_inference() or out.requires_grad) and torch.is_grad_enabled()
    out[0, 0] = 3
    model(out).logsumexp(-1).sum().backward()
    assert model.tokens.weight.grad[3].abs().sum() > 0


def test_a_seed_gives_the_same_text_and_leaves_the_global_state():
    model, prompt = random_model(), torch.tensor([[1, 2], [3, 4]])
    state = torch.get_rng_state()
    one, again, other = (generate(model, prompt, 20, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(generate(model, prompt, 20), generate(model, prompt, 20))


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.8}])
def test_tokens_come_as_often_as_their_probabilities_say(options):
    model, n, prompt = random_model(seed=4), 20_000, torch.tensor([[1, 5, 2]])
    probs = next_token_probs(model(prompt)[0, -1:], **options)[0]
    out = generate(model, prompt.expand(n, 3), 1, generator=seeded(1), **options)[:, -1]
    assert torch.equal(out, tiny.sample(probs.expand(n, 9), seeded(1)))
    shares = torch.bincount(out, minlength=9) / n
    assert (shares[probs == 0] == 0).all()
    torch.testing.assert_close(shares, probs, atol=0.015, rtol=0)  # four standard deviations


def test_a_row_that_has_stopped_is_filled_up():
    model, prompt = random_model(vocab_size=4), torch.randint(4, (40, 3), generator=seeded())
    assert 2 in prompt  # a stop in the prompt stops nothing
    free, out = (generate(model, prompt, 12, generator=seeded(3), stop_id=s)[:, 3:].tolist()
                 for s in (None, 2))
    for row, other in zip(out, free):
        n = other.index(2) if 2 in other else 12
        assert row == other[:n] + [2] * (12 - n)  # until then as without
    assert 5 < sum(2 in row for row in out) < 40


def test_when_all_rows_have_stopped_no_more_is_read():
    model, prompt, reads = random_model(), torch.tensor([[1]]), []
    stop = generate(model, prompt, 1, 0)[0, 1].item()
    model.norm.register_forward_hook(lambda *args: reads.append(1))
    out = generate(model, prompt, 100, 0, stop_id=stop)
    assert out.tolist() == [[1] + [stop] * 100] and len(reads) == 1


def test_a_model_in_half_precision_writes():
    out = generate(random_model().to(torch.bfloat16), torch.ones(2, 1).long(), 12, top_p=0.9)
    assert out.shape == (2, 13) and out.max() < 9  # with the cache, and past it


# ---------------------------------------------------------------- stories

STORIES = "A cat.\nThe big dog ran far away.\nI\n\nA cat sat.\n"


class Pairs:
    """A tokenizer of two characters a token, of one where the text ends. Ids are made as needed."""

    parts = []

    def encode(self, s):
        pairs = [s[i : i + 2] for i in range(0, len(s), 2)]
        self.parts += [pair for pair in dict.fromkeys(pairs) if pair not in self.parts]
        return [self.parts.index(pair) for pair in pairs]

    def decode(self, ids):
        return "".join(self.parts[i] for i in ids)


@pytest.mark.parametrize("max_len", [40, 27, 10, 1])
@pytest.mark.parametrize("batch_size", [64, 2])
@pytest.mark.parametrize("tok", [CharTokenizer(STORIES), Pairs()])
def test_the_loss_of_stories_by_hand_in_nats_per_character(tok, max_len, batch_size):
    model, total, count = random_model(40, max_len, dropout=0.5).train(), 0.0, 0
    loss = tiny.story_loss(model, tok, STORIES, batch_size)
    assert model.training
    model.eval()
    for story in STORIES.splitlines():
        ids = torch.tensor([tok.encode("\n" + story + "\n")])[:, : max_len + 1]
        if ids.size(1) == 1:  # "\n\n" as one token: nothing to predict
            continue
        with torch.no_grad():
            log_probs = model(ids[:, :-1])[0].log_softmax(-1)
        for t, target in enumerate(ids[0, 1:].tolist()):
            total, count = total - log_probs[t, target].item(), count + len(tok.decode([target]))
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_stories_begin_with_the_prompt_and_end_at_a_line_end():
    tok = CharTokenizer(STORIES)
    model = random_model(tok.vocab_size, 12)
    stories, again, others = (tiny.sample_stories(model, tok, 30, "A c", 1.5, seed, max_chars=40)
                              for seed in (1, 1, 2))
    assert stories == again != others and len(stories) == 30 and len(set(stories)) > 10
    assert all(s.startswith("A c") and "\n" not in s and len(s) <= 43 for s in stories)
    assert min(map(len, stories)) < 43  # some have ended


# ---------------------------------------------------------------- the whole way, by the names alone

SCRIPT = """
tok = CharTokenizer(text); ids = tok.encode(text)
ds = NextTokenDataset(ids, 128)
loader = torch.utils.data.DataLoader(ds, batch_size=32, shuffle=True, drop_last=True)
model = TinyGPT(vocab_size=tok.vocab_size, d_model=128, n_heads=4, n_layers=4, max_len=128, dropout=0.1).to(device)
opt = torch.optim.AdamW(model.parameters(), lr=3e-4)
loss = train_one_epoch(model, loader, opt, device)
out = generate(model, torch.tensor([tok.encode(prompt)]).to(device), max_new_tokens=200, temperature=1.0)
print(tok.decode(out[0].tolist()))
"""  # noqa: E501


def test_a_script_from_text_to_text(capsys):
    """An epoch over 20 KB takes minutes on a laptop's CPU, so the text is short: 5 batches. It has
    all the rest: the sizes of the model, and a generated text that passes its window."""
    text = load_corpus()[:300]
    names = vars(tiny) | {"text": text, "prompt": text[:5], "device": tiny.pick_device("cpu")}
    exec(SCRIPT, names)
    written = capsys.readouterr().out.removesuffix("\n")
    assert written.startswith(text[:5]) and len(written) == 205
    assert names["out"].shape == (1, 205) and set(written) <= set(text)
    assert 1.0 < names["loss"] < math.log(len(set(text)))  # it has begun to learn
