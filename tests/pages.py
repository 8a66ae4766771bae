"""The page tool: runs and checks the course's pages, and writes the module from them.

    pages.py run [NAME...]               run from a fresh kernel, clean, save with outputs
    pages.py check [NAME...]             print what breaks a rule of a page (RULES, below)
    pages.py module [--check]            write tinygpt_helpers.py, or show how it differs

No NAME means every page. NAME may be `01_tokenizer`, `01_tokenizer.ipynb` or `01`.
"""

import argparse
import ast
import copy
import difflib
import os
import re
import sys
import time
from pathlib import Path
from unittest.mock import patch
from urllib.parse import unquote

import nbformat

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
MODULE = "tinygpt_helpers"
MARK = f"# → {MODULE}.py"  # the first line of a finished cell; the module is made of these
# Without Python's version: it would change with every machine that saves the page.
METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"codemirror_mode": {"name": "ipython", "version": 3}, "name": "python",
                      "file_extension": ".py", "mimetype": "text/x-python",
                      "nbconvert_exporter": "python", "pygments_lexer": "ipython3"},
}
# These train for long enough: for them, Colab starts a machine with a GPU.
GPU_PAGES = {name: {"accelerator": "GPU", "colab": {"gpuType": "T4"}} for name in ("00", "04")}
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
WIDGET_NOTE = "[interactive control: run this cell to use it]"  # what the saved page has instead
# A place on one machine. `/tmp/ipykernel_…` is what a warning or a traceback shows.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/])/(?:home|root|tmp|work|opt|Users|private|mnt|var)/\w|\b[A-Za-z]:\\+Users\b")


# ---------------------------------------------------------------- reading, writing, running


def find_pages(names, folder=NOTEBOOKS):
    """The paths of the named pages, or of all; SystemExit for a name that fits none or several.
    A learner's copies are left out (JupyterLab calls them …-Copy1)."""
    every = sorted(p for p in folder.glob("[!.]*.ipynb") if "-Copy" not in p.stem)
    found = [] if names else every
    for stem in (Path(name).name.removesuffix(".ipynb") for name in names):
        hits = [p for p in every if f"{p.stem}_".startswith(f"{stem}_")]
        found += hits if len(hits) == 1 else [p for p in hits if p.stem == stem]
    if not found or len(found) < len(names):
        raise SystemExit(f"{folder.name}/ has {', '.join(p.stem for p in every) or 'no pages'}; "
                         f"{' '.join(names)} should name one each")
    return found


