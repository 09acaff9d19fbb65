"""A detector's whole training step, by the native operators and by the reference in turn: times, and whether the losses agree.

The images and boxes are random, so no data set is needed; the model, its losses and its optimizer are the
config's own.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics

import torch
from mmengine.device import get_device
from mmengine.optim import build_optim_wrapper

from lf_dense import use_backend
from lf_dense.benchmark.timing import timed
from lf_dense.errors import UsageError, run_tool, tool_parser
from lf_dense.frameworks import framework_of, load_config
from lf_dense.training import cli

BACKENDS = ("native", "reference")


def random_batch(batch_size: int, shape: tuple[int, int], num_classes: int) -> dict:
    """Images and 8 boxes each, as mmdet's data loaders hand them over."""
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(batch_size, [(3, *shape)] * batch_size, [8] * batch_size, num_classes)


def main() -> None:
    parser = tool_parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/retinanet_lf.py", help="an mmdet config")
    parser.add_argument(
        "--shape", nargs=2, type=int, default=[800, 1333], metavar=("H", "W"), help="image size"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images a step")
    parser.add_argument("--repeat", type=int, default=5, help="steps of each backend; the median counts")
    parser.add_argument("--device", default=get_device(), help="torch device")
    parser.add_argument("--json", help="also write the figures to this file")
    cli.add_config_options(parser)
    args = parser.parse_args()
    config = load_config(args.config, args.cfg_options)
    if framework_of(config).scope != "mmdet":
        raise UsageError(
            f"{args.config} is not a detector's config, and the random batch is one of boxes: give an mmdet"
            " config."
        )
    if min(args.batch_size, args.repeat, *args.shape) < 1:
        raise UsageError("--batch-size, --repeat and --shape have to be at least 1.")

    from mmdet.registry import MODELS

    torch.manual_seed(0)
    first = MODELS.build(config.model).to(args.device).train()
    # Two models with the same weights, each stepped by one backend: from the second step on they part by
    # rounding.
    models = {"native": first, "reference": copy.deepcopy(first)}
    optimizers = {name: build_optim_wrapper(model, config.optim_wrapper) for name, model in models.items()}
    data = random_batch(args.batch_size, tuple(args.shape), 80)
    times: dict[str, list[float]] = {name: [] for name in BACKENDS}
    losses: dict[str, list[dict]] = {name: [] for name in BACKENDS}
    for turn in range(args.repeat + 1):
        for name in BACKENDS:
            # The same drop path for both.
            torch.manual_seed(turn)
            train_step = functools.partial(models[name].train_step, copy.deepcopy(data), optimizers[name])
            with use_backend(name):
                spent, found = timed(train_step, args.device)
            losses[name].append({key: float(value) for key, value in found.items()})
            if turn > 0:
                times[name].append(spent)
    figures = {
        "device": args.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": args.shape,
        "batch_size": args.batch_size,
        "seconds": {name: statistics.median(found) for name, found in times.items()},
        "first_losses": {name: found[0] for name, found in losses.items()},
        "last_losses": {name: found[-1] for name, found in losses.items()},
    }
    size = " x ".join(map(str, (args.batch_size, 3, *args.shape)))
    print(f"torch {torch.__version__}, {args.device}, {figures['threads']} threads, {size}")
    print(
        "| backend | median s | min s | max s | first step's losses | last step's losses"
        " |\n|---|---|---|---|---|---|"
    )
    for name in BACKENDS:
        shown = [
            ", ".join(f"{key} {value:.6f}" for key, value in losses[name][index].items()) for index in (0, -1)
        ]
        spread = [f"{function(times[name]):.3f}" for function in (statistics.median, min, max)]
        print(f"| {' | '.join([name, *spread, *shown])} |")
    if args.json:
        with open(args.json, "w") as stream:
            json.dump(figures, stream, indent=2)


if __name__ == "__main__":
    run_tool(main)
