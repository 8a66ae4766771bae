"""A page works wherever it is opened, and one setting holds the course's address."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import nbformat
import pages
import publish
import pytest
import yaml

pytestmark = pytest.mark.author
ROOT = Path(__file__).resolve().parent.parent
PAGE = "02_dataset.ipynb"
MODULE = f"{pages.MODULE}.py"
REPO, REF = publish.setting()


def copy_course(folder):
    """A copy of what a page needs, and of what the address is in."""
    for name in ("data", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__*", ".*"))
    for name in (MODULE, "pyproject.toml", "README.md", "CITATION.cff", ".gitattributes"):
        shutil.copy(ROOT / name, folder)
    return folder


def git(folder, *arguments):
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The course as a repository of git, in a path with a blank and an umlaut."""
    if not shutil.which("git"):
        pytest.skip("no git")
    folder = copy_course(tmp_path_factory.mktemp("on the web") / "kleiner Zähler")
    for command in ("init -q -b trunk", "add -A", "commit -q -m Course", f"tag {REF}"):
        git(folder, *command.split())
    return folder


@pytest.fixture
def alone(tmp_path):
    """A page alone in a folder, as on Colab."""
    folder = tmp_path / "my pages"
    folder.mkdir()
    shutil.copy(ROOT / "notebooks" / PAGE, folder)
    return folder


CELL = publish.SETUP.format(address=publish.address(""), ref=REF)
WHERE = f"""
import importlib.util
print(os.getcwd())
os.chdir(os.sep)  # what the set-up cell has set does not depend on the folder
print(importlib.util.find_spec({pages.MODULE!r}).origin)
"""


def set_up(folder, address=None, times=1, path=None):
    """Run the set-up cell in a fresh Python that starts in `folder`; return (its working folder,
    the module it would import), or the last line of what it says where it fails."""
    env = {k: v for k, v in os.environ.items() if k not in ("TINYGPT_COURSE", "PYTHONPATH")}
    env |= {k: str(v) for k, v in {"TINYGPT_COURSE": address, "PATH": path}.items() if v}
    env["TMPDIR"] = "/dev/shm"  # on another disk, where there is one: nothing is renamed across
    done = subprocess.run([sys.executable, "-c", (CELL + "\n") * times + WHERE], cwd=folder,
                          env=env, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        return done.stderr.splitlines()[-1]
    assert path or not done.stderr, "a learner should see no red text"
    return [Path(line) for line in done.stdout.splitlines()[-2:]]


def works_in(course):
    return [course / "notebooks", course / MODULE]


def test_each_page_has_the_set_up_cell_once_and_the_address_of_the_setting_is_everywhere():
    stale = [str(path.relative_to(ROOT)) for path, text in publish.texts(REPO, REF).items()
             if path.read_text(encoding="utf-8") != text]
    assert not stale, f"`make publish REPO={REPO} REF={REF}` writes {stale} anew"
    for page in map(pages.Page, pages.find_pages([])):
        assert page.code[0][1].source == publish.SETUP.format(
            address=publish.address(REPO), ref=REF), page.name
        others = [cell.source.partition('"""')[0] for _, cell in page.code[1:]]
        assert not any(re.search(r'TINYGPT_COURSE|sys\.path\.', text) for text in others), page.name
    lines = [line for line in CELL.splitlines() if line]
    assert len(lines) <= 12 and max(map(len, lines)) <= 88


@pytest.mark.parametrize("start", ["", "notebooks"])
def test_in_the_course_it_sets_the_path_and_fetches_nothing(repository, start):
    before = sorted(repository.iterdir())
    assert set_up(repository / start, "nowhere", times=2) == works_in(repository)
    assert sorted(repository.iterdir()) == before


def test_alone_it_fetches_the_course_once(repository, alone):
    address = repository.as_uri()
    assert set_up(alone, address, times=2) == works_in(alone / "tinygpt")
    assert {p.name for p in alone.iterdir()} == {PAGE, "tinygpt"}
    # A restarted kernel begins in the first folder again, and finds what is there.
    (alone / "tinygpt" / "mine.txt").touch()
    assert set_up(alone, "nowhere") == works_in(alone / "tinygpt")
    assert (alone / "tinygpt" / "mine.txt").exists()


def test_a_killed_attempt_leaves_no_half_course(repository, alone, tmp_path):
    """A git that is killed in the middle: it has written files, and cleans nothing up."""
    (tmp_path / "bin").mkdir()
    slow = tmp_path / "bin" / "git"
    slow.write_text(f'#!/bin/sh\nfor last; do :; done\nmkdir "$last"\ntouch "$last/{MODULE}"\n'
                    "kill -9 $PPID\n")
    slow.chmod(0o755)
    path = f"{slow.parent}{os.pathsep}{os.environ['PATH']}"
    assert "Go online" in set_up(alone, repository.as_uri(), path=path)
    assert not (alone / "tinygpt").exists()
    assert set_up(alone, repository.as_uri()) == works_in(alone / "tinygpt")
    assert (alone / "tinygpt" / MODULE).stat().st_size


class GitHub(SimpleHTTPRequestHandler):
    """An archive is on another server than its address says."""
    def do_GET(self):
        if not self.path.startswith("/archive/"):
            return super().do_GET()
        self.send_response(302)
        self.send_header("Location", self.path.replace("/archive/", "/moved/"))
        self.end_headers()

    def log_message(self, *words):
        pass


def test_without_git_it_takes_the_archive(alone, tmp_path):
    programs = {name: shutil.which(name) for name in ("sh", "curl", "tar", "gzip")}
    if not all(programs.values()):
        pytest.skip(f"not here: {[name for name in programs if not programs[name]]}")
    course = copy_course(tmp_path / f"tinygpt-{REF}")
    (tmp_path / "moved").mkdir()
    shutil.make_archive(tmp_path / "moved" / REF, "gztar", tmp_path, course.name)
    (tmp_path / "bin").mkdir()
    for name, place in programs.items():
        (tmp_path / "bin" / name).symlink_to(place)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(GitHub, directory=tmp_path))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        place = set_up(alone, f"http://127.0.0.1:{server.server_port}", path=tmp_path / "bin")
    finally:
        server.shutdown()
        server.server_close()
    assert place == works_in(alone / "tinygpt")
    assert {p.name for p in alone.iterdir()} == {PAGE, "tinygpt"}
    assert not (alone / "tinygpt" / ".git").exists()


