"""How long a call takes on any device, and how several calls take turns."""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Result = TypeVar("Result")

MIN_SAMPLES = 3
MAX_CALLS = 20
SAMPLE_SECONDS = 2e-3
GRAPH_BELOW_SECONDS = 1e-3
# A first sample this short may be noise, so the estimate is taken again from several calls.
ESTIMATE_AGAIN_BELOW_SECONDS = 0.1


def timed(call: Callable[[], Result], device: str | torch.device) -> tuple[float, Result]:
    """Return the seconds that a call takes, and its result.

    The seconds include work that the call leaves on a GPU. They exclude work from before the call.
    """
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = call()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started, result


def no_call() -> None:
    """Stand in for a sampler's call before there is one, and after it was let go."""
    raise RuntimeError("there is no call to sample")


class Sampler:
    """Samples of one call's time; a short call is repeated within a sample.

    Attributes:
        samples: seconds per call, one for each turn.
        calls: how often a sample repeats the call.
        method: ``"calls"``, or ``"CUDA graph"`` where a sample replays a graph.
        estimate_seconds: a first estimate of a call's time; infinite before ``estimate``.
    """

    def __init__(self, call: Callable[[], object], device: torch.device) -> None:
        self.call = call
        self.device = device
        self.samples: list[float] = []
        self.calls = 1
        self.method = "calls"
        self.estimate_seconds = math.inf

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None

    def sample(self) -> float:
        """Return the seconds per call of one sample, without keeping it."""
        if self.device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(self.calls):
                self.call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / self.calls
        started = time.perf_counter()
        for _ in range(self.calls):
            self.call()
        return (time.perf_counter() - started) / self.calls

    def estimate(self) -> None:
        """Estimate a call's time from few samples."""
        self.estimate_seconds = self.sample()
        if self.estimate_seconds < ESTIMATE_AGAIN_BELOW_SECONDS:
            self.calls = 5
            self.estimate_seconds = min(self.sample() for _ in range(2))

    def choose_method(self, use_graph: bool) -> None:
        """Choose how many calls make a sample, and whether a CUDA graph replays them.

        A call that cannot be captured in a graph is sampled without one.
        """
        if use_graph:
            try:
                self.call = captured(self.call)
                self.method, self.calls = "CUDA graph", MAX_CALLS
                self.estimate_seconds = self.sample()
            except RuntimeError:
                torch.cuda.synchronize(self.device)
        self.calls = max(1, min(MAX_CALLS, math.ceil(SAMPLE_SECONDS / max(self.estimate_seconds, 1e-9))))

    def take_turn(self) -> float:
        """Keep one sample, and return the seconds that it took in all."""
        self.samples.append(self.sample())
        return self.samples[-1] * self.calls

    def release(self) -> None:
        """Let go of the call and what it holds; the samples stay."""
        self.call = no_call


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """Capture a call in a CUDA graph and return the graph's replay.

    Raises:
        RuntimeError: the call does what cannot be captured.
    """
    # Capture wants a warm-up on another stream.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    return graph.replay


def take_turns(turns: Sequence[Callable[[], float]], repeats: int, max_seconds: float = math.inf) -> None:
    """Let several calls be measured in turn, so that a machine that slows down slows all of them.

    Args:
        turns: each takes one sample and returns the seconds that it took.
        repeats: the turns of each.
        max_seconds: for all turns together, divided evenly. A call that has used its share takes no more
            turns after the first ``MIN_SAMPLES``.
    """
    share = max_seconds / max(1, len(turns))
    spent = [0.0] * len(turns)
    for repeat in range(repeats):
        for index, turn in enumerate(turns):
            if repeat < MIN_SAMPLES or spent[index] < share:
                spent[index] += turn()


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds, where the system has alarms.

    Args:
        seconds: the block's time.
        what: names the block in the error's message.
    """
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*unused: object) -> None:
        raise TimeoutError(f"{what} took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
