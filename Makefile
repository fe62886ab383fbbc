# LoRaQ. Every target installs its own requirements; `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/loraq
# make table1 MODEL=tiny_sana: another model of conf/model/; its tables go to a separate folder
MODEL ?=
# make table1 ARGS='data.count=32': more settings of the run
ARGS ?=
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
INSTALLED_REPORT := $(VENV)/.installed-report-test
INSTALLED_NOTEBOOKS := $(VENV)/.installed-notebooks
INSTALLED_DOCS := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help install demo test test-notebooks test-cluster test-engines test-report test-gpu test-fuzz test-faults check format table1 ablations report tables docs cache clean distclean

help: ## list the targets
	@grep -hE '^[a-z0-9_%-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

demo: $(INSTALLED) ## demo: 16-bit, RTN, SVDQuant and LoRaQ on an embedded model (≤ 10 min on 2 cores)
	$(RUN) run experiment=demo $(MODEL:%=model=%) $(ARGS)

table1: $(INSTALLED) ## main comparison: 26 rows, 128 prompts (about an hour on 2 cores; resumes)
	$(RUN) run experiment=table1 $(MODEL:%=model=%) $(ARGS)

ABLATIONS := $(patsubst conf/experiment/%.yaml,%,$(wildcard conf/experiment/ablation_*.yaml))

ablations: $(ABLATIONS) ## run every ablation_NAME of conf/experiment/ (hours; resumes)

ablation_%: $(INSTALLED) ## run one ablation; its YAML states question and duration
	$(RUN) run experiment=ablation_$* $(MODEL:%=model=%) $(ARGS)

NAME ?= demo
report: $(INSTALLED) ## HTML page of an experiment, run or committed: make report NAME=table1 (seconds)
	$(RUN) report $(NAME)

tables: $(INSTALLED) ## regenerate tables, README and docs from the committed records (seconds)
	$(BIN)/python -m loraq.readme

# -W: broken links, missing anchors and pages that the index does not list are errors.
docs: $(INSTALLED_DOCS) ## build the documentation as HTML: build/docs/docs/index.html (half a minute)
	$(BIN)/python -m sphinx -W --keep-going -q -c docs -b html . build/docs

# Tests start many processes: they compile the library once, also where bytecode is not kept.
test: $(INSTALLED_DEV) ## run the whole test suite in two processes (under 10 min on 2 cores)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-notebooks: $(INSTALLED_NOTEBOOKS) ## execute and time the notebooks (about 2 min on 2 cores)
	$(BIN)/python -m notebooks.execute

# A separate environment: Hydra's Ray launcher needs older packages than constraints.txt lists.
CLUSTER := .venv-cluster
test-cluster: $(CLUSTER)/.installed ## test sweeps on a local Slurm and Ray (needs root and Debian's slurm packages)
	$(CLUSTER)/bin/python -m pytest -m cluster tests/cluster

$(CLUSTER)/.installed: pyproject.toml constraints.txt constraints-ray.txt
	$(PYTHON) -m venv $(CLUSTER)
	$(CLUSTER)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25'
	grep -vE "^($$(grep -oE '^[a-z0-9-]+==' constraints-ray.txt | tr -d = | paste -sd '|'))==" constraints.txt \
		| cat - constraints-ray.txt > $(CLUSTER)/constraints.txt
	$(CLUSTER)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CLUSTER)/constraints.txt -e '.[dev,slurm,ray]'
	@touch $@

# A separate environment: the readers bring packages that the project does not need.
ENGINES := .venv-engines
test-engines: $(ENGINES)/.installed ## compare exported checkpoints with the packages that read them (a few minutes)
	$(ENGINES)/bin/python -m pytest -m engines tests/engines

$(ENGINES)/.installed: pyproject.toml constraints.txt constraints-engines.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25'
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-engines.txt -e '.[dev,engines]'
	@touch $@

test-report: $(INSTALLED_DEV) $(INSTALLED_REPORT) ## test the report in a headless Chromium (Debian's package; 1 to 2 min)
	$(BIN)/python -m pytest -m browser tests/results/report

test-faults: $(INSTALLED_DEV) ## kill, damage, race and starve real commands; writes experiments/faults/record.json (20 min on 2 cores)
	$(BIN)/python -m tests.faults --output experiments/faults/record.json

# DRY=1: every path with tiny models on a CPU; LIST=1: only name the items; MINUTES=4: less time
MINUTES ?= 10
test-gpu: $(INSTALLED_DEV) ## check and time a machine with a GPU; writes results/bench/gpu.json (10 min; DRY=1, LIST=1)
	$(BIN)/python -m tests.gpu --minutes $(MINUTES) $(if $(LIST),--list) $(if $(DRY),--dry,--output results/bench/gpu.json)

test-fuzz: $(INSTALLED_DEV) ## random input for readers of prompts, overrides, records, packed files (under 10 min)
	$(BIN)/python -m pytest -m fuzz tests/fuzz --fuzz-record experiments/fuzz/record.json

check: $(INSTALLED_DEV) ## check lint, formatting, types and the import order of packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(INSTALLED_DEV) ## format the code in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

cache: $(INSTALLED) ## list the products in outputs/ and their size
	$(RUN) cache

install: $(INSTALLED) ## create .venv with the exact versions of constraints.txt

clean: ## remove build files and tool caches (never images, records or checkpoints)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find loraq tests experiments -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the environment (keeps outputs/)
	rm -rf $(VENV) $(CLUSTER) $(ENGINES) loraq.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

# .installed-EXTRA: an optional dependency group of pyproject.toml
$(VENV)/.installed-%: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@