def write(path, text):
    """Write a file in one step: a reader sees the old text or the new one, never half."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def save(nb, path):
    """Write the notebook without what differs between machines: sources, ids, tags, outputs."""
    metadata = METADATA | GPU_PAGES.get(path.name[:2], {})
    nb.metadata, nb.nbformat, nb.nbformat_minor = nbformat.from_dict(metadata), 4, 5
    for i, cell in enumerate(nb.cells):
        for key in set(cell.metadata) - {"tags"}:
            del cell.metadata[key]
        for output in list(cell.get("outputs", [])):
            if "application/javascript" in output.get("data", {}):  # it draws nothing
                cell.outputs.remove(output)
            if WIDGET_VIEW in output.get("data", {}):  # an empty box on every static viewer
                output.update(data={"text/plain": WIDGET_NOTE}, metadata={})
            if "image/png" in output.get("data", {}) and (words := caption(nb.cells, i)):
                output.metadata.setdefault("image/png", {})["alt"] = words
    nbformat.validate(nb)
    write(path, nbformat.writes(nb).rstrip("\n") + "\n")


def caption(cells, i):
    """The caption below the figure of cell i in plain words, which are its alt text; "" if none."""
    below = next((c.source for c in cells[i:] if c.cell_type == "markdown"), "")
    words = re.sub(r"\[(.*?)\]\(.*?\)|[`*]", r"\1", below.split("\n\n")[0])
    return " ".join(words.split()) if below.startswith("**Figure") else ""


def output_text(*outputs):
    """All text of outputs: streams, tracebacks, and every text mimetype."""
    values = [value for o in outputs for value in
              [o.get("text", ""), *o.get("traceback", []),
               *(v for k, v in o.get("data", {}).items() if "text/" in k or "svg" in k)]]
    return "\n".join("".join(value) for value in values)


def run(page, timeout=600):
    """Run the page from a fresh kernel, as a learner does, and save it; returns the seconds.
    Raises RuntimeError, and leaves the file as it was, where a cell fails, an output names a
    place on this machine, or somebody changed the page while it ran."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from nbclient.output_widget import OutputWidget
    before, start = page.read_bytes(), time.perf_counter()
    nb = nbformat.reads(before.decode("utf-8"), as_version=4)
    os.environ.pop("MPLBACKEND", None)  # a backend set outside would keep figures out of the page
    client = NotebookClient(nb, timeout=timeout, kernel_name="python3", coalesce_streams=True,
                            record_timing=False, resources={"metadata": {"path": str(page.parent)}})
    try:
        # What a widget shows is noted here; to tell the kernel as well, while its answer is awaited
        # on the same socket, can lose that answer, and the page would wait for ever.
        with patch.object(OutputWidget, "send"):
            client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise RuntimeError(f"{page.stem} is not saved: a cell failed\n{error}") from None
    seconds = time.perf_counter() - start
    # What a widget's callback prints goes to the widget, not to the cell.
    said = [o for state in client.widget_state.values() for o in state.get("outputs") or []]
    wrong = [f"a widget's callback failed: {output_text(o)}" for o in said
             if o["output_type"] == "error" or o.get("name") == "stderr"]
    texts = [output_text(*cell.get("outputs", [])) for cell in nb.cells]
    wrong += [f"cell {i} prints a path of this machine: …{text[max(0, hit.start() - 40) :][:100]}…"
              for i, text in enumerate(texts) if (hit := MACHINE_PATH.search(text))]
    if page.read_bytes() != before:
        wrong.append("the file changed while it ran; run it again")
    if wrong:
        raise RuntimeError(f"{page.stem} is not saved: {wrong[0]}")
    save(nb, page)
    return seconds


class Page:
    """One notebook, with what several rules ask of it."""
    def __init__(self, path):
        self.path, self.name = Path(path), Path(path).stem
        # Not nbformat.read: it mends missing and doubled ids in silence; the rules should see them.
        self.nb = nbformat.v4.reads(self.path.read_text(encoding="utf-8"))
        self.cells = self.nb.get("cells", [])
        self.code, self.markdown = (
            [(i, c) for i, c in enumerate(self.cells) if c.cell_type == kind]
            for kind in ("code", "markdown"))
        self.finished = [(i, c.source.partition("\n")[2]) for i, c in self.code
                         if c.source.split("\n")[0] == MARK]  # without the mark
        self.headings = [(i, *head) for i, c in self.markdown for head in headings(c.source)]
        self.figures = [i for i, c in self.code if "image/" in " ".join(
            kind for o in c.outputs for kind in o.get("data", {}))]
        self.neighbours = sorted(self.path.parent.glob("[0-9]*.ipynb"))  # and itself
        self.number = int((re.match(r"\d+", self.name) or "9")[0])

    def at(self, i, what):
        """One finding as a sentence; i is the cell's number, None for the page as a whole."""
        cell = "" if i is None else f", cell {i} (id {self.cells[i].get('id', 'none')})"
        return f"{self.name}{cell}: {what}"


def without_code(text, inline=True):
    text = re.sub(r"^( *)(```|~~~).*?^\1\2[^\n]*$", "", text, flags=re.M | re.S)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text, flags=re.S) if inline else text


def headings(text):
    """(level, text) of each heading of a Markdown text."""
    found = re.findall(r"^(#{1,6})\s+(.*?)[ #]*$", without_code(text, inline=False), re.M)
    return [(len(marks), words) for marks, words in found]


def statements(source, magic=True):
    """The cell's statements, none if it is not Python; with magic, what %, ! begins is `pass`."""
    for text in [source, re.sub(r"(?m)^(\s*)[%!].*", r"\1pass", source)][: 1 + magic]:
        try:
            return ast.parse(text).body
        except SyntaxError:
            pass  # rule_code says so
    return []


