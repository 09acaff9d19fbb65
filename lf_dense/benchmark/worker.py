"""A process that holds one candidate: its passes are timed there, and its memory is its own."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import resource
import signal
import statistics
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..allocator import give_back, keep_memory
from ..backends import native
from ..errors import one_line
from ..memory import MemoryMeter, is_out_of_memory
from . import candidates
from .candidates import Settings

START_SECONDS = 600
# A turn is one pass, or as many as fit into so long; their median counts.
TURN_SECONDS, MAX_PASSES = 0.5, 20


class Failure(Exception):
    """Why a candidate has no figure, as a table says it."""


class Sample(NamedTuple):
    """A turn's pass: seconds, seconds of all threads in the kernel, and page faults that needed no disk."""

    seconds: float
    system_seconds: float
    faults: float


class First(NamedTuple):
    """What the first pass at a size tells; ``macs`` is None where it is not counted."""

    peak_bytes: int
    macs: int | None


class Worker:
    """A process with one candidate.

    Raises:
        Failure: from each call, when the pass fails, takes too long, or the process dies; it is gone then.
    """

    def __init__(self, name: str, settings: Settings, device: str, threads: int, limit_gib: float) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, name, settings, device, threads, limit_gib)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self.params: int = self._receive(START_SECONDS)

    def first(self, batch: int, size: tuple[int, int], limit: float) -> First:
        """Make one pass at a size, which is not timed, and say what it needs."""
        return self._ask(("first", batch, size), limit)

    def turn(self, limit: float) -> Sample:
        """Time a turn's passes at the size of the last ``first``."""
        return self._ask(("turn",), limit)

    def rest(self) -> None:
        """Give memory back until the next turn, which then begins with a pass that does not count."""
        self._ask(("rest",), START_SECONDS)

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def _ask(self, what: tuple[Any, ...], limit: float) -> Any:
        with contextlib.suppress(OSError):
            self._connection.send(what)
        return self._receive(limit)

    def _receive(self, limit: float) -> Any:
        if not self._connection.poll(limit):
            self.stop()
            raise Failure(f"over {limit:g} s")
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            self.stop()
            raise Failure("out of memory (the system ended its process)") from None
        if isinstance(answer, str):
            self.stop()
            raise Failure(answer)
        return answer


def serve(
    connection: Connection, name: str, settings: Settings, device: str, threads: int, limit_gib: float
) -> None:
    """The process's side: build, then answer until it is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    warnings.simplefilter("ignore")
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            _Server(connection, name, settings, torch.device(device), threads, limit_gib).run()
        except EOFError:
            return  # the parent is gone
        except Exception as error:
            failure = f"failed: {type(error).__name__}: {one_line(error)}"[:200]
            with contextlib.suppress(OSError):
                connection.send("out of memory" if is_out_of_memory(error) else failure)


class _Server:
    def __init__(
        self,
        connection: Connection,
        name: str,
        settings: Settings,
        device: torch.device,
        threads: int,
        limit_gib: float,
    ) -> None:
        if settings.memory == "kept":
            keep_memory()
        torch.set_num_threads(threads)
        if device.type == "cpu":
            limit = int(limit_gib * 2**30)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        native.library_obstacle(device.type)  # loads the operators, and with them how torch counts their work
        # The counter loads torch's compiler, which is not the memory of the pass that it counts.
        importlib.import_module("torch._dynamo")
        self.connection, self.device, self.settings = connection, device, settings
        self.meter = MemoryMeter(device)
        self.model, self.make = candidates.build(name, settings, device)
        self.call: Any = None
        self.rested = False
        self.loaded = self.meter.current()

    def run(self) -> None:
        self.connection.send(sum(weight.numel() for weight in self.model.parameters()))
        while True:
            what, *arguments = self.connection.recv()
            self.connection.send(getattr(self, what)(*arguments))

    def first(self, batch: int, size: tuple[int, int]) -> First:
        self.call = None
        give_back()
        self.call = self.make(batch, size)
        self.meter.reset()
        counts = self.settings.direction == "forward" and not self.settings.compiled
        counter = FlopCounterMode(display=False)
        with counter if counts else contextlib.nullcontext():
            self.call()
        self.synchronize()
        # Torch counts a multiply-add as two.
        macs = counter.get_total_flops() // 2 if counts else None
        return First(self.meter.peak() - self.loaded, macs)

    def turn(self) -> Sample:
        if self.rested:
            self.call()
            self.rested = False
        # Others had the caches and the cores since the last turn: the first of several passes does not count.
        samples, started = [self.sample()], time.perf_counter()
        while time.perf_counter() - started < TURN_SECONDS and len(samples) < MAX_PASSES:
            samples.append(self.sample())
        counted = samples[1:] if len(samples) > 2 else samples
        return Sample(*(statistics.median(column) for column in zip(*counted)))

    def sample(self) -> Sample:
        self.synchronize()
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        self.call()
        self.synchronize()
        seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF)
        return Sample(seconds, after.ru_stime - before.ru_stime, after.ru_minflt - before.ru_minflt)

    def rest(self) -> None:
        give_back()
        self.rested = True

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
