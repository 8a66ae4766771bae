"""The corpus: same bytes everywhere, one derivation per story, a floor that is exact."""

import functools
import hashlib
import importlib.util
import math
import os
import random
import re
import string
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

DATA = Path(__file__).resolve().parent.parent / "data"
SCRIPT = DATA / "make_tiny_corpus.py"


def load(name="make_tiny_corpus"):
    """A fresh copy of the script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


corpus = load()
# Many tests take the same stories apart; the search for derivations runs once for each.
corpus.derivations = functools.cache(corpus.derivations)
TEXT = (DATA / "tiny_corpus.txt").read_bytes().decode("ascii")
STORIES = TEXT.removesuffix("\n").split("\n")
SKILLS = ("spelled", "grammatical", "remembers", "counts")


@pytest.fixture(scope="session")
def made():
    return corpus.make_corpus()


@pytest.fixture(scope="session")
def readings():
    """Every correct derivation of every story: a list of (shape, log_prob, …) for each."""
    return [[d for d in corpus.derivations(s) if d[1] > -math.inf] for s in STORIES]


@pytest.fixture(scope="session")
def verdicts():
    return [corpus.parse_story(s) for s in STORIES]


@pytest.fixture(scope="session")
def facts():
    return corpus.facts(TEXT)


# --- the file ------------------------------------------------------------------------------------


def test_file_is_what_the_grammar_writes(made):
    assert made[0] == TEXT


def test_other_process_with_another_hash_seed_writes_the_same_bytes():
    code = (
        "import sys, hashlib; sys.path.insert(0, '.'); import make_tiny_corpus as m; "
        "print(hashlib.sha256(m.make_corpus()[0].encode()).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "4321"}
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=DATA, env=env, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == hashlib.sha256(TEXT.encode()).hexdigest()


def test_main_writes_and_checks(tmp_path, monkeypatch, capsys):
    module = load("copy_of_corpus")
    monkeypatch.setattr(module, "PATH", tmp_path / "tiny_corpus.txt")
    monkeypatch.setattr(module, "N_STORIES", 40)
    monkeypatch.setattr(module.make_corpus, "__defaults__", (40, 1))
    assert module.main(["--check"]) == 1 and not module.PATH.exists()
    assert module.main([]) == 0 and module.main(["--check"]) == 0
    assert [f.name for f in tmp_path.iterdir()] == ["tiny_corpus.txt"]
    module.PATH.write_text("spoiled\n")
    assert module.main(["--check"]) == 1 and module.PATH.read_text() == "spoiled\n"
    assert "differs" in capsys.readouterr().out


def test_size_and_variety():
    assert 0.9e6 <= len(TEXT) <= 1.1e6
    assert 60 <= len(set(TEXT)) <= 80
    capitals = set(string.ascii_uppercase) - set("CPQUVXYZ")
    assert set(string.ascii_lowercase) | capitals | set("123456789 .,!?'\"\n") == set(TEXT)
    assert len(corpus.SHAPES) >= 12
    assert sum(s.startswith("I love ") for s in STORIES) >= 200
    assert sum(len(s) < 256 for s in STORIES) / len(STORIES) >= 0.9
    assert max(map(len, STORIES)) < 128  # with its line end, one fits a window of 128
    words = {w.lower() for w in re.findall(corpus.WORD, TEXT)}
    assert len(corpus.content_words()) >= 300
    assert corpus.content_words() <= words  # the grammar says nothing that the corpus does not


def test_words_said_again_differ_in_their_first_letters():
    """Places aside, a recalled word is known by its first letter; the data card says so."""
    lists = [entry for entry in corpus.LISTS.values() if isinstance(entry, list)]
    templates = [t for _, t in corpus.SHAPES.values()] + [t for entry in lists for t in entry]
    slots = [s for t in templates for s in corpus.compile_template(t) if not isinstance(s, str)]
    recalled = {s.name for s in slots if s.kind == "recall"}
    named = {s.of for s in slots if s.kind == "draw" and s.name in recalled} - {"PLACE"}
    assert {"NAME", "PET", "THING", "COLLECT", "JOY"} <= named
    for name in named:
        first = [forms[0][0][0] for forms in corpus.entries(name)]
        assert len(set(first)) == len(first), name


def test_split_keeps_stories_whole():
    train, val = corpus.split_stories(TEXT)
    assert train + val == TEXT and train.endswith("\n") and val.endswith("\n")
    assert train.count("\n") == len(STORIES) * 9 // 10
    assert set(val) <= set(train)


# --- generator and parser agree ------------------------------------------------------------------


def test_every_story_has_exactly_one_derivation(readings):
    assert [s for s, r in zip(STORIES, readings, strict=True) if len(r) != 1] == []


def test_every_story_has_all_skills_and_every_shape_occurs(verdicts):
    assert not [v for v in verdicts if False in v[:4] or not math.isfinite(v.log_prob)]
    assert {v.shape for v in verdicts} == set(corpus.SHAPES)
    counting = sum(v.counts is not None for v in verdicts) / len(verdicts)
    assert 0.25 < counting < 0.45


def test_parsed_log_probabilities_are_the_generated_ones(made, readings, facts):
    parsed = [r[0][1] for r in readings]
    assert parsed == pytest.approx(made[1], abs=1e-9)
    cut = len(STORIES) * 9 // 10
    train, val = corpus.split_stories(TEXT)
    assert corpus.floor(val) == pytest.approx(-sum(made[1][cut:]) / len(val), rel=1e-12)
    stated = float(facts["train floor, nats per character"])
    assert stated == pytest.approx(-sum(made[1][:cut]) / len(train), abs=5.1e-5)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_parser_gives_the_samplers_log_probability(seed):
    text, log_prob = corpus.sample_story(random.Random(seed))
    verdict = corpus.parse_story(text)
    assert verdict.log_prob == pytest.approx(log_prob, abs=1e-9) and False not in verdict[:4]


def test_fresh_stories_cost_what_the_corpus_costs(verdicts):
    """The mean of -log p is the entropy; two samples agree within five standard errors."""
    rng = random.Random(99)
    a = [-corpus.sample_story(rng)[1] for _ in range(3000)]
    b = [-v.log_prob for v in verdicts[:3000]]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    variance = sum((x - mean_a) ** 2 for x in a) / len(a)
    assert abs(mean_a - mean_b) < 5 * math.sqrt(2 * variance / 3000)


def every_story(m, pieces, said, text="", p=1.0):
    """All stories that the pieces can tell, with their probabilities."""
    if not pieces:
        yield re.sub("\0 (\\w+)", lambda f: f"{m.article(f[1])} {f[1]}", text), p
    elif isinstance(pieces[0], str):
        yield from every_story(m, pieces[1:], said, text + pieces[0], p)
    elif pieces[0].kind == "article":
        yield from every_story(m, pieces[1:], said, text + "\0", p)
    elif pieces[0].kind == "agree":
        yield from every_story(m, pieces[1:], said, text + m.agreeing(pieces[0], said), p)
    else:
        slot, ws = pieces[0], m.weights(pieces[0], said)
        for i, w in enumerate(ws):
            if w:
                new = m.entries(m.source(slot, said))[i][m.form_of(slot, said)]
                rest = new + pieces[1:]
                yield from every_story(m, rest, m.remember(slot, i, said), text, p * w / sum(ws))


@pytest.fixture
def small():
    """The same grammar with few entries left in most lists: small enough to exhaust."""
    m = load("small_corpus")
    two = "COLOUR HOLDER TRICK SAID DAY PLACE KIN FOOD COLLECT FLED WHEN LATER".split()
    three = "NAME HIDING PET FLOCK HABIT".split()
    keep = {**dict.fromkeys(two, 2), **dict.fromkeys(three, 3), "JOY": 4, "NUMBER": 12}
    for name, entry in m.LISTS.items():
        n = len(entry) if name.endswith("_END") else keep.get(name, 1)
        m.LISTS[name] = entry[:n] if isinstance(entry, list) else " | ".join(entry.split("|")[:n])
    m.LISTS["LOOK"], m.LISTS["NATURE"] = "little | old | big", "brave | honest"
    m.LISTS["THING"] = "ball | hat | umbrella"
    return m


@pytest.mark.parametrize("shape", corpus.SHAPES)
def test_probabilities_of_a_shape_sum_to_one(small, shape):
    p_shape, pieces = small.shapes()[shape]
    told = list(every_story(small, pieces, {"drawn": ()}))
    assert len(told) > 10 and len({t for t, _ in told}) == len(told)  # no text told in two ways
    assert sum(p for _, p in told) == pytest.approx(1, abs=1e-9)
    for text, p in told[:: max(1, len(told) // 200)]:
        found = [d for d in small.derivations(text) if d[1] > -math.inf]
        assert len(found) == 1 and found[0][1] == pytest.approx(math.log(p * p_shape), abs=1e-9)


@pytest.mark.parametrize("shape", ["I love, pet", "gift", "shopping", "when ill"])
def test_sampled_costs_meet_the_exact_entropy(small, shape):
    told = every_story(small, small.shapes()[shape][1], {"drawn": ()})
    entropy = -sum(p * math.log(p) for _, p in told)
    small.SHAPES = {shape: small.SHAPES[shape]}
    small.shapes.cache_clear()
    rng = random.Random(5)
    costs = [-small.sample_story(rng)[1] for _ in range(3000)]
    spread = math.sqrt(sum((c - entropy) ** 2 for c in costs)) / 3000
    assert abs(sum(costs) / 3000 - entropy) < 5 * spread + 1e-9


# --- the four skills, broken one at a time -------------------------------------------------------

BOX = (
    "Tom put an orange ball in the box. At 3 o'clock, he opened the box. "
    '"Look!" said Tom. "The orange ball!"'
)
LOST = (
    "Rosa lost her red kite. She found only an old sock. Ben found the red kite on the shelf."
)
EATEN = (
    'Anna packed six muffins. Her old owl ate three. "Oh no!" cried Anna. "Now three muffins are '
    'left." The owl winked.'
)
GIFT = "Jack had one leaf. Sam found three more. Now Jack and Sam have four leaves."
FLOCK = (
    "There were four shy mice on the hill. Then one hid, so three mice were still on the hill."
)
COUNT = (
    "I love coins! I have two coins, and my aunt got one more. "
    "That makes three coins for me and my aunt!"
)
DREAM = "I love mud, but my old mother loves snow. I dream of mud, and she dreams of snow!"
PET = (
    'I love Mia, my red cat. All summer she licks my ball. "Oh, Mia!" She is the best cat of all.'
)
ILL = "Tom and Anna sing in the garden. When Tom is ill, only Anna sings in the garden."
KNOCK = (
    'Knock, knock! "Who is it?" asked Lily. "Tom! I have three sweet pears!" '
    "Lily ate all three pears."
)
SWAP = (
    'Ben had a kite, but Rosa had an umbrella. "Let\'s swap!" said Rosa. '
    "Now Ben has the umbrella, and Rosa has the kite."
)
BEASTS = (
    'After lunch, an old dog met a fox. "I can whistle!" said the dog. '
    "It slowly taught the fox to whistle."
)
SHOP = (
    '"We need a hat and an umbrella," said Mia. '
    'She ran back with the umbrella. "Oh no! I forgot the hat!"'
)
STORY_OF = dict(
    zip(
        corpus.SHAPES,
        (BOX, LOST, EATEN, GIFT, FLOCK, COUNT, DREAM, PET, ILL, KNOCK, SWAP, BEASTS, SHOP),
        strict=True,
    )
)


def judged(text):
    return corpus.parse_story(text)[:4]


@pytest.mark.parametrize("shape", STORY_OF)
def test_whole_stories_pass(shape):
    story, counts = STORY_OF[shape], {BOX: None, EATEN: True, GIFT: True, FLOCK: True, COUNT: True}
    verdict = corpus.parse_story(story)
    assert verdict[:4] == (True, True, True, counts.get(story)) and verdict.shape == shape
    assert math.isfinite(verdict.log_prob)
    assert corpus.parse_story(story + "\n") == verdict


# What to say instead, a line for each story: it breaks that one skill.
BROKEN = {
    "spelled": """
        BOX: ball > bal | box > bxo | orange > 0range | orange ball > orange-ball | 3 > 13 |
            o'clock > oclock
        EATEN: Anna > anna
    """,
    "grammatical": """
        BOX: an orange > a orange | an orange ball > a ball orange | he opened > she opened | At
            3 o'clock > At o'clock
        LOST: She found > He found | lost her > lost his | an old sock > a sock | an old > a old
        EATEN: Her old > His old | six muffins > six muffin | muffins are > muffins is | three
            muffins > three muffin
        GIFT: one leaf > one leaves | four leaves > four leaf
        FLOCK: mice were > mice was | three mice > three mouse
        COUNT: two coins > two coin | three coins > three coin
        DREAM: she dreams > he dreams
        PET: she licks > he licks | She is > He is
        ILL: Anna sing  > Anna sings  | Anna sings > Anna sing
        KNOCK: all three pears > all three pear
        SWAP: a kite > an kite | an umbrella > a umbrella
        BEASTS: an old dog > a old dog | to whistle > to whistles
        SHOP: an umbrella > a umbrella | She ran > He ran
    """,
    "remembers": """
        BOX: The orange ball! > The orange hat! | The orange ball! > The blue ball! | The orange
            ball! > The blue hat! | opened the box > opened the pot | said Tom > said Rosa
        LOST: the red kite > the red hat | the red kite > the blue kite | Ben found > Rosa found
        EATEN: cried Anna > cried Tom | three muffins are > three apples are | The owl > The cat
        GIFT: Jack and Sam > Sam and Jack | Sam found > Jack found | four leaves > four shells
        FLOCK: three mice > three sheep | still on the hill > still in the garden
        COUNT: two coins > two shells | three coins > three shells | my aunt! > my uncle!
        DREAM: of mud > of snow | of snow! > of honey! | loves snow > loves mud
        PET: Oh, Mia > Oh, Lily | best cat > best dog
        ILL: only Anna > only Tom | Anna sings > Anna reads | sings in the garden > sings by the
            river
        KNOCK: all three > all four | three pears. > three buns. | Lily ate > Tom ate
        SWAP: has the umbrella > has the kite | and Rosa has > and Ben has | said Rosa > said
            Mia | had an umbrella > had a kite
        BEASTS: taught the fox > taught the bear | to whistle > to dance | said the dog > said
            the cat
        SHOP: forgot the hat > forgot the drum | with the umbrella > with the hat | and an
            umbrella > and a hat
    """,
    "counts": """
        EATEN: three muffins are > four muffins are | three muffins are > one muffin is | ate
            three > ate eleven | six muffins > seven muffins
        GIFT: have four > have five | found three > found two
        FLOCK: three mice > two mice | one hid > four hid
        COUNT: makes three > makes two | two coins > one coin
    """,
}
CASES = [
    (skill, story, *words.strip().split(" > "))
    for skill, table in BROKEN.items()
    for story, row in re.findall(r"([A-Z]+):([^:]*)(?=\n +[A-Z]+:|$)", table)
    for words in re.sub(r"\s+", " ", row).split("|")
]


@pytest.mark.parametrize(("skill", "story", "old", "new"), CASES)
def test_a_story_broken_in_one_respect(skill, story, old, new):
    story, broken = globals()[story], SKILLS.index(skill)
    expected = list(judged(story))
    assert story.count(old) >= 1
    verdict = corpus.parse_story(story.replace(old, new, 1))
    for i in range(broken, 4 if broken < 2 else broken + 1):
        expected[i] = False
    assert list(verdict[:4]) == expected and verdict.log_prob == -math.inf


def test_every_shape_is_broken_in_every_skill_it_asks_for():
    assert len(CASES) == 87
    broken = {skill: {globals()[s] for k, s, *_ in CASES if k == skill} for skill in SKILLS}
    assert broken["grammatical"] == broken["remembers"] == set(STORY_OF.values())
    assert broken["counts"] == {s for s in STORY_OF.values() if judged(s)[3]}


def test_half_a_story_is_not_grammatical():
    for story in STORIES[:300]:
        half = story[: story.index(" ", len(story) // 2)]
        verdict = corpus.parse_story(half)
        assert verdict.spelled and not verdict.grammatical and verdict.shape is None


def test_swapped_names_in_the_corpus_are_caught():
    """Break the last recall of a name in every story of the shape 'gift'."""
    stories = [s for s in STORIES[:600] if corpus.parse_story(s).shape == "gift"]
    assert len(stories) > 15
    for s in stories:
        hero = s.split(" ", 1)[0]
        head, _, tail = s.rpartition(hero)
        other = "Mia" if hero != "Mia" else "Sam"
        verdict = corpus.parse_story(head + other + tail)
        assert verdict[:3] == (True, True, False) and verdict.counts is True


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text(alphabet=sorted(set(TEXT)), max_size=300))
def test_any_text_gets_a_verdict(text):
    verdict = corpus.parse_story(text)
    assert isinstance(verdict, corpus.Verdict)
    assert verdict.grammatical or verdict.log_prob == -math.inf


def test_bad_input():
    assert judged("") == judged("\n") == judged("...") == (False,) * 4
    assert judged(BOX + "\n" + BOX) == (False,) * 4  # a story is one line
    for bad in (None, 3, b"I love mud."):
        with pytest.raises(TypeError, match="a story is a str"):
            corpus.parse_story(bad)
    with pytest.raises(ValueError, match="empty"):
        corpus.floor("")
    assert corpus.floor("I love mud.\n") == math.inf


def test_ambiguity_is_reported():
    m = load("ambiguous_corpus")
    m.SHAPES = {"one": (1, "I love {JOY}."), "two": (1, "I love rain.")}
    with pytest.raises(m.AmbiguousStory):
        m.parse_story("I love rain.")
    assert m.parse_story("I love snow.").grammatical


def test_scores():
    wrong = EATEN.replace("three muffins are", "four muffins are")
    assert wrong != EATEN
    scores = corpus.score_stories([EATEN, wrong, BOX, "I love tea pots.", "I love mud"])
    assert scores["n"] == 5 and scores["spelled"] == 4 / 5 and scores["grammatical"] == 3 / 5
    assert scores["remembers"] == 3 / 5  # all five are asked; the two last ones fail
    assert scores["counts"] == 1 / 4  # BOX counts nothing
    assert corpus.score_stories(STORIES[:50]) == {**dict.fromkeys(SKILLS, 1.0), "n": 50}
    assert math.isnan(corpus.score_stories([])["spelled"])


@pytest.mark.parametrize(
    "word, expected",
    [("owl", "an"), ("red", "a"), ("unicorn", "a"), ("honest", "an"), ("ukulele", "a"),
     ("umbrella", "an"), ("useful", "a"), ("unusual", "an"), ("hour", "an"), ("yo", "a")],
)  # fmt: skip
def test_article(word, expected):
    assert corpus.article(word) == expected


def test_every_article_in_the_corpus_follows_the_sound():
    vowel_letter_says_a = {"useful", "unicorn", "unique", "ukulele", "uniform"}
    for a, word in set(re.findall(r"\b(an?) ([a-z]+)", TEXT)):
        vowel = word[0] in "aeiou" and word not in vowel_letter_says_a or word in {"honest", "hour"}
        assert a == ("an" if vowel else "a"), (a, word)


# --- the data card -------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def card():
    return (DATA / "README.md").read_text(encoding="utf-8")


def counting(verdicts):
    return sum(v.counts is not None for v in verdicts)


def test_data_card_states_the_facts(card, facts, verdicts):
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", card, re.M)[1:]  # without the heading
    stated = {name: value.strip("`") for name, value in rows}
    known = {**facts, "stories that count": counting(verdicts)}
    known["share that counts"] = round(counting(verdicts) / len(verdicts), 4)
    assert len(stated) == len(rows)
    assert stated == {k: f"{v:,}" if isinstance(v, int) else str(v) for k, v in known.items()}


def test_knowing_that_no_story_comes_again_saves_next_to_nothing(card, verdicts, facts):
    known = sum(math.exp(v.log_prob) for v in verdicts[: facts["train stories"]])
    saved = -facts["validation stories"] * math.log(1 - known) / facts["validation characters"]
    assert 0 < saved < float(facts["validation floor, nats per character"]) / 400
    assert "less than a four-hundredth of the validation floor" in " ".join(card.split())


def test_data_card_lists_the_shapes(card, verdicts):
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d[\d,]*) \| ([^|]+) \| ([^|]+) \|$", card, re.M)
    assert [r[0] for r in rows] == list(corpus.SHAPES)
    for shape, weight, count, asks, example in rows:
        mine = [v for v in verdicts if v.shape == shape]
        assert int(weight) == corpus.SHAPES[shape][0]
        assert int(count.replace(",", "")) == len(mine)
        assert example in STORIES and corpus.parse_story(example).shape == shape
        assert all(v.remembers for v in mine)
        assert all((v.counts is not None) == ("counting" in asks) for v in mine)
        assert asks == "grammar, memory" + ", counting" * ("counting" in asks)


def test_data_card_prose_has_no_other_numbers(card, facts):
    """Every number outside the tables is one of these, each looked up where it comes from."""
    slot = corpus.Slot("draw", "", "THING")
    divisor, shift = re.search(r"(\d+) // \(r \+ (\d+)\)", card).groups()
    ranks = range(len(corpus.entries("THING")))
    expected = [int(divisor) // (r + int(shift)) for r in ranks]
    assert corpus.weights(slot, {"drawn": ()}) == expected
    top = re.search(r"(\d+) // i\b", card)[1]
    number = corpus.weights(corpus.Slot("number", "n", "1..9"), {"drawn": ()})
    assert number == [int(top) // i if i < 10 else 0 for i in range(1, 13)]
    assert facts["train stories"] == len(STORIES) * 90 // 100
    weights = sum(w for w, _ in corpus.SHAPES.values())
    prose = "\n".join(row for row in card.splitlines() if not row.startswith("|"))
    prose = re.sub(r"\[CC0 1\.0\]\S+|Python 3\.10", "", prose)
    found = sorted(map(int, re.findall(r"\d+", prose)))
    known = [weights, int(divisor), int(shift), int(top), 90, 10, len(corpus.SHAPES)]
    assert found == sorted([*known, 0, 1, 2, 2])  # r = 0, 1, 2, …; ln 2
    numbers = set(re.findall("[a-z]+", TEXT)) & set(corpus.NUMBERS)
    assert "numbers from one to six" in card and numbers == set(corpus.NUMBERS[:6])
