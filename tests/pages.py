"""The page tool: makes, runs, checks and draws the course's notebooks.

    pages.py from-py FILE.py...          make or update notebooks/NAME.ipynb from percent format
    pages.py to-py [NAME...] --out DIR   the way back: write NAME.py
    pages.py run [NAME...]               run from a fresh kernel, clean, save with outputs
    pages.py check [NAME...]             print what breaks a rule of a page (RULES, below)
    pages.py html [NAME...] --out DIR    render to HTML, and to PNG where Chromium is there

Percent format is jupytext's: a Python file whose cells begin with `# %%` or `# %% [markdown]`.
No NAME means every page. NAME may be `01_tokenizer`, `01_tokenizer.ipynb` or `01`.
"""

import argparse
import ast
import copy
import difflib
import hashlib
import os
import re
import shutil
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"

KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
# Without Python's version: it would change with every machine that saves the page.
LANGUAGE_INFO = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}
KEPT_CELL_METADATA = {"tags"}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
# What a reader of the saved page sees in a widget's place.
WIDGET_NOTE = "[interactive control: run this cell to use it]"
# A place on one machine. `/tmp/ipykernel_…` is what a warning or a traceback shows.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])/(?:home|root|tmp|work|opt|Users|private|mnt|var)/\w|\b[A-Za-z]:\\+Users\b"
)


# ---------------------------------------------------------------- reading and writing


def find_pages(names, folder=NOTEBOOKS):
    """The paths of the named pages, or of all; SystemExit for a name that fits none or several."""
    every = sorted(p for p in folder.glob("*.ipynb") if not p.name.startswith("."))
    if not names:
        if not every:
            raise SystemExit(f"no pages in {folder.name}/")
        return every
    found = []
    for name in names:
        stem = Path(name).name.removesuffix(".ipynb")
        hits = [p for p in every if p.stem == stem] or [
            p for p in every if p.stem.startswith(stem + "_")
        ]
        if len(hits) != 1:
            raise SystemExit(
                f"{name!r} fits {len(hits)} pages; there are: "
                + (", ".join(p.stem for p in every) or "none")
            )
        found += hits
    return found


def save(nb, path):
    """Write the notebook in one step: a reader sees the old page or the new one, never half."""
    nbformat.validate(nb)
    text = nbformat.writes(nb)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def clean(nb):
    """Strip, in place, what differs between machines; keep sources, ids, tags and outputs."""
    nb.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": LANGUAGE_INFO})
    nb.nbformat, nb.nbformat_minor = 4, 5
    for cell in nb.cells:
        cell.metadata = nbformat.from_dict(
            {k: v for k, v in cell.metadata.items() if k in KEPT_CELL_METADATA}
        )
        if cell.cell_type != "code":
            continue
        for output in cell.outputs:
            data = output.get("data", {})
            if WIDGET_VIEW in data:
                # The widget's state is not kept, so its view is an empty box on every static viewer
                # and its text/plain a line of Python. One plain note tells the reader what is
                # missing.
                output.data = nbformat.from_dict({"text/plain": WIDGET_NOTE})
                output.metadata = nbformat.from_dict({})
    return nb


# ---------------------------------------------------------------- percent format


def new_id(stem, cell, taken):
    """A short id that depends on the page and the cell's text alone, so that two runs agree."""
    for turn in range(10_000):
        digest = hashlib.sha256(
            f"{stem}\0{cell.cell_type}\0{cell.source}\0{turn}".encode()
        ).hexdigest()[:8]
        if digest not in taken:
            return digest
    raise RuntimeError("no free cell id")


