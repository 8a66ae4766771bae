"""Page 08: the pages' memory, the paged reader, and the engine, which must write what `generate`
writes, whoever else is served."""

import functools
import random
import types
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import tinygpt_helpers
from tinygpt_helpers import Engine, PagePool, TinyGPT, forward_paged, generate

V, MAX_LEN = 11, 24


@functools.cache
def tiny():
    """A model in float64, where the shape of a batch cannot tip a choice, with large weights.

    Two layers: in the first, keys and values do not yet depend on the tokens before.
    """
    torch.manual_seed(0)
    model = TinyGPT(V, 8, 2, 2, MAX_LEN).double().eval()
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.mul_(3)
    return model


@functools.cache
def alone(prompt, n, sampling=(0,), seed=0, stop=None):
    """What the naive loop writes for this request, as the engine counts it."""
    text = generate(tiny(), torch.tensor([prompt]), n, *sampling, stop_id=stop, use_cache=False,
                    generator=torch.Generator().manual_seed(seed))[0, len(prompt) :].tolist()
    return text[: text.index(stop) + 1] if stop in text else text


def some_ids(n, seed=0):
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_books(engine):
    """Each page is counted as often as it is used; free ones are free; what is known is true."""
    pool, running, queue = engine.pool, engine.running, engine.queue
    used = [page for r in running for page in r.pages]
    assert pool.users == [used.count(page) for page in range(len(pool.users))]
    assert set(pool.free) == {page for page, n in enumerate(pool.users) if n == 0}
    assert all(len(set(r.pages)) == len(r.pages) for r in running)
    assert not any(r.pages or r.n_read for r in queue)
    assert len(running) <= engine.max_batch and not set(running) & set(queue)
    assert sorted(r.id for r in running) == [r.id for r in running]  # by age
    for r in running:
        assert 0 <= r.n_read < len(r.text) and len(r.pages) * pool.page_size >= r.n_read
        for i, page in enumerate(r.pages):
            held = r.text[i * pool.page_size : min(r.n_read, (i + 1) * pool.page_size)]
            known = pool.known.get(page, (None, []))[1]
            assert all(a == b for a, b in zip(held, known)), "a page is known under a false name"
    for page, (before, _) in pool.known.items():
        assert page in pool.after[before] and (before is None or before in pool.known)
    assert sum(map(len, pool.after.values())) == len(pool.known)
    stats = engine.stats
    assert stats["free pages"] + stats["used pages"] == len(pool.users)
    assert stats["queued"] == len(queue) and stats["running"] == len(running)
    assert 0 <= stats["unused slots"] <= stats["used pages"] * pool.page_size


def check_memory(engine):
    """Each known page holds what reading its text anew would put there."""
    pool, model = engine.pool, engine.model
    for page, (before, tokens) in pool.known.items():
        n, text, place = len(tokens), list(tokens), before
        while place is not None:
            before, earlier = pool.known[place]
            assert len(earlier) == pool.page_size, "a page goes on from one that is not full"
            text, place = earlier + text, before
        table = torch.arange(-(-len(text) // pool.page_size))[None]
        fresh = PagePool(model, table.numel(), pool.page_size)
        forward_paged(model, torch.tensor([text]), torch.tensor([0]), table, fresh)
        torch.testing.assert_close(pool.kv[:, page, :n], fresh.kv[:, -1, :n])


# ---------------------------------------------------------------- the paged reader


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 7), st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(1, 4),
       st.randoms(use_true_random=False))
