# Everything a contributor or an operator runs. `make help` lists it.
#
# PYTHON=...        interpreter for the virtual environment (default: the first of the list below that works)
# SYSTEM_TORCH=1    use the torch this host already has, instead of installing one
# ARGS="..."        passed on: `make serve ARGS="--ranks 4"`, `make test ARGS="-k wire"`
# URL=...           service that `make bench` loads

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

ARGS ?=
URL ?= http://127.0.0.1:8000
SYSTEM_TORCH ?=

VENV := .venv
BIN := $(VENV)/bin
# One stamp for each way to install, so that another way installs again and the same way does not.
MODE := $(if $(filter-out 0,$(SYSTEM_TORCH)),system-torch,pinned-torch)
RUNTIME := $(VENV)/.installed-runtime-$(MODE)
DEV := $(VENV)/.installed-dev-$(MODE)
BUILD := $(VENV)/.installed-build-$(MODE)

# A name on PATH is not enough: a version manager's shim can be there and fail, and a distribution can lack venv.
PYTHON_CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10
PYTHON_WORKS := import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for python in $(PYTHON_CANDIDATES); do \
	if $$python -c '$(PYTHON_WORKS)' >/dev/null 2>&1; then echo $$python; break; fi; done)

.PHONY: help serve test check format bench kernel schema clean

help: ## list what can be made
	@grep -E '^[a-z]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

serve: $(RUNTIME) ## install, then serve a small model (or what ARGS say)
	@exec $(BIN)/moe-forward serve $(ARGS)

test: $(DEV) ## install, then run the tests
	@$(BIN)/pytest $(ARGS)

check: $(DEV) ## lint, formatting, types and import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(DEV) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(RUNTIME) ## put load on the service at URL
	@exec $(BIN)/moe-forward bench $(URL) $(ARGS)

kernel: $(BUILD) ## compile the GPU kernel library (needs nvcc, no GPU)
	$(BIN)/python -m w4afp8.build

schema: $(RUNTIME) ## write the configuration's schema into the chart
	$(BIN)/python deploy/embed_schema.py

clean: ## remove what was installed and built here
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find service kernels tests deploy -name __pycache__ -type d -prune -exec rm -rf {} +

HOST_TORCH := import torch; print(f"torch=={torch.__version__}")

# A venv made the other way is changed, not removed: venv rewrites its settings and keeps what is installed, except
# torch. The host's own torch is pinned as found, so that pip neither replaces it nor installs a second one.
$(VENV)/constraints-%.txt: constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10 to 3.13 with venv found; name one: make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(if $(filter system-torch,$*),--system-site-packages) $(VENV)
	@rm -f $(VENV)/.installed-* $(VENV)/constraints-*.txt
	@$(if $(filter system-torch,$*),$(BIN)/pip uninstall -q -y torch)
	@grep -v '^torch==' $< >$@
	@$(if $(filter system-torch,$*),$(BIN)/python -c '$(HOST_TORCH)',grep '^torch==' $<) >>$@

$(RUNTIME): pyproject.toml $(VENV)/constraints-$(MODE).txt
	$(BIN)/pip install -q -c $(VENV)/constraints-$(MODE).txt -e .
	@touch $@

$(DEV): pyproject.toml $(VENV)/constraints-$(MODE).txt
	$(BIN)/pip install -q -c $(VENV)/constraints-$(MODE).txt -e '.[dev]'
	@touch $@ $(RUNTIME)

$(BUILD): pyproject.toml $(VENV)/constraints-$(MODE).txt
	$(BIN)/pip install -q -c $(VENV)/constraints-$(MODE).txt -e '.[build]'
	@touch $@ $(RUNTIME)