def keep_from_old(stem, nb, old):
    """Give the cells of nb the ids, and where the text is the same the outputs, of the old page."""
    olds = old.cells if old else []
    taken, partner = set(), {}
    same = difflib.SequenceMatcher(
        a=[(c.cell_type, c.source) for c in olds],
        b=[(c.cell_type, c.source) for c in nb.cells],
        autojunk=False,
    )
    for kind, a0, a1, b0, b1 in same.get_opcodes():
        if kind in ("equal", "replace"):
            partner.update(
                {
                    j: olds[i]
                    for i, j in zip(range(a0, a1), range(b0, b1), strict=False)
                    if olds[i].cell_type == nb.cells[j].cell_type
                }
            )
    # A cell that moved is still the same cell.
    used = {id(c) for c in partner.values()}
    for j, cell in enumerate(nb.cells):
        if j not in partner or partner[j].source != cell.source:
            moved = [
                c
                for c in olds
                if id(c) not in used and (c.cell_type, c.source) == (cell.cell_type, cell.source)
            ]
            if moved:
                partner[j] = moved[0]
                used.add(id(moved[0]))
    for j, was in partner.items():
        if was.get("id") and was.id not in taken:
            nb.cells[j].id = was.id
            taken.add(was.id)
        else:
            nb.cells[j].id = ""
    for j, cell in enumerate(nb.cells):
        if j not in partner or not cell.id:
            cell.id = new_id(stem, cell, taken)
            taken.add(cell.id)
        was = partner.get(j)
        if was is not None and "attachments" in was:
            cell.attachments = was.attachments
        if cell.cell_type == "code" and was is not None and was.source == cell.source:
            cell.outputs, cell.execution_count = was.outputs, was.execution_count
    return nb


def from_py(path, folder=NOTEBOOKS):
    """Make or update the page of the same name from a percent-format file; returns its path."""
    import jupytext

    path = Path(path)
    nb = jupytext.reads(path.read_text(encoding="utf-8"), fmt="py:percent")
    target = folder / f"{path.stem}.ipynb"
    old = nbformat.read(target, as_version=4) if target.exists() else None
    folder.mkdir(parents=True, exist_ok=True)
    save(clean(keep_from_old(path.stem, nb, old)), target)
    return target


def to_py(page, out):
    """Write the page's cells in percent format, without ids and outputs; returns the path."""
    import jupytext

    nb = nbformat.read(page, as_version=4)
    nb.metadata = nbformat.from_dict({"jupytext": {"notebook_metadata_filter": "-all"}})
    target = Path(out) / f"{page.stem}.py"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(jupytext.writes(nb, fmt="py:percent"), encoding="utf-8")
    return target


# ---------------------------------------------------------------- running


def run(page, timeout=600):
    """Run the page from a fresh kernel, as a learner does, and save it; returns the seconds.

    Raises RuntimeError, and leaves the file as it was, where a cell fails, an output names a
    place on this machine, or somebody changed the page while it ran.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    before = page.read_bytes()
    nb = nbformat.reads(before.decode("utf-8"), as_version=4)
    os.environ.pop("MPLBACKEND", None)  # a backend set outside would keep figures out of the page
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    start = time.perf_counter()
    client = NotebookClient(
        nb,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(page.parent)}},
        coalesce_streams=True,
        record_timing=False,
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise RuntimeError(f"{page.stem}: a cell failed, the page is not saved\n{error}") from None
    seconds = time.perf_counter() - start
    # What a widget's callback prints goes to the widget, not to the cell: an error there would stay
    # unseen.
    for state in client.widget_state.values():
        for output in state.get("outputs") or []:
            if output["output_type"] == "error" or output.get("name") == "stderr":
                raise RuntimeError(
                    f"{page.stem}: a widget's callback failed, not saved\n{output_text(output)}"
                )
    clean(nb)
    for number, cell in enumerate(nb.cells):
        for output in cell.get("outputs", []):
            hit = MACHINE_PATH.search(output_text(output))
            if hit:
                around = output_text(output)[max(0, hit.start() - 40) : hit.end() + 60]
                raise RuntimeError(
                    f"{page.stem}: cell {number} prints a path of this machine, not saved: "
                    f"…{around}…"
                )
    if page.read_bytes() != before:
        raise RuntimeError(f"{page.stem}: the file changed while it ran, not saved; run it again")
    save(nb, page)
    return seconds


def output_text(output):
    """All text of one output: stream, traceback, and every text mimetype."""
    parts = [output.get("text", ""), "\n".join(output.get("traceback", []))]
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/") or kind == "image/svg+xml":
            parts.append("".join(value))
    return "\n".join("".join(p) for p in parts)


# ---------------------------------------------------------------- looking


def html(page, out):
    """Render the page to HTML. Returns the file's path."""
    from nbconvert import HTMLExporter

    out.mkdir(parents=True, exist_ok=True)
    exporter = HTMLExporter()
    exporter.exclude_anchor_links = True
    body, _ = exporter.from_filename(
        str(page), resources={"metadata": {"path": str(page.parent), "name": page.stem}}
    )
    target = out / f"{page.stem}.html"
    target.write_text(body, encoding="utf-8")
    return target


