# Every target is one line; the logic lives in Python. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup shell docs demo model-smollm2 test test-vllm test-gpu check format lint type kernels bench bench-gpu notebooks report leaderboard readme badges golden licences audit clean

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What running needs, and what checking needs on top: stamps, so that each installs once.
$(VENV)/.core: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[lab]' && touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[eval,launchers,notebooks,docs,dev]' && touch $@ $(VENV)/.core

setup: $(VENV)/.dev ## Make .venv with everything the checks need

shell: $(VENV)/.core ## Open a shell in the environment, where `python run.py` works
	@. $(VENV)/bin/activate && exec "$${SHELL:-/bin/sh}"

docs: $(VENV)/.dev ## Build the documentation as a site, in outputs/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "outputs/site/index.html"

demo: $(VENV)/.core ## Compare PBS, mean pooling and dense attention on the embedded model
	$(BIN)/python run.py -m method=flash,meanpool,pbs bench=needle model=tiny

model-smollm2: $(VENV)/.core ## Fetch SmolLM2-135M-Instruct (93 MB, Apache-2.0) and two books into the cache, once
	$(PIP) -e '.[lab,real]' && $(BIN)/python -m experiments.tools.smollm2 && $(BIN)/python -m experiments.tools.texts fetch

test: $(VENV)/.dev ## Run the tests (CPU)
	$(BIN)/python -m pytest

test-vllm: ## Run the plug-in in a real vLLM on the CPU, in .venv-vllm (3.5 GB); VLLM=0.28.0 for another version
	$(PYTHON) -m tests.serving.environment .venv-vllm $(VLLM) && .venv-vllm/bin/python -m pytest -m vllm -n 0 tests/serving

test-gpu: $(VENV)/.dev ## Run the tests that need a CUDA device
	PBS_TESTS=gpu $(BIN)/python -m pytest -m gpu -n 8

check: lint type test ## Everything CI runs

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .

lint: $(VENV)/.dev ## Check format and style
	$(BIN)/ruff format --check . && $(BIN)/ruff check .

type: $(VENV)/.dev ## Check the types of the library
	$(BIN)/mypy

notebooks: $(VENV)/.dev ## Execute the notebooks on outputs/, as HTML in outputs/notebooks
	$(BIN)/python -m nbconvert --to html --execute --output-dir outputs/notebooks notebooks/*.ipynb

report: $(VENV)/.core ## Write outputs/report: one HTML page and Markdown over all runs
	$(BIN)/python -m experiments.report --outputs outputs --out outputs/report

leaderboard: $(VENV)/.core ## Write outputs/leaderboard.csv, each run checked against its samples
	$(BIN)/python -m experiments.tools.leaderboard --outputs outputs --out outputs/leaderboard.csv

readme: $(VENV)/.core ## Write the README's result tables from results
	$(BIN)/python -m experiments.tools.readme

badges: $(VENV)/.core ## Put badges into the notebooks: make badges REPO=owner/name
	$(BIN)/python -m experiments.tools.badges $(REPO)

golden: $(VENV)/.dev ## Write tests/golden/needle.json anew, after a change meant to move numbers
	$(BIN)/python -m tests.golden.update

kernels: $(VENV)/.core ## Compile every Triton kernel for sm_80, sm_90 and sm_100 and check it
	$(BIN)/python -m experiments.tools.kernels

bench: $(VENV)/.core ## Gate, then attention beside PyTorch's SDPA on this CPU (minutes)
	$(BIN)/python -m experiments.tools.bench --on cpu

bench-gpu: $(VENV)/.core ## All numbers that need a GPU
	$(BIN)/python -m experiments.tools.bench --on gpu

licences: $(VENV)/.dev ## List installed packages with their licences
	$(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install --quiet pip-licenses && $(VENV)/audit/bin/pip-licenses --python=$(BIN)/python --format=markdown --order=license

audit: $(VENV)/.dev ## Look installed packages up among known vulnerabilities (needs the Python Package Index)
	$(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/python -m pip install --quiet pip-audit && $(VENV)/audit/bin/pip-audit --skip-editable --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

clean: ## Remove .venv and caches, keep outputs
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info