def test_pages_in_any_order_give_the_logits_of_one_piece(size, starts, T, dice):
    model = tiny()
    per_row = -(-MAX_LEN // size)
    pool = PagePool(model, per_row * len(starts) + 1, size)
    pool.kv.normal_()  # what earlier requests left behind
    order = dice.sample(range(len(pool.users)), per_row * len(starts))
    tables = torch.tensor(order).view(len(starts), per_row)
    texts = torch.tensor([some_ids(MAX_LEN, seed) for seed in range(len(starts))])
    for row, n in enumerate(starts):
        if n:
            forward_paged(model, texts[row : row + 1, :n], torch.tensor([0]),
                          tables[row : row + 1], pool)
    chunk = torch.stack([text[n : n + T] for text, n in zip(texts, starts)])
    got = forward_paged(model, chunk, torch.tensor(starts), tables, pool)
    for row, n in enumerate(starts):
        torch.testing.assert_close(got[row], model(texts[row : row + 1, : n + T])[0, n:])


@pytest.mark.parametrize("B", [15, 16, 17, 33])
def test_groups_of_rows_do_not_see_each_other(B):
    model, size = tiny(), 3
    per_row, dice = MAX_LEN // size, random.Random(B)
    pool = PagePool(model, per_row * B, size)
    pool.kv.normal_()  # what earlier requests left behind
    tables = torch.tensor(dice.sample(range(per_row * B), per_row * B)).view(B, per_row)
    starts = [dice.randint(0, MAX_LEN - 2) for _ in range(B)]  # not sorted: no group is alike
    texts = torch.tensor([some_ids(MAX_LEN, seed) for seed in range(B)])
    for row, n in enumerate(starts):
        if n:
            forward_paged(model, texts[row : row + 1, :n], torch.tensor([0]),
                          tables[row : row + 1], pool)
    chunk = torch.stack([text[n : n + 2] for text, n in zip(texts, starts)])
    got = forward_paged(model, chunk, torch.tensor(starts), tables, pool)
    for row, n in enumerate(starts):
        torch.testing.assert_close(got[row], model(texts[row : row + 1, : n + 2])[0, n:])


def test_the_pages_of_other_texts_are_left_alone():
    model, size = tiny(), 4
    pool = PagePool(model, 6, size)
    pool.kv.fill_(5.0)
    forward_paged(model, torch.tensor([some_ids(6)]), torch.tensor([0]), torch.tensor([[4, 1]]),
                  pool)
    untouched = torch.ones(6, size, dtype=torch.bool)
    untouched[4], untouched[1, :2] = False, False
    assert (pool.kv[:, untouched] == 5).all() and not (pool.kv[:, ~untouched] == 5).any()


# ---------------------------------------------------------------- the pool


def bare_pool(n_pages, page_size):
    weight = torch.zeros(1)
    return PagePool(types.SimpleNamespace(config={"n_layers": 1, "d_model": 1},
                                          head=types.SimpleNamespace(weight=weight), blocks=()),
                    n_pages, page_size)


def test_the_page_that_was_free_the_longest_is_lent_first():
    pool = bare_pool(3, 2)
    pages = [pool.take() for _ in range(3)]
    assert pages == [0, 1, 2] and not pool.free and pool.users == [1, 1, 1]
    pool.release([1, 0])  # the last page of a text first: its beginning stays known the longest
    pool.release([2])
    assert [pool.take() for _ in range(3)] == [0, 1, 2]


def test_find_wants_the_same_tokens_after_the_same_tokens():
    pool = bare_pool(6, 3)
    a, b, c, d = (pool.take() for _ in range(4))
    pool.remember(None, a, [1, 2, 3])
    pool.remember(a, b, [4, 5])
    pool.remember(a, c, [4, 6, 7])
    pool.remember(None, d, [4, 5])
    assert pool.find([]) == pool.find([9, 9]) == ([], 0)
    assert pool.find([1, 2]) == ([a], 2)
    assert pool.find([1, 2, 3]) == ([a], 3)
    assert pool.find([1, 2, 3, 4, 6, 7, 8]) == ([a, c], 6)
    assert pool.find([1, 2, 3, 4, 5, 9]) == ([a, b], 5)
    assert pool.find([4, 5, 6]) == ([d], 2)  # not b: it comes after 1, 2, 3
    pool.forget(a)
    assert pool.find([1, 2, 3, 4]) == ([], 0) and list(pool.known) == [d]
    pool.forget(a)  # nothing left to forget
    assert pool.find([4, 5]) == ([d], 2)


def test_a_very_long_text_is_forgotten_without_a_recursion():
    pool = bare_pool(5000, 1)
    for i in range(5000):
        pool.remember(i - 1 if i else None, pool.take(), [i])
    pool.forget(0)
    assert not pool.known and not any(pool.after.values())


# ---------------------------------------------------------------- engine = generate


def mixed_requests(n, seed=0):
    """[(prompt, new tokens, sampling, seed)], every second one with a common beginning."""
    dice, base = random.Random(seed), some_ids(9, 99)
    requests = []
    for i in range(n):
        prompt = (base if i % 2 else []) + some_ids(dice.randint(1, 6), 1000 * seed + i)
        sampling = dice.choice([(0,), (1.0,), (0.7, 5), (1.3, None, 0.9)])
        requests.append((tuple(prompt), dice.randint(1, MAX_LEN - len(prompt) + 1), sampling, i))
    return requests


@pytest.mark.parametrize("options", [
    dict(),
    dict(max_batch=1),
    dict(max_batch=20, n_pages=200),
    dict(chunk_size=1),
    dict(chunk_size=3, page_size=5, n_pages=12),
    dict(page_size=1, n_pages=30),
    dict(page_size=4, n_pages=7),
    dict(page_size=4, n_pages=7, sharing=False),
    dict(page_size=MAX_LEN, n_pages=1),
])
def test_every_request_gets_what_generate_writes(options):
    engine, wanted = Engine(tiny(), **options), {}
    for prompt, n, sampling, seed in mixed_requests(14):
        number = engine.submit(prompt, n, *sampling, seed=seed)
        wanted[number] = alone(prompt, n, sampling, seed)
        engine.step()
        check_books(engine)
    got = {}
    while engine.queue or engine.running:
        engine.step()
        check_books(engine)
    got = engine.run()  # nothing left to do: it hands over what ended
    assert got == wanted and engine.run() == {}
    assert engine.counts["done"] == 14 and not any(engine.pool.users)


def test_few_pages_share_copy_and_preempt():
    engine = Engine(tiny(), page_size=4, n_pages=9)
    for prompt, n, sampling, seed in mixed_requests(14):
        engine.submit(prompt, n, *sampling, seed=seed)
    engine.run()
    assert min(engine.counts[name] for name in ("preempted", "tokens shared", "pages copied")) > 0
    lonely = Engine(tiny(), page_size=4, n_pages=9, sharing=False)
    for prompt, n, sampling, seed in mixed_requests(14):
        lonely.submit(prompt, n, *sampling, seed=seed)
    lonely.run()
    assert lonely.counts["tokens shared"] == lonely.counts["pages copied"] == 0
    assert engine.counts["tokens read"] < lonely.counts["tokens read"]


def test_a_request_does_not_notice_its_neighbours():
    texts = []
    for n in (0, 1, 5):
        engine = Engine(tiny(), page_size=4, n_pages=20)
        for prompt, new, sampling, seed in mixed_requests(n, seed=3):
            engine.submit(prompt, new, *sampling, seed=seed)
        mine = engine.submit([1, 2, 3], 15, 1.2, seed=42)
        texts.append(engine.run()[mine])
    assert texts[0] == texts[1] == texts[2]


def test_without_a_seed_each_run_differs():
    engine = Engine(tiny())
    for _ in range(3):
        engine.submit([1, 2], 20, 2.0)
    assert len(set(map(tuple, engine.run().values()))) > 1


def test_a_text_ends_with_its_stop_id():
    prompt = (1, 2, 3)
    free = alone(prompt, 20, (1.5,), 1)
    stop = free[7]
    wanted = free[: free.index(stop) + 1]
    assert alone(prompt, 20, (1.5,), 1, stop) == wanted
    engine = Engine(tiny())
    number = engine.submit(prompt, 20, 1.5, seed=1, stop_ids=[stop])
    both = engine.submit(prompt, 20, 1.5, seed=1, stop_ids={stop, free[0]})
    other = engine.submit(prompt, 20, 1.5, seed=1)
    assert engine.run() == {number: wanted, both: free[:1], other: free}


def test_a_text_may_fill_the_window_and_all_pages():
    engine = Engine(tiny(), page_size=4, n_pages=MAX_LEN // 4)
    number = engine.submit([5], MAX_LEN)
    assert len(engine.run()[number]) == MAX_LEN
    engine = Engine(tiny(), page_size=4, n_pages=2)
    number = engine.submit([5], 8, 0)
    assert engine.run()[number] == alone((5,), 8)


# ---------------------------------------------------------------- the order of things


def test_tokens_stream_in_order_and_one_a_step():
    engine, wanted = Engine(tiny(), max_batch=3, chunk_size=5), {}
    for prompt, n, sampling, seed in mixed_requests(7):
        wanted[engine.submit(prompt, n, *sampling, seed=seed)] = alone(prompt, n, sampling, seed)
    streamed = {number: [] for number in wanted}
    while engine.queue or engine.running:
        written = engine.step()
        assert len({number for number, _ in written}) == len(written)
        for number, token in written:
            streamed[number].append(token)
    assert streamed == wanted
    number = engine.submit([1, 2], 4, 0)
    assert list(engine.stream()) == [(number, token) for token in alone((1, 2), 4)]


def test_a_long_prompt_does_not_hold_up_those_who_write():
    engine = Engine(tiny(), chunk_size=4)
    first = engine.submit([1, 2, 3], 12, 0)
    engine.step()
    engine.submit(some_ids(20), 3, 0)
    before, waited = engine.counts["tokens read"], 0
    while len(engine.running) < 2 or engine.running[1].state == "prefill":
        assert first in [number for number, _ in engine.step()]
        waited += 1
        assert engine.counts["tokens read"] - before <= 1 + 4
        before = engine.counts["tokens read"]
    assert waited == 20 // 4


def test_prompts_share_the_budget_of_a_step():
    engine = Engine(tiny(), chunk_size=6, sharing=False)
    for seed in range(3):
        engine.submit(some_ids(4, seed), 2, 0)
    engine.step()
    assert [r.n_read for r in engine.running] == [4, 2, 0]
    assert [r.state for r in engine.running] == ["decode", "prefill", "prefill"]


def test_writers_pay_nothing_from_the_budget():
    engine, known = Engine(tiny(), page_size=4, chunk_size=4), some_ids(7)
    engine.submit(known, 1, 0)
    engine.run()
    engine.submit(some_ids(20, 1), 3, 0)  # it takes all of the budget for five steps
    young = engine.submit(known, 5, 0)  # all but its last token is known: it writes at once
    assert [number for number, _ in engine.step()] == [young]


def test_nobody_is_let_in_before_there_are_pages_for_the_whole_prompt():
    engine = Engine(tiny(), page_size=4, n_pages=4, sharing=False)
    engine.submit(some_ids(9), 3, 0)
    engine.step()
    engine.submit(some_ids(5, 1), 2, 0)  # two pages, and one is free
    engine.submit([1], 1, 0)  # would fit, but must not pass
    waiting = list(engine.queue)
    engine.step()
    assert [r.state for r in waiting] == ["queued"] * 2 and not engine.counts["preempted"]
    assert len(engine.run()) == 3 and not engine.counts["preempted"]


def test_pages_that_are_found_are_not_counted_as_free_a_second_time():
    engine, known = Engine(tiny(), page_size=4, n_pages=4), some_ids(9)
    engine.submit(known, 1, 0)
    engine.run()
    engine.submit([V - 1 - known[0]], 4, 0)  # takes one page of four; two others are known
    engine.step()
    engine.submit(known[:8] + some_ids(6, 5), 1, 0)  # finds two, needs two more, one is left
    waiting = engine.queue[0]
    engine.step()
    assert waiting.state == "queued" and not engine.counts["preempted"]
    assert len(engine.run()) == 2 and engine.counts["tokens shared"] >= 8


def test_who_comes_first_is_let_in_first_and_never_stands_back():
    engine = Engine(tiny(), max_batch=4, page_size=4, n_pages=7, sharing=False)
    numbers = [engine.submit(some_ids(7, seed), 12, 0) for seed in range(6)]
    let_in, oldest = [], []
    while engine.queue or engine.running:
        first = engine.running[0] if engine.running else None
        engine.step()
        let_in += [r.id for r in engine.running if r.id not in let_in]
        if first is not None:
            oldest.append(first.state)
            assert first.state in ("decode", "prefill", "done")
    assert engine.counts["preempted"] > 0 and let_in == sorted(let_in)
    assert set(engine.finished) == set(numbers)


def test_one_that_is_done_costs_nothing():
    engine = Engine(tiny(), sharing=False)
    for n in (1, 3, 9):
        engine.submit([n], n, 0)
    engine.run()
    assert engine.counts["tokens read"] == 1 + 3 + 9 and engine.counts["steps"] == 9


def test_a_remembered_beginning_is_not_read_again():
    engine, prompt = Engine(tiny(), page_size=4), some_ids(14)
    engine.submit(prompt, 1, 0)
    engine.run()
    number = engine.submit(prompt, 1, 0)
    before = engine.counts["tokens read"]
    assert engine.run()[number] == alone(tuple(prompt), 1)
    assert engine.counts["tokens read"] - before == 1  # the last, for its logits
    assert engine.counts["tokens shared"] == 13


def test_what_went_on_from_a_page_goes_when_the_page_is_written_over():
    engine, number = Engine(tiny(), page_size=2, n_pages=20), 0
    for prompt in ([1, 2, 3, 4, 5], [1, 7, 3, 4, 5], [1, 7, 3, 4, 6], [1, 2, 3, 4, 6]):
        number += 1
        engine.submit(prompt, 6, 0)  # the second takes over the first page and changes its end
        assert engine.run() == {number: alone(tuple(prompt), 6)}
        check_books(engine)
        check_memory(engine)


def test_unused_slots_are_counted():
    engine = Engine(tiny(), page_size=4)
    engine.submit(some_ids(6), 5, 0)
    engine.step()
    assert engine.stats["used pages"] == 2 and engine.stats["unused slots"] == 2
    engine.step()
    assert engine.stats["unused slots"] == 1
    twin = engine.submit(some_ids(6), 5, 0)
    engine.step()  # they share the first page; each has a second of its own
    assert engine.stats["used pages"] == 3 and engine.running[1].id == twin


# ---------------------------------------------------------------- cancelling


def engine_in(state):
    """An engine, and a request in this state with others beside it."""
    if state == "preempted":
        engine = Engine(tiny(), page_size=4, n_pages=6, sharing=False)
        engine.submit(some_ids(7), 17, 0)
        mine = engine.submit(some_ids(7, 1), 17, 0)
        while not engine.counts["preempted"]:
            engine.step()
    else:
        engine = Engine(tiny(), max_batch=2, page_size=4, chunk_size=4)
        engine.submit([1, 2], 9, 0)
        if state == "queued":
            engine.submit([3, 4], 9, 0)
        mine = engine.submit(some_ids(7, 1), 5, 0)
        for _ in range({"queued": 2, "prefill": 1, "decode": 3}[state]):
            engine.step()
    request = next(r for r in [*engine.queue, *engine.running] if r.id == mine)
    assert request.state == state
    return engine, request


@pytest.mark.parametrize("state", ["queued", "prefill", "decode", "preempted"])
def test_cancel_in_each_state(state):
    engine, request = engine_in(state)
    written = request.text[request.n_prompt :]
    assert engine.cancel(request.id) == written and bool(written) == (
        state in ("decode", "preempted"))
    assert written == alone(tuple(request.text[: request.n_prompt]), 17)[: len(written)]
    check_books(engine)
    assert request.state == "cancelled" and engine.counts["cancelled"] == 1
    with pytest.raises(ValueError, match=f"request {request.id} neither waits nor runs"):
        engine.cancel(request.id)
    assert request.id not in engine.run() and not any(engine.pool.users)


@pytest.mark.parametrize("number", [0, 99, None])
def test_cancel_of_the_unknown(number):
    engine = Engine(tiny())
    engine.submit([1], 2)
    with pytest.raises(ValueError, match="unknown or done"):
        engine.cancel(number)
    assert len(engine.run()) == 1
    with pytest.raises(ValueError, match="unknown or done"):
        engine.cancel(1)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["max_batch", "page_size", "n_pages", "chunk_size", "max_queue"])
def test_an_engine_of_nothing_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} 0.*each at least 1"):
        Engine(tiny(), **{name: 0})


