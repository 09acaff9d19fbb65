"""How long blocks take on one multiprocessor, from what their warps issue: a model, and its assumptions.

A scheduler issues one instruction a clock, of the warp that could go on earliest. Each unit takes an
instruction of a warp every so many clocks, a result comes so many clocks later, and a barrier waits for the
block. Instructions come from the cache, and a branch costs nothing but its place.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .sass import Instruction, Kernel
from .warps import results_of

SCHEDULERS = 4

# Clocks from issue to result. Nvidia publishes none: these are round numbers of what people have measured.
LATENCY = {"FMA": 4, "ALU": 5, "XU": 18, "LSU": 24, "FP64": 8, "tensor": 20, "uniform": 8, "control": 4}
GLOBAL_LATENCY = 500
CONSTANT_LATENCY = 30
BARRIER_CLOCKS = 8


@dataclass(frozen=True)
class Machine:
    """A GPU of one architecture."""

    name: str
    processors: int
    gigahertz: float
    shared_bytes: int  # of a multiprocessor
    shared_bytes_of_block: int
    threads: int  # of a multiprocessor, at once
    blocks: int
    # Results a clock and multiprocessor: the throughput table of the CUDA C++ Programming Guide.
    float32: int
    float64: int

    def interval(self, pipe: str) -> int:
        """Clocks between two instructions of a scheduler's warps on one unit."""
        results = {"FMA": self.float32, "FP64": self.float64, "ALU": 64, "XU": 16, "uniform": 64}.get(
            pipe, 128
        )
        return max(1, 32 * SCHEDULERS // results)


MACHINES = {
    "sm_80": Machine("A100 SXM", 108, 1.41, 164 << 10, 163 << 10, 2048, 32, 64, 32),
    "sm_90": Machine("H100 SXM", 132, 1.75, 228 << 10, 227 << 10, 2048, 32, 128, 64),
    "sm_100": Machine("B200", 148, 1.85, 228 << 10, 227 << 10, 2048, 32, 128, 64),
    "sm_120": Machine("RTX 5090", 170, 2.41, 100 << 10, 99 << 10, 1536, 24, 128, 2),
}
REGISTERS = 65536
# What the system keeps of shared memory for each block.
RESERVED_SHARED = 1024


def blocks_at_once(machine: Machine, registers: int, shared_bytes: int, threads: int) -> int:
    """Blocks that a multiprocessor has room for."""
    warps = -(-threads // 32)
    of_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    of_shared = machine.shared_bytes // (shared_bytes + RESERVED_SHARED)
    return min(of_registers, of_shared, machine.threads // (32 * warps), machine.blocks)


def sources_of(line: Instruction) -> list[str]:
    """The registers that an instruction waits for, and its predicate."""
    results = results_of(line)
    names = re.findall(r"(?<![\w.])U?R\d+|(?<![\w.])U?P\d", " ".join([line.guard, *line.operands]))
    wanted = [name for name in names if name not in results[:1]] + [
        name for name in results[:1] if names.count(name) > 1
    ]
    extra = []
    if line.opcode in ("STS", "STG") and line.modifiers and line.modifiers[-1] in ("64", "128"):
        match = re.match(r"R(\d+)$", line.operands[-1])
        if match:
            extra = [f"R{int(match[1]) + number}" for number in range(1, int(line.modifiers[-1]) // 32)]
    return wanted + extra


def decided_by(line: Instruction) -> list[str]:
    """The predicates that a comparison sets."""
    if "SETP" in line.opcode or line.opcode in ("FCHK", "PLOP3", "UPLOP3"):
        return [text for text in line.operands[:2] if re.match(r"^U?P\d$", text)]
    return []


class Costs:
    """What the model needs of each instruction of a kernel on a machine."""

    def __init__(self, kernel: Kernel, machine: Machine) -> None:
        self.rows = []
        for line in kernel.code:
            pipe = line.pipe
            latency = LATENCY[pipe]
            if line.opcode in ("LDG", "LD", "LDL", "ATOMG"):
                latency = GLOBAL_LATENCY
            elif line.opcode in ("LDC", "LDCU", "ULDC", "S2R"):
                latency = CONSTANT_LATENCY
            shared = line.opcode in ("LDS", "STS")
            interval = machine.interval(pipe)
            if line.opcode == "IMAD":
                interval = max(interval, 2)
            results = (*results_of(line), *decided_by(line))
            self.rows.append(
                (pipe, interval, latency, tuple(sources_of(line)), results, shared, line.opcode == "BAR")
            )


def clocks_of(blocks: Sequence[Sequence[Sequence[int]]], costs: Costs, wavefronts: dict[int, float]) -> int:
    """Clocks until all blocks have ended that start on one multiprocessor together.

    Args:
        blocks: for each block and warp, the instructions that it issues in order.
        costs: of the kernel.
        wavefronts: clocks of the shared-memory unit of one access, by instruction.
    """
    rows = costs.rows
    free = [0.0] * SCHEDULERS
    unit_free: list[dict[str, float]] = [{} for _ in range(SCHEDULERS)]
    shared_free = 0.0
    warps = [(block, trace) for block, traces in enumerate(blocks) for trace in traces]
    alive = [len(traces) for traces in blocks]
    arrived: list[list[int]] = [[] for _ in blocks]
    ready: list[dict[str, float]] = [{} for _ in warps]
    place = [0] * len(warps)
    queue: list[tuple[float, int]] = [(0, number) for number in range(len(warps))]
    end = 0.0
    while queue:
        earliest, number = heapq.heappop(queue)
        block, trace = warps[number]
        scheduler = number % SCHEDULERS
        at = trace[place[number]]
        pipe, interval, latency, _, results, shared, is_barrier = rows[at]
        now = max(earliest, free[scheduler], unit_free[scheduler].get(pipe, 0))
        free[scheduler] = now + 1
        unit_free[scheduler][pipe] = now + interval
        done: float = now + latency
        if shared:
            shared_free = max(shared_free, now) + wavefronts.get(at, 1)
            done = shared_free + latency
        known = ready[number]
        for name in results:
            known[name] = done
        place[number] += 1
        end = max(end, now + 1)
        if place[number] == len(trace):
            alive[block] -= 1
        elif is_barrier:
            arrived[block].append(number)
        else:
            following = now + 1
            for name in rows[trace[place[number]]][3]:
                following = max(following, known.get(name, 0))
            heapq.heappush(queue, (following, number))
        if arrived[block] and len(arrived[block]) == alive[block]:
            for each in arrived[block]:
                heapq.heappush(queue, (now + BARRIER_CLOCKS, each))
            arrived[block] = []
    return round(end)
