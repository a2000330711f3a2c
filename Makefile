# The words that people and CI type. Everything happens in a project-local virtual environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test check format bench setup wheel clean

demo: setup
	$(BIN)/fastff demo

test: setup
	$(BIN)/python -m pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/fastff bench --out results/cpu

wheel: setup
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

setup: $(VENV)/.ready

# torch first and pinned, so that no other package's looser requirement chooses another build of it.
$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,bench,dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist demo-report
