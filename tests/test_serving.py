"""Page 08: the pages' memory, texts side by side in one forward, and the engine, which must write
what `generate` writes, whoever else is served."""

import collections
import functools
import gc
import math
import random
import weakref

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import tinygpt_helpers
from tinygpt_helpers import Engine, KVCache, PagedBatch, PagePool, TinyGPT, generate

V, MAX_LEN = 11, 24


def new_model(**sizes):
    """A model in float64, where the shape of a batch cannot tip a choice, with large weights.
    Two layers: in the first, keys and values do not yet depend on the tokens before."""
    torch.manual_seed(0)
    model = TinyGPT(V, 8, 2, 2, MAX_LEN, **sizes).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3 if weight.ndim == 2 else 1)
    return model


tiny = functools.cache(new_model)


def naive(model, prompt, n, sampling=(0,), seed=0):
    """What the naive loop writes for this request."""
    return generate(model, torch.tensor([prompt]), n, *sampling, use_cache=False,
                    generator=torch.Generator().manual_seed(seed))[0, len(prompt) :].tolist()


alone = functools.cache(functools.partial(naive, tiny()))


def some_ids(n, seed=0):
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@functools.cache
def last_page(prefix, size, model):
    """Keys and values of the last `size` tokens of a text, as a pool's page holds them."""
    cache = KVCache(model, 1)
    with torch.no_grad(), tinygpt_helpers.eval_mode(model):
        model(torch.tensor([prefix]), cache)
    both = torch.stack([torch.stack(cache.k), torch.stack(cache.v)])[:, :, 0]
    both = both[..., len(prefix) - size : len(prefix), :]
    return both.permute(1, 3, 0, 2, 4)  # (n_layers, size, 2, n_heads, d_head)


def check_books(engine):
    """Each page is counted as often as it is used; free ones are free; what is known is true."""
    pool, running, queue, size = engine.pool, engine.running, engine.queue, engine.pool.page_size
    used = [page for r in running for page in r.pages]
    assert pool.ref_count == [used.count(page) for page in range(len(pool.ref_count))]
    assert set(pool.free) == {page for page, n in enumerate(pool.ref_count) if n == 0}
    assert not any(r.pages or r.n_read for r in queue) and not tiny().training
    assert len(running) <= engine.max_batch and not set(running) & set(queue)
    assert sorted(r.id for r in running) == [r.id for r in running]  # by age
    for r in running:
        assert r.n_read < len(r.idx) and len(set(r.pages)) == len(r.pages) >= r.n_read / size
        for i, page in enumerate(r.pages):
            held = tuple(r.idx[: (i + 1) * size]) if (i + 1) * size <= r.n_read else None
            assert pool.prefix.get(page, held) == held, "known under a false name, or not full yet"
            assert pool.ref_count[page] == 1 or held, "others use a page that will be written to"
    assert pool.known == {prefix: page for page, prefix in pool.prefix.items()}
    for prefix, page in pool.known.items():  # by reading the text anew
        assert prefix and len(prefix) % size == 0
        torch.testing.assert_close(pool.kv[:, page], last_page(prefix, size, tiny()))
    stats = engine.stats
    assert stats["free pages"] + stats["used pages"] == len(pool.ref_count)
    assert stats["queued"] == len(queue) and stats["running"] == len(running)
    assert 0 <= stats["unused slots"] <= stats["used pages"] * size


def submit(engine, requests):
    """Submit [(prompt, new tokens, sampling, seed)]; return {id: what it must write}."""
    return {engine.submit(prompt, n, *sampling, seed=seed): alone(prompt, n, sampling, seed)
            for prompt, n, sampling, seed in requests}


# ---------------------------------------------------------------- texts side by side, in pages

CROWD = [(i % 21, n) for i, n in enumerate(
    15 * [1] + 2 * [4] + 16 * [1] + 17 * [2] + 17 * [1] + 2 * [3] + 33 * [1])]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 7), st.lists(st.tuples(st.integers(0, 20), st.integers(1, 4)), min_size=1,
                                   max_size=5), st.randoms(use_true_random=False))
