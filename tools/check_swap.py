"""Put a LaplacianFormer into every config that ships in the installed mm packages, build each, and run it.

For every config: does it build on its own? If so, swap the backbone, build that, and run a loss and a
prediction on a made-up sample. Configs that come to one and the same new model are run once. The table says
swapped, refused (with the reason) or failed, and any failure ends in exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import gc
import importlib.util
import io
import itertools
import json
import logging
import os
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lf_dense.errors import UsageError, run_tool, tool_parser
from lf_dense.files import write_atomically

PACKAGES = ("mmdet", "mmseg", "mmpretrain")
# Pixels: small first; models that select hundreds of tokens, or pool with large windows, need more of them.
SIZES = (128, 320)
SAVE_EVERY = 20
SWAPPED, BUILT, REFUSED, FAILED, NO_BASELINE, NO_MODEL = (
    "swapped",
    "built",
    "refused",
    "failed",
    "does not build on its own",
    "has no model",
)


def config_folder(package: str) -> Path:
    """Where an installed package keeps its configs."""
    return Path(importlib.util.find_spec(package).origin).parent / ".mim" / "configs"


def packaged_configs(package: str) -> list[str]:
    """Paths, below the package's configs, of all that are no bases."""
    root = config_folder(package)
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    return sorted(str(path) for path in paths if "_base_" not in path.parts and path.name != "__init__.py")


def first_line(error: BaseException) -> str:
    """An exception's type and message, on one short line."""
    site = str(Path(importlib.util.find_spec("mmengine").origin).parents[1])
    text = " ".join(str(error).split()).replace(site, "site-packages")
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


class OutOfTime(BaseException):
    """Past the time limit; no handler of errors on the way stops it."""


