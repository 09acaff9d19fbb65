"""Which part of the attention is worth what: one small pyramid and recipe on real images, the attention the only difference.

    python tools/ablate.py --data imagenette2_128.tar.gz --form cpu --out work_dirs/ablation

Trains every variant with every seed, a file for each run, and writes a table and curves. Interrupted, the
same command goes on with what is missing. Needs torch, Pillow and, for the picture, matplotlib.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import platform
import statistics
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F

from lf_dense import LaplacianAttention
from lf_dense.ablation.attentions import (
    ExactLaplacianAttention,
    GaussianAttention,
    SoftmaxAttention,
    SpatialReductionAttention,
)
from lf_dense.blocks import Block, PatchEmbed, Stage, init_weights
from lf_dense.errors import UsageError
from lf_dense.files import write_atomically
from lf_dense.training.curves import save_figure

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BASELINE = "laplacian"
REDUCTIONS = (2, 1)


class Recipe(NamedTuple):
    """How every variant is trained; two stages at strides 4 and 8."""

    image_size: int
    embed_dims: tuple[int, int]
    depths: tuple[int, int]
    mlp_ratio: int
    epochs: int
    batch_size: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.15
    label_smoothing: float = 0.1
    smallest_crop: float = 0.5
    train_images: int | None = None
    val_images: int | None = None


FORMS = {
    "cpu": Recipe(image_size=56, embed_dims=(64, 128), depths=(1, 1), mlp_ratio=2, epochs=4),
    "gpu": Recipe(image_size=96, embed_dims=(64, 128), depths=(2, 2), mlp_ratio=4, epochs=12, batch_size=128),
}


class Variant(NamedTuple):
    """One attention: what makes it for a stage of some width, and what the table calls it."""

    title: str
    make: Callable[[int, int], nn.Module]


def _variant(
    title: str, attention: type[LaplacianAttention] = LaplacianAttention, **settings: Any
) -> Variant:
    return Variant(title, lambda dims, stage: attention(dims, dims // 64, **settings))


VARIANTS = {
    BASELINE: _variant("Laplacian, Nystroem, `mass`, tau 1e-2, 7 x 7 landmarks, rotary (the default)"),
    "whiten_keys": _variant("normalization `whiten_keys`", normalization="whiten_keys"),
    "whiten_landmarks": _variant("normalization `whiten_landmarks`", normalization="whiten_landmarks"),
    "tau_1e-3": _variant("tau 1e-3", tau=1e-3),
    "tau_1e-1": _variant("tau 1e-1", tau=1e-1),
    "grid_4": _variant("4 x 4 landmarks", landmark_grid=(4, 4)),
    "grid_14": _variant("14 x 14 landmarks", landmark_grid=(14, 14)),
    "no_rotary": _variant("no rotary embedding", rotary=False),
    "learned_scale": _variant("a learned kernel scale per head", learn_kernel_scale=True),
    "exact": _variant("exact N x N Laplacian smoother", ExactLaplacianAttention),
    "gaussian": _variant("Gaussian kernel (SOFT's), the same Nystroem form", GaussianAttention),
    "gaussian_learned_scale": _variant(
        "Gaussian kernel, a learned scale per head", GaussianAttention, learn_kernel_scale=True
    ),
    "softmax": _variant("full softmax", SoftmaxAttention),
    "spatial_reduction": Variant(
        "PVTv2's spatial-reduction softmax",
        lambda dims, stage: SpatialReductionAttention(dims, dims // 64, REDUCTIONS[stage]),
    ),
}


def build_model(variant: Variant, recipe: Recipe, num_classes: int) -> nn.Module:
    """The pyramid with one variant's attention: images ``(B, 3, H, W)`` to logits ``(B, num_classes)``."""
    stages, channels = [], 3
    for index, (dims, depth) in enumerate(zip(recipe.embed_dims, recipe.depths)):
        blocks = [Block(dims, recipe.mlp_ratio, variant.make(dims, index)) for _ in range(depth)]
        patch_embed = PatchEmbed(channels, dims, kernel_size=3 if index else 7, stride=2 if index else 4)
        stages.append(Stage(patch_embed, blocks, dims))
        channels = dims
    model = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    init_weights(model)
    return model