@example(3, CROWD, random.Random(0))
@torch.no_grad()
def test_pieces_from_pages_in_any_order_give_the_logits_of_whole_texts(size, pieces, dice):
    """Pieces (start, n) of as many texts in one forward; they do not see each other."""
    model, per_text = tiny(), math.ceil(MAX_LEN / size)
    pool = PagePool(model, per_text * len(pieces) + 1, size)
    pool.kv.normal_()  # what earlier requests left behind
    order = dice.sample(range(len(pool.ref_count)), per_text * len(pieces))
    texts, batch, idx = [], [], []
    for i, (start, n) in enumerate(pieces):
        texts.append(torch.tensor([some_ids(start + n, i)]))
        pages = order[i * per_text : i * per_text + math.ceil((start + n) / size)]
        if start:
            model(texts[i][:, :start], PagedBatch(pool, [(0, start, pages)]))
        batch.append((start, n, pages))
        idx.append(texts[i][:, start:])
    before = pool.kv.clone()
    logits = model(torch.cat(idx, 1), PagedBatch(pool, batch))[0]
    for text, (_, n), got in zip(texts, pieces, logits.split([n for _, n in pieces])):
        torch.testing.assert_close(got, model(text)[0, -n:])
    changed = (pool.kv != before).flatten(3).any(-1).any(0)  # (n_pages, page_size)
    assert changed.sum() == sum(n for _, n in pieces), "only the new tokens' slots are written"


def test_the_page_that_was_free_the_longest_is_lent_first_and_forgotten():
    pool = PagePool(tiny(), 3, 2)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2] and not pool.free
    pool.remember(0, [1, 2]), pool.remember(1, [1, 2, 3, 4])
    assert pool.share(0) == 0 and pool.ref_count == [2, 1, 1]
    pool.release([0, 1])  # the last page of a text first: its beginning stays known the longest
    assert list(pool.free) == [1] and pool.match_prefix([1, 2, 3, 4]) == [0, 1]
    assert pool.allocate() == 1 and pool.match_prefix([1, 2, 3, 4]) == [0]
    pool.release([0]), pool.release([2, 1])
    assert pool.share(0) == 0 and list(pool.free) == [1, 2]  # found by its text: free no more
    assert [pool.allocate(), pool.allocate()] == [1, 2] and pool.known == {(1, 2): 0}


def test_match_prefix_wants_whole_pages_of_the_same_text():
    pool, text = PagePool(tiny(), 6, 3), [1, 2, 3, 4, 5, 6, 7, 8, 9]
    pool.remember(4, text[:3]), pool.remember(2, text[:6]), pool.remember(5, [9, 9, 9, 4, 5, 6])
    pool.remember(0, text[:6])  # read twice: the first stays
    for n, pages in ((0, []), (2, []), (3, [4]), (5, [4]), (6, [4, 2]), (9, [4, 2])):
        assert pool.match_prefix(text[:n]) == pages
    assert pool.match_prefix([1, 2, 3, 4, 5, 7]) == [4]
    assert pool.match_prefix([4, 5, 6]) == pool.match_prefix([9, 9, 9, 4, 5, 6]) == []


# ---------------------------------------------------------------- engine = generate


def mixed_requests():
    """[(prompt, new tokens, sampling, seed)], every second one with a common beginning."""
    dice, base, requests = random.Random(0), some_ids(9, 99), [((5,), MAX_LEN, (0,), 0)]
    for i in range(1, 14):
        prompt = (base if i % 2 else []) + some_ids(dice.randint(1, 6), i)
        sampling = dice.choice([(0,), (1.0,), (0.7, 5), (1.3, None, 0.9)])
        requests.append((tuple(prompt), dice.randint(1, MAX_LEN - len(prompt) + 1), sampling, i))
    return requests


@pytest.mark.parametrize(("times", "options"), [
    (1, dict()), (1, dict(max_batch=1)), (1, dict(max_batch=20, n_pages=200)),
    (1, dict(chunk_size=1)), (1, dict(chunk_size=3, page_size=5, n_pages=12)),
    (1, dict(page_size=1, n_pages=30)), (1, dict(page_size=4, n_pages=7)),
    (1, dict(page_size=4, n_pages=7, sharing=False)), (1, dict(page_size=MAX_LEN, n_pages=1)),
    (13, dict(page_size=3, n_pages=8))])