class Worker:
    """What runs in each process: one config after another, with results of models that were seen before."""

    def __init__(self, arch: str, timeout: int, memory_gib: float) -> None:
        warnings.filterwarnings("ignore")
        limit = int(memory_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        import torch

        torch.set_num_threads(1)
        self.arch, self.timeout = arch, timeout
        # Many configs differ in their old backbone alone: one and the same new model is run once.
        self.built: set[str] = set()
        self.seen: dict[str, tuple[str, str]] = {}
        signal.signal(signal.SIGALRM, self._alarm)

    @staticmethod
    def _alarm(*_: Any) -> None:
        raise OutOfTime("took longer than the time limit")

    def check(self, package: str, name: str) -> dict[str, str]:
        """Outcome and detail of one config, as strings."""
        logging.disable(logging.CRITICAL)
        started = time.monotonic()
        signal.alarm(self.timeout)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                outcome, detail, model = self._check(package, name)
        except (Exception, OutOfTime) as error:  # the table has to have a line for whatever happens
            outcome, detail, model = FAILED, first_line(error), ""
        finally:
            signal.alarm(0)
            gc.collect()
        return {
            "package": package,
            "config": name,
            "model": model,
            "outcome": outcome,
            "detail": detail,
            "seconds": f"{time.monotonic() - started:.1f}",
        }

    def _check(self, package: str, name: str) -> tuple[str, str, str]:
        from lf_dense.frameworks import load_config, type_name
        from lf_dense.swap.backbone import swap_backbone
        from lf_dense.swap.rewiring import SwapError

        try:
            config = load_config(str(config_folder(package) / name))
        except Exception as error:
            return NO_BASELINE, first_line(error), ""
        if not isinstance(config.get("model"), dict):
            return NO_MODEL, "", ""
        model = (
            f"{type_name(config.model)},"
            f" {type_name(config.model.get('backbone') or (config.model.get('detector') or {}).get('backbone'))}"
        )
        key = repr((config.model, config.get("data_preprocessor")))
        try:
            if key not in self.built:
                build_model(config)
            self.built.add(key)
        except Exception as error:
            try:
                swap_backbone(config, self.arch)
            except SwapError as refusal:
                return NO_BASELINE, f"{first_line(error)}; the swap refuses it as well: {refusal}", model
            return NO_BASELINE, f"{first_line(error)}; its backbone can be swapped", model
        try:
            swapped = swap_backbone(config, self.arch)
        except SwapError as error:
            return REFUSED, str(error), model
        # The swapped config has to survive being written down and read again.
        again = type(swapped).fromstring(swapped.dump(), ".py")
        key = repr((again.model, again.get("data_preprocessor")))
        if key not in self.seen:
            self.seen[key] = self._run(config, again)
        return (*self.seen[key], model)

    @staticmethod
    def _run(config: Any, swapped: Any) -> tuple[str, str]:
        """Loss and prediction of the swapped config; where one fails, the original says whose fault it is."""
        built = build_model(swapped)
        built.init_weights()
        notes, runs, original = [], 0, None
        for mode in ("loss", "predict"):
            error = try_sizes(built, swapped, mode)
            if error is None:
                runs += 1
                continue
            if original is None:
                original = build_model(config)
                original.init_weights()
            same = try_sizes(original, config, mode)
            if same is None:
                return FAILED, f"{mode}: {first_line(error)}"
            notes.append(f"no {mode}, nor in the original ({first_line(same)})")
        return SWAPPED if runs else BUILT, "; ".join(notes)


def try_sizes(model: Any, config: Any, mode: str) -> Exception | None:
    """Run a model on made-up images, larger ones where it does not take small ones, masks or none; the last error, or None."""
    error = None
    for size, masks in itertools.product(SIZES, (True, False)):
        try:
            run_model(model, config, mode, size, masks)
        except Exception as problem:
            error = problem
        else:
            return None
    return error


def build_model(config: Any) -> Any:
    """A config's model, without any weights fetched, on the CPU."""
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    from lf_dense.swap.rewiring import nested, without_pretrained

    init_default_scope(config.get("default_scope"))
    settings = without_pretrained(copy.deepcopy(config.model))
    if config.get("data_preprocessor") and "data_preprocessor" not in settings:
        settings["data_preprocessor"] = copy.deepcopy(config.data_preprocessor)
    # Small images stay small: recipes pad to their crop, or resize batches.
    if config.default_scope == "mmseg":
        settings["data_preprocessor"].update(size=None, size_divisor=1, test_cfg=None)
    elif settings.get("data_preprocessor"):
        settings["data_preprocessor"].pop("batch_augments", None)
    # Thousands of regions in a small image are nothing but time.
    for part in nested([settings.get("train_cfg"), settings.get("test_cfg")]):
        for key, most in (("nms_pre", 200), ("max_per_img", 100)):
            if isinstance(part.get(key), int):
                part[key] = min(part[key], most)
    return revert_sync_batchnorm(MODELS.build(settings))


def run_model(model: Any, config: Any, mode: str, size: int, masks: bool) -> None:
    """One loss or prediction on a made-up sample of ``size`` pixels; every number that comes out has to be finite.

    Raises:
        ValueError: a loss that is not finite.
    """
    import torch
    from mmengine.logging import MessageHub

    torch.manual_seed(0)
    # What a runner would keep there, and some heads ask for.
    MessageHub.get_current_instance().update_info_dict(
        {"iter": 0, "epoch": 0, "max_iters": 10, "max_epochs": 1}
    )
    training = mode == "loss"
    model.train(training)
    model.zero_grad()
    data = made_up_data(config, training, size, masks)
    data = (
        model.data_preprocessor(data, training)
        if "multi" not in data
        else model.data_preprocessor(data["multi"], training)
    )
    with torch.set_grad_enabled(training):
        result = model(**data, mode=mode)
    if training:
        total, _ = model.parse_losses(result)
        if not torch.isfinite(total):
            raise ValueError(f"the loss is {total.item()}")
        total.backward()
        backbone = (
            model.backbone
            if hasattr(model, "backbone")
            else getattr(model, "detector", getattr(model, "student", None)).backbone
        )
        if not any(p.grad is not None and p.grad.abs().sum() > 0 for p in backbone.parameters()):
            raise ValueError("no gradient reaches the backbone")


def _classes(settings: Any) -> int:
    """The smallest number of classes that any head states, so that every label fits each."""
    found = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                if key in ("num_classes", "num_things_classes") and isinstance(item, int) and item > 0:
                    found.append(item)
                walk(item)
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        elif hasattr(value, "items"):
            walk(dict(value))

    walk(settings)
    return min(found, default=1)


def made_up_data(config: Any, training: bool, size: int, masks: bool) -> dict[str, Any]:
    """A batch for the model of a config: two images with boxes, masks, tracks, label maps or labels in training, one in prediction."""
    if config.default_scope == "mmseg":
        return _segmentation_data(config, training, size)
    if config.default_scope == "mmpretrain":
        return _classification_data(config, training)
    return _detection_data(config, training, size, masks)


def _segmentation_data(config: Any, training: bool, size: int) -> dict[str, Any]:
    import torch
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    heads = config.model.decode_head
    head = heads[-1] if isinstance(heads, (list, tuple)) else heads
    channels = len(
        (config.model.get("data_preprocessor") or {}).get("mean")
        or [0] * config.model.backbone.get("in_channels", 3)
    )
    inputs, samples = [], []
    for _ in range(2 if training else 1):
        inputs.append(torch.randint(0, 256, (channels, size, size), dtype=torch.uint8))
        meta = {
            "img_shape": (size, size),
            "ori_shape": (size, size),
            "pad_shape": (size, size),
            "scale_factor": 1.0,
            "flip": False,
        }
        sample = SegDataSample(metainfo=meta)
        labels = torch.randint(0, max(2, _classes(head)), (1, size, size))
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return {"inputs": inputs, "data_samples": samples}


def _classification_data(config: Any, training: bool) -> dict[str, Any]:
    import torch
    from mmpretrain.structures import DataSample

    classes = _classes(config.model.get("head"))
    inputs = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    samples = [DataSample().set_gt_label(int(torch.randint(0, classes, ()))) for _ in range(2)]
    return {"inputs": inputs, "data_samples": samples}


def _boxes(count: int, size: int) -> Any:
    import torch

    corner = torch.rand(count, 2) * size * 0.5
    return torch.cat([corner, corner + size * (0.15 + 0.3 * torch.rand(count, 2))], 1)


def _instances(classes: int, size: int, with_masks: bool) -> Any:
    import numpy as np
    import torch
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    boxes = _boxes(4, size)
    instances = InstanceData(
        bboxes=boxes, labels=torch.randint(0, classes, (len(boxes),)), instances_ids=torch.arange(len(boxes))
    )
    if with_masks:
        masks = np.zeros((len(boxes), size, size), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
            mask[y1:y2, x1:x2] = 1
        instances.masks = BitmapMasks(masks, size, size)
    return instances


def _detection_sample(config: Any, classes: int, size: int, with_masks: bool, frame: int) -> Any:
    import numpy as np
    import torch
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData, PixelData

    from lf_dense.frameworks import type_name

    meta = {
        "img_id": frame,
        "img_path": "made_up.png",
        "img_shape": (size, size),
        "ori_shape": (size, size),
        "pad_shape": (size, size),
        "batch_input_shape": (size, size),
        "scale_factor": (1.0, 1.0),
        "flip": False,
        "flip_direction": None,
        "border": [0, size, 0, size],
        "frame_id": frame,
        "ori_video_length": 2,
        "homography_matrix": np.eye(3, dtype=np.float32),
    }
    sample = DetDataSample(metainfo=meta)
    sample.gt_instances = _instances(classes, size, with_masks)
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    # HTC's semantic branch learns from maps of an eighth of the size, the panoptic heads from whole ones.
    scale = 8 if type_name(config.model) in ("HybridTaskCascade", "SCNet") else 1
    stuff = torch.randint(0, min(classes, 255), (1, size // scale, size // scale), dtype=torch.uint8)
    sample.gt_sem_seg = PixelData(sem_seg=stuff)
    if type_name(config.model) == "FastRCNN":
        sample.proposals = InstanceData(
            bboxes=_boxes(20, size), scores=torch.rand(20), labels=torch.zeros(20, dtype=torch.long)
        )
    return sample


def _detection_data(config: Any, training: bool, size: int, with_masks: bool) -> dict[str, Any]:
    import torch
    from mmdet.structures import ReIDDataSample, TrackDataSample

    from lf_dense.frameworks import type_name

    model = config.model
    classes = _classes(without_others(model))
    kind = type_name(model)
    preprocessor = type_name(model.get("data_preprocessor"))

    def image(*batch: int) -> Any:
        return torch.randint(0, 256, (*batch, 3, size, size), dtype=torch.uint8)

    if preprocessor == "ReIDDataPreprocessor" or kind == "BaseReID":
        samples = [ReIDDataSample().set_gt_label(index % 2) for index in range(4)]
        return {
            "inputs": [torch.randint(0, 256, (3, 256, 128), dtype=torch.uint8) for _ in range(4)],
            "data_samples": samples,
        }
    if preprocessor == "TrackDataPreprocessor":
        frames = [_detection_sample(config, classes, size, with_masks, frame) for frame in range(2)]
        sample = TrackDataSample()
        sample.video_data_samples = frames
        sample.set_metainfo({"key_frames_inds": [0], "ref_frames_inds": [1], "ori_video_length": 2})
        return {"inputs": [image(2)], "data_samples": [sample]}
    count = 2 if training else 1
    samples = [_detection_sample(config, classes, size, with_masks, index) for index in range(count)]
    data = {"inputs": [image() for _ in range(count)], "data_samples": samples}
    if preprocessor == "MultiBranchDataPreprocessor" and training:
        branches = ("sup", "unsup_teacher", "unsup_student")
        return {
            "multi": {
                "inputs": dict.fromkeys(branches, data["inputs"]),
                "data_samples": {branch: copy.deepcopy(samples) for branch in branches},
            }
        }
    return data


def without_others(model: Any) -> dict[str, Any]:
    """A model's settings without parts whose classes are not its own (a teacher, a re-identification model)."""
    return {key: value for key, value in model.items() if not key.startswith(("teacher", "reid"))}


_worker: Worker | None = None


def _start(*arguments: Any) -> None:
    global _worker
    os.environ["OMP_NUM_THREADS"] = "1"
    _worker = Worker(*arguments)


def _check(package: str, name: str) -> dict[str, str]:
    return _worker.check(package, name)


def check_all(
    configs: list[tuple[str, str]], workers: int, arch: str, timeout: int, memory_gib: float, log: Path | None
) -> list[dict[str, str]]:
    """Check configs in a pool of processes that are replaced every few configs; a process that dies costs its config alone.

    ``log`` gets the results so far every now and then, and what it has already is not done again.
    """
    results: dict[tuple[str, str], dict[str, str]] = {}
    if log and log.is_file():
        results = {(line["package"], line["config"]): line for line in json.loads(log.read_text())}
    remaining = [item for item in configs if item not in results]
    careful = False
    while remaining:
        # After a death nobody knows whose it was: those that were under way go on one at a time.
        batch, size = (remaining[: 2 * workers], 1) if careful else (remaining, workers)
        pool = ProcessPoolExecutor(
            size,
            get_context("spawn"),
            _start,
            (arch, timeout, memory_gib),
            max_tasks_per_child=None if careful else 200,
        )
        try:
            waiting = iter(batch)
            futures = {}
            for _ in range(1 if careful else 2 * size):
                if (item := next(waiting, None)) is not None:
                    futures[pool.submit(_check, *item)] = item
            while futures:
                done, _ = wait(futures, return_when=FIRST_COMPLETED)
                for future in done:
                    item = futures.pop(future)
                    try:
                        results[item] = future.result()
                    except BrokenProcessPool:
                        if careful:
                            results[item] = dict(
                                zip(
                                    ("package", "config", "model", "outcome", "detail", "seconds"),
                                    (*item, "", FAILED, "its process died (out of memory, or a crash)", ""),
                                )
                            )
                        raise
                    line = results[item]
                    print(
                        f"{len(results)}/{len(configs)} {line['package']}::{line['config']} {line['outcome']}"
                        f" {line['detail'][:120]}",
                        flush=True,
                    )
                    if log and len(results) % SAVE_EVERY == 0:
                        write_atomically(log, json.dumps(list(results.values()), indent=1).encode())
                    if (following := next(waiting, None)) is not None:
                        futures[pool.submit(_check, *following)] = following
            careful = False
        except BrokenProcessPool:
            careful = True
        finally:
            pool.shutdown(cancel_futures=True)
        remaining = [item for item in remaining if item not in results]
    return [results[item] for item in configs]


def one_per_model(configs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first config of every combination of model, neck and head types."""
    from lf_dense.frameworks import load_config, type_name
    from lf_dense.swap.rewiring import as_list, heads_of

    chosen: dict[Any, tuple[str, str]] = {}
    for package, name in configs:
        try:
            model = load_config(str(config_folder(package) / name)).get("model")
        except UsageError:
            continue
        if not isinstance(model, dict):
            continue
        heads = sorted(type_name(head) for head in heads_of(model))
        kinds = (package, type_name(model), *(type_name(neck) for neck in as_list(model.get("neck"))), *heads)
        chosen.setdefault(kinds, (package, name))
    return list(chosen.values())


def summary(results: list[dict[str, str]]) -> tuple[str, bool]:
    """A few lines on each package, and whether all is as it should be."""
    lines, good = [], True
    for package in dict.fromkeys(line["package"] for line in results):
        counts = Counter(line["outcome"] for line in results if line["package"] == package)
        buildable = counts[SWAPPED] + counts[BUILT] + counts[REFUSED] + counts[FAILED]
        share = counts[SWAPPED] / buildable if buildable else 0.0
        lines.append(
            f"{package}: {counts.total()} configs, {counts[NO_MODEL]} without a model, {counts[NO_BASELINE]}"
            f" that do not build on their own here; of the other {buildable}: {counts[SWAPPED]} swapped"
            f" ({share:.1%}), {counts[BUILT]} swapped and built but not run, {counts[REFUSED]} refused,"
            f" {counts[FAILED]} failed"
        )
        good = good and counts[FAILED] == 0
    return "\n".join(lines), good


def markdown(results: list[dict[str, str]], arch: str) -> str:
    """The table for the documentation."""
    from importlib import metadata

    versions = []
    for package in dict.fromkeys(line["package"] for line in results):
        distribution = metadata.packages_distributions()[package][0]
        versions.append(f"{distribution} {metadata.version(distribution)}")
    text = [
        "# Every packaged config with a LaplacianFormer",
        "",
        (
            f"`python tools/check_swap.py --out docs/swapped_configs.md`, {time.strftime('%Y-%m-%d')},"
            f" {', '.join(versions)}, arch `{arch}`."
        ),
        (
            "Swapped: the new config was written down, read again and built, and a loss (with its gradient"
            " down to the backbone) and a prediction ran on a made-up sample. What a note names could not be"
            " run, in the original config neither."
        ),
        "",
        *(f"- {line}" for line in summary(results)[0].splitlines()),
    ]
    titles = {
        FAILED: "Failed",
        REFUSED: "Refused",
        BUILT: "Swapped and built; neither these nor their originals run here",
        SWAPPED: "Swapped",
        NO_BASELINE: "Do not build on their own here",
        NO_MODEL: "Have no model: settings of test-time augmentation and the like",
    }
    for outcome, title in titles.items():
        chosen = [line for line in results if line["outcome"] == outcome]
        if chosen:
            text += [
                "",
                f"## {title} ({len(chosen)})",
                "",
                "| config | model, old backbone | |",
                "|---|---|---|",
            ]
            text += [
                f"| {line['package']}::{line['config']} | {line['model']} |"
                f" {line['detail'].replace('|', '/')} |"
                for line in chosen
            ]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = tool_parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--packages",
        nargs="+",
        choices=PACKAGES,
        default=["mmdet", "mmseg"],
        help="whose configs (default: mmdet mmseg)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="PATTERN",
        help="configs whose path matches a shell pattern, retinanet/* for example",
    )
    parser.add_argument(
        "--one-per-model",
        action="store_true",
        help="one config for every combination of model, neck and heads",
    )
    parser.add_argument("--arch", default="tiny", help="preset to put in (default: %(default)s)")
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count(),
        help="processes, one thread each (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-gib", type=float, default=16.0, help="address space of each process (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=int, default=300, help="seconds for one config (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the table there")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE.json",
        help="keep the results there; those in it already are not done again",
    )
    args = parser.parse_args()
    for package in args.packages:
        if importlib.util.find_spec(package) is None:
            raise UsageError(
                f"{package} is not installed, so its configs cannot be checked: leave it out of --packages."
            )
    configs = [(package, name) for package in args.packages for name in packaged_configs(package)]
    if args.only:
        configs = [
            item for item in configs if any(fnmatch.fnmatch(item[1], pattern) for pattern in args.only)
        ]
    if args.one_per_model:
        configs = one_per_model(configs)
    if not configs:
        raise UsageError("no config is left to check: look at --packages and --only.")
    results = check_all(configs, args.workers, args.arch, args.timeout, args.memory_gib, args.json)
    if args.json:
        write_atomically(args.json, json.dumps(results, indent=1).encode())
    if args.out:
        write_atomically(args.out, markdown(results, args.arch).encode())
    text, good = summary(results)
    print(text)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    run_tool(main)
