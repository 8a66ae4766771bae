"""What every test needs before it starts. pytest loads this file by itself."""

import os

# pytest's workers run side by side, and each would let torch take every core. Measured with two
# workers on two cores, training in four pages: 4 threads in all took 3 to 5 times as long as 2.
# So two threads are shared out, whatever os.cpu_count() says: in a container it counts cores that
# the container may not use. Set before torch is imported; the pages' kernels inherit it. (Set, not
# proposed: pytest reads this file in the process that starts the workers, too.)
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ["OMP_NUM_THREADS"] = str(max(1, min(2, os.cpu_count() or 1) // workers))

# A backend chosen outside would keep the figures out of the pages' kernels; the tests themselves
# open no window.
os.environ.pop("MPLBACKEND", None)
import matplotlib  # noqa: E402

matplotlib.use("Agg")


def pytest_terminal_summary(terminalreporter):
    """Tell a learner who changed a finished cell that the module does not know it."""
    from pages import NOTEBOOKS, module_text
    module = NOTEBOOKS.with_name("tinygpt_helpers.py").read_text(encoding="utf-8")
    try:
        same = module_text() == module
    except SystemExit:  # no module can be made of the cell
        same = False
    if not same:
        terminalreporter.write_line(
            "Note: a finished cell of a page differs from tinygpt_helpers.py, which later pages "
            "import. To take it over: make module")
