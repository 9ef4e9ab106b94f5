# Everything a contributor or an operator runs. `make help` lists it.
#
# PYTHON=...        interpreter for the virtual environment (default: the first of the list below that works)
# SYSTEM_TORCH=1    use the torch this host already has, instead of installing one
# ARGS="..."        passed on: `make serve ARGS="--ranks 4"`, `make test ARGS="-k wire"`
# URL=...           service that `make bench` loads
# FUZZ_SECONDS=60   of each of FUZZ_TARGETS="safetensors json oip checkpoint keys http"

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

ARGS ?=
URL ?= http://127.0.0.1:8000
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= safetensors json oip checkpoint keys http
SYSTEM_TORCH ?=

VENV := .venv
BIN := $(VENV)/bin
# One stamp for each way to install, so that another way installs again and the same way does not.
MODE := $(if $(filter-out 0,$(SYSTEM_TORCH)),system-torch,pinned-torch)
RUNTIME := $(VENV)/.installed-runtime-$(MODE)
DEV := $(VENV)/.installed-dev-$(MODE)
BUILD := $(VENV)/.installed-build-$(MODE)
PICTURES := $(VENV)/.installed-pictures-$(MODE)
HELM := $(VENV)/helm
CHECKOV := $(VENV)/checkov
FUZZ := $(VENV)/.installed-fuzz-$(MODE)
AUDIT := $(VENV)/audit

# A name on PATH is not enough: a version manager's shim can be there and fail, and a distribution can lack venv.
PYTHON_CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10
PYTHON_WORKS := import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for python in $(PYTHON_CANDIDATES); do \
	if $$python -c '$(PYTHON_WORKS)' >/dev/null 2>&1; then echo $$python; break; fi; done)

.PHONY: help serve install test check format bench observe dashboard kernel schema chart chart-audit chaos fuzz audit sbom clean

help: ## list what can be made
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

serve: $(RUNTIME) ## install, then serve a small model (or what ARGS say)
	@exec $(BIN)/moe-forward serve $(ARGS)

test: $(DEV) ## install, then run the tests
	@$(BIN)/pytest --numprocesses 3 --dist loadfile $(ARGS)

install: $(DEV) ## install what tests and checks need

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

observe: $(PICTURES) ## serve, load and scrape a small model, and draw the dashboard from that (needs Prometheus)
	@$(BIN)/python deploy/observability/observe.py $(ARGS)

dashboard: $(RUNTIME) ## write the Grafana dashboard into the chart
	$(BIN)/python deploy/observability/dashboard.py

kernel: $(BUILD) ## compile the GPU kernel library (needs nvcc, no GPU)
	$(BIN)/python -m w4afp8.build

chart: $(DEV) $(HELM)/helm3 ## lint, render, check and release the chart, with helm 4 and 3
	@PATH="$(abspath $(HELM)):$$PATH" $(BIN)/pytest tests/chart $(ARGS)

# checkov knows no RayCluster; a StatefulSet of the same values has the same pods.
AUDITED := 1x8-h200 2x8-rdma cpu
chart-audit: $(CHECKOV)/bin/checkov $(HELM)/helm3 ## look for unsafe settings in what the chart makes (installs checkov)
	@rm -rf $(CHECKOV)/rendered && mkdir $(CHECKOV)/rendered
	@for values in $(AUDITED); do $(HELM)/helm template demo helm/moe-forward -n experts -f deploy/values/$$values.yaml \
		--set workload.kind=StatefulSet,rayCluster.workers.replicas=0 >$(CHECKOV)/rendered/$$values.yaml; done
	@$(CHECKOV)/bin/checkov --config-file deploy/checkov.yaml --directory $(CHECKOV)/rendered $(ARGS)

fuzz: $(FUZZ) ## fuzz what reads strangers' bytes, guided by coverage
	@for target in $(FUZZ_TARGETS); do \
		$(BIN)/python tests/fuzz/run.py $$target -max_total_time=$(FUZZ_SECONDS) $(ARGS); done

audit: $(RUNTIME) $(AUDIT)/bin/pip-audit ## look what is installed up in the database of known weaknesses
	@$(AUDIT)/bin/pip-audit --path "$$($(BIN)/python -c '$(SITE_PACKAGES)')" $(ARGS)

sbom: $(RUNTIME) $(AUDIT)/bin/pip-audit ## write what is installed as a CycloneDX document
	@$(AUDIT)/bin/cyclonedx-py environment $(ARGS) $(BIN)/python

chaos: $(DEV) ## break a small service under load, and account for every request
	@$(BIN)/python tests/chaos/run.py $(ARGS)

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

$(PICTURES): pyproject.toml $(VENV)/constraints-$(MODE).txt
	$(BIN)/pip install -q -c $(VENV)/constraints-$(MODE).txt -e '.[pictures]'
	@touch $@ $(RUNTIME)

$(HELM)/helm3: .ci/helm.py | $(DEV)
	$(BIN)/python .ci/helm.py $(HELM)

# Of its own: it pins much of what the service needs in other versions.
$(CHECKOV)/bin/checkov:
	$(PYTHON) -m venv $(CHECKOV)
	$(CHECKOV)/bin/pip install -q checkov==3.3.30

$(FUZZ): pyproject.toml $(VENV)/constraints-$(MODE).txt
	$(BIN)/pip install -q -c $(VENV)/constraints-$(MODE).txt -e '.[fuzz]'
	@touch $@ $(RUNTIME)

SITE_PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))

# Of its own too: what looks at the environment is no part of it.
$(AUDIT)/bin/pip-audit:
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install -q cyclonedx-bom==7.5.0 pip-audit==2.10.1
