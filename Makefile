# Needs a Python of 3.11 or later and its venv module; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SILENT:
.PHONY: help demo query test test-unit check bench lock clean

help: ## what there is
	echo "make TARGET, with TARGET one of"
	sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "  %-12s%s\n", $$1, $$2 }'

demo: .venv/.runtime ## run the pipeline on generated events; the results lie in out/
	$(BIN)/python -m beam_pipelines.activity --output=out

# The shell reads the query from its environment: quotes, $ and newlines arrive as typed.
override SQL := $(value SQL)
export SQL
query: .venv/.runtime ## ask the results of the last run: make query SQL="SELECT …"
	if [ -z "$$SQL" ]; then \
	  echo 'which query? e.g. make query SQL="SELECT * FROM page_view_counts LIMIT 10"' >&2; exit 2; fi
	$(BIN)/python -m beam_pipelines.query out/activity.duckdb "$$SQL"

test: .venv/.dev ## run every test
	$(BIN)/python -m pytest

test-unit: .venv/.dev ## run the tests that need nothing but Python
	$(BIN)/python -m pytest --ignore=tests/integration

check: .venv/.dev ## lint, format check, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.runtime ## measure speed and memory; prints a table and writes JSON
	$(BIN)/python -m bench

LOCK := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 \
	--generate-hashes --custom-compile-command "make lock"
EXTRAS := --extra cassandra --extra kafka --extra postgres
lock: .venv/.dev ## renew the locked dependencies
	echo "locking …"
	$(LOCK) setup.py requirements.in $(EXTRAS) --output-file requirements.txt
	$(LOCK) setup.py requirements.in $(EXTRAS) --extra dev --constraint requirements.txt \
	  --output-file requirements-dev.txt

clean: ## remove .venv, builds and caches; results stay
	rm -rf .venv build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); 3.11 or later is needed: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module; on Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	echo "making .venv …"
	$(PYTHON) -m venv .venv

.venv/.runtime: requirements.txt setup.py | .venv/bin/python
	echo "installing what the pipelines need …"
	$(INSTALL) --require-hashes --requirement requirements.txt
	$(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

.venv/.dev: requirements-dev.txt .venv/.runtime
	echo "installing what tests and checks need …"
	$(INSTALL) --require-hashes --requirement requirements-dev.txt
	touch $@
