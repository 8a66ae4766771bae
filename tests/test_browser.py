"""The pages' controls in a real browser: JupyterLab runs the page, the tests move what moves.

Needs Chromium (or Google Chrome). Nothing may leave the machine: every request to another place
than this machine is cut off, and none may have been tried.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import matplotlib
import nbformat
import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
if BROWSER is None:
    pytest.skip(
        "no Chromium here: install one that is called " + ", ".join(BROWSERS)
        + " (Debian: apt-get install chromium); the controls were not tested",
        allow_module_level=True,
    )
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install it")

ROOT = Path(__file__).resolve().parent.parent
# The pages with controls: the labels of their sliders, and what else they have. A page that is not
# there (yet) is left out.
CONTROLS = {
    "02_dataset": {"sliders": ["start", "block_size"]},
    "03_model": {"sliders": ["layer", "head", "position"]},
    "05_generation": {"sliders": ["temperature", "top-k", "top-p"], "text": True},
    "06_looking_inside": {"text": True, "dropdowns": True},
}
PAGES = [name for name in CONTROLS if (ROOT / "notebooks" / f"{name}.ipynb").exists()]
OUTSIDE = re.compile(r"^(https?|wss?)://(?!127\.0\.0\.1[:/]|localhost[:/])")
ARGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip
MINUTE = 60_000  # playwright counts in milliseconds


# ---------------------------------------------------------------- a server and a browser


def copy_course(folder):
    """The course without outputs, so that an output on the screen is one of this run."""
    (folder / "notebooks").mkdir(parents=True)
    shutil.copy(ROOT / "tinygpt_helpers.py", folder)
    shutil.copytree(ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("__pycache__"))
    for name in PAGES:
        nb = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        for cell in nb.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(nb, folder / "notebooks" / f"{name}.ipynb")


def settings(folder):
    """JupyterLab's settings: all cells are in the document, not only those on the screen."""
    for plugin, values in {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }.items():
        file = folder / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    return str(folder)


def get_json(url):
    """What the server answers, None if it does not (yet)."""
    try:
        with urllib.request.urlopen(url, timeout=10) as reply:
            return json.load(reply)
    except (OSError, ValueError):
        return None


def wait_for(what, condition, seconds=60, every=0.1):
    """Wait until condition() is true; return what it returned."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for: {what}"
        time.sleep(every)
    return result


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a JupyterLab that works on a copy of the course and leaves no trace."""
    folder = tmp_path_factory.mktemp("lab")
    copy_course(folder / "course")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    homes = ("HOME", "IPYTHONDIR", *(f"JUPYTER_{k}_DIR" for k in ("CONFIG", "DATA", "RUNTIME")))
    env = {
        **os.environ,
        **{name: str(folder / name.lower()) for name in homes},
        "JUPYTERLAB_SETTINGS_DIR": settings(folder / "settings"),
        "MPLCONFIGDIR": matplotlib.get_cachedir(),  # a new one would cost the list of all fonts
    }
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    command += ["--ServerApp.port_retries=0", f"--ServerApp.root_dir={folder / 'course'}"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, env=env, cwd=folder / "course", stdout=log, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for("the server", lambda: process.poll() is not None or get_json(f"{url}/api/status"))
        assert process.poll() is None, (folder / "log").read_text()
        yield url
    finally:
        process.terminate()  # shuts the kernels down, too
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with sync_api.sync_playwright() as p:
        context = p.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("browser"),
            executable_path=BROWSER,
            args=ARGS,
            viewport={"width": 1300, "height": 900},
        )
        context.outside = []

        def refuse(route):
            context.outside.append(route.request.url)
            route.abort()

        context.route(OUTSIDE, refuse)
        yield context
        context.close()


# ---------------------------------------------------------------- a page that was run


def kernel_is_ready(server, path):
    """Connected and idle. A click on Run All before that would open a dialog."""
    kernels = [s["kernel"] for s in get_json(f"{server}/api/sessions") or [] if s["path"] == path]
    return any(k["connections"] >= 1 and k["execution_state"] == "idle" for k in kernels)


