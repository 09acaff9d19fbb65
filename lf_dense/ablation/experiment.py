"""The experiment as a whole: which runs are missing, processes that train them, and the report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import spawn

from ..errors import UsageError
from ..files import write_atomically
from .images import Images, read_images
from .results import make_table, plot, read_runs, write_run
from .training import train
from .variants import FORMS, VARIANTS, Recipe

if TYPE_CHECKING:
    from multiprocessing.queues import Queue

    Job = tuple[str, int]
    """A variant and a seed."""


class Options(NamedTuple):
    """What a user chooses; ``tools/ablate.py`` has an option for each."""

    data: Path
    form: str = "cpu"
    out: Path = Path("work_dirs/ablation")
    seeds: Sequence[int] = (0, 1, 2)
    only: Sequence[str] = tuple(VARIANTS)
    workers: int | None = None
    epochs: int | None = None
    train_images: int | None = None
    val_images: int | None = None

    def recipe(self) -> Recipe:
        """The form's recipe with the user's changes.

        Raises:
            UsageError: a number is too small, or the form needs a GPU and there is none.
        """
        numbers = {
            "epochs": self.epochs,
            "train_images": self.train_images,
            "val_images": self.val_images,
        }
        changes = {key: value for key, value in numbers.items() if value is not None}
        if any(value < 1 for value in changes.values()) or (self.workers is not None and self.workers < 1):
            raise UsageError("--epochs, --train-images, --val-images and --workers have to be at least 1.")
        recipe = Recipe(**{**FORMS[self.form]._asdict(), **changes})
        if recipe.train_images is not None and recipe.train_images < recipe.batch_size:
            raise UsageError(
                f"--train-images is {recipe.train_images}, less than one batch of {recipe.batch_size}."
            )
        if self.form == "gpu" and not torch.cuda.is_available():
            raise UsageError("--form gpu needs a GPU that torch sees: use --form cpu here.")
        return recipe


def run_experiment(options: Options) -> None:
    """Train every variant with every seed that has no result yet, and write the table and the curves.

    Raises:
        UsageError: options that cannot work, images that cannot be read, or results of another recipe.
    """
    recipe = options.recipe()
    names = list(dict.fromkeys(options.only))
    runs = read_runs(options.out, names, recipe)
    # Seeds outside, so that an interrupted experiment has every variant before it has many of one.
    seeds = dict.fromkeys(options.seeds)
    missing = [(name, seed) for seed in seeds for name in names if seed not in runs[name]]
    if missing:
        _train_all(missing, recipe, options)
        runs = read_runs(options.out, names, recipe)
    table, curves = options.out / "table.md", options.out / "curves.png"
    text = make_table(runs)
    write_atomically(table, text.encode())
    plot(runs, curves)
    seconds = sum(run["seconds"] for by_seed in runs.values() for run in by_seed.values())
    print(f"\n{text}\n{seconds / 60:.0f} minutes of training in all; written: {table}, {curves}")


def _train_all(missing: list[Job], recipe: Recipe, options: Options) -> None:
    """Train in several processes, which share the images."""
    limits = {"train": recipe.train_images, "val": recipe.val_images}
    splits, classes = read_images(options.data, recipe.image_size, limits)
    training, validation = (len(splits[split].labels) for split in ("train", "val"))
    print(f"{len(missing)} runs; {training} images of {len(classes)} classes, {validation} to validate")
    for images in splits.values():
        for tensor in images:
            tensor.share_memory_()
    on_gpu = options.form == "gpu"
    at_once = options.workers or (1 if on_gpu else os.cpu_count() or 1)
    workers = min(at_once, len(missing))
    jobs = multiprocessing.get_context("spawn").Queue()
    for job in [*missing, *[None] * workers]:
        jobs.put(job)
    device = "cuda" if on_gpu else "cpu"
    spawn(_work, (jobs, recipe, splits, device, options.out), nprocs=workers)


def _work(
    rank: int,
    jobs: Queue[Job | None],
    recipe: Recipe,
    splits: dict[str, Images],
    device: str,
    out: Path,
) -> None:
    """Process ``rank``: train what the queue has until it says None."""
    # Two processes of one thread share two cores without waiting for each other.
    torch.set_num_threads(1)
    while (job := jobs.get()) is not None:
        name, seed = job
        run = train(name, seed, recipe, splits, torch.device(device))
        write_run(out, run)
        print(f"{name}, seed {seed}: top-1 {run['top1']:.1f} %, {run['seconds']:.0f} s", flush=True)
