"""Read what the CUDA operators will cost from their machine code: no GPU is needed.

The sources are compiled and disassembled. Each launch of a call is written down with its arguments, and a few
of its blocks are followed, warp by warp, through their instructions.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import functools
import hashlib
import heapq
import math
import os
import re
import shutil
import struct
import subprocess
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import UsageError
from ..presets import EPS, KERNEL_SCALE, NEWTON_ITERS, TAU
from .cases import DTYPES, Case, build_cases
from .options import check_folder
from .report import Record, markdown_head, markdown_row, write_json
from .sass import Kernel, cubin_kernels, read_code
from .schedule import LATENCY, MACHINES, SCHEDULERS, Costs, Machine, blocks_at_once, clocks_of
from .warps import LANES, SharedMemory, Warp

ROOT = Path(__file__).resolve().parents[2]
# As setup.py compiles them.
FLAGS = "-std=c++20 -O3 -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000"
TOKENS = 64  # of a tile
LAUNCH_MICROSECONDS = 1.0
LANDMARKS = 49
# Images, stages and passes that the documentation gives times of.
SHAPES = (((800, 1333), (1,), "forward+backward"), ((224, 224), (1, 2, 3, 4), "forward"))
# The units that a table of loops shows.
SHOWN = ("FMA", "ALU", "LSU", "XU")


@dataclass
class Operators:
    """The operators compiled for one architecture, with a runtime that writes launches down."""

    machine: Machine
    namespace: str
    library: ctypes.CDLL
    folder: Path
    kernels: dict[str, Kernel]
    cubins: dict[str, Path]
    reports: dict[str, str]


@dataclass
class Launch:
    """One launch of a call."""

    kernel: Kernel
    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    constants: bytes

    @property
    def blocks(self) -> int:
        return math.prod(self.grid)

    @property
    def threads(self) -> int:
        return math.prod(self.block)


@dataclass
class Block:
    """What one block issues."""

    traces: list[list[int]]
    wavefronts: dict[int, int]  # clocks of the shared-memory unit, by instruction, of all warps
    guesses: set[int]

    def slots(self) -> int:
        """Instructions that the busiest scheduler issues."""
        return max(sum(len(trace) for trace in self.traces[first::SCHEDULERS]) for first in range(SCHEDULERS))

    def clocks_of_accesses(self) -> dict[int, float]:
        """Clocks of the shared-memory unit of one access, by instruction."""
        counts = self.counts()
        return {at: clocks / counts[at] for at, clocks in self.wavefronts.items()}

    def counts(self) -> collections.Counter[int]:
        return collections.Counter(at for trace in self.traces for at in trace)


@dataclass
class Reading:
    """A launch with what was read of it."""

    launch: Launch
    registers: int
    static_shared: int
    spilled: int
    at_once: int
    # How many blocks are like the one that was followed, and that one.
    kinds: list[tuple[int, Block]]
    clocks: int = 0  # of the blocks that a multiprocessor takes at once
    other_clocks: int = 0  # of a block that does another work
    microseconds: float = 0.0

    @property
    def slots(self) -> int:
        """Of all blocks, but for those that do another work."""
        return sum(count * block.slots() for count, block in self.kinds if not self.is_other(block))

    @property
    def usual(self) -> Block:
        """The kind of block that most of the work is in; the solver's few are dear, and are not it."""
        return max(self.kinds[::-1], key=lambda kind: kind[0])[1]

    def is_other(self, block: Block) -> bool:
        """Whether a block goes another way through the kernel than most."""
        ours, usual = block.counts(), self.usual.counts()
        return sum(ours[at] for at in usual) < ours.total() / 2


def find_tool(name: str, package: str) -> str:
    """Where a program of the toolkit is: on the PATH, in CUDA_HOME, or in a package of this Python.

    Raises:
        UsageError: it is nowhere.
    """
    folders = [Path(os.environ["CUDA_HOME"], "bin")] if os.environ.get("CUDA_HOME") else []
    folders += sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin"), reverse=True)
    found = shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))
    if found is None:
        raise UsageError(f"reading kernels needs {name}, and it was not found: {package}.")
    return found


def find_nvcc() -> str:
    return find_tool("nvcc", "put it on the PATH or set CUDA_HOME")


def find_nvdisasm() -> str:
    return find_tool("nvdisasm", "pip install -r requirements/dev.txt")


