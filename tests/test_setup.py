"""The way in: the two package lists agree, the Makefile builds once, the tree is tidy."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
LEARNERS = {"torch", "jupyter", "matplotlib", "ipywidgets", "nbval"}
PIP_NAME = {"pytorch": "torch"}
TOP_LEVEL = {
    ".ci", ".gitignore", "LICENSE", "Makefile", "README.md", "data", "environment.yml", "notebooks",
    "pyproject.toml", "requirements.txt", "tests", "tinygpt_helpers.py",
}  # fmt: skip


# ---------------------------------------------------------------- the lists of packages


def pip_list(text):
    """{comment above: {name: Requirement}} of a requirements file."""
    sections, current = {}, None
    for line in text.splitlines():
        if line.startswith("#"):
            current = sections.setdefault(line, {})
        elif line.strip():
            requirement = Requirement(line.partition(" #")[0])
            current[requirement.name] = requirement
    return {head: packages for head, packages in sections.items() if packages}


def compare(requirements, environment):
    """What is wrong with the two files' texts, as sentences."""
    found = []
    sections = list(pip_list(requirements).values())
    pinned = {name: r for section in sections for name, r in section.items()}
    if not sections or set(sections[0]) != LEARNERS:
        found.append(f"requirements.txt's first part should name {sorted(LEARNERS)}")
    for name, requirement in pinned.items():
        if not re.fullmatch(r"==\d+(\.\d+)*", str(requirement.specifier)):
            found.append(
                f"requirements.txt: {name}{requirement.specifier} should be one version, with =="
            )
    env = yaml.safe_load(environment)
    if env.get("channels") != ["conda-forge", "nodefaults"]:
        found.append(
            f"environment.yml: channels {env.get('channels')}, should be conda-forge alone"
        )
    conda = {}
    for entry in env["dependencies"]:
        if not isinstance(entry, str):
            found.append(f"environment.yml: {entry} is no conda package")
            continue
        name, spec = re.fullmatch(r"([\w.-]+?)\s*([=<>!~].*)?", entry).groups()
        conda[PIP_NAME.get(name, name)] = SpecifierSet(
            re.sub(r"(^|,)=(?!=)([\d.]+)", r"\1==\2.*", spec or "")
        )
    python = conda.pop("python", None)
    needed = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    if (
        python is None
        or needed not in python
        and not any(f"3.{minor}" in python for minor in range(10, 20))
    ):
        found.append(f"environment.yml: python should be {needed} or newer")
    elif "3.9" in python:
        found.append("environment.yml: python 3.9 is too old for the course")
    if set(conda) != LEARNERS:
        found.append(f"environment.yml names {sorted(conda)}, should name {sorted(LEARNERS)}")
    for name in set(conda) & set(pinned):
        version = str(pinned[name].specifier).lstrip("=")
        if version not in conda[name]:
            found.append(
                f"{name}: environment.yml says {conda[name]}, which leaves out the tested {version}"
            )
    return found


def both():
    return (ROOT / "requirements.txt").read_text(), (ROOT / "environment.yml").read_text()


def test_conda_and_pip_name_the_same_packages():
    assert compare(*both()) == []


@pytest.mark.parametrize(
    ("file", "pattern", "new", "words"),
    [
        (0, r"nbval==.*\n", "", "requirements.txt's first part"),
        (0, r"torch==.*", "torch", "should be one version"),
        (0, r"torch==.*", "torch>=2", "should be one version"),
        (0, r"matplotlib==", "matplotlib==9", "leaves out the tested"),
        (1, r".*nbval.*\n", "", "environment.yml names"),
        (1, r"pytorch>.*", "pytorch>=9", "leaves out the tested"),
        (1, r"pytorch>.*", "pytorch=2.1", "leaves out the tested"),
        (1, r"pytorch>.*", "torch", None),
        (1, r"conda-forge\n", "defaults\n", "conda-forge alone"),
        (1, r"python>=3.10", "python>=3.8", "too old"),
        (1, r"- nbval.*", "- pip:\n    - nbval", "no conda package"),
    ],
)
def test_a_difference_is_found(file, pattern, new, words):
    texts = list(both())
    texts[file], count = re.subn(
        rf"(?m)(?<![\w-]){pattern}" if pattern[0].isalpha() else pattern, new, texts[file], count=1
    )
    assert count == 1
    if words is None:  # the wrong conda name
        texts[file] = texts[file].replace("- torch", "- tensorflow")
        words = "environment.yml names"
    findings = compare(*texts)
    assert any(words in finding for finding in findings), findings


