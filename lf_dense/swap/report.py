"""The report of a survey: counts, a summary as Markdown, and all rows as CSV."""

from __future__ import annotations

import csv
import io
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path

from ..errors import UsageError
from ..files import write_atomically
from .rows import BUILT, COLUMNS, FAILED, MEANINGS, NO_BASELINE, NO_MODEL, REFUSED, SWAPPED, Row

DEFAULT_PACKAGES = ("mmdet", "mmseg")
WIDTH = 110


def summary(rows: Sequence[Row]) -> str:
    """One line of counts for each package."""
    return "\n".join(_counts_line(rows, package) for package in _packages(rows))


def _packages(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(row.package for row in rows))


def _counts_line(rows: Iterable[Row], package: str) -> str:
    counts = Counter(row.outcome for row in rows if row.package == package)
    buildable = sum(counts[outcome] for outcome in (SWAPPED, BUILT, REFUSED, FAILED))
    share = counts[SWAPPED] / buildable if buildable else 0.0
    return (
        f"{package}: {sum(counts.values())} configs, {counts[NO_MODEL]} without a model, "
        f"{counts[NO_BASELINE]} that do not build on their own here; of the other {buildable}: "
        f"{counts[SWAPPED]} swapped ({share:.1%}), {counts[BUILT]} swapped and built but not run, "
        f"{counts[REFUSED]} refused, {counts[FAILED]} failed"
    )


def write_report(path: Path, rows: Sequence[Row], arch: str, date: str | None = None) -> Path:
    """Write the summary as Markdown, and all rows as a CSV file of the same name beside it.

    Args:
        path: the Markdown file.
        rows: the rows of a survey.
        arch: the preset that it put in.
        date: the day of the survey; today if there is none.

    Returns:
        The path of the CSV file.

    Raises:
        UsageError: the path does not end in ``.md``.
    """
    check_report_path(path)
    table = path.with_suffix(".csv")
    write_atomically(table, rows_as_csv(rows).encode())
    text = report(rows, arch, date or time.strftime("%Y-%m-%d"), table.name)
    write_atomically(path, text.encode())
    return table


def check_report_path(path: Path) -> None:
    """Refuse a path whose CSV file could not lie beside it.

    Raises:
        UsageError: the path does not end in ``.md``.
    """
    if path.suffix != ".md":
        raise UsageError(f"{path}: the report is a Markdown file, so its name has to end in .md.")


def rows_as_csv(rows: Iterable[Row]) -> str:
    """Rows as CSV, without their seconds."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([getattr(row, column) for column in COLUMNS] for row in rows)
    return stream.getvalue()


def report(rows: Sequence[Row], arch: str, date: str, table: str) -> str:
    """The summary of a survey as Markdown.

    Args:
        rows: the rows of the survey.
        arch: the preset that it put in.
        date: the day of the survey.
        table: name of the CSV file beside it.
    """
    packages = _packages(rows)
    options = "" if set(packages) <= set(DEFAULT_PACKAGES) else f" --packages {' '.join(packages)}"
    parts = [
        "# Every packaged config with a LaplacianFormer",
        f"`python tools/check_swap.py{options} --out docs/swapped_configs.md`,\n"
        f"{date}, arch `{arch}`, {', '.join(_version(package) for package in packages)}.",
        _wrapped(
            "Swapped: the new config was written down, read again and built, and a loss (with its gradient "
            "down to the backbone) and a prediction ran on a made-up sample; self-supervised models return "
            "features in place of a prediction. What the detail of a swapped config names could not be run, "
            "in the original config neither."
        ),
        "\n".join(_wrapped(f"- {line}", indent="  ") for line in summary(rows).splitlines()),
        _outcome_table(rows, packages),
        _refusal_table(rows),
        _wrapped(
            f"[{table}]({table}) has one row per config, with the columns {', '.join(COLUMNS)}. `config` is "
            "the path below the package's configs, and `package::config` is its name for any tool. `model` "
            "names the model and its old backbone. `detail` says why a config is refused or does not build, "
            "and what could not be run. Filter by `outcome`; the table above has its values."
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _version(package: str) -> str:
    distribution = metadata.packages_distributions()[package][0]
    return f"{distribution} {metadata.version(distribution)}"


def _wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def _outcome_table(rows: Sequence[Row], packages: list[str]) -> str:
    counts = Counter((row.package, row.outcome) for row in rows)
    lines = [
        f"| outcome | {' | '.join(packages)} | all | meaning |",
        "|---" * (len(packages) + 3) + "|",
    ]
    for outcome, meaning in MEANINGS.items():
        numbers = [counts[package, outcome] for package in packages]
        cells = [outcome, *map(str, numbers), str(sum(numbers)), meaning]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _refusal_table(rows: Iterable[Row]) -> str:
    """Reasons of refusals by count; backbones that are refused for one reason share a line."""
    groups: dict[str, Counter[str]] = {}
    for row in rows:
        if row.outcome == REFUSED:
            backbone = row.model.rpartition(", ")[2]
            groups.setdefault(_short_reason(row.detail, backbone), Counter())[backbone] += 1
    if not groups:
        return ""
    lines = ["| refused | old backbone | reason |", "|---|---|---|"]
    for reason, backbones in sorted(groups.items(), key=lambda group: -sum(group[1].values())):
        start = f"| {sum(backbones.values())} | {_few(backbones)} | "
        lines.append(f"{start}{textwrap.shorten(reason, WIDTH - len(start) - 2, placeholder='...')} |")
    return "\n".join(lines)


def _short_reason(detail: str, backbone: str) -> str:
    """The first clause of a refusal, without the name of the backbone, so that equal reasons are equal."""
    reason = detail.partition("cannot be replaced: ")[2] or detail
    clause = reason.rstrip(".").partition(", ")[0].replace("|", "/")
    return clause.removeprefix(f"{backbone} ")


def _few(names: Counter[str]) -> str:
    """The most frequent names, and how many more there are."""
    first = [name for name, _ in names.most_common(2)]
    more = len(names) - len(first)
    return ", ".join(first) + (f" and {more} more" if more else "")
