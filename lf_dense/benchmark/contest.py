"""One case, its contenders in turn: whether each runs, whether it is right, what it takes."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..memory import is_out_of_memory
from . import contenders
from .accuracy import Yardstick, build_yardstick, relative_error
from .cases import Case, Problem, build_problem
from .memory import peak_memory
from .timing import GRAPH_BELOW_SECONDS, Sampler, no_call, take_turns, time_limit


class Limits(NamedTuple):
    """What a case may take.

    Attributes:
        repeats: turns of each contender.
        seconds: for the turns of all contenders together.
        macs: multiply-adds above which a softmax attention is skipped.
        compile_seconds: for compiling.
    """

    repeats: int
    seconds: float
    macs: float
    compile_seconds: float


class WrongResult(Exception):
    """A contender's results are further from the reference than rounding explains."""


class Contender:
    """One contender of one case.

    Attributes:
        obstacle: why there is no time, as the table says it; None where there is one.
        is_wrong: the obstacle ends the run with an error.
        error: the largest error, relative to the reference; None where the two are not compared.
        compile_seconds: what compiling took; None where nothing was compiled.
        peak_bytes: memory beyond the inputs; None where it was not counted.
        sampler: takes the time.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device
        self.obstacle: str | None = None
        self.is_wrong = False
        self.error: float | None = None
        self.compile_seconds: float | None = None
        self.peak_bytes: int | None = None
        self.sampler = Sampler(no_call, device)

    def attempt(self, step: Callable[[], None]) -> None:
        """Run a step; what goes wrong in it becomes the obstacle."""
        if self.obstacle is not None:
            return
        try:
            step()
        except WrongResult as error:
            self.obstacle, self.is_wrong = f"wrong: {error}", True
        # Whatever a compiler or an operator raises belongs in the table.
        except Exception as error:
            self.obstacle = describe_failure(error)
            self.is_wrong = self.name in ("native", "reference") and not is_out_of_memory(error)
        if self.obstacle is not None:
            self.sampler.release()

    def prepare(self, problem: Problem, yardstick: Yardstick | None, limits: Limits) -> None:
        """Build the call, compare its results, count its memory, and estimate its time."""
        if self.name in contenders.OTHER_ATTENTIONS:
            macs = contenders.softmax_macs(problem.case, self.name)
            if macs > limits.macs:
                self.obstacle = f"skipped: {macs:.1e} multiply-adds, above --max-macs {limits.macs:.0e}"
                return
        call = self._build_call(problem)
        started = time.perf_counter()
        is_compiled = self.name == "compile"
        with time_limit(limits.compile_seconds, "compilation") if is_compiled else contextlib.nullcontext():
            results = call()
        if is_compiled:
            self.compile_seconds = time.perf_counter() - started
        if yardstick is not None and self.name in contenders.SAME_FUNCTION:
            self.error = relative_error(results, yardstick.results)
            if self.error > yardstick.tolerance:
                raise WrongResult(f"error {self.error:.1e}, and {yardstick.tolerance:.1e} is allowed")
        del results
        self.peak_bytes = peak_memory(call, self.device)
        self.sampler = Sampler(call, self.device)
        self.sampler.estimate()

    def _build_call(self, problem: Problem) -> Callable[[], list[Tensor]]:
        if self.name == contenders.FLOOR:
            return contenders.bind_floor(problem)
        function = contenders.implementation(problem.case, self.name)
        if self.name in contenders.OTHER_ATTENTIONS:
            return contenders.bind(function, problem, count=3)
        if self.name == "compile":
            # Without a fresh start the compiler would fall back to eager mode after some shapes, unsaid.
            torch.compiler.reset()
            function = torch.compile(function, dynamic=False)
        return contenders.bind(function, problem)

    def take_turn(self) -> float:
        """Take one sample, and return the seconds that it took."""
        seconds = 0.0

        def step() -> None:
            nonlocal seconds
            seconds = self.sampler.take_turn()

        self.attempt(step)
        return seconds


def describe_failure(error: Exception) -> str:
    """Say in one cell of a table why a call failed."""
    if is_out_of_memory(error):
        return "out of memory"
    # A compiler's message starts with which backend raised, and ends with advice on verbosity.
    text = str(error).split("Set TORCHDYNAMO_VERBOSE")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = " ".join(lines[:2]) or type(error).__name__
    return f"failed: {reason[:160].replace('|', '/')}"


def measure(
    case: Case, names: Sequence[str], dtype: torch.dtype, device: torch.device, limits: Limits
) -> tuple[dict[str, Contender], Yardstick | None]:
    """Prepare a case's contenders and let them take turns; returns them and what they were compared with."""
    taking_part = {name: Contender(name, device) for name in names}
    try:
        problem = build_problem(case, dtype, device)
    except torch.OutOfMemoryError:
        for contender in taking_part.values():
            contender.obstacle = "out of memory"
        return taking_part, None
    yardstick = build_yardstick(problem)
    for contender in taking_part.values():
        contender.attempt(functools.partial(contender.prepare, problem, yardstick, limits))
    running = [contender for contender in taking_part.values() if contender.obstacle is None]
    fastest = min((contender.sampler.estimate_seconds for contender in running), default=math.inf)
    use_graph = device.type == "cuda" and fastest < GRAPH_BELOW_SECONDS
    for contender in running:
        contender.attempt(functools.partial(contender.sampler.choose_method, use_graph))
    take_turns([contender.take_turn for contender in running], limits.repeats, limits.seconds)
    for contender in taking_part.values():
        contender.sampler.release()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return taking_part, yardstick
