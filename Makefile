# Needs Python 3.11 or newer and make; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
PYTHON_GPU := $(if $(wildcard .venv/bin/python),.venv/bin/python,python3)

.PHONY: demo test test-all test-slow lint types bench bench-compare gpu-check gpu-check-full clean

demo: .venv/installed
	$(BIN)/lrp-fast demo --output demo-output

test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

# What takes longer or measures time, one at a time.
test-slow: .venv/installed
	$(BIN)/python -m pytest -m "slow and not gpu"

test-all: test test-slow

lint: .venv/installed
	$(BIN)/ruff check .

types: .venv/installed
	$(BIN)/mypy

# On what the machine has, CPU or GPU; BENCH takes options, of which any makes it less than a whole run: BENCH="--batch 1".
bench: .venv/installed
	$(BIN)/python -m pytest --benchmark-quiet bench/test_networks.py bench/test_layers.py $(BENCH)
	$(BIN)/python bench/limits.py
	$(BIN)/python bench/growth.py
	$(BIN)/python bench/throughput.py
	$(BIN)/python bench/throughput.py --network embedded --images 1024 --batch-size 32
	$(BIN)/python bench/perturbation.py
	$(BIN)/python bench/pictures.py

# This tree and another revision in turn: make bench-compare BASE=HEAD~1 [COMPARE="--batch 1 --turns 15"]
bench-compare: .venv/installed
	@test -n "$(BASE)" || { echo "bench-compare: say which revision: make bench-compare BASE=HEAD~1"; exit 2; }
	$(BIN)/python bench/compare.py $(BASE) $(COMPARE)

# On a machine with a CUDA device; installs nothing.
gpu-check:
	$(PYTHON_GPU) bench/gpu_check.py

gpu-check-full:
	$(PYTHON_GPU) bench/gpu_check.py --full

.venv/installed: pyproject.toml setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"lrp_fast needs Python 3.11 or newer, got {sys.version}"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info demo-output
