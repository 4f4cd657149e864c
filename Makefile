# The two commands of the README, and what they are made of.
PYTHON ?= python3.11
BIN := .venv/bin

.PHONY: quickstart test setup dev-setup lint ui clean

quickstart: setup          ## set up, run the embedded experiment, show its table and picture
	$(BIN)/textalign run pep8_alt_lmu

test: dev-setup            ## set up, run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

ui: setup                  ## the Dagster UI on http://localhost:3000
	$(BIN)/dagster dev

lint: dev-setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

setup: .venv/.installed
dev-setup: .venv/.installed-dev

.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/.installed-dev: pyproject.toml .venv/.installed
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

clean:                     ## forget everything that was run (artifacts, history)
	rm -rf state
