"""The pages build the module: what a cell tagged `final` defines is the module's, word for word."""

import ast
import re
from pathlib import Path

import pytest
from pages import Page, defined_names

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "tinygpt_helpers.py"


def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def is_docstring(node):
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def segment(node, source):
    """The statement's lines, with decorators and the comment right above, no trailing blanks."""
    lines = [line.rstrip() for line in source.splitlines()]
    first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])]) - 1
    while first > 0 and lines[first - 1].startswith("#"):
        first -= 1
    return "\n".join(lines[first : node.end_lineno])


def definitions(source, where):
    """({name: (node, source segment)}, findings) of the top level of one source text."""
    found, findings = {}, []
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return {}, [f"{where} is not Python: {error}"]
    for node in tree.body:
        if (
            isinstance(node, (ast.Import, ast.ImportFrom))
            or is_main_guard(node)
            or is_docstring(node)
        ):
            continue
        names = defined_names(node)
        if not names:
            text = ast.unparse(node).splitlines()[0]
            findings.append(
                f"{where}: `{text}` defines no name; only definitions and imports belong here"
            )
        for name in names:
            if name in found:
                findings.append(f"{where}: {name} is defined twice")
            found[name] = (node, segment(node, source))
    return found, findings


def join_parts(cells):
    """The final cells of a page, with a class that is written in parts made whole again.

    A long class goes on in a later cell under the header `class NAME(NAME):  # goes on`; the
    methods below it belong after those that stand in the first part, one blank line between.
    """
    whole = []
    for cell in cells:
        header, _, methods = cell.partition("\n")
        part = re.fullmatch(r"class (\w+)\(\1\):  # goes on", header)
        firsts = [i for i, c in enumerate(whole) if part and f"class {part[1]}:" in c.splitlines()]
        if firsts and whole[firsts[-1]].rstrip().splitlines()[-1].startswith(" "):
            whole[firsts[-1]] = whole[firsts[-1]].rstrip() + "\n\n" + methods.rstrip()
        else:
            whole.append(cell)
    return whole


def drift(module, pages):
    """All differences between the module's source and the pages' final cells.

    pages: {page name: [source of each cell tagged `final`]}, in the order of the course.
    """
    built, module_findings = definitions(module, "the module")
    findings, home = list(module_findings), {}
    for page, cells in pages.items():
        for cell in join_parts(cells):
            in_cell, cell_findings = definitions(cell, f"{page}, a final cell")
            findings += cell_findings
            for name, (node, text) in in_cell.items():
                if name in home:
                    findings.append(
                        f"{name} is built on {home[name]} and again on {page}; "
                        "one page builds each name"
                    )
                    continue
                home[name] = page
                if name not in built:
                    findings.append(f"{page} builds {name}, which the module does not have")
                    continue
                in_module, module_text = built[name]
                if ast.dump(node) != ast.dump(in_module):
                    findings.append(
                        f"{name} differs between {page} and the module: "
                        f"{first_difference(text, module_text)}"
                    )
                # The cell's comment above a definition may be part of a longer one in the module (a
                # section's head).
                elif not module_text.endswith(text):
                    findings.append(
                        f"{name}: comments or spacing differ between {page} and the module: "
                        f"{first_difference(text, module_text)}"
                    )
    for name in built:
        if name not in home and not (name.startswith("__") and name.endswith("__")):
            findings.append(f"the module's {name} is built on no page (in a cell tagged `final`)")
    order, last = list(pages), None
    for name in built:
        if name in home:
            if last and order.index(home[name]) < order.index(home[last]):
                findings.append(
                    f"the module has {name} ({home[name]}) after {last} ({home[last]}); "
                    "pages' order is wanted"
                )
            last = name
    return findings


def first_difference(cell, module):
    """The first line in which two segments differ."""
    a, b = cell.splitlines(), module.splitlines()
    for one, two in zip(a, b, strict=False):
        if one != two:
            return f"page has {one.strip()!r}, module has {two.strip()!r}"
    return f"page has {len(a)} lines, module has {len(b)}"


def course_pages():
    return {
        p.stem: [c.source for _, c in Page(p).tagged("final")]
        for p in sorted(ROOT.glob("notebooks/*.ipynb"))
    }


def test_pages_and_module_are_the_same():
    pages = course_pages()
    assert sum(map(len, pages.values())), "no page has a cell tagged `final`"
    findings = drift(MODULE.read_text(encoding="utf-8"), pages)
    assert not findings, "\n".join(findings)


# ---------------------------------------------------------------- can the check fail?

