# make demo: Python from the bundled model.  make test: the tests.  Both make a virtual environment first.
#   EXTRA=cuda13 make demo    on Linux with an NVIDIA GPU (cuda12 for older drivers)
#   VENV=... PYTHON=...       another place, another Python

PYTHON ?= python3
VENV ?= .venv
# MLX comes with Metal on macOS; elsewhere one of its builds has to be named
EXTRA ?= $(if $(filter Darwin,$(shell uname -s)),,cpu)
BIN := $(VENV)/bin
comma := ,

.PHONY: demo test lint
# a program to go on with
PROMPT := class Person:\n    def __init__(self, name, age):\n
demo: $(VENV)/demo.stamp
	@printf '$(PROMPT)'; printf '$(PROMPT)' | $(BIN)/rodimus-mlx generate --temp 0.3 --max-tokens 100

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/demo.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".$(if $(EXTRA),[$(EXTRA)])"
	touch $@

$(VENV)/test.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[$(if $(EXTRA),$(EXTRA)$(comma))test]"
	touch $@
