"""A run's checkpoints on their way back into a model: which one to take, and whether it fits."""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from ..errors import UsageError
from .reading import check_checkpoint, meta_of, tensors_of

_NUMBERED = re.compile(r"(?:epoch|iter)_(\d+)\.pth")


def latest_good_checkpoint(work_dir: str | Path) -> str:
    """The newest readable checkpoint of a run; those that an interruption left damaged are named.

    Raises:
        UsageError: the work dir has no readable checkpoint.
    """
    work_dir = Path(work_dir)
    candidates = {path for path in work_dir.glob("*.pth") if _NUMBERED.fullmatch(path.name)}
    pointer = work_dir / "last_checkpoint"
    if pointer.is_file() and (target := Path(pointer.read_text().strip())).is_file():
        candidates.add(target)
    unique = {path.resolve(): path for path in candidates}
    for path in sorted(unique.values(), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            check_checkpoint(path)
        except UsageError as error:
            print_log(f"passed over: {error}", logger="current", level=logging.WARNING)
        else:
            return str(path)
    raise UsageError(
        f"there is nothing to resume in {work_dir}: no readable epoch_*.pth or iter_*.pth; start without "
        "--resume."
    )


def _saved_beside(checkpoint: str) -> str:
    """The configs that trainings saved beside a checkpoint, the newest first, as the end of a sentence."""
    found = {}
    for path in Path(checkpoint).parent.glob("*.py") if Path(checkpoint).is_file() else ():
        with contextlib.suppress(OSError, UnicodeDecodeError):
            # Other Python files may lie there.
            if re.search(r"^model = ", path.read_text(), re.M):
                found[path] = path.stat().st_mtime
    names = [str(path) for path in sorted(found, key=found.__getitem__, reverse=True)]
    return f", as it was saved beside it: {', '.join(names[:3])}" if names else ""


def load_weights(model: Any, checkpoint: str, state_dict: dict[str, torch.Tensor]) -> None:
    """Load a checkpoint that has to cover every parameter and buffer of a model.

    The model's own hooks for old or resized weights run first, and a wrapper for distributed data is looked
    through.

    Raises:
        UsageError: something is missing or has another shape; the first few are named.
    """
    if is_model_wrapper(model):
        model = model.module
    state_dict = {name.removeprefix("module."): value for name, value in state_dict.items()}
    try:
        problems = [
            f"{name} (missing)" for name in model.load_state_dict(state_dict, strict=False).missing_keys
        ]
    except RuntimeError as error:
        # torch reports each tensor of another shape on a line of its own, below a first line about all of
        # them.
        problems = [line.strip().rstrip(".") for line in str(error).splitlines()[1:]]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UsageError(
            f"the checkpoint {checkpoint} does not fit the config's model, {len(problems)} of "
            f"{len(model.state_dict())} tensors: {', '.join(problems[:3])}{more}; use the config that it was "
            f"trained with{_saved_beside(checkpoint)}."
        )


def check_resumable(checkpoint: dict[str, Any], source: str, has_schedule: bool = True) -> None:
    """Make sure that a checkpoint has all that a run goes on from.

    Args:
        checkpoint: as ``read_checkpoint`` gives it.
        source: what the message calls it.
        has_schedule: whether the config has a ``param_scheduler``, whose state is then needed as well.

    Raises:
        UsageError: something is missing.
    """
    meta = meta_of(checkpoint)
    missing = [f"meta.{key}" for key in ("epoch", "iter") if not isinstance(meta.get(key), int)]
    missing += [
        key for key in ("state_dict", "optimizer", "message_hub") if not isinstance(checkpoint.get(key), dict)
    ]
    if has_schedule and not isinstance(checkpoint.get("param_schedulers"), (list, dict)):
        missing.append("param_schedulers")
    if missing:
        raise UsageError(
            f"the checkpoint {source} cannot be resumed, since it has no {', '.join(missing)}: give a "
            "checkpoint of the training run itself, or start from its weights with --cfg-options "
            f"load_from={source}."
        )


class CheckpointCheckHook(Hook):
    """Looks at a checkpoint that mmengine has read, before anything of it is loaded.

    Resuming needs every tensor of the model and the optimizer's groups, ``load_from`` at least one tensor
    that fits.

    Args:
        source: what messages call the checkpoint.
        whole: every tensor of the model is needed, as for testing.
    """

    priority = "HIGHEST"

    def __init__(self, source: str, whole: bool = False) -> None:
        self.source = source
        self.whole = whole

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Compare it with the runner's model and optimizer.

        Raises:
            UsageError: it does not fit, or lacks what resuming needs.
        """
        if runner._resume:
            check_resumable(checkpoint, self.source, runner.param_schedulers is not None)
            self._check_groups(runner, checkpoint["optimizer"])
        if runner._resume or self.whole:
            load_weights(runner.model, self.source, checkpoint.get("state_dict", checkpoint))
        else:
            self._check_overlap(runner.model, tensors_of(checkpoint))

    def _check_groups(self, runner: Runner, saved: dict[str, Any]) -> None:
        current = runner.optim_wrapper.state_dict()
        if "param_groups" not in saved or "param_groups" not in current:
            return  # several optimizers, each under its own name
        sizes = [[len(group["params"]) for group in state["param_groups"]] for state in (saved, current)]
        if sizes[0] != sizes[1]:
            raise UsageError(
                f"the checkpoint {self.source} cannot be resumed: its optimizer has {sum(sizes[0])} "
                f"parameters in {len(sizes[0])} groups, and the config's {sum(sizes[1])} in {len(sizes[1])}; "
                "use the config that it was trained with, or start from its weights with --cfg-options "
                f"load_from={self.source}."
            )

    def _check_overlap(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        wanted = {name.removeprefix("module."): value.shape for name, value in model.state_dict().items()}
        if not any(
            wanted.get(name.removeprefix("module.")) == value.shape for name, value in tensors.items()
        ):
            some = ", ".join(list(tensors)[:3]) or "no tensors at all"
            raise UsageError(
                f"load_from: no tensor of the checkpoint {self.source} fits the model; it has {some}. A "
                "backbone alone is started with --pretrained."
            )