def screenshots(files):
    """Full-page pictures, wide and narrow, beside each HTML file; none without Chromium."""
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        print("no Chromium or no playwright here: HTML only")
        return []
    made = []
    with sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        for label, width in (("wide", 1200), ("narrow", 480)):
            tab = browser.new_page(viewport={"width": width, "height": 900})
            tab.route(
                re.compile("^https?:"), lambda route: route.abort()
            )  # what a page shows offline
            for file in files:
                tab.goto(file.resolve().as_uri())
                target = file.with_name(f"{file.stem}.{label}.png")
                tab.screenshot(path=target, full_page=True)
                made.append(target)
        browser.close()
    return made


# ---------------------------------------------------------------- the rules of a page
#
# Each rule takes a Page and returns its findings as sentences: which cell, what is wrong, what
# would be right.

MODULE = "tinygpt_helpers"
MAX_LINES, MAX_WIDTH, MAX_RUN, MAX_BYTES = 30, 100, 4, 1_500_000
OBJECTIVES = "What you will be able to do"
CLOSING = ["Summary", "Your turn", "Further reading"]
ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{8,}")
IMAGE = re.compile(r"!\[([^\]]*)\]\(\s*<?([^)\s>]+)>?[^)]*\)")
IMG_TAG = re.compile(r"<img\b[^>]*>", re.I)
# The target may hold one pair of brackets: `02_data.ipynb#Batches-(B,-T)`.
LINK = re.compile(
    r"(?<!!)\[(?:[^\[\]]|\[[^\]]*\]|!\[[^\]]*\]\([^)]*\))*\]\(\s*<?((?:[^()\s<>]|\([^()\s]*\))+)>?[^)]*\)"
)


class Page:
    """One notebook, with what several rules ask of it."""

    def __init__(self, path):
        self.path = Path(path)
        self.name = self.path.stem
        # Not nbformat.read: it mends missing and doubled ids in silence, and the rules should see
        # them.
        self.nb = nbformat.v4.reads(self.path.read_text(encoding="utf-8"))
        self.cells = self.nb.get("cells", [])
        digits = re.match(r"\d+", self.name)
        self.number = int(digits.group()) if digits else None

    def at(self, i, what):
        return f"{self.name}, cell {i} (id {self.cells[i].get('id', 'none')}): {what}"

    def of_kind(self, kind):
        return [(i, c) for i, c in enumerate(self.cells) if c.cell_type == kind]

    def headings(self):
        """(cell, level, text) of each heading, code blocks left out."""
        return [
            (i, len(m[1]), m[2].strip().rstrip("#").strip())
            for i, cell in self.of_kind("markdown")
            for m in re.finditer(r"^(#{1,6})\s+(.*)$", without_code_blocks(cell.source), re.M)
        ]

    def tagged(self, tag):
        return [(i, c) for i, c in self.of_kind("code") if tag in c.metadata.get("tags", [])]

    def neighbours(self):
        """The other pages of the folder, in order, this one included."""
        return sorted(p for p in self.path.parent.glob("[0-9]*.ipynb"))


def without_code_blocks(text):
    return re.sub(r"^( *)(```|~~~).*?^\1\2[^\n]*$", "", text, flags=re.M | re.S)


def without_code(text):
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", without_code_blocks(text), flags=re.S)


def plain(heading):
    """A heading's text as it is shown: without backticks, stars and link targets."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")


def has_image(cell):
    return any(k.startswith("image/") for o in cell.get("outputs", []) for k in o.get("data", {}))


def parse(source):
    """The cell's syntax tree; lines that only IPython reads (%magic, !shell) are left out."""
    lines = [re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in source.splitlines()]
    return ast.parse("\n".join(lines))


def top_calls(source):
    """The functions that a cell's own lines call for certain, such as `print` and `plt.show`."""
    try:
        lines = parse(source).body
    except SyntaxError:  # rule_code's business
        return
    for node in lines:
        if isinstance(node, ast.With):
            lines.extend(node.body)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield ast.unparse(node.value.func)


def defined_names(node):
    """The names that one statement defines: a def, a class, or an assignment to plain names."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets = (
        node.targets
        if isinstance(node, ast.Assign)
        else [node.target]
        if isinstance(node, ast.AnnAssign)
        else []
    )
    return [
        n.id
        for t in targets
        for n in (t.elts if isinstance(t, ast.Tuple) else [t])
        if isinstance(n, ast.Name)
    ]


def final_names(path):
    """The names that the page's cells tagged `final` define."""
    names = []
    for _, cell in Page(path).tagged("final"):
        try:
            names += [name for node in parse(cell.source).body for name in defined_names(node)]
        except SyntaxError:
            pass  # rule_code names it
    return names


