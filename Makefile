# `make train` and `make test` are complete on a fresh clone: they make .venv, install, and run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Tests run side by side, one thread each.
WORKERS := --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: help train test test-slow lint check format tensorboard benchmark pictures constraints clean

help:  ## list the commands
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-13s %s\n", $$1, $$2}'

train: $(VENV)/installed  ## install, then train the chapter's model (args="..." for overrides)
	$(BIN)/python scripts/train.py $(args)

test: $(VENV)/installed-dev  ## install, then run the tests (args=--cov: with coverage)
	$(BIN)/python -m pytest $(WORKERS) $(args)

test-slow: $(VENV)/installed-dev  ## the tests that take minutes
	$(BIN)/python -m pytest $(WORKERS) -m slow $(args)

lint: $(VENV)/installed-dev  ## lint, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test  ## lint and test: before every commit

format: $(VENV)/installed-dev  ## let ruff rewrite the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

tensorboard: $(VENV)/installed  ## look at every run and sweep
	$(BIN)/tensorboard --logdir outputs

benchmark: $(VENV)/installed  ## measure speed against the goals in docs/benchmark.md
	$(BIN)/python scripts/benchmarks/goals.py $(args)

pictures: $(VENV)/installed  ## make the pictures in docs (needs Chromium and chromedriver)
	$(BIN)/python scripts/pictures.py

constraints:  ## rewrite constraints.txt with the newest versions that pyproject.toml allows
	rm -rf .venv-constraints && $(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install torch==2.13.0 -e ".[dev]"
	{ echo "# The complete set that was tested; made by 'make constraints'."; \
	  .venv-constraints/bin/python -m pip freeze --all --exclude-editable --exclude pip \
	  | sed -E 's/(==[^+ ]+)\+[^ ]+/\1/'; } > constraints.txt
	rm -rf .venv-constraints

clean:  ## remove the virtual environment and the caches (outputs/ stays)
	rm -rf $(VENV) .venv-constraints .pytest_cache .mypy_cache .ruff_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit("Python 3.11 to 3.13 is needed, this is %d.%d: make PYTHON=python3.11 ..." % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) install --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
	touch $@
