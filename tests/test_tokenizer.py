"""Page 01: the tokenizer, the corpora, and files that are never half written."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygpt_helpers as helpers
from tinygpt_helpers import TOKENIZERS, CharTokenizer, load_corpus, split_corpus, write_atomically

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------- CharTokenizer


def test_one_id_for_each_distinct_character():
    tok = CharTokenizer("hello")
    assert tok.vocab_size == 4
    assert tok.itos == {0: "e", 1: "h", 2: "l", 3: "o"}
    assert tok.stoi == {"e": 0, "h": 1, "l": 2, "o": 3}
    ids = tok.encode("hole")
    assert ids == [1, 3, 2, 0] and all(type(i) is int for i in ids)
    assert tok.decode([2, 0]) == tok.decode(torch.tensor([2, 0])) == "le"
    assert tok.encode("") == [] and tok.decode([]) == ""


@settings(deadline=None, max_examples=60)
@given(st.text(min_size=1), st.data())
def test_decode_undoes_encode_before_and_after_saving(tmp_path_factory, text, data):
    tok, path = CharTokenizer(text), tmp_path_factory.mktemp("saved") / "tok.json"
    ids = data.draw(st.lists(st.integers(0, tok.vocab_size - 1)))
    tok.save(path)
    state = json.loads(json.dumps(tok.state))  # plain values, whatever the characters
    assert json.loads(path.read_bytes()) == state
    for same in (tok, CharTokenizer.load(path), TOKENIZERS[state["kind"]].from_state(state)):
        assert same.vocab_size == len(set(text)) and same.state == state
        assert same.encode(text) == tok.encode(text)
        assert same.decode(same.encode(text)) == text
        assert same.encode(same.decode(ids)) == ids


def test_an_unknown_character_is_named():
    with pytest.raises(ValueError, match=r"'x' \(position 2\).*vocabulary of 3") as caught:
        CharTokenizer("abc").encode("abxé")
    assert "é" not in str(caught.value)  # the first one only


@pytest.mark.parametrize("bad", [3, -1, 99])
def test_an_unknown_id_is_named(bad):
    with pytest.raises(ValueError, match=rf"id {bad} .*0\.\.2"):
        CharTokenizer("abc").decode([0, bad])


def test_an_empty_text_has_no_vocabulary():
    with pytest.raises(ValueError, match="empty"):
        CharTokenizer("")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b'{"words": "ab"}', b"7",
                                     b'{"characters": 5}', b'{"characters": ["ab", "c"]}',
                                     b'{"characters": "ba"}', b'{"characters": "aab"}'])
def test_a_damaged_tokenizer_file_is_named(tmp_path, content):
    (tmp_path / "tok.json").write_bytes(content)
    with pytest.raises(ValueError, match="tok.json"):
        CharTokenizer.load(tmp_path / "tok.json")
    with pytest.raises(FileNotFoundError, match="none.json"):
        CharTokenizer.load(tmp_path / "none.json")


# ---------------------------------------------------------------- load_corpus, split_corpus


def test_the_tiny_corpus_comes_with_the_course():
    text = load_corpus()
    assert text == load_corpus("tiny") == (ROOT / "data" / "tiny_corpus.txt").read_text("utf-8")


def test_any_text_file_is_a_corpus(tmp_path, monkeypatch):
    path = tmp_path / "my own.txt"
    path.write_bytes("\ufeffÄpfel\r\nund\rπ\n".encode())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in (path, str(path), "~/my own.txt"):
        assert load_corpus(name) == "Äpfel\nund\nπ\n"


@pytest.mark.parametrize("name", ["nowhere.txt", ""])  # "": the folder itself
def test_a_missing_text_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name}'.*'tiny'.*'shakespeare'"):
        load_corpus(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"\n  \r\n", "empty"), (b"\xef\xbb\xbf", "empty"),
     ("naïve".encode("latin-1"), "UTF-8: byte 0xef at position 2"),
     ("ab".encode("utf-16"), "UTF-8: byte 0xff at position 0")],
)
def test_a_text_that_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "old.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"old.txt.* {message}"):
        load_corpus(tmp_path / "old.txt")


@settings(deadline=None, max_examples=40)
@given(st.text(alphabet="ab \n", max_size=80), st.booleans())
def test_a_split_loses_nothing(text, by_line):
    train_text, val_text = split_corpus(text, by_line)
    assert train_text + val_text == text
    assert by_line or len(train_text) == int(0.9 * len(text))


def test_no_line_is_in_both_parts():
    train_text, val_text = split_corpus("".join(f"story {i}\n" for i in range(20)), by_line=True)
    assert len(train_text.splitlines()) == 18 and val_text == "story 18\nstory 19\n"


# ---------------------------------------------------------------- Tiny Shakespeare


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A short file in place of the published one, and an empty cache beside it."""
    source = tmp_path / "published.txt"
    source.write_bytes(b"First Citizen:\r\nSpeak!\n")
    monkeypatch.setattr(helpers, "SHAKESPEARE", source.as_uri())
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(helpers, "SHAKESPEARE_HASH", sha256)
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path / "new" / "cache"))
    return source