def rule_name(page):
    if re.fullmatch(r"\d\d_[a-z0-9_]+", page.name):
        return []
    return [f"{page.path.name}: a page is called NN_name.ipynb, in small letters, digits and _"]


def rule_valid(page):
    if (page.nb.nbformat, page.nb.nbformat_minor) != (4, 5):
        return [f"{page.name}: nbformat {page.nb.nbformat}.{page.nb.nbformat_minor}, should be 4.5"]
    try:
        nbformat.validate(copy.deepcopy(page.nb))
    except nbformat.ValidationError as error:
        return [f"{page.name}: not a valid notebook: {str(error).splitlines()[0]}"]
    return []


def rule_ids(page):
    found, seen = [], {}
    for i, cell in enumerate(page.cells):
        name = cell.get("id")
        if not name:
            found.append(page.at(i, "has no id; `pages.py run` gives it one"))
        elif name in seen:
            found.append(page.at(i, f"has the same id as cell {seen[name]}; ids are unique"))
        seen.setdefault(name, i)
    return found


def rule_metadata(page):
    found = []
    if "widgets" in page.nb.metadata:
        found.append(
            f"{page.name}: metadata.widgets is there, and GitHub then shows no page; "
            "`pages.py run` strips it"
        )
    if page.nb.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append(
            f"{page.name}: the kernel is {page.nb.metadata.get('kernelspec')}, should be python3"
        )
    if "version" in page.nb.metadata.get("language_info", {}):
        found.append(f"{page.name}: language_info names a Python version; `pages.py run` strips it")
    for i, cell in enumerate(page.cells):
        extra = sorted(set(cell.metadata) - KEPT_CELL_METADATA)
        if extra:
            found.append(
                page.at(
                    i, f"metadata {extra} (times, view state) should not be saved; only `tags` is"
                )
            )
    return found


def rule_title(page):
    for i, cell in page.of_kind("markdown"):  # the other ways to write an H1
        if re.search(r"^\S.*\n=+\s*$|<h1\b", without_code(cell.source), re.M | re.I):
            return [page.at(i, "has an H1 that is underlined or HTML; write `# …`")]
    ones = [(i, text) for i, level, text in page.headings() if level == 1]
    if len(ones) != 1 or ones[0][0] != 0:
        where = ", ".join(f"cell {i} {text!r}" for i, text in ones) or "none"
        return [f"{page.name}: H1 headings: {where}; should be one, in the first cell"]
    digits = re.match(r"\d+(?=\D)", ones[0][1])
    if (
        not page.cells[0].source.startswith("# ")
        or not digits
        or int(digits.group()) != page.number
    ):
        return [
            page.at(
                0,
                f"should start with the H1 and the page's number, `# {page.number}. …`, "
                f"not {ones[0][1]!r}",
            )
        ]
    return []


def rule_heading_levels(page):
    found, last = [], 0
    for i, level, text in page.headings():
        if level > last + 1:
            found.append(
                page.at(
                    i,
                    f"heading {text!r} is of level {level} after level {last}; "
                    "levels go down by one",
                )
            )
        last = level
    return found


def rule_sections(page):
    """Page 00 is the way in: it needs no further reading, and its map comes last."""
    found = []
    twos = [(i, text) for i, level, text in page.headings() if level == 2]
    texts = [text for _, text in twos]
    if not any(i <= 3 and text == OBJECTIVES for i, text in twos):
        found.append(f"{page.name}: no heading `## {OBJECTIVES}` in the first four cells")
    first = "\n".join(c.source for i, c in page.of_kind("markdown") if i <= 3)
    if not re.search(r"\bminutes\b", first):
        found.append(f"{page.name}: the first four cells do not say how many minutes it takes")
    closing = CLOSING[:2] if page.number == 0 else CLOSING
    missing = [name for name in closing if texts.count(name) != 1]
    if missing:
        found.append(
            f"{page.name}: each of these H2 sections should be there once: {', '.join(missing)}"
        )
    elif page.number != 0 and texts[-len(CLOSING) :] != CLOSING:
        found.append(
            f"{page.name}: the page should end with {', '.join(CLOSING)}, "
            f"it ends with {', '.join(texts[-3:])}"
        )
    return found