def defined_names(node):
    """The names that one statement defines: a def, a class, or an assignment to plain names."""
    if isinstance(node, ASSIGNMENTS):
        targets = getattr(node, "targets", None) or [node.target]
        return [n.id for n in targets] if all(isinstance(n, ast.Name) for n in targets) else []
    return [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []


# ---------------------------------------------------------------- the module

HEADER = '''\
"""TinyGPT: a decoder-only transformer, from characters to generated text, in one file.

`make module` writes it from the finished cells of the pages that its headings name.
B: batch, T: tokens in a window, C: width (d_model), V: size of the vocabulary."""'''
TITLES = {"00": "start here", "01": "text and tokenizer", "02": "windows and batches",
          "03": "the model", "04": "training", "05": "generation", "06": "looking inside",
          "07": "the KV cache", "08": "serving"}
IMPORTS, ASSIGNMENTS = (ast.Import, ast.ImportFrom), (ast.Assign, ast.AnnAssign)


def module_text(folder=NOTEBOOKS):
    """The module as the finished cells make it; SystemExit, naming the cell, where they do not."""
    imports, sections, homes = [], [], {}
    for page in map(Page, find_pages([], folder)):
        parts = {}  # name: (its text, whether it is a plain assignment)
        for finding in rule_finished(page):
            raise SystemExit(page.at(*finding))
        for i, body in page.finished:
            nodes, lines, end = statements(body), body.split("\n"), 0
            if isinstance(nodes[0], IMPORTS):
                imports, nodes = [body.strip("\n")], []
            for node in nodes:  # with the comments above it; the last one with those below it
                stop = len(lines) if node is nodes[-1] else node.end_lineno
                text, end = "\n".join(lines[end:stop]).strip("\n"), stop
                first, _, rest = text.partition("\n")
                new = set(defined_names(node))
                if goes_on := re.fullmatch(r"class (\w+)\(\1\):  # goes on", first):
                    name, new = goes_on[1], set()
                    if name not in parts:
                        raise SystemExit(page.at(i, f"{name} goes on, but its class is not above"))
                    parts[name] = (parts[name][0] + "\n\n" + rest.strip("\n"), False)
                else:
                    parts[min(new)] = (text, isinstance(node, ASSIGNMENTS))
                if isinstance(node, ast.ClassDef):
                    new |= {f"{node.name}.{m.name}" for m in node.body if hasattr(m, "name")}
                for name in new:
                    if name in homes:
                        raise SystemExit(page.at(i, f"{name} is defined again; {homes[name]}"))
                    homes[name] = page.at(i, "here first")
        key, last = page.name.split("_")[0], False
        section = f"# {'-' * 56} page {key}: {TITLES.get(key, page.name)}"
        for text, assigned in parts.values():
            section, last = section + ("\n" if last and assigned else "\n\n") + text, assigned
        sections += [section] if parts else []
    return "\n\n".join([HEADER, *imports, *sections]) + "\n"


def write_module(folder, only_check=False):
    """Write the module beside the folder of the pages, or show how it differs; 1 if it does."""
    path, new = folder.resolve().parent / f"{MODULE}.py", module_text(folder)
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    if not only_check:
        write(path, new)
    elif old != new:
        diff = list(difflib.unified_diff(old.split("\n"), new.split("\n"), n=1, lineterm=""))
        print(*diff[:40], f"{len(diff)} lines; `make module` writes {path.name} anew", sep="\n")
        return 1
    print(path.name, "is what the pages make")
    return 0


# ---------------------------------------------------------------- the rules of a page
# Each rule takes a Page and yields what breaks it: (the cell's number, what is wrong there and what
# would be right); None instead of a number for the page as a whole.

MAX_LINES, MAX_FINISHED, MAX_WIDTH, MAX_RUN, MAX_BYTES = 30, 60, 88, 4, 1_500_000
OBJECTIVES = "What you will be able to do"
CLOSING = ["Summary", "Your turn", "Further reading"]
# The target may hold one pair of brackets: `02_data.ipynb#Batches-(B,-T)`.
LINK = re.compile(r"(?<!!)\[(?:[^\[\]]|\[[^\]]*\]|!\[[^\]]*\]\([^)]*\))*\]"
                  r"\(\s*<?((?:[^()\s<>]|\([^()\s]*\))+)>?[^)]*\)")
# What a cell's text, its outputs, or its text without `code` should not hold.
UNWANTED = [
    ("source", MACHINE_PATH, "names a place on one machine"),
    ("output", MACHINE_PATH, "prints a place on one machine"),
    ("output", r"\b0x[0-9a-fA-F]{8,}", "prints a memory address, which changes with each run"),
    ("output", r"(?i)(src\s*=\s*[\"']?|!\[[^\]]*\]\(\s*)(https?:)?//", "fetches its output"),
    ("prose", r"(?i)<(iframe|video|audio|embed|object|script)\b", "may fetch something"),
    ("prose", r"(?im)^\S.*\n=+\s*$|<h1\b", "has an H1 that is not written `# …`"),
    ("prose", r"(?im)^ {0,3}\[[^\]]+\]:\s|<a\s[^>]*href|<img\b", "write `[…](…)`, `![…](…)`"),
]


def rule_unwanted(page):
    for i, cell in enumerate(page.cells):
        texts = {"source": cell.source, "output": output_text(*cell.get("outputs", [])),
                 "prose": without_code(cell.source) if cell.cell_type == "markdown" else ""}
        for where, pattern, what in UNWANTED:
            if hit := re.search(pattern, texts[where]):
                yield i, f"{what}: {texts[where][hit.start() : hit.start() + 40]!r}"


def rule_format(page):
    """A valid notebook with ids, metadata that fits every machine, and of no great size."""
    nb, size = page.nb, page.path.stat().st_size
    if size > MAX_BYTES:
        yield None, f"{size:,} bytes, {MAX_BYTES:,} are the most; draw smaller figures"
    if (nb.nbformat, nb.nbformat_minor) != (4, 5):
        yield None, f"nbformat {nb.nbformat}.{nb.nbformat_minor}, should be 4.5"
    try:
        nbformat.validate(copy.deepcopy(nb))
    except nbformat.ValidationError as error:
        yield None, f"not a valid notebook: {str(error).splitlines()[0]}"
    right = METADATA | GPU_PAGES.get(page.name[:2], {})
    if wrong := {k for k in {*nb.metadata, *right} if nb.metadata.get(k) != right.get(k)}:
        yield None, f"metadata of this machine: {sorted(wrong)}; run the page"
    ids = [cell.get("id") for cell in page.cells]
    for i, cell in enumerate(page.cells):
        if not ids[i] or ids[i] in ids[:i]:
            yield i, "has no id, or that of another cell"
        if extra := sorted(set(cell.metadata) - {"tags"}):
            yield i, f"metadata {extra} should not be saved; only `tags` is; run the page"


def rule_headings(page):
    """One H1 in the first cell, with the page's number; aims, minutes, and the closing sections.
    Page 00 is the way in: it needs no further reading, and its map comes last."""
    ones = [i for i, level, _ in page.headings if level == 1]
    start = "\n".join(c.source for c in page.cells[:4] if c.cell_type == "markdown")
    if ones != [0] or not re.match(rf"# 0*{page.number}\D", start):
        yield None, f"should start with its only H1, `# {page.number}. …`; H1 in cells {ones}"
    for (_, above, _), (i, level, text) in zip(page.headings, page.headings[1:]):
        if level > above + 1:
            yield i, f"heading {text!r} is of level {level} after level {above}"
    if (2, OBJECTIVES) not in headings(start) or not re.search(r"\bminutes\b", start):
        yield None, f"the first four cells should have `## {OBJECTIVES}` and tell the minutes"
    closing, twos = CLOSING[: 3 if page.number else 2], [t for _, n, t in page.headings if n == 2]
    if [t for t in twos if t in closing] != closing or page.number and twos[-3:] != closing:
        yield None, f"should end with the H2 sections {', '.join(closing)}; it has {twos}"
    # Each exercise has a check, which says of the empty stub that nothing was attempted.
    turn = next((i for i, *head in page.headings if head == [2, "Your turn"]), len(page.cells))
    n = sum("not attempted" in output_text(o) for i, c in page.code if i > turn for o in c.outputs)
    if n < 2:
        yield None, f"{n} exercises with a check, 2 are the fewest"


def rule_finished(page):
    """A finished cell: the mark, then definitions; the first one of page 00 has the imports."""
    for i, cell in page.code:
        marks = re.findall(rf"(?m)^\s*#\s*(?:→|->)\s*{MODULE}", cell.source)
        if len(marks) != (cell.source.split("\n")[0] == MARK):
            yield i, f"`{MARK}`, exactly so, should be its first line"
    for i, body in page.finished:
        nodes = statements(body, magic=False)
        imports = [node for node in nodes if isinstance(node, IMPORTS)]
        if imports and (page.number, i, imports) != (0, page.finished[0][0], nodes):
            yield i, "imports; the module's are the first finished cell of page 00, alone"
        if not nodes or not all(n in imports or defined_names(n) for n in nodes):
            yield i, "is finished; it should hold Python definitions and assignments to names alone"


def rule_code(page):
    """Short cells and lines of Python, with a word between them."""
    kinds = "".join(cell.cell_type[0] for cell in page.cells)
    for hit in re.finditer("c" * (MAX_RUN + 1), kinds):
        yield hit.end() - 1, f"is code cell {MAX_RUN + 1} in a row without a word between"
    for i, cell in page.code:
        lines = cell.source.splitlines()
        most = MAX_FINISHED if MARK in lines[:1] else MAX_LINES
        if len(lines) > most:
            yield i, f"has {len(lines)} lines, {most} are the most; split it"
        if wide := [k for k, line in enumerate(lines, 1) if len(line) > MAX_WIDTH]:
            yield i, f"lines {wide} have more than {MAX_WIDTH} characters"
        if not statements(cell.source) and not cell.source.lstrip().startswith("%%"):
            yield i, "is empty or not Python"


def rule_outputs(page):
    """The page was run from top to bottom, and each cell shows what it makes, and no error."""
    if page.code and not any(c.outputs for _, c in page.code):
        yield None, "no cell has an output; run the page"
    for k, (i, cell) in enumerate(page.code):
        if cell.execution_count != k + 1:
            yield i, f"was run as number {cell.execution_count}, not {k + 1}; run the page anew"
        calls = re.findall(r"^(plt\.show|print)\(", cell.source, re.M)
        if "print" in calls and not cell.outputs or "plt.show" in calls and i not in page.figures:
            yield i, "prints or draws, but that is not saved; run the page"
        if any(o.output_type == "error" or o.get("name") == "stderr" for o in cell.outputs):
            yield i, f"fails or warns; mend the cause: {output_text(*cell.outputs).strip()[:80]!r}"
        if any(WIDGET_VIEW in o.get("data", {}) for o in cell.outputs):
            yield i, "holds a widget's view, an empty box on GitHub; run the page"
        # A widget is dead on every static viewer: a figure drawn without it must stand by.
        near = {j for j, _ in page.code[k : k + 2]}
        if WIDGET_NOTE in output_text(*cell.outputs) and not near & {*page.figures}:
            yield i, "shows a widget; draw a static figure in this code cell or the next"


def rule_images(page):
    """Pictures are in the repository and are told in words: `**Figure 3.2.** The loss…`"""
    for i, cell in page.markdown:
        for alt, src in re.findall(r"!\[([^\]]*)\]\(\s*([^)\s]+)", without_code(cell.source)):
            if not alt.strip() or not (page.path.parent / unquote(src)).is_file():
                yield i, f"image {src[:60]!r} should be a file of the repository, with an alt text"
    for k, i in enumerate(page.figures, 1):
        wanted = f"**Figure {page.number}.{k}.** "
        after = next((j for j, _ in page.markdown if j > i), i)
        told = page.cells[after].source.split("\n\n")[0]
        if any(i < j <= after for j in page.figures) or not told.startswith(wanted) or len(
                told.split()) < 7:
            yield i, f"draws; the next text should begin with {wanted!r} and tell the finding"
        if any(o.metadata.get("image/png", {}).get("alt") != caption(page.cells, i)
               for o in page.cells[i].outputs if "image/png" in o.get("data", {})):
            yield i, "draws, and the alt text is not its caption; run the page"
    if sum(c.source.startswith("**Figure") for _, c in page.markdown) > len(page.figures):
        yield None, f"more captions than figures ({len(page.figures)}); was the page run?"


def anchors(path):
    """What `#…` may name in a file: Jupyter's way for notebooks, GitHub's for Markdown."""
    if path.suffix == ".ipynb":
        heads = [re.sub(r"\[(.*?)\]\(.*?\)|[`*]", r"\1", text) for *_, text in Page(path).headings]
    else:
        found = headings(path.read_text("utf-8"))
        heads = [re.sub(r"[^\w\- ]", "", text.lower()) for _, text in found]
    return {head.strip().replace(" ", "-") for head in heads}


def broken_links(text, path):
    """What is wrong with the links of a Markdown text that stands in the file `path`."""
    for link in LINK.finditer(without_code(text)):
        target, said = link[1], link[0].rpartition("](")[0]
        name, _, anchor = unquote(target).partition("#")
        file = path.parent / name if name else path
        if re.match(r"[a-z]+:|//", target, re.I):
            if not target.startswith("https://"):
                yield f"link {target!r} should be https:// or a path in the repository"
        elif not file.exists():
            yield f"link {target!r}: there is no {name}"
        elif anchor and file.suffix in (".ipynb", ".md") and anchor not in anchors(file):
            yield f"link {target!r}: no such heading; there are {', '.join(sorted(anchors(file)))}"
        elif anchor and file.suffix == ".ipynb" and anchor not in re.sub(r"\s", "-", said):
            yield f"link {target!r} should name the section; many viewers only open the page"


def rule_links(page):
    """Links lead somewhere, and those of the first cell to the page before and the page after."""
    yield from ((i, what) for i, c in page.markdown for what in broken_links(c.source, page.path))
    way = {unquote(t).partition("#")[0] for t in LINK.findall(page.cells[0].source)}
    pairs = zip(page.neighbours, page.neighbours[1:])
    near = {path.name for pair in pairs if page.path in pair for path in pair} - {page.path.name}
    yield from ((0, f"has no link to its neighbour {name}") for name in near - way)


def rule_imports(page):
    """One paragraph or list item names what is imported and links to the page that builds it.
    Page 00 shows the end first, so it may import from any page; another page may import from one
    after it only where that paragraph says the word "later"."""
    nodes = [(i, n) for i, c in page.code for s in statements(c.source) for n in ast.walk(s)]
    modules = {a.asname or a.name for _, n in nodes if isinstance(n, ast.Import)
               for a in n.names if a.name == MODULE}
    names = {a.name: i for i, n in nodes if getattr(n, "module", None) == MODULE for a in n.names}
    names |= {n.attr: i for i, n in nodes if isinstance(n, ast.Attribute)
              and getattr(n.value, "id", None) in modules and not n.attr.startswith("__")}
    builders = {name: path.name for path in page.neighbours for _, body in Page(path).finished
                for n in statements(body) for name in defined_names(n)}
    blocks = [b for _, c in page.markdown
              for b in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|]|\d+\.)\s?)", c.source)]
    for name, i in names.items():
        builder = builders.get(name)
        said = [b for b in blocks if re.search(rf"`{re.escape(name)}(\(.*?\))?`", b)
                and f"({builder}" in b]
        if builder is None:
            yield i, f"imports {name}, which no page builds in a finished cell"
        elif builder > page.path.name and page.number and not any("later" in b for b in said):
            yield i, f"imports {name}, which is built only later, in {builder}"
        elif builder != page.path.name and not said:
            yield i, f"imports {name}; an Imports note should say: `{name}` from […]({builder})"


RULES = [value for name, value in list(globals().items()) if name.startswith("rule_")]


def check(path):
    """All findings of all rules about one page, as sentences."""
    page = Page(path)
    return [page.at(*finding) for rule in RULES for finding in rule(page)]


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["run", "check", "module"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--folder", type=Path, default=NOTEBOOKS, help="the pages' folder")
    parser.add_argument("--check", action="store_true", help="module: only show what differs")
    args = parser.parse_args(argv)
    if args.command == "module":
        return write_module(args.folder, args.check)
    failed = 0
    for page in find_pages(args.names, args.folder):
        if args.command == "run":
            try:
                print(f"{page.stem}: {run(page):.1f} s", flush=True)
            except RuntimeError as error:
                print(error, file=sys.stderr, flush=True)
                failed = 1
        else:
            findings = check(page)
            print(f"{page.stem}: {len(findings) or 'no'} findings", *findings, sep="\n  ")
            failed = failed or int(bool(findings))
    return failed


if __name__ == "__main__":
    sys.exit(main())
