# make demo: the main job on synthetic images. make test: all tests but the slow ones, which make test-all adds.
# make docs: the documentation site. make package: wheel and sdist, tried. They set up .venv first.
# They need Python 3.11 or newer, git and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# One thread a worker: tests run on all cores at once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

.PHONY: demo test test-all test-slow lint docs package setup

demo: setup
	$(BIN)/mmclip demo

test: setup
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) --dist worksteal -m slow

test-all: test test-slow

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# The documentation site, into site/: offline, and a warning is an error.
docs: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Wheel and sdist, and a trial of the wheel in an empty environment.
package: setup
	PYTHON=$(PYTHON) .ci/package

setup: $(READY)

# torch goes first and by version: resolved last, another package may draw in another build of it.
$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@echo "installing the locked versions into $(VENV) (once; about 2 GB, more where a GPU build of torch is taken)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@