def test_every_request_gets_what_generate_writes_in_order_as_a_stream(times, options):
    engine, requests = Engine(tiny(), **options), times * mixed_requests()
    wanted, got, kept = {}, {}, []
    while requests or engine.queue or engine.running:
        if requests:
            wanted |= submit(engine, [requests.pop(0)])
            kept.append(weakref.ref(engine.queue[-1]))
        written = engine.step()
        check_books(engine)
        assert len(dict(written)) == len(written)  # one token a step for each
        for number, token in written:
            got.setdefault(number, []).append(token)
    assert got == wanted and not any(engine.pool.ref_count)
    gc.collect()
    assert engine.counts["done"] == times * 14 and not any(request() for request in kept)
    assert times == 1 or engine.counts["preempted"] > 9 and engine.counts["tokens shared"] > 1000


def test_a_text_ends_with_its_stop_id_and_differs_without_a_seed():
    engine, free, prompt = Engine(tiny()), alone((1, 2, 3), 20, (1.5,), 1), [1, 2, 3]
    for stop_ids in ([free[7]], {free[7], free[0]}, ()):
        engine.submit(prompt, 20, 1.5, seed=1, stop_ids=stop_ids)
    engine.submit(torch.tensor(prompt), 20, 1.5, seed=1)
    for _ in range(2):
        engine.submit(prompt, 20, 1.5)
    prompt.append(4)  # the engine has a copy
    *seeded, one, two = engine.run().values()
    assert seeded == [free[: free.index(free[7]) + 1], free[:1], free, free] and one != two


def test_weights_that_change_in_place_leave_no_stale_pages_and_the_mode_is_left_alone():
    model, prompt = new_model(dropout=0.5).train(), some_ids(12)
    engine = Engine(model, page_size=4)

    def check():
        number, text = engine.submit(prompt, 9, 0), naive(model, prompt, 9)
        assert engine.run()[number] == text and all(part.training for part in model.modules())
        for prefix, page in engine.pool.known.items():
            torch.testing.assert_close(engine.pool.kv[:, page],
                                       last_page.__wrapped__(prefix, 4, model))
        known = engine.pool.known
        assert known == {prefix: page for page, prefix in engine.pool.prefix.items()}
        return text

    whole = check()  # its pages are known now
    with tinygpt_helpers.ablate(model, [(0, 0), (1, 1)]):
        assert check() != whole
    assert check() == whole
    engine.submit(some_ids(5, 1), 9, 0)
    half_written = engine.queue[0]
    for _ in range(4):
        engine.step()
    model(torch.tensor([prompt])).logsumexp(-1).sum().backward()
    tinygpt_helpers.make_optimizer(model, lr=0.3).step()
    assert check() != whole
    assert half_written.state == "done" and len(half_written.idx) == 5 + 9


def test_a_step_is_one_forward_and_one_that_is_done_costs_nothing():
    model, read = new_model(), []
    model.register_forward_pre_hook(lambda model, args: read.append(args[0].size(1)))
    engine = Engine(model, chunk_size=4, sharing=False)
    for n_prompt, n in ((1, 1), (2, 3), (3, 9)):
        engine.submit(some_ids(n_prompt), n, 0)
    assert collections.Counter(number for number, _ in engine.stream()) == {1: 1, 2: 3, 3: 9}
    assert read == [1 + 2 + 2, 2, 2] + 7 * [1]
    assert engine.counts["tokens read"] == sum(read) and engine.counts["steps"] == len(read)


def test_prompts_share_the_budget_of_a_step_and_those_who_write_do_not_wait():
    engine, known = Engine(tiny(), page_size=4, chunk_size=6), some_ids(9, 5)
    engine.submit(known, 1, 0)
    engine.run()
    for seed, n in enumerate((4, 4, 16)):
        engine.submit(some_ids(n, seed), 2, 0)
    engine.submit(known, 5, 0)  # all but its last token is known: it writes at once
    for writing, n_read in [({2, 5}, [4, 2, 0, 9]), ({2, 3, 5}, [4, 4, 10]),
                            ({3, 5}, [10, 11]), ({4, 5}, [16, 12])]:
        assert dict(engine.step()).keys() == writing
        assert [r.n_read for r in engine.running] == n_read