BAD = [
    (dict(prompt_ids="12"), ValueError, "encode the text first"),
    (dict(prompt_ids=[1, 2.5]), ValueError, "whole numbers"),
    (dict(stop_ids="\n"), ValueError, "encode the text first"),
    (dict(stop_ids=3), TypeError, "iterable"),
    (dict(prompt_ids=[]), ValueError, "T = 0 tokens"),
    (dict(prompt_ids=[1] * (MAX_LEN + 1)), ValueError, f"max_len = {MAX_LEN}"),
    (dict(prompt_ids=[1, V]), ValueError, f"id {V} is outside the vocabulary of {V}"),
    (dict(prompt_ids=[-1]), ValueError, "id -1 is outside"),
    (dict(max_new_tokens=0), ValueError, "max_new_tokens is 0; after a prompt of 2, 1 to 15 fit"),
    (dict(max_new_tokens=16), ValueError, "max_new_tokens is 16; .*max_len and pages hold 16"),
    (dict(temperature=-1), ValueError, "temperature is -1"),
    (dict(temperature=float("nan")), ValueError, "temperature is nan"),
    (dict(top_k=0), ValueError, "top_k is 0"),
    (dict(top_p=0), ValueError, "top_p is 0"),
    (dict(seed="x"), (TypeError, RuntimeError), "manual_seed|int"),
]


