# Everything a checkout needs: `make demo` and `make test` set up .venv themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
OUT ?= qgraph_demo

.PHONY: install demo test test-slow lint format bench clean

install: $(VENV)/.dev

demo: $(VENV)/.demo
	$(BIN)/qgraph demo --out $(OUT)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto -m slow

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m tools.bench

clean:
	rm -rf $(VENV) build dist *.egg-info qgraph_demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Stamps say which extras are installed; the dev install covers the demo's.
$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	test -e $(VENV)/.dev || $(PIP) --editable ".[demo]"
	touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(PIP) --editable ".[dev]"
	touch $@
