# `make demo` and `make test` set up everything they need in .venv; the second time that takes no time.
# ARGS goes to the command: make test ARGS="tests/law -q"

SHELL := /bin/sh
BIN := .venv/bin
ARGS ?=

# The first Python 3.11 or newer that runs; override with PYTHON=…
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$python; break; fi; done)

.PHONY: help setup demo test test-slow lint format docs wheel lock clean

help:
	@echo "make demo    the whole job on the embedded base model, served by vLLM"
	@echo "make test    all tests, real vLLM included"
	@echo "make test-slow  what takes many minutes: hundreds of killed updates; images and manifests, built and run (as root)"
	@echo "make lint    ruff and mypy"
	@echo "make format  ruff's formatter and safe fixes"
	@echo "make docs    write docs/cli.md and docs/ledger.md from the code"
	@echo "make wheel   a wheel and an sdist in dist/"
	@echo "make lock    write requirements/cpu.txt anew"
	@echo "make clean   remove .venv, caches and dist/"

setup:
	@if [ -z "$(PYTHON)" ]; then echo "setup: error: no Python 3.11 or newer found; install one or run make PYTHON=/path/to/python3" >&2; exit 1; fi
	@$(PYTHON) tools/setup_env.py

demo: setup
	@$(BIN)/memupdate demo $(ARGS)

test: setup
	$(BIN)/python -m pytest $(ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m endurance -s $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/python tools/cli_docs.py
	$(BIN)/python tools/ledger_docs.py

wheel: setup
	$(BIN)/python -m build --no-isolation $(ARGS)

lock:
	$(PYTHON) tools/lock_cpu.py

clean:
	rm -rf .venv dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