def rule_exercises(page):
    """Each exercise has a check, which says of the empty stub that nothing was attempted."""
    starts = [i for i, level, text in page.headings() if (level, text) == (2, "Your turn")]
    said = [
        "".join(output.get("text", ""))
        for i, cell in page.of_kind("code")
        if starts and i > starts[0]
        for output in cell.outputs
    ]
    n = sum("not attempted" in text for text in said)
    return [] if n >= 2 else [f"{page.name}: {n} exercises with a check, 2 are the fewest"]


def rule_way(page):
    """The first cell leads to the page before and the page after."""
    pages = page.neighbours()
    here = pages.index(page.path) if page.path in pages else None
    if here is None:
        return []
    wanted = [p.name for p in pages[max(0, here - 1) : here + 2] if p != page.path]
    targets = (
        [unquote(t).partition("#")[0] for t in LINK.findall(page.cells[0].source)]
        if page.cells
        else []
    )
    return [
        page.at(0, f"has no link to its neighbour {name}") for name in wanted if name not in targets
    ]


def rule_code(page):
    found = []
    for i, cell in page.of_kind("code"):
        lines = cell.source.splitlines()
        if not cell.source.strip():
            found.append(page.at(i, "is an empty code cell; delete it"))
        if len(lines) > MAX_LINES:
            found.append(page.at(i, f"has {len(lines)} lines, {MAX_LINES} are the most; split it"))
        for k, line in enumerate(lines, 1):
            if len(line) > MAX_WIDTH:
                found.append(
                    page.at(i, f"line {k} has {len(line)} characters, {MAX_WIDTH} are the most")
                )
        try:
            parse(cell.source)
        except SyntaxError as error:
            if not cell.source.lstrip().startswith("%%"):
                found.append(page.at(i, f"is not Python: {error}"))
    return found


def rule_rhythm(page):
    found, row = [], 0
    for i, cell in enumerate(page.cells):
        row = row + 1 if cell.cell_type == "code" else 0
        if row == MAX_RUN + 1:
            found.append(
                page.at(
                    i, f"is code cell {row} in a row without a word between; {MAX_RUN} are the most"
                )
            )
    return found


def rule_executed(page):
    found = []
    for wanted, (i, cell) in enumerate(page.of_kind("code"), 1):
        if cell.execution_count != wanted:
            found.append(
                page.at(
                    i,
                    f"was run as number {cell.execution_count}, should be {wanted}; "
                    "run the page anew",
                )
            )
    if page.of_kind("code") and not any(c.outputs for _, c in page.of_kind("code")):
        found.append(f"{page.name}: no cell has an output; run the page")
    for i, cell in page.of_kind("code"):
        calls = set(top_calls(cell.source))
        if "plt.show" in calls and not has_image(cell):
            found.append(page.at(i, "calls plt.show, but no figure is saved; run the page"))
        if "print" in calls and not cell.outputs:
            found.append(page.at(i, "prints, but no output is saved; run the page"))
    return found


def rule_outputs(page):
    found = []
    for i, cell in page.of_kind("code"):
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(
                    page.at(i, f"ends in {output.ename}; catch the error in the cell and print it")
                )
            if output.get("name") == "stderr":
                found.append(page.at(i, f"warns: {output.text.strip()[:80]!r}; mend the cause"))
            hit = ADDRESS.search(output_text(output))
            if hit:
                found.append(
                    page.at(
                        i, f"prints a memory address, {hit.group()}, which changes with each run"
                    )
                )
    return found


def rule_machine_paths(page):
    found = []
    for i, cell in enumerate(page.cells):
        for where, text in [("names", cell.source)] + [
            ("prints", output_text(o)) for o in cell.get("outputs", [])
        ]:
            hit = MACHINE_PATH.search(text)
            if hit:
                around = text[hit.start() : hit.start() + 40]
                found.append(
                    page.at(
                        i, f"{where} a place on one machine: {around!r}; use a path from notebooks/"
                    )
                )
    return found


