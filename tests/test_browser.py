"""The pages' controls in a real browser: JupyterLab runs the pages, the tests move what moves.

Needs Chromium (or Google Chrome). Every request to another machine is cut off; none may be tried.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import nbformat
import pytest
from export import BROWSERS
from nbformat.v4 import new_code_cell

BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
if BROWSER is None:
    pytest.skip(f"needs a browser, which may be {' or '.join(BROWSERS)}", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install it")

ROOT = Path(__file__).resolve().parent.parent
# The labels of each page's controls, and names in its slow cells: cells that say one are left out
# here, as the controls need none of them. The pages' own tests (nbval) run every cell.
CONTROLS = {
    "02_dataset": {"slider": ["start", "block_size"]},
    "03_model": {"slider": ["layer", "head", "position"],
                 "slow": "train_a_little|by_position|flop_registry"},  # it warns without triton
    "05_generation": {"slider": ["temperature", "top-k", "top-p"], "text": ["prompt"],
                      "slow": "spent|scores"},
    "06_looking_inside": {"text": ["text"], "dropdown": ["layer", "head"], "slow": "results|SKILLS"}
}  # fmt: skip
SETTINGS = {  # all cells are in the document, not only those on the screen; no news
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
}
HOMES = ["HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"]
OUTSIDE = re.compile(r"^(https?|wss?)://(?!127\.0\.0\.1[:/]|localhost[:/])")
# Bring a page to the front; the first time, let all its cells run. With `wait`, say if none failed.
SHOW = """async ([path, wait]) => {
    const app = window.jupyterapp;
    await app.restored;
    const page = await app.commands.execute('docmanager:open', {path});
    await page.revealed;
    await page.sessionContext.ready;
    page.run ??= app.commands.execute('notebook:run-all-cells');
    const late = new Promise(resolve => setTimeout(resolve, 240_000));
    return wait && await Promise.race([page.run, late]);
}"""


def wait_for(what, condition, seconds=60):
    """Wait until condition() is true; return what it returned."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for: {what}"
        time.sleep(0.05)
    return result


