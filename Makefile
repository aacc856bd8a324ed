# `make lab` is all that a reader needs; `make test` is all that a maintainer needs.
#
#   PYTHON=python3.12      the Python that .venv is made with; 3.11 or newer
#   PORT=8889              the port of `make lab`
#   ARGS=--no-browser      further arguments of `lora-nb lab`
#   TORCH_ARGS="--index-url …"
#       where pip takes torch from. On Linux the default build brings gigabytes of CUDA libraries: without an NVIDIA
#       card, give the index of CPU builds that pytorch.org names.

PYTHON ?= python3
BIN := .venv/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help lab test check lint clean

help: ## say what there is
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

lab: .venv/.lab ## install what is missing and open the course in JupyterLab
	$(BIN)/lora-nb lab $(if $(PORT),--port $(PORT)) $(ARGS)

# Two processes of one thread each: on two cores that is faster than one process of two, and numbers do not depend on the cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

# Bars come after two seconds: on a slow machine in cells whose outputs are compared, so nbval does without.
test: lint ## everything that CI runs: lint, tests with coverage, notebooks
	$(PYTEST) --timeout 600 --cov
	TQDM_DISABLE=1 HF_HUB_OFFLINE=1 $(PYTEST) --nbval --nbval-current-env --nbval-cell-timeout 300 --nbval-sanitize-with tests/nbval.cfg \
		--junitxml=build/nbval.xml notebooks/
	$(BIN)/python tools/compared_cells.py build/nbval.xml

check: lint ## the part of it that takes under three minutes
	$(PYTEST) --timeout 600 -m "not slow and not browser"

lint: .venv/.test ## style, types and floors
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# build/ stays: the embedded base may be in training there, for an hour and more.
clean: ## remove what tests and tools left behind
	rm -rf dist htmlcov .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -name __pycache__ -exec rm -rf {} +

# Each stamp says that .venv holds what its target needs, at the versions of these two files. Torch goes first and alone,
# so that TORCH_ARGS may name an index that has little else.
.venv/.lab .venv/.test: pyproject.toml constraints.txt
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/pip install $(TORCH) $(TORCH_ARGS)
	$(BIN)/pip install -e '.$(EXTRA)' -c constraints.txt
	touch $@

.venv/.test: EXTRA := [test]