def rule_widgets(page):
    """A widget is dead on every static viewer: a figure drawn without it must stand by."""
    found, code = [], page.of_kind("code")
    for k, (i, cell) in enumerate(code):
        datas = [o.get("data", {}) for o in cell.outputs]
        if any(WIDGET_VIEW in d for d in datas):
            found.append(
                page.at(
                    i,
                    "holds a widget's view, an empty box on GitHub; "
                    "`pages.py run` puts a note there",
                )
            )
        elif any(WIDGET_NOTE in "".join(d.get("text/plain", "")) for d in datas):
            if not has_image(cell) and not (k + 1 < len(code) and has_image(code[k + 1][1])):
                found.append(
                    page.at(i, "shows a widget; draw a static figure in this code cell or the next")
                )
    return found


def rule_images(page):
    found = []
    for i, cell in page.of_kind("markdown"):
        text = without_code(cell.source)
        if tag := re.search(r"<(iframe|video|audio|embed|object|script)\b", text, re.I):
            found.append(page.at(i, f"has a <{tag[1]}>, which may fetch something; draw a figure"))
        images = IMAGE.findall(text)
        for tag in IMG_TAG.findall(text):
            alt, src = (
                re.search(rf"\b{key}\s*=\s*[\"']([^\"']*)", tag, re.I) for key in ("alt", "src")
            )
            images.append((alt[1] if alt else "", src[1] if src else ""))
        for alt, src in images:
            if not alt.strip():
                found.append(page.at(i, f"image {src[:60]!r} has no alt text; say what it shows"))
            if src.startswith("attachment:"):
                if src.removeprefix("attachment:") not in cell.get("attachments", {}):
                    found.append(page.at(i, f"image {src!r} is not attached to the cell"))
            elif re.match(r"[a-z]+:|//", src, re.I):
                found.append(
                    page.at(
                        i,
                        f"image {src[:60]!r} is fetched from elsewhere; keep it in the repository",
                    )
                )
            elif not (page.path.parent / unquote(src)).is_file():
                found.append(page.at(i, f"image file {src!r} does not exist"))
    for i, cell in page.of_kind("code"):
        for output in cell.outputs:
            data = output.get("data", {})
            markup = "".join("".join(data.get(f"text/{kind}", "")) for kind in ("html", "markdown"))
            if re.search(r"(src\s*=\s*[\"']?|!\[[^\]]*\]\(\s*)(https?:)?//", markup, re.I):
                found.append(page.at(i, "its HTML output fetches something from elsewhere"))
    return found


def rule_captions(page):
    """Each figure's finding in words, for whoever cannot see it: `**Figure 3.2.** The loss…`"""
    found, figures = [], [i for i, c in page.of_kind("code") if has_image(c)]
    for k, i in enumerate(figures, 1):
        wanted = f"**Figure {page.number}.{k}.**"
        after = next(
            (j for j in range(i + 1, len(page.cells)) if page.cells[j].cell_type == "markdown"),
            None,
        )
        shared = after is not None and any(i < j < after for j in figures)
        text = page.cells[after].source if after is not None and not shared else ""
        if not text.startswith(wanted):
            found.append(
                page.at(i, f"draws a figure; the next markdown cell should begin with {wanted!r}")
            )
        elif len(text.split("\n\n")[0].removeprefix(wanted).split()) < 5:
            found.append(
                page.at(after, f"the caption of {wanted} should tell the finding in a sentence")
            )
    starts = [i for i, c in page.of_kind("markdown") if c.source.startswith("**Figure")]
    if len(starts) > len(figures):
        found.append(
            f"{page.name}: {len(starts)} captions for {len(figures)} figures; was the page run?"
        )
    return found


def anchors(path):
    """What `#…` may name in a file: Jupyter's way for notebooks, GitHub's for Markdown."""
    if path.suffix == ".ipynb":
        return {plain(text).replace(" ", "-") for _, _, text in Page(path).headings()}
    heads = re.findall(
        r"^#{1,6}\s+(.*)$", without_code_blocks(path.read_text(encoding="utf-8")), re.M
    )
    return {
        re.sub(r"[^\w\- ]", "", plain(text).lower()).strip().replace(" ", "-") for text in heads
    }


