# make train   trains, evaluates and saves a small OptVQ on the embedded dataset (about 2 minutes on 2 CPU cores)
# make test    lint, all tests, line coverage
# Both set up .venv first; a second run reuses it.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin

.PHONY: train test lint format clean

train: $(VENV)/.installed
	$(BIN)/optvq train --config scripts/recipes/quickstart.yaml

test: lint
	$(BIN)/python -m pytest --cov --cov-report=term --cov-fail-under=90

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed: setup.cfg pyproject.toml $(CONSTRAINTS)
	@echo "setting up $(VENV): a few minutes, this once"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .coverage runs
