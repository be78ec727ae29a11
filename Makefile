# zs-seg. `make demo` and `make test` each work as the first command. They need make, git and a Python: the first of PYTHONS that runs,
# or PYTHON3, where that is given; where there is none, uv is asked to bring one.

PRESET ?= demo
COCO ?=
STORE ?=
ARGS ?=
PREFECT_PORT ?= 4200
REPORTS_PORT ?= 0
RUNS ?= 1
PYTHONS := python3.11 python3.12 python3.13
PYTHON3 ?=
UV_VERSION := 0.13.9
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

PYTHON := .venv/bin/python
FLAGS = $(if $(COCO),--coco "$(COCO)") $(if $(STORE),--store "$(STORE)") $(ARGS)
ZS_SEG = .venv/bin/zs-seg
SERVE = PREFECT_HOME="$(CURDIR)/.prefect" $(PYTHON) -m flows.serve
UV := .uv/bin/uv
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev
# Sources of the tests and the linters; only what exists.
CODE := flows models pipeline storage tests
# Two processes, each with whole files of tests. Some hundred more import torch, in a third of the time from compiled files.
PYTEST = PYTHONDONTWRITEBYTECODE= $(PYTHON) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The full path of the first of some names that runs as a Python with venv and pip. That a name is on PATH proves nothing: version
# managers put shims there of versions that are not installed.
first_python = $(shell for name in $(1); do "$$name" -c 'import ensurepip, sys, venv; print(sys.executable)' 2>/dev/null && break; done)
CANDIDATES = $(or $(PYTHON3),$(PYTHONS))
INTERPRETER = $(call first_python,$(CANDIDATES))
define NO_PYTHON
{ echo "zs-seg: none of $(CANDIDATES) runs here with venv and pip; install one (Debian, Ubuntu: apt-get install python3-venv), \
name one (make PYTHON3=/path/to/python3.11), or fetch one (uv python install 3.11)" >&2; exit 2; }
endef

.DEFAULT_GOAL := help
.PHONY: help install install-dev python lock demo ablate test test-faults check plan shards text cache-clip v2c queries g2s cpa mask-tokens evaluate serve stop image clean
.DELETE_ON_ERROR:

help:  ## this list
	@echo "make TARGET [PRESET=$(PRESET)] [COCO=folder] [STORE=folder] [ARGS='more flags of zs-seg']"
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-14s %s\n", $$1, $$2}'

demo: install  ## generated scenes, all stages, report in runs/demo/ (minutes on a CPU)
	@$(ZS_SEG) run --preset demo $(FLAGS)

ablate: install  ## the paper's ablations on generated scenes, five seeds, with figures (hours on a CPU)
	@$(ZS_SEG) ablate --preset scenes $(FLAGS)

test: install-dev  ## every test
	@$(PYTEST)

test-faults: install-dev  ## 300 random faults, a killed Prefect server, killed pushes and pulls, fuzzed files; about 20 minutes; SEED=0
	@mkdir -p runs
	@PYTHONPATH=.:tests/helpers OMP_NUM_THREADS=1 $(PYTHON) tests/faults/fault_run.py --seed $(or $(SEED),0) --count 300 --markdown runs/faults.md --json runs/faults.json
	@PYTHONPATH=. $(PYTHON) tests/faults/fault_prefect.py
	@PYTHONPATH=.:tests/helpers:tests/faults $(PYTHON) tests/faults/fault_remote.py 30 $(or $(SEED),0)
	@$(PYTEST) --hypothesis-profile deep tests/test_cluster.py tests/test_fuzz_readers.py tests/test_safety.py tests/test_store.py tests/test_store_inputs.py

check: install-dev  ## format, lint, types, quick tests
	@$(PYTHON) -m ruff format --check $(CODE)
	@$(PYTHON) -m ruff check $(CODE)
	@$(PYTHON) -m basedpyright --warnings
	@$(PYTEST) -m "not slow"

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

mask-tokens: install  ## what the teacher sees in the masks that the network finds
	@$(ZS_SEG) run --preset $(PRESET) $(FLAGS) --until mask-tokens

app: install  ## a page on this machine to drop an image and type words; ARGS='--checkpoint RUN', demo where none is named
	@$(ZS_SEG) app $(if $(STORE),--store "$(STORE)") $(ARGS)

evaluate: install  ## the report in runs/PRESET/
	@$(ZS_SEG) run --preset $(PRESET) $(FLAGS)

serve: install  ## local Prefect server and worker in the foreground; PREFECT_PORT=4200, REPORTS_PORT=4201, RUNS=1 at a time
	@exec env $(SERVE) start --port $(PREFECT_PORT) --reports-port $(REPORTS_PORT) --runs $(RUNS)

stop: install  ## stop what `make serve` started
	@$(SERVE) stop

image: requirements-remote.lock  ## the container image zs-seg, with Docker
	@docker build --file docker/Dockerfile --tag zs-seg:$(VERSION) .

clean:  ## remove environment, tool and Prefect's records; artefacts and reports stay
	@if [ -x $(PYTHON) ] && [ -d .prefect ]; then $(SERVE) stop; fi
	rm -rf .venv .uv .prefect .pytest_cache .ruff_cache .hypothesis

# A .venv that has the development tools keeps them.
install: $(or $(wildcard $(INSTALLED_DEV)),$(INSTALLED))  ## .venv with what a user needs, as locked; other targets do it by themselves

install-dev: $(INSTALLED_DEV)  ## the same with what the tests, the linters and `zs-seg bench` need

python:  ## which Python .venv is made with; PYTHON3=path for another one
	@$(if $(INTERPRETER),echo "$(INTERPRETER)",$(NO_PYTHON))

lock: $(UV)  ## the lock files anew from pyproject.toml; versions stay, UPGRADE="--upgrade-package NAME" moves one
	@$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 $(UPGRADE) -o requirements.lock pyproject.toml
	@$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 $(UPGRADE) --extra remote -o requirements-remote.lock pyproject.toml
	@$(UV) pip compile --quiet --universal --generate-hashes --no-emit-index-url --python-version 3.11 $(UPGRADE) --extra dev -o requirements-dev.lock pyproject.toml

# Makes .venv where there is none, and it holds what the lock file names and zs-seg itself, nothing more.
define sync
	@[ -x $(PYTHON) ] || $(UV) venv --quiet --clear --python $(if $(INTERPRETER),"$(INTERPRETER)" .venv,"$(or $(PYTHON3),3.11)" .venv 2>/dev/null || $(NO_PYTHON))
	@echo "installing $< into .venv"
	@$(UV) pip sync --quiet --python $(PYTHON) $<
	@$(UV) pip install --quiet --python $(PYTHON) --no-deps --editable .
	@touch $@
endef

$(INSTALLED): requirements.lock pyproject.toml | $(UV)
	$(sync)

$(INSTALLED_DEV): requirements-dev.lock pyproject.toml | $(UV)
	$(sync)

# Any Python can bring uv, also one too old or too new for zs-seg.
$(UV): BOOTSTRAP = $(call first_python,$(CANDIDATES) python3)
$(UV):
	@echo "installing uv into .uv"
	@rm -rf .uv
	@$(if $(BOOTSTRAP),"$(BOOTSTRAP)" -m venv .uv,uv venv --quiet --seed .uv 2>/dev/null || $(NO_PYTHON))
	@.uv/bin/pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
