"""Page hygiene: every rule of tests/pages.py holds on every page, and every rule can fail."""

import json
import os
import re
from pathlib import Path

import nbformat
import pages
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(p for p in (ROOT / "notebooks").glob("*.ipynb") if not p.name.startswith("."))


def test_there_are_pages_and_no_two_have_one_number():
    assert PAGES, "notebooks/ holds no page"
    numbers = [int(re.match(r"\d*", p.stem).group() or -1) for p in PAGES]
    assert set(range(6)) <= set(numbers), f"pages are numbered {numbers}: 0 to 5 are the core"
    assert len(set(numbers)) == len(numbers), f"pages are numbered {numbers}: one is there twice"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_page_keeps_the_rules(path):
    findings = pages.check(path)
    assert not findings, "\n" + "\n".join(findings)


@pytest.mark.parametrize("name", ["README.md", "data/README.md"])
def test_the_links_of_the_texts_beside_the_pages_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert pages.LINK.findall(text) and pages.broken_links(text, ROOT / name) == []


# ------------------------------------------------------- a small course that keeps every rule

PNG = "iVBORw0KGgo="
FIGURE = {"image/png": PNG, "text/plain": "<Figure size 640x480 with 1 Axes>"}
# Written in two parts, so that this file itself names no place.
HOME = "/ho" + "me/ada/course"


def markdown(text, **extra):
    return new_markdown_cell(text, **extra)


def code(text, *outputs, tags=()):
    return new_code_cell(text, outputs=list(outputs), metadata={"tags": list(tags)} if tags else {})


