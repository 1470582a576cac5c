# Every command of the project. The environment lives in .venv and is made by the first target that
# needs it; nothing outside this directory is changed, except Debian packages that `make test`
# installs when it may (root).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SEEDS ?= 100
SECONDS ?=
ROUNDS ?=
TARGET ?= all
# Bytecode is kept, whatever the environment says: else each of thousands of processes compiles all
# modules again, which is most of a daemon's start.
unexport PYTHONDONTWRITEBYTECODE

help:  ## show the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.ready: pyproject.toml deploy/setup_environment.sh
	PYTHON="$(PYTHON)" sh deploy/setup_environment.sh $(VENV)

setup: $(VENV)/.ready  ## create or refresh .venv

demo: $(VENV)/.ready  ## three sites on this machine: faults, a mistake undone, failover, failback; two minutes
	$(BIN)/geomirror demo --report build/demo/report.json

test: $(VENV)/.ready  ## everything CI runs: lint, types, tests, fixed and fresh simulation seeds
	sh deploy/setup_test_tools.sh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 4 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.ready  ## quick: lint, types and the tests that start no process
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -m "not system and not interop"

sim: $(VENV)/.ready  ## SEEDS=n fresh simulation seeds
	$(BIN)/python -m tests.sim --seeds $(SEEDS)

fuzz: $(VENV)/.ready  ## TARGET=name SECONDS=n for each target, guided by coverage; corpus in build/fuzz
	$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install -q -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz $(TARGET) --seconds $(or $(SECONDS),60)

bench: $(VENV)/.ready  ## every benchmark in a short form that shows that it works; under half an hour
	sh deploy/setup_test_tools.sh
	$(BIN)/python -m bench --short --again

bench-full: $(VENV)/.ready  ## the numbers of docs/measurements.md; hours, goes on where it was interrupted
	sh deploy/setup_test_tools.sh
	$(BIN)/python -m bench --document

soak: $(VENV)/.ready  ## SECONDS=n or ROUNDS=n of random faults: simulator, labs, power cuts; can be interrupted
	$(BIN)/python -m tests.soak $(if $(SECONDS),--seconds $(SECONDS)) $(if $(ROUNDS),--rounds $(ROUNDS))

format: $(VENV)/.ready  ## rewrite the code in its one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and build
	rm -rf $(VENV) build

.PHONY: help setup demo test check sim fuzz bench bench-full soak format clean