ALL_RUN = """() => document.querySelector('[data-mime-type$="jupyter.error"]')
    || [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]
        .every(prompt => /\\[\\d+\\]/.test(prompt.textContent))"""


@pytest.fixture(scope="module")
def tabs(server, browser):
    """{name: the page in JupyterLab}, all of them running, so that no core is idle meanwhile."""
    opened = {}
    for name in PAGES:
        tab = opened[name] = browser.new_page()
        tab.name, path = name, f"notebooks/{name}.ipynb"
        tab.set_default_timeout(20_000)
        # A workspace of its own: the common one would open the page before again, too.
        tab.goto(f"{server}/lab/workspaces/{name}/tree/{path}")
        tab.wait_for_selector(".jp-Notebook .jp-Cell", timeout=MINUTE)
        wait_for("the kernel", lambda: kernel_is_ready(server, path))  # noqa: B023
        tab.get_by_role("menuitem", name="Run", exact=True).click()
        tab.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    return opened


@pytest.fixture(scope="module")
def tab(request, tabs):
    """One page, after all its cells have run, or one has failed."""
    tab = tabs[request.param]
    tab.bring_to_front()
    tab.wait_for_function(ALL_RUN, timeout=4 * MINUTE)
    return tab


def panel(tab):
    """The output that holds the controls."""
    return tab.locator(".jp-OutputArea-output").filter(has=tab.locator(".jupyter-widgets")).first


def drawn(tab):
    """What the controls have drawn or printed: all pictures and all text of their output."""
    return panel(tab).locator(".widget-output").first.evaluate(
        "area => [...area.querySelectorAll('img')].map(i => i.src).join() + area.innerText"
    )


def stands_still(read, seconds):
    """Wait until what `read` returns has not changed for so long; return it."""
    last, since = read(), time.monotonic()

    def still():
        nonlocal last, since
        if (now := read()) != last:
            last, since = now, time.monotonic()
        return time.monotonic() - since > seconds

    wait_for("the end of all change", still, 20)
    return last


def changes(tab, act, *args, **named):
    """Call `act`; return the new drawing when it differs from the old one and is complete."""
    before = drawn(tab)
    act(*args, **named)
    wait_for("another drawing", lambda: drawn(tab) != before, 20)
    now = stands_still(lambda: drawn(tab), 0.3)
    assert "Traceback" not in now, now[-2000:]
    return now


def slider(tab, label):
    found = panel(tab).locator(".widget-slider").filter(has_text=re.compile(f"^{label}"))
    assert found.count() == 1, f"there are {found.count()} sliders with the label {label}"
    found.scroll_into_view_if_needed()
    return found


def prompt(tab):
    return panel(tab).locator(".widget-text input").first


def enter(tab, text):
    prompt(tab).fill(text)
    prompt(tab).press("Enter")


def value(handle):
    return float(handle.get_attribute("aria-valuenow"))


def pages_with(kind):
    """Run a test on every page that has controls of this kind; a page is opened once for all."""
    names = [name for name in PAGES if kind in CONTROLS[name]]
    return pytest.mark.parametrize("tab", names, indirect=True)


every_page = pytest.mark.parametrize("tab", PAGES, indirect=True)
page_05 = pytest.mark.parametrize("tab", ["05_generation"], indirect=True)


# ---------------------------------------------------------------- the tests


@every_page
def test_every_cell_runs(tab):
    errors = tab.locator('[data-mime-type$="jupyter.error"], [data-mime-type$="jupyter.stderr"]')
    assert errors.all_inner_texts() == []
    assert panel(tab).is_visible() and drawn(tab)


@every_page
def test_every_control_has_a_label(tab):
    kinds = {kind: panel(tab).locator(f".widget-{kind}") for kind in ("slider", "text", "dropdown")}
    labels = {
        kind: [field.locator(".widget-label").inner_text() for field in fields.all()]
        for kind, fields in kinds.items()
    }
    assert labels["slider"] == CONTROLS[tab.name].get("sliders", [])
    assert all(label.strip() for row in labels.values() for label in row), labels
    assert bool(labels["text"]) == ("text" in CONTROLS[tab.name])
    assert bool(labels["dropdown"]) == ("dropdowns" in CONTROLS[tab.name])