class Images(NamedTuple):
    """One split: uint8 images ``(n, 3, S, S)`` and their classes ``(n,)``."""

    pixels: Tensor
    labels: Tensor


def read_images(
    archive: Path, size: int, limits: dict[str, int | None]
) -> tuple[dict[str, Images], list[str]]:
    """The train and val folders of an ImageFolder archive, decoded once and resized to ``size`` x ``size``; and the classes.

    A limit takes images evenly spaced over a split, so that every class is there.

    Raises:
        UsageError: the archive is missing, cannot be read, or holds no such folders.
    """
    if not archive.is_file():
        raise UsageError(
            f"the images {archive} are not there: give a tar of train/<class>/*.JPEG and val/<class>/*.JPEG"
            " with --data."
        )
    found: dict[str, list[tuple[str, bytes]]] = {split: [] for split in limits}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if member.isfile() and len(parts) >= 3 and parts[-3] in found:
                    found[parts[-3]].append(("/".join(parts[-2:]), tar.extractfile(member).read()))
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UsageError(f"the archive {archive} cannot be read ({' '.join(str(error).split())}).") from error
    classes = sorted({name.partition("/")[0] for name, _ in found["train"]})
    if not classes or not found["val"]:
        raise UsageError(f"the archive {archive} has no train/<class>/* and val/<class>/* files.")
    splits = {}
    for split, files in found.items():
        files.sort()
        count = min(limits[split] or len(files), len(files))
        files = [files[index * len(files) // count] for index in range(count)]
        pixels = torch.empty(count, 3, size, size, dtype=torch.uint8)
        for index, (_, content) in enumerate(files):
            with Image.open(io.BytesIO(content)) as image:
                small = image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
            pixels[index] = (
                torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8)
                .view(size, size, 3)
                .permute(2, 0, 1)
            )
        splits[split] = Images(
            pixels, torch.tensor([classes.index(name.partition("/")[0]) for name, _ in files])
        )
    return splits, classes


def normalise(pixels: Tensor) -> Tensor:
    """uint8 to floats of ImageNet's mean and deviation, channels-last."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) * 255 for values in (MEAN, STD))
    return ((pixels - mean) / std).contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, smallest_crop: float, generator: torch.Generator) -> Tensor:
    """A random crop of at least ``smallest_crop`` of each image's area, resized back, and mirrored half of the time."""
    count = len(images)
    side = torch.empty(count).uniform_(smallest_crop, 1, generator=generator).sqrt()
    mirror = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = side * mirror, side
    theta[:, :, 2] = torch.empty(count, 2).uniform_(-1, 1, generator=generator) * (1 - side)[:, None]
    grid = F.affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Images, batch_size: int = 256) -> float:
    """Top-1 in percent."""
    model.eval()
    right = sum(
        int((model(normalise(pixels)).argmax(1) == labels).sum())
        for pixels, labels in zip(images.pixels.split(batch_size), images.labels.split(batch_size))
    )
    model.train()
    return 100 * right / len(images.labels)


