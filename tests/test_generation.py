"""Pages 05 and 07: what is sampled, stories and their loss, and the KV cache."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygpt_helpers as helpers
from tinygpt_helpers import (
    CharTokenizer,
    KVCache,
    TinyGPT,
    cached_reader,
    corpus_tools,
    forward_cached,
    generate,
    load_corpus,
    next_token_probs,
    sample_stories,
    split_corpus,
    story_loss,
    uncached_reader,
)


def random_model(vocab_size=9, max_len=8, n_layers=2, seed=0, **options):
    """A model with weights so large that it prefers some tokens clearly."""
    torch.manual_seed(seed)
    model = TinyGPT(vocab_size, 16, 4, n_layers, max_len, **options).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * 0.35 + (weight.ndim == 1))
    return model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


logits_rows = st.integers(2, 12).flatmap(lambda V: st.lists(
    st.lists(st.floats(-20, 20, width=32), min_size=V, max_size=V), min_size=1, max_size=3))
temperatures = st.floats(0.5, 5)

# ---------------------------------------------------------------- next_token_probs


@settings(deadline=None, max_examples=60)
@given(logits_rows, temperatures)
def test_temperature_divides_the_logits(rows, temperature):
    logits = torch.tensor(rows)
    before = logits.clone()
    probs = next_token_probs(logits, temperature)
    torch.testing.assert_close(probs, (logits.double() / temperature).softmax(-1).float())
    assert torch.equal(logits, before)


@settings(deadline=None, max_examples=60)
@given(logits_rows)
def test_temperature_0_is_greedy_and_a_tiny_one_comes_close(rows):
    logits = torch.tensor(rows)
    best = next_token_probs(logits, 0)
    assert torch.equal(best.argmax(-1), logits.argmax(-1))
    assert torch.equal(best.sum(-1), torch.ones(len(rows))) and (best.max(-1).values == 1).all()
    for tiny in (1e-30, 1e-44, 1e-300):  # float32 ends at 1e-45
        probs = next_token_probs(logits, tiny)
        assert probs.isfinite().all()
        torch.testing.assert_close(probs.sum(-1), torch.ones(len(rows)))
        assert (probs[logits < logits.amax(-1, keepdim=True) - 1e-6] == 0).all()


@settings(deadline=None, max_examples=100)
@given(logits_rows, temperatures, st.floats(0.01, 1))
def test_top_p_keeps_the_fewest_that_reach_p(rows, temperature, p):
    logits = torch.tensor(rows)
    full, kept = next_token_probs(logits, temperature), next_token_probs(logits, temperature,
                                                                         top_p=p)
    torch.testing.assert_close(kept.sum(-1), torch.ones(len(rows)))
    for before, after in zip(full.double(), kept.double()):
        stays = after > 0
        assert stays.any() and after[before.argmax()] > 0
        if not stays.all():
            assert before[stays].min() >= before[~stays].max()  # the most likely ones
            assert before[stays].sum() >= p - 1e-5  # they reach p, the crossing one included
        assert p == 1 or before[stays].sum() - before[stays].min() < p + 1e-5  # fewer would not
        expected = torch.where(stays, before, 0.0) / before[stays].sum()
        torch.testing.assert_close(after, expected, atol=1e-6, rtol=1e-4)


@settings(deadline=None, max_examples=60)
@given(logits_rows, temperatures, st.integers(1, 20))
def test_top_k_keeps_the_k_likeliest(rows, temperature, k):
    logits = torch.tensor(rows)
    full, kept = next_token_probs(logits, temperature), next_token_probs(logits, temperature, k)
    torch.testing.assert_close(kept.sum(-1), torch.ones(len(rows)))
    for before, after in zip(full, kept):
        stays = after > 0
        assert stays.sum() == min(k, len(before))  # k beyond V: all
        assert stays.all() or before[stays].min() >= before[~stays].max()
        torch.testing.assert_close(after[stays], before[stays] / before[stays].sum())


@pytest.mark.parametrize("p", [1e-9, 1e-45, 5e-324])
def test_the_likeliest_token_always_stays(p):
    probs = next_token_probs(torch.tensor([[0.1, 0.5, 0.4]]).log(), top_p=p)
    assert probs.tolist() == [[0, 1, 0]]


def test_top_p_and_top_k_by_hand():
    logits = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()
    for p, expected in [(0.4, [0, 1, 0, 0]), (0.6, [0, 2 / 3, 0, 1 / 3]), (0.8, [0, 5, 1.5, 2.5]),
                        (0.95, [1, 5, 1.5, 2.5]), (1.0, [1, 5, 1.5, 2.5])]:
        expected = torch.tensor([expected]).float()
        probs = next_token_probs(logits, top_p=p)
        torch.testing.assert_close(probs, expected / expected.sum())
    # top_k first, then top_p among what is left: 2/3 and 1/3
    torch.testing.assert_close(next_token_probs(logits, 1.0, 2, 0.65),
                               torch.tensor([[0, 1.0, 0, 0]]))
    assert (next_token_probs(logits, 0, 3, 0.9) == torch.tensor([[0, 1.0, 0, 0]])).all()


@settings(deadline=None, max_examples=40)
@given(logits_rows, temperatures, st.integers(1, 20), st.floats(0.01, 1))
def test_the_likelier_stays_the_likelier(rows, temperature, k, p):
    logits = torch.tensor(rows)
    probs = next_token_probs(logits, temperature, k, p)
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(rows)))
    for row, kept in zip(logits, probs):
        order = row.argsort(stable=True)
        stays = [i for i in order.tolist() if kept[i] > 0]
        assert all(kept[a] <= kept[b] for a, b in zip(stays, stays[1:]))


BAD = [
    ({"temperature": -0.1}, "temperature is -0.1"), ({"temperature": math.nan}, "temperature is"),
    ({"temperature": math.inf}, "temperature is inf"), ({"temperature": -math.inf}, "-inf"),
    ({"top_k": 0}, "top_k is 0"), ({"top_k": -3}, "top_k is -3"), ({"top_p": 0}, "top_p is 0"),
    ({"top_p": 0.0}, "top_p is 0.0"), ({"top_p": -1}, "top_p is -1"),
    ({"top_p": 1.01}, "top_p is 1.01"), ({"top_p": math.nan}, "top_p is nan"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), BAD)
def test_a_value_out_of_range_is_named(options, words):
    with pytest.raises(ValueError, match=words):
        next_token_probs(torch.zeros(1, 3), **options)
    model = random_model().train()
    with pytest.raises(ValueError, match=words):
        generate(model, torch.zeros(1, 2).long(), 3, **options)
    assert model.training


# ---------------------------------------------------------------- generate


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("T", [1, 5, 8, 20])
def test_a_text_grows_past_the_models_window(T, use_cache):
    model, prompt = random_model(), torch.randint(9, (3, T), generator=seeded(T))
    before = prompt.clone()
    out = generate(model, prompt, 15, generator=seeded(), use_cache=use_cache)
    assert out.shape == (3, T + 15) and out.dtype == torch.int64
    assert torch.equal(out[:, :T], before) and torch.equal(prompt, before)
    assert out.min() >= 0 and out.max() < 9 and len(out.unique()) > 2
    out[0, 0] = 8 - out[0, 0]
    assert torch.equal(prompt, before)  # a copy, not a view


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 14), st.integers(1, 14), st.integers(0, 99))
def test_with_and_without_the_cache_the_text_is_the_one_that_forward_gives(B, T, new, seed):
    model = random_model(seed=seed % 5)
    prompt = torch.randint(9, (B, T), generator=seeded(seed))
    greedy = [generate(model, prompt, new, 0, use_cache=use) for use in (True, False)]
    assert torch.equal(*greedy)
    for t in range(T, T + new):  # by hand: the last max_len tokens, the last position, the largest
        last = model(greedy[0][:, max(0, t - 8) : t])[:, -1]
        assert torch.equal(last.argmax(-1), greedy[0][:, t])


@pytest.mark.parametrize("new", [0, 1])
def test_as_many_tokens_as_asked_for(new):
    prompt = torch.tensor([[1, 2]])
    out = generate(random_model(), prompt, new)
    assert out.shape == (1, 2 + new) and out[0, :2].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("idx", "new", "words"),
    [(torch.zeros(1, 0).long(), 3, r"\(1, 0\).*at least 1 token"),
     (torch.zeros(3).long(), 3, r"\(3,\)"), (torch.zeros(1, 2).long(), -1, "max_new_tokens -1"),
     (torch.tensor([[1, 9]]), 3, "id 9 is outside the vocabulary of 9"),
     (torch.tensor([[1.7, 2.2]]), 3, "ids")],
)
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


def test_no_gradients_are_kept():
    assert not generate(random_model(), torch.tensor([[1]]), 3).requires_grad
    assert torch.is_grad_enabled()


def test_a_seed_gives_the_same_text_and_leaves_the_global_state():
    model, prompt = random_model(), torch.tensor([[1, 2], [3, 4]])
    state = torch.get_rng_state()
    one, again, other = (generate(model, prompt, 20, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, again) and not torch.equal(one, other)
    torch.manual_seed(5)
    one = generate(model, prompt, 20)
    assert not torch.equal(generate(model, prompt, 20), one)
    torch.manual_seed(5)
    assert torch.equal(generate(model, prompt, 20), one)


def test_tokens_come_as_often_as_their_probabilities_say():
    model, n = random_model(seed=4), 20_000
    prompt = torch.tensor([[1, 5, 2]])
    for options in ({}, {"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.8}):
        probs = next_token_probs(model(prompt)[:, -1], **options)[0].double()
        out = generate(model, prompt.expand(n, 3), 1, generator=seeded(1), **options)
        counts = torch.bincount(out[:, -1], minlength=9).double()
        allowed = probs > 0
        assert counts[~allowed].sum() == 0
        expected = n * probs[allowed]
        chi_square = ((counts[allowed] - expected) ** 2 / expected).sum().item()
        freedom = allowed.sum().item() - 1
        assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 4, (options, chi_square)


def test_a_row_that_has_stopped_is_filled_up():
    model = random_model(vocab_size=4)
    prompt = torch.randint(4, (40, 3), generator=seeded())
    free = generate(model, prompt, 12, generator=seeded(3))
    out = generate(model, prompt, 12, generator=seeded(3), stop_id=2)
    stopped = 0
    for row, other in zip(out[:, 3:].tolist(), free[:, 3:].tolist()):
        n = row.index(2) if 2 in row else len(row)
        stopped += 2 in row
        assert row[n:] == [2] * (len(row) - n)
        assert row[:n] == other[:n]  # until then as without
    assert 5 < stopped < 40
    assert 2 in prompt  # a stop in the prompt stops nothing


def test_when_all_rows_have_stopped_no_more_is_read():
    model, reads = random_model(), []
    model.norm.register_forward_hook(lambda *args: reads.append(1))
    stop = generate(model, torch.tensor([[1]]), 1, 0)[0, 1].item()
    reads.clear()
    out = generate(model, torch.tensor([[1]]), 100, 0, stop_id=stop)
    assert out.tolist() == [[1] + [stop] * 100] and len(reads) == 1


# ---------------------------------------------------------------- the cache


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 3), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 99))
def test_chunks_give_the_numbers_of_one_forward(B, chunks, seed):
    model = random_model(max_len=sum(chunks) + seed % 3, seed=seed % 5)
    idx = torch.randint(9, (B, sum(chunks)), generator=seeded(seed))
    cache, parts = KVCache(model, B), []
    with torch.no_grad():
        for chunk in idx.split(chunks, dim=1):
            parts.append(forward_cached(model, chunk, cache))
            assert cache.length == sum(part.size(1) for part in parts)
        torch.testing.assert_close(torch.cat(parts, 1), model(idx), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("B", [1, 3])
def test_both_readers_read_the_same(B):
    model, text = random_model(), torch.randint(9, (B, 25), generator=seeded())
    with torch.no_grad():
        for first in (1, 4, 8, 9):
            cached, uncached = cached_reader(model), uncached_reader(model)
            for t in range(first, 26):  # 8 is max_len
                logits = cached(text[:, :t])
                assert logits.shape == (B, 9)
                torch.testing.assert_close(logits, uncached(text[:, :t]), atol=1e-5, rtol=1e-5)


def test_the_cache_reads_each_token_once():
    model, lengths = random_model(), []
    model.norm.register_forward_hook(lambda module, args, out: lengths.append(out[..., 0].numel()))
    generate(model, torch.tensor([[1, 2, 3]]), 9, use_cache=True)
    assert lengths == [3, 1, 1, 1, 1, 1, 8, 8, 8]  # past max_len the whole window
    lengths.clear()
    generate(model, torch.tensor([[1, 2, 3]]), 9, use_cache=False)
    assert lengths == [3, 4, 5, 6, 7, 8, 8, 8, 8]


@pytest.mark.parametrize("sizes", [(2, 3, 8), (1, 1, 5)])
def test_the_bytes_of_a_cache(sizes):
    n_layers, B, max_len = sizes
    cache = KVCache(random_model(n_layers=n_layers, max_len=max_len), B)
    assert cache.k.shape == cache.v.shape == (n_layers, B, 4, max_len, 4) and cache.length == 0
    size = cache.k.nbytes + cache.v.nbytes
    assert size == 2 * n_layers * B * max_len * 16 * 4


@pytest.mark.parametrize("idx", [torch.zeros(1, 4).long(), torch.zeros(1, 0).long(),
                                 torch.tensor([[9]]), torch.zeros(1, 1)])
def test_what_the_cache_cannot_take(idx):
    model = random_model()
    cache = KVCache(model, 1)
    forward_cached(model, torch.zeros(1, 5).long(), cache)
    with pytest.raises(ValueError):
        forward_cached(model, idx, cache)
    assert cache.length == 5


# ---------------------------------------------------------------- stories

STORIES = "A cat.\nThe big dog ran far away.\nI\n\nA cat sat.\n"


def story_model(max_len, training=False):
    tok = CharTokenizer(STORIES)
    return random_model(tok.vocab_size, max_len, dropout=0.5).train(training), tok


@pytest.mark.parametrize("max_len", [40, 27, 10, 1])
@pytest.mark.parametrize("batch_size", [64, 2])
def test_the_loss_of_stories_by_hand(max_len, batch_size):
    model, tok = story_model(max_len, training=True)
    loss = story_loss(model, tok, STORIES, batch_size)
    assert model.training
    model.eval()
    total, count = 0.0, 0
    for story in STORIES.splitlines():
        ids = torch.tensor([tok.encode("\n" + story + "\n")])[:, : max_len + 1]
        with torch.no_grad():
            log_probs = model(ids[:, :-1])[0].log_softmax(-1)
        for t, target in enumerate(ids[0, 1:].tolist()):
            total, count = total - log_probs[t, target].item(), count + 1
    assert count == sum(min(len(s) + 1, max_len) for s in STORIES.splitlines())
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_no_untrained_model_is_below_the_floor():
    train_text, val_text = split_corpus(load_corpus(), by_line=True)
    few = "".join(val_text.splitlines(keepends=True)[:30])
    tok = CharTokenizer(train_text)
    torch.manual_seed(0)
    loss = story_loss(TinyGPT(tok.vocab_size, 16, 2, 1, 256), tok, few)
    assert loss == pytest.approx(math.log(tok.vocab_size), rel=0.03)
    assert 0.1 < corpus_tools().floor(few) < 0.5 < loss


def test_stories_begin_with_the_prompt_and_end_at_a_line_end():
    model, tok = story_model(12)
    stories = sample_stories(model, tok, 30, "A c", temperature=1.5, seed=1, max_chars=40)
    assert len(stories) == 30 and len(set(stories)) > 10
    assert all(s.startswith("A c") and "\n" not in s and len(s) <= 43 for s in stories)
    assert min(map(len, stories)) < 43  # some have ended
    assert stories == sample_stories(model, tok, 30, "A c", 1.5, seed=1, max_chars=40)
    assert stories != sample_stories(model, tok, 30, "A c", 1.5, seed=2, max_chars=40)


def test_a_report_names_loss_floor_and_skills(capsys, monkeypatch):
    text = load_corpus()
    tok, lines = CharTokenizer(text), text.splitlines(keepends=True)[:250]
    monkeypatch.setattr(helpers, "sample_stories", lambda model, tok, n, *args, **options:
                        [line.strip() for line in lines[:n]])
    helpers.report(random_model(tok.vocab_size, 16), tok, "".join(lines[:20]))
    out = capsys.readouterr().out
    assert f"{corpus_tools().floor(''.join(lines[:20])):.3f}" in out
    assert out.count("100% ") == 4  # the corpus itself makes no mistake


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
    names = vars(helpers) | {"text": text, "prompt": text[:5], "device": helpers.pick_device("cpu")}
    exec(SCRIPT, names)
    written = capsys.readouterr().out.removesuffix("\n")
    assert written.startswith(text[:5]) and len(written) == 205
    assert names["out"].shape == (1, 205) and set(written) <= set(text)
    assert 1.0 < names["loss"] < math.log(len(set(text)))  # it has begun to learn
