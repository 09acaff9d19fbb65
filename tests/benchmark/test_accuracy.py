"""The error of results, and the yardstick that they are held against."""

import math

import pytest
import torch

from lf_dense.benchmark import accuracy, contenders

KERNEL = ("--ops", "laplacian_kernel", "--passes", "forward", "--sizes", "64x96", "--stages", "1")


def test_the_error_is_relative_to_the_largest_entry():
    wanted = [torch.tensor([1.0, -4.0]), torch.zeros(2)]
    assert accuracy.relative_error(wanted, wanted) == 0
    assert accuracy.relative_error([torch.tensor([2.0, -4.0]), torch.zeros(2)], wanted) == 0.25
    assert accuracy.relative_error([wanted[0], torch.tensor([0.0, 0.5])], wanted) == 0.5
    assert accuracy.relative_error([torch.tensor([math.nan, -4.0]), wanted[1]], wanted) == math.inf


def test_the_yardstick_is_float64_where_that_fits(problem_of, monkeypatch):
    problem = problem_of(*KERNEL, "--landmarks", "49")
    exact = accuracy.build_yardstick(problem)
    assert (exact.dtype, exact.results[0].dtype) == ("float64", torch.float64)
    found = contenders.bind(contenders.implementation(problem.case, "reference"), problem)()
    assert accuracy.relative_error(found, exact.results) < exact.tolerance < 1e-4
    monkeypatch.setattr(accuracy, "MAX_FLOAT64_BYTES", 0)
    coarse = accuracy.build_yardstick(problem)
    assert (coarse.dtype, coarse.results[0].dtype) == ("float32", torch.float32)
    assert coarse.tolerance == pytest.approx(1e-3, rel=1e-3)


def test_without_memory_for_the_reference_there_is_no_yardstick(problem_of, monkeypatch):
    def fail(*unused):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(contenders, "bind", fail)
    assert accuracy.build_yardstick(problem_of(*KERNEL, "--landmarks", "49")) is None
