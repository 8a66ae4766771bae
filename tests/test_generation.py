"""Page 05: what is sampled, the text that is written, stories and their loss."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
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


@settings(deadline=None, max_examples=60)
@given(rows_of_logits, temperatures)
def test_temperature_divides_the_logits_and_near_0_it_is_greedy(rows, temperature):
    logits = torch.tensor(rows)
    before, best = logits.clone(), F.one_hot(logits.argmax(-1), logits.size(1)).float()
    probs = next_token_probs(logits, temperature)
    torch.testing.assert_close(probs, (logits.double() / temperature).softmax(-1).float())
    assert torch.equal(next_token_probs(logits, 0), best)
    assert torch.equal(next_token_probs(logits, 0, 3, 0.9), best)
    for cold in (1e-30, 1e-44, 1e-300):  # float32 ends at 1e-45
        probs = next_token_probs(logits, cold)
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(rows)))
        assert (probs[logits < logits.amax(-1, keepdim=True) - 1e-6] == 0).all()
    assert torch.equal(logits, before)
    assert next_token_probs(torch.tensor([[1e9, 0.0]]), 1e-40).tolist() == [[1.0, 0.0]]


@settings(deadline=None, max_examples=150)
@given(rows_of_logits, temperatures, st.none() | st.integers(1, 20), st.none() | st.floats(0.01, 1))
@example([[1.0, 1.0, 1.0, 0.0]], 1.0, 2, None)  # two of three that are alike
@example([[1.0, 3.0, 1.5, 2.0]], 1.0, 2, 0.65)  # first k, then p of what is left
@example([[1.0, 3.0, 1.5, 2.0]], 1.0, None, 5e-324)
@example([[1.0, 3.0, 1.5, 2.0]], 1.0, None, 1.0)
def test_the_fewest_likeliest_tokens_stay(rows, temperature, k, p):
    logits = torch.tensor(rows)
    full, kept = next_token_probs(logits, temperature), next_token_probs(logits, temperature, k, p)
    torch.testing.assert_close(kept.sum(-1), torch.ones(len(rows)))
    for before, after in zip(full.double(), kept.double()):
        stays, ranked = after > 0, before.sort(descending=True).values
        n, share = stays.sum(), ranked.cumsum(0) / ranked[:k].sum()  # of what k leaves
        assert torch.equal(before[stays].sort(descending=True).values, ranked[:n])
        torch.testing.assert_close(after, before * stays / ranked[:n].sum(), atol=1e-6, rtol=1e-4)
        # all that k leaves (k beyond V: all); or they reach p of it, and fewer would not
        assert n == len(ranked[:k]) or (p or 1) < 1 and share[n - 1] >= p - 1e-5
        assert p in (None, 1) or n == 1 or share[n - 2] < p + 1e-5


def test_the_ends_of_top_p():
    """What reaches p exactly is enough; 1 leaves also what is too small to count."""
    assert next_token_probs(torch.zeros(1, 4), top_p=0.5).tolist() == [[0.5, 0.5, 0.0, 0.0]]
    assert next_token_probs(torch.tensor([[20.0, 0.0]]), top_p=1.0)[0, 1] > 0


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9999}, {"temperature": 3.0}])
def test_half_precision_is_widened_before_anything_is_lost(options):
    logits = torch.tensor([[8.0, -0.0303, -0.0200]], dtype=torch.bfloat16)
    probs = next_token_probs(logits, **options)  # 8.0303 and 8.0200 are one bfloat16
    assert probs.dtype == torch.float32 and probs[0, 2] > probs[0, 1]
    assert torch.equal(probs, next_token_probs(logits.float(), **options))
    assert torch.equal(probs > 0, torch.tensor([[True, "top_k" not in options, True]]))
    model = random_model().to(torch.bfloat16)
    out = generate(model, torch.ones(2, 1).long(), 12, **options)  # with the cache, and past it
    assert out.shape == (2, 13) and out.max() < 9


@pytest.mark.parametrize(("name", "value"), [
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", 0),
    ("top_k", -3), ("top_p", 0.0), ("top_p", -1), ("top_p", 1.01), ("top_p", math.nan)])
def test_a_value_out_of_range_is_named(name, value):
    model, zeros = random_model().train(), torch.zeros(1, 3)
    for call in (partial(next_token_probs, zeros), partial(generate, model, zeros.long(), 3)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            call(**{name: value})
    assert model.training  # as it was, also after an error


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_of_nan_are_refused(temperature):
    model = random_model()
    model.head.weight.data[3] = math.nan
    with pytest.raises(ValueError, match="nan"):
        next_token_probs(torch.tensor([[1.0, 2.0], [math.nan, 1.0]]), temperature)
    with pytest.raises(ValueError, match="nan"):
        generate(model, torch.tensor([[1]]), 3, temperature)


@settings(deadline=None, max_examples=60, derandomize=True)  # nearly equal tokens could differ
@given(st.integers(1, 3), st.integers(1, 14), st.integers(0, 14), st.integers(0, 99))
def test_the_text_is_the_one_that_forward_gives(B, T, new, seed):
    model, prompt = random_model(seed=seed % 5), torch.randint(9, (B, T), generator=seeded(seed))
    before = prompt.clone()
    for temperature in (1.0, 0):
        out, plain = (generate(model, prompt, new, temperature, generator=seeded(seed),
                               use_cache=use) for use in (True, False))
        assert torch.equal(out, plain) and out.shape == (B, T + new) and out.dtype == torch.int64
        assert torch.equal(out[:, :T], before)
    for t in range(T, T + new):  # by hand: the last max_len tokens, the last position, the largest
        last = model(out[:, max(0, t - 8) : t])[:, -1]
        assert torch.equal(last.argmax(-1), out[:, t]) and last.requires_grad
    assert not (out.is_inference() or out.requires_grad)  # it can be trained on, and changed
    out[0, 0] = 8 - out[0, 0]
    assert torch.equal(prompt, before)  # a copy, not a view


@pytest.mark.parametrize(("idx", "new", "words"), [
    (torch.zeros(1, 0).long(), 3, r"not \[1, 0\]"), (torch.zeros(3).long(), 3, r"not \[3\]"),
    (torch.zeros(1, 2).long(), -1, "max_new_tokens is -1"), (torch.tensor([[1.7]]), 3, "float32"),
    (torch.tensor([[1, 9]]), 3, "ids 1 to 9 do not fit a vocabulary, 0..8")])
def test_a_prompt_that_cannot_be_continued(idx, new, words):
    with pytest.raises(ValueError, match=words):
        generate(random_model(), idx, new)


def test_a_seed_gives_the_same_text_without_dropout_and_leaves_mode_and_global_state():
    model, prompt = random_model(dropout=0.5), torch.tensor([[1], [3]])
    state = torch.get_rng_state()
    one, again, other = (generate(model, prompt, 20, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other) and not model.training
    in_training = generate(model.train(), prompt, 20, generator=seeded(1))
    assert torch.equal(one, in_training) and all(part.training for part in model.modules())
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


def test_a_row_that_has_stopped_is_filled_up_and_when_all_have_no_more_is_read():
    model, prompt = random_model(vocab_size=4), torch.randint(4, (40, 3), generator=seeded())
    assert 2 in prompt  # a stop in the prompt stops nothing
    free, out = (generate(model, prompt, 12, generator=seeded(3), stop_id=s)[:, 3:].tolist()
                 for s in (None, 2))
    for row, other in zip(out, free):
        n = other.index(2) if 2 in other else 12
        assert row == other[:n] + [2] * (12 - n)  # until then as without
    assert 5 < sum(2 in row for row in out) < 40
    model, row, reads = random_model(vocab_size=4, seed=3), prompt[:1], []
    stop = generate(model, row, 1, 0)[0, 3].item()
    model.norm.register_forward_hook(lambda module, args, x: reads.append(x.requires_grad))
    out = generate(model, row.int(), 100, 0, stop_id=stop)
    assert out[0, 3:].tolist() == [stop] * 100 != [0] * 100 and out.dtype == torch.int64
    assert reads == [False]  # once, and nothing is kept for a backward pass


STORIES = "A cat.\nThe big dog ran far away.\nI\n\nA cat sat.\n"


@pytest.mark.parametrize(("max_len", "batch_size"), [(40, 2), (27, 64), (10, 2), (1, 64)])
def test_the_loss_of_whole_stories_each_read_from_its_start(max_len, batch_size):
    tok = CharTokenizer(STORIES)
    model, total, count = random_model(40, max_len, dropout=0.5), 0.0, 0
    for story in STORIES.splitlines():
        ids = torch.tensor([tok.encode(f"\n{story}\n")])[:, : max_len + 1]
        total += F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()
        count += ids.size(1) - 1
    ids = torch.tensor(tok.encode("\n" + STORIES))
    line_ends = (ids[:-1] == tok.encode("\n")[0]).nonzero()[:, 0]
    loss = tiny.evaluate(model.train(), ids, batch_size, line_ends)
    assert loss == pytest.approx(total / count, rel=1e-5) and model.training


def test_stories_begin_with_the_prompt_and_end_at_a_line_end():
    tok = CharTokenizer(STORIES)
    model = random_model(tok.vocab_size, 12)
    stories, again, others = (tiny.sample_stories(model, tok, 30, "A c", 1.5, seed, max_chars=40)
                              for seed in (1, 1, 2))
    assert stories == again != others and len(stories) == 30 and len(set(stories)) > 10
    assert all(s.startswith("A c") and "\n" not in s and len(s) <= 43 for s in stories)
    assert min(map(len, stories)) < 43  # some have ended


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
    text = load_corpus()[:230]  # 3 batches; an epoch over 20 KB takes minutes on a laptop's CPU
    names = vars(tiny) | {"text": text, "prompt": text[:5], "device": tiny.pick_device("cpu")}
    exec(SCRIPT, names)
    written = capsys.readouterr().out.removesuffix("\n")
    assert written.startswith(text[:5]) and len(written) == 205 and set(written) <= set(text)
    assert 1.0 < names["loss"] < math.log(len(set(text)))  # it has begun to learn


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_logits_of_spoilt_weights_are_refused(value, temperature):
    logits = torch.randn(3, 9)
    logits[1] = value
    with pytest.raises(ValueError, match="spoilt"):
        next_token_probs(logits, temperature)
    next_token_probs(torch.full((4, 9), 3e38), temperature)  # large, and finite
