# `make demo` on a bare machine: no Docker, no database, no Redis to install first.
#   PYTHON=python3.12   another interpreter      TORCH=host   keep the host's torch
#   TORCH_INDEX=URL     an extra index for torch
.DEFAULT_GOAL := help
.PHONY: help setup demo test quick chaos worlds check stand format clean

PYTHON_FOR_SETUP := $(shell command -v $(or $(PYTHON),python3))
VENV_PYTHON := .venv/bin/python
export PYTHON TORCH TORCH_INDEX

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18

setup:  ## a virtualenv with exactly the pinned packages; at once when nothing has changed
	@$(or $(PYTHON_FOR_SETUP),python3) scripts/setup.py

demo: export TUNERY_HOME ?= $(CURDIR)/.tunery
demo: setup  ## start everything, train a small model, show the result
	@$(VENV_PYTHON) scripts/demo.py

test: setup  ## every test, against real servers
	@$(VENV_PYTHON) scripts/test.py

quick: setup  ## the tests that take seconds
	@$(VENV_PYTHON) -m pytest -m "not slow and not chaos"

chaos: setup  ## random faults for MINUTES=60 (and SEED=n): users and faults as a state machine, then a campaign
	@$(VENV_PYTHON) -m tests.chaos.machine --minutes $$(( $(or $(MINUTES),60) / 2 )) $(if $(SEED),--seed $(SEED))
	@$(VENV_PYTHON) -m tests.chaos.campaign --faults 100000 --minutes $$(( $(or $(MINUTES),60) / 2 )) $(if $(SEED),--seed $(SEED))

worlds: setup  ## the policy's invariants in WORLDS=1500 worlds that no run has seen before
	@TUNERY_WORLDS=$(or $(WORLDS),1500) $(VENV_PYTHON) -m pytest -q -s tests/test_policy_properties.py

check: setup  ## ruff, types, import rules, models against migrations, Dockerfiles
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@$(VENV_PYTHON) scripts/typecheck.py
	@.venv/bin/lint-imports --no-cache
	@$(VENV_PYTHON) scripts/alembic_check.py
	@.venv/bin/hadolint Dockerfile.api Dockerfile.worker
	@.venv/bin/check-jsonschema --quiet --builtin-schema vendor.compose-spec docker-compose.yml deploy/compose.isolation.yml

stand:  ## set up and use a fresh clone in four ways: as root, in a closed home, as a user, on servers by URL
	@$(or $(PYTHON_FOR_SETUP),python3) scripts/stand.py

format: setup  ## let ruff put the code in order
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

clean:  ## delete the virtualenv and caches; .tunery stays (tunery down --purge deletes that)
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist build
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
