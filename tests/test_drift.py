"""The module is what the pages make: its text, and a small course where each difference is seen."""

import pages
import pytest
from nbformat.v4 import new_code_cell, new_notebook

pytestmark = pytest.mark.author
COURSE = {
    "00_way": ["import math\nfrom pathlib import Path", 'HERE = Path(".")'],
    "01_tools": ["# Why 4: it is small.\nSIZE = 4  # rows", "TWICE = 8", "def area(r):\n"
                 "    return math.pi * r**2\n\n\n@property\ndef side(self):\n    return 1"],
    "08_box": ["class Box:\n    side: int = 2\n\n    def area(self):\n        return self.side**2",
               "class Crate(Box):\n    pass",
               "class Box(Box):  # goes on\n    # twice\n    def twice(self):\n        return 4"],
    "09_none": [], "10_late": ["N = 1"],
}  # fmt: skip
HEAD = "# " + "-" * 56
TEXT = "\n\n".join([  # one blank line between definitions
    f'{pages.HEADER}\n\n{COURSE["00_way"][0]}\n\n{HEAD} page 00: start here\n\nHERE = Path(".")',
    f"{HEAD} page 01: text and tokenizer\n\n# Why 4: it is small.\nSIZE = 4  # rows\nTWICE = 8",
    COURSE["01_tools"][2].replace("\n\n\n", "\n\n"),
    f"{HEAD} page 08: serving",
    COURSE["08_box"][0] + "\n\n    # twice\n    def twice(self):\n        return 4",
    "class Crate(Box):\n    pass",
    f"{HEAD} page 10: 10_late\n\nN = 1\n",
])  # fmt: skip


def test_the_module_is_what_the_pages_make():
    assert pages.main(["module", "--check"]) == 0, "see the difference below"


@pytest.fixture
def module(tmp_path):
    """Calls `pages.py module` for the small course with changes; returns its status."""
    def call(*options, **changes):
        for name, cells in (COURSE | changes).items():
            texts = ["x = 1", *(f"{pages.MARK}\n{cell}" for cell in cells)]
            pages.save(new_notebook(cells=list(map(new_code_cell, texts))),
                       folder / f"{name}.ipynb")
        return pages.main(["module", *options, "--folder", str(folder)])

    folder = tmp_path / "notebooks"
    folder.mkdir()
    call.file = tmp_path / "tinygpt_helpers.py"
    assert call("--check") == 1 and not call.file.exists()
    assert call() == 0 and call.file.read_text("utf-8") == TEXT and call("--check") == 0
    return call


@pytest.mark.parametrize(("page", "old", "new"), [
    ("01_tools", "= 4", "= 5"), ("01_tools", "is small", "is tiny"),
    ("01_tools", "    return math", "\n    return math"), ("00_way", "import math\n", ""),
    ("08_box", "# twice", "# two times"), ("08_box", "Crate(Box)", "Crate"),
    ("10_late", "N = 1", "M = 1"),
])  # fmt: skip
def test_a_changed_cell_and_a_changed_module_are_seen(module, capsys, page, old, new):
    changed = {page: [cell.replace(old, new) for cell in COURSE[page]]}
    assert module("--check", **changed) == 1 and module.file.read_text("utf-8") == TEXT
    assert module(**changed) == 0 and "@@" in capsys.readouterr().out
    assert module.file.read_text("utf-8") == TEXT.replace(old, new)
    assert module("--check") == 1, "now the module is the changed one"


def test_cells_and_pages_follow_in_their_order(module):
    assert module("--check", **{"01_tools": COURSE["01_tools"][::-1]}) == 1
    assert module("--check", **{"01_tools": [], "09_none": COURSE["01_tools"]}) == 1


@pytest.mark.parametrize(("cell", "words"), [
    ("SIZE = 4", "SIZE is defined again; 01_tools, cell 1"), ("def f(:", "Python definitions"),
    ("class Box(Box):  # goes on\n    pass", "Box goes on"), ("print(1)", "definitions"),
    ("SIZE.x = 1", "definitions"), ("import os", "imports"), ("%time x = 1", "definitions"),
    ("def f(): pass\n\ndef f(): pass", "f is defined again"), ("", "definitions"),
    ("class A:\n  def f(self): 1\nclass A(A):  # goes on\n  def f(self): 1", "A.f is defined"),
])  # fmt: skip
def test_what_makes_no_module_is_named_and_nothing_is_written(module, cell, words):
    with pytest.raises(SystemExit, match=rf"09_none, cell 1 .*({words})"):
        module(**{"09_none": [cell]})
    assert module.file.read_text("utf-8") == TEXT
