# `make demo` and `make test` do their own set-up: a .venv in this checkout, made once and completed where it was interrupted.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: help setup demo test lint

help:
	@echo "make setup   the pinned environment in $(VENV) (about 8 minutes on 2 cores: it compiles mmcv's operators)"
	@echo "make demo    train a small detector on made-up shapes, with pictures at the end (at most 10 minutes on 2 cores)"
	@echo "make test    the tests"
	@echo "make lint    ruff"

setup:
	@$(PYTHON) tools/setup_env.py --venv $(VENV)

demo: setup
	@$(RUN) tools/demo.py

test: setup
	@$(RUN) -m pytest

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
