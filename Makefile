# LoRaQ. Every target sets up what it needs by itself; `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/loraq
# make table1 MODEL=tiny_sana: another model of conf/model/, whose tables have a folder of their own
MODEL ?=
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_REPORT := $(VENV)/.installed-report-test
INSTALLED_NOTEBOOKS := $(VENV)/.installed-notebooks
INSTALLED_DOCS := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help install demo test test-notebooks test-cluster test-report check format table1 ablations report tables docs cache clean distclean

help: ## list the targets
	@grep -hE '^[a-z0-9_%-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: $(INSTALLED) ## the first look: 16-bit, RTN, SVDQuant, LoRaQ on an embedded model (≤ 10 min on 2 cores)
	$(RUN) run experiment=demo $(MODEL:%=model=%)

table1: $(INSTALLED) ## the comparison: 26 rows, 128 prompts (about an hour on 2 cores; resumes)
	$(RUN) run experiment=table1 $(MODEL:%=model=%)

ABLATIONS := $(patsubst conf/experiment/%.yaml,%,$(wildcard conf/experiment/ablation_*.yaml))

ablations: $(ABLATIONS) ## every ablation_NAME of conf/experiment/, one after the other (hours; resumes)

ablation_%: $(INSTALLED) ## one of them: what it asks and how long it takes stands in its YAML
	$(RUN) run experiment=ablation_$* $(MODEL:%=model=%)

NAME ?= demo
report: $(INSTALLED) ## one HTML page of an experiment, run or committed: make report NAME=table1 (seconds)
	$(RUN) report $(NAME)

tables: $(INSTALLED) ## the committed tables, README and docs again from the committed records (seconds)
	$(BIN)/python -m loraq.readme

# A broken link, a missing anchor or a page that the index leaves out is a warning, and -W fails on it.
docs: $(INSTALLED_DOCS) ## the pages as HTML: build/docs/docs/index.html (half a minute)
	$(BIN)/python -m sphinx -W --keep-going -q -c docs -b html . build/docs

test: $(INSTALLED_DEV) ## the whole test suite (about 10 min on 2 cores)
	$(BIN)/python -m pytest

test-notebooks: $(INSTALLED_NOTEBOOKS) ## execute the notebooks, each timed (about 2 min on 2 cores)
	$(BIN)/python -m notebooks.execute

# An environment of its own: Hydra's Ray launcher asks for older packages than constraints.txt has.
CLUSTER := .venv-cluster
test-cluster: $(CLUSTER)/.installed ## sweeps on a real Slurm and on Ray, started here (root and Debian's slurm packages)
	$(CLUSTER)/bin/python -m pytest -m cluster tests/cluster

$(CLUSTER)/.installed: pyproject.toml constraints.txt constraints-ray.txt
	$(PYTHON) -m venv $(CLUSTER)
	$(CLUSTER)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25'
	grep -vE "^($$(grep -oE '^[a-z0-9-]+==' constraints-ray.txt | tr -d = | paste -sd '|'))==" constraints.txt \
		| cat - constraints-ray.txt > $(CLUSTER)/constraints.txt
	$(CLUSTER)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CLUSTER)/constraints.txt -e '.[dev,slurm,ray]'
	@touch $@

test-report: $(INSTALLED_DEV) $(INSTALLED_REPORT) ## the report's page in a headless Chromium (Debian's package; a minute or two)
	$(BIN)/python -m pytest -m browser tests/results/report

check: $(INSTALLED_DEV) ## lint, formatting, types, and the order of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(INSTALLED_DEV) ## format the code in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

cache: $(INSTALLED) ## what lies under outputs/, and how much disk it takes
	$(RUN) cache

install: $(INSTALLED) ## only the environment: .venv with exactly the versions of constraints.txt

clean: ## remove build files and tool caches (never images, records or checkpoints)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find loraq tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## as clean, and the environment as well (outputs/ stays)
	rm -rf $(VENV) $(CLUSTER) loraq.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

# .installed-EXTRA: an optional dependency group of pyproject.toml
$(VENV)/.installed-%: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@
