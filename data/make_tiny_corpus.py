"""Make the tiny corpus: one megabyte of very short stories whose loss floor is known exactly.

    python data/make_tiny_corpus.py            # write data/tiny_corpus.txt, print its counts
    python data/make_tiny_corpus.py --check    # compare with the file on disk, write nothing

Read the file from top to bottom:

1. The grammar, as data: FORMS (words that agree), LISTS (what a slot may say), SHAPES (stories).
2. `weights`, the one rule for what may stand in a slot, and how likely it is.
3. The sampler: a walk over a shape that writes a story and knows its log-probability.
4. The parser: the same walk, led by a text. It tells whether a story is spelled, grammatical,
   remembers and counts, and gives the log-probability of the story back.
5. The corpus: split, floor, command line.

Standard library only. All randomness comes from `random.Random(seed).random()` and integer
weights, so that every machine and every Python from 3.10 on writes the same bytes.
The words are the course's own; the corpus and this grammar are CC0.
"""

import argparse
import hashlib
import math
import os
import random
import re
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import NamedTuple

SEED = 1
N_STORIES = 11000
PATH = Path(__file__).with_name("tiny_corpus.txt")

# ------------------------------------------------------------------------------------------------
# 1. The grammar, as data
#
# A template is plain text with slots in braces:
#   {COLOUR}       draw an entry of the list COLOUR
#   {c:COLOUR}     draw one and remember it as c
#   {c}            memory: say again what c was
#   {food/n}       the form of food that goes with the number n (apple/apples); {v/1} is form 1
#   {he@hero}      agreement: he or she, as hero is; {is@n} is or are, as n is
#   {a}            agreement: a or an, by the sound of the next word
#   {n#2..6}       draw a number between two bounds (1..n-1 may name earlier numbers); the smaller
#                  the commoner: number i has the weight 60 // i
#   {r=n-k}        counting: the result, remembered as r
# The entries of a list stand with the commonest first: entry number r = 0, 1, 2, … has the weight
# 1000 // (r + 4). No list says the same entry twice in one story. An entry may be a template too.
# ------------------------------------------------------------------------------------------------

# For a he or a single thing / for a she or several things.
FORMS = {
    "he": "he/she", "He": "He/She", "his": "his/her", "His": "His/Her", "is": "is/are",
    "was": "was/were",
}  # fmt: skip

# Words whose first letter does not tell whether they take "a" or "an". No slot says one of them for
# now; they stand here for the words that you may add.
A_BEFORE = {"ukulele", "useful", "uniform", "unicorn", "unique"}
AN_BEFORE = {"honest", "hour"}