def test_shakespeare_is_fetched_once(published, tmp_path):
    assert load_corpus("shakespeare") == "First Citizen:\nSpeak!\n"
    published.unlink()  # no network any more
    assert load_corpus("shakespeare") == "First Citizen:\nSpeak!\n"
    assert os.listdir(tmp_path / "new" / "cache") == ["tinyshakespeare.txt"]


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"more"])
def test_a_wrong_shakespeare_is_refused_and_replaced(published, tmp_path, change):
    data = published.read_bytes()
    published.write_bytes(change(data))  # cut off, or changed by somebody
    with pytest.raises(ConnectionError, match="published.txt"):
        load_corpus("shakespeare")
    cache = tmp_path / "new" / "cache"
    assert os.listdir(cache) == []  # nothing that the next call would take for the text
    published.write_bytes(data)
    (cache / "tinyshakespeare.txt").write_bytes(change(data))  # a damaged copy
    assert load_corpus("shakespeare") == "First Citizen:\nSpeak!\n"
    assert (cache / "tinyshakespeare.txt").read_bytes() == data


def test_without_a_network_the_error_says_what_to_do(published, tmp_path):
    elsewhere = published.rename(tmp_path / "from_a_friend.txt")
    with pytest.raises(ConnectionError, match=f"{published.as_uri()}.*put the file at") as caught:
        load_corpus("shakespeare")
    shutil.copy(elsewhere, str(caught.value).partition("put the file at ")[2])
    assert load_corpus("shakespeare") == "First Citizen:\nSpeak!\n"


def test_shakespeare_is_the_published_text(monkeypatch, tmp_path):
    cache = Path(os.environ.get("TINYGPT_CACHE", Path.home() / ".cache" / "tinygpt"))
    found = [folder / "tinyshakespeare.txt" for folder in (cache, ROOT.parent / "shared" / "data")
             if (folder / "tinyshakespeare.txt").is_file()]
    if not found:
        pytest.skip("Tiny Shakespeare is not on this machine; load_corpus('shakespeare') gets it")
    shutil.copy(found[0], tmp_path)
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path))
    monkeypatch.setattr(helpers, "SHAKESPEARE", (tmp_path / "no network").as_uri())
    text = load_corpus("shakespeare")
    assert len(text) == 1_115_394 and text.startswith("First Citizen:\nBefore we proceed")
    assert CharTokenizer(text).vocab_size == 65
    assert len(split_corpus(text)[0]) == 1_003_854


# ---------------------------------------------------------------- write_atomically


def test_a_file_is_written_whole(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write_atomically(path, b"one")
    assert path.read_bytes() == b"one"
    write_atomically(str(path), b"two")
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    def full(*arguments):
        raise OSError("no space left")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]
