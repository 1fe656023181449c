# Needs a Python of 3.11 or later and its venv module; everything else is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SILENT:
.PHONY: help demo query up down activity produce verify stop resume break \
	test test-unit test-faults mutants check bench bench-flink soak build-flink lock clean

help: ## what there is
	echo "make TARGET, with TARGET one of"
	sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "  %-14s%s\n", $$1, $$2 }'

demo: .venv/.runtime ## run the pipeline on generated events; the results lie in out/
	$(BIN)/python -m beam_pipelines.activity --output=out

# The shell reads the query from its environment: quotes, $ and newlines arrive as typed.
override SQL := $(value SQL)
export SQL
query: .venv/.runtime ## ask the results of the last run: make query SQL="SELECT …"
	if [ -z "$$SQL" ]; then \
	  echo 'which query? e.g. make query SQL="SELECT * FROM page_view_counts LIMIT 10"' >&2; exit 2; fi
	$(BIN)/python -m beam_pipelines.query out/activity.duckdb "$$SQL"

STACK := $(BIN)/python -m stack
ON_STACK := eval "$$($(STACK) env)";

up: .venv/.runtime ## start Kafka, Postgres, Cassandra, Flink and Beam's workers on this machine
	$(STACK) up

down: .venv/.runtime ## stop them; what they hold stays
	$(STACK) down

activity: .venv/.runtime build-flink ## start the pipeline there; more flags: make activity FLAGS="…"
	$(ON_STACK) $(BIN)/python -m beam_pipelines.activity --runner=FlinkRunner \
	  --input=kafka:user_activity --database=env:ACTIVITY_DATABASE_URL \
	  --enriched=kafka:enriched_activity --dead_letters=kafka:user_activity.dlq \
	  --lake="$$LAKE" --cassandra="$$CASSANDRA" $(FLAGS)

produce: .venv/.runtime ## send events until Ctrl-C, 2 a second; make produce FLAGS="--rate=100"
	$(ON_STACK) $(BIN)/python scripts/producer.py $(FLAGS)

verify: .venv/.runtime ## check every service, and send an event through
	$(ON_STACK) $(BIN)/python scripts/verify.py $(FLAGS)

stop: .venv/.runtime ## stop the pipeline with a savepoint
	$(ON_STACK) $(BIN)/python scripts/job.py stop

resume: .venv/.runtime build-flink ## start it again from that savepoint
	$(ON_STACK) savepoint=$$($(BIN)/python scripts/job.py resume-path) && \
	  $(MAKE) activity FLAGS="--savepoint_path=$$savepoint $(FLAGS)"

break: .venv/.runtime ## kill a worker of the running pipeline, and compare the tables with the truth
	$(ON_STACK) $(BIN)/python -m scripts.break $(FLAGS)

build-flink: .venv/.runtime ## build Beam's job server for Flink
	$(STACK) build-flink

test: .venv/.dev build-flink ## run every test but the long ones; starts real servers
	$(BIN)/python -m pytest
	$(BIN)/python -m pytest --servers -m "not faults" tests/integration

test-unit: .venv/.dev ## run the tests that need nothing but Python
	$(BIN)/python -m pytest

test-faults: .venv/.dev build-flink ## run the pipeline without end on Flink, and kill every part of it in turn
	$(BIN)/python -m pytest --servers -m faults tests/integration

mutants: .venv/.dev ## plant each defect of tests/mutants, and see the test that it names fail
	$(BIN)/python -m tests.mutants

check: .venv/.dev ## lint, format check, types, import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.runtime ## measure speed and memory; prints a table and writes JSON
	$(BIN)/python -m bench

bench-flink: .venv/.runtime build-flink ## measure the pipeline on Flink, and others doing its work
	$(BIN)/python -m bench.flink

soak: .venv/.runtime build-flink ## run the pipeline for 25 minutes, and look at what grows
	$(BIN)/python -m bench.flink.soak

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