def test_nobody_is_let_in_before_there_are_pages_for_the_whole_prompt():
    engine, known = Engine(tiny(), page_size=4, n_pages=5), some_ids(9)
    engine.submit(known, 1, 0)
    engine.run()
    engine.submit([V - 1 - known[0]], 4, 0)  # takes one page of five; two others are known
    engine.step()
    engine.submit(known[:8] + some_ids(6, 5), 1, 0)  # finds two, needs two more, but one is left
    engine.submit([1], 1, 0)  # would fit, but must not pass
    engine.step()
    assert len(engine.queue) == 2
    assert len(engine.run()) == 3 and engine.counts["tokens shared"] == 8
    assert not engine.counts["preempted"]


@pytest.mark.parametrize("chunk_size", [4, 64])
@pytest.mark.parametrize("n_prompt", [3, 9])
def test_the_youngest_stands_back_and_is_not_let_in_to_be_thrown_out_at_once(chunk_size, n_prompt):
    engine = Engine(tiny(), max_batch=4, page_size=2, n_pages=16, chunk_size=chunk_size,
                    sharing=False)
    submit(engine, [(tuple(some_ids(n_prompt, seed)), 15, (0,), 0) for seed in range(8)])
    let_in, first, requests = {}, [], list(engine.queue)
    while engine.queue or engine.running:
        before, n_out = list(engine.running), engine.counts["preempted"]
        engine.step()
        steps, out = engine.counts["steps"], [r for r in before if r.state == "preempted"]
        assert not before or before[0] not in out, "the oldest never stands back"
        assert len(out) == engine.counts["preempted"] - n_out, "one came in and went at once"
        assert all(steps - let_in[r] > 1 for r in out)
        let_in |= {r: steps for r in engine.running if r not in before}
        first += [r for r in engine.running if r not in first]
    assert engine.counts["preempted"] > 2 and first == requests


@pytest.mark.parametrize("sharing", [True, False])
def test_a_remembered_beginning_is_not_read_again_whoever_came_between(sharing):
    engine, a, b = Engine(tiny(), page_size=4, sharing=sharing), some_ids(13), some_ids(13, 1)
    b[0] = a[0]  # as every story begins with a newline
    for prompt, shared in ((a, 0), (b, 0), (a, 12), (b, 12), (a + [1, 2], 12), (a[:12], 8)):
        before, shared = engine.stats, shared * sharing
        number = engine.submit(prompt, 1, 0)
        assert engine.run() == {number: alone(tuple(prompt), 1)}
        assert engine.counts["tokens shared"] - before["tokens shared"] == shared
        assert engine.counts["tokens read"] - before["tokens read"] == len(prompt) - shared
        check_books(engine)


def test_counters_begin_at_zero_and_unused_slots_are_counted():
    engine, unused = Engine(tiny(), page_size=4, n_pages=5), []
    assert engine.stats["free pages"] == sum(engine.stats.values()) == 5
    for _ in range(2):
        engine.submit(some_ids(6), 5, 0)
        engine.step()
        unused.append(engine.stats["unused slots"])
    # 6 tokens in 2 pages; then 7, and the second text's 6, whose first page is shared
    assert unused == [2, 1 + 2] and engine.stats["used pages"] == 3


@pytest.mark.parametrize("state", ["queued", "prefill", "decode", "preempted"])
def test_cancel_in_each_state(state):
    engine = Engine(tiny(), page_size=4, n_pages=6, chunk_size=4, sharing=False)
    wanted = submit(engine, [(tuple(some_ids(7, seed)), 17, (0,), 0) for seed in range(2)])
    request = engine.queue[1]
    while request.state != state:
        engine.step()
    written = engine.cancel(request.id)
    assert bool(written) == (state in ("decode", "preempted"))
    assert written == wanted.pop(request.id)[: len(written)]
    check_books(engine)
    assert request.state == "cancelled" and engine.counts["cancelled"] == 1
    for number in (request.id, 99, None):
        with pytest.raises(ValueError, match=f"request {number} neither waits nor runs"):
            engine.cancel(number)
    assert engine.run() == wanted and not any(engine.pool.ref_count)


@pytest.mark.parametrize("name", ["max_batch", "page_size", "n_pages", "chunk_size", "max_queue"])
def test_an_engine_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0.*each must be at least 1"):
        Engine(tiny(), **{name: 0})