@pages_with("sliders")
def test_sliders_by_keyboard(tab):
    for label in CONTROLS[tab.name]["sliders"]:
        handle = slider(tab, label).locator(".noUi-handle")
        handle.focus()
        before = value(handle)
        at_end = before == float(handle.get_attribute("aria-valuemax"))
        changes(tab, tab.keyboard.press, "ArrowLeft" if at_end else "ArrowRight")
        assert (value(handle) < before) == at_end, label


@pages_with("sliders")
def test_sliders_by_mouse(tab):
    for label in CONTROLS[tab.name]["sliders"]:
        handle = slider(tab, label).locator(".noUi-handle")
        track = slider(tab, label).locator(".noUi-base").bounding_box()
        low, high = (float(handle.get_attribute(f"aria-value{end}")) for end in ("min", "max"))
        share = 0.1 if value(handle) > (low + high) / 2 else 0.9
        handle.hover()
        tab.mouse.down()
        tab.mouse.move(track["x"] + share * track["width"], track["y"], steps=4)
        changes(tab, tab.mouse.up)
        # A slider may have few steps.
        assert abs((value(handle) - low) / (high - low) - share) < 0.2, label


@pages_with("dropdowns")
def test_dropdowns(tab):
    for choice in panel(tab).locator(".widget-dropdown select").all():
        choices = choice.locator("option").count()
        here = choice.evaluate("select => select.selectedIndex")
        changes(tab, choice.select_option, index=(here + 1) % choices)


@pages_with("text")
def test_an_unknown_character_gives_a_message(tab):
    good = prompt(tab).input_value()
    message = changes(tab, enter, tab, "é")
    assert "é" in message and "vocabulary" in message
    back = changes(tab, enter, tab, good)
    assert "data:image" in back and "vocabulary" not in back


# ---------------------------------------------------------------- page 05 writes


@pytest.fixture
def writer(tab):
    """(read the text, click Generate, click Stop) of page 05."""
    box = panel(tab).locator("textarea")
    box.scroll_into_view_if_needed()
    yield box.input_value, *(
        panel(tab).get_by_role("button", name=name).click for name in ("Generate", "Stop")
    )
    panel(tab).get_by_role("button", name="Stop").click()


@page_05
def test_generate_grows_and_stop_stops(writer):
    read, generate, stop = writer
    generate()
    wait_for("20 characters", lambda: len(read()) > 20)
    first = read()
    wait_for("20 more", lambda: len(read()) > len(first) + 20)
    assert read().startswith(first)
    stop()
    text = stands_still(read, 1.0)
    assert text.startswith(first) and len(text) < 500, "Stop should come long before the end"


@page_05
def test_a_second_generate_does_not_mix_two_texts(writer):
    read, generate, stop = writer
    generate()
    wait_for("20 characters", lambda: len(read()) > 20)
    generate()
    generate()
    wait_for("the text to begin anew", lambda: len(read()) < 20, every=0.01)
    wait_for("30 characters", lambda: len(read()) > 30)  # by now both clicks have been heard
    seen = []
    wait_for("40 looks", lambda: seen.append(read()) or len(seen) == 40, every=0.05)
    for earlier, later in zip(seen, seen[1:], strict=False):
        assert later.startswith(earlier), "two texts are mixed"
    assert len(seen[-1]) > len(seen[0])


@page_05
def test_generate_says_what_is_wrong_with_the_prompt(tab, writer):
    read, generate, stop = writer
    good = prompt(tab).input_value()
    changes(tab, enter, tab, "é")
    generate()
    wait_for("a message", lambda: "vocabulary" in read())
    assert "'é'" in read() and "\n" not in read()
    changes(tab, enter, tab, good)
    generate()
    wait_for("a text", lambda: read().startswith(good) and len(read()) > len(good) + 5)


@every_page
def test_nothing_came_from_outside(browser, tab):
    assert browser.outside == []
