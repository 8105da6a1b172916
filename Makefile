# Everything runs from a fresh clone: each target first installs what is missing into .venv.

PYTHON ?= python3
SEED ?= 0
BIN := .venv/bin
# a module's tests stay in one process, and the longest come first (tests/conftest.py)
BESIDE := --numprocesses=2 --no-loadscope-reorder

.DEFAULT_GOAL := help

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: ## Set .venv up for this machine's CPU (seconds when nothing changed)
	@$(PYTHON) scripts/install.py

install-gpu: ## Set .venv up for CUDA
	@$(PYTHON) scripts/install.py gpu

quickstart: install ## Train a small model from scratch: install, warm start, GRPO, report (SEED=n for another)
	$(BIN)/paceline train configs/recipes/quickstart.yaml seed=$(SEED) data.seed=$(SEED) \
		name=quickstart-seed$(SEED)-$$(date +%Y%m%d-%H%M%S)

test: install ## Run the whole test suite
	@$(PYTHON) scripts/install_system_packages.py
	OMP_NUM_THREADS=1 $(BIN)/pytest $(BESIDE)

test-fast: install ## Run the tests that start no engine, ranks, run or Redis, in about two minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest $(BESIDE) -m "not (engine or ranks or run or redis or slow)"

lint: install ## Check style, formatting, types and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

mutants: install ## Break the code on purpose and see that the tests notice (ONLY=name)
	@$(PYTHON) scripts/install_system_packages.py
	$(BIN)/python scripts/mutants.py $(ONLY:%=--only=%)

bench-quick: install ## Compare a training step with a peer's, roughly: a minute, and two more the first time
	$(BIN)/paceline bench e2e --quick

.PHONY: help install install-gpu quickstart test test-fast lint mutants bench-quick
