# Every target works from a fresh clone with CPython 3.11 or later, pip, gcc and make.
# `make run` and `make test` are all one needs; the rest is for those who change Cenote.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: run demo test check format bench bench-proxy chaos docs wheel test-compiled clean help

help:            ## this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:[^#]*##/\t/' | expand -t 18

# Pure Python in place, so that what runs is what is read; `make test-compiled` tests the wheel.
$(READY): pyproject.toml setup.py
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	CENOTE_COMPILE=off $(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

run: $(READY)    ## the daemon before a private PostgreSQL, until Ctrl-C
	$(BIN)/cenote serve

demo: $(READY)   ## connection per request against a pool, side by side
	$(BIN)/cenote demo

test: $(READY)   ## all tests, on plain Python
	$(BIN)/python -m pytest --build=pure

check: $(READY)  ## format, lint, types, architecture
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/architecture

format: $(READY) ## let ruff format and mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The compiled pass tests what a user installs: a wheel, in an environment of its own, away from src/.
test-compiled: $(READY) ## all tests, on the compiled wheel
	@rm -rf build/wheel && mkdir -p build/wheel
	CENOTE_COMPILE=require $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	@test -d $(VENV)-compiled || $(PYTHON) -m venv $(VENV)-compiled
	@$(VENV)-compiled/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-compiled/bin/python -m pip install --quiet "$$(ls build/wheel/cenote-*.whl)[dev]"
	$(VENV)-compiled/bin/python -m pip install --quiet --no-deps --force-reinstall build/wheel/cenote-*.whl
	$(VENV)-compiled/bin/python -m pytest --build=compiled

wheel: $(READY)  ## a compiled wheel in dist/
	CENOTE_COMPILE=require $(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

bench: $(READY)  ## against psycopg_pool, SQLAlchemy, asyncpg and psycopg2, in one run
	@test -d $(VENV)-bench || $(PYTHON) -m venv $(VENV)-bench
	CENOTE_COMPILE=require $(VENV)-bench/bin/python -m pip install --quiet '.[all,bench]'
	$(VENV)-bench/bin/python -m benchmarks

bench-proxy: $(READY) ## the proxy against PgBouncer (PGBOUNCER=path, else the installed one), in one run
	@test -d $(VENV)-bench || $(PYTHON) -m venv $(VENV)-bench
	CENOTE_COMPILE=require $(VENV)-bench/bin/python -m pip install --quiet '.[all,bench]'
	$(VENV)-bench/bin/python -m benchmarks.proxy

chaos: $(READY)  ## kill things for ten minutes
	$(BIN)/python -m pytest --build=pure -m chaos --chaos-seconds=600 tests/chaos

clean:           ## remove what make made
	rm -rf $(VENV) $(VENV)-compiled $(VENV)-bench build dist
