"""The corpus: same bytes everywhere, one derivation per story, a floor that is exact."""

import functools
import importlib.util
import math
import os
import random
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

DATA = Path(__file__).resolve().parent.parent / "data"
SCRIPT = DATA / "make_tiny_corpus.py"


def load():
    """A fresh copy of the script as a module."""
    spec = importlib.util.spec_from_file_location("corpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


corpus = load()
# Many tests take the same stories apart; the search for derivations runs once for each.
corpus.derivations = functools.cache(corpus.derivations)
TEXT = (DATA / "tiny_corpus.txt").read_bytes().decode("ascii")
STORIES = TEXT.removesuffix("\n").split("\n")
CARD = (DATA / "README.md").read_text(encoding="utf-8")
SKILLS = ("spelled", "grammatical", "remembers", "counts")


@pytest.fixture(scope="module")
def verdicts():
    return [corpus.parse_story(story) for story in STORIES]


def test_main_writes_and_checks(tmp_path, capsys):
    module = load()
    module.PATH = tmp_path / "tiny_corpus.txt"
    module.make_corpus.__defaults__ = (40, 1)
    assert module.main(["--check"]) == 1 and not module.PATH.exists()
    assert module.main([]) == 0 and module.main(["--check"]) == 0
    assert [f.name for f in tmp_path.iterdir()] == ["tiny_corpus.txt"]
    assert "stories: 40\n" in capsys.readouterr().out
    module.PATH.write_text("spoiled\n")
    assert module.main(["--check"]) == 1 and module.PATH.read_text() == "spoiled\n"
    assert "differs" in capsys.readouterr().out
    # Another process with another hash seed writes the bytes of the course's own file.
    env = {**os.environ, "PYTHONHASHSEED": "4321"}
    subprocess.run([sys.executable, SCRIPT, "--check"], env=env, check=True)


def test_size_and_variety():
    assert 0.9e6 <= len(TEXT) <= 1.1e6
    assert set(TEXT) == set("abcdefghijklmnopqrstuvwxyzABDEFGHIJKLMNORSTW123456789 .,!?'\"\n")
    assert sum(s.startswith("I love ") for s in STORIES) >= 200
    assert max(map(len, STORIES)) < 128  # with its line end, one fits a window of 128
    assert len(corpus.SHAPES) >= 12 and len(corpus.content_words()) >= 300
    # The grammar says nothing that the corpus does not.
    assert corpus.content_words() <= {w.lower() for w in re.findall(corpus.WORD, TEXT)}


def test_words_said_again_differ_in_their_first_letters():
    """Places aside, a recalled word is known by its first letter; the data card says so."""
    text = str([*corpus.SHAPES.values(), *corpus.LISTS.values()])
    recalled = set(re.findall(r"\{(\w+)(?:/\w+)?\}", text))
    drawn = re.findall(r"\{(\w+):([A-Z]+)(?:/\w+)?\}", text)
    named = {name for variable, name in drawn if variable in recalled} - {"PLACE"}
    assert {"NAME", "PET", "THING", "COLLECT", "JOY"} <= named
    for name in named:
        first = [entry.strip()[0] for entry in corpus.LISTS[name].split("|")]
        assert len(set(first)) == len(first), name


def test_articles_follow_the_sound():
    assert {corpus.article(w) for w in "red unicorn unique ukulele useful uniform".split()} == {"a"}
    assert {corpus.article(w) for w in "owl Owl honest umbrella unusual hour".split()} == {"an"}
    for a, word in set(re.findall(r"\b(an?) ([a-z]+)", TEXT)):
        assert a == corpus.article(word), word


def test_every_story_has_all_skills_and_costs_what_its_sampler_says(verdicts):
    """No story has two derivations: parse_story would have raised AmbiguousStory."""
    text, log_probs = corpus.make_corpus()
    assert text == TEXT and [v.log_prob for v in verdicts] == pytest.approx(log_probs, abs=1e-9)
    assert not [v for v in verdicts if False in v[:4]]
    assert {v.shape for v in verdicts} == set(corpus.SHAPES)
    assert 0.25 < sum(v.counts is not None for v in verdicts) / len(verdicts) < 0.45
    cut = len(STORIES) * 9 // 10
    train, val = corpus.split_stories(TEXT)
    assert train + val == TEXT and train.count("\n") == cut and set(val) <= set(train)
    assert corpus.floor(train) == pytest.approx(-sum(log_probs[:cut]) / len(train), rel=1e-12)
    assert corpus.floor(val) == pytest.approx(-sum(log_probs[cut:]) / len(val), rel=1e-12)
    assert corpus.split_stories("one\ntwo\nthree") == ("one\ntwo\n", "three")


def test_fresh_stories_are_right_and_cost_what_the_corpus_costs(verdicts):
    """The mean of -log p is the entropy; two samples agree within five standard errors."""
    rng = random.Random(99)
    texts, fresh = zip(*(corpus.sample_story(rng) for _ in range(3000)))
    assert [corpus.parse_story(text).log_prob for text in texts] == pytest.approx(fresh, abs=1e-9)
    gap = statistics.fmean(fresh) - statistics.fmean(v.log_prob for v in verdicts[:3000])
    assert abs(gap) < 5 * math.sqrt(2 * statistics.pvariance(fresh) / 3000)


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


@pytest.mark.parametrize("shape", corpus.SHAPES)
def test_the_probabilities_of_a_shape_are_exact(shape):
    """They sum to one, the parser finds each, and what is sampled costs the entropy."""
    small = load()  # the same grammar with few entries left in each list: small enough to exhaust
    small.LISTS["THING"], small.LISTS["NATURE"] = "ball | hat | umbrella", "brave | honest"
    for name, entry in small.LISTS.items():
        n = {"NUMBER": 12, "NAME": 3, "THING": 3, "JOY": 4}.get(name, 2)
        small.LISTS[name] = entry[:n] if isinstance(entry, list) else "|".join(entry.split("|")[:n])
    p_shape, pieces = small.shapes()[shape]
    told = list(every_story(small, pieces, {"drawn": ()}))
    assert len(told) > 10 and len({t for t, _ in told}) == len(told)  # no text told in two ways
    assert sum(p for _, p in told) == pytest.approx(1, abs=1e-9)
    for text, p in told[:: max(1, len(told) // 200)]:
        found = small.parse_story(text).log_prob
        assert found == pytest.approx(math.log(p * p_shape), abs=1e-9)
    entropy = -sum(p * math.log(p) for _, p in told)
    small.SHAPES = {shape: small.SHAPES[shape]}
    small.shapes.cache_clear()
    rng = random.Random(5)
    costs = [-small.sample_story(rng)[1] for _ in range(3000)]
    error = math.sqrt(statistics.pvariance(costs, entropy) / 3000)
    assert abs(statistics.fmean(costs) - entropy) < 5 * error + 1e-9


# For each shape a story, then for each skill what to say instead (old > new) to break that one.
TABLE = """
box = Tom put an orange ball in the box. At 3 o'clock, he opened the box. "Look!" said Tom. "The
    orange ball!"
  spelled: Tom > tom | put an > put-an | ball > bal | orange > 0range | 3 > 13 | o'clock > oclock
  grammatical: an orange > a orange | an orange ball > a ball orange | he opened > she opened
  remembers: ball! > hat! | The orange > The red | opened the box > opened the pot | Tom. > Ben.
lost = Rosa lost her red kite. She found only an old sock. Ben found the red kite on the shelf.
  grammatical: She found > He found | lost her > lost his | an old sock > a sock | an old > a old
  remembers: the red kite > the red hat | the red kite > the blue kite | Ben found > Rosa found
eaten = Anna packed six nuts. Her old owl ate three. "Oh no!" cried Anna. "Now three nuts are left."
    The owl winked.
  grammatical: Her old > His old | six nuts > six nut | nuts are > nuts is | three nuts > three nut
  remembers: cried Anna > cried Tom | three nuts are > three apples are | The owl > The cat
  counts: three nuts > four nuts | three nuts are > one nut is | three > eleven | six > seven
gift = Jack had one leaf. Sam found three more. Now Jack and Sam have four leaves.
  grammatical: one leaf > one leaves | four leaves > four leaf
  remembers: and Sam > and Mia | Jack and > Sam and | Sam found > Jack found | leaves > shells
  counts: have four > have five | found three > found two
flock = There were four shy mice on the hill. Then one hid, so three mice were still on the hill.
  grammatical: mice were > mice was | three mice > three mouse
  remembers: three mice > three sheep | still on the hill > still in the garden
  counts: three mice > two mice | one hid > four hid
I love, count = I love coins! I have two coins, and my aunt got one more. That makes three coins for
    me and my aunt!
  grammatical: two coins > two coin | three coins > three coin
  remembers: two coins > two shells | three coins > three shells | my aunt! > my uncle!
  counts: two coins > one coin | one more. That makes three > five more. That makes seven
I love, you love = I love mud, but my old mother loves snow. I dream of mud, and she dreams of snow!
  grammatical: she dreams > he dreams
  remembers: of mud > of snow | of snow! > of honey! | loves snow > loves mud
I love, pet = I love Mia, my red cat. All summer she licks my ball. "Oh, Mia!" She is the best cat
    of all.
  grammatical: she licks > he licks | She is > He is
  remembers: Oh, Mia > Oh, Lily | best cat > best dog
when ill = Tom and Anna sing in the garden. When Tom is ill, only Anna sings in the garden.
  grammatical: Anna sing > Anna sings | Anna sings > Anna sing
  remembers: only Anna > only Tom | Anna sings > Anna reads | in the garden > on the hill
knock = Knock, knock! "Who is it?" asked Mia. "Tom! I have three ripe buns!" Mia ate all three buns.
  grammatical: all three buns > all three bun
  remembers: all three > all four | three buns. > three eggs. | Mia ate > Tom ate
swap = Ben had a kite, but Mia had an umbrella. "Let's swap!" said Mia. Now Ben has the umbrella,
    and Mia has the kite.
  grammatical: a kite > an kite | an umbrella > a umbrella
  remembers: the umbrella > the kite | and Mia > and Ben | Mia. > Tom. | an umbrella > a kite
two beasts = After lunch, an old dog met a fox. "I can whistle!" said the dog. It slowly taught the
    fox to whistle.
  grammatical: an old dog > a old dog | to whistle > to whistles
  remembers: the fox > the bear | to whistle > to dance | said the dog > said the cat
shopping = "We need a hat and a cup," said Sam. He ran back with the cup. "Oh no! I forgot the hat!"
  grammatical: a cup > an cup | He ran > She ran
  remembers: forgot the hat > forgot the drum | the cup > the hat | a cup > a hat
"""
WHOLE, SLIPS = {}, []
for block in re.split(r"\n(?=\w)", TABLE.strip()):
    first, *rows = [" ".join(part.split()) for part in re.split(r"\n  (?=\w+:)", block)]
    shape, WHOLE[shape] = first.split(" = ")
    for skill, slips in (row.split(": ") for row in rows):
        SLIPS += [(shape, skill, *slip.split(" > ")) for slip in slips.split(" | ")]
BOX, EATEN = WHOLE["box"], WHOLE["eaten"]
MIXED = [EATEN, EATEN.replace("three nuts", "four nuts"), BOX, "I love tea pots.", "I love mud"]


@pytest.mark.parametrize("shape", corpus.SHAPES)
def test_a_whole_story_passes(shape):
    """Half of it, or more than it, is not grammatical."""
    story, verdict = WHOLE[shape], corpus.parse_story(WHOLE[shape])
    counts = True if shape in ("eaten", "gift", "flock", "I love, count") else None
    broken = {skill for of, skill, *_ in SLIPS if of == shape}
    assert broken | {"spelled"} == set(SKILLS[: 4 if counts else 3])
    assert verdict[:4] == (True, True, True, counts) and verdict.shape == shape
    assert math.isfinite(verdict.log_prob) and corpus.parse_story(story + "\n") == verdict
    for text in (story[: story.index(" ", len(story) // 2)], f"{story} {story}", story + " "):
        assert corpus.parse_story(text) == (True, False, False, False, -math.inf, None)


@pytest.mark.parametrize(("shape", "skill", "old", "new"), SLIPS)
def test_a_story_broken_in_one_respect(shape, skill, old, new):
    story, broken = WHOLE[shape], SKILLS.index(skill)
    assert old in story
    expected = list(corpus.parse_story(story)[:4])
    for i in range(broken, 4 if broken < 2 else broken + 1):
        expected[i] = False
    verdict = corpus.parse_story(story.replace(old, new, 1))
    assert list(verdict[:4]) == expected and verdict.log_prob == -math.inf


@settings(max_examples=100, deadline=None)
@given(st.text() | st.lists(st.sampled_from(TEXT[:2000].split(" "))).map(" ".join))
def test_any_text_gets_a_verdict(text):
    verdict = corpus.parse_story(text)
    assert (verdict.log_prob == -math.inf) == (False in verdict[:4])


def test_bad_input():
    for text in ("", "\n", "...", BOX + "\n" + BOX):  # a story is one line
        assert corpus.parse_story(text)[:4] == (False,) * 4
    for bad in (None, 3, b"I love mud."):
        with pytest.raises(TypeError, match=f"a story is a str, not {type(bad).__name__}"):
            corpus.parse_story(bad)
    with pytest.raises(ValueError, match="empty"):
        corpus.floor("")
    assert corpus.floor("I love mud.\n") == math.inf
    assert math.isnan(corpus.score_stories([])["spelled"])
    m = load()
    m.SHAPES = {"one": (1, "I love {JOY}."), "two": (1, "I love rain.")}
    with pytest.raises(m.AmbiguousStory, match="I love rain"):
        m.parse_story("I love rain.")
    assert m.parse_story("I love snow.").grammatical


@pytest.mark.parametrize(("stories", "shares"), [
    (STORIES[:50], [1, 1, 1, 1]),
    (MIXED, [4 / 5, 3 / 5, 3 / 5, 1 / 4]),  # the last two fail all but spelling; BOX counts nothing
    (["Tom lost his hat", "I love rian."], [1 / 2, 0, 0, 0]),
])  # fmt: skip
def test_scores_and_their_report(capsys, stories, shares):
    assert corpus.score_stories(stories) == {**dict(zip(SKILLS, shares)), "n": len(stories)}
    corpus.report(0.3126, 0.2, stories)
    out = capsys.readouterr().out
    assert re.findall(r"\d\.\d+", out)[:2] == ["0.313", "0.200"] and "ends 56% above" in out
    assert f"Of {len(stories)} stories" in out
    named = zip(shares, ["have", "are", "remember", "count"])
    assert re.findall(r"^ +(\d+%) (\w+)", out, re.M) == [(f"{share:.0%}", w) for share, w in named]
    lines = out.partition("Three of them:")[2].splitlines()
    assert " ".join(" ".join(lines).split()) == " ".join(stories[:3]) and max(map(len, lines)) <= 92


def test_data_card_states_the_facts(verdicts):
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", CARD, re.M)[1:]  # without the heading
    stated, facts = {name: value.strip("`") for name, value in rows}, corpus.facts(TEXT)
    counting = sum(v.counts is not None for v in verdicts)
    share = round(counting / len(verdicts), 4)
    known = {**facts, "stories that count": counting, "share that counts": share}
    assert len(stated) == len(rows)
    assert stated == {k: f"{v:,}" if isinstance(v, int) else str(v) for k, v in known.items()}
    # What a reader saves who knows that no story of the training split comes again:
    told = sum(math.exp(v.log_prob) for v in verdicts[: facts["train stories"]])
    saved = -facts["validation stories"] * math.log(1 - told) / facts["validation characters"]
    assert 0 < saved < float(facts["validation floor, nats per character"]) / 400
    assert "less than a four-hundredth of the validation floor" in " ".join(CARD.split())


def test_data_card_lists_the_shapes(verdicts):
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d[\d,]*) \| ([^|]+) \| ([^|]+) \|$", CARD, re.M)
    assert [r[0] for r in rows] == list(corpus.SHAPES)
    for shape, weight, count, asks, example in rows:
        counts = [v.counts for v in verdicts if v.shape == shape]
        assert weight == str(corpus.SHAPES[shape][0]) and count == f"{len(counts):,}"
        assert example in STORIES and corpus.parse_story(example).shape == shape
        assert set(counts) == {"grammar, memory": {None}, "grammar, memory, counting": {True}}[asks]


def test_data_card_prose_has_no_other_numbers():
    """Every number outside the tables is one of these; the weights are those of the grammar."""
    ranks = corpus.weights(corpus.Slot("draw", "", "THING"), {"drawn": ()})
    numbers = corpus.weights(corpus.Slot("number", "n", "1..9"), {"drawn": ()})
    assert ranks == [1000 // (r + 4) for r in range(len(ranks))] and "1000 // (r + 4)" in CARD
    assert numbers == [60 // i for i in range(1, 10)] + [0, 0, 0] and "60 // i" in CARD
    prose = re.sub(r"^\|.*|\[CC0 1\.0\]\S+|Python 3\.10", "", CARD, flags=re.M)
    weights = sum(w for w, _ in corpus.SHAPES.values())
    known = [weights, len(corpus.SHAPES), 1000, 4, 60, 90, 10, 0, 1, 2, 2]  # r = 0, 1, 2, …; ln 2
    assert sorted(map(int, re.findall(r"\d+", prose))) == sorted(known)
    said = set(re.findall("[a-z]+", TEXT)) & set(corpus.NUMBERS)
    assert "numbers from one to six" in CARD and said == set(corpus.NUMBERS[:6])