LISTS = {
    # What is said again comes from short lists whose words begin with different letters (places
    # aside): who has found the word to repeat knows it by its first letter. Variety stands in the
    # lists below them.
    # People and beasts: the second form is what agreement asks for.
    "NAME": "Tom/he | Mia/she | Ben/he | Lily/she | Sam/he | Anna/she | Jack/he | Rosa/she",
    "KIN": "mother/she | father/he | aunt/she | uncle/he | granny/she | sister/she",
    "PET": "cat | dog | rabbit | mouse | goat | owl | hen",
    "WILD": "fox | bear | wolf | snake | lion | pig | mole",
    "FLOCK": """duck/ducks | sheep/sheep | rabbit/rabbits | hen/hens | mouse/mice | goat/goats |
        cow/cows""",
    # Things.
    "COLOUR": "red | blue | green | yellow | white | orange | pink",
    "THING": "ball | hat | kite | drum | spoon | cup | lamp | umbrella | whistle",
    "HOLDER": "box | sack | drawer | chest | pot",
    "FOOD": """apple/apples | cookie/cookies | bun/buns | pear/pears | egg/eggs | muffin/muffins |
        nut/nuts""",
    "COLLECT": """shell/shells | button/buttons | marble/marbles | feather/feathers |
        acorn/acorns | coin/coins | leaf/leaves | pebble/pebbles""",
    # What is loved, where it happens, what people do.
    "JOY": """rain | snow | pancakes | the sea | mud | honey | long walks | warm bread |
        old trains""",
    "PLACE": """in the garden | by the river | on the beach | in the forest | on the hill |
        near the pond | at the market | behind the barn | under the bridge""",
    "HABIT": """sing/sings | dance/dances | play/plays | read/reads | jump/jumps | climb/climbs |
        whistle/whistles | laugh/laughs | knit/knits""",
    "TRICK": "dance | whistle | climb trees | tell jokes | bake bread | swim | juggle eggs",
    # Words that no story says again. What people, beasts and things are like:
    "NATURE": """brave | hungry | lazy | clever | shy | sleepy | noisy | old | gentle | merry |
        funny | quick | silly | fluffy | thirsty | young | proud | fat | wild | cheeky""",
    "LOOK": """little | old | big | new | shiny | tiny | odd | dusty | broken | wooden | muddy |
        empty""",
    "SILLY": """sock | biscuit | slipper | spider | potato | sandwich | jumper | saucepan |
        pumpkin | teapot | candle | pickle | trumpet | ladder | carpet | bucket | feather""",
    "TASTE": """sweet | fresh | tiny | lovely | warm | tasty | juicy | crunchy | delicious |
        sticky | ripe""",
    # Where and when.
    "HIDING": """under the bed | behind the sofa | in the kitchen | under the table |
        in the bathtub | behind the door | on the shelf | in the attic | under the pillow |
        on the roof | in the cellar | inside the oven | under the stairs | in the hall""",
    "DAY": "Sunday | Monday | Friday | Saturday | Wednesday | Tuesday | Thursday",
    "PART": "morning | evening | afternoon",
    "SEASON": "summer | winter | spring | autumn",
    "MEAL": "lunch | breakfast | supper | tea | dinner",
    "WEATHER": "sunny | rainy | windy | cold | snowy | misty | stormy | foggy",
    "HOUR": "3 | 5 | 2 | 4 | 6 | 7 | 8 | 9 | 1",
    "WHEN": ["One {WEATHER} day", "On {DAY}", "After {MEAL}", "At {HOUR} o'clock"],
    "LATER": ["Later", "Soon", "In the end", "At {HOUR} o'clock"],
    "OFTEN": ["Every {DAY}", "Every {PART}", "All {SEASON}"],
    # How it is done, said and cried.
    "MANNER": """happily | loudly | quietly | slowly | gladly | kindly | proudly | calmly |
        boldly""",
    "SAID": "said | cried | laughed | called | shouted | whispered | squealed",
    "SIGHED": "said | sighed | cried | groaned",
    "ASKED": "asked | called | cried",
    "WHO": "Who is it | Who is there",
    "WOW": "Hooray | Look | Oh my | Wonderful | Goodness | Lucky me",
    "OH_NO": "Oh no | Oh dear | Dear me | What a pity",
    "SCOLD": "Stop that | Oh | Shame on you | Go to bed",
    "GOT": "bought | found | picked | packed | counted | washed | carried",
    "GATHERED": "found | picked up | dug up | got | brought | collected",
    "BAD_PET": """sits on | hides | licks | steals | chases | sniffs | bites | drops | scratches |
        kicks""",
    "CAME": "came | walked | ran | hurried | skipped | raced",
    "FLED": "ran home | hid | dashed off | ran away | left | trotted off | vanished",
    "GRINNED": "smiled | yawned | winked | nodded | blinked | sneezed | shrugged",
    # Ways to end. Some ask for only a part of what was said, and nobody can know beforehand which.
    "LOST_END": [
        "{NAME} found the {c} {x} {HIDING}.",
        "The {c} {x} was {HIDING}!",
    ],
    "EAT_END": [
        "",
        " The {pet} {GRINNED}.",
    ],
    "GIFT_END": [
        '"Now we have {s=n+k} {x/s}!" {SAID} {hero}.',
        "Now {hero} and {friend} have {s=n+k} {x/s}.",
    ],
    "LOVED": [
        "There is no better {pet}!",
        "{He@name} is the best {pet} of all.",
    ],
    "HABIT_END": [
        "When {hero} is ill, only {friend} {v/1} {where}.",
        "When {friend} is ill, only {hero} {v/1} {where}.",
    ],
    "DOOR_END": [
        "{hero} ate all {n} {food/n}.",
        "{hero} and {friend} ate the {food/n}.",
    ],
    "SHOP_END": [
        '{x}. "{OH_NO}! I forgot the {y}!"',
        '{y}. "{OH_NO}! I forgot the {x}!"',
    ],
    "COUNT_END": [
        "Together we have {s=n+k} {x/s}.",
        "That makes {s=n+k} {x/s} for me and my {kin}!",
    ],
    "SWAPPER": ["{p}", "{q}"],
}

