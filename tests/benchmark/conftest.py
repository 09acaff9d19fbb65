"""The commands of ``tools/benchmark.py`` in this process, and cases and problems by their options."""

import pytest
import torch

from lf_dense.benchmark import operators
from lf_dense.benchmark.cases import build_problem
from lf_dense.errors import run_tool
from support.driving import load_tool


@pytest.fixture(scope="session")
def benchmark_tool():
    return load_tool("benchmark")


@pytest.fixture(scope="session")
def exit_code(benchmark_tool):
    """Runs a command line to its end."""

    def run(*argv):
        with pytest.raises(SystemExit) as ended:
            run_tool(lambda: benchmark_tool.main(list(argv)))
        return ended.value.code

    return run


@pytest.fixture(scope="session")
def ops_options(benchmark_tool):
    """Parses and settles options of the command ``ops`` on the CPU."""

    def parse(*argv):
        return operators.settle(benchmark_tool.parse_args(["ops", "--device", "cpu", *argv]))

    return parse


@pytest.fixture(scope="session")
def cases_of(ops_options):
    return lambda *argv: list(operators.chosen_cases(ops_options(*argv)))


@pytest.fixture(scope="session")
def problem_of(cases_of):
    def build(*argv):
        (case,) = cases_of(*argv)
        return build_problem(case, torch.float32, torch.device("cpu"))

    return build
