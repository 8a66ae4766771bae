"""Run the pages as on Colab: each alone in an empty folder, with the versions that Colab has.

    make colab-like                        every page
    make colab-like PAGES="05 07"          only these
    make colab-like PYTHON=path/to/python  with a Python 3.12 or 3.13 that is not on the PATH

The first call builds .venv-colab and needs a network; on Linux it takes 5 GB, for PyTorch's package
brings CUDA. A page is run as it lies here; the course that it fetches is what its set-up cell names
(the branch main) as committed in this checkout.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

# As Colab had them in November 2026, with Python 3.13; what is not named here, pip chooses.
PINS = ["torch==2.11.0", "matplotlib==3.10.0", "ipython==7.34.0", "ipykernel==6.17.1",
        "ipywidgets==7.7.1"]
RUNNERS = ["nbclient", "nbformat"]
ROOT = Path(__file__).resolve().parent.parent
ENV = ROOT / ".venv-colab"
STAMP = ENV / ".built"  # holds the pins; written last


def find_python():
    """A Python 3.13 or 3.12: the one that runs this, or one on the PATH; SystemExit if none."""
    right = "import sys; sys.exit(sys.version_info[:2] not in [(3, 12), (3, 13)])"
    for name in (sys.executable, "python3.13", "python3.12"):
        if shutil.which(name) and not subprocess.run([name, "-c", right],
                                                     capture_output=True).returncode:
            return name
    raise SystemExit("There is no Python 3.12 or 3.13 here. Install one, or say where it is: "
                     "make colab-like PYTHON=path/to/python3.13")


def build():
    """Build the environment, unless it is there with these pins; returns its Python."""
    python = ENV / "bin" / "python"
    if not STAMP.exists() or STAMP.read_text() != " ".join(PINS):
        found = find_python()
        print(f"Building {ENV.name} with {found}; this takes some minutes, once.", flush=True)
        shutil.rmtree(ENV, ignore_errors=True)
        subprocess.run([found, "-m", "venv", ENV], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PINS, *RUNNERS], check=True)
        STAMP.write_text(" ".join(PINS))
    return python


def run(page, folder):
    """Run the page alone in the folder; returns "ok", or its first error."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from nbclient.output_widget import OutputWidget

    client = NotebookClient(nbformat.read(page, as_version=4), timeout=1200, kernel_name="python3",
                            resources={"metadata": {"path": folder}})
    shutil.copy(page, folder)
    try:
        with patch.object(OutputWidget, "send"):  # it can lose an answer: see pages.py
            client.execute()
    except CellExecutionError as error:
        return f"{error.ename}: {error.evalue}"
    except (CellTimeoutError, DeadKernelError) as error:
        return str(error)
    # The error of a widget's callback goes to the widget.
    said = [o for state in client.widget_state.values() for o in state.get("outputs") or []]
    errors = [f"{o['ename']}: {o['evalue']}" for o in said if o["output_type"] == "error"]
    return errors[0] if errors else "ok"


def main(names):
    """Run the named pages, or all; returns 1 if one failed."""
    import pages
    os.environ["TINYGPT_COURSE"] = ROOT.as_uri()
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # old kernels warn of it on new Pythons
    print(f"{'page':18} {'seconds':>7}  result", flush=True)
    failed = 0
    for page in pages.find_pages(names):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            result = run(page, folder)
        print(f"{page.stem:18} {time.perf_counter() - start:7.0f}  {result}", flush=True)
        failed = failed or int(result != "ok")
    return failed


if __name__ == "__main__":
    if Path(sys.prefix) == ENV:
        sys.exit(main(sys.argv[1:]))
    sys.exit(subprocess.run([build(), __file__, *sys.argv[1:]]).returncode)