def broken_links(text, path):
    """What is wrong with the links of a Markdown text that stands in the file `path`."""
    found = []
    if odd := re.search(r"^ {0,3}\[[^\]]+\]:\s|<a\s[^>]*href", without_code(text), re.M | re.I):
        found.append(f"link {odd[0].strip()!r}: write `[text](target)`, which is checked")
    for target in LINK.findall(without_code(text)):
        if re.match(r"[a-z]+:|//", target, re.I):
            if not target.startswith("https://"):
                found.append(f"link {target!r} should be https:// or a path in the repository")
            continue
        name, _, anchor = unquote(target).partition("#")
        file = path.parent / name if name else path
        if not file.exists():
            found.append(f"link {target!r}: there is no {name}")
        elif anchor and file.suffix in (".ipynb", ".md") and anchor not in anchors(file):
            found.append(
                f"link {target!r}: no such heading; {file.name} has "
                + ", ".join(sorted(anchors(file)))
            )
    return found


def rule_links(page):
    return [
        page.at(i, what)
        for i, cell in page.of_kind("markdown")
        for what in broken_links(cell.source, page.path)
    ]


def imported_names(page):
    """{name: cell} of what the page takes from the module, by import or as an attribute."""
    names = {}
    for i, cell in page.of_kind("code"):
        try:
            tree = parse(cell.source)
        except SyntaxError:
            continue  # rule_code names it
        called = {
            a.asname or a.name
            for n in ast.walk(tree)
            if isinstance(n, ast.Import)
            for a in n.names
            if a.name == MODULE
        }
        page.aliases = getattr(page, "aliases", set()) | called
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == MODULE:
                for alias in node.names:
                    names.setdefault(alias.name, i)
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in page.aliases
            ):
                names.setdefault(node.attr, i)
    return names


def rule_imports(page):
    """One paragraph or list item names what is imported and links to the page that builds it.

    Page 00 shows the end first, so it may import from any page; another page may import from one
    after it only where that paragraph says the word "later".
    """
    names = imported_names(page)
    names = {name: i for name, i in names.items() if not name.startswith("__")}
    if not names:
        return []
    builders = {name: p.name for p in page.neighbours() for name in final_names(p)}
    blocks = [
        b
        for _, c in page.of_kind("markdown")
        for b in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.)\s?)", c.source)
    ]
    found = []
    for name, i in names.items():
        builder = builders.get(name)
        if name == "*":
            found.append(page.at(i, f"imports * from {MODULE}; name what the page needs"))
        elif builder is None:
            found.append(
                page.at(i, f"imports {name}, which no page builds in a cell tagged `final`")
            )
        elif builder != page.path.name:
            called = re.compile(rf"`{name}(\(.*?\))?`")
            said = [b for b in blocks if called.search(b) and f"({builder}" in b]
            early = builder > page.path.name and not page.path.name.startswith("00")
            if early and not any("later" in b for b in said):
                found.append(page.at(i, f"imports {name}, which is built only later, in {builder}"))
            elif not said:
                found.append(
                    page.at(
                        i,
                        f"imports {name}; an Imports note should say: `{name}` from […]({builder})",
                    )
                )
    return found


def rule_size(page):
    size = page.path.stat().st_size
    if size <= MAX_BYTES:
        return []
    return [f"{page.name}: {size:,} bytes, {MAX_BYTES:,} are the most; draw smaller figures"]


RULES = [value for name, value in list(globals().items()) if name.startswith("rule_")]


def check(path):
    """All findings of all rules about one page."""
    page = Page(path)
    return [finding for rule in RULES for finding in rule(page)]


# ---------------------------------------------------------------- command line


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["from-py", "to-py", "run", "check", "html"])
    parser.add_argument("names", nargs="*")
    parser.add_argument(
        "--out", type=Path, default=Path("pages-out"), help="folder for html and to-py"
    )
    parser.add_argument("--folder", type=Path, default=NOTEBOOKS, help="the pages' folder")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a cell may take")
    args = parser.parse_args(argv)
    if args.command == "from-py":
        for name in args.names:
            print("wrote", from_py(name, args.folder).name)
        return 0
    pages = find_pages(args.names, args.folder)
    failed = 0
    if args.command == "run":
        for page in pages:
            try:
                print(f"{page.stem}: {run(page, args.timeout):.1f} s", flush=True)
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                failed += 1
    elif args.command == "check":
        for page in pages:
            findings = check(page)
            failed += bool(findings)
            print(f"{page.stem}: {len(findings)} findings" if findings else f"{page.stem}: clean")
            for finding in findings:
                print("  " + finding)
    elif args.command == "to-py":
        for page in pages:
            print("wrote", to_py(page, args.out))
    else:
        files = [html(page, args.out) for page in pages]
        for made in files + screenshots(files):
            print("wrote", made)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
