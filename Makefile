# Two commands do everything from a fresh clone:  make demo   and   make test
# Another build of torch, such as one for CUDA:  make demo TORCH="torch==2.13.0 --index-url URL-OF-ITS-WHEELS"

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PARALLEL := -n 2 --dist loadgroup # tests that share a model, an export or a capture run in one process

.PHONY: demo check test test-full lint format wheel clean

demo: $(VENV)/.installed
	$(BIN)/surgery demo

# on every save, under two minutes: no transformers, no ONNX
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m fast

# the gate
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "not full and not bench"

# everything, and the benchmarks' own tests
test-full: lint
	HYPOTHESIS_PROFILE=full OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

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