@pytest.mark.parametrize("address", [None, "file:///no/such/course", "https://127.0.0.1:9/course"],
                         ids=["unpublished", "wrong", "offline"])
def test_without_the_course_it_says_what_to_do_and_a_later_try_works(repository, alone, address):
    said = set_up(alone, address)
    assert "Go online, or download the whole course" in said
    assert not (alone / "tinygpt").exists()
    assert set_up(alone, repository.as_uri()) == works_in(alone / "tinygpt")


def test_a_page_alone_in_a_kernel(repository, alone, monkeypatch):
    """First offline, with few words; then online, up to its first numbers."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    nb = nbformat.read(alone / PAGE, as_version=4)
    nb.cells = [cell for cell in nb.cells if cell.cell_type == "code"][:3]
    expected = pages.output_text(*nb.cells[2].outputs)
    monkeypatch.setenv("TINYGPT_COURSE", "file:///no/such/course")
    client = NotebookClient(nb, timeout=60, resources={"metadata": {"path": str(alone)}})
    with client.setup_kernel():
        with pytest.raises(CellExecutionError, match="Go online"):
            client.execute_cell(nb.cells[0], 0)
        error = pages.output_text(*nb.cells[0].outputs)
        assert len(error.splitlines()) <= 20, error
        again = f"import os; os.environ['TINYGPT_COURSE'] = {repository.as_uri()!r}"
        nb.cells.append(nbformat.v4.new_code_cell(again))
        for k in (3, 0, 1, 2):
            client.execute_cell(nb.cells[k], k)
    assert pages.output_text(*nb.cells[2].outputs) == expected and "training:" in expected


def test_a_page_without_the_set_up_cell_gets_it(tmp_path):
    page = pages.Page(ROOT / "notebooks" / PAGE)
    whole = [(cell.id, cell.source) for cell in page.cells]
    page.nb.cells = [cell for cell in page.cells if cell.id not in publish.IDS]
    nbformat.write(page.nb, tmp_path / PAGE)
    written = nbformat.reads(publish.page_text(tmp_path / PAGE, REPO, REF), as_version=4)
    assert [(cell.id, cell.source) for cell in written.cells] == whole


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_publishing_goes_there_and_back(tmp_path):
    course = copy_course(tmp_path / "course")
    at_first = everything(course)
    publish.main(["--repo=ada/tiny-course"], course)
    once = everything(course)
    publish.main(["--repo=grace/gpt.2", "--ref=v1.0"], course)
    second = everything(course)
    changed = {path.name for path in once if once[path] != second[path]}
    assert changed == {"pyproject.toml", "README.md", "CITATION.cff",
                       *(path.name for path in pages.find_pages([]))}
    assert not any(b"ada/tiny" in data for data in second.values())
    text = b"\n".join(second.values()).decode("utf-8", errors="replace")
    n = len(pages.find_pages([]))
    for address, times in {
        "https://colab.research.google.com/github/grace/gpt.2/blob/v1.0/notebooks/": n + 1,
        "https://www.kaggle.com/kernels/welcome?src=https://github.com/grace/gpt.2/blob/v1.0/": 1,
        "https://mybinder.org/v2/gh/grace/gpt.2/v1.0?labpath=notebooks%2F00_start_here.ipynb": 1,
        "https://codespaces.new/grace/gpt.2": 1, '"https://github.com/grace/gpt.2"': 1,
        '\\"https://github.com/grace/gpt.2\\"': n, "--depth=1 -b v1.0": n, "archive/v1.0.tar.gz": n,
    }.items():
        assert text.count(address) == times, address
    for path in pages.find_pages([], course / "notebooks"):
        assert f"blob/v1.0/notebooks/{path.name})" in pages.Page(path).cells[0].source
    assert pages.check(path) == []
    readme = second[course / "README.md"].decode()
    assert list(pages.broken_links(readme, ROOT / "README.md")) == [], "a badge has no picture?"
    publish.main([f"--repo={REPO}", f"--ref={REF}"], course)
    assert everything(course) == at_first


@pytest.mark.parametrize(("arguments", "words"), [
    (["--repo=tinygpt"], "owner/name"), (["--repo=https://github.com/a/b"], "owner/name"),
    (["--repo=a/b/c"], "owner/name"), (["--repo=ä/b"], "owner/name"),
    (["--repo=a/b", "--ref=-x"], "a branch or a tag"),
    (["--repo=a/b", "--ref=a b"], "a branch or a tag"), ([], "REPO is missing"),
])
def test_what_is_no_address_changes_nothing(tmp_path, capsys, arguments, words):
    course = copy_course(tmp_path / "course")
    before = everything(course)
    with pytest.raises(SystemExit) as stop:
        publish.main(arguments, course)
    assert stop.value.code and words in capsys.readouterr().err.splitlines()[-1]
    assert everything(course) == before


@pytest.mark.parametrize(("arguments", "words"), [
    (["REPO=a/b"], '--repo="a/b" --ref="main"'), (["REPO="], '--repo="" --ref="main"'),
    (["REPO=a/b", "REF=v1.0"], '--ref="v1.0"'), ([], 'publish.py  --ref="main"')])
def test_make_hands_the_address_on(arguments, words):
    make = shutil.which("make") or pytest.skip("no make")
    env = {k: v for k, v in os.environ.items() if k not in ("REPO", "REF", "MAKEFLAGS")}
    command = [make, "-n", "publish", *arguments]
    assert words in subprocess.check_output(command, cwd=ROOT, env=env, text=True)


def test_binder_has_what_the_pages_need_and_no_cuda():
    """The list of environment.yml, but for the tests' nbval and PyTorch's build."""
    wanted, binder = (yaml.safe_load((ROOT / name).read_text()) for name in
                      ("environment.yml", ".binder/environment.yml"))
    assert binder["channels"] == wanted["channels"]
    ours = [entry for entry in wanted["dependencies"] if not entry.startswith(("nbval", "python"))]
    theirs = [entry for entry in binder["dependencies"] if not entry.startswith("python=")]
    assert theirs == [e.replace("pytorch", "pytorch ") + " cpu*" if "torch" in e else e
                      for e in ours]


def test_codespaces_builds_what_make_builds_and_opens_page_00():
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    makefile = (ROOT / "Makefile").read_text()
    assert container["postCreateCommand"] == "make .venv/.built"
    assert "VENV := .venv\n" in makefile and "STAMP := $(VENV)/.built" in makefile
    assert (ROOT / container["customizations"]["codespaces"]["openFiles"][0]).is_file()


def test_a_checkout_on_windows_has_the_same_bytes(repository, tmp_path):
    git(tmp_path, "clone", "-q", "-c", "core.autocrlf=true", repository.as_uri(), "copy")
    here, there = everything(repository / "data"), everything(tmp_path / "copy" / "data")
    assert here and sorted(here.values()) == sorted(there.values())
    assert pages.main(["module", "--check", "--folder", str(tmp_path / "copy" / "notebooks")]) == 0
