"""A detector's whole training step, by the native operators and by the reference in turn.

The tables say how long a step takes and whether the losses agree. Images and boxes are random, so no data set
is needed. The model, its losses and its optimizer are the config's own.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..backends import use_backend
from ..errors import UsageError
from ..files import write_atomically
from .options import find_device, require_mmengine
from .report import markdown_head, markdown_row
from .timing import timed

BACKENDS = ("native", "reference")
BOXES_PER_IMAGE = 8
NUM_CLASSES = 80


class Steps(NamedTuple):
    """A backend's steps: the seconds of each but the first, and the losses of each."""

    seconds: list[float]
    losses: list[dict[str, float]]


class _ConfigOption(argparse.Action):
    """mmengine's ``DictAction``, imported where the option is used: other commands run without mmengine."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        from mmengine.config import DictAction

        action = DictAction(self.option_strings, self.dest, nargs=self.nargs)
        action(parser, namespace, values, option_string)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "config",
        nargs="?",
        default="lf_dense::retinanet_lf.py",
        help="an mmdet config (default: %(default)s)",
    )
    add(
        "--shape",
        nargs=2,
        type=int,
        default=[800, 1333],
        metavar=("H", "W"),
        help="image size (default: 800 1333)",
    )
    add("--batch-size", type=int, default=1, help="images a step (default: %(default)s)")
    add(
        "--repeat",
        type=int,
        default=5,
        help="steps of each backend; the median counts (default: %(default)s)",
    )
    add("--device", help="torch device (default: mmengine's choice)")
    add("--json", help="also write the figures to this file")
    add(
        "--cfg-options",
        nargs="+",
        action=_ConfigOption,
        metavar="KEY=VALUE",
        help='override settings of the config, by dotted key; lists as key="[a,b]"',
    )


def run(args: argparse.Namespace) -> int:
    """Print the table of times and losses, and write them to ``--json``; returns 0.

    Raises:
        UsageError: the config is not a detector's, or an option cannot work.
    """
    require_mmengine("step")
    from mmengine.device import get_device

    from ..frameworks import framework_of, load_config

    if min(args.batch_size, args.repeat, *args.shape) < 1:
        raise UsageError("--batch-size, --repeat and --shape have to be at least 1.")
    device = find_device(args.device or get_device())
    config = load_config(args.config, args.cfg_options)
    if framework_of(config).scope != "mmdet":
        raise UsageError(
            f"{args.config} is not a detector's config, and the random batch is one of boxes: give an mmdet "
            "config."
        )
    from mmdet.registry import MODELS

    torch.manual_seed(0)
    model = MODELS.build(config.model).to(device).train()
    batch = random_batch(args.batch_size, tuple(args.shape))
    steps = train_in_turn(model, config.optim_wrapper, batch, args.repeat, device)
    figures = {
        "device": str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": args.shape,
        "batch_size": args.batch_size,
        "seconds": {name: statistics.median(found.seconds) for name, found in steps.items()},
        "first_losses": {name: found.losses[0] for name, found in steps.items()},
        "last_losses": {name: found.losses[-1] for name, found in steps.items()},
    }
    size = " x ".join(map(str, (args.batch_size, 3, *args.shape)))
    print(f"torch {torch.__version__}, {device}, {figures['threads']} threads, {size}")
    columns = ["backend", "median s", "min s", "max s", "first step's losses", "last step's losses"]
    print(markdown_head(columns))
    for name, found in steps.items():
        spread = [f"{function(found.seconds):.3f}" for function in (statistics.median, min, max)]
        losses = [
            ", ".join(f"{key} {value:.6f}" for key, value in found.losses[index].items()) for index in (0, -1)
        ]
        print(markdown_row([name, *spread, *losses]))
    if args.json:
        write_atomically(args.json, json.dumps(figures, indent=2).encode())
    return 0


def random_batch(batch_size: int, shape: tuple[int, ...], with_mask: bool = False) -> dict[str, Any]:
    """Return images and boxes, and masks if asked for, as mmdet's data loaders hand them over."""
    from mmdet.testing import demo_mm_inputs

    images, boxes = [(3, *shape)] * batch_size, [BOXES_PER_IMAGE] * batch_size
    batch: dict[str, Any] = demo_mm_inputs(batch_size, images, boxes, NUM_CLASSES, with_mask=with_mask)
    return batch


def train_in_turn(
    model: nn.Module, optim_wrapper: dict[str, Any], batch: dict[str, Any], repeats: int, device: torch.device
) -> dict[str, Steps]:
    """Train two copies of a model on one batch, each by one backend; the first step of each is not timed."""
    from mmengine.optim import build_optim_wrapper

    # The weights are the same at the first step; from the second on they part by rounding.
    models: dict[str, Any] = {"native": model, "reference": copy.deepcopy(model)}
    optimizers = {name: build_optim_wrapper(copied, optim_wrapper) for name, copied in models.items()}
    steps = {name: Steps([], []) for name in BACKENDS}
    for turn in range(repeats + 1):
        for name in BACKENDS:
            # The same drop path for both.
            torch.manual_seed(turn)
            train_step = functools.partial(models[name].train_step, copy.deepcopy(batch), optimizers[name])
            with use_backend(name):
                seconds, losses = timed(train_step, device)
            steps[name].losses.append({key: float(value) for key, value in losses.items()})
            if turn > 0:
                steps[name].seconds.append(seconds)
    return steps