def train(
    name: str, seed: int, recipe: Recipe, splits: dict[str, Images], device: torch.device
) -> dict[str, Any]:
    """Train one variant from one seed; the seed decides the initial weights, the order of the images and their augmentation."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    train_set, val_set = (Images(*(x.to(device) for x in splits[split])) for split in ("train", "val"))
    model = build_model(VARIANTS[name], recipe, int(train_set.labels.max()) + 1).to(
        device, memory_format=torch.channels_last
    )
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
    steps_per_epoch = len(train_set.labels) // recipe.batch_size
    total = steps_per_epoch * recipe.epochs
    warm = max(1, int(recipe.warmup * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            (step + 1) / warm
            if step < warm
            else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
        ),
    )
    generator = torch.Generator().manual_seed(seed)
    curve = []
    for epoch in range(1, recipe.epochs + 1):
        order = torch.randperm(len(train_set.labels), generator=generator).to(device)
        losses = []
        for batch in order[: steps_per_epoch * recipe.batch_size].split(recipe.batch_size):
            images = augment(normalise(train_set.pixels[batch]), recipe.smallest_crop, generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(images)
            loss = F.cross_entropy(
                logits.float(), train_set.labels[batch], label_smoothing=recipe.label_smoothing
            )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        # Every fourth image is enough for a curve; the figure that counts is of all.
        shown = val_set if epoch == recipe.epochs else Images(*(x[::4] for x in val_set))
        curve.append(
            {"epoch": epoch, "loss": torch.stack(losses).mean().item(), "top1": accuracy(model, shown)}
        )
        if not math.isfinite(curve[-1]["loss"]):
            raise RuntimeError(f"the loss of {name}, seed {seed}, is {curve[-1]['loss']} in epoch {epoch}.")
    return {
        "variant": name,
        "seed": seed,
        "recipe": recipe._asdict(),
        "params": sum(p.numel() for p in model.parameters()),
        "curve": curve,
        "top1": curve[-1]["top1"],
        "seconds": time.perf_counter() - started,
        "device": (
            torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{platform.processor() or platform.machine()}, 1 thread"
        ),
        "torch": torch.__version__,
    }


def run_file(out: Path, name: str, seed: int) -> Path:
    """Where a run's result is."""
    return out / "runs" / f"{name}_seed{seed}.json"


def work(rank: int, jobs: Any, recipe: Recipe, splits: dict[str, Images], device: str, out: Path) -> None:
    """Process ``rank``: train what the queue has until it says None."""
    # Two processes of one thread share two cores without waiting for each other.
    torch.set_num_threads(1)
    while (job := jobs.get()) is not None:
        result = train(*job, recipe, splits, torch.device(device))
        write_atomically(run_file(out, *job), json.dumps(result, indent=1).encode())
        print(f"{job[0]}, seed {job[1]}: top-1 {result['top1']:.1f} %, {result['seconds']:.0f} s", flush=True)


def read_runs(out: Path, names: list[str], recipe: Recipe) -> dict[str, dict[int, dict]]:
    """The results there are, by variant and seed.

    Raises:
        UsageError: the folder has runs of another recipe.
    """
    wanted = json.loads(json.dumps(recipe._asdict()))
    runs: dict[str, dict[int, dict]] = {name: {} for name in names}
    for path in sorted((out / "runs").glob("*.json")):
        run = json.loads(path.read_text())
        if run["recipe"] != wanted:
            raise UsageError(f"{path} was trained with another recipe: give another folder with --out.")
        if run["variant"] in runs:
            runs[run["variant"]][run["seed"]] = run
    return runs


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return (
        f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
        if len(values) > 1
        else f"{values[0]:.1f}"
    )


def make_table(runs: dict[str, dict[int, dict]]) -> str:
    """Markdown: top-1 by variant, best first, with the difference to the baseline of the same seeds."""
    done = {name: seeds for name, seeds in runs.items() if seeds}
    lines = [
        "| attention | top-1 %, mean ± deviation | seeds | against the default, seed by seed | parameters |",
        "|---|---|---|---|---|",
    ]
    for name in sorted(done, key=lambda name: -statistics.mean(run["top1"] for run in done[name].values())):
        seeds = done[name]
        both = sorted(seeds.keys() & done.get(BASELINE, {}).keys())
        gaps = [seeds[seed]["top1"] - done[BASELINE][seed]["top1"] for seed in both]
        top1 = [run["top1"] for run in seeds.values()]
        lines.append(
            f"| {VARIANTS[name].title} | {spread(top1)} | {', '.join(f'{value:.1f}' for value in top1)} |"
            f" {'' if name == BASELINE or not gaps else f'{statistics.mean(gaps):+.1f} ({min(gaps):+.1f} to {max(gaps):+.1f})'}"
            f" | {next(iter(seeds.values()))['params']:,} |"
        )
    return "\n".join(lines) + "\n"


