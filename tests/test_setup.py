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

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS, ENVIRONMENT = ROOT / "requirements.txt", ROOT / "environment.yml"

# ---------------------------------------------------------------- the lists of packages


def pip_list(text):
    """{name: its versions} for each part of a requirements file; parts begin with a comment."""
    lists = [[Requirement(line) for line in part.splitlines() if line and line[0] != "#"]
             for part in re.split(r"\n\s*\n(?=#)", text)]
    return [{r.name: r.specifier for r in part} for part in lists if part]


def compare(requirements, environment):
    """What is wrong with the two files' texts, as sentences."""
    found, parts, env = [], pip_list(requirements), yaml.safe_load(environment)
    learners = parts[0]  # what the pages need; only the tests need the rest
    for name, versions in (item for part in parts for item in part.items()):
        if not re.fullmatch(r"==\d+(\.\d+)*", str(versions)):
            found.append(f"requirements.txt: {name}{versions} should be one version, with ==")
    if env["channels"] != ["conda-forge", "nodefaults"]:
        found.append(f"environment.yml: channels {env['channels']}, should be conda-forge alone")
    conda = {}
    for entry in env["dependencies"]:
        name, ranges = re.fullmatch(r"([\w-]+)(.*)", str(entry)).groups()
        conda["torch" if name == "pytorch" else name] = SpecifierSet(ranges)
    python = conda.pop("python")
    if "3.9" in python or "3.10" not in python:
        found.append(f"environment.yml: python {python} should begin with 3.10")
    if set(conda) != set(learners):
        found.append(f"environment.yml names {sorted(conda)}, should name {sorted(learners)}")
    for name in set(conda) & set(learners):
        if (tested := str(learners[name]).strip("=")) not in conda[name]:
            found.append(f"environment.yml: {name}{conda[name]} leaves out the tested {tested}")
    return found


def test_conda_and_pip_name_the_same_packages():
    assert compare(REQUIREMENTS.read_text(), ENVIRONMENT.read_text()) == []


@pytest.mark.parametrize(("old", "new", "words"), [
    (r"\nnbval==.*", "", "environment.yml names"),
    (r"\ntorch==", "\ntorch>=", "should be one version"),
    (r"\nmatplotlib==", "\nmatplotlib==9", "leaves out the tested"),
    (r"\n  - nbval.*", "", "environment.yml names"),
    (r"pytorch>.*", "pytorch>=9", "leaves out the tested"),
    (r"conda-forge\n", "defaults\n", "conda-forge alone"),
    (r"python>=3.10", "python>=3.8", "should begin with 3.10"),
])
def test_a_difference_is_found(old, new, words):
    texts = [re.sub(old, new, file.read_text(), count=1) for file in (REQUIREMENTS, ENVIRONMENT)]
    assert any(words in finding for finding in compare(*texts)), compare(*texts)


def test_the_tested_versions_are_the_installed_ones():
    """Outside .venv (conda, an environment of one's own) versions may differ within the ranges."""
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not in .venv")
    for part in pip_list(REQUIREMENTS.read_text()):
        wrong = {n: installed(n) for n in part if installed(n).partition("+")[0] not in part[n]}
        assert not wrong


# ------------------------------------------ the Makefile, with a Python that only notes its calls

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

    def call(*arguments, version="3.10.4"):
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
    for target in targets:
        assert f"make {target} " in text


@pytest.mark.parametrize("version", ["3.9.19", "2.7.18", None])
def test_make_names_a_python_that_is_too_old_or_missing(make, version):
    code, text, calls = make("test", version=version)
    assert code != 0 and "3.10 or newer" in text and "venv" not in calls
    assert (f"Python {version}" if version else "Python is missing") in text


@pytest.mark.parametrize("version", ["3.10.0", "3.14.1"])
def test_make_takes_any_python_from_3_10_on(make, version):
    assert make("test", version=version)[0] == 0


@pytest.mark.parametrize(("target", "call"), [
    ("lab", "-m jupyterlab 00_start_here.ipynb"), ("train", "train.py"), ("test", "-m pytest"),
    ("bench", "tests/bench.py"), ("module", "tests/pages.py module"),
])
def test_the_first_call_builds_and_the_second_builds_nothing(make, target, call):
    code, text, calls = make(target, "ARGS=--some option")
    assert code == 0, text
    assert "-m venv .venv" in calls and "-r requirements.txt" in calls and call in calls
    assert ("--some option" in calls) == (target in ("train", "test", "bench"))
    code, text, calls = make(target)
    assert code == 0 and call in calls and len(calls.splitlines()) == 1, calls


def test_an_interrupted_build_is_begun_anew(make):
    (make.folder / "offline").touch()
    code, _, calls = make("test")
    assert code != 0 and "-m pytest" not in calls
    (make.folder / "offline").unlink()
    code, _, calls = make("test")
    assert code == 0 and "-m venv .venv" in calls and "-m pytest" in calls


def test_new_versions_are_installed(make):
    make("test")
    later = (make.folder / ".venv" / ".built").stat().st_mtime + 5
    os.utime(make.folder / "requirements.txt", (later, later))
    assert "-r requirements.txt" in make("test")[2]


# ---------------------------------------------------------------- the files

MADE_BY_TOOLS = {".git", ".venv", "__pycache__", ".ipynb_checkpoints", ".pytest_cache",
                 ".ruff_cache", ".hypothesis"}
# Written so that this file does not find itself: paths of one machine, hosts of registries.
PLACES = re.compile(r"/(?:root|work|opt)/|/home/\w|/Users/\w|\b[A-Z]:\\+Users\b|pypi\.org|"
                    r"pythonhosted\.org|download\.pytorch\.org|anaconda\.(?:org|com)|"
                    r"(?i:index[-]url|find[-]links)")


def repository_files():
    """What git tracks or would track; in a downloaded archive, everything that no tool made."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") and (ROOT / ".git").exists():
        asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        paths = [ROOT / name for name in asked.stdout.split("\0") if name]
    else:
        paths = [p for p in ROOT.rglob("*") if not MADE_BY_TOOLS & set(p.relative_to(ROOT).parts)]
    return [path for path in paths if path.is_file()]


def test_no_file_names_a_machine_or_a_registry():
    files, found = repository_files(), []
    assert ROOT / "tinygpt_helpers.py" in files
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        text = re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)  # pictures
        found += [f"{path.relative_to(ROOT)}: {place}" for place in PLACES.findall(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("parts", [
    ("cd /ro", "ot/x"), ("/ho", "me/ada"), ("/wo", "rk/main"), ("/Us", "ers/ada"),
    ("C:\\Us", "ers"), ("https://py", "pi.org/simple"), ("--find-", "links x"),
    ("https://download.py", "torch.org/whl/cpu"),
])
def test_a_named_place_is_found(parts):
    assert PLACES.search("".join(parts))


def test_ruff_finds_no_mistake():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
