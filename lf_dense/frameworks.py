"""The OpenMMLab frameworks that a config may belong to: finding configs, and saying what is missing.

Upstream's releases and the maintained ``onedl-*`` forks share import names, so everything here looks for
modules.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hub import get_config

from .errors import UsageError, reason_of
from .files import PACKAGED

SPLITS = ("train", "val", "test")


class Framework(NamedTuple):
    """One framework; ``scope`` is its import name and registry scope."""

    scope: str
    fork: str
    upstream: str
    visualization_hook: str

    @property
    def installed(self) -> bool:
        return find_spec(self.scope) is not None

    @property
    def how_to_install(self) -> str:
        return (
            f"it needs {self.scope}, which is not installed: pip install {self.fork} "
            f"(or {self.upstream}, with the mmcv that it asks for), or pip install 'lf_dense[{self.scope}]'."
        )


FRAMEWORKS = {
    framework.scope: framework
    for framework in (
        Framework("mmdet", "onedl-mmdetection", "mmdet", "DetVisualizationHook"),
        Framework("mmseg", "onedl-mmsegmentation", "mmsegmentation", "SegVisualizationHook"),
        Framework("mmpretrain", "onedl-mmpretrain", "mmpretrain", "VisualizationHook"),
    )
}


def align_config_names() -> None:
    """Let ``mmseg::...`` resolve under the fork, and ``lf_dense::...`` at all: mmengine knows neither."""
    MODULE2PACKAGE.setdefault("lf_dense", "lf_dense")
    try:
        metadata.distribution("mmsegmentation")
    except metadata.PackageNotFoundError:
        MODULE2PACKAGE["mmseg"] = "mmseg"


def type_name(settings: dict[str, Any] | None) -> str:
    """A component's name without its scope; pure Python configs have a class in the place of a string."""
    kind = (settings or {}).get("type") or ""
    return (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]


