"""A survey of packaged configs: which take a LaplacianFormer, which refuse it, and why."""

from __future__ import annotations

import fnmatch
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..errors import UsageError
from ..frameworks import load_config, type_name
from .backbone import swap_backbone
from .errors import SwapError
from .rows import (
    BUILT,
    FAILED,
    NO_BASELINE,
    NO_MODEL,
    REFUSED,
    SWAPPED,
    ConfigName,
    Finding,
    Row,
    first_line,
    read_rows,
    write_rows,
)
from .samples import build_model, try_sizes
from .settings import adopt_scope, as_list, backbone_of, heads_of
from .workers import check_in_processes

PACKAGES = ("mmdet", "mmseg", "mmpretrain")
SAVE_EVERY = 20


def config_folder(package: str) -> Path:
    """Where an installed package keeps its configs.

    Raises:
        UsageError: the package is not installed.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UsageError(
            f"{package} is not installed, so its configs cannot be checked: leave it out of --packages."
        )
    return Path(spec.origin).parent / ".mim" / "configs"


def packaged_configs(package: str) -> list[str]:
    """Paths of a package's configs, without those that are only parts of others."""
    root = config_folder(package)
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(str(path) for path in paths if "_base_" not in path.parts and path.name != "__init__.py")


def select_configs(
    packages: Iterable[str], patterns: Sequence[str] | None = None, single: bool = False
) -> list[ConfigName]:
    """The configs that a survey goes through.

    Args:
        packages: whose configs.
        patterns: shell patterns; a config's path has to match one of them.
        single: keep one config for every combination of model, neck and heads.

    Raises:
        UsageError: a package is not installed, or no config is left.
    """
    names = [(package, config) for package in packages for config in packaged_configs(package)]
    if patterns:
        names = [name for name in names if any(fnmatch.fnmatch(name[1], pattern) for pattern in patterns)]
    if single:
        names = one_per_model(names)
    if not names:
        raise UsageError("no config is left to check: look at --packages and --only.")
    return names


def one_per_model(names: Iterable[ConfigName]) -> list[ConfigName]:
    """The first config of every combination of model, neck and head types."""
    chosen: dict[tuple[str, ...], ConfigName] = {}
    for package, name in names:
        try:
            model = load_config(str(config_folder(package) / name)).get("model")
        except UsageError:
            continue
        if isinstance(model, dict):
            necks = [type_name(neck) for neck in as_list(model.get("neck"))]
            heads = sorted(type_name(head) for head in heads_of(model))
            chosen.setdefault((package, type_name(model), *necks, *heads), (package, name))
    return list(chosen.values())


class SwapCheck:
    """Checks one config after another; configs that come to the same new model run it once."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self._built: set[str] = set()
        self._ran: dict[str, Finding] = {}

    def __call__(self, package: str, name: str) -> Finding:
        try:
            config = load_config(str(config_folder(package) / name))
        except Exception as error:
            return Finding(NO_BASELINE, first_line(error))
        adopt_scope(config, package)
        if not isinstance(config.get("model"), dict):
            return Finding(NO_MODEL)
        model = _describe(config.model)
        obstacle = self._obstacle(config)
        if obstacle:
            return Finding(NO_BASELINE, obstacle, model)
        try:
            swapped = swap_backbone(config, self.arch)
        except SwapError as refusal:
            return Finding(REFUSED, str(refusal), model)
        # The swapped config has to survive being written down and read again.
        again = type(swapped).fromstring(swapped.dump(), ".py")
        key = _model_key(again)
        if key not in self._ran:
            self._ran[key] = _run_both(config, again)
        return self._ran[key]._replace(model=model)

    def _obstacle(self, config: Config) -> str:
        """Why a config does not build as it is, and whether its backbone can be swapped.

        Empty where it builds.
        """
        key = _model_key(config)
        if key in self._built:
            return ""
        try:
            build_model(config)
        except Exception as error:
            reason = first_line(error)
        else:
            self._built.add(key)
            return ""
        try:
            swap_backbone(config, self.arch)
        except SwapError as refusal:
            return f"{reason}; the swap refuses it as well: {refusal}"
        return f"{reason}; its backbone can be swapped"


def _model_key(config: Config) -> str:
    return repr((config.model, config.get("data_preprocessor")))


def _describe(model: dict[str, Any]) -> str:
    """The types of a model and its backbone."""
    names = (type_name(model), type_name(backbone_of(model)))
    return ", ".join(name for name in names if name)


def _run_both(config: Config, swapped: Config) -> Finding:
    """Loss and prediction of the swapped config; the original shows whether a failure is the swap's."""
    built = build_model(swapped)
    built.init_weights()
    original = None
    notes: list[str] = []
    for mode in ("loss", "predict"):
        error = try_sizes(built, swapped, mode)
        if error is None:
            continue
        if original is None:
            original = build_model(config)
            original.init_weights()
        same = try_sizes(original, config, mode)
        if same is None:
            return Finding(FAILED, f"{mode}: {first_line(error)}")
        notes.append(f"no {mode}, nor in the original ({first_line(same)})")
    return Finding(BUILT if len(notes) == 2 else SWAPPED, "; ".join(notes))


def survey(
    names: Sequence[ConfigName],
    arch: str,
    workers: int,
    timeout: float,
    memory_gib: float,
    log: Path | None = None,
    tell: Callable[[str], None] = print,
) -> list[Row]:
    """Check configs, and return a row for each, in order.

    Args:
        names: the configs.
        arch: the preset that replaces their backbones.
        workers, timeout, memory_gib: as in ``check_in_processes``.
        log: JSON file that keeps the rows. Configs that it has already are not checked again.
        tell: gets a line of progress after each config.

    Raises:
        UsageError: the log is no file of results, or a process does not start.
    """
    rows = {row.name: row for row in read_rows(log)} if log and log.is_file() else {}
    missing = [name for name in names if name not in rows]
    try:
        for row in check_in_processes(missing, partial(SwapCheck, arch), workers, timeout, memory_gib):
            rows[row.name] = row
            done = sum(name in rows for name in names)
            tell(f"{done}/{len(names)} {row.package}::{row.config} {row.outcome} {row.detail[:120]}")
            if log and done % SAVE_EVERY == 0:
                write_rows(log, rows.values())
    finally:
        if log:
            write_rows(log, rows.values())
    return [rows[name] for name in names]
