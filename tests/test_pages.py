"""Page hygiene: every rule of tests/pages.py holds on every page, and every rule can fail."""

import itertools
import json
import re
from functools import partial
from pathlib import Path

import nbformat
import pages
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.author
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


FIGURE = {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure size 640x480 with 1 Axes>"}
HOME = "/ho" + "me/ada/course"  # in two parts, so that this file itself names no place
MARK = pages.MARK + "\n"
shown = partial(new_output, "display_data")


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def lesson(head, *cells):
    """Cells of a page; a plain text is a markdown cell, a tuple is a code cell and its outputs."""
    check = ("print(check(f))", stream("not attempted yet\n"))
    aims, end = f"## {pages.OBJECTIVES}\n\nDraw, in 5 minutes.", "## Further reading\n\nText."
    every = [head, aims, *cells, "## Summary\n\nText.", "## Your turn", check, check, end]
    number = itertools.count(1)
    return [new_markdown_cell(c, id=f"c{k}") if isinstance(c, str) else
            new_code_cell(c[0], id=f"c{k}", outputs=list(c[1:]), execution_count=next(number))
            for k, c in enumerate(every)]


@pytest.fixture
def course(tmp_path):
    """A small course that keeps every rule, as pages that were run; the folder of its pages."""
    course = {
        "00_start": lesson("# 0. Way in\n\n[Next](01_a.ipynb), "
                           "[The function f](01_a.ipynb#The-function-f)", (MARK + "import math",)),
        "01_a": lesson(
            "# 1. What is it?\n\n[Before](00_start.ipynb) [After](02_b.ipynb)",
            "## The function `f`\n\n### Deeper\n\n![A small dot](dot.png)\n"
            "[site](https://example.org) [up](../README.md#the-way-in)",
            (MARK + "def f(x):\n    return x",),
            ("print(1)", stream("1\n"), shown({"text/plain": pages.WIDGET_NOTE})),
            ("draw()", shown(FIGURE)), "**Figure 1.1.** The dot is in the middle."),
        "02_b": lesson("# 2. Now?\n\n[On](01_a.ipynb)", "## Imports\n\n- `f` from [1](01_a.ipynb)",
            ("import sys\nfrom tinygpt_helpers import f\n%time f(1)\nf(1)", stream("1")),
            "[Imports](#Imports) and `[no](link)`", (MARK + "def h():\n    return 1",)),
    }  # fmt: skip
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "dot.png").touch()
    (tmp_path / "README.md").write_text("# Course\n\n## The way in!\n")
    for name, cells in course.items():
        pages.save(new_notebook(cells=cells), folder / f"{name}.ipynb")
    return folder


def test_the_small_course_keeps_every_rule(course, capsys):
    assert pages.main(["check", "--folder", str(course)]) == 0, capsys.readouterr().out
    (course / "dot.png").unlink()
    assert pages.main(["check", "01", "--folder", str(course)]) == 1
    assert "01_a, cell 2 (id c2): image 'dot.png'" in capsys.readouterr().out


# Page 1: 0 title, 1 aims, 2 section, 3 f, 4 print, 5 figure, 6 caption, 9, 10 exercises; 7, 8, 11
# closing. Page 2: 2 imports, 3 code. Page 0: 2 imports of the module, 5, 6 exercises; 3, 4, 7.


def cell(number, at, **changes):
    return lambda nbs: nbs[number].cells[at].update(changes)


def source(number, at, text):
    return cell(number, at, source=text)


def said(number, at, *outputs):
    return cell(number, at, outputs=list(outputs))


def put(number, start, stop, *cells):
    def change(nbs):
        nbs[number].cells[start:stop] = cells
    return change