# name: (weight, template)
SHAPES = {
    "box": (
        10,
        "{hero:NAME} put {a} {c:COLOUR} {x:THING} in the {p:HOLDER}. {LATER}, {he@hero} opened "
        'the {p}. "{WOW}!" {SAID} {hero}. "The {c} {x}!"',
    ),
    "lost": (
        8,
        "{hero:NAME} lost {his@hero} {c:COLOUR} {x:THING}. {He@hero} found only {a} {LOOK} "
        "{SILLY}. {LOST_END}",
    ),
    "eaten": (
        12,
        "{hero:NAME} {GOT} {n#2..6} {food:FOOD/n}. {His@hero} {NATURE} {pet:PET} ate {k#1..n-1}. "
        '"{OH_NO}!" {SIGHED} {hero}. "Now {r=n-k} {food/r} {is@r} left."{EAT_END}',
    ),
    "gift": (
        9,
        "{hero:NAME} had {n#1..5} {x:COLLECT/n}. {friend:NAME} {GATHERED} {k#1..6-n} more. "
        "{GIFT_END}",
    ),
    "flock": (
        8,
        "There were {n#2..6} {NATURE} {x:FLOCK/n} {where:PLACE}. Then {k#1..n-1} {FLED}, so "
        "{r=n-k} {x/r} {was@r} still {where}.",
    ),
    "I love, count": (
        7,
        "I love {x:COLLECT/1}! I have {n#1..5} {x/n}, and my {kin:KIN} {GATHERED} {k#1..6-n} "
        "more. {COUNT_END}",
    ),
    "I love, you love": (
        7,
        "I love {i:JOY}, but my {NATURE} {kin:KIN} loves {k:JOY}. I dream of {i}, and {he@kin} "
        "dreams of {k}!",
    ),
    "I love, pet": (
        8,
        "I love {name:NAME}, my {COLOUR} {pet:PET}. {OFTEN} {he@name} {BAD_PET} my {THING}. "
        '"{SCOLD}, {name}!" {LOVED}',
    ),
    "when ill": (
        8,
        "{hero:NAME} and {friend:NAME} {v:HABIT/0} {where:PLACE}. {HABIT_END}",
    ),
    "knock": (
        7,
        'Knock, knock! "{WHO}?" {ASKED} {hero:NAME}. "{friend:NAME}! I have {n#3..6} {TASTE} '
        '{food:FOOD/n}!" {DOOR_END}',
    ),
    "swap": (
        8,
        "{p:NAME} had {a} {x:THING}, but {q:NAME} had {a} {y:THING}. "
        '"Let\'s swap!" {SAID} {SWAPPER}. Now {p} has the {y}, and {q} has the {x}.',
    ),
    "two beasts": (
        7,
        "{WHEN}, {a} {NATURE} {x:PET} met {a} {y:WILD}. "
        '"I can {v:TRICK}!" {SAID} the {x}. It {MANNER} taught the {y} to {v}.',
    ),
    "shopping": (
        7,
        '"We need {a} {x:THING} and {a} {y:THING}," said {hero:NAME}. '
        "{He@hero} {CAME} back with the {SHOP_END}",
    ),
}

# ------------------------------------------------------------------------------------------------
# 2. What may stand in a slot
# ------------------------------------------------------------------------------------------------

NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
LISTS["NUMBER"] = " | ".join(NUMBERS)


class Slot(NamedTuple):
    """A slot of a template, taken apart: {food:FOOD/n} is Slot("draw", "food", "FOOD", "n")."""

    kind: str  # draw, recall, agree, number, result or article
    name: str  # the variable, or the word that has to agree
    of: str = ""  # list, bounds, sum or partner of the agreement
    form: str = ""  # a number's variable, or the index of a form


