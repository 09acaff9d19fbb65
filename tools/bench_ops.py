"""Time and peak memory of every operator at the backbone's shapes, against the reference and other attentions, in one run.

All contenders of a case take turns, so that a machine that slows down slows all of them, and medians count.
What computes the same thing is first compared with the reference in float64; a contender that is wrong is not
timed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

# The profiler, which counts memory on the CPU, otherwise writes a line to stderr at each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from lf_dense import functional
from lf_dense.backends import native
from lf_dense.errors import UsageError

STRIDES = (4, 8, 16, 32)
WIDTHS = (64, 128, 320, 512)
HEADS = (1, 2, 5, 8)
# PVTv2's: by how much each side of the map shrinks before it gives keys and values; the linear variant's map
# is 7 x 7.
REDUCTIONS = (8, 4, 2, 1)
LINEAR_GRID = (7, 7)

OPS = ("laplacian_kernel", "newton_schulz_inverse", "laplacian_attention")
PASSES = ("forward", "forward+backward")
SAME_FUNCTION = ("native", "reference", "compile")
OTHER_ATTENTIONS = ("sdpa", "sra", "linear-sra")
CONTENDERS = SAME_FUNCTION + OTHER_ATTENTIONS
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_MACS = {"cpu": 1e12, "cuda": 5e13}
QUICK = {
    "sizes": [(64, 96)],
    "stages": [1, 4],
    "landmarks": [49],
    "contenders": ["native", "reference", *OTHER_ATTENTIONS],
    "repeats": 5,
    "max_seconds": 0.5,
}

MIN_SAMPLES = 3
MAX_CALLS = 20
SAMPLE_SECONDS = 2e-3
GRAPH_BELOW_SECONDS = 1e-3
# Above this the float64 comparison gives way to float32.
MAX_FLOAT64_BYTES = 4e9


class Case(NamedTuple):
    """One operator at one shape; ``size`` is None where the operator does not see the image."""

    op: str
    direction: str
    size: tuple[int, int] | None
    stage: int
    map_shape: tuple[int, int]
    grid: tuple[int, int]
    batch: int

    @property
    def tokens(self) -> int:
        return math.prod(self.map_shape)

    @property
    def landmarks(self) -> int:
        return math.prod(self.grid)

    @property
    def heads(self) -> int:
        return HEADS[self.stage - 1]

    @property
    def head_dims(self) -> int:
        return WIDTHS[self.stage - 1] // self.heads

    @property
    def pairs(self) -> int:
        """Subtract and absolute-accumulate pairs of one kernel matrix."""
        return self.batch * self.heads * self.tokens * self.landmarks * self.head_dims


class Problem(NamedTuple):
    """A case's tensors, the gradient that flows back into its output, and its map."""

    inputs: tuple[Tensor, ...]
    grad: Tensor
    case: Case

    @property
    def backward(self) -> bool:
        return self.case.direction != "forward"

    def to(self, dtype: torch.dtype) -> Problem:
        inputs = tuple(x.detach().to(dtype).requires_grad_(self.backward) for x in self.inputs)
        return Problem(inputs, self.grad.to(dtype), self.case)


class Yardstick(NamedTuple):
    """What a contender's results are compared with, and how far they may lie from it, relative to the largest entry."""

    results: list[Tensor]
    tolerance: float
    dtype: str


class WrongResult(Exception):
    """A contender's results are further from the reference than rounding explains."""