@pytest.mark.parametrize(("name", "value", "kind", "message"), [
    ("prompt_ids", "12", TypeError, "integer"), ("prompt_ids", [1, 2.5], TypeError, "integer"),
    ("prompt_ids", torch.ones(2), TypeError, "int"), ("max_new_tokens", 2.5, TypeError, "int"),
    ("prompt_ids", [], ValueError, "T > 0"), ("top_p", 0, ValueError, "top_p is 0"),
    ("prompt_ids", [1] * (MAX_LEN + 1), ValueError, f"prompt of {MAX_LEN + 1} leaves room for 0"),
    ("prompt_ids", [1, V], ValueError, f"ids 1 to {V} do not fit .* 0..{V - 1}"),
    ("max_new_tokens", 0, ValueError, "max_new_tokens is 0: .*1 or more"),
    ("max_new_tokens", 16, ValueError, "is 16: .*prompt of 2 leaves room for 15"),
    ("prompt_ids", [-1], ValueError, "ids -1 to -1"),
    ("temperature", -1, ValueError, "temperature is -1"),
    ("stop_ids", "\n", (TypeError, ValueError), "int"), ("stop_ids", 3, TypeError, "iterable"),
    ("seed", "x", (TypeError, RuntimeError), "manual_seed|int")])
def test_what_is_refused_leaves_the_others_alone(name, value, kind, message):
    engine = Engine(tiny(), page_size=4, n_pages=4, max_queue=1)
    wanted = submit(engine, [((1, 2, 3), 8, (0,), 0)])
    engine.step()
    with pytest.raises(kind, match=message):
        engine.submit(**(dict(prompt_ids=[1, 2], max_new_tokens=3) | {name: value}))
    assert not engine.queue
    check_books(engine)
    wanted |= submit(engine, [((4, 5), 15, (0,), 0)])  # as much as there is room for
    with pytest.raises(RuntimeError, match="the queue is full: 1 requests wait"):
        engine.submit([3], 3, 0)
    assert engine.run() == wanted and list(wanted) == [1, 2]


# ---------------------------------------------------------------- any order of events


class AnyOrder(RuleBasedStateMachine):
    """Submit, step and cancel in any order, with few pages: no page is lost, all texts right."""

    def __init__(self):
        super().__init__()
        self.engine = Engine(tiny(), max_batch=4, page_size=3, n_pages=8, chunk_size=5)
        self.wanted, self.got = {}, {}

    @rule(shared=st.integers(0, 10), own=st.integers(1, 4), seed=st.integers(0, 2),
          changed=st.integers(0, 9), n=st.integers(1, 10),
          sampling=st.sampled_from([(0,), (1.0,), (1.5, 4)]))
    def submit(self, shared, own, seed, changed, n, sampling):
        common = some_ids(10, 77)
        common[changed] = seed  # alike before it and after it, but for one token
        prompt = tuple(common[:shared] + some_ids(own, seed))
        new = submit(self.engine, [(prompt, n, sampling, seed)])
        self.wanted |= new
        self.got |= {number: [] for number in new}

    @rule(n=st.integers(1, 4))
    def step(self, n):
        for _ in range(n):
            for number, token in self.engine.step():
                self.got[number].append(token)

    @precondition(lambda self: self.engine.queue or self.engine.running)
    @rule(which=st.integers(0, 20))
    def cancel(self, which):
        present = [*self.engine.running, *self.engine.queue]
        number = present[which % len(present)].id
        written = self.engine.cancel(number)
        assert written == self.got.pop(number)
        assert written == self.wanted.pop(number)[: len(written)]

    @invariant()
    def books_are_right(self):
        check_books(self.engine)

    def teardown(self):
        self.step(sum(map(len, self.wanted.values())) * 8 + 8)
        check_books(self.engine)
        assert self.got == self.wanted and len(self.engine.pool.free) == 8


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def test_pages_that_others_use_already_cost_a_newcomer_nothing():
    """Three pages of six are in use, two of them hold the newcomer's beginning: it needs one."""
    engine, prompt = Engine(tiny(), page_size=4, n_pages=6), some_ids(9)
    for _ in range(2):
        engine.submit(prompt, 5, temperature=0)
        engine.step()
    assert engine.stats["running"] == 2 and engine.stats["tokens shared"] == 8
