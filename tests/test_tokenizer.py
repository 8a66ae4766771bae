"""Page 01: the tokenizer, the corpora, the download, and files that are never half written."""

import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinygpt_helpers as helpers
from tinygpt_helpers import CharTokenizer, fetch, load_corpus, split_corpus, write_atomically

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------- CharTokenizer


def test_one_id_for_each_distinct_character():
    tok = CharTokenizer("hello")
    assert tok.vocab_size == 4
    assert tok.itos == {0: "e", 1: "h", 2: "l", 3: "o"}
    assert tok.stoi == {"e": 0, "h": 1, "l": 2, "o": 3}
    ids = tok.encode("hole")
    assert ids == [1, 3, 2, 0] and all(type(i) is int for i in ids)
    assert tok.decode([2, 0]) == "le"
    assert tok.encode("") == [] and tok.decode([]) == ""


@settings(deadline=None, max_examples=60)
@given(st.text(min_size=1), st.data())
def test_decode_undoes_encode(text, data):
    tok = CharTokenizer(text)
    assert tok.vocab_size == len(set(text)) == len(tok.stoi) == len(tok.itos)
    assert tok.decode(tok.encode(text)) == text
    ids = data.draw(st.lists(st.integers(0, tok.vocab_size - 1)))
    assert tok.encode(tok.decode(ids)) == ids
    assert sorted(tok.itos) == list(range(tok.vocab_size))
    assert all(tok.stoi[tok.itos[i]] == i for i in tok.itos)


