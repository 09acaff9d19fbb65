"""Where the time of a backbone's forward pass goes, and how it compares with peers in the same process."""

from __future__ import annotations

import argparse
import functools
import statistics

import torch
from mmengine.device import get_device
from torch import nn
from torch.profiler import ProfilerActivity, profile

from lf_dense import LaplacianFormer
from lf_dense.benchmark.timing import timed
from lf_dense.presets import ARCHS


def build_peers() -> dict[str, nn.Module]:
    """mmdet's backbones of about the same size."""
    from mmdet.models.backbones import PyramidVisionTransformerV2, ResNet, SwinTransformer

    return {
        "PVTv2-B1": PyramidVisionTransformerV2(embed_dims=64, num_layers=[2, 2, 2, 2]),
        "Swin-T": SwinTransformer(),
        "ResNet-50": ResNet(50),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--arch", choices=list(ARCHS), default="tiny", help="preset")
    parser.add_argument(
        "--shape", nargs=2, type=int, default=[800, 1333], metavar=("H", "W"), help="input size"
    )
    parser.add_argument("--repeat", type=int, default=7, help="rounds; the median counts")
    parser.add_argument(
        "--peers", action="store_true", help="also time PVTv2-B1, Swin-T and ResNet-50 (needs mmdet)"
    )
    parser.add_argument("--device", default=get_device(), help="torch device")
    args = parser.parse_args()
    image = torch.randn(1, 3, *args.shape, device=args.device)
    models = {
        f"LaplacianFormer-{args.arch}": LaplacianFormer(args.arch),
        **(build_peers() if args.peers else {}),
    }
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        # Some of mmdet's backbones return nothing from eval().
        model.eval()
        model.to(args.device)(image)
    # In turn, so that a machine that slows down slows all of them.
    for _ in range(args.repeat):
        for name, model in models.items():
            times[name].append(timed(functools.partial(model, image), args.device)[0])
    print(
        f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, 1 x 3 x"
        f" {args.shape[0]} x {args.shape[1]}"
    )
    print("| backbone | median s | min s | max s |\n|---|---|---|---|")
    for name, found in times.items():
        print(f"| {name} | {statistics.median(found):.3f} | {min(found):.3f} | {max(found):.3f} |")

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if args.device.startswith("cuda") else [])
    with profile(activities=activities) as profiler:
        next(iter(models.values()))(image)
    on_device = "device" if args.device.startswith("cuda") else "cpu"
    rows = [
        (getattr(event, f"self_{on_device}_time_total"), event.key, event.count)
        for event in profiler.key_averages()
    ]
    total = sum(row[0] for row in rows)
    print("\n| operator | calls | ms | share |\n|---|---|---|---|")
    for spent, name, count in sorted(rows, reverse=True)[:14]:
        print(f"| `{name}` | {count} | {spent / 1e3:.1f} | {spent / total:.1%} |")


if __name__ == "__main__":
    main()