def run(command: Sequence[str | Path], folder: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise UsageError(f"{Path(command[0]).name} failed: {last.rstrip('.')}.")
    return done.stdout + done.stderr


def check_architecture(nvcc: str, architecture: str) -> None:
    if architecture not in MACHINES:
        raise UsageError(f"{architecture} is not known here: use {', '.join(MACHINES)}.")
    if architecture not in run([nvcc, "--list-gpu-code"], ROOT).split():
        raise UsageError(f"this nvcc does not compile for {architecture}: leave it out, or use a newer one.")


@functools.cache
def build(architecture: str) -> Operators:
    """Compile the operators for an architecture; the same sources are not compiled again."""
    nvcc = find_nvcc()
    find_nvdisasm()
    sources = ROOT / "ops"
    if not (sources / "cuda").is_dir():
        raise UsageError("reading kernels needs the sources in ops/: run it in a checkout of the project.")
    check_architecture(nvcc, architecture)
    machine = MACHINES[architecture]
    content = [path.read_bytes() for path in sorted(sources.rglob("*.*"))]
    about = f"{FLAGS} {run([nvcc, '--version'], ROOT)} {torch.__version__}"
    key = hashlib.sha256(b"".join([about.encode(), *content])).hexdigest()[:16]
    folder = ROOT / "build" / "kernels" / f"{architecture}-{key}"
    namespace = f"lf_dense_{architecture}_{key}"
    if not (folder / "operators.so").exists():
        compile_operators(nvcc, architecture, folder, namespace)
    torch.ops.load_library(str(folder / "operators.so"))
    library = ctypes.CDLL(str(folder / "operators.so"))
    kernels: dict[str, Kernel] = {}
    cubins: dict[str, Path] = {}
    reports: dict[str, str] = {}
    for cubin in sorted(folder.glob(f"*.{architecture}.cubin")):
        found = cubin_kernels(cubin)
        kernels.update(found)
        cubins.update(dict.fromkeys(found, cubin))
    entry = re.compile(r"Compiling entry function '(\S+)'(.*?)(?=Compiling entry|\Z)", re.S)
    for path in folder.glob("*.report"):
        reports.update(entry.findall(path.read_text()))
    sizes = [
        f"{kernel.name} {' '.join(str(size) for _, size in kernel.parameters)}\n"
        for kernel in kernels.values()
    ]
    (folder / "sizes.txt").write_text("".join(sizes))
    return Operators(machine, namespace, library, folder, kernels, cubins, reports)


def compile_operators(nvcc: str, architecture: str, folder: Path, namespace: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch_folder = Path(torch.__file__).parent
    common = f"{FLAGS} -DLF_LIBRARY={namespace} -DLF_CUDA_KEY=CPU -Xcompiler -O0,-fPIC,-fvisibility=hidden"
    command = [nvcc, *common.split(), "-isystem", str(torch_folder / "include"), "-c"]
    keep = ["-keep", "-keep-dir", str(folder), f"-arch={architecture}", "-Xptxas", "-v"]
    sources = [path for path in sorted((ROOT / "ops" / "cuda").glob("*.cu")) if path.stem != "probe"]
    objects = [f"{path.stem}.o" for path in sources]
    for source, name in zip(sources, objects):
        report = folder / f"{source.stem}.report"
        if not report.exists():
            report.write_text(run([*command, *keep, "-o", name, str(source)], folder))
    for source in (ROOT / "ops" / "schemas.cpp", ROOT / "ops" / "recording" / "runtime.cpp"):
        objects.append(f"{source.stem}.o")
        run([*command, "-o", objects[-1], str(source)], folder)
    compiler = os.environ.get("CXX", "g++").split()
    library = ["-L", str(torch_folder / "lib"), "-ltorch_cpu", "-lc10"]
    run([*compiler, "-shared", *objects, *library, "-o", "partial.so"], folder)
    (folder / "partial.so").replace(folder / "operators.so")
    for path in folder.iterdir():
        if path.suffix not in (".so", ".cubin", ".report"):
            path.unlink()


@functools.cache
def short_name(mangled: str) -> str:
    """``stream_keys<float, 2>`` of a mangled name."""
    named = shutil.which("c++filt")
    if named is None:
        return mangled
    plain = run([named, mangled], ROOT).strip()
    plain = plain.replace("(anonymous namespace)::", "")
    return re.sub(r"^.*?(\w+(?:<.*>)?)\(.*$", r"\1", plain)


def launches_of(operators: Operators, call: Callable[[], object]) -> list[Launch]:
    """What a call launches, in order; ``operators.library`` runs none of it."""
    out = operators.folder / f"launches.{os.getpid()}.txt"
    machine = operators.machine
    operators.library.lf_dense_record(
        str(operators.folder / "sizes.txt").encode(),
        str(out).encode(),
        machine.processors,
        machine.shared_bytes_of_block,
    )
    call()
    lines = out.read_text().splitlines()
    out.unlink()
    return [read_launch(operators, line.split()) for line in lines]


def read_launch(operators: Operators, words: list[str]) -> Launch:
    name, numbers, values = words[0], [int(word) for word in words[1:8]], words[8:]
    kernel = operators.kernels[name]
    grid, block = numbers[:3], numbers[3:6]
    constants = bytearray(kernel.parameters_at + 4096)
    # Where kernels find the shapes of block and grid; parameters come after them.
    for at in (0, 0x360):
        if at + 24 <= kernel.parameters_at:
            struct.pack_into("<6I", constants, at, *block, *grid)
    for (offset, size), value in zip(kernel.parameters, values):
        at = kernel.parameters_at + offset
        constants[at : at + size] = bytes.fromhex(value)
    shapes = (grid[0], grid[1], grid[2]), (block[0], block[1], block[2])
    return Launch(kernel, short_name(name), *shapes, numbers[6], bytes(constants))


def load_code(operators: Operators, kernels: Iterable[Kernel]) -> None:
    """Disassemble what has not been read yet."""
    wanted = {kernel.name: kernel for kernel in kernels if not kernel.code}
    for cubin in sorted({operators.cubins[name] for name in wanted}):
        here = [kernel for kernel in wanted.values() if operators.cubins[kernel.name] == cubin]
        numbers = ",".join(str(kernel.index) for kernel in here)
        code = read_code(run([find_nvdisasm(), "-c", "-fun", numbers, cubin], operators.folder))
        for kernel in here:
            kernel.code = code[kernel.name]


def place_of(launch: Launch, index: int) -> tuple[int, int, int]:
    across, down, _ = launch.grid
    return index % across, index // across % down, index // across // down


def follow_warp(launch: Launch, index: int, number: int = 0, memory: SharedMemory | None = None) -> Warp:
    warp = Warp(launch.kernel, launch.constants, place_of(launch, index), number, launch.threads, memory)
    warp.run()
    return warp


def follow(launch: Launch, index: int) -> Block:
    """What a block of a launch issues."""
    memory = SharedMemory()
    warps = [follow_warp(launch, index, number, memory) for number in range(-(-launch.threads // LANES))]
    wavefronts = collections.Counter[int]()
    for warp in warps:
        wavefronts.update(warp.conflicts)
    guesses = set[int]().union(*(warp.guesses for warp in warps))
    return Block([warp.issued for warp in warps], dict(wavefronts), guesses)


def kinds_of(launch: Launch, heads: int) -> list[tuple[int, Block]]:
    """Blocks in the grid's order by what they issue: how many in a row are like one that is followed.

    Blocks are told apart by the length of their first warp. Between two that are alike, and are like the one
    halfway, all are taken to be alike. The grid's first blocks, one for each head, may do another work.
    """

    @functools.cache
    def length(index: int) -> int:
        return len(follow_warp(launch, index).issued)

    def alike(*indices: int) -> bool:
        lengths = [length(index) for index in indices]
        return max(lengths) <= 1.04 * min(lengths)

    def runs(first: int, last: int) -> list[tuple[int, int]]:
        middle = (first + last) // 2
        if alike(first, middle, last):
            return [(first, last)]
        if last - first == 1:
            return [(first, first), (last, last)]
        return [*runs(first, middle), *runs(middle + 1, last)]

    last = launch.blocks - 1
    found = runs(0, last) if last < heads else [*runs(0, heads - 1), *runs(heads, last)]
    joined = found[:1]
    for run in found[1:]:
        if alike(joined[-1][0], run[0]) and run[0] != heads:
            joined[-1] = (joined[-1][0], run[1])
        else:
            joined.append(run)
    blocks: dict[int, Block] = {}
    kinds = []
    for first, last in joined:
        known = next((index for index in blocks if length(index) == length(first)), None)
        if known is None:
            blocks[first] = follow(launch, first)
        kinds.append((last - first + 1, blocks[first if known is None else known]))
    return kinds


def read(operators: Operators, call: Callable[[], object], heads: int = 1) -> list[Reading]:
    """Read every launch of a call."""
    launches = launches_of(operators, call)
    load_code(operators, [launch.kernel for launch in launches])
    return [read_one(operators, launch, heads) for launch in launches]


def read_one(operators: Operators, launch: Launch, heads: int) -> Reading:
    report = operators.reports[launch.kernel.name]
    registers = int(re.search(r"Used (\d+) registers", report)[1])  # type: ignore[index]
    static = re.search(r"(\d+) bytes smem", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    static_bytes = int(static[1]) if static else 0
    at_once = blocks_at_once(operators.machine, registers, launch.shared_bytes + static_bytes, launch.threads)
    spilled = int(spills[1]) + int(spills[2]) if spills else 0
    reading = Reading(launch, registers, static_bytes, spilled, at_once, kinds_of(launch, heads))
    estimate(reading, operators.machine)
    return reading


def estimate(reading: Reading, machine: Machine) -> None:
    """The time of a launch: blocks go in their order to the multiprocessor that is free first.

    A multiprocessor's blocks share it evenly, so that one takes its share of the clocks of a full house. A
    block that does another work runs beside them, and no launch ends before it.
    """
    costs = Costs(reading.launch.kernel, machine)
    together = min(reading.at_once, -(-reading.launch.blocks // machine.processors))
    usual = reading.usual
    reading.clocks = clocks_of([usual.traces] * together, costs, usual.clocks_of_accesses())
    loads = [0.0] * machine.processors
    for count, block in reading.kinds:
        if reading.is_other(block):
            clocks = clocks_of([block.traces], costs, block.clocks_of_accesses())
            reading.other_clocks = max(reading.other_clocks, clocks)
            continue
        share = reading.clocks / together * block.slots() / usual.slots()
        for _ in range(count):
            heapq.heapreplace(loads, loads[0] + share)
    reading.microseconds = max(*loads, reading.other_clocks) / machine.gigahertz / 1000


def attention(operators: Operators, case: Case, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """A call of the attention on tensors as a projection leaves them; their numbers do not matter."""
    ops = getattr(torch.ops, operators.namespace)

    def tokens(count: int) -> torch.Tensor:
        return torch.empty(case.batch, count, case.heads, case.head_dims, dtype=dtype).transpose(1, 2)

    def call() -> None:
        q, k, v, landmarks = (
            tokens(case.tokens),
            tokens(case.tokens),
            tokens(case.tokens),
            tokens(case.landmarks),
        )
        out, *saved = ops.laplacian_attention(q, k, v, landmarks, KERNEL_SCALE, NEWTON_ITERS, EPS, TAU)
        if case.direction != "forward":
            ops.laplacian_attention_backward(out, q, k, v, landmarks, *saved, KERNEL_SCALE, TAU)

    return call


def tiles_of(case: Case) -> int:
    return case.batch * case.heads * -(-case.tokens // TOKENS)


# The report.
def kernel_table(readings: Sequence[Reading], tiles: int) -> str:
    head = ["kernel", "registers", "shared bytes", "threads", "blocks an SM", "spilled", "blocks"]
    lines = [markdown_head([*head, "slots a tile", "clocks", "of the solver", "us"])]
    for reading in readings:
        launch = reading.launch
        cells: list[object] = [launch.name, reading.registers, launch.shared_bytes + reading.static_shared]
        cells += [launch.threads, reading.at_once, reading.spilled, launch.blocks]
        slots = f"{reading.slots / tiles:.0f}"
        clocks = [reading.clocks, reading.other_clocks or "-"]
        lines.append(markdown_row([*cells, slots, *clocks, f"{reading.microseconds:.1f}"]))
    return "\n".join(lines)


def loop_rows(reading: Reading, least_share: float = 0.04) -> list[list[object]]:
    """The loops in which a block spends its slots: turns of all warps, and a turn's instructions by unit."""
    block = reading.usual
    counts = block.counts()
    total = sum(counts.values())
    code = reading.launch.kernel.code
    rows = []
    for first, last in reading.launch.kernel.loops():
        issued, turns = sum(counts[at] for at in range(first, last + 1)), counts[last]
        # Compilers jump back from code that nobody reaches, too.
        if turns == 0 or issued < least_share * total:
            continue
        pipes = collections.Counter[str]()
        for at in range(first, last + 1):
            pipes[code[at].pipe] += counts[at]
        others = sum(count for pipe, count in pipes.items() if pipe not in SHOWN)
        per_turn = [f"{count / turns:.1f}" for count in [*(pipes[pipe] for pipe in SHOWN), others]]
        place = f"{code[first].address:#x} to {code[last].address:#x}"
        rows.append([reading.launch.name, place, turns, *per_turn, f"{issued / total:.0%}"])
    return rows


def loop_table(readings: Sequence[Reading]) -> str:
    seen: dict[str, Reading] = {}
    for reading in readings:
        seen.setdefault(reading.launch.kernel.name, reading)
    head = markdown_head(["kernel", "loop", "turns a block", *SHOWN, "other", "share"])
    return "\n".join([head, *(markdown_row(row) for reading in seen.values() for row in loop_rows(reading))])


def milliseconds(readings: Sequence[Reading]) -> float:
    return sum(reading.microseconds + LAUNCH_MICROSECONDS for reading in readings) / 1000


def forward_only(case: Case) -> Case:
    return case._replace(direction="forward")


def assumptions(machine: Machine) -> str:
    latencies = ", ".join(f"{pipe} {clocks}" for pipe, clocks in LATENCY.items())
    return (
        f"Assumed: {machine.name}, {machine.processors} multiprocessors at {machine.gigahertz} GHz; a "
        "scheduler issues one instruction a clock, of the warp that could go on first; units take what the "
        "throughput table of the CUDA C++ Programming Guide says; results come after clocks that Nvidia does "
        f"not publish ({latencies}); {LAUNCH_MICROSECONDS:g} us between two launches; memory keeps up. A "
        "condition on a floating-point number counts as false. Slots are instructions of a block's busiest "
        "scheduler."
    )


def documented_cases() -> list[Case]:
    """The shapes that the documentation gives times of."""
    found: list[Case] = []
    for size, stages, passes in SHAPES:
        found += build_cases(["laplacian_attention"], [size], stages, [LANDMARKS], [passes])
    return found


def estimates(operators: Operators, case: Case, readings: Sequence[Reading]) -> list[Record]:
    """What each pass of a case is thought to take."""
    launches = len(launches_of(operators, attention(operators, forward_only(case))))
    about = {"size": case.size, "stage": case.stage, "landmarks": case.landmarks}
    parts = {"forward": readings[:launches], case.direction: readings}
    return [
        {**about, "pass": name, "estimated_ms": milliseconds(part), "launches": len(part)}
        for name, part in parts.items()
    ]


def report(architecture: str, dtype: str = "float32", say: Callable[[str], object] = print) -> list[Record]:
    """Print everything that is read for an architecture and tensors of a dtype; returns the estimates."""
    operators = build(architecture)
    say(f"## {architecture}, {dtype}\n\n{assumptions(operators.machine)}")
    found: list[Record] = []
    for case in documented_cases():
        readings = read(operators, attention(operators, case, DTYPES[dtype]), case.batch * case.heads)
        rows = estimates(operators, case, readings)
        found += rows
        where = f"{case.size_text}, stage {case.stage}, {case.landmarks} landmarks"
        passes = [f"{row['pass']} {row['estimated_ms']:.3f} ms in {row['launches']} launches" for row in rows]
        say(f"\n### {where}: {', '.join(passes)}\n\n{kernel_table(readings, tiles_of(case))}")
        if case.direction != "forward":
            say(f"\n{loop_table(readings)}")
        guessing = {each.launch.name for each in readings if any(block.guesses for _, block in each.kinds)}
        if guessing:
            say(f"\nBranches on numbers, counted as not taken, are in {', '.join(sorted(guessing))}.")
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of tools/read_kernels.py."""
    known = ", ".join(MACHINES)
    parser.add_argument(
        "--arch",
        nargs="+",
        default=["sm_80", "sm_90"],
        metavar="SM",
        help=f"of {known} (default: sm_80 sm_90)",
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of the tensors (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the last one's estimates there too")


def run_command_line(args: argparse.Namespace) -> None:
    if args.json:
        check_folder("--json", args.json)
    for architecture in args.arch:
        found = report(architecture, args.dtype)
        if args.json:
            write_json(args.json, {"architecture": architecture, "dtype": args.dtype}, found)
