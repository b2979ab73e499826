# Two commands do everything from a fresh clone:  make demo   and   make test
# Another build of torch, such as one for CUDA:  make demo TORCH="torch==2.13.0 --index-url URL-OF-ITS-WHEELS"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
# tests that share a model, an export or a capture run in one process; tests/conftest.py says which are begun first
PARALLEL := -n 2 --dist loadgroup --no-loadscope-reorder

.PHONY: demo check test test-full fast-tests gate-tests lint style types format wheel clean

demo: $(VENV)/.installed
	$(BIN)/surgery demo

# on every save, under two minutes: no transformers, no ONNX
check: style
	@$(MAKE) --no-print-directory --jobs 2 types fast-tests

# the gate
test: style
	@$(MAKE) --no-print-directory --jobs 2 types gate-tests

# everything, and the benchmarks' own tests
test-full: lint
	HYPOTHESIS_PROFILE=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

fast-tests: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m fast

gate-tests: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not full and not bench"

lint: style types

style: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(VENV)/.installed # while the tests run: it takes one processor
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

# torch first: whatever depends on torch would otherwise fetch a build with all of CUDA
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