def plot(runs: dict[str, dict[int, dict]], out: Path) -> None:
    """Top-1 over epochs, a panel for each variant beside the baseline, every seed a line."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    done = {name: seeds for name, seeds in runs.items() if seeds}
    panels = [name for name in done if name != BASELINE] or [BASELINE]
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for name, axis in zip(panels, axes):
        for shown, color in ((BASELINE, "0.6"), (name, "tab:blue")):
            for run in done.get(shown, {}).values():
                axis.plot(
                    [p["epoch"] for p in run["curve"]],
                    [p["top1"] for p in run["curve"]],
                    color=color,
                    linewidth=1.2,
                )
        axis.set_title(name, fontsize=9)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        # A panel with none below it shows the epochs itself.
        axis.xaxis.set_tick_params(labelbottom=True)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.supxlabel(f"epoch (grey: {BASELINE}, the default)", fontsize=9)
    figure.supylabel("top-1 %", fontsize=9)
    save_figure(figure, out)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="tar of train/<class>/* and val/<class>/* images"
    )
    parser.add_argument(
        "--form", choices=FORMS, default="cpu", help="cpu: an hour on 2 cores; gpu: 25 minutes on one GPU"
    )
    parser.add_argument("--out", type=Path, default=Path("work_dirs/ablation"), help="folder of results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="VARIANT",
        help=", ".join(VARIANTS),
    )
    parser.add_argument(
        "--workers", type=int, help="processes at once (default: the cores of a CPU, 1 on a GPU)"
    )
    parser.add_argument("--epochs", type=int, help="another length than the form's")
    parser.add_argument("--train-images", type=int, help="use so many training images")
    parser.add_argument("--val-images", type=int, help="use so many validation images")
    return parser.parse_args(argv)


def ablate(args: argparse.Namespace) -> None:
    changes = {
        key: getattr(args, key)
        for key in ("epochs", "train_images", "val_images")
        if getattr(args, key) is not None
    }
    if any(value < 1 for value in changes.values()) or (args.workers is not None and args.workers < 1):
        raise UsageError("--epochs, --train-images, --val-images and --workers have to be at least 1.")
    recipe = FORMS[args.form]._replace(**changes)
    if recipe.train_images is not None and recipe.train_images < recipe.batch_size:
        raise UsageError(
            f"--train-images is {recipe.train_images}, less than one batch of {recipe.batch_size}."
        )
    if args.form == "gpu" and not torch.cuda.is_available():
        raise UsageError("--form gpu needs a GPU that torch sees: use --form cpu here.")
    names = list(dict.fromkeys(args.only))
    runs = read_runs(args.out, names, recipe)
    # Seeds outside, so that an interrupted experiment has every variant before it has many of one.
    missing = [(name, seed) for seed in dict.fromkeys(args.seeds) for name in names if seed not in runs[name]]
    if missing:
        limits = {"train": recipe.train_images, "val": recipe.val_images}
        splits, classes = read_images(args.data, recipe.image_size, limits)
        print(
            f"{len(missing)} runs; {len(splits['train'].labels)} images of {len(classes)} classes,"
            f" {len(splits['val'].labels)} to validate"
        )
        for images in splits.values():
            for tensor in images:
                tensor.share_memory_()
        workers = min(args.workers or (1 if args.form == "gpu" else os.cpu_count() or 1), len(missing))
        context = multiprocessing.get_context("spawn")
        jobs = context.Queue()
        for job in [*missing, *[None] * workers]:
            jobs.put(job)
        device = "cuda" if args.form == "gpu" else "cpu"
        multiprocessing.spawn(work, (jobs, recipe, splits, device, args.out), nprocs=workers)
        runs = read_runs(args.out, names, recipe)
    table = make_table(runs)
    write_atomically(args.out / "table.md", table.encode())
    plot(runs, args.out / "curves.png")
    seconds = sum(run["seconds"] for seeds in runs.values() for run in seeds.values())
    print(
        f"\n{table}\n{seconds / 60:.0f} minutes of training in all; written: {args.out / 'table.md'},"
        f" {args.out / 'curves.png'}"
    )


def main(argv: list[str] | None = None) -> int:
    try:
        ablate(parse_args(argv))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
