"""Time of the backbone's forward pass and of the operators in it, beside other backbones in one process."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Mapping
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ..errors import UsageError
from ..presets import ARCHS
from .candidates import BACKBONES
from .options import MIN_SIDE, find_device, positive_int, require_mmengine
from .report import markdown_head, markdown_row
from .timing import take_turns, timed

NUM_OPERATORS_SHOWN = 14


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--arch", choices=list(ARCHS), default="tiny", help="preset (default: %(default)s)")
    add(
        "--shape",
        nargs=2,
        type=positive_int,
        default=[800, 1333],
        metavar=("H", "W"),
        help="input size (default: 800 1333)",
    )
    add("--repeat", type=positive_int, default=7, help="rounds; the median counts (default: %(default)s)")
    add(
        "--peers",
        action="store_true",
        dest="other_backbones",
        help="also time PVTv2-B1, Swin-T and ResNet-50 (needs mmdet)",
    )
    add("--device", help="torch device (default: mmengine's choice)")


def run(args: argparse.Namespace) -> int:
    """Print a table of backbones' times, and one of the operators inside ours; returns 0.

    Raises:
        UsageError: an option cannot work, or a framework that it needs is missing.
    """
    require_mmengine("backbone")
    from mmengine.device import get_device

    from ..laplacianformer import LaplacianFormer

    height, width = args.shape
    if min(args.shape) < MIN_SIDE:
        raise UsageError(f"--shape {height} {width} is too small: use at least {MIN_SIDE} {MIN_SIDE}.")
    device = find_device(args.device or get_device())
    models: dict[str, nn.Module] = {f"LaplacianFormer-{args.arch}": LaplacianFormer(args.arch)}
    if args.other_backbones:
        models.update(build_other_backbones())
    image = torch.randn(1, 3, height, width, device=device)
    for model in models.values():
        # Some of mmdet's backbones return nothing from eval().
        model.eval()
        model.to(device)
    times = time_models(models, image, args.repeat)
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, 1 x 3 x {height} x {width}"
    )
    print(markdown_head(["backbone", "median s", "min s", "max s"]))
    for name, found in times.items():
        spread = [f"{function(found):.3f}" for function in (statistics.median, min, max)]
        print(markdown_row([name, *spread]))
    print(f"\n{profile_table(next(iter(models.values())), image)}")
    return 0


def build_other_backbones() -> dict[str, nn.Module]:
    """Build mmdet's backbones of about the size of tiny.

    Raises:
        UsageError: mmdet is not installed.
    """
    if find_spec("mmdet") is None:
        from ..frameworks import FRAMEWORKS

        raise UsageError(f"--peers cannot be used: {FRAMEWORKS['mmdet'].how_to_install}")
    others = (BACKBONES[name] for name in ("pvtv2-b1", "swin-t", "resnet-50"))
    return {other.label: other.build() for other in others}


@torch.no_grad()
def time_models(models: Mapping[str, nn.Module], image: Tensor, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each model's forward passes, taken in turn after one pass that does not count."""
    times: dict[str, list[float]] = {name: [] for name in models}

    def take_turn(name: str) -> float:
        seconds, _ = timed(functools.partial(models[name], image), image.device)
        times[name].append(seconds)
        return seconds

    for model in models.values():
        model(image)
    take_turns([functools.partial(take_turn, name) for name in models], repeats)
    return times


@torch.no_grad()
def profile_table(model: nn.Module, image: Tensor) -> str:
    """Profile one forward pass and return the table of the operators that take most of it."""
    on_cuda = image.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        model(image)
    time_of = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    rows = [(getattr(event, time_of), event.key, event.count) for event in profiler.key_averages()]
    total = sum(spent for spent, _, _ in rows)
    lines = [markdown_head(["operator", "calls", "ms", "share"])]
    for spent, name, count in sorted(rows, reverse=True)[:NUM_OPERATORS_SHOWN]:
        lines.append(markdown_row([f"`{name}`", count, f"{spent / 1e3:.1f}", f"{spent / total:.1%}"]))
    return "\n".join(lines)