text = partial(source, 1, 2)
code = partial(source, 1, 3)
ONE = new_code_cell("1")
LATER = source(1, 4, "from tinygpt_helpers import h")  # page 2 builds it
BROKEN = {
    "format": [
        (lambda nbs: nbs[1].metadata.language_info.update(version="3.11.2"), "['language_info']"),
        (cell(1, 3, metadata={"execution": {"iopub.execute_input": ""}}), "['execution']"),
        (put(1, 3, 3, new_markdown_cell("x" * 1_500_000)), "draw smaller figures"),
        (lambda nbs: nbs[1].metadata.update(widgets={}), "['widgets']"),
        (lambda nbs: nbs[0].metadata.pop("accelerator"), "['accelerator']"),  # it gains from a GPU
        (lambda nbs: nbs[1].metadata.update(accelerator="GPU"), "['accelerator']"),
        (lambda nbs: nbs[1].update(nbformat_minor=4), "4.5"), (cell(1, 3, extra=1), "not a valid"),
        (lambda nbs: nbs[1].cells[3].pop("id"), "has no id"), (cell(1, 3, id="c1"), "another"),
    ],
    "headings": [
        (put(1, 1, 1, *[new_markdown_cell("Text")] * 4), "first four cells"),
        (source(1, 1, f"## {pages.OBJECTIVES}"), "tell the minutes"), (put(0, 3, 4), "should end"),
        (put(1, 12, 12, new_markdown_cell("## M")), "should end"), (source(1, 1, "# A"), "[0, 1]"),
        (source(1, 1, "## Aims, in 5 minutes"), pages.OBJECTIVES), (put(1, 9, 10), "1 exercises"),
        (source(1, 0, "Before\n\n# 1. Which?"), "# 1. …"), (source(1, 0, "Text"), "H1 in cells []"),
        (text("## A\n\n#### B"), "level 4 after level 2"), (source(1, 0, "# 11. Which?"), "# 1. …"),
        (said(0, 5, stream("correct")), "1 exercises"), (source(1, -1, "## Summary"), "should end"),
        (source(1, 0, "# 2. Which?"), "# 1. …"), (put(1, -1, None), "Further reading"),
    ],
    "finished": [  # what is no definition: test_drift.py
        (put(0, 3, 3, ONE, new_code_cell(MARK + "import os")), "page 00"),
        (code("# -> tinygpt_helpers.py\nf = 1"), "exactly so"), (code("\n" + MARK), "first"),
        (source(0, 2, MARK + "import os\nx = 1"), "alone"), (code(MARK + "import os"), "page 00"),
        (code(MARK + "f = 1\n" + MARK), "first line"),
    ],
    "code": [
        (code("x = 1\ny = '" + "x" * 83 + "'"), "lines [2] have more"), (code(" \n"), "is empty"),
        (code(MARK + "x = 1\n" * 60), "61 lines, 60"), (put(1, 3, 3, ONE, ONE), "cell 5 in a row"),
        (code("\n".join("x" * 31)), "31 lines"), (code("def f("), "not Python"),
    ],
    "outputs": [
        (lambda nbs: [c.update(outputs=[]) for c in nbs[2].cells if "outputs" in c], "no cell has"),
        (said(1, 3, new_output("error", ename="KeyError", evalue="x", traceback=["x"])), "fails"),
        (said(1, 4, shown({pages.WIDGET_VIEW: {}, "text/plain": "x"})), "a widget's view"),
        (said(1, 3, stream("careful", "stderr")), "the cause: 'careful'"),
        (cell(1, 3, execution_count=7), "number 7, not 1"), (code("plt.show()"), "prints or draws"),
        (said(1, 5), "draw a static figure"), (said(1, 4), "prints or draws"),
    ],
    "unwanted": [
        (said(1, 3, shown({"text/html": '<img src="https://example.org/a.png">'})), "fetches"),
        (said(1, 3, shown({"text/markdown": "![a](https://example.org/a.png)"})), "fetches"),
        (said(1, 3, stream("<f at 0x7f3a5c0b1d30>")), "memory address"), (text("A\n="), "an H1"),
        (said(1, 3, stream(f"in {HOME}")), "prints a place"), (text("<h1>Again</h1>"), "an H1"),
        (text("C:" + "\\Users\\ada"), "names a place"), (text("see /ro" + "ot/x"), "names a place"),
        (text('<a href="03_c.ipynb">x</a>'), "[…](…)"), (code(f"open('{HOME}')"), "names a place"),
        (text("[x][1]\n\n[1]: 03_c.ipynb"), "[…](…)"), (text('<img src="dot.png">'), "![…](…)"),
        (text('<iframe src="x">'), "may fetch"),
    ],
    "images": [
        (source(1, 6, "**Figure 1.2.** The dot is in the middle."), "**Figure 1.1.**"),
        (source(1, 6, "The dot is in the middle."), "**Figure 1.1.**"),
        (source(1, 6, "**Figure 1.1.** A dot."), "the finding"), (said(1, 5), "more captions"),
        (text("![a dot](https://a.org)"), "should be a file"), (text("![a dot](a.png)"), "'a.png'"),
        (said(1, 4, shown(FIGURE)), "**Figure 1.1.**"), (text("![ ](dot.png)"), "alt text"),
        (said(1, 5, shown(FIGURE)), "is not its caption"),
    ],
    "links": [
        (source(1, 0, "# 1. A [before](00_start.ipynb)"), "its neighbour 02_b"),
        (source(1, 0, "# 1. A [after](02_b.ipynb)"), "its neighbour 00_start"),
        (text("[![a dot](dot.png)](03_c.ipynb)"), "is no 03_c"), (text("[x](#Nowhere)"), "no such"),
        (text("[x](../README.md#nowhere)"), "no such"), (text("[x](03_c.ipynb)"), "is no 03_c"),
        (text("[x](02_b.ipynb#Exports)"), "no such"), (text("[x](http://a.org)"), "be https"),
        (text("[x](02_b.ipynb#Imports)"), "name the section"),
    ],
    "imports": [
        (source(2, 2, "- `g` from [1](01_a.ipynb)\n- `f` is nice"), "an Imports note"),
        (source(2, 3, "import tinygpt_helpers as t\nt.g(1)"), "g, which"),
        (source(2, 2, "## Imports\n\n`f` is nice."), "an Imports note"), (code("f = 1"), "no page"),
        (source(2, 3, "from tinygpt_helpers import *"), "imports *"), (LATER, "built only later"),
        (source(2, 3, "from tinygpt_helpers import g"), "g, which"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("rule", "change", "words"), [
    (rule, *case) for rule, cases in BROKEN.items() for case in cases])  # fmt: skip
def test_a_broken_rule_is_found(course, rule, change, words):
    paths = pages.find_pages([], course)
    nbs = [nbformat.read(path, as_version=4) for path in paths]
    change(nbs)
    for nb, path in zip(nbs, paths):
        path.write_text(json.dumps(nb), encoding="utf-8")
    findings = [page.at(*finding) for page in map(pages.Page, paths)
                for finding in getattr(pages, f"rule_{rule}")(page)]
    assert any(words in finding for finding in findings), findings
    assert {f"rule_{name}" for name in BROKEN} == {rule.__name__ for rule in pages.RULES}


def page_of(folder, *sources):
    path = folder / "01_page.ipynb"
    pages.save(new_notebook(cells=[new_code_cell(text) for text in sources]), path)
    return path


def test_run_keeps_the_last_state_of_a_progress_line_and_no_widget(tmp_path):
    page = page_of(tmp_path,
        "for i in range(3):\n    print(f'\\rstep {i}', end='', flush=True)\nprint('\\nend')",
        "h = display('step 0', display_id=True)\nfor i in range(3):\n    h.update(f'step {i}')",
        "from ipywidgets import interact\n_ = interact(lambda x: print(x), x=(0, 4))")  # fmt: skip
    ids = [cell.id for cell in nbformat.read(page, as_version=4).cells]
    assert pages.main(["run", "01", "--folder", str(tmp_path)]) == 0
    nb = nbformat.read(page, as_version=4)
    shown = [o.get("text") or o.data["text/plain"] for cell in nb.cells for o in cell.outputs]
    assert shown == ["step 2\nend\n", "'step 2'", pages.WIDGET_NOTE]
    assert nb.metadata == pages.METADATA and not any(cell.metadata for cell in nb.cells)
    assert [cell.id for cell in nb.cells] == ids
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


def test_the_caption_in_plain_words_is_the_alt_text_and_the_figures_size_stays(course):
    path = course / "01_a.ipynb"
    nb = nbformat.read(path, as_version=4)
    nb.cells[5].outputs[0].metadata = {"image/png": {"width": 300, "height": 200}}
    nb.cells[6].source = "**Figure 1.1.** The *dot* of [page 2](02_b.ipynb)\nis `f(x)`.\n\nMore."
    pages.save(nb, path)
    kept = nbformat.read(path, as_version=4).cells[5].outputs[0].metadata
    words = "Figure 1.1. The dot of page 2 is f(x)."
    assert kept == {"image/png": {"width": 300, "height": 200, "alt": words}}
