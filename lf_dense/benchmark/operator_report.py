"""What the operators' benchmark prints and writes: the heading, a case's JSON, its line in a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .accuracy import Yardstick
from .cases import Case
from .contenders import FLOOR, SAME_FUNCTION
from .contest import Contender
from .report import Record, count_of, markdown_head, markdown_row, three_digits


def heading(about: Mapping[str, Any], on_cuda: bool, wants_native: bool) -> str:
    """Return the lines above the operators' tables."""
    lines = [
        f"{about['date']}, {about['device']} ({about['device_name']}), "
        f"{count_of(about['threads'], 'CPU thread')}, torch {about['torch']}, {about['dtype']}, "
        f"batch size {about['batch_size']}"
    ]
    if not wants_native:
        lines.append("The native operators were not asked for.")
    elif not about["native"]["used"]:
        lines.append(f"The native operators' columns are left out, since {about['native']['obstacle']}.")
    elif not on_cuda:
        lines.append(f"Native operators with {about['native']['instruction_set']} instructions.")
    lines.append(
        "Cells: median time of a call, its ratio to native's, peak memory beyond the inputs. Error: largest, "
        "relative to the reference."
    )
    if on_cuda:
        lines.append(
            "Timing: CUDA events around calls from Python, or around replays of a CUDA graph where the "
            "fastest contender is below 1 ms."
        )
    return "\n".join(lines)


def records(case: Case, contenders: Mapping[str, Contender], yardstick: Yardstick | None) -> list[Record]:
    """Return the case as JSON, one object per contender.

    What was not measured is null, and so is an infinite error.
    """
    medians = {
        name: contender.sampler.median if contender.obstacle is None else None
        for name, contender in contenders.items()
    }
    about = {
        "op": case.op,
        "pass": case.direction,
        "size": case.size,
        "stage": case.stage,
        "batch_size": case.batch,
        "heads": case.heads,
        "head_dims": case.head_dims,
        "tokens": case.tokens if case.size else None,
        "landmarks": case.landmarks,
    }
    rows = []
    for name, contender in contenders.items():
        median, samples = medians[name], contender.sampler.samples
        error = contender.error
        checked_by = yardstick if name in SAME_FUNCTION else None
        rows.append(
            {
                **about,
                "contender": name,
                "obstacle": contender.obstacle,
                "median_ms": median and median * 1e3,
                "min_ms": median and min(samples) * 1e3,
                "max_ms": median and max(samples) * 1e3,
                "samples": len(samples),
                "calls_per_sample": contender.sampler.calls,
                "timing": contender.sampler.method,
                "ratio_to_native": _ratio(median, medians.get("native")),
                "ratio_to_floor": _ratio(median, medians.get(FLOOR)) if name == "native" else None,
                "peak_bytes": contender.peak_bytes,
                "max_relative_error": error if error is not None and math.isfinite(error) else None,
                "tolerance": checked_by and checked_by.tolerance,
                "checked_against": checked_by and checked_by.dtype,
                "compile_seconds": contender.compile_seconds,
            }
        )
    return rows


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator and denominator else None


def cell(record: Record) -> str:
    """A contender's entry in the table."""
    if record["median_ms"] is None:
        return record["obstacle"] or "not timed"
    parts = [f"{three_digits(record['median_ms'])} ms"]
    if record["contender"] == FLOOR:
        return parts[0]
    if record["ratio_to_native"] is not None:
        parts.append(f"{record['ratio_to_native']:.2f} x")
    if record["ratio_to_floor"] is not None:
        parts.append(f"{record['ratio_to_floor']:.2f} x floor")
    return ", ".join([*parts, f"{three_digits(record['peak_bytes'] / 2**20)} MiB"])


def table_head(columns: Sequence[str], on_cuda: bool) -> str:
    """Return the first two lines of an operator's table; ``columns`` are its contenders."""
    timing = ["timing"] if on_cuda else []
    return markdown_head(["size", "stage", "tokens", "landmarks", "pass", *columns, "error", *timing])


def table_row(case: Case, rows: Sequence[Record], columns: Sequence[str], on_cuda: bool) -> str:
    """Return a case's line of the table: its cells, its errors, and on CUDA how it was timed."""
    found = {row["contender"]: row for row in rows}
    tokens = case.tokens if case.size else "-"
    cells = [case.size_text, case.stage, tokens, case.landmarks, case.direction]
    cells += [cell(found[name]) if name in found else "-" for name in columns]
    cells.append(_errors(found))
    if on_cuda:
        cells.append(_timings(found))
    return markdown_row(cells)


def _errors(found: Mapping[str, Record]) -> str:
    compared = {name: row for name, row in found.items() if row["max_relative_error"] is not None}
    errors = ", ".join(f"{name} {row['max_relative_error']:.1e}" for name, row in compared.items())
    is_coarse = any(row["checked_against"] == "float32" for row in compared.values())
    return f"{errors or 'not compared'}{' (to float32)' if is_coarse else ''}"


def _timings(found: Mapping[str, Record]) -> str:
    """The timed contenders' one kind of timing, or each kind with its contenders."""
    timed = {name: row["timing"] for name, row in found.items() if row["median_ms"] is not None}
    kinds = sorted(set(timed.values()))
    if len(kinds) > 1:
        kinds = [f"{kind}: {', '.join(name for name in timed if timed[name] == kind)}" for kind in kinds]
    return "; ".join(kinds) or "-"
