# zs-seg. `make demo` and `make test` each work as the first command; they need python3.11, make and git.

PRESET ?= demo
COCO ?=
STORE ?=
PREFECT_PORT ?= 4200
RUNS ?= 1
UV_VERSION := 0.13.9
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

PYTHON := .venv/bin/python
FLAGS = $(if $(COCO),--coco "$(COCO)") $(if $(STORE),--store "$(STORE)")
ZS_SEG = .venv/bin/zs-seg
SERVE = PREFECT_HOME="$(CURDIR)/.prefect" $(PYTHON) -m flows.serve
INSTALLED := .venv/.installed
# Sources of the tests and the linters; only what exists.
CODE := flows models pipeline storage tests

.DEFAULT_GOAL := help
.PHONY: help install demo ablate test test-faults check plan shards text cache-clip v2c queries g2s cpa evaluate serve stop image clean
.DELETE_ON_ERROR:

help:  ## this list
	@echo "make TARGET [PRESET=$(PRESET)] [COCO=folder] [STORE=folder]"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

demo: install  ## generated scenes, all stages, report in runs/demo/ (minutes on a CPU)
	@$(ZS_SEG) run --preset demo $(FLAGS)

ablate: install  ## the paper's ablations on generated scenes, three seeds, with figures (hours on a CPU)
	@$(ZS_SEG) ablate --preset scenes $(FLAGS)

test: install  ## every test
	@$(PYTHON) -m pytest

test-faults: install  ## 300 random faults, a killed Prefect server, fuzzed files; about 20 minutes; SEED=0
	@mkdir -p runs
	@PYTHONPATH=.:tests/helpers OMP_NUM_THREADS=1 $(PYTHON) tests/faults/fault_run.py --seed $(or $(SEED),0) --count 300 --markdown runs/faults.md --json runs/faults.json
	@PYTHONPATH=. $(PYTHON) tests/faults/fault_prefect.py
	@$(PYTHON) -m pytest tests/test_cluster.py tests/test_fuzz_readers.py tests/test_safety.py tests/test_store.py tests/test_store_inputs.py

check: install  ## format, lint, types, quick tests
	@$(PYTHON) -m ruff format --check $(CODE)
	@$(PYTHON) -m ruff check $(CODE)
	@$(PYTHON) -m basedpyright --warnings
	@$(PYTHON) -m pytest -m "not slow"

plan: install  ## what is there, and what a run would build
	@$(ZS_SEG) plan --preset $(PRESET) $(FLAGS)

shards: install  ## images and annotations, checked, in tars
	@$(ZS_SEG) run --preset $(PRESET) $(FLAGS) --until shard

text: install  ## class names as the teacher's embeddings
	@$(ZS_SEG) run --preset $(PRESET) $(FLAGS) --until text

cache-clip: install  ## what the teacher sees in every image and instance
	@$(ZS_SEG) run --preset $(PRESET) $(FLAGS) --until cache-clip

v2c: install  ## training stage 1: segmenter and projector; the inductive checkpoint
	@$(ZS_SEG) run --preset $(PRESET) $(FLAGS) --until v2c

queries: install  ## the frozen segmenter's queries of every training image
	@$(ZS_SEG) run --preset $(PRESET) $(FLAGS) --until queries

g2s: install  ## training stage 2: the generator
	@$(ZS_SEG) run --preset $(PRESET) $(FLAGS) --until g2s

cpa: install  ## training stage 3: the projector adapts; the transductive checkpoint
	@$(ZS_SEG) run --preset $(PRESET) $(FLAGS) --until cpa

evaluate: install  ## the report in runs/PRESET/
	@$(ZS_SEG) run --preset $(PRESET) $(FLAGS)

serve: install  ## local Prefect server and worker in the foreground; PREFECT_PORT=4200, RUNS=1 at a time
	@exec env $(SERVE) start --port $(PREFECT_PORT) --runs $(RUNS)

stop: install  ## stop what `make serve` started
	@$(SERVE) stop

image: requirements.lock  ## the container image zs-seg, with Docker
	@docker build --file docker/Dockerfile --tag zs-seg:$(VERSION) .

clean:  ## remove environment, tool and Prefect's records; artefacts and reports stay
	@if [ -x $(PYTHON) ] && [ -d .prefect ]; then $(SERVE) stop; fi
	rm -rf .venv .uv .prefect .pytest_cache .ruff_cache .hypothesis

install: $(INSTALLED)  ## .venv with the locked dependencies; the other targets do it by themselves

$(INSTALLED): requirements.lock pyproject.toml | .uv/bin/uv
	@[ -x $(PYTHON) ] || .uv/bin/uv venv --quiet --python python3.11 .venv
	@echo "installing the locked dependencies into .venv"
	@.uv/bin/uv pip sync --quiet --python $(PYTHON) requirements.lock
	@.uv/bin/uv pip install --quiet --python $(PYTHON) --no-deps --editable .
	@touch $@

.uv/bin/uv:
	@echo "installing uv into .uv"
	@python3.11 -m venv .uv
	@.uv/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
