"""The way in: the two package lists agree, the Makefile builds once, no file names a machine."""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version as installed
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

pytestmark = pytest.mark.author
ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS, ENVIRONMENT = ROOT / "requirements.txt", ROOT / "environment.yml"


def pinned():
    """[{name: its version}] of requirements.txt: first what the pages need, then the tests' own."""
    parts = re.split(r"\n\s*\n(?=#)", REQUIREMENTS.read_text())
    lists = [[Requirement(line) for line in part.splitlines() if line and line[0] != "#"]
             for part in parts]
    return [{r.name: str(r.specifier).removeprefix("==") for r in part} for part in lists if part]


def test_conda_and_pip_name_the_same_packages():
    """requirements.txt pins each; environment.yml's ranges hold what the pages were tested with."""
    learners, tests_own = pinned()
    for name, version in (learners | tests_own).items():
        assert re.fullmatch(r"\d+(\.\d+)*", version), f"{name}: one version, with =="
    environment = yaml.safe_load(ENVIRONMENT.read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    entries = [re.fullmatch(r"([\w-]+)(.*)", entry) for entry in environment["dependencies"]]
    conda = {entry[1].replace("pytorch", "torch"): SpecifierSet(entry[2]) for entry in entries}
    python = conda.pop("python")
    assert "3.10" in python and "3.9" not in python
    assert set(conda) == set(learners)
    assert [name for name in conda if learners[name] not in conda[name]] == []


def test_the_tested_versions_are_the_installed_ones():
    """Outside .venv (conda, an environment of one's own) versions may differ within the ranges."""
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not in .venv")
    for part in pinned():
        assert {name: installed(name).partition("+")[0] for name in part} == part


# Stands in for Python when the Makefile is tried: it notes its calls and builds next to nothing.
FAKE_PYTHON = """#!/bin/sh
echo "$0 $*" >> "{log}"
case "$*" in
  --version) echo "Python {version}" ;;
  "-c "*) exec "{real}" -c "import sys; sys.version_info = {info}; $(printf '%s' "$2")" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  "-m pip "*) [ ! -e "{folder}/offline" ] ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Calls make beside a copy of the Makefile, with a fake `python3` on PATH."""
    program = shutil.which("make") or pytest.skip("no make; the README has the plain commands")
    folder = tmp_path / "a course"  # a blank in the path is common on desktops
    (folder / "notebooks").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copy(REQUIREMENTS, folder)
    programs, log = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    for tool in ("sh", "echo", "mkdir", "cp", "rm", "touch", "find"):
        (programs / tool).symlink_to(shutil.which(tool))
    inherited = {k: v for k, v in os.environ.items() if not re.match("MAKE|PYTHON|MFLAGS", k)}

    def call(*arguments, version="3.10.0"):
        """Return (exit status, what it prints, the calls of Python); version None: no Python."""
        log.write_text("")
        if version:
            info = tuple(int(part) for part in version.split("."))
            python = programs / "python3"
            python.write_text(FAKE_PYTHON.format(log=log, version=version, real=sys.executable,
                                                 info=info, folder=folder))
            python.chmod(0o755)
        done = subprocess.run([program, *arguments], cwd=folder, env=inherited | {"PATH": programs},
                              text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        return done.returncode, done.stdout, log.read_text()

    call.folder = folder
    return call


def test_make_alone_lists_the_targets(make):
    code, text, calls = make()
    targets = re.search(r"\.PHONY: help (.*)", (ROOT / "Makefile").read_text())[1].split()
    assert code == 0 and calls == "" and {"lab", "train", "test", "module"} <= set(targets)
    assert [target for target in targets if f"make {target} " not in text] == []


@pytest.mark.parametrize(("version", "words"), [
    ("3.9.19", "Python 3.9.19"), ("2.7.18", "Python 2.7.18"), (None, "Python is missing"),
])
def test_make_names_a_python_that_is_too_old_or_missing(make, version, words):
    code, text, calls = make("test", version=version)
    assert code != 0 and words in text and "3.10 or newer" in text and "venv" not in calls


@pytest.mark.parametrize(("target", "call"), [
    ("lab", "-m jupyterlab 00_start_here.ipynb"), ("train", "train.py --max-seconds 85"),
    ("test", "-m pytest"), ("bench", "tests/bench.py"), ("module", "tests/pages.py module"),
    ("check", "-m pytest tests -m author"), ("html", "tests/export.py"),
])
def test_the_first_call_builds_and_the_second_builds_nothing(make, target, call):
    code, text, calls = make(target, "ARGS=--some option")
    assert code == 0, text
    assert "-m venv .venv" in calls and "-r requirements.txt" in calls and call in calls
    assert ("--some option" in calls) == (target in ("train", "test", "bench", "check"))
    code, text, calls = make(target)
    assert code == 0 and call in calls and len(calls.splitlines()) == 1, calls


def test_a_build_is_begun_anew_if_it_was_interrupted_or_the_versions_are_new(make):
    (make.folder / "offline").touch()
    code, _, calls = make("test", version="3.14.1")
    assert code != 0 and "-m pip" in calls and "-m pytest" not in calls
    (make.folder / "offline").unlink()
    code, _, calls = make("test", version="3.14.1")
    assert code == 0 and "-m venv .venv" in calls and "-m pytest" in calls
    later = (make.folder / ".venv" / ".built").stat().st_mtime + 5
    os.utime(make.folder / "requirements.txt", (later, later))
    assert "-r requirements.txt" in make("test")[2]


MADE_BY_TOOLS = {".git", ".venv", ".venv-colab", "__pycache__", ".ipynb_checkpoints",
                 ".pytest_cache", ".ruff_cache", ".hypothesis"}
# Written so that this file does not find itself: paths of one machine, hosts of registries.
PLACES = re.compile(r"/(?:root|work|opt)/|/home/\w|/Users/\w|\b[A-Z]:\\+Users\b|pypi\.org|"
                    r"pythonhosted\.org|download\.pytorch\.org|anaconda\.(?:org|com)|"
                    r"(?i:index[-]url|find[-]links)")


def test_no_file_names_a_machine_or_a_registry():
    """Of what git tracks or would track; in a downloaded archive, of all that no tool made."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") and (ROOT / ".git").exists():
        asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in asked.stdout.split("\0") if name]
    else:
        paths = [p for p in ROOT.rglob("*") if not MADE_BY_TOOLS & set(p.relative_to(ROOT).parts)]
    for place in r"/ro_ot/x /ho_me/x /wo_rk/x /Us_ers/x C:\Us_ers py_pi.org find-_links".split():
        assert PLACES.search(place.replace("_", "")), place
    found = []
    assert ROOT / "tinygpt_helpers.py" in paths
    for path in filter(Path.is_file, paths):
        text = path.read_text(encoding="utf-8", errors="replace")
        text = re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)  # pictures
        found += [f"{path.relative_to(ROOT)}: {place}" for place in PLACES.findall(text)]
    assert not found, "\n".join(found)


def test_ruff_finds_no_mistake():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
