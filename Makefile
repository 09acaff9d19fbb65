# The targets do their own set-up: a .venv in this checkout, made once and completed where it was interrupted. gpu-check alone takes
# $(PYTHON) and what it has.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python

.PHONY: help setup demo test lint wheel sanitize gpu-check

help:
	@echo "make setup      the pinned environment in $(VENV) (about 8 minutes on 2 cores: it compiles mmcv's operators)"
	@echo "make demo       train a small detector on made-up shapes, with pictures at the end (at most 10 minutes on 2 cores)"
	@echo "make test       the tests"
	@echo "make lint       ruff"
	@echo "make wheel      a wheel with the operators compiled, in dist/"
	@echo "make sanitize   the operator tests on operators compiled with AddressSanitizer and UBSan (about 10 minutes)"
	@echo "make gpu-check  build, test, check and measure the operators on this machine's GPU (at most 10 minutes; needs nvcc, and torch"
	@echo "                and pytest in \$$(PYTHON); results in work_dirs/gpu_check, or the folder OUT=...)"

setup:
	@$(PYTHON) tools/setup_env.py --venv $(VENV)

demo: setup
	@$(RUN) tools/demo.py

test: setup
	@$(RUN) -m pytest

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

# What an earlier build left in build/ must not end up in the wheel.
wheel: setup
	@rm -rf build/lib* build/bdist.*
	@$(RUN) -m pip wheel . --no-deps --no-build-isolation -w dist

sanitize: setup
	@$(RUN) tools/sanitize.py

gpu-check:
	@$(PYTHON) tools/gpu_check.py $(if $(OUT),--out $(OUT))