def compile_template(template: str) -> tuple:
    """Cut a template into pieces, str or Slot: "my {x}" -> ("my ", Slot("recall", "x"))."""
    pieces = []
    for i, part in enumerate(re.split(r"\{([^}]*)\}", template)):
        body, _, form = part.partition("/")
        if i % 2 == 0:
            pieces += [part] if part else []
        elif part == "a":
            pieces.append(Slot("article", part))
        elif part.isupper() or body.isupper():
            pieces.append(Slot("draw", "", body, form))
        else:
            name, sign, of = re.fullmatch(r"(\w+)(?:([:@#=])(.+))?", body).groups()
            kind = {None: "recall", ":": "draw", "@": "agree", "#": "number", "=": "result"}[sign]
            pieces.append(Slot(kind, name, of or "", form))
    return tuple(pieces)


@cache
def entries(name: str) -> tuple:
    """The entries of a list; each is a tuple of forms, each form a tuple of pieces."""
    raw = LISTS[name]
    if isinstance(raw, list):  # templates, as they stand
        return tuple((compile_template(entry),) for entry in raw)
    return tuple(tuple((f,) for f in e.strip().split("/")) for e in raw.split("|"))


@cache
def shapes() -> dict:
    """{name: (probability, pieces)} of every story shape."""
    total = sum(weight for weight, _ in SHAPES.values())
    return {name: (w / total, compile_template(t)) for name, (w, t) in SHAPES.items()}


def value(expression: str, said: dict) -> int:
    """The value of "6", "n", "n-1" or "6-n", where said["n"] is a number."""
    total = 0
    for sign, term in re.findall(r"([+-]?)(\w+)", expression):
        v = int(term) if term.isdigit() else said[term][1] + 1
        total += -v if sign == "-" else v
    return total


def source(slot: Slot, said: dict) -> str:
    """The list that a slot speaks from."""
    return {"draw": slot.of, "recall": said.get(slot.name, ("",))[0]}.get(slot.kind, "NUMBER")


