# Everything a user or a contributor types. Each target makes the environment first if it is not there yet.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install train compare reproduce test test-core test-long test-ray test-report lint format docs bench clean

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The core alone, with the newest torch: an environment of its own.
CORE := .venv-core
CORE_STAMP := $(CORE)/.installed

# A folder of RedPajama-format jsonl, jsonl.gz or jsonl.zst. Empty: text that every machine with Python has.
DATA ?=
OUT ?= runs/demo
# Runs of every method in `make compare`.
SEEDS ?= 1
# Size of `make reproduce`, and further options of its campaign, for example CAMPAIGN="--study main --budget 3600".
SCALE ?= smoke
CAMPAIGN ?=
# A process for each core, up to four: each holds a torch of its own. The tests of a file stay together.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile
# Arguments for pytest, for example TESTS="tests/test_yamls.py -x".
TESTS ?=

# What is tested without Composer, llm-foundry and data preparation.
CORE_TESTS := tests/ops tests/model tests/assessment tests/operators tests/sharding tests/trainable tests/triton_kernels \
	tests/test_expander.py tests/test_exactness.py tests/test_models.py tests/test_settings.py tests/test_stopwatch.py

# Exit with 0 under an interpreter that fits and can make a virtual environment with pip in it.
PYTHON_FITS := import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
CORE_FITS := import ensurepip, sys, venv; sys.exit(sys.version_info[:2] < (3, 12))
# An interpreter named by the user is taken or refused, never replaced by another.
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.12 python3.11 python3.10 python3)
CORE_CANDIDATES := $(if $(PYTHON_CORE),$(PYTHON_CORE),python3.14 python3.13 python3.12 python3)

# $(call choose,PROBE,CANDIDATES,PYTHONS,VARIABLE): sets `chosen` to the first that fits, or ends with what to do.
define choose
chosen=; for candidate in $(2); do \
  if "$$candidate" -c '$(1)' >/dev/null 2>&1; then chosen=$$candidate; break; fi; \
done; \
if [ -z "$$chosen" ]; then \
  echo "make: no Python $(3) with the modules venv and ensurepip among: $(2)"; \
  echo "Install one (Debian and Ubuntu: also its package python3-venv) and name it: make $(4)=/path/to/python $(MAKECMDGOALS)"; \
  exit 1; \
fi
endef

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## build .venv from pyproject.toml and constraints.txt (PYTHON=... picks the interpreter)

$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	if ! { $(BIN)/python -c '$(PYTHON_FITS)' && $(BIN)/python -m pip --version; } >/dev/null 2>&1; then \
	  $(call choose,$(PYTHON_FITS),$(CANDIDATES),3.10 to 3.12,PYTHON); \
	  echo "First, once: $(VENV) with $$("$$chosen" --version), about 7 GB, most of it torch with CUDA: about 5 minutes,"; \
	  echo "more with a slow package registry. Then: make $(or $(MAKECMDGOALS),install)$(if $(filter train,$(MAKECMDGOALS)), (about 10 minutes on 2 CPU cores))."; \
	  "$$chosen" -m venv $(VENV); \
	fi
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@

$(CORE_STAMP): pyproject.toml constraints-core.txt
	@set -e; \
	if ! { $(CORE)/bin/python -c '$(CORE_FITS)' && $(CORE)/bin/python -m pip --version; } >/dev/null 2>&1; then \
	  $(call choose,$(CORE_FITS),$(CORE_CANDIDATES),3.12 or newer,PYTHON_CORE); \
	  echo "First, once: $(CORE) with $$("$$chosen" --version), about 6 GB, most of it torch with CUDA."; \
	  "$$chosen" -m venv $(CORE); \
	fi
	$(CORE)/bin/python -m pip install --constraint constraints-core.txt --editable '.[test-core]'
	@touch $@

train: $(STAMP)  ## the whole job, from text to an APEX-trained model (DATA=folder, OUT=runs/demo)
	$(BIN)/apex-composer demo --out "$(OUT)" $(if $(DATA),--data "$(DATA)")

compare: $(STAMP)  ## every method from the base model of make train, in one table (DATA=folder, OUT=runs/demo, SEEDS=1)
	$(BIN)/apex-composer compare --out "$(OUT)" --seeds "$(SEEDS)" $(if $(DATA),--data "$(DATA)")

reproduce: $(STAMP)  ## does expansion pay? every arm from one base, resumable (SCALE=smoke|cpu|gpu, DATA=folder, CAMPAIGN=options)
	$(BIN)/python benchmarks/reproduce/campaign.py $(SCALE) $(if $(DATA),--data "$(DATA)") $(CAMPAIGN)

test: $(STAMP)  ## all tests, the numeric ones as on lesser CPUs too; no GPU, no network
	$(BIN)/python -m pytest -m "not long and not browser and not ray" $(if $(TESTS),$(TESTS),$(PARALLEL))
	$(if $(TESTS),,$(BIN)/python tests/lower_capabilities.py $(PARALLEL))

test-core: $(CORE_STAMP)  ## the tests of the core alone, newest torch and transformers, no Composer (PYTHON_CORE=...)
	$(CORE)/bin/apex-composer --help >/dev/null  # all commands load without the extras
	$(CORE)/bin/python -m pytest -m "not long" $(if $(TESTS),$(TESTS),$(PARALLEL) $(CORE_TESTS))

test-long: $(STAMP)  ## the tests that take minutes, or a quiet machine
	$(BIN)/python -m pytest -m long $(TESTS)

test-ray: $(STAMP)  ## data preparation on Ray clusters of this machine, whose nodes and workers die
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[ray]'
	$(BIN)/python -m pytest -m ray $(or $(TESTS),tests/data_prep/engines)

test-report: $(STAMP)  ## reports in headless Chromium: errors, requests, overflow, light and dark
	$(BIN)/python -m pytest -m browser $(or $(TESTS),tests/report)

lint: $(STAMP)  ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## repair style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## write docs/settings.md and docs/results.md anew, from the code and from what was measured
	$(BIN)/python docs/make_settings.py
	$(BIN)/python docs/make_results.py

bench: $(STAMP)  ## time an APEX step against a vanilla one
	$(BIN)/python benchmarks/step_overhead.py

clean:  ## remove caches and build leftovers; keeps environments, runs and data
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . \( -path ./$(VENV) -o -path ./$(CORE) \) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
