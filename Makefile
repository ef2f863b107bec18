# make train        trains, evaluates and saves a small OptVQ on the embedded dataset (about 2 minutes on 2 CPU cores)
# make test         lint, the fast tests
# make coverage     the fast tests again, with line coverage, which takes half as long again
# make test-solver  the fast tests of solver, distances and quantizer
# make test-slow    the tests that `make test` skips: long runs, whole grids, several processes, faults of the Hub
# make test-long    what takes longest: scripts and notebooks from end to end, full-size networks, kernels for every GPU
# make test-all     test, test-slow and test-long
# make test-demo    the demo in a browser: needs playwright's Chromium, or one on the PATH
# make gpu          on a machine with a GPU: tests/device there, then what everything costs; a report in runs/gpu_check
# make docs         the site, in docs/_build; warnings are errors
# make dist         wheel and source distribution in dist/, built and checked as a user gets them
# All set up .venv first; a second run reuses it.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
WORKERS ?= 2
# Modules are compiled when they are first imported, and what is compiled is kept: most of what is installed is never imported.
export PYTHONDONTWRITEBYTECODE =

FAST := not slow and not distributed and not hub and not long
# Files that take long come first, so that no worker is alone with one at the end.
FIRST := tests/training tests/distributed tests/hub
IN_ORDER := $(FIRST) $(filter-out $(FIRST),$(patsubst %/,%,$(wildcard tests/*/)) $(wildcard tests/test_*.py))
SOLVER := tests/solver tests/test_quantizer_optvq.py tests/test_running_state.py
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: train test coverage test-solver test-slow test-long test-all test-demo gpu docs dist lint format clean

train: $(VENV)/.installed
	$(BIN)/optvq train --config scripts/recipes/quickstart.yaml

test: lint
	$(PYTEST) -m "$(FAST)"

coverage: $(VENV)/.installed
	$(PYTEST) -m "$(FAST)" --cov --cov-report=term --cov-fail-under=90

test-solver: $(VENV)/.installed
	$(PYTEST) -m "$(FAST)" $(SOLVER)

test-slow: $(VENV)/.installed
	$(PYTEST) -m "not ($(FAST)) and not long" $(IN_ORDER)

test-long: $(VENV)/.installed
	$(PYTEST) -m long

test-all: test test-slow test-long

# Gradio 6.31 needs a pillow below 13, so it is installed in an environment that also sees all of .venv.
$(VENV)-demo/.installed: $(VENV)/.installed
	$(BIN)/python -m venv $(VENV)-demo
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(VENV)-demo/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/all_of_venv.pth
	$(VENV)-demo/bin/python -m pip install --quiet "gradio>=6.31" "playwright>=1.65"
	touch $@

test-demo: $(VENV)-demo/.installed
	PYTHONPATH=src $(VENV)-demo/bin/python -m pytest tests/spaces

gpu: $(VENV)/.installed
	$(BIN)/python scripts/gpu_check.py

docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -b html -E -q -W --keep-going docs docs/_build

dist: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python scripts/check_release.py --output-dir dist

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: setup.cfg setup.py pyproject.toml $(CONSTRAINTS)
	@echo "setting up $(VENV): a few minutes, this once"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-demo build dist docs/_build src/*.egg-info .pytest_cache .ruff_cache .coverage runs
