# The targets do their own set-up: a .venv in this checkout, made once and completed where it was interrupted.
# gpu-check alone takes $(PYTHON) and what it has.
PYTHON ?= python3
VENV ?= .venv
UPSTREAM := .venv-upstream
RUN := $(VENV)/bin/python

.PHONY: help setup setup-upstream demo test test-upstream lint coverage site wheel sanitize gpu-check

help:
	@echo "make setup      the pinned environment in $(VENV) (2 to 5 minutes on 2 cores: it compiles mmcv)"
	@echo "make demo       train a small detector on made-up shapes, and draw (at most 10 minutes on 2 cores)"
	@echo "make test       the tests"
	@echo "make test-upstream  a short form of the tests on OpenMMLab's last releases, in $(UPSTREAM)"
	@echo "make lint       ruff, mypy and clang-format"
	@echo "make coverage   the tests, and which lines of lf_dense they ran: htmlcov/index.html"
	@echo "make site       the documentation as web pages, notebooks executed: build/site/index.html"
	@echo "make wheel      a wheel with the operators compiled, in dist/"
	@echo "make sanitize   the operators' tests, compiled with AddressSanitizer and UBSan (about 10 minutes)"
	@echo "make gpu-check  build, test, check and measure the operators on this machine's GPU (10 minutes; needs"
	@echo "                nvcc, torch and pytest in \$$(PYTHON); results in work_dirs/gpu_check, or OUT=...)"

setup:
	@$(PYTHON) tools/setup_env.py --venv $(VENV)

demo: setup
	@$(RUN) tools/demo.py

# Two files at a time, each on one thread: most of the time is processes that start. They come in the order of
# tests/support/order.py.
test: setup
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

setup-upstream:
	@$(PYTHON) tools/setup_env.py --venv $(UPSTREAM) --stack upstream

# What depends on the mm packages; the whole suite is $(UPSTREAM)/bin/python -m pytest.
test-upstream: setup-upstream
	@$(UPSTREAM)/bin/python -m pytest tests/test_frameworks.py tests/test_laplacianformer.py tests/weights \
	    tests/training/test_labels.py tests/training/test_layer_decay.py tests/training/test_distillation.py \
	    tests/training/test_end_to_end.py tests/training/test_explaining.py tests/swap/test_swap.py

lint: setup
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(VENV)/bin/clang-format --dry-run --Werror \
	    $$(git ls-files 'ops/*' 'tests/*.h' 'tests/*.cpp' 'examples/*.cpp')

# Tools run in processes of their own: pytest-cov's hook measures those as well.
coverage: setup
	@$(RUN) -m pytest --cov --cov-report=term --cov-report=html

# Pages that did not change are kept, with what their notebooks printed. One thread serves small models best.
site: setup
	@OMP_NUM_THREADS=1 $(RUN) -m sphinx -q -T -W --keep-going docs build/site
	@echo "wrote build/site/index.html"

# What an earlier build left in build/ must not end up in the wheel.
wheel: setup
	@rm -rf build/lib* build/bdist.*
	@$(RUN) -m pip wheel . --no-deps --no-build-isolation -w dist

sanitize: setup
	@$(RUN) tools/sanitize.py

gpu-check:
	@$(PYTHON) tools/gpu_check.py $(if $(OUT),--out $(OUT)) $(if $(AGAINST),--against $(AGAINST))
