"""The clock: what counts as a call's time, how samples are taken, who takes a turn, when time is up."""

import time

import pytest
import torch

from lf_dense.benchmark import timing
from lf_dense.benchmark.timing import Sampler, take_turns, time_limit, timed

CPU = torch.device("cpu")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
def test_timed_returns_the_seconds_and_the_result(device):
    seconds, result = timed(lambda: time.sleep(0.02) or "done", device)
    assert result == "done"
    assert 0.02 <= seconds < 2
    assert timed(lambda: None, torch.device(device))[0] < 0.02


def test_timed_waits_for_the_gpu_before_and_after(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append(device))
    monkeypatch.setattr(time, "perf_counter", lambda: said.append("clock") or 0.0)
    timed(lambda: said.append("call"), "cuda:1")
    assert said == ["cuda:1", "clock", "call", "cuda:1", "clock"]


@pytest.mark.parametrize("device", DEVICES)
def test_a_sample_is_the_time_of_one_call(device):
    sampler = Sampler(lambda: time.sleep(0.01), torch.device(device))
    sampler.calls = 3
    assert 0.01 <= sampler.sample() < 1
    assert sampler.samples == []
    assert sampler.median is None
    assert sampler.take_turn() == pytest.approx(3 * sampler.samples[0])
    assert sampler.median == sampler.samples[0] >= 0.01


def test_short_calls_are_sampled_several_at_a_time():
    sampler = Sampler(lambda: None, CPU)
    sampler.estimate()
    assert sampler.estimate_seconds < 1e-3
    sampler.choose_method(use_graph=False)
    assert (sampler.calls, sampler.method) == (timing.MAX_CALLS, "calls")
    sampler.estimate_seconds = 10.0
    sampler.choose_method(use_graph=False)
    assert sampler.calls == 1


def test_a_long_call_is_estimated_once(monkeypatch):
    calls = []
    sampler = Sampler(lambda: calls.append(0), CPU)
    monkeypatch.setattr(timing, "ESTIMATE_AGAIN_BELOW_SECONDS", 0.0)
    sampler.estimate()
    assert len(calls) == sampler.calls == 1


def test_what_cannot_be_captured_is_sampled_by_calls(monkeypatch):
    def fail(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(timing, "captured", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    sampler = Sampler(lambda: None, CPU)
    sampler.choose_method(use_graph=True)
    assert (sampler.calls, sampler.method) == (1, "calls")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graph_is_sampled_by_its_replay():
    x = torch.zeros(4, device="cuda")
    sampler = Sampler(lambda: x.add_(1), x.device)
    sampler.choose_method(use_graph=True)
    before = x[0].item()
    sampler.take_turn()
    assert sampler.method == "CUDA graph"
    assert x[0].item() == before + sampler.calls


def test_a_released_call_is_let_go_and_its_samples_stay():
    sampler = Sampler(lambda: None, CPU)
    sampler.take_turn()
    sampler.release()
    assert len(sampler.samples) == 1
    with pytest.raises(RuntimeError, match="no call to sample"):
        sampler.sample()


def test_turns_go_round_until_the_share_is_spent():
    took = []
    turns = [lambda: took.append("quick") or 1.0, lambda: took.append("slow") or 6.0]
    take_turns(turns, repeats=2)
    assert took == ["quick", "slow"] * 2
    took.clear()
    # Ten seconds each: the slow one has used its share after two turns, and three are granted.
    take_turns(turns, repeats=5, max_seconds=20)
    assert took == ["quick", "slow"] * 3 + ["quick"] * 2
    take_turns([], repeats=5)


def test_compilation_has_a_time_limit():
    sentence = r"^compilation took longer than 0\.05 s$"
    with pytest.raises(TimeoutError, match=sentence), time_limit(0.05, "compilation"):
        time.sleep(5)
    with time_limit(0.05, "compilation"):
        pass
    time.sleep(0.1)