def weights(slot: Slot, said: dict) -> list:
    """Integer weight of each entry of the slot's list, given what the story has said so far.

    `said` maps a variable to (list, index) and "drawn" to every (list, index) drawn so far.
    Weight 0 marks what the story may not say here: the parser reads it as a slip.
    """
    size = len(entries(source(slot, said)))
    if slot.kind == "draw":
        taken = {i for name, i in said["drawn"] if name == slot.of}
        return [0 if i in taken else 1000 // (i + 4) for i in range(size)]
    if slot.kind == "number":
        low, high = (value(end, said) for end in slot.of.split(".."))
        return [60 // (i + 1) if low <= i + 1 <= high else 0 for i in range(size)]
    right = said[slot.name][1] if slot.kind == "recall" else value(slot.of, said) - 1
    return [int(i == right) for i in range(size)]


def form_of(slot: Slot, said: dict) -> int:
    """Which form of an entry the slot asks for: 0 (base, singular), 1 (plural) or as written."""
    if slot.form in said:
        return int(said[slot.form][1] > 0)
    return int(slot.form or 0)


def agreeing(slot: Slot, said: dict) -> str:
    """The form of a small word that goes with a person or a number: he/she, is/are."""
    name, index = said[slot.of]
    second = index > 0 if name == "NUMBER" else entries(name)[index][1] == ("she",)
    return FORMS[slot.name].split("/")[second]


def article(word: str) -> str:
    """ "a" or "an" before a word, by its sound: an owl, a unicorn, an hour."""
    vowel = word[:1].lower() in "aeiou" and word not in A_BEFORE or word in AN_BEFORE
    return "an" if word and vowel else "a"


def remember(slot: Slot, index: int, said: dict) -> dict:
    """What has been said once the slot says entry number `index`; a recall changes nothing."""
    if slot.kind == "recall":
        return said
    now = dict(said)
    if slot.name:
        now[slot.name] = (source(slot, said), index)
    if slot.kind == "draw":
        now["drawn"] = said["drawn"] + ((slot.of, index),)
    return now


# ------------------------------------------------------------------------------------------------
# 3. The sampler
# ------------------------------------------------------------------------------------------------


def _pick(ws: list, rng: random.Random) -> int:
    """Draw an index with probability ws[index] / sum(ws)."""
    x = int(rng.random() * sum(ws))
    for i, w in enumerate(ws):
        x -= w
        if x < 0:
            return i
    raise AssertionError("weights are empty")


def sample_story(rng: random.Random) -> tuple[str, float]:
    """Write one story: (text without newline, log-probability in nats).

    >>> sample_story(random.Random(0))[1] < 0
    True
    """
    table = shapes()
    name = list(table)[_pick([w for w, _ in SHAPES.values()], rng)]
    p, pieces = table[name]
    text, log_prob, said = "", math.log(p), {"drawn": ()}
    while pieces:
        slot, pieces = pieces[0], pieces[1:]
        if isinstance(slot, str):
            text += slot
        elif slot.kind == "article":
            text += "\0"  # settled below, when the next word stands
        elif slot.kind == "agree":
            text += agreeing(slot, said)
        else:
            ws = weights(slot, said)
            i = _pick(ws, rng)
            forms, form = entries(source(slot, said))[i], form_of(slot, said)
            log_prob += math.log(ws[i] / sum(ws))
            pieces, said = forms[form] + pieces, remember(slot, i, said)
    text = re.sub(r"\0 (\w+)", lambda m: f"{article(m[1])} {m[1]}", text)
    return text, log_prob


# ------------------------------------------------------------------------------------------------
# 4. The parser
# ------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """What the parser says of one story; `parse_story` tells how it judges."""

    spelled: bool
    grammatical: bool
    remembers: bool | None
    counts: bool | None
    log_prob: float  # nats; -inf for a story that the sampler cannot write
    shape: str | None


def _walk(text, at, pieces, said, log_prob, remembers, counts):
    """Yield (log_prob, remembers, counts) for each way in which pieces spell text[at:].

    Slips of memory and of counting are followed, too, with log_prob = -inf; slips of agreement
    are not. Agreement looks at what was named first, and at numbers as they are written.
    """
    while pieces:
        slot, pieces = pieces[0], pieces[1:]
        if isinstance(slot, str) or slot.kind in ("agree", "article"):
            if isinstance(slot, str):
                literal = slot
            elif slot.kind == "agree":
                literal = agreeing(slot, said)
            else:
                literal = article("".join(re.findall(r" (\w+)", text[at : at + 30])[:1]))
            if not text.startswith(literal, at):
                return
            at += len(literal)
            continue
        ws, form, total = None, form_of(slot, said), 0
        for i, forms in enumerate(entries(source(slot, said))):
            new = forms[form]
            if new and isinstance(new[0], str) and not text.startswith(new[0], at):
                continue
            if ws is None:
                ws = weights(slot, said)
                total = sum(ws)
            ok, m, c = ws[i] > 0, remembers, counts
            if slot.kind == "result" or (slot.kind == "number" and not ok):
                c = ok and c is not False
            if slot.kind == "recall" or (slot.kind == "draw" and not ok):
                m = ok and m is not False
            lp = log_prob + math.log(ws[i] / total) if ok else -math.inf
            yield from _walk(text, at, new + pieces, remember(slot, i, said), lp, m, c)
        return
    if at == len(text):
        yield log_prob, remembers, counts


def derivations(text: str) -> list:
    """Every derivation of a story: [(shape, log_prob, remembers, counts), …], slips included."""
    found = []
    for name, (p, pieces) in shapes().items():
        for d in _walk(text, 0, pieces, {"drawn": ()}, math.log(p), None, None):
            found.append((name, *d))
    return found


class AmbiguousStory(Exception):
    """A story has two correct derivations: the grammar has a fault."""


WORD = r"[A-Za-z]+(?:'(?!s\b)[a-z]+)?|\d+"  # a possessive 's is looked at by itself


@cache
def lexicon() -> frozenset:
    """Every word of the grammar, as it is written there."""
    raw = [t for _, t in SHAPES.values()] + list(FORMS.values()) + ["a an"]
    for entry in LISTS.values():
        raw += entry if isinstance(entry, list) else [entry]
    # A slot may be followed by 's, which is no word of its own.
    text = re.sub(r"\{[^}]*\}('s)?", " ", " | ".join(raw))
    people = re.compile(r"/(he|she)\b")
    return frozenset(re.findall(WORD, people.sub("", text).replace("'s", ""))) | {"he", "she"}


def is_spelled(text: str) -> bool:
    """Whether a text has words, each of them in the lexicon, and no strange characters.

    A word may start with a capital at will ("Apple"), but a name must ("tom" is misspelled).
    """
    words = re.findall(WORD, text.replace("'s", ""))
    marks = re.sub(WORD, "", text.replace("'s", ""))
    known = lexicon()
    ok = all(w in known or w[0].lower() + w[1:] in known for w in words)
    return bool(words) and ok and set(marks) <= set(" .,!?\"'")


def parse_story(text: str) -> Verdict:
    """Take a story apart (without its newline; one at the end is ignored).

    spelled      every word stands in the lexicon and every other character in the corpus's
                 punctuation; the empty story is not spelled
    grammatical  spelled, and a whole story of one of the shapes in which all words agree. Slips of
                 memory and counting are let pass: a word that should be said again may be any word
                 of its list, a result any number. He and she agree with the one named first,
                 never with a wrong name that stands in for it; plurals and is/are agree with the
                 number that is written, even if it is the wrong one.
    remembers    grammatical, and all that is said again is what was said; what should be new (a
                 friend's name, the second thing) is new. None if nothing has to be remembered.
    counts       grammatical, and every result and every number drawn is possible ("had three, ate
                 five" is not). None if nothing is counted.
    log_prob     in nats; finite exactly if all of these hold (None counts as holding).
    shape        name of the shape, None if not grammatical

    If a text with slips can be read in several ways, the reading with the fewest failed skills
    counts. Raises TypeError if text is no str, AmbiguousStory if two readings are correct.

    >>> parse_story("I love rian.").spelled
    False
    """
    if not isinstance(text, str):
        raise TypeError(f"a story is a str, not {type(text).__name__}")
    text = text.removesuffix("\n")
    if not is_spelled(text):
        return Verdict(False, False, False, False, -math.inf, None)
    found = derivations(text)
    if not found:
        return Verdict(True, False, False, False, -math.inf, None)
    if sum(d[1] > -math.inf for d in found) > 1:
        raise AmbiguousStory(f"two correct derivations: {text!r}")
    shape, log_prob, remembers, counts = max(
        found, key=lambda d: (d[1], (d[2] is not False) + (d[3] is not False), d[2] is not False)
    )
    return Verdict(True, True, remembers, counts, log_prob, shape)


def score_stories(texts) -> dict:
    """Shares in [0, 1] of complete stories that are spelled, grammatical, remember and count.

    "remembers" and "counts" are shares of the stories to which the skill applies. A story that is
    not grammatical fails both, as its shape, and so what it asks for, cannot be told. A share of
    nothing is nan. "n" is the number of stories given.
    """
    verdicts = [parse_story(t) for t in texts]
    scores = {}
    for skill in ("spelled", "grammatical", "remembers", "counts"):
        asked = [getattr(v, skill) for v in verdicts if getattr(v, skill) is not None]
        scores[skill] = sum(asked) / len(asked) if asked else math.nan
    return {**scores, "n": len(verdicts)}


def report(loss: float, floor: float, stories: list) -> None:
    """Print how a model did: its loss beside the floor, its stories' skills, three of them."""
    print(f"\nStories it never saw cost it {loss:.3f} nats per character. The floor, which no\n"
          f"model beats on average, is {floor:.3f}; this ends {loss / floor - 1:.0%} above it.")
    print(f"\nOf {len(stories)} stories that it writes at temperature 0.7:")
    scores = score_stories(stories)
    for skill, meaning in [("spelled", "have only words of the corpus"),
                           ("grammatical", "are whole stories without a grammar mistake"),
                           ("remembers", "remember, of those that should or are ungrammatical"),
                           ("counts", "count right, of those that should or are ungrammatical")]:
        print(f"  {scores[skill]:4.0%} {meaning}")
    print("\nThree of them:")
    for story in stories[:3]:
        print(textwrap.fill(story, 92, initial_indent="  ", subsequent_indent="    "))


# ------------------------------------------------------------------------------------------------
# 5. The corpus
# ------------------------------------------------------------------------------------------------


def make_corpus(n_stories: int = N_STORIES, seed: int = SEED) -> tuple[str, list]:
    """The corpus, each story followed by a newline, and its stories' log-probabilities (nats).

    A story that was told before is drawn again: none is in the corpus twice.
    """
    rng = random.Random(seed)
    stories = {}
    while len(stories) < n_stories:
        text, log_prob = sample_story(rng)
        stories[text] = log_prob
    return "".join(text + "\n" for text in stories), list(stories.values())


def split_stories(text: str) -> tuple[str, str]:
    """The first 90 % of the stories for training, the rest for validation; no story is cut.

    >>> split_stories("a\\n" * 10) == ("a\\n" * 9, "a\\n")
    True
    """
    stories = re.findall(r"[^\n]*\n|[^\n]+", text)
    cut = len(stories) * 9 // 10
    return "".join(stories[:cut]), "".join(stories[cut:])


def floor(text: str) -> float:
    """Nats per character, newlines included, that a reader who knows the grammar pays on a text.

    Infinite if any of the stories is not one that the sampler can write. ValueError if empty.
    """
    if not text:
        raise ValueError("the floor of an empty text is not defined; give at least one story")
    stories = text.removesuffix("\n").split("\n")
    return -sum(parse_story(story).log_prob for story in stories) / len(text)


FUNCTION_WORDS = frozenset(
    """a an and all about after already alone am any are be at away back before behind but by can
    could did do don't down early every for from give had has have he her him his how i in
    instead is it last let long may me more much my near no not nobody nothing now of off
    often oh on one only out over own please round s she so still such than that the their
    them then there they this to together too under until up us was we well were what when
    where which while who whose why will with would yes you your yours yourself something
    another enough because""".split()
)


def content_words() -> frozenset:
    """The words that carry the stories: the lexicon without function words, numbers and names."""
    names = {forms[0][0].lower() for forms in entries("NAME")}
    words = frozenset(w.lower() for w in lexicon() if not w.isdigit())
    return words - FUNCTION_WORDS - set(NUMBERS) - names


def facts(text: str) -> dict:
    """What the data card states of a corpus; floors are in nats and in bits per character."""
    train, val = split_stories(text)
    stories = text.removesuffix("\n").split("\n")
    result = {
        "stories": len(stories),
        "characters": len(text),
        "distinct characters": len(set(text)),
        "content words": len(content_words()),
        "shapes": len(SHAPES),
        "mean length": round(len(text) / len(stories) - 1, 1),
        "longest": max(map(len, stories)),
        "begin with I love": sum(s.startswith("I love ") for s in stories),
    }
    for name, part in (("train", train), ("validation", val)):
        nats = floor(part)
        result[f"{name} stories"] = part.count("\n")
        result[f"{name} characters"] = len(part)
        result[f"{name} floor, nats per character"] = f"{nats:.4f}"
        result[f"{name} floor, bits per character"] = f"{nats / math.log(2):.4f}"
    result["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return result


def main(argv=None) -> int:
    """Write the corpus (or --check the file on disk) and print its facts; 0 if all is well."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--check", action="store_true", help="compare only, write nothing")
    check = options.parse_args(argv).check
    text, _ = make_corpus()
    if not check:
        part = PATH.with_suffix(".part")  # written whole, then renamed: never half a corpus
        part.write_bytes(text.encode())
        os.replace(part, PATH)
    elif not PATH.exists() or PATH.read_bytes() != text.encode():
        print(f"{PATH.name} differs from what the grammar writes; run this script to write it anew")
        return 1
    for name, fact in facts(text).items():
        print(f"{name}: {fact}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
