# `make demo`, `make test` and `make check` need Python 3.11 or newer and a package index, no more.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help demo test check docs results soak bench clean

help:
	@echo "make demo     install, then FedSGD against FedAvg on embedded data: a table, a picture"
	@echo "make test     install what tests need, and run them"
	@echo "make check    ruff and pyright"
	@echo "make docs     write the documents that are made from the code"
	@echo "make results  the MNIST runs of the paper (hours; resumable)"
	@echo "make soak     the slow tests"
	@echo "make bench    the engine against a hand-written loop"

$(VENV)/.sim: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e ".[sim]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.sim

demo: $(VENV)/.sim
	$(BIN)/potluck demo --out demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not soak" $(PYTEST_ARGS)

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.sim
	$(BIN)/python docs/cli_reference.py

results: $(VENV)/.sim
	$(BIN)/python results/mnist/run.py

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/engine/run.py

clean:
	rm -rf $(VENV) build demo
