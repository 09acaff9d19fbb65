"""Checking many things in worker processes, within limits of time and memory.

A process that dies or runs out of time is replaced, so only its own config fails.
"""

from __future__ import annotations

import contextlib
import gc
import io
import logging
import multiprocessing
import os
import resource
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection

import torch

from ..errors import UsageError
from .rows import FAILED, ConfigName, Finding, Row, first_line

# Memory that models leave behind grows with every config.
CONFIGS_PER_PROCESS = 200
# Seconds in which a new process has to be ready.
STARTUP_LIMIT = 300

# Checks one config: package, and path below its configs.
Check = Callable[[str, str], Finding]


def check_one(check: Check, package: str, config: str) -> Row:
    """The row of one config; an exception becomes a failure, and what it prints is dropped."""
    started = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            finding = check(package, config)
    except Exception as error:
        finding = Finding(FAILED, first_line(error))
    gc.collect()
    seconds = round(time.monotonic() - started, 1)
    return Row(package, config, finding.model, finding.outcome, finding.detail, seconds)


class _Worker:
    """A process that checks one config at a time, and is replaced where it has to be."""

    def __init__(self, make_check: Callable[[], Check], timeout: float, memory_gib: float) -> None:
        self._arguments = (make_check, memory_gib)
        self._timeout = timeout
        self.start()

    def start(self) -> None:
        """Start a new process; it reports when it is ready."""
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._name: ConfigName | None = None
        self._broken = False
        self._served = 0
        self._begin(STARTUP_LIMIT)

    def _begin(self, limit: float) -> None:
        self._started = time.monotonic()
        self.deadline = self._started + limit

    @property
    def has_news(self) -> bool:
        return self.connection.poll() or time.monotonic() >= self.deadline

    @property
    def is_spent(self) -> bool:
        return self._broken or self._served >= CONFIGS_PER_PROCESS

    def collect(self) -> Row | None:
        """The row of the config that the process was given; None where it only reports that it is ready.

        Raises:
            UsageError: the process ends before it is ready.
        """
        if not self.connection.poll():
            return self._failure(f"it took longer than the time limit of {self._timeout:g} s")
        try:
            row: Row | None = self.connection.recv()
        except (EOFError, OSError):
            return self._failure("its process died (out of memory, or a crash)")
        self._name = None
        return row

    def _failure(self, reason: str) -> Row:
        self._broken = True
        if self._name is None:
            raise UsageError("a process of the survey does not start: more --memory-gib may help.")
        seconds = round(time.monotonic() - self._started, 1)
        return Row(*self._name, "", FAILED, reason, seconds)

    def give(self, name: ConfigName) -> None:
        """Let the process check a config."""
        self._name = name
        self._served += 1
        self._begin(self._timeout)
        # A process that died while it was idle shows at the next look.
        with contextlib.suppress(OSError):
            self.connection.send(name)

    def stop(self) -> None:
        """End the process; nothing in it is worth keeping."""
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(pipe: connection.Connection, make_check: Callable[[], Check], memory_gib: float) -> None:
    """What runs in a worker's process."""
    # Ctrl-C reaches the whole group; the parent ends its processes itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    check = make_check()
    pipe.send(None)
    while True:
        pipe.send(check_one(check, *pipe.recv()))


def check_in_processes(
    names: Iterable[ConfigName],
    make_check: Callable[[], Check],
    workers: int,
    timeout: float,
    memory_gib: float,
) -> Iterator[Row]:
    """Check configs in several processes; rows come as they are ready.

    Args:
        names: the configs.
        make_check: called once in each process; what it returns checks one config. It has to be picklable.
        workers: number of processes, one at least, of one thread each.
        timeout: seconds for one config.
        memory_gib: address space of each process.

    Raises:
        UsageError: a process does not start.
    """
    waiting = deque(names)
    crew = [_Worker(make_check, timeout, memory_gib) for _ in range(min(max(workers, 1), len(waiting)))]
    try:
        while crew:
            worker = _next_with_news(crew)
            row = worker.collect()
            if row is not None:
                yield row
            if not waiting:
                crew.remove(worker)
                worker.stop()
            elif worker.is_spent:
                worker.stop()
                worker.start()
            else:
                worker.give(waiting.popleft())
    finally:
        for worker in crew:
            worker.stop()


def _next_with_news(crew: list[_Worker]) -> _Worker:
    """Wait for the first worker that has a row, is ready, died, or ran out of time."""
    while True:
        for worker in crew:
            if worker.has_news:
                return worker
        soonest = min(worker.deadline for worker in crew)
        connection.wait([worker.connection for worker in crew], max(0.0, soonest - time.monotonic()))