@settings(deadline=None, max_examples=30)
@given(st.text(min_size=1))
def test_a_saved_tokenizer_is_the_same(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        CharTokenizer(text).save(path)
        json.loads(path.read_bytes())  # plain JSON, whatever the characters
        again = CharTokenizer.load(path)
    assert again.stoi == CharTokenizer(text).stoi and again.itos == CharTokenizer(text).itos
    assert again.encode(text) == CharTokenizer(text).encode(text)


def test_an_unknown_character_is_named():
    tok = CharTokenizer("abc")
    with pytest.raises(ValueError) as caught:
        tok.encode("abxé")
    message = str(caught.value)
    assert "'x'" in message and "2" in message and "vocabulary of 3" in message
    assert "é" not in message  # the first one only


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
    path = tmp_path / "tok.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="tok.json"):
        CharTokenizer.load(path)


def test_a_missing_tokenizer_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.json"):
        CharTokenizer.load(tmp_path / "none.json")


# ---------------------------------------------------------------- load_corpus, split_corpus


def test_the_tiny_corpus_comes_with_the_course():
    text = load_corpus()
    assert text == load_corpus("tiny") == (ROOT / "data" / "tiny_corpus.txt").read_text("utf-8")


def test_any_text_file_is_a_corpus(tmp_path, monkeypatch):
    path = tmp_path / "my own.txt"
    path.write_bytes("\ufeffÄpfel\r\nund\rπ\n".encode())
    assert load_corpus(path) == load_corpus(str(path)) == "Äpfel\nund\nπ\n"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert load_corpus("~/my own.txt") == "Äpfel\nund\nπ\n"


def test_a_missing_text_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt.*'tiny'.*'shakespeare'"):
        load_corpus(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError):
        load_corpus(tmp_path)  # a folder


@pytest.mark.parametrize("content", [b"", b"\n  \r\n", b"\xef\xbb\xbf"])
def test_an_empty_text_file_is_named(tmp_path, content):
    path = tmp_path / "blank.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="blank.txt.* empty"):
        load_corpus(path)


@pytest.mark.parametrize(
    ("content", "byte", "position"),
    [("naïve".encode("latin-1"), "0xef", 2), ("ab".encode("utf-16"), "0xff", 0)],
)
def test_a_wrong_encoding_is_named(tmp_path, content, byte, position):
    path = tmp_path / "old.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"old.txt.* UTF-8: byte {byte} at position {position}"):
        load_corpus(path)


@settings(deadline=None, max_examples=40)
@given(st.text(alphabet="ab \n", max_size=80))
def test_a_split_loses_nothing(text):
    for by_line in (False, True):
        train_text, val_text = split_corpus(text, by_line)
        assert train_text + val_text == text
    assert len(split_corpus(text)[0]) == int(0.9 * len(text))


def test_no_line_is_in_both_parts():
    train_text, val_text = split_corpus("".join(f"story {i}\n" for i in range(20)), by_line=True)
    assert len(train_text.splitlines()) == 18 and val_text == "story 18\nstory 19\n"


# ---------------------------------------------------------------- fetch, from a server of our own

BODY = bytes(range(256)) * 20
SHA = hashlib.sha256(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted, start = self.server, self.headers.get("Range"), 0
        server.asked.append(wanted)
        if server.status != 200:
            self.send_error(server.status)
            return
        if wanted and server.ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(server.body):
                self.send_error(416)
                return
        rest = server.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        rest = rest[: server.cut]  # less than was promised: the connection breaks
        self.wfile.write(rest)
        server.sent.append(len(rest))

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server with `body`; ranges: knows Range; cut: breaks off after so many bytes."""
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body, server.ranges, server.cut, server.status = BODY, True, None, 200
        server.asked, server.sent = [], []
        server.url = f"http://127.0.0.1:{server.server_port}/file"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield server
        server.shutdown()


def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(server, path):
    return fetch(server.url, path, len(BODY), SHA)


def test_a_file_is_fetched_once(server, tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    assert get(server, path) == BODY == path.read_bytes()
    assert get(server, path) == BODY
    assert server.asked == [None]
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_that_was_cut_off_goes_on(server, tmp_path, ranges):
    path, server.ranges, server.cut = tmp_path / "file", ranges, 1000
    with pytest.raises(ConnectionError, match="1,000 of 5,120.*run it again"):
        get(server, path)
    assert not path.exists()
    server.cut = None
    assert get(server, path) == BODY == path.read_bytes()
    assert server.asked == [None, "bytes=1000-"]
    assert server.sent == [1000, len(BODY) - 1000 if ranges else len(BODY)]
    assert os.listdir(tmp_path) == ["file"]


def test_a_download_that_is_cut_off_twice_goes_on(server, tmp_path):
    server.cut = 2000
    for _ in range(2):
        with pytest.raises(ConnectionError):
            get(server, tmp_path / "file")
    assert get(server, tmp_path / "file") == BODY
    assert server.asked == [None, "bytes=2000-", "bytes=4000-"]


@pytest.mark.parametrize("left", [BODY, BODY[:-1] + b"x", BODY + b"more"])
def test_what_an_interrupted_run_left_does_no_harm(server, tmp_path, left):
    """All bytes were there, but the process ended before the file had its name."""
    (tmp_path / "file.part").write_bytes(left)
    for _ in range(2):  # a wrong part may cost one try, and is gone then
        try:
            assert get(server, tmp_path / "file") == BODY
            break
        except ValueError:
            pass
    assert (tmp_path / "file").read_bytes() == BODY
    assert os.listdir(tmp_path) == ["file"]


def test_a_damaged_copy_is_replaced(server, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(BODY[:-1] + b"x")
    assert get(server, path) == BODY == path.read_bytes()


@pytest.mark.parametrize("wrong", [BODY[:-1] + b"x", BODY + b"x"])
def test_wrong_content_is_refused(server, tmp_path, wrong):
    path, server.body = tmp_path / "file", wrong
    with pytest.raises(ValueError, match="not the 5,120 published"):
        get(server, path)
    assert os.listdir(tmp_path) == []  # nothing that the next try would build on
    server.body = BODY
    assert get(server, path) == BODY


def test_a_server_that_has_no_such_file(server, tmp_path):
    server.status = 404
    with pytest.raises(ConnectionError, match="404"):
        get(server, tmp_path / "file")


def test_without_a_network_the_error_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "*")
    url = f"http://127.0.0.1:{closed_port()}/file"
    with pytest.raises(ConnectionError, match="again when there is a network, or put") as caught:
        fetch(url, tmp_path / "file", len(BODY), SHA)
    assert str(tmp_path / "file") in str(caught.value) and url in str(caught.value)
    (tmp_path / "file").write_bytes(BODY)  # what it said to do
    assert fetch(url, tmp_path / "file", len(BODY), SHA) == BODY


def test_shakespeare_comes_from_the_cache_when_offline(server, monkeypatch, tmp_path):
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path))
    server.body = b"First Citizen:\r\nSpeak!\n"
    published = dict(url=server.url, size=23, sha256=hashlib.sha256(server.body).hexdigest())
    monkeypatch.setattr(helpers, "SHAKESPEARE", published)
    assert load_corpus("shakespeare") == "First Citizen:\nSpeak!\n"
    published["url"] = f"http://127.0.0.1:{closed_port()}/file"
    assert load_corpus("shakespeare") == "First Citizen:\nSpeak!\n"
    assert server.asked == [None]


def test_shakespeare_is_the_published_text(monkeypatch, tmp_path):
    cache = Path(os.environ.get("TINYGPT_CACHE", Path.home() / ".cache" / "tinygpt"))
    beside = ROOT.parent / "shared" / "data"
    found = [f for f in (cache, beside) if (f / "tinyshakespeare.txt").is_file()]
    if not found:
        pytest.skip("Tiny Shakespeare is not on this machine; load_corpus('shakespeare') gets it")
    shutil.copy(found[0] / "tinyshakespeare.txt", tmp_path)
    monkeypatch.setenv("TINYGPT_CACHE", str(tmp_path))
    offline = f"http://127.0.0.1:{closed_port()}/file"
    monkeypatch.setattr(helpers, "SHAKESPEARE", helpers.SHAKESPEARE | {"url": offline})
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
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_the_name_moves_only_to_bytes_on_the_disk(tmp_path, monkeypatch):
    path, seen = tmp_path / "file", []
    path.write_bytes(b"old")
    fsync, replace = os.fsync, os.replace

    def see_fsync(number):
        seen.append(("fsync", os.fstat(number).st_size, path.read_bytes()))
        fsync(number)

    def see_replace(source, target):
        seen.append(("replace", Path(source).read_bytes(), path.read_bytes()))
        assert Path(source).parent == path.parent  # a rename is atomic within one file system only
        replace(source, target)

    monkeypatch.setattr(os, "fsync", see_fsync)
    monkeypatch.setattr(os, "replace", see_replace)
    write_atomically(path, b"newer")
    assert seen == [("fsync", 5, b"old"), ("replace", b"newer", b"old")]
    assert path.read_bytes() == b"newer"