@pytest.mark.parametrize(("wrong", "kind", "message"), BAD)
def test_what_is_refused_leaves_the_others_alone(wrong, kind, message):
    engine = Engine(tiny(), page_size=4, n_pages=4)
    first = engine.submit([1, 2, 3], 8, 0)
    engine.step()
    with pytest.raises(kind, match=message):
        engine.submit(**(dict(prompt_ids=[1, 2], max_new_tokens=3) | wrong))
    assert not engine.queue
    check_books(engine)
    second = engine.submit([4, 5], 8, 0)
    assert second == first + 1
    assert engine.run() == {first: alone((1, 2, 3), 8), second: alone((4, 5), 8)}


def test_a_full_queue_refuses():
    engine = Engine(tiny(), max_queue=2)
    engine.submit([1], 3, 0), engine.submit([2], 3, 0)
    with pytest.raises(RuntimeError, match="the queue is full: 2 requests wait"):
        engine.submit([3], 3, 0)
    engine.step()
    engine.submit([3], 3, 0)
    assert list(engine.run()) == [1, 2, 3]


def test_prompts_may_be_tensors_and_are_copied():
    engine, prompt = Engine(tiny()), [1, 2, 3]
    one, two = engine.submit(torch.tensor(prompt), 5, 0), engine.submit(prompt, 5, 0)
    prompt.append(4)
    assert engine.run() == dict.fromkeys((one, two), alone((1, 2, 3), 5))


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
        number = self.engine.submit(prompt, n, *sampling, seed=seed)
        self.wanted[number] = alone(prompt, n, sampling, seed)
        self.got[number] = []

    def note(self, written):
        for number, token in written:
            self.got[number].append(token)

    @rule(n=st.integers(1, 4))
    def step(self, n):
        for _ in range(n):
            self.note(self.engine.step())

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
        check_memory(self.engine)

    def teardown(self):
        limit = sum(map(len, self.wanted.values())) * 8 + 8
        for _ in range(limit):
            self.note(self.engine.step())
            check_books(self.engine)
            if not self.engine.queue and not self.engine.running:
                break
        check_memory(self.engine)
        assert self.got == self.wanted == self.engine.run()
        assert len(self.engine.pool.free) == 8


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestAnyOrder = AnyOrder.TestCase


def test_a_thousand_requests_through_eight_pages():
    engine, wanted = Engine(tiny(), page_size=3, n_pages=8, max_batch=8), {}
    dice = random.Random(0)
    for i in range(1000):
        prompt = tuple((some_ids(4, 5) if i % 3 else []) + some_ids(dice.randint(1, 4), i))
        n, sampling = dice.randint(1, 6), dice.choice([(0,), (1.0,)])
        wanted[engine.submit(prompt, n, *sampling, seed=i)] = alone(prompt, n, sampling, i)
    assert engine.run() == wanted
    assert engine.counts["done"] == 1000 and engine.counts["preempted"] > 0
    check_books(engine)
    check_memory(engine)
    assert not any(engine.pool.users) and len(engine.pool.free) == 8


def test_the_engine_stays_small_enough_to_read():
    source = Path(tinygpt_helpers.__file__).read_text(encoding="utf-8")
    engine = source.split("page 08: serving\n")[1].split('\nif __name__')[0]
    assert len([line for line in engine.splitlines() if line.strip()]) <= 250
