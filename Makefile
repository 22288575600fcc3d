# `make demo`, `make test` and `make check` need Python 3.11 or newer and a package index, no more.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# What `make results` runs: days of CNN and LSTM among it. It can be stopped at any moment.
RESULTS ?= table4 table1 table2 figure1 figure2 beyond

# How many processes `make test` runs in; a file of tests stays in one of them. Many tests wait for
# processes of their own, so three share two cores.
TEST_PROCESSES ?= 3

.PHONY: help demo demo-serve test check docs results quick soak bench clean

help:
	@echo "make demo     install, then FedSGD against FedAvg on embedded data: a table, a picture"
	@echo "make demo-serve  install, then a server and ten devices on this machine, some killed"
	@echo "make test     install what tests need, and run them"
	@echo "make check    ruff and pyright"
	@echo "make docs     write the documents that are made from the code"
	@echo "make results  the paper's tables and figures (days; resumable; RESULTS='table4')"
	@echo "make quick    miniatures of all of them on embedded data (minutes)"
	@echo "make soak     the slow tests"
	@echo "make bench    the engine against a hand-written loop"

$(VENV)/.sim: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e ".[sim]"
	@touch $@

$(VENV)/.served: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e ".[sim,server,device]"
	@touch $@ $(VENV)/.sim

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.sim $(VENV)/.served

demo: $(VENV)/.sim
	$(BIN)/potluck demo --out demo

demo-serve: $(VENV)/.served
	$(BIN)/potluck demo serve --out demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not soak" -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder \
	  $(PYTEST_ARGS)

soak: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak $(PYTEST_ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.sim
	$(BIN)/python docs/cli_reference.py
	$(BIN)/python docs/paper_tables.py

results: $(VENV)/.sim
	for what in $(RESULTS); do $(BIN)/potluck reproduce $$what || exit 1; done

quick: $(VENV)/.sim
	for what in table1 table2 table4 figure1 figure2 figure3 figure8 beyond; do \
	  $(BIN)/potluck reproduce $$what --quick || exit 1; done

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/engine/run.py

clean:
	rm -rf $(VENV) build demo results-quick