def test_the_tested_versions_are_the_installed_ones():
    """Outside .venv (conda, an environment of one's own) versions may differ within the ranges."""
    if Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not in .venv")
    from importlib.metadata import version

    for section in pip_list(both()[0]).values():
        for name, requirement in section.items():
            assert version(name).partition("+")[0] in requirement.specifier, (
                f"{name} {version(name)}"
            )


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
    if shutil.which("make") is None:
        pytest.skip("no make here; the README has the plain commands")
    folder = tmp_path / "a course"  # a blank in the path is common on desktops
    (folder / "notebooks").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copy(ROOT / "requirements.txt", folder)
    programs, log = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    log.touch()
    for tool in ("sh", "echo", "mkdir", "cp", "rm", "touch", "find"):
        (programs / tool).symlink_to(shutil.which(tool))
    program = shutil.which("make")

    def call(*arguments, version="3.10.4"):
        (programs / "python3").unlink(missing_ok=True)
        if version:
            info = tuple(int(part) for part in version.split("."))
            text = FAKE_PYTHON.format(
                log=log, version=version, real=sys.executable, info=info, folder=folder
            )
            (programs / "python3").write_text(text)
            (programs / "python3").chmod(0o755)
        log.write_text("")
        env = {
            k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PYTHON", "MFLAGS"))
        }
        done = subprocess.run(
            [program, *arguments],
            cwd=folder,
            env=env | {"PATH": str(programs)},
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr, log.read_text()

    call.folder = folder
    return call


def test_make_alone_lists_the_targets(make):
    code, text, calls = make()
    assert code == 0 and calls == ""
    for target in ("lab", "train", "test", "bench"):
        assert f"make {target}" in text


@pytest.mark.parametrize("version", ["3.9.19", "3.8.2", "2.7.18"])
def test_make_names_a_python_that_is_too_old(make, version):
    code, text, calls = make("test", version=version)
    assert code != 0 and f"Python {version}" in text and "3.10 or newer" in text
    assert "venv" not in calls


def test_make_says_that_python_is_missing(make):
    code, text, _ = make("test", version=None)
    assert code != 0 and "Python is missing" in text and "3.10 or newer" in text


@pytest.mark.parametrize("version", ["3.10.0", "3.14.1"])
def test_make_takes_any_python_from_3_10_on(make, version):
    assert make("test", version=version)[0] == 0


@pytest.mark.parametrize(
    ("target", "call"),
    [
        ("lab", "-m jupyterlab 00_start_here.ipynb"),
        ("train", "tinygpt_helpers.py"),
        ("test", "-m pytest"),
        ("bench", "tests/bench.py"),
    ],
)
def test_the_first_call_builds_and_the_second_builds_nothing(make, target, call):
    code, text, calls = make(target)
    assert code == 0, text
    assert "-m venv .venv" in calls and "-r requirements.txt" in calls and call in calls
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
    stamp = make.folder / ".venv" / ".built"
    later = stamp.stat().st_mtime + 5
    os.utime(make.folder / "requirements.txt", (later, later))
    assert "-r requirements.txt" in make("test")[2]


# ---------------------------------------------------------------- the tree

MADE_BY_TOOLS = {
    ".git",
    ".venv",
    "__pycache__",
    ".ipynb_checkpoints",
    ".pytest_cache",
    ".ruff_cache",
    ".hypothesis",
}
# Written so that this file does not find itself.
MACHINE = re.compile(r"/(?:root|work|opt)/|/home/\w|/Users/\w|\b[A-Z]:\\+Users\b")
REGISTRY = re.compile(
    r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|anaconda\.(?:org|com)|index[-]url|find[-]links",
    re.I,
)


def repository_files():
    """What git tracks or would track; in a downloaded archive, everything that no tool made."""
    asked = None
    if shutil.which("git") and (ROOT / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if asked is not None and asked.returncode == 0:
        paths = [ROOT / name for name in asked.stdout.split("\0") if name]
    else:
        paths = [p for p in ROOT.rglob("*") if not MADE_BY_TOOLS & set(p.relative_to(ROOT).parts)]
    return sorted(p for p in paths if p.is_file())


def places_named(text):
    """Machine paths and registries' hosts in a text; pictures (base64) are left out."""
    text = re.sub(r"[A-Za-z0-9+/=]{200,}", "", text)
    return [m.group() for pattern in (MACHINE, REGISTRY) for m in pattern.finditer(text)]


def test_the_top_level_holds_only_the_course():
    names = {p.relative_to(ROOT).parts[0] for p in repository_files()}
    assert names, "no files found"
    assert names <= TOP_LEVEL, f"not part of the course: {sorted(names - TOP_LEVEL)}"
    assert names == TOP_LEVEL, f"missing: {sorted(TOP_LEVEL - names)}"


def test_no_file_names_a_machine_or_a_registry():
    found = []
    for path in repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        found += [f"{path.relative_to(ROOT)}: {place}" for place in places_named(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "parts",
    [
        ("cd /ro", "ot/x"),
        ("/ho", "me/ada"),
        ("/wo", "rk/main"),
        ("/op", "t/wheels"),
        ("/Us", "ers/ada"),
        ("C:\\Us", "ers"),
        ("https://py", "pi.org/simple"),
        ("--find-", "links x"),
        ("https://download.py", "torch.org/whl/cpu"),
    ],
)
def test_a_named_place_is_found(parts):
    assert places_named("".join(parts))


def test_ruff_finds_no_mistake():
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
