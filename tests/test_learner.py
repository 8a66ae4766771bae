"""A course that a learner has worked in: `make check` objects to it, `make test` does not."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

pytestmark = pytest.mark.author
ROOT = Path(__file__).resolve().parent.parent
LEFT = {"venv/lib/tool.py": "HOST = 'py" + "pi.org'\nimport os, sys\n", "my_book.txt": "One night",
        ".vscode/settings.json": '{"python": "/ho' + 'me/ada/venv/bin/python"}', ".DS_Store": "\0",
        "runs/tiny/best.pt": "PK", "try.py": "from math import *\n"}


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """A copy of the course, with page 01 as JupyterLab saves it after a session."""
    course = tmp_path_factory.mktemp("used") / "course"
    shutil.copytree(ROOT, course, ignore=shutil.ignore_patterns(
        ".*", "__pycache__", "venv", "runs", "pages-out"))
    path = course / "notebooks" / "01_tokenizer.ipynb"
    nb = nbformat.read(path, as_version=4)
    nb.metadata.language_info.version = "3.12.1"
    nb.metadata.widgets = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    for i, cell in enumerate(nb.cells):
        cell.metadata.collapsed = False
        if cell.cell_type == "code":
            cell.execution_count = 90 + i
            if cell.source.startswith("# → "):  # a finished cell that was played with
                cell.source += "\n\nMINE = 1"
            elif "...  # your code" in cell.source:
                cell.source = re.sub(r"\.\.\.  # your code.*", "return 42", cell.source)
                cell.outputs = [new_output("stream", text="42\n")]
    nb.cells += [new_markdown_cell("# My notes"), new_code_cell("6 * 7")]
    nbformat.write(nb, path)
    shutil.copy(path, path.with_stem("01_tokenizer-Copy1"))
    for name, text in LEFT.items():
        (course / name).parent.mkdir(parents=True, exist_ok=True)
        (course / name).write_text(text)
    return course


def run(course, *options):
    """pytest in the course: its exit status and what it prints."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "0", *options], cwd=course,
                          capture_output=True, text=True, encoding="utf-8")
    return done.returncode, done.stdout + done.stderr


def test_the_learners_tests_are_green_and_speak_of_the_module(used):
    pages = ["notebooks/01_tokenizer.ipynb", "notebooks/01_tokenizer-Copy1.ipynb"]
    mine = "pages drift setup export learner anywhere".split()
    status, text = run(used, *pages, *(f"tests/test_{name}.py" for name in mine))
    assert status == 0 and "failed" not in text and " passed" in text, text
    assert "Note: a finished cell of a page differs from tinygpt_helpers.py" in text


def test_the_authors_tests_are_red(used):
    status, text = run(used, "-m", "author", "tests", "-k", "two_have_one or keeps_the_rules or "
                       "module_is_what or machine_or or ruff", "--no-header")
    assert status == 1
    for name in ("two_have_one", r"keeps_the_rules\[01_tokenizer\]", "module_is_what",
                 "machine_or", "ruff"):
        assert re.search(rf"FAILED .*{name}", text), text
    for words in ("language_info", "widgets", "collapsed", "number 9", "its only H1"):
        assert words in text, text