def stream(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def shown(data):
    return new_output("display_data", data=data)


def lesson(number, before, *cells):
    head = f"# {number}. What is it?\n\n[Page before]({before})"
    after = "[Page after](02_b.ipynb)" if number == 1 else ""
    summary, turn, reading = (markdown(f"## {name}\n\nText.") for name in pages.CLOSING)
    return [markdown(f"{head} {after}"), aims(), *cells, summary, turn, *exercises(), reading]


def aims():
    return markdown(f"## {pages.OBJECTIVES}\n\nDraw, in 5 minutes.")


def exercises():
    return [code("print(check(f))", stream("not attempted yet\n")) for _ in range(2)]


def good_course():
    start = [
        markdown(
            "# 0. Start here\n\n[First page](01_a.ipynb), [its `f`](01_a.ipynb#The-function-f)"
        ),
        aims(),
        markdown("## Summary"),
        markdown("## Your turn"),
        *exercises(),
        markdown("## The map"),
    ]
    first = lesson(
        1,
        "00_start.ipynb",
        markdown(
            "## The function `f`\n\n### Deeper\n\n![A small dot](dot.png)\n"
            "[site](https://example.org) [up](../README.md#the-way-in)"
        ),
        code("def f(x):\n    return x", tags=["final"]),
        code("print(1)", stream("1\n"), shown({"text/plain": pages.WIDGET_NOTE})),
        code("draw()", shown(FIGURE)),
        markdown("**Figure 1.1.** The dot is in the middle."),
    )
    second = lesson(
        2,
        "01_a.ipynb",
        markdown("## Imports\n\n- `f` from [page 1](01_a.ipynb)"),
        code(
            "import sys\nfrom tinygpt_helpers import f\n%time f(1)\nf(1)",
            new_output("execute_result", data={"text/plain": "1"}),
        ),
        markdown("[Back](#Imports) and `[no](link)`"),
    )
    return {"00_start": start, "01_a": first, "02_b": second}


def write(folder, course):
    """Write {name: cells} as pages that were run; returns the folder of the pages."""
    notebooks = folder / "notebooks"
    notebooks.mkdir()
    (notebooks / "dot.png").write_bytes(b"")
    (folder / "README.md").write_text("# Course\n\n## The way in!\n")
    for name, cells in course.items():
        count = 0
        for k, cell in enumerate(cells):
            cell.id = f"c{k}"
            if cell.cell_type == "code":
                count += 1
                cell.execution_count = count
                for output in cell.outputs:
                    if output.output_type == "execute_result":
                        output.execution_count = count
        pages.save(pages.clean(new_notebook(cells=cells)), notebooks / f"{name}.ipynb")
    return notebooks


def test_the_good_course_keeps_every_rule(tmp_path):
    for path in sorted(write(tmp_path, good_course()).glob("*.ipynb")):
        assert pages.check(path) == []


# ---------------------------------------------------------------- each rule, broken


def edit(number, cell, **changes):
    """A change of one cell's fields on one page; cell may be negative."""

    def change(nbs):
        nbs[number].cells[cell].update(changes)

    return change


def source(number, cell, text):
    return edit(number, cell, source=text)


def insert(number, at, *cells):
    def change(nbs):
        nbs[number].cells[at:at] = cells

    return change


def code_cells(nb):
    return [c for c in nb.cells if c.cell_type == "code"]


def drop(number, cell):
    def change(nbs):
        del nbs[number].cells[cell]

    return change


def output(number, k, *outputs):
    """Give the k-th code cell of a page these outputs."""

    def change(nbs):
        code_cells(nbs[number])[k].outputs = list(outputs)

    return change


# rule, the change that breaks it, words of the finding. Cells of page 1: 0 title, 1 objectives, 2
# section, 3 f, 4 print, 5 figure, 6 caption, 7, 8 closing, 9, 10 exercises, 11 closing. Of page 2:
# 0, 1, 2 imports, 3 code, 4 text, 5, 6 closing, 7, 8 exercises, 9 closing.
def built_later(nbs):
    """Page 1 imports what page 2 builds, and does not say so."""
    insert(1, 3, code("from tinygpt_helpers import h"))(nbs)
    insert(2, 3, code("def h():\n    return 1", tags=["final"]))(nbs)


BROKEN = [
    ("rule_valid", lambda nbs: nbs[1].cells[3].pop("outputs"), "not a valid notebook"),
    ("rule_valid", lambda nbs: nbs[1].update(nbformat_minor=4), "should be 4.5"),
    ("rule_ids", lambda nbs: nbs[1].cells[3].pop("id"), "has no id"),
    ("rule_ids", edit(1, 3, id="c1"), "the same id as cell 1"),
    ("rule_metadata", lambda nbs: nbs[1].metadata.update(widgets={}), "metadata.widgets"),
    (
        "rule_metadata",
        lambda nbs: nbs[1].metadata.kernelspec.update(name="course"),
        "should be python3",
    ),
    (
        "rule_metadata",
        lambda nbs: nbs[1].metadata.language_info.update(version="3.11.2"),
        "Python version",
    ),
    (
        "rule_metadata",
        lambda nbs: nbs[1].cells[3].metadata.update(execution={"iopub.execute_input": ""}),
        "execution",
    ),
    ("rule_title", source(1, 1, "# Again"), "should be one, in the first cell"),
    ("rule_title", source(1, 0, "Text"), "H1 headings: none"),
    ("rule_title", source(1, 0, "# 2. Which?"), "`# 1. …`"),
    ("rule_title", source(1, 0, "# 11. Which?"), "`# 1. …`"),
    ("rule_title", source(1, 0, "# Which?"), "`# 1. …`"),
    ("rule_title", source(1, 0, "Before\n\n# 1. Which?"), "should start with the H1"),
    ("rule_title", source(1, 2, "Again\n====="), "underlined or HTML"),
    ("rule_title", source(1, 2, "<h1>Again</h1>"), "underlined or HTML"),
    ("rule_heading_levels", source(1, 2, "## A\n\n#### B"), "level 4 after level 2"),
    ("rule_sections", source(1, 1, "## Aims"), pages.OBJECTIVES),
    ("rule_sections", insert(1, 1, *(markdown("Text") for _ in range(4))), "first four cells"),
    ("rule_sections", drop(1, -1), "Further reading"),
    ("rule_sections", source(1, -1, "## Summary"), "once: Summary"),
    ("rule_sections", insert(1, 12, markdown("## More")), "should end with"),
    ("rule_sections", source(1, 1, f"## {pages.OBJECTIVES}"), "how many minutes"),
    ("rule_sections", source(0, 1, "Draw, in 5 minutes."), pages.OBJECTIVES),
    ("rule_sections", drop(0, 2), "once: Summary"),
    ("rule_exercises", drop(1, 9), "1 exercises with a check"),
    ("rule_exercises", output(0, 0, stream("correct")), "1 exercises with a check"),
    ("rule_exercises", source(0, 3, "## My turn"), "0 exercises with a check"),
    ("rule_way", source(1, 0, "# 1. A [before](00_start.ipynb)"), "no link to its neighbour 02_b"),
    ("rule_way", source(1, 0, "# 1. A [after](02_b.ipynb)"), "no link to its neighbour 00_start"),
    ("rule_code", source(1, 3, " \n"), "empty code cell"),
    ("rule_code", source(1, 3, "\n".join("x" * 31)), "31 lines"),
    ("rule_code", source(1, 3, "x = 1\ny = '" + "x" * 96 + "'"), "line 2 has 102 characters"),
    ("rule_code", source(1, 3, "def f("), "is not Python"),
    ("rule_rhythm", insert(1, 3, code("1"), code("2")), "code cell 5 in a row"),
    (
        "rule_executed",
        lambda nbs: code_cells(nbs[1])[1].update(execution_count=7),
        "number 7, should be 2",
    ),
    (
        "rule_executed",
        lambda nbs: code_cells(nbs[1])[0].update(execution_count=None),
        "number None, should be 1",
    ),
    (
        "rule_executed",
        lambda nbs: [cell.update(outputs=[]) for cell in code_cells(nbs[2])],
        "no cell has an output",
    ),
    ("rule_executed", output(1, 1), "prints, but no output"),
    ("rule_executed", source(1, 3, "plt.show()"), "no figure is saved"),
    ("rule_executed", source(1, 3, "with a:\n    print(1)"), "prints, but no output"),
    (
        "rule_outputs",
        output(1, 0, new_output("error", ename="KeyError", evalue="x", traceback=[])),
        "ends in KeyError",
    ),
    ("rule_outputs", output(1, 0, stream("careful", "stderr")), "warns: 'careful'"),
    ("rule_outputs", output(1, 0, stream("<f at 0x7f3a5c0b1d30>")), "memory address"),
    ("rule_outputs", output(1, 0, shown({"text/html": "<b>0x7f3a5c0b1d30</b>"})), "memory address"),
    ("rule_machine_paths", output(1, 0, stream(f"in {HOME}")), "prints a place"),
    ("rule_machine_paths", output(1, 0, stream("C:" + "\\Users\\ada")), "prints a place"),
    ("rule_machine_paths", source(1, 3, f"open('{HOME}')"), "names a place"),
    ("rule_machine_paths", source(1, 2, "see /ro" + "ot/x"), "names a place"),
    (
        "rule_widgets",
        output(1, 1, shown({pages.WIDGET_VIEW: {}, "text/plain": "x"})),
        "a widget's view",
    ),
    ("rule_widgets", output(1, 2), "draw a static figure"),
    ("rule_images", source(1, 2, "![ ](dot.png)"), "no alt text"),
    ("rule_images", source(1, 2, '<img src="dot.png">'), "no alt text"),
    (
        "rule_images",
        source(1, 2, "![a dot](https://example.org/dot.png)"),
        "fetched from elsewhere",
    ),
    (
        "rule_images",
        source(1, 2, '<img alt="a dot" src="http://example.org/dot.png">'),
        "fetched from elsewhere",
    ),
    ("rule_images", source(1, 2, "![a dot](data:image/png;base64,AAAA)"), "fetched from elsewhere"),
    ("rule_images", source(1, 2, "![a dot](line.png)"), "does not exist"),
    ("rule_images", source(1, 2, "![a dot](attachment:dot.png)"), "is not attached"),
    (
        "rule_images",
        output(1, 0, shown({"text/html": '<img src="https://example.org/a.png">'})),
        "HTML output fetches",
    ),
    ("rule_images", source(1, 2, '<iframe src="https://example.org">'), "<iframe>"),
    (
        "rule_images",
        output(1, 0, shown({"text/markdown": "![a](https://example.org/a.png)"})),
        "HTML output fetches",
    ),
    ("rule_captions", source(1, 6, "The dot is in the middle."), "**Figure 1.1.**"),
    ("rule_captions", source(1, 6, "**Figure 1.2.** The dot is in the middle."), "**Figure 1.1.**"),
    ("rule_captions", source(1, 6, "**Figure 1.1.** A dot."), "finding in a sentence"),
    ("rule_captions", output(1, 1, shown(FIGURE)), "**Figure 1.1.**"),
    ("rule_captions", output(1, 2), "1 captions for 0 figures"),
    ("rule_links", source(1, 2, "[x](03_c.ipynb)"), "there is no 03_c.ipynb"),
    ("rule_links", source(1, 2, "[x](02_b.ipynb#Exports)"), "no such heading"),
    ("rule_links", source(1, 2, "[x](#Nowhere)"), "no such heading"),
    ("rule_links", source(1, 2, "[x](../README.md#nowhere)"), "no such heading"),
    ("rule_links", source(1, 2, "[![a dot](dot.png)](03_c.ipynb)"), "there is no 03_c.ipynb"),
    ("rule_links", source(1, 2, "[x](http://example.org)"), "should be https"),
    ("rule_links", source(1, 2, "[x][1]\n\n[1]: 03_c.ipynb"), "which is checked"),
    ("rule_links", source(1, 2, '<a href="03_c.ipynb">x</a>'), "which is checked"),
    ("rule_imports", source(2, 2, "## Imports\n\n`f` is nice."), "imports f; an Imports note"),
    (
        "rule_imports",
        source(2, 2, "## Imports\n\n- `g` from [1](01_a.ipynb)\n- `f` is nice"),
        "imports f; an Imports note",
    ),
    (
        "rule_imports",
        source(2, 3, "from tinygpt_helpers import g"),
        "imports g, which no page builds",
    ),
    (
        "rule_imports",
        source(2, 3, "import tinygpt_helpers as t\nt.g(1)"),
        "imports g, which no page builds",
    ),
    ("rule_imports", source(2, 3, "from tinygpt_helpers import *"), "imports *"),
    ("rule_imports", built_later, "built only later"),
    ("rule_size", insert(1, 3, markdown("x" * 1_500_000)), "draw smaller figures"),
]


def break_course(folder, change):
    """The good course with one change; returns the paths of its pages."""
    paths = sorted(write(folder, good_course()).glob("*.ipynb"))
    nbs = [nbformat.read(p, as_version=4) for p in paths]
    change(nbs)
    for nb, path in zip(nbs, paths, strict=True):
        path.write_text(json.dumps(nb), encoding="utf-8")
    return paths


@pytest.mark.parametrize(("rule", "change", "words"), BROKEN)
def test_a_broken_rule_is_found(tmp_path, rule, change, words):
    paths = break_course(tmp_path, change)
    findings = [finding for path in paths for finding in getattr(pages, rule)(pages.Page(path))]
    assert any(words in finding for finding in findings), findings


def test_a_wrong_page_name_is_found(tmp_path):
    course = good_course()
    (path,) = write(tmp_path, {"1_Intro": course["00_start"]}).glob("*.ipynb")
    assert "NN_name.ipynb" in pages.rule_name(pages.Page(path))[0]


def test_every_rule_was_broken_once():
    broken = {rule for rule, _, _ in BROKEN} | {"rule_name"}
    assert broken == {rule.__name__ for rule in pages.RULES}


# ---------------------------------------------------------------- the page tool

DRAFT = """# %% [markdown]
# # 1. Draft

# %% tags=["final"]
x = 1

# %%
print(x)
"""


def cells_of(path):
    return nbformat.read(path, as_version=4).cells


def test_from_py_keeps_ids_tags_and_outputs(tmp_path):
    draft = tmp_path / "01_draft.py"
    draft.write_text(DRAFT)
    page = pages.from_py(draft, tmp_path)
    first = cells_of(page)
    assert first[1].metadata.tags == ["final"]
    assert first == cells_of(pages.from_py(draft, tmp_path)), "a second call should change nothing"
    pages.run(page)
    # A new cell in front, a changed one in the middle, the last one as it was.
    draft.write_text(
        DRAFT.replace("# %% tags", "# %%\ny = 0\n\n# %% tags").replace("x = 1", "x = 1 + 0")
    )
    second = cells_of(pages.from_py(draft, tmp_path))
    assert len(second) == 4 and len({c.id for c in second}) == 4
    assert second[0].id == first[0].id and second[3].id == first[2].id
    assert second[3].outputs[0].text == "1\n", (
        "the output of an unchanged cell is kept until the next run"
    )
    assert not second[2].outputs


def page_of(folder, *sources):
    path = folder / "01_page.ipynb"
    pages.save(pages.clean(new_notebook(cells=[new_code_cell(s) for s in sources])), path)
    return path


def test_run_keeps_the_last_state_of_a_progress_line_and_no_widget(tmp_path):
    page = page_of(
        tmp_path,
        "h = display('step 0', display_id=True)\nfor i in range(3):\n    h.update(f'step {i}')",
        "from ipywidgets import interact\n_ = interact(lambda x: print(x), x=(0, 4))",
        "print('a', flush=True)\nprint('b', flush=True)",
    )
    pages.run(page)
    progress, widget, lines = cells_of(page)
    assert [o.data for o in progress.outputs] == [{"text/plain": "'step 2'"}]
    assert [o.data for o in widget.outputs] == [{"text/plain": pages.WIDGET_NOTE}]
    assert [o.text for o in lines.outputs] == ["a\nb\n"]
    assert pages.rule_metadata(pages.Page(page)) == [], "no widget state, no times"
    assert [p.name for p in tmp_path.iterdir()] == [page.name], "no scratch file is left"


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (["1 / 0"], "ZeroDivisionError"),
        (
            ["from ipywidgets import interact\n_ = interact(lambda x: 1 / (x - 2), x=(0, 4))"],
            "callback",
        ),
        ([f"print({HOME!r})"], "path of this machine"),
    ],
)
def test_run_refuses_and_leaves_the_page_as_it_was(tmp_path, sources, words):
    page = page_of(tmp_path, *sources)
    before = page.read_bytes()
    with pytest.raises(RuntimeError, match=words):
        pages.run(page)
    assert page.read_bytes() == before


