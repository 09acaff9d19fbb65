"""The benchmark's order: what is measured when, what is left out, and what was measured before."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from ..files import append_json_line, read_json_lines, write_atomically, write_json_lines
from ..memory import available_gib
from .candidates import Settings, label_of
from .report import Record
from .worker import Failure, First, Sample, Worker

# A round starts only with memory for every candidate at once; else each gives back its own between turns.
MEMORY_SHARE = 0.7
# A candidate that took so long at the last size is expected to take this power of the pixels' ratio more.
GROWTH = 1.3


class Group(NamedTuple):
    """Rows whose candidates take turns: everything but the candidate is one."""

    size: tuple[int, int]
    batch: int
    settings: Settings

    @property
    def pixels(self) -> int:
        return self.batch * math.prod(self.size)

    @property
    def columns(self) -> Record:
        size = "x".join(map(str, self.size))
        return {"size": size, "batch": self.batch, **self.settings._asdict()}

    def __str__(self) -> str:
        compiled = " compiled" if self.settings.compiled else ""
        shape = " x ".join(map(str, (self.batch, *self.size)))
        how = self.settings
        return f"{shape}, {how.direction}, {how.dtype}{compiled}, memory {how.memory}"


class Limits(NamedTuple):
    """What a run may take.

    Attributes:
        rounds: turns of each candidate of a group.
        pass_seconds: of one pass; above it the candidate is out, at larger sizes as well.
        budget_seconds: of the run; what would go beyond is left out, and its row says so.
        memory_gib: of each candidate's process on a CPU.
        threads: of each candidate's process.
    """

    rounds: int
    pass_seconds: float
    budget_seconds: float
    memory_gib: float
    threads: int


def key_of(row: Record) -> str:
    """What identifies a row in a file of results."""
    columns = ("candidate", "size", "batch", "direction", "dtype", "compiled", "memory")
    return json.dumps([row[column] for column in columns])


def read_rows(path: Path) -> dict[str, Record]:
    """The rows of a file of JSON lines, by ``key_of``; none where there is no file yet."""
    return {key_of(row): row for row in read_json_lines(path)} if path.exists() else {}


def read_turns(path: Path) -> dict[str, list[Sample]]:
    """The turns of a file of JSON lines, by ``key_of`` their row to be; none where there is no file yet."""
    turns: dict[str, list[Sample]] = {}
    for line in read_json_lines(path) if path.exists() else []:
        turns.setdefault(line["row"], []).append(Sample(**line["turn"]))
    return turns


class Run:
    """One run of the benchmark; ``rows`` are those of the file, and grow with it.

    A file beside it keeps the turns of the groups whose rows are not there yet.
    """

    def __init__(self, path: Path, device: str, limits: Limits, say: Callable[[str], None]) -> None:
        self.path, self.device, self.limits, self.say = path, device, limits, say
        self.rows = read_rows(path)
        self.turns_path = path.with_suffix(".turns.jsonl")
        found = read_turns(self.turns_path)
        self.turns = {key: turns for key, turns in found.items() if key not in self.rows}
        # What an interruption cut off goes: lines are appended.
        write_json_lines(path, self.rows.values())
        lines = ((key, turn) for key, turns in self.turns.items() for turn in turns)
        write_json_lines(self.turns_path, ({"row": key, "turn": turn._asdict()} for key, turn in lines))
        self.started = time.monotonic()
        self.paces: dict[tuple[str, Settings], tuple[int, float]] = {}
        self.out: dict[tuple[str, Settings], str] = {}

    def measure(self, names: Sequence[str], groups: Sequence[Group]) -> None:
        """Measure every candidate in every group; what fails at one size is not tried at larger ones."""
        for _, same in itertools.groupby(groups, key=lambda group: group.settings):
            workers: dict[str, Worker] = {}
            try:
                for group in sorted(same, key=lambda group: group.pixels):
                    wanted = [name for name in names if key_of(self.head(name, group)) not in self.rows]
                    self.measure_group(group, wanted, workers)
            finally:
                for worker in workers.values():
                    worker.stop()

    def head(self, name: str, group: Group) -> Record:
        return {"candidate": name, "label": label_of(name), **group.columns}

    def record(self, name: str, group: Group, **found: object) -> None:
        row = {**self.head(name, group), **found}
        self.rows[key_of(row)] = row
        append_json_line(self.path, row)

    def fail(self, name: str, group: Group, why: str, *, lasting: bool = True) -> None:
        self.record(name, group, outcome=why)
        if lasting:
            self.out[name, group.settings] = f"{why} at {group.columns['size']}"

    def measure_group(self, group: Group, names: Sequence[str], workers: dict[str, Worker]) -> None:
        """One group: a first pass of each candidate alone, and then turns in rounds."""
        firsts: dict[str, First] = {}
        for name in self.affordable(group, names):
            self.say(f"{group}: {label_of(name)}")
            try:
                if name not in workers:
                    limits = self.limits
                    workers[name] = Worker(
                        name, group.settings, self.device, limits.threads, limits.memory_gib
                    )
                firsts[name] = workers[name].first(group.batch, group.size, self.limits.pass_seconds)
                workers[name].rest()
            except Failure as failure:
                workers.pop(name, None)
                self.fail(name, group, str(failure))
        samples = self.take_turns(group, firsts, workers)
        for name, taken in samples.items():
            self.paces[name, group.settings] = (group.pixels, statistics.median(s.seconds for s in taken))
            self.record(name, group, **summary(taken, firsts[name], workers[name].params, group.batch))

    def affordable(self, group: Group, names: Sequence[str]) -> Iterator[str]:
        """Those that are tried; the others get a row that says why not."""
        for name in names:
            out = self.out.get((name, group.settings))
            if out:
                self.fail(name, group, f"left out: {out}", lasting=False)
                continue
            pixels, seconds = self.paces.get((name, group.settings), (group.pixels, 0.0))
            expected = seconds * (group.pixels / pixels) ** GROWTH * (self.limits.rounds + 2)
            if time.monotonic() - self.started + expected > self.limits.budget_seconds:
                self.fail(name, group, f"left out: the budget (it would take about {expected:.0f} s)")
                continue
            yield name

    def take_turns(
        self, group: Group, firsts: dict[str, First], workers: dict[str, Worker]
    ) -> dict[str, list[Sample]]:
        """The samples of each candidate, in rounds; those from before an interruption count."""
        keys = {name: key_of(self.head(name, group)) for name in firsts}
        taken = {name: self.turns.get(key, [])[: self.limits.rounds] for name, key in keys.items()}
        needed = sum(max(0, first.peak_bytes) for first in firsts.values()) / 2**30
        rests = self.device == "cpu" and needed > MEMORY_SHARE * available_gib()
        for turn in range(self.limits.rounds):
            self.say(f"{group}: round {turn + 1} of {self.limits.rounds}")
            for name in [name for name, samples in taken.items() if len(samples) <= turn]:
                try:
                    sample = workers[name].turn(2 * self.limits.pass_seconds)
                    taken[name].append(sample)
                    append_json_line(self.turns_path, {"row": keys[name], "turn": sample._asdict()})
                    if rests:
                        workers[name].rest()
                except Failure as failure:
                    del taken[name], workers[name]
                    self.fail(name, group, str(failure))
        return taken


def summary(samples: Sequence[Sample], first: First, params: int, batch: int) -> Record:
    """A row's figures: medians, with the quartiles of the seconds."""
    seconds = sorted(sample.seconds for sample in samples)
    # Inclusive: the quartiles of two samples lie between them.
    enough = seconds if len(seconds) > 1 else seconds * 2
    low, median, high = statistics.quantiles(enough, n=4, method="inclusive")
    return {
        "outcome": "ok",
        "seconds": median,
        "seconds_quartiles": [low, high],
        "samples": len(seconds),
        "images_per_second": batch / median,
        "system_seconds": statistics.median(sample.system_seconds for sample in samples),
        "page_faults": round(statistics.median(sample.faults for sample in samples)),
        "peak_bytes": first.peak_bytes,
        "params": params,
        "macs": first.macs,
    }


def check_same(path: Path, about: Record) -> None:
    """Make sure that a file of results is of this machine and these versions, and remember them beside it.

    Raises:
        UsageError: it is of others, whose figures do not mix.
    """
    beside = path.with_suffix(".machine.json")
    same = ("device", "device_name", "threads", "torch", "lf_dense")
    if path.exists() and beside.exists():
        before = json.loads(beside.read_text())
        differ = [
            f"{key} {before.get(key)} then, {about[key]} now" for key in same if before.get(key) != about[key]
        ]
        if differ:
            raise UsageError(
                f"{path.parent} holds figures of another machine or version ({'; '.join(differ)}): give "
                "another --out."
            )
    write_atomically(beside, json.dumps(about, indent=1).encode())
