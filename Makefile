# The two commands are `make demo` and `make test`. Both install the pinned packages into .venv first, when
# pyproject.toml or constraints.txt changed; `make help` lists the rest.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PIP := $(PY) -m pip install -qq --disable-pip-version-check
PYTEST_ARGS ?=
TEST_JOBS ?= 2
SOURCES := flowml runtime tools tests examples scripts

.DEFAULT_GOAL := help
.PHONY: help demo test lint format types unit wheel faults kills storm soak reference peers pins clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP)  ## train a digit recogniser on a cluster of local processes
	@$(PY) examples/digits.py

test: lint types wheel unit  ## everything that CI checks

lint: $(STAMP)  ## format, style and import rules
	@$(PY) -m ruff format --check --quiet $(SOURCES) || { echo "the files above are not formatted: make format" >&2; exit 1; }
	@$(PY) -m ruff check --quiet --output-format concise $(SOURCES)
	@$(VENV)/bin/lint-imports --no-cache --no-logo

types: $(STAMP)  ## pyright, strict
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PY) -m pyright --pythonpath $(PY)

# The tests of the runtime measure links and stop processes, so nothing runs beside them. Status 5: no test was chosen.
unit: $(STAMP)  ## unit and integration tests, TEST_JOBS=2 at a time; PYTEST_ARGS="-k name" chooses
	@$(PY) -m pytest -n $(TEST_JOBS) --dist worksteal --timeout=120 --ignore=tests/runtime $(PYTEST_ARGS) || [ $$? = 5 ]
	@$(PY) -m pytest --timeout=120 tests/runtime $(PYTEST_ARGS) || [ $$? = 5 ]

wheel: $(STAMP)  ## build the wheel and use it in an environment of its own
	@$(PY) scripts/check_wheel.py

faults: $(STAMP)  ## 100,000 random training runs with faults, checked; FAULTS_ARGS="--seed 7" repeats one
	@$(VENV)/bin/flowml faults $(or $(FAULTS_ARGS),--seeds 100000)

kills: $(STAMP)  ## kill -9 of worker, home, leader, coordinator, launcher and driver at each point of a run, and partitions
	@FLOWML_KILLS=1 $(PY) -m pytest -n $(TEST_JOBS) --dist worksteal --timeout=120 tests/training/test_kills.py tests/training/test_orphans.py tests/training/test_killed_launcher.py tests/training/test_partitions.py

storm: $(STAMP)  ## 200 kills of workers in one fit, under each of four policies; STORM=50 for fewer
	@FLOWML_STORM=$(or $(STORM),200) $(PY) -m pytest -s --timeout=900 -o faulthandler_timeout=0 tests/training/test_storm.py

soak: $(STAMP)  ## fits and calls for 20 minutes: memory, descriptors and threads stay; SOAK=7200 for two hours
	@FLOWML_SOAK=$(or $(SOAK),1200) $(PY) -m pytest -s --timeout=0 -o faulthandler_timeout=0 tests/training/test_soak.py

reference: $(STAMP)  ## write docs/reference.md from the docstrings, tables of docs/training.md and docs/methods
	@$(PY) scripts/reference.py
	@$(PY) -m scripts.optimizers
	@$(PY) scripts/method_pages.py

format: $(STAMP)  ## rewrite the sources in the house format
	@$(PY) -m ruff format --quiet $(SOURCES)
	@$(PY) -m ruff check --quiet --fix --exit-zero --output-format concise $(SOURCES)

peers: $(STAMP)  ## Ray and TensorFlow for `flowml bench`, in an environment of their own
	@$(VENV)/bin/flowml bench --make-peers

pins: $(STAMP)  ## resolve constraints.txt anew
	@$(PY) scripts/pin.py

clean:  ## remove everything that is made
	@rm -rf $(VENV) dist build .pytest_cache .jax_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Touched last, so that an interrupted install is done again.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "flowml needs Python 3.11 or newer, and '$(PYTHON)' is not one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo "Installing the pinned packages into $(VENV) (once, a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -r constraints.txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@$(PY) -m pip check --disable-pip-version-check >/dev/null || { $(PY) -m pip check --disable-pip-version-check >&2; exit 1; }
	@touch $(STAMP)