def test_run_does_not_overwrite_a_page_that_was_changed_meanwhile(tmp_path):
    page = page_of(tmp_path, f"open({str(tmp_path / '01_page.ipynb')!r}, 'a').write(' ')")
    with pytest.raises(RuntimeError, match="changed while it ran"):
        pages.run(page)


def test_find_pages_names_what_there_is(tmp_path):
    with pytest.raises(SystemExit, match="no pages"):
        pages.find_pages([], tmp_path)
    page = page_of(tmp_path, "1")
    assert pages.find_pages(["01"], tmp_path) == pages.find_pages([], tmp_path) == [page]
    with pytest.raises(SystemExit, match="01_page"):
        pages.find_pages(["02"], tmp_path)


def test_check_on_the_command_line_fails_where_a_rule_is_broken(tmp_path, capsys):
    notebooks = write(tmp_path, good_course())
    assert pages.main(["check", "--folder", str(notebooks)]) == 0
    os.remove(notebooks / "dot.png")
    assert pages.main(["check", "01", "--folder", str(notebooks)]) == 1
    assert "image file 'dot.png' does not exist" in capsys.readouterr().out


def test_html_holds_the_figure_and_its_caption(tmp_path):
    notebooks = write(tmp_path, good_course())
    text = pages.html(notebooks / "01_a.ipynb", tmp_path / "out").read_text(encoding="utf-8")
    assert "The dot is in the middle." in text and f"data:image/png;base64,{PNG}" in text
