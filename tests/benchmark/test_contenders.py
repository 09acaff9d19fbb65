"""The contenders: what they compute, and what becomes of those that fail."""

import pytest
import torch
from torch.nn import functional as F

from lf_dense.benchmark import contenders
from lf_dense.benchmark.cases import pool_by_ratio, pool_to_grid
from lf_dense.benchmark.contest import Contender, Limits, measure
from lf_dense.benchmark.memory import peak_memory
from lf_dense.benchmark.timing import Sampler

CPU = torch.device("cpu")


def test_reduced_attention_is_softmax_attention_to_pooled_tokens():
    q, k, v = torch.randn(3, 1, 2, 6 * 9, 8).unbind()

    def reduced(pool, **how):
        return contenders.reduced_attention(q, k, v, lambda x: pool(x, (6, 9), **how))

    torch.testing.assert_close(reduced(pool_by_ratio, ratio=1), F.scaled_dot_product_attention(q, k, v))
    k3, v3 = (x.view(1, 2, 2, 3, 3, 3, 8).mean((3, 5)).flatten(2, 3) for x in (k, v))
    wanted = F.scaled_dot_product_attention(q, k3, v3)
    torch.testing.assert_close(reduced(pool_by_ratio, ratio=3), wanted)
    torch.testing.assert_close(reduced(pool_to_grid, grid=(2, 3)), wanted)


@pytest.mark.parametrize("name", contenders.OTHER_ATTENTIONS)
def test_other_attentions_see_the_keys_that_are_counted(name, problem_of, monkeypatch):
    options = ("--ops", "laplacian_attention", "--passes", "forward", "--sizes", "224x224", "--stages", "2")
    problem = problem_of(*options, "--landmarks", "49")
    attend, keys = F.scaled_dot_product_attention, []

    def counting(q, k, v):
        keys.append(k.shape[2])
        return attend(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    (out,) = contenders.bind(contenders.implementation(problem.case, name), problem, count=3)()
    assert out.shape == problem.grad.shape
    assert keys == [{"sdpa": 784, "sra": 49, "linear-sra": 49}[name]]
    assert contenders.softmax_macs(problem.case, name) == 2 * 784 * keys[0] * 128


def test_peak_memory_of_the_reference_is_two_kernel_matrices(problem_of):
    options = ("--ops", "laplacian_kernel", "--passes", "forward", "--stages", "1")
    problem = problem_of(*options, "--sizes", "224x224", "--landmarks", "196")
    call = contenders.bind(contenders.implementation(problem.case, "reference"), problem)
    matrix = 3136 * 196 * 4
    assert 2 * matrix <= peak_memory(call, CPU) < 2.5 * matrix


def test_out_of_memory_is_an_entry():
    contender = Contender("sdpa", CPU)
    contender.attempt(lambda: torch.empty(2**60, dtype=torch.uint8))
    assert contender.obstacle == "out of memory"
    assert not contender.is_wrong


def test_a_contender_that_fails_takes_no_more_turns():
    contender = Contender("reference", CPU)

    def fail():
        raise ValueError("no such thing")

    contender.sampler = Sampler(fail, CPU)
    assert contender.take_turn() == contender.take_turn() == 0
    assert (contender.obstacle, contender.is_wrong) == ("failed: no such thing", True)
    assert contender.sampler.samples == []


def test_contenders_take_turns_and_slow_ones_few(cases_of, monkeypatch):
    turns = []

    def take_turn(contender):
        turns.append(contender.name)
        return {"reference": 0.1, "sdpa": 30.0}[contender.name]

    monkeypatch.setattr(Contender, "prepare", lambda self, *unused: None)
    monkeypatch.setattr(Contender, "take_turn", take_turn)
    case, *_ = cases_of("--quick", "--ops", "laplacian_attention")
    limits = Limits(repeats=6, seconds=10, macs=1e12, compile_seconds=1)
    measure(case, ["reference", "sdpa"], torch.float32, CPU, limits)
    assert turns == ["reference", "sdpa"] * 3 + ["reference"] * 3
