# The course's commands. The first one that needs Python packages builds .venv; later ones find it built.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Written when the build is complete: an interrupted build leaves no stamp and is begun anew.
STAMP := $(VENV)/.built

.PHONY: help lab train test html bench module pages check lint colab-like corpus model picture publish clean
help:
	@echo "make lab      open the pages in JupyterLab"
	@echo "make train    train and sample at the command line (ARGS=--help lists the options)"
	@echo "make test     does the code work here? run its tests and every page (ARGS=... goes to pytest)"
	@echo "make html     write the pages to pages-out/, to read in a browser without running them"
	@echo "make bench    measure speed, as ratios"
	@echo "make module   write tinygpt_helpers.py from the finished cells of the pages"
	@echo "make pages    run every page anew and save it with its outputs (PAGES=\"01 02\": only these)"
	@echo "make check    is the course in order? its rules and its tools' tests (PAGES=...: only their rules)"
	@echo "make lint     look for mistakes in the code"
	@echo "make colab-like  run every page with Colab's versions, alone in an empty folder (PAGES=...)"
	@echo "make corpus   write data/tiny_corpus.txt anew"
	@echo "make model    train data/tiny_model.pt anew (about ten minutes)"
	@echo "make picture  draw the README's picture anew"
	@echo "make publish  write the course's address everywhere (REPO=owner/name; REF=main)"
	@echo "make clean    delete .venv and what tools left behind"
	@echo
	@echo "PYTHON=python3.12 picks the Python to build .venv with."

$(STAMP): requirements.txt
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "Python is missing: there is no '$(PYTHON)'. Install Python 3.10 or newer, or name one: make PYTHON=python3.12"; \
	  exit 1; } >&2
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python is too old: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1). This course needs 3.10 or newer;" \
	       "name one: make PYTHON=python3.12"; \
	  exit 1; } >&2
	@echo "Building $(VENV); this takes a minute or two, once."
	@rm -rf $(VENV)
	"$(PYTHON)" -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

lab: $(STAMP)
	cd notebooks && ../$(RUN) -m jupyterlab 00_start_here.ipynb

train: $(STAMP)
	$(RUN) train.py --max-seconds 85 $(ARGS)

test: $(STAMP)
	$(RUN) -m pytest $(ARGS)

html: $(STAMP)
	$(RUN) tests/export.py $(PAGES)

bench: $(STAMP)
	$(RUN) tests/bench.py $(ARGS)

module: $(STAMP)
	$(RUN) tests/pages.py module

pages: $(STAMP)
	$(RUN) tests/pages.py run $(PAGES)

# For authors: what `make test` leaves out, since a learner's pages need not keep the rules.
check: $(STAMP)
	$(RUN) $(if $(PAGES),tests/pages.py check $(PAGES),-m pytest tests -m author $(ARGS))

lint: $(STAMP)
	$(RUN) -m ruff check .

# With an environment of its own, which the program builds.
colab-like:
	"$(PYTHON)" tests/colab_like.py $(PAGES)

corpus: $(STAMP)
	$(RUN) data/make_tiny_corpus.py

# The model that pages load, and the diary of its training.
model: $(STAMP)
	$(RUN) data/make_tiny_model.py

picture: $(STAMP)
	$(RUN) tests/picture.py

# REPO= (empty) takes the address out again.
publish: $(STAMP)
	$(RUN) tests/publish.py $(if $(filter undefined,$(origin REPO)),,--repo="$(REPO)") --ref="$(or $(REF),main)"

clean:
	rm -rf $(VENV) .venv-colab .pytest_cache .ruff_cache .hypothesis pages-out
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -prune -exec rm -rf {} +
