"""Write the course's address everywhere, or take it out again.

    make publish REPO=owner/name           # the branch main of that repository on GitHub
    make publish REPO=owner/name REF=v1.0  # another branch, or a tag
    make publish REPO=                     # no address, as before the first time

The setting is [tool.course] in pyproject.toml. What follows from it: the set-up cell of every page
and the link to Colab in its first cell, the badges in the README, a line of CITATION.cff.
"""

import argparse
import re
from pathlib import Path

import nbformat
import pages
from nbformat.v4 import new_code_cell, new_markdown_cell

ROOT = Path(__file__).resolve().parent.parent
IDS = ["setup-note", "setup"]

# The words before the first code cell of every page, and that cell.
NOTE = """\
The next cell lets this page find the rest of the course. Where you opened the page alone, as on
Colab, it fetches the course first. That needs the network: on Kaggle, switch *Internet* on in the
settings."""
SETUP = """\
import glob, os, subprocess, sys, tempfile
COURSE = os.environ.get("TINYGPT_COURSE", "{address}")
here = [p for p in (".", "..", "tinygpt") if os.path.isfile(f"{{p}}/tinygpt_helpers.py")]
if not here:  # this page is alone: fetch the course, once, with git or else without it
    part = tempfile.TemporaryDirectory(dir=os.getcwd())  # all of it, or nothing
    git = f'git clone -q --depth=1 -b {ref} "{{COURSE}}" "{{part.name}}/course"'
    tar = f'curl -sfL "{{COURSE}}/archive/{ref}.tar.gz" | tar -xzC "{{part.name}}"'
    done = subprocess.run(f"{{git}} || {{tar}}", shell=True, capture_output=True)
    assert done.returncode == 0, "No network? Go online, or download the whole course."
    os.rename(glob.glob(f"{{part.name}}/*")[0], "tinygpt")
os.chdir((here or ["tinygpt"])[0] + "/notebooks")
sys.path.insert(0, os.path.abspath(".."))  # tinygpt_helpers.py is there"""

SETTING = re.compile(r'(?m)^repository = "(.*)"\nref = "(.*)"$')
LINK = re.compile(r"\n\n\[Open this page in Colab\]\([^)]*\)")
BADGES = re.compile(r"(<!-- make publish .*-->\n)(?:\[!\[.*\n)*")
CITED = re.compile(r"(?m)^repository-code: .*\n")


def address(repo):
    return f"https://github.com/{repo}" if repo else "(not published yet)"


def colab(repo, ref, page):
    return f"https://colab.research.google.com/github/{repo}/blob/{ref}/notebooks/{page}"


def badges(repo, ref, page="00_start_here.ipynb"):
    places = {
        "Colab": colab(repo, ref, page),
        "Kaggle": f"https://www.kaggle.com/kernels/welcome?src=https://github.com/{repo}/blob/{ref}/"
                  f"notebooks/{page}",
        "Binder": f"https://mybinder.org/v2/gh/{repo}/{ref}?labpath=notebooks%2F{page}",
        "Codespaces": f"https://codespaces.new/{repo}",
    }
    return "".join(f"[![Open in {name}](notebooks/images/{name.lower()}.svg)]({link})\n"
                   for name, link in places.items())


def page_text(path, repo, ref):
    """The page with its set-up cell, which is put in where it is missing, and its link to Colab."""
    nb = nbformat.read(path, as_version=4)
    title, _, rest = LINK.sub("", nb.cells[0].source).partition("\n")
    link = f"\n\n[Open this page in Colab]({colab(repo, ref, path.name)})" if repo else ""
    nb.cells[0].source = f"{title}{link}\n{rest}"
    first = next(i for i, cell in enumerate(nb.cells) if cell.cell_type == "code")
    if nb.cells[first].id != IDS[1]:
        nb.cells[first:first] = [new_markdown_cell(id=IDS[0]), new_code_cell(id=IDS[1])]
        first += 1
    nb.cells[first - 1].source = NOTE
    nb.cells[first].source = SETUP.format(address=address(repo), ref=ref)
    return nbformat.writes(nb).rstrip("\n") + "\n"


def texts(repo, ref, root=ROOT):
    """{file: its text} of all files that the address is in."""
    def read(name):
        return (root / name).read_text(encoding="utf-8")

    found = {root / "pyproject.toml": SETTING.sub(
        f'repository = "{repo}"\nref = "{ref}"', read("pyproject.toml"))}
    found[root / "README.md"] = BADGES.sub(
        lambda old: old[1] + (badges(repo, ref) if repo else ""), read("README.md"))
    cited = f'repository-code: "https://github.com/{repo}"\n' if repo else ""
    found[root / "CITATION.cff"] = CITED.sub("", read("CITATION.cff")).replace(
        "license:", f"{cited}license:")
    return found | {path: page_text(path, repo, ref)
                    for path in pages.find_pages([], root / "notebooks")}


def setting(root=ROOT):
    """(repository, ref) as pyproject.toml has them."""
    return SETTING.search((root / "pyproject.toml").read_text(encoding="utf-8")).groups()


def main(argv=None, root=ROOT):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", help="owner/name; empty: no address")
    parser.add_argument("--ref", default="main", help="a branch or a tag")
    args = parser.parse_args(argv)
    if args.repo is None:
        parser.exit(1, "REPO is missing: make publish REPO=owner/name (REPO= takes it out again)\n")
    if not re.fullmatch(r"([\w-]+/[\w.-]+)?", args.repo, re.ASCII):
        parser.exit(1, f"REPO={args.repo}: should be owner/name, as in REPO=ada/tinygpt-course\n")
    if not re.fullmatch(r"\w[\w.-]*", args.ref, re.ASCII):
        parser.exit(1, f"REF={args.ref}: should be a branch or a tag, as in REF=v1.0\n")
    for path, text in texts(args.repo, args.ref, root).items():
        if path.read_text(encoding="utf-8") != text:
            pages.write(path, text)
            print("wrote", path.relative_to(root))


if __name__ == "__main__":
    main()
