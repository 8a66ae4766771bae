"""Page 01: the tokenizer, the corpora, and files that are never half written."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygpt_helpers as helpers
from tinygpt_helpers import TOKENIZERS, CharTokenizer, load_corpus, split_corpus, write_atomically

ROOT = Path(__file__).resolve().parent.parent


def test_one_id_for_each_distinct_character():
    tok = CharTokenizer("hello")
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
    for same in (tok, CharTokenizer.load(path), TOKENIZERS[state["kind"]].from_state(state)):
        assert same.vocab_size == len(set(text)) and same.state == state
        assert same.encode(text) == tok.encode(text)
        assert same.decode(same.encode(text)) == text
        assert same.encode(same.decode(ids)) == ids


def test_what_the_vocabulary_lacks_is_named():
    tok = CharTokenizer("abc")
    with pytest.raises(ValueError, match=r"'x' \(position 2\).*vocabulary of 3") as caught:
        tok.encode("abxé")
    assert "é" not in str(caught.value)  # the first one only
    for bad in (3, -1, 99):
        with pytest.raises(ValueError, match=rf"id {bad} .*0\.\.2"):
            tok.decode([0, bad])
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


def test_any_text_file_is_a_corpus(tmp_path, monkeypatch):
    path = tmp_path / "my own.txt"
    path.write_bytes("\ufeffÄpfel\r\nund\rπ\n".encode())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in (path, str(path), "~/my own.txt"):
        assert load_corpus(name) == "Äpfel\nund\nπ\n"
    tiny = ROOT / "data" / "tiny_corpus.txt"
    assert load_corpus() == load_corpus("tiny") == tiny.read_text("utf-8")


@pytest.mark.parametrize(("content", "message"), [
    (b"", "empty"), (b"\n  \r\n", "empty"), (b"\xef\xbb\xbf", "empty"),
    ("naïve".encode("latin-1"), "not UTF-8.*byte 0xef in position 2"),
    ("ab".encode("utf-16"), "not UTF-8.*byte 0xff in position 0")])
def test_a_text_that_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "old.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"old.txt.* {message}"):
        load_corpus(tmp_path / "old.txt")
    for name in ("nowhere.txt", ""):  # "": the folder itself
        with pytest.raises(FileNotFoundError, match=f"{name}'.*tiny.*shakespeare"):
            load_corpus(tmp_path / name)


@settings(deadline=None, max_examples=40)
@given(st.text(alphabet="ab \n", max_size=80), st.booleans())
def test_a_split_loses_nothing_and_cuts_no_line(text, by_line):
    train_text, val_text = split_corpus(text, by_line)
    assert train_text + val_text == text
    whole = text.splitlines(keepends=True) if by_line else text
    assert train_text == "".join(whole[: int(0.9 * len(whole))])


def test_shakespeare_is_fetched_once_and_checked(monkeypatch, tmp_path):
    """A short file stands in for the published one."""
    data, text = b"First Citizen:\r\nSpeak!\n", "First Citizen:\nSpeak!\n"
    published, copy = tmp_path / "published.txt", tmp_path / "new" / "cache" / "tinyshakespeare.txt"
    monkeypatch.setattr(helpers, "PLAYS", published.as_uri())
    monkeypatch.setattr(helpers, "PLAYS_HASH", hashlib.sha256(data).hexdigest())
    monkeypatch.setenv("TINYGPT_CACHE", str(copy.parent))
    message = f"{published.as_uri()}.*put the file at"
    for wrong in (None, data[:-1], data + b"more"):  # no network; cut off; changed by somebody
        if wrong:
            published.write_bytes(wrong)
        with pytest.raises(ConnectionError, match=message) as caught:
            load_corpus("shakespeare")
        assert os.listdir(copy.parent) == []  # nothing that the next call would take for the text
    Path(str(caught.value).partition("put the file at ")[2]).write_bytes(data)
    assert load_corpus("shakespeare") == text
    published.write_bytes(data)
    for damaged in (data[:-1], data + b"more"):
        copy.write_bytes(damaged)
        assert load_corpus("shakespeare") == text
        assert copy.read_bytes() == data and os.listdir(copy.parent) == [copy.name]
    published.unlink()
    assert load_corpus("shakespeare") == text  # without a network


def test_shakespeare_is_the_published_text(monkeypatch, tmp_path):
    cache = Path(os.environ.get("TINYGPT_CACHE", Path.home() / ".cache" / "tinygpt"))
    places = [folder / "tinyshakespeare.txt" for folder in (cache, ROOT.parent / "shared" / "data")]
    found = [path for path in places if path.is_file()]
    if not found:
        pytest.skip("Tiny Shakespeare is not on this machine; load_corpus('shakespeare') gets it")
    shutil.copy(found[0], tmp_path)
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path))
    monkeypatch.setattr(helpers, "PLAYS", (tmp_path / "no network").as_uri())
    text = load_corpus("shakespeare")
    assert len(text) == 1_115_394 and text.startswith("First Citizen:\nBefore we proceed")
    assert CharTokenizer(text).vocab_size == 65
    assert len(split_corpus(text)[0]) == 1_003_854


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, step):
    path = tmp_path / "a" / "b" / "file"
    for place, data in [(path, b"one"), (str(path), b"two")]:
        write_atomically(place, data)
        assert path.read_bytes() == data and os.listdir(path.parent) == ["file"]
    monkeypatch.setattr(os, step, Mock(side_effect=OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"two" and os.listdir(path.parent) == ["file"]
