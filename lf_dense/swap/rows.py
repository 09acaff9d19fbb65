"""The rows of a survey: what was found for each config, and the file that keeps them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError, one_line
from ..files import write_atomically

SWAPPED = "swapped"
BUILT = "built"
REFUSED = "refused"
FAILED = "failed"
NO_BASELINE = "does not build on its own"
NO_MODEL = "has no model"
MEANINGS = {
    SWAPPED: "the new config runs",
    BUILT: "the new config builds, and neither it nor the original runs here",
    REFUSED: "the swap refuses it, and says why",
    FAILED: "the new config does not build or run, and the original does",
    NO_BASELINE: "the original does not build here",
    NO_MODEL: "settings of test-time augmentation and the like",
}

COLUMNS = ("package", "config", "model", "outcome", "detail")

# Package, and path below the package's configs.
ConfigName = tuple[str, str]


class Finding(NamedTuple):
    """What the check of one config found."""

    outcome: str
    detail: str = ""
    model: str = ""


class Row(NamedTuple):
    """One config of the survey; ``seconds`` is None where an earlier file of results has none."""

    package: str
    config: str
    model: str
    outcome: str
    detail: str
    seconds: float | None

    @property
    def name(self) -> ConfigName:
        return self.package, self.config


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON."""
    write_atomically(path, json.dumps([row._asdict() for row in rows], indent=1).encode())


def read_rows(path: Path) -> list[Row]:
    """Read rows from JSON, of this version or of earlier ones, which wrote seconds as text.

    Raises:
        UsageError: the file is no list of rows.
    """
    try:
        return [_row(line) for line in json.loads(path.read_bytes())]
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(f"{path} is no file of results: give another one with --json.") from error


def _row(line: dict[str, Any]) -> Row:
    seconds = line["seconds"]
    texts = {key: str(line[key]) for key in COLUMNS}
    return Row(**texts, seconds=None if seconds in ("", None) else float(seconds))


def first_line(error: BaseException) -> str:
    """An exception's type and message, on one short line."""
    spec = importlib.util.find_spec("mmengine")
    text = one_line(error)
    if spec is not None and spec.origin is not None:
        text = text.replace(str(Path(spec.origin).parents[1]), "site-packages")
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