def build_cases(args: argparse.Namespace) -> Iterator[Case]:
    """Every case of the options; a grid that a map is too small for is clipped as the backbone clips it, and made once."""
    seen = set()
    for op, size, stage, landmarks, direction in itertools.product(
        args.ops, args.sizes, args.stages, args.landmarks, args.passes
    ):
        map_shape = tuple(-(-side // STRIDES[stage - 1]) for side in size)
        grid = tuple(min(math.isqrt(landmarks), side) for side in map_shape)
        shown, key = size, (op, direction, size, stage, grid)
        if op == "newton_schulz_inverse":
            shown, key = None, (op, direction, stage, grid)
        if key not in seen:
            seen.add(key)
            yield Case(op, direction, shown, stage, map_shape, grid, args.batch_size)


def build_problem(case: Case, dtype: torch.dtype, device: torch.device) -> Problem:
    """Tensors as ``LaplacianAttention`` lays them out: views of ``(B, N, heads, d)`` projections, landmarks pooled from q."""
    random = torch.Generator().manual_seed(0)
    heads = (case.heads, case.head_dims)

    def projection() -> Tensor:
        return torch.randn(case.batch, case.tokens, *heads, generator=random).mul_(0.5).to(device, dtype)

    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_(case.direction != "forward")

    q = projection()
    landmarks = _pool_tokens(q.float(), case.map_shape, grid=case.grid).to(dtype)
    q, landmarks = q.transpose(1, 2), landmarks.transpose(1, 2)
    if case.op == "laplacian_kernel":
        inputs = (q, landmarks)
        grad = torch.randn(*q.shape[:3], case.landmarks, generator=random)
    elif case.op == "newton_schulz_inverse":
        inputs = (functional.laplacian_kernel(landmarks, landmarks, backend="reference"),)
        grad = torch.randn(inputs[0].shape, generator=random)
    else:
        inputs = (q, projection().transpose(1, 2), projection().transpose(1, 2), landmarks)
        grad = projection().transpose(1, 2)
    return Problem(tuple(leaf(x) for x in inputs), grad.to(device, dtype), case)


def _pool_tokens(
    x: Tensor, map_shape: tuple[int, int], grid: tuple[int, int] | None = None, ratio: int = 1
) -> Tensor:
    """Average ``(B, N, heads, d)`` over a fixed grid, or over cells of ``ratio`` by ``ratio``."""
    as_map = x.flatten(2).unflatten(1, map_shape).permute(0, 3, 1, 2)
    pooled = F.avg_pool2d(as_map, ratio) if grid is None else F.adaptive_avg_pool2d(as_map, grid)
    return pooled.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, x.shape[2:])


def reduced_attention(
    q: Tensor, k: Tensor, v: Tensor, map_shape: tuple[int, int], **pooling: object
) -> Tensor:
    """Softmax attention to keys and values averaged over the map: the core of PVTv2's spatial-reduction attention."""
    k, v = (_pool_tokens(x.transpose(1, 2), map_shape, **pooling).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def operator(case: Case, name: str) -> Callable[..., Tensor]:
    """The function that a contender calls on the problem's inputs, or on its first three."""
    ratio = REDUCTIONS[case.stage - 1]
    if name == "sdpa":
        return F.scaled_dot_product_attention
    if name == "sra":
        return lambda q, k, v: reduced_attention(q, k, v, case.map_shape, ratio=ratio)
    if name == "linear-sra":
        return lambda q, k, v: reduced_attention(q, k, v, case.map_shape, grid=LINEAR_GRID)
    function = getattr(functional, case.op)
    backend = "native" if name == "native" else "reference"
    return lambda *inputs: function(*inputs, backend=backend)


def softmax_macs(case: Case, name: str) -> float:
    """Multiply-adds of a softmax attention's two products, and of the five that its backward pass takes."""
    keys = {"sdpa": case.tokens, "linear-sra": math.prod(LINEAR_GRID)}
    ratio = REDUCTIONS[case.stage - 1]
    keys["sra"] = math.prod(side // ratio for side in case.map_shape)
    products = 2 if case.direction == "forward" else 7
    return float(products * case.batch * case.heads * case.tokens * keys[name] * case.head_dims)


def bind(
    function: Callable[..., Tensor], problem: Problem, count: int | None = None
) -> Callable[[], list[Tensor]]:
    """A call without arguments that returns the output, and the gradients of the inputs where the case asks for them."""
    inputs = problem.inputs[:count]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [function(*inputs)]

    def forward_and_backward() -> list[Tensor]:
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, problem.grad)]

    return forward_and_backward if problem.backward else forward


def relative_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest deviation of a tensor's entries over its largest entry, of the worst tensor; infinite where NaN appears."""
    worst = 0.0
    for x, y in zip(found, wanted):
        scale = y.abs().max().double().item()
        error = (x.to(y.dtype) - y).abs().max().double().item() / (scale or 1.0)
        worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def build_yardstick(problem: Problem) -> Yardstick | None:
    """The reference in float64, or in float32 where that is too large; tolerance: twice the reference's own error, and rounding.

    Without a float64 comparison the reference's own error is unknown, and 1e-3 stands in for it. None where
    memory is too small for the reference.
    """
    case = problem.case
    dtype = problem.inputs[0].dtype
    reference = operator(case, "reference")
    narrow = torch.finfo(dtype).eps
    kernel_bytes = 8.0 * case.batch * case.heads * case.tokens * case.landmarks
    if kernel_bytes * (8 if problem.backward else 4) <= MAX_FLOAT64_BYTES:
        with contextlib.suppress(torch.OutOfMemoryError):
            wanted = bind(reference, problem.to(torch.float64))()
            own = relative_error(bind(reference, problem)(), wanted)
            return Yardstick(wanted, 2 * own + narrow + 64 * torch.finfo(torch.float32).eps, "float64")
    with contextlib.suppress(torch.OutOfMemoryError):
        return Yardstick(bind(reference, problem.to(torch.float32))(), 1e-3 + narrow, "float32")
    return None


def peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that a call needs beyond what is allocated before it, its results included, at the worst moment.

    On CUDA the caching allocator keeps the count. On the CPU it is the running sum of what PyTorch's
    allocator hands out and takes back, as the profiler records it; scratch memory that a library allocates by
    itself is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds, where the system has alarms."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*unused: object) -> None:
        raise TimeoutError(f"compilation took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Contender:
    """One contender of one case: whether it runs, whether it is right, what it takes.

    Attributes:
        obstacle: why there is no time, as the table says it; None where there is one.
        is_wrong: the obstacle is one that ends the run with an error.
        samples: seconds per call, one for each turn.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device
        self.obstacle: str | None = None
        self.is_wrong = False
        self.error: float | None = None
        self.compile_seconds: float | None = None
        self.peak_bytes: int | None = None
        self.samples: list[float] = []
        self.calls = 1
        self.timing = "calls"
        self.call: Callable[[], object] | None = None
        self.estimate = math.inf

    @property
    def median(self) -> float | None:
        return statistics.median(self.samples) if self.samples else None

    def attempt(self, step: Callable[[], None]) -> None:
        """Run a step; what goes wrong in it becomes the obstacle."""
        if self.obstacle is not None:
            return
        try:
            step()
        except WrongResult as error:
            self.obstacle, self.is_wrong = f"wrong: {error}", True
        except Exception as error:  # whatever a compiler or an operator raises belongs in the table
            text = str(error).strip()
            is_memory = (
                isinstance(error, torch.OutOfMemoryError)
                or "can't allocate memory" in text
                or "not enough memory" in text
            )
            # A compiler's message starts with which backend raised, and ends with advice on verbosity.
            lines = [
                line.strip() for line in text.split("Set TORCHDYNAMO_VERBOSE")[0].splitlines() if line.strip()
            ]
            reason = " ".join(lines[:2]) or type(error).__name__
            self.obstacle = "out of memory" if is_memory else f"failed: {reason[:160].replace('|', '/')}"
            self.is_wrong = self.name in ("native", "reference") and not is_memory
        if self.obstacle is not None:
            self.call = None

    def prepare(
        self, problem: Problem, yardstick: Yardstick | None, max_macs: float, compile_seconds: float
    ) -> None:
        """Build the call, compare its results, count its memory, and estimate its time."""
        case = problem.case
        if self.name == "floor":
            like = problem.inputs[0].detach()
            self.call = lambda: torch.ops.lf_dense.arithmetic_floor(like, case.pairs)
        elif self.name in OTHER_ATTENTIONS:
            macs = softmax_macs(case, self.name)
            if macs > max_macs:
                self.obstacle = f"skipped: {macs:.1e} multiply-adds, above --max-macs {max_macs:.0e}"
                return
            self.call = bind(operator(case, self.name), problem, count=3)
        else:
            function = operator(case, self.name)
            if self.name == "compile":
                # A fresh start each time: after a number of shapes the compiler would fall back to eager mode
                # and not say so.
                torch.compiler.reset()
                function = torch.compile(function, dynamic=False)
            self.call = bind(function, problem)
        started = time.perf_counter()
        with time_limit(compile_seconds) if self.name == "compile" else contextlib.nullcontext():
            results = self.call()
        if self.name == "compile":
            self.compile_seconds = time.perf_counter() - started
        if yardstick is not None and self.name in SAME_FUNCTION:
            self.error = relative_error(results, yardstick.results)
            if self.error > yardstick.tolerance:
                raise WrongResult(f"error {self.error:.1e}, and {yardstick.tolerance:.1e} is allowed")
        del results
        self.peak_bytes = peak_memory(self.call, self.device)
        self.estimate = self._sample()
        if self.estimate < 0.1:
            self.calls = 5
            self.estimate = min(self._sample() for _ in range(2))

    def choose_timing(self, use_graph: bool) -> None:
        """Replay a CUDA graph where that is asked for and can be captured; short calls are timed several at a time."""
        if use_graph:
            try:
                self.call = _captured(self.call)
                self.timing, self.calls = "CUDA graph", MAX_CALLS
                self.estimate = self._sample()
            except RuntimeError:
                torch.cuda.synchronize(self.device)
        self.calls = max(1, min(MAX_CALLS, math.ceil(SAMPLE_SECONDS / max(self.estimate, 1e-9))))

    def _sample(self) -> float:
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

    def take_turn(self) -> float:
        """One sample; returns the seconds that it took in all."""
        self.samples.append(self._sample())
        return self.samples[-1] * self.calls


def _captured(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph's replay, after a warm-up on another stream, as capture wants it."""
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


def measure(
    case: Case, names: list[str], args: argparse.Namespace
) -> tuple[dict[str, Contender], Yardstick | None]:
    """Prepare a case's contenders, then let them take turns until each has had its repeats, or its share of the time."""
    contenders = {name: Contender(name, args.device) for name in names}
    try:
        problem = build_problem(case, DTYPES[args.dtype], args.device)
    except torch.OutOfMemoryError:
        for contender in contenders.values():
            contender.obstacle = "out of memory"
        return contenders, None
    yardstick = build_yardstick(problem)
    max_macs = args.max_macs or MAX_MACS[args.device.type]
    for contender in contenders.values():
        contender.attempt(
            lambda contender=contender: contender.prepare(
                problem, yardstick, max_macs, args.max_compile_seconds
            )
        )
    running = [contender for contender in contenders.values() if contender.obstacle is None]
    use_graph = (
        args.device.type == "cuda"
        and min((contender.estimate for contender in running), default=math.inf) < GRAPH_BELOW_SECONDS
    )
    for contender in running:
        contender.attempt(lambda contender=contender: contender.choose_timing(use_graph))
    share = args.max_seconds / max(1, len(running))
    spent = dict.fromkeys(contenders, 0.0)
    for turn in range(args.repeats):
        for contender in running:
            if contender.obstacle is None and (turn < MIN_SAMPLES or spent[contender.name] < share):
                contender.attempt(
                    lambda contender=contender: spent.update(
                        {contender.name: spent[contender.name] + contender.take_turn()}
                    )
                )
    for contender in contenders.values():
        contender.call = None
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
    return contenders, yardstick


def records(case: Case, contenders: dict[str, Contender], yardstick: Yardstick | None) -> list[dict]:
    """The case as JSON: one object per contender. What was not measured is null, and so is an infinite error."""
    native_median = contenders["native"].median if "native" in contenders else None
    floor_median = contenders["floor"].median if "floor" in contenders else None
    rows = []
    for name, contender in contenders.items():
        median = contender.median if contender.obstacle is None else None
        checked = yardstick is not None and name in SAME_FUNCTION
        rows.append(
            {
                "op": case.op,
                "pass": case.direction,
                "size": case.size,
                "stage": case.stage,
                "batch_size": case.batch,
                "heads": case.heads,
                "head_dims": case.head_dims,
                "tokens": case.tokens if case.size else None,
                "landmarks": case.landmarks,
                "contender": name,
                "obstacle": contender.obstacle,
                "median_ms": median and median * 1e3,
                "min_ms": median and min(contender.samples) * 1e3,
                "max_ms": median and max(contender.samples) * 1e3,
                "samples": len(contender.samples),
                "calls_per_sample": contender.calls,
                "timing": contender.timing,
                "ratio_to_native": median and native_median and median / native_median,
                "ratio_to_floor": median / floor_median
                if name == "native" and median and floor_median
                else None,
                "peak_bytes": contender.peak_bytes,
                "max_relative_error": (
                    contender.error
                    if contender.error is not None and math.isfinite(contender.error)
                    else None
                ),
                "tolerance": yardstick.tolerance if checked else None,
                "checked_against": yardstick.dtype if checked else None,
                "compile_seconds": contender.compile_seconds,
            }
        )
    return rows


def three_digits(value: float) -> str:
    """At least three significant digits and no exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def cell(record: dict) -> str:
    """A contender's entry in the table."""
    if record["median_ms"] is None:
        return record["obstacle"] or "not timed"
    parts = [f"{three_digits(record['median_ms'])} ms"]
    if record["contender"] == "floor":
        return parts[0]
    if record["ratio_to_native"] is not None:
        parts.append(f"{record['ratio_to_native']:.2f} x")
    if record["ratio_to_floor"] is not None:
        parts.append(f"{record['ratio_to_floor']:.2f} x floor")
    return ", ".join([*parts, f"{three_digits(record['peak_bytes'] / 2**20)} MiB"])


def table_row(case: Case, rows: list[dict], columns: list[str], on_cuda: bool) -> str:
    found = {row["contender"]: row for row in rows}
    size = "x".join(map(str, case.size)) if case.size else "any"
    tokens = str(case.tokens) if case.size else "-"
    cells = [size, str(case.stage), tokens, str(case.landmarks), case.direction]
    cells += [cell(found[name]) if name in found else "-" for name in columns]
    compared = {name: row for name, row in found.items() if row["max_relative_error"] is not None}
    errors = ", ".join(f"{name} {row['max_relative_error']:.1e}" for name, row in compared.items())
    is_coarse = any(row["checked_against"] == "float32" for row in compared.values())
    cells.append(f"{errors or 'not compared'}{' (to float32)' if is_coarse else ''}")
    if on_cuda:
        timed = {name: row["timing"] for name, row in found.items() if row["median_ms"] is not None}
        kinds = sorted(set(timed.values()))
        if len(kinds) > 1:
            kinds = [f"{kind}: {', '.join(name for name in timed if timed[name] == kind)}" for kind in kinds]
        cells.append("; ".join(kinds) or "-")
    return f"| {' | '.join(cells)} |"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        found = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
        )
        if found:
            return found.group(1)
    return platform.processor() or platform.machine()


def has_floor(device: torch.device) -> bool:
    """Whether the compiled operators can measure the device's arithmetic."""
    if native.obstacle(device) is not None or not hasattr(torch.ops.lf_dense, "arithmetic_floor"):
        return False
    try:
        torch.ops.lf_dense.arithmetic_floor(torch.zeros(1, device=device), 1024)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def describe(args: argparse.Namespace) -> dict:
    """What the numbers were measured on and with."""
    obstacle = native.obstacle(args.device)
    build = native.build_info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "device": str(args.device),
        "device_name": device_name(args.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": args.dtype,
        "batch_size": args.batch_size,
        "native": {
            "used": obstacle is None,
            "obstacle": obstacle,
            "instruction_set": build["instruction_set"],
        },
    }


def print_heading(about: dict, on_cuda: bool, wants_native: bool) -> None:
    threads = f"{about['threads']} CPU thread{'s' if about['threads'] > 1 else ''}"
    print(
        f"{about['date']}, {about['device']} ({about['device_name']}), {threads}, torch {about['torch']}, "
        f"{about['dtype']}, batch size {about['batch_size']}"
    )
    if not wants_native:
        print("The native operators were not asked for.")
    elif not about["native"]["used"]:
        print(f"The native operators' columns are left out, since {about['native']['obstacle']}.")
    elif not on_cuda:
        print(f"Native operators with {about['native']['instruction_set']} instructions.")
    print(
        "Cells: median time of a call, its ratio to native's, peak memory beyond the inputs. Error: largest,"
        " relative to the reference."
    )
    if on_cuda:
        print(
            "Timing: CUDA events around calls from Python, or around replays of a CUDA graph where the"
            " fastest contender is below 1 ms."
        )


def write_json(path: Path, about: dict, results: list[dict]) -> None:
    """Write all that there is, in one move: a run that is cut short leaves its finished cases."""
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(
        json.dumps({**about, "results": results}, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    unfinished.replace(path)


def bench(args: argparse.Namespace) -> list[str]:
    """Run every case, print the tables, write the JSON; returns one line for each contender that is wrong."""
    about = describe(args)
    on_cuda = args.device.type == "cuda"
    wants_native = "native" in args.contenders
    names = [name for name in args.contenders if name != "native" or about["native"]["used"]]
    with_floor = wants_native and about["native"]["used"] and has_floor(args.device)
    print_heading(about, on_cuda, wants_native)
    results: list[dict] = []
    wrong = []
    for op, cases in itertools.groupby(build_cases(args), key=lambda case: case.op):
        columns = [name for name in names if name in SAME_FUNCTION or op == "laplacian_attention"]
        if op == "laplacian_kernel" and with_floor:
            columns.insert(columns.index("native") + 1, "floor")
        headings = [
            "size",
            "stage",
            "tokens",
            "landmarks",
            "pass",
            *columns,
            "error",
            *(["timing"] if on_cuda else []),
        ]
        print(f"\n### {op}\n\n| {' | '.join(headings)} |\n|{'---|' * len(headings)}", flush=True)
        for case in cases:
            taking_part = [name for name in columns if name != "floor" or case.direction == "forward"]
            contenders, yardstick = measure(case, taking_part, args)
            rows = records(case, contenders, yardstick)
            results += rows
            where = (
                f"at {'x'.join(map(str, case.size or ('any', 'size')))}, stage {case.stage}, {case.landmarks}"
                " landmarks"
            )
            wrong += [
                f"{name} {op} ({case.direction}) {where}: {c.obstacle}"
                for name, c in contenders.items()
                if c.is_wrong
            ]
            print(table_row(case, rows, columns, on_cuda), flush=True)
            if args.json:
                write_json(args.json, about, results)
    return wrong


def image_size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found or min(map(int, found.groups())) < STRIDES[-1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not an image size of at least 32 x 32, like 800x1333")
    return int(found[1]), int(found[2])


def square(text: str) -> int:
    if not text.isdecimal() or int(text) < 1 or math.isqrt(int(text)) ** 2 != int(text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not the number of landmarks of a square grid, like 49 or 196"
        )
    return int(text)


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least 1")
    return int(text)


def positive_float(text: str) -> float:
    with contextlib.suppress(ValueError):
        if float(text) > 0 and math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked.

    Raises:
        UsageError: the device is not there or the JSON's folder does not exist.
    """
    parser = argparse.ArgumentParser(description=__doc__, usage="%(prog)s [options]")
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N (default: %(default)s)",
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=image_size,
        default=[(224, 224), (800, 1333), (2048, 2048)],
        metavar="HxW",
        help="image sizes (default: 224x224 800x1333 2048x2048)",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        type=int,
        choices=range(1, 5),
        default=[1, 2, 3, 4],
        help="of the pyramid (default: all)",
    )
    parser.add_argument(
        "--landmarks",
        nargs="+",
        type=square,
        default=[49, 196],
        metavar="M",
        help="landmarks, on a square grid (default: 49 196)",
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS), help="operators (default: all)")
    parser.add_argument(
        "--passes", nargs="+", choices=PASSES, default=list(PASSES), help="what is timed (default: both)"
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=CONTENDERS,
        default=list(CONTENDERS),
        help="implementations; the last three are other attentions, on the same q, k and v (default: all)",
    )
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="float32", help="of the inputs (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=positive_int, default=1, metavar="N", help="images (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats",
        type=positive_int,
        default=50,
        metavar="N",
        help="turns of each contender (default: %(default)s)",
    )
    parser.add_argument(
        "--max-seconds",
        type=positive_float,
        default=10.0,
        metavar="S",
        help=(
            f"for the turns of one case, divided evenly; each contender has {MIN_SAMPLES} turns whatever they"
            " take (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--max-macs",
        type=positive_float,
        metavar="N",
        help=(
            "multiply-adds above which a softmax attention is skipped "
            f"(default: {', '.join(f'{macs:.0e} on {device}' for device, macs in MAX_MACS.items())})"
        ),
    )
    parser.add_argument(
        "--max-compile-seconds",
        type=positive_float,
        default=120.0,
        metavar="S",
        help="for compiling one case (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=positive_int, metavar="N", help="CPU threads (default: PyTorch's choice)"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the measurements there too, after every case"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="other defaults, that take seconds: one small size, two stages, no compile",
    )
    if parser.parse_known_args(argv)[0].quick:
        parser.set_defaults(**QUICK)
    args = parser.parse_args(argv)
    try:
        args.device = torch.device(args.device)
    except RuntimeError:
        raise UsageError(f"--device {args.device} is no device: use cpu, cuda or cuda:N.") from None
    if args.device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {args.device} cannot be measured: use cpu, cuda or cuda:N.")
    if args.device.type == "cuda" and (args.device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {args.device} is not there, since torch sees {torch.cuda.device_count()} CUDA devices:"
            " use cpu."
        )
    if args.json and not args.json.absolute().parent.is_dir():
        raise UsageError(f"the folder of --json {args.json} does not exist: make it first.")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 1 where a contender is wrong, 2 for an option that cannot work."""
    try:
        args = parse_args(argv)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    wrong = bench(args)
    for line in wrong:
        print(f"error: {line}.", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
