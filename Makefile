# The README's commands, and CI's. Everything is made in .venv and build/.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8080
export PYTHONPATH := $(CURDIR)

.PHONY: help demo run test check crash simulate soak fuzz hostile mutants lock certs image clean

help: ## Show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# A marker for each lock file: what is installed is what is locked, and no more often.
$(VENV)/.demo: requirements-demo.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 …"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing what requirements-demo.lock names ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-demo.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: requirements-dev.lock $(VENV)/.demo
	@echo "Installing what requirements-dev.lock names ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

demo: $(VENV)/.demo ## Play the whole story; NAIVE=1: the article's own design; SERVICES=real: Kafka and MariaDB
	@NAIVE=$(NAIVE) SERVICES=$(SERVICES) $(BIN)/python -m demo

run: $(VENV)/.demo ## Start the function alone on port 8080, with a sandbox recharge API beside it
	@PORT=$(PORT) $(BIN)/python -m demo.run

test: $(VENV)/.dev ## Install the servers that the tests need, and run every test
	@$(BIN)/python -m demo.services install
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile $(ARGS)

check: $(VENV)/.dev ## Format, lint, types, unit tests: under 30 s
	@$(BIN)/ruff format --check --quiet . || { echo "Run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -q tests/unit tests/repo -m "not slow"

crash: $(VENV)/.demo ## Kill at every boundary, and count executions; SHORT=1: in three minutes
	@$(BIN)/python -m demo.services install
	@$(BIN)/python -m proof.crash_matrix $(if $(SHORT),--short) $(if $(PAGE),--page $(PAGE)) $(ARGS)

soak: $(VENV)/.dev ## Everything at once under seeded faults; MINUTES=2 SEED= KIND=replay NAIVE=1
	@$(BIN)/python -m demo.services install
	@$(BIN)/python -m proof.soak --minutes $(or $(MINUTES),2) --kind $(or $(KIND),replay) \
		$(if $(SEED),--seed $(SEED)) $(if $(NAIVE),--naive)

fuzz: $(VENV)/.dev ## Send bad input to the front door, good orders between; SHORT=1: CI's form
	@$(BIN)/python -m proof.fuzz $(if $(SHORT),--short) $(ARGS)

hostile: $(VENV)/.dev ## Answer the function as no recharge API should; SHORT=1: CI's form
	@$(BIN)/python -m proof.hostile $(if $(SHORT),--short) $(if $(SEED),--seed $(SEED)) $(ARGS)

LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header pyproject.toml

simulate: $(VENV)/.dev ## Play every small schedule and a million by seed; SHORT=1: 200,000, in three minutes
	@$(BIN)/python -m proof.simulate $(if $(SHORT),,--exhaustive --runs 1000000) $(ARGS)

mutants: $(VENV)/.dev ## Break each guard in a copy, and see which instrument notices; INSTRUMENT=tests: by that alone
	@$(BIN)/python -m demo.services install
	@$(BIN)/python -m proof.mutate $(if $(INSTRUMENT),--instrument $(INSTRUMENT)) $(ARGS)

lock: $(VENV)/.dev ## Write the lock files anew, with hashes and without addresses
	@$(LOCK) --extra demo --extra cluster --extra dev --output-file requirements-dev.lock
	@$(LOCK) --extra demo --constraint requirements-dev.lock --output-file requirements-demo.lock
	@$(LOCK) --constraint requirements-dev.lock --output-file requirements.lock

certs: $(VENV)/.demo ## Make a CA and certificates for a laptop in build/certs
	@$(BIN)/python certs/make_certs.py build/certs --force

image: $(VENV)/.demo ## Build the container image; BASE=local: where no base image can be pulled; TAG=name:version
	@$(BIN)/python -m demo.image --base '$(BASE)' --tag '$(TAG)'

clean: ## Remove everything that was made
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
