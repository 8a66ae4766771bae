"""Page hygiene: every rule of tests/pages.py holds on every page, and every rule can fail."""

import json
import re
from pathlib import Path

import nbformat
import pages
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "notebooks").glob("[!.]*.ipynb"))


def test_there_are_pages_and_no_two_have_one_number():
    numbers = [p.name[:3] for p in PAGES]
    assert {f"0{i}_" for i in range(6)} <= set(numbers), f"{numbers}: 00 to 05 are the core"
    assert len(set(numbers)) == len(numbers) and all(re.match(r"\d\d_", n) for n in numbers)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_page_keeps_the_rules(path):
    findings = pages.check(path)
    assert not findings, "\n" + "\n".join(findings)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "data/README.md"])
def test_the_links_of_the_texts_beside_the_pages_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert list(pages.broken_links(text, ROOT / name)) == []


# ------------------------------------------------------- a small course that keeps every rule

FIGURE = {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure size 640x480 with 1 Axes>"}
HOME = "/ho" + "me/ada/course"  # in two parts, so that this file itself names no place
MARK = pages.MARK + "\n"


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def shown(data):
    return new_output("display_data", data=data)


def lesson(head, *cells):
    """Cells of a page; a plain text is a markdown cell, a tuple is a code cell and its outputs."""
    check = ("print(check(f))", stream("not attempted yet\n"))
    aims, end = f"## {pages.OBJECTIVES}\n\nDraw, in 5 minutes.", "## Further reading\n\nText."
    every = [head, aims, *cells, "## Summary\n\nText.", "## Your turn", check, check, end]
    return [new_markdown_cell(c) if isinstance(c, str) else
            new_code_cell(c[0], outputs=list(c[1:])) for c in every]


def write(folder):
    """Write the small course as pages that were run; returns their paths."""
    course = {
        "00_start": lesson(
            "# 0. Start here\n\n[First page](01_a.ipynb), [its `f`](01_a.ipynb#The-function-f)",
            (MARK + "import math",)),
        "01_a": lesson(
            "# 1. What is it?\n\n[Page before](00_start.ipynb) [Page after](02_b.ipynb)",
            "## The function `f`\n\n### Deeper\n\n![A small dot](dot.png)\n"
            "[site](https://example.org) [up](../README.md#the-way-in)",
            (MARK + "def f(x):\n    return x",),
            ("print(1)", stream("1\n"), shown({"text/plain": pages.WIDGET_NOTE})),
            ("draw()", shown(FIGURE)),
            "**Figure 1.1.** The dot is in the middle."),
        "02_b": lesson(
            "# 2. What next?\n\n[Page before](01_a.ipynb)",
            "## Imports\n\n- `f` from [page 1](01_a.ipynb)",
            ("import sys\nfrom tinygpt_helpers import f\n%time f(1)\nf(1)",
             shown({"text/plain": "1"})),
            "[Back](#Imports) and `[no](link)`"),
    }  # fmt: skip
    (folder / "notebooks").mkdir()
    (folder / "notebooks" / "dot.png").write_bytes(b"")
    (folder / "README.md").write_text("# Course\n\n## The way in!\n")
    for name, cells in course.items():
        for k, cell in enumerate(cells):
            cell.id = f"c{k}"
        for k, cell in enumerate((c for c in cells if c.cell_type == "code"), 1):
            cell.execution_count = k
        pages.save(new_notebook(cells=cells), folder / "notebooks" / f"{name}.ipynb")
    return sorted((folder / "notebooks").glob("*.ipynb"))


def test_the_small_course_keeps_every_rule(tmp_path, capsys):
    paths = write(tmp_path)
    assert [finding for path in paths for finding in pages.check(path)] == []
    assert pages.main(["check", "--folder", str(paths[0].parent)]) == 0
    (tmp_path / "notebooks" / "dot.png").unlink()
    assert pages.main(["check", "01", "--folder", str(paths[0].parent)]) == 1
    assert "01_a, cell 2 (id c2): image 'dot.png'" in capsys.readouterr().out


# ---------------------------------------------------------------- each rule, broken
# Page 1: 0 title, 1 aims, 2 section, 3 f, 4 print, 5 figure, 6 caption, 7, 8 closing, 9, 10
# exercises, 11 closing. Page 2: 0, 1, 2 imports, 3 code, 4 text, 5, 6 closing, 7, 8, 9. Page 0: 2
# the module's imports, 3, 4 closing, 5, 6 exercises, 7.


def source(number, cell, text):
    return lambda nbs: nbs[number].cells[cell].update(source=text)


def said(number, cell, *outputs):
    return lambda nbs: nbs[number].cells[cell].update(outputs=list(outputs))


def drop(number, cell):
    return lambda nbs: nbs[number].cells.pop(cell)


def insert(number, at, *cells):
    def change(nbs):
        nbs[number].cells[at:at] = cells
    return change


def meta(**changes):
    return lambda nbs: nbs[1].metadata.update(changes)


def cell3(**changes):
    return lambda nbs: nbs[1].cells[3].update(changes)


def built_later(nbs):
    """Page 1 imports what page 2 builds, and does not say so."""
    source(1, 4, "from tinygpt_helpers import h")(nbs)
    source(2, 3, MARK + "def h():\n    return 1")(nbs)


ONE = new_code_cell("1")
BROKEN = {
    "format": [
        (cell3(extra=1), "not a valid"), (lambda nbs: nbs[1].update(nbformat_minor=4), "4.5"),
        (lambda nbs: nbs[1].cells[3].pop("id"), "has no id"), (cell3(id="c1"), "of another cell"),
        (meta(widgets={}), "['widgets']"), (meta(kernelspec={"name": "course"}), "['kernelspec']"),
        (meta(language_info={"name": "python", "version": "3.11.2"}), "['language_info']"),
        (cell3(metadata={"execution": {"iopub.execute_input": ""}}), "['execution']"),
        (insert(1, 3, new_markdown_cell("x" * 1_500_000)), "draw smaller figures"),
    ],
    "headings": [
        (source(1, 1, "# Again"), "only H1"), (source(1, 0, "Text"), "H1 in cells []"),
        (source(1, 0, "# 2. Which?"), "# 1. …"), (source(1, 0, "# 11. Which?"), "# 1. …"),
        (source(1, 0, "# Which?"), "# 1. …"), (source(1, 0, "Before\n\n# 1. Which?"), "# 1. …"),
        (source(1, 2, "## A\n\n#### B"), "level 4 after level 2"),
        (source(1, 1, "## Aims, in 5 minutes"), pages.OBJECTIVES),
        (source(1, 1, f"## {pages.OBJECTIVES}"), "tell the minutes"),
        (insert(1, 1, *(new_markdown_cell("Text") for _ in range(4))), "first four cells"),
        (drop(1, -1), "Further reading"), (source(1, -1, "## Summary"), "should end"),
        (insert(1, 12, new_markdown_cell("## More")), "should end"), (drop(0, 3), "should end"),
        (drop(1, 9), "1 exercises"), (said(0, 5, stream("correct")), "1 exercises"),
    ],
    "finished": [
        (source(1, 3, MARK + "f(1)"), "definitions"), (source(1, 3, MARK), "definitions"),
        (source(1, 3, MARK + "def f("), "Python"), (source(1, 3, MARK + "f.x = 1"), "assignments"),
        (source(1, 3, MARK + "%time f = 1"), "definitions"), (source(1, 3, "\n" + MARK), "first"),
        (source(1, 3, "# -> tinygpt_helpers.py\nf = 1"), "exactly so"),
        (source(1, 3, MARK + "f = 1\n" + MARK), "first line"),
        (source(1, 3, MARK + "import os"), "page 00"), (insert(0, 3, ONE, new_code_cell(
            MARK + "import os")), "page 00"), (source(0, 2, MARK + "import os\nx = 1"), "alone"),
    ],
    "code": [
        (source(1, 3, " \n"), "is empty"), (source(1, 3, "def f("), "not Python"),
        (source(1, 3, "\n".join("x" * 31)), "31 lines"),
        (source(1, 3, MARK + "x = 1\n" * 60), "61 lines, 60 are"),
        (source(1, 3, "x = 1\ny = '" + "x" * 96 + "'"), "lines [2] have more"),
        (insert(1, 3, ONE, ONE), "code cell 5 in a row"),
    ],
    "outputs": [
        (cell3(execution_count=7), "number 7, not 1"), (cell3(execution_count=None), "number None"),
        (lambda nbs: [c.update(outputs=[]) for c in nbs[2].cells if "outputs" in c], "no cell has"),
        (said(1, 4), "prints or draws"), (source(1, 3, "plt.show()"), "prints or draws"),
        (said(1, 3, new_output("error", ename="KeyError", evalue="x", traceback=["x"])), "fails"),
        (said(1, 3, stream("careful", "stderr")), "fails or warns; mend the cause: 'careful'"),
        (said(1, 4, shown({pages.WIDGET_VIEW: {}, "text/plain": "x"})), "a widget's view"),
        (said(1, 5), "draw a static figure"),
    ],
    "unwanted": [
        (said(1, 3, stream("<f at 0x7f3a5c0b1d30>")), "memory address"),
        (said(1, 3, shown({"text/html": "<b>0x7f3a5c0b1d30</b>"})), "memory address"),
        (said(1, 3, stream(f"in {HOME}")), "prints a place"),
        (said(1, 3, stream("C:" + "\\Users\\ada")), "prints a place"),
        (source(1, 3, f"open('{HOME}')"), "names a place"),
        (source(1, 2, "see /ro" + "ot/x"), "names a place"),
        (said(1, 3, shown({"text/html": '<img src="https://example.org/a.png">'})), "fetches"),
        (said(1, 3, shown({"text/markdown": "![a](https://example.org/a.png)"})), "fetches"),
        (source(1, 2, '<iframe src="https://example.org">'), "may fetch"),
        (source(1, 2, "Again\n====="), "an H1"), (source(1, 2, "<h1>Again</h1>"), "an H1"),
        (source(1, 2, '<img src="dot.png">'), "![…](…)"),
        (source(1, 2, "[x][1]\n\n[1]: 03_c.ipynb"), "[…](…)"),
        (source(1, 2, '<a href="03_c.ipynb">x</a>'), "[…](…)"),
    ],
    "images": [
        (source(1, 2, "![ ](dot.png)"), "alt text"), (source(1, 2, "![a dot](a.png)"), "'a.png'"),
        (source(1, 2, "![a dot](https://example.org/dot.png)"), "a file of the repository"),
        (source(1, 2, "![a dot](data:image/png;base64,AAAA)"), "a file of the repository"),
        (source(1, 6, "The dot is in the middle."), "**Figure 1.1.**"),
        (source(1, 6, "**Figure 1.2.** The dot is in the middle."), "**Figure 1.1.**"),
        (source(1, 6, "**Figure 1.1.** A dot."), "the finding"),
        (said(1, 4, shown(FIGURE)), "**Figure 1.1.**"), (said(1, 5), "captions than figures (0)"),
    ],
    "links": [
        (source(1, 0, "# 1. A [before](00_start.ipynb)"), "its neighbour 02_b"),
        (source(1, 0, "# 1. A [after](02_b.ipynb)"), "its neighbour 00_start"),
        (source(1, 2, "[x](03_c.ipynb)"), "there is no 03_c.ipynb"),
        (source(1, 2, "[x](02_b.ipynb#Exports)"), "no such heading"),
        (source(1, 2, "[x](#Nowhere)"), "no such heading"),
        (source(1, 2, "[x](../README.md#nowhere)"), "no such heading"),
        (source(1, 2, "[![a dot](dot.png)](03_c.ipynb)"), "there is no 03_c.ipynb"),
        (source(1, 2, "[x](http://example.org)"), "should be https"),
    ],
    "imports": [
        (source(2, 2, "## Imports\n\n`f` is nice."), "imports f; an Imports note"),
        (source(2, 2, "- `g` from [1](01_a.ipynb)\n- `f` is nice"), "imports f; an Imports note"),
        (source(2, 3, "from tinygpt_helpers import g"), "no page builds in a finished cell"),
        (source(2, 3, "import tinygpt_helpers as t\nt.g(1)"), "imports g, which no page builds"),
        (source(2, 3, "from tinygpt_helpers import *"), "imports *"),
        (source(1, 3, "f = 1"), "imports f, which no page"), (built_later, "built only later"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("rule", "change", "words"), [
    (rule, *case) for rule, cases in BROKEN.items() for case in cases])  # fmt: skip
def test_a_broken_rule_is_found(tmp_path, rule, change, words):
    paths = write(tmp_path)
    nbs = [nbformat.read(path, as_version=4) for path in paths]
    change(nbs)
    for nb, path in zip(nbs, paths):
        path.write_text(json.dumps(nb), encoding="utf-8")
    loaded = [pages.Page(path) for path in paths]
    findings = [p.at(*finding) for p in loaded for finding in getattr(pages, f"rule_{rule}")(p)]
    assert any(words in finding for finding in findings), findings
    assert {f"rule_{name}" for name in BROKEN} == {rule.__name__ for rule in pages.RULES}


# ---------------------------------------------------------------- the page tool


def page_of(folder, *sources):
    path = folder / "01_page.ipynb"
    pages.save(new_notebook(cells=[new_code_cell(text) for text in sources]), path)
    return path


def test_run_keeps_the_last_state_of_a_progress_line_and_no_widget(tmp_path):
    page = page_of(
        tmp_path,
        "for i in range(3):\n    print(f'\\rstep {i}', end='', flush=True)\nprint('\\nend')",
        "h = display('step 0', display_id=True)\nfor i in range(3):\n    h.update(f'step {i}')",
        "from ipywidgets import interact\n_ = interact(lambda x: print(x), x=(0, 4))",
    )
    ids = [cell.id for cell in nbformat.read(page, as_version=4).cells]
    assert pages.main(["run", "01", "--folder", str(tmp_path)]) == 0
    nb = nbformat.read(page, as_version=4)
    line, display, widget = (cell.outputs for cell in nb.cells)
    assert [o.text for o in line] == ["step 2\nend\n"]
    assert [o.data for o in display] == [{"text/plain": "'step 2'"}]
    assert [o.data for o in widget] == [{"text/plain": pages.WIDGET_NOTE}]
    assert nb.metadata == pages.METADATA and [cell.id for cell in nb.cells] == ids
    assert not any(cell.metadata for cell in nb.cells), "no times"
    assert [p.name for p in tmp_path.iterdir()] == [page.name], "no scratch file is left"


@pytest.mark.parametrize(("text", "words"), [
    ("1 / 0", "ZeroDivisionError"), (f"print({HOME!r})", "path of this machine"),
    ("from ipywidgets import interact\n_ = interact(lambda x: 1 / (x - 2), x=(0, 4))", "callback"),
    ("open('01_page.ipynb', 'a').write(' ')", "changed while it ran"),
])  # fmt: skip
def test_run_refuses_and_leaves_the_page_as_it_was(tmp_path, capsys, text, words):
    page = page_of(tmp_path, text)
    before = page.read_bytes()
    assert pages.main(["run", "--folder", str(tmp_path)]) == 1
    assert words in capsys.readouterr().err and page.read_bytes().rstrip() == before.rstrip()


def test_find_pages_names_what_there_is(tmp_path):
    with pytest.raises(SystemExit, match="no pages"):
        pages.find_pages([], tmp_path)
    page = page_of(tmp_path, "1")
    for names in [], ["01"], ["01_page"], ["notebooks/01_page.ipynb"]:
        assert pages.find_pages(names, tmp_path) == [page]
    for names in ["02"], ["01", "02"], ["0"]:
        with pytest.raises(SystemExit, match="01_page"):
            pages.find_pages(names, tmp_path)


def test_html_holds_the_figure_and_its_caption(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "BROWSERS", ())
    folder = str(write(tmp_path)[0].parent)
    assert pages.main(["html", "01", "--folder", folder, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "01_a.html").read_text(encoding="utf-8")
    assert "The dot is in the middle." in text and FIGURE["image/png"] in text