def load_config(name: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config by path or by a packaged name.

    Names are ``mmdet::retinanet/retinanet_r50_fpn_1x_coco.py`` and the like; ours are ``lf_dense::...``.

    Args:
        name: path or packaged name.
        options: overrides by dotted key. ``data_root`` moves every path of the config that lies under its
            data root, which setting the plain key would not do.

    Raises:
        UsageError: the file or name does not exist, is no config, or needs a framework that is not installed.
    """
    scope, packaged, path = name.partition("::")
    if packaged and scope == "lf_dense":
        packaged, name = "", str(PACKAGED / "configs" / path)
    if packaged and scope not in FRAMEWORKS:
        known = ", ".join(["lf_dense", *FRAMEWORKS])
        raise UsageError(f"the config {name!r} names a package that is none of {known}.")
    if packaged and not FRAMEWORKS[scope].installed:
        raise UsageError(f"the config {name!r} cannot be read: {FRAMEWORKS[scope].how_to_install}")
    if not packaged and not Path(name).is_file():
        raise UsageError(
            f"the config {name!r} is not there: give the path of a file or a packaged name like mmdet::..."
        )
    try:
        config = get_config(name) if packaged else Config.fromfile(name)
    except Exception as error:  # a config is Python, and fails in every way there is
        for framework in FRAMEWORKS.values():
            if not framework.installed and framework.scope in str(error):
                raise UsageError(f"the config {name!r} cannot be read: {framework.how_to_install}") from error
        reason = f"{type(error).__name__}: {reason_of(error)[:300]}"
        raise UsageError(
            f"the config {name!r} cannot be read: {reason} (--traceback shows where)."
        ) from error
    # Those of headless models name no scope, and their package is one.
    if packaged and config.get("default_scope") is None:
        config.default_scope = scope
    override_config(config, options)
    return config


def override_config(config: Config, options: dict[str, Any] | None) -> None:
    """Apply ``load_config``'s ``options`` to a config.

    Raises:
        UsageError: an option has no place in it.
    """
    options = dict(options or {})
    data_root = options.pop("data_root", None)
    try:
        config.merge_from_dict(options)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise UsageError(f"--cfg-options do not fit the config: {reason_of(error)}.") from error
    if data_root is not None:
        move_data_root(config, data_root)


def framework_of(config: Config) -> Framework:
    """The framework that a config's ``default_scope`` names.

    Raises:
        UsageError: no known scope, or the framework is not installed.
    """
    scope = config.get("default_scope")
    if scope not in FRAMEWORKS:
        raise UsageError(
            f"the config's default_scope is {scope!r}: set it to one of {', '.join(FRAMEWORKS)}, which it "
            "trains with."
        )
    framework = FRAMEWORKS[scope]
    if not framework.installed:
        raise UsageError(f"the config {config.filename} cannot be run: {framework.how_to_install}")
    return framework


def datasets_of(config: Config, splits: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """The innermost datasets of the dataloaders, each with its dotted key."""

    def walk(key: str, dataset: dict) -> Iterator[tuple[str, dict]]:
        if "datasets" in dataset:
            for index, inner in enumerate(dataset["datasets"]):
                yield from walk(f"{key}.datasets.{index}", inner)
        elif "dataset" in dataset:
            yield from walk(f"{key}.dataset", dataset["dataset"])
        else:
            yield key, dataset

    for split in splits:
        loader = config.get(f"{split}_dataloader")
        if loader:
            yield from walk(f"{split}_dataloader.dataset", loader["dataset"])


def move_data_root(config: Config, data_root: str) -> None:
    """Rewrite every string of the config that lies under its datasets' one data root.

    Raises:
        UsageError: the datasets have no data root, or several.
    """
    stated = (dataset.get("data_root") for _, dataset in datasets_of(config, SPLITS))
    roots = {root for root in stated if root}
    if len(roots) != 1:
        raise UsageError(
            f"data_root cannot be set as a whole, since the config's datasets have {sorted(roots) or 'none'}:"
            " set train_dataloader.dataset.data_root and its like one by one."
        )
    old = roots.pop().rstrip("/")

    def moved(value: Any) -> Any:
        if isinstance(value, dict):
            for key in value:
                value[key] = moved(value[key])
        elif isinstance(value, (list, tuple)):
            return type(value)(moved(item) for item in value)
        elif isinstance(value, str) and (value == old or value.startswith(old + "/")):
            return data_root.rstrip("/") + value[len(old) :]
        return value

    for key in list(config):
        config[key] = moved(config[key])


def _local(*parts: str) -> Path | None:
    """Join as mmengine's datasets do; None for an address of a remote store."""
    if any("://" in part for part in parts):
        return None
    return Path(*parts)


def check_data(config: Config, splits: tuple[str, ...]) -> None:
    """Make sure that what dataloaders and evaluators will read is there.

    Raises:
        UsageError: the first path that is missing, with the config's key for it.
    """

    def check(key: str, path: Path | None) -> None:
        if path is not None and not path.exists():
            raise UsageError(
                f"{path} is not there, and the config reads it ({key}): put or link the data there, "
                "or point elsewhere with --cfg-options data_root=..."
            )

    for key, dataset in datasets_of(config, splits):
        root = dataset.get("data_root") or ""
        # A set that is told nothing but its root, like mmpretrain's CIFAR10, may fetch itself into it.
        if root and (dataset.get("ann_file") or dataset.get("data_prefix")):
            check(f"{key}.data_root", _local(root))
        if isinstance(dataset.get("ann_file"), str) and dataset["ann_file"]:
            check(f"{key}.ann_file", _local(root, dataset["ann_file"]))
        prefixes = dataset.get("data_prefix") or {}
        for name, prefix in prefixes.items() if isinstance(prefixes, dict) else [("", prefixes)]:
            if isinstance(prefix, str):
                check(f"{key}.data_prefix{name and '.' + name}", _local(root, prefix))
    for split in splits:
        evaluators = config.get(f"{split}_evaluator") or []
        for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
            if isinstance(evaluator.get("ann_file"), str):
                check(f"{split}_evaluator.ann_file", _local(evaluator["ann_file"]))
