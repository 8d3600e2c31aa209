# `make demo` and `make test` do everything on a fresh machine; `make help` lists the rest.
.DEFAULT_GOAL := help
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= python3
SET ?= cpu
WORKERS ?= 2
.PHONY: help install install-dev demo test test-fast test-cluster fuzz lint format docs lock wheel image clean

help:            ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 18

install:         ## create the virtual environment and install the pinned set (CUDA if a driver answers)
	@scripts/install.sh $(VENV)

install-dev:     ## the same, with the tools for tests, lint and docs
	@scripts/install.sh $(VENV) dev s3 docs

demo: install    ## the main job on a synthetic log: table on the terminal, report page in runs/demo
	$(BIN)/recpress compare cadc --config benchmarks/recipes/demo.toml

# The benchmarks fork, which a process whose libraries have threads must not do: first, and in a process of their own.
test: install-dev lint  ## lint and tests, on WORKERS=2 processes
	$(BIN)/python -m pytest tests/benchmarks
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --ignore tests/benchmarks

test-fast: install-dev  ## the tests of one process that train no model, in under 3 minutes
	$(BIN)/python -m pytest -m "not cluster and not slow"

test-cluster: install-dev  ## tests on their own Slurm of two nodes; as root on Debian
	$(BIN)/python -m pytest tests/cluster -m cluster -rs

fuzz: install-dev  ## ten minutes of damaged files for ingest (not a part of test)
	$(BIN)/python -m tests.fuzz.ingest --minutes 10

lint: install-dev  ## ruff, types, import rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=src $(BIN)/mypy -p recpress
	$(BIN)/lint-imports

format: install-dev  ## let ruff write the format
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

docs: install-dev  ## build the documentation site into build/site, offline; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "docs: build/site/index.html; to search, run $(BIN)/python -m http.server --directory build/site"

lock: install-dev  ## pin requirements/*.in, with hashes; UPGRADE=--upgrade takes the newest versions
	@scripts/lock.sh $(abspath $(BIN)/uv) $(UPGRADE)

wheel:           ## build the wheel into dist/; installs nothing but setuptools, in a folder of its own
	@[ -x build/wheel-env/bin/pip ] || $(PYTHON) -m venv build/wheel-env
	build/wheel-env/bin/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

image:           ## build the container image recpress:cpu; SET=cuda builds recpress:cuda
	docker build -f launch/docker/Dockerfile --build-arg SET=$(SET) -t recpress:$(SET) .

clean:           ## remove what was built; runs/ stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