GOOD_MODULE = '''"""A module."""
import math

# ---- page 1
# Why 4: it is small.
SIZE = 4  # rows


def area(r):
    """Area."""
    return math.pi * r**2  # squared


@property
def _private(self):
    return 1


class Box:
    side: int = 2


if __name__ == "__main__":
    print(area(SIZE))
'''
GOOD_PAGES = {
    "01_a": [
        "import math\n# Why 4: it is small.\nSIZE = 4  # rows",
        'def area(r):\n    """Area."""\n    return math.pi * r**2  # squared',
    ],
    "02_b": ["@property\ndef _private(self):\n    return 1   ", "class Box:\n    side: int = 2"],
}


def changed(page, cell, old, new):
    pages = {name: list(cells) for name, cells in GOOD_PAGES.items()}
    assert old in pages[page][cell]
    pages[page][cell] = pages[page][cell].replace(old, new)
    return pages


def test_no_drift_is_found_where_there_is_none():
    assert drift(GOOD_MODULE, GOOD_PAGES) == []


@pytest.mark.parametrize(
    ("pages", "expected"),
    [
        (changed("01_a", 0, "= 4", "= 5"), "SIZE differs"),
        (changed("01_a", 0, "# rows", "# columns"), "SIZE: comments"),
        (changed("01_a", 0, "it is small", "it is tiny"), "SIZE: comments"),
        (changed("01_a", 1, "# squared", "# r squared"), "area: comments"),
        (changed("01_a", 1, '"""Area."""', '"""The area."""'), "area differs"),
        (changed("01_a", 1, "r**2", "r * r"), "area differs"),
        (changed("01_a", 1, "    return", "\n    return"), "area: comments"),
        (changed("02_b", 0, "@property\n", ""), "_private differs"),
        (
            changed("02_b", 0, "def _private", "def _other"),
            "builds _other, which the module does not have",
        ),
        (changed("02_b", 0, "def _private", "def _other"), "_private is built on no page"),
        (changed("02_b", 1, "class Box", "class Crate"), "Box is built on no page"),
        (changed("02_b", 1, "side: int = 2", "side: int = 2\nBox.side = 3"), "defines no name"),
        (changed("02_b", 1, "class", "klass"), "not Python"),
        (GOOD_PAGES | {"03_c": GOOD_PAGES["01_a"][:1]}, "SIZE is built on 01_a and again on 03_c"),
        (
            GOOD_PAGES | {"01_a": GOOD_PAGES["01_a"] + GOOD_PAGES["01_a"][:1]},
            "SIZE is built on 01_a and again on 01_a",
        ),
        ({"01_b": GOOD_PAGES["02_b"], "02_a": GOOD_PAGES["01_a"]}, "pages' order is wanted"),
        ({}, "SIZE is built on no page"),
    ],
)
def test_drift_is_found(pages, expected):
    findings = drift(GOOD_MODULE, pages)
    assert any(expected in finding for finding in findings), findings


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("SIZE = 4", "SIZE = 5", "SIZE differs"),
        ("class Box", "EXTRA = 1\n\n\nclass Box", "EXTRA is built on no page"),
        ("class Box", "def _extra(): pass\n\n\nclass Box", "_extra is built on no page"),
        ("class Box", "print(1)\n\n\nclass Box", "defines no name"),
        ("class Box", "SIZE = 4  # rows\n\n\nclass Box", "SIZE is defined twice"),
    ],
)
def test_drift_in_the_module_is_found(old, new, expected):
    findings = drift(GOOD_MODULE.replace(old, new), GOOD_PAGES)
    assert any(expected in finding for finding in findings), findings


LONG_MODULE = GOOD_MODULE.replace(
    "side: int = 2\n", "side: int = 2\n\n    def area(self):\n        return self.side**2\n"
)
PART = "class Box(Box):  # goes on\n    def area(self):\n        return self.side**2"


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (PART, None),
        (PART.replace("side**2", "side * 2"), "Box differs"),
        (PART.replace("        return", "        # the square\n        return"), "Box: comments"),
        (PART.replace("  # goes on", ""), "Box is built on 02_b and again on 02_b"),
        (PART.replace("Box", "Crate"), "Crate, which the module does not have"),
        ("", "Box differs"),
    ],
)
def test_a_class_in_parts_is_compared_as_a_whole(part, expected):
    pages = GOOD_PAGES | {"02_b": GOOD_PAGES["02_b"] + [part]}
    findings = drift(LONG_MODULE, pages)
    if expected is None:
        assert findings == []
    else:
        assert any(expected in finding for finding in findings), findings