def stands_still(read, seconds):
    """Wait until `read` returns the same as so long before; return it."""
    def still():
        before = read()
        time.sleep(seconds)
        return read() == before

    wait_for("the end of all change", still, 20)
    return read()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a JupyterLab that works on a copy of the course, with no outputs yet."""
    folder = tmp_path_factory.mktemp("lab")
    course = folder / "course"
    shutil.copytree(ROOT / "data", course / "data", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "tinygpt_helpers.py", course)
    (course / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / "slider_names.js", course / "notebooks")
    for name, controls in CONTROLS.items():
        nb = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        slow = rf"\b({controls.get('slow', '(?!)')})\b"
        nb.cells = [new_code_cell(cell.source) for cell in nb.cells
                    if cell.cell_type == "code" and not re.search(slow, cell.source)]
        nbformat.write(nb, course / "notebooks" / f"{name}.ipynb")
    (folder / "overrides.json").write_text(json.dumps(SETTINGS))
    env = os.environ | dict.fromkeys(HOMES, str(folder))
    env["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # a new one would cost the list of all fonts
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
               "--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={course}",
               f"--LabApp.app_settings_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)
    try:
        address = wait_for("the server", lambda: process.poll() is not None or re.search(
            r"http://127\.0\.0\.1:\d+/lab\S*", log.read_text()))
        assert process.poll() is None, log.read_text()
        yield address[0]
    finally:
        process.terminate()  # shuts the kernels down, too
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def tab(server):
    """JupyterLab in a browser. All pages run in it at once, so that no core is idle meanwhile."""
    with sync_api.sync_playwright() as p, p.chromium.launch(executable_path=BROWSER) as browser:
        tab = browser.new_page(viewport={"width": 1300, "height": 900})
        tab.outside = []
        tab.route(OUTSIDE, lambda route: tab.outside.append(route.request.url) or route.abort())
        tab.goto(server)
        tab.wait_for_function("() => !!window.jupyterapp")
        for name in CONTROLS:
            tab.evaluate(SHOW, [f"notebooks/{name}.ipynb", False])
        yield tab


class Page:
    """A page in JupyterLab, after its cells have run: its controls, and what they draw."""

    def __init__(self, tab, name):
        self.has = CONTROLS[name]
        self.all_ran = tab.evaluate(SHOW, [f"notebooks/{name}.ipynb", True])
        self.notebook = tab.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")
        self.panel = self.notebook.locator(".jp-OutputArea-output:has(.jupyter-widgets)").first
        self.prompt = self.panel.locator(".widget-text input").first

    def drawn(self):
        """What the controls have drawn or printed: all pictures and all text of their output."""
        return self.panel.locator(".widget-output").first.evaluate(
            "area => [...area.querySelectorAll('img')].map(i => i.src).join() + area.innerText")

    def changes(self, act, *args, **named):
        """Call `act`; return the new drawing when it differs from the old one and is complete."""
        before = self.drawn()
        act(*args, **named)
        wait_for("another drawing", lambda: self.drawn() != before, 20)
        now = stands_still(self.drawn, 0.3)
        assert "Traceback" not in now, now[-2000:]
        return now

    def enter(self, text):
        self.prompt.fill(text)
        self.prompt.press("Enter")


@pytest.fixture(scope="module", params=CONTROLS)
def page(request, tab):
    return Page(tab, request.param)


def test_every_cell_runs_and_every_control_has_its_label(page):
    wrong = '[data-mime-type$="jupyter.error"], [data-mime-type$="jupyter.stderr"]'
    assert page.notebook.locator(wrong).all_inner_texts() == []
    assert page.all_ran and page.panel.is_visible() and page.drawn()
    for kind in ("slider", "text", "dropdown"):
        labels = page.panel.locator(f".widget-{kind} .widget-label").all_inner_texts()
        assert labels == page.has.get(kind, [])
    for handle, label in zip(page.panel.get_by_role("slider").all(), page.has.get("slider", [])):
        assert handle.get_attribute("aria-label") == label  # what a screen reader says


def test_every_control_draws_anew(page, tab):
    for choice in page.panel.locator(".widget-dropdown select").all():
        other = choice.evaluate("select => (select.selectedIndex + 1) % select.options.length")
        page.changes(choice.select_option, index=other)
    for label in page.has.get("slider", []):
        field = page.panel.locator(".widget-slider").filter(has_text=re.compile(f"^{label}"))
        handle = field.locator(".noUi-handle")
        before, low, high = (float(handle.get_attribute(f"aria-value{k}"))
                             for k in ("now", "min", "max"))
        handle.focus()
        page.changes(tab.keyboard.press, "ArrowLeft" if before == high else "ArrowRight")
        moved = float(handle.get_attribute("aria-valuenow"))
        assert (moved < before) == (before == high), label
        handle.hover()
        track = field.locator(".noUi-base").bounding_box()
        share = 0.1 if moved > (low + high) / 2 else 0.9
        tab.mouse.down()
        tab.mouse.move(track["x"] + share * track["width"], track["y"], steps=4)
        page.changes(tab.mouse.up)
        moved = float(handle.get_attribute("aria-valuenow"))
        assert abs((moved - low) / (high - low) - share) < 0.2, label  # it may have few steps


@pytest.mark.parametrize("name", ["05_generation", "06_looking_inside"])
def test_an_unknown_character_gives_a_message(tab, name):
    page = Page(tab, name)
    good = page.prompt.input_value()
    message = page.changes(page.enter, "é")
    assert "é" in message and "vocabulary" in message
    back = page.changes(page.enter, good)
    assert "data:image" in back and "vocabulary" not in back


@pytest.fixture
def writer(tab):
    """(page 05, read its text, click Generate, click Stop)."""
    page = Page(tab, "05_generation")
    box = page.panel.locator("textarea")
    generate, stop = (page.panel.get_by_role("button", name=name).click
                      for name in ("Generate", "Stop"))
    yield page, box.input_value, generate, stop
    stop()


def test_generate_grows_begins_anew_and_stops(writer):
    _, read, generate, stop = writer
    generate()
    first = wait_for("20 characters", lambda: len(read()) > 20 and read())
    wait_for("20 more", lambda: len(read()) > len(first) + 20)
    assert read().startswith(first)
    generate()
    generate()
    wait_for("the text to begin anew", lambda: len(read()) < 20)
    wait_for("30 characters", lambda: len(read()) > 30)  # by now both clicks have been heard
    seen = []
    wait_for("40 looks", lambda: seen.append(read()) or len(seen) == 40)
    stop()
    seen.append(stands_still(read, 1.0))
    assert all(new.startswith(old) for old, new in zip(seen, seen[1:])), "two texts are mixed"
    assert len(seen[0]) < len(seen[-1]) < 500, "Stop should come long before the end"


def test_generate_says_what_is_wrong_with_the_prompt(writer):
    page, read, generate, _ = writer
    good = page.prompt.input_value()
    page.changes(page.enter, "é")
    generate()
    wait_for("a message", lambda: "vocabulary" in read())
    assert "'é'" in read() and "\n" not in read()
    page.changes(page.enter, good)
    generate()
    wait_for("a text", lambda: read().startswith(good) and len(read()) > len(good) + 5)


def test_nothing_came_from_outside(tab):
    assert tab.outside == []
