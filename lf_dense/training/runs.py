"""From a config and a command line to an mmengine Runner: what train.py and test.py share."""

from __future__ import annotations

import logging
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..errors import UsageError
from ..frameworks import check_data, framework_of, type_name
from ..presets import NUM_STAGES, resolve_arch
from ..weights.reading import guard_mmengine, read_checkpoint, trust_checkpoint
from ..weights.resuming import CheckpointCheckHook, check_resumable, latest_good_checkpoint
from ..weights.saving import remove_leftovers, write_checkpoints_atomically
from .explaining import explained
from .following import CurvesHook, add_tensorboard
from .labels import LabelCheckHook, check_coco_classes
from .launching import has_accelerator, set_launcher

AUTO = "auto"
# Necks that take one number of channels for each map of the backbone.
_PYRAMID_NECKS = ("FPN", "PAFPN", "FPN_CARAFE", "NASFPN", "ChannelMapper")
DEFAULT_WORK_DIRS = Path("work_dirs")


def set_work_dir(config: Config, work_dir: str | None) -> None:
    """The argument, else the config's own, else ``work_dirs/`` and the config's name."""
    if work_dir is not None:
        config.work_dir = work_dir
    elif config.get("work_dir") is None:
        config.work_dir = str(DEFAULT_WORK_DIRS / Path(config.filename).stem)


def enable_amp(config: Config) -> None:
    """Train in mixed precision through mmengine's AmpOptimWrapper.

    Raises:
        UsageError: there is no device that mmengine supports it on, or the config has another optimizer
            wrapper.
    """
    if not has_accelerator():
        raise UsageError(
            "--amp needs a GPU (mmengine's AmpOptimWrapper does not run on a CPU), and none is visible: leave"
            " it out."
        )
    wrapper = config.optim_wrapper.get("type", "OptimWrapper")
    if wrapper not in ("OptimWrapper", "AmpOptimWrapper"):
        raise UsageError(
            f"--amp replaces an OptimWrapper, and the config has {wrapper}: set mixed precision in its own "
            "options."
        )
    config.optim_wrapper.type = "AmpOptimWrapper"
    config.optim_wrapper.setdefault("loss_scale", "dynamic")


def enable_auto_scale_lr(config: Config) -> None:
    """Scale the learning rate by the real batch size over the one that the config was tuned for.

    Raises:
        UsageError: the config does not say which batch size that was.
    """
    if "base_batch_size" not in config.get("auto_scale_lr", {}):
        raise UsageError(
            "--auto-scale-lr needs the batch size that the learning rate was tuned for: set "
            "auto_scale_lr.base_batch_size."
        )
    config.auto_scale_lr.enable = True


def set_resume(config: Config, resume: str) -> None:
    """Resume from a checkpoint, or under ``AUTO`` from the newest readable one of the work dir.

    Raises:
        UsageError: there is nothing to resume.
    """
    if resume == AUTO:
        resume = latest_good_checkpoint(config.work_dir)
        remove_leftovers(config.work_dir)
    config.resume = True
    config.load_from = resume


def check_start(config: Config, trust: bool = False) -> None:
    """Read the checkpoint that a training starts from, before minutes are spent on data and model.

    Args:
        config: its ``load_from`` and ``resume`` say which and how.
        trust: run the code in it.

    Raises:
        UsageError: it cannot be read, or lacks what resuming needs.
    """
    source = config.get("load_from")
    if not source:
        return
    if trust:
        trust_checkpoint(source)
    checkpoint = read_checkpoint(source)
    if config.get("resume"):
        check_resumable(checkpoint, source, bool(config.get("param_scheduler")))


def check_sections(config: Config, sections: tuple[str, ...], purpose: str) -> None:
    """Make sure that a config has what a run reads from it.

    Raises:
        UsageError: a section is missing, or a number of the optimizer is text.
    """
    missing = [section for section in sections if config.get(section) is None]
    if missing:
        raise UsageError(
            f"the config has no {', '.join(missing)}, which {purpose} needs: it is a part of others."
        )
    optimizer = (config.get("optim_wrapper") or {}).get("optimizer") or {}
    for key in ("lr", "weight_decay", "momentum"):
        if key in optimizer and not isinstance(optimizer[key], (int, float)):
            raise UsageError(f"optim_wrapper.optimizer.{key} is {optimizer[key]!r}, and has to be a number.")


def check_neck(config: Config) -> None:
    """Compare a neck's channels with those of the LaplacianFormer that it reads.

    Raises:
        UsageError: they differ.
    """
    backbone, neck = config.model.get("backbone"), config.model.get("neck")
    if (
        type_name(backbone) != "LaplacianFormer"
        or not isinstance(neck, dict)
        or type_name(neck) not in _PYRAMID_NECKS
    ):
        return
    try:
        dims = resolve_arch(backbone.get("arch", "tiny"))["embed_dims"]
        channels = [dims[stage] for stage in backbone.get("out_indices", range(NUM_STAGES))]
    except (IndexError, TypeError, ValueError):
        return  # building the backbone says what is wrong with it
    stated = list(neck.get("in_channels", ()))
    if stated != channels:
        raise UsageError(
            f"model.neck.in_channels is {stated}, and the backbone returns maps of {channels} channels: "
            "set it to these."
        )


def keep_previous_checkpoint(config: Config) -> None:
    """Keep two checkpoints where the config asks for one: mmengine deletes the old one first."""
    hook = config.get("default_hooks", {}).get("checkpoint") or {}
    if hook.get("max_keep_ckpts") == 1:
        hook["max_keep_ckpts"] = 2
        print_log(
            "default_hooks.checkpoint.max_keep_ckpts is raised from 1 to 2, since an interruption between "
            "deleting the old checkpoint and writing the new would lose the run.",
            logger="current",
            level=logging.WARNING,
        )


def build_runner(config: Config, whole: bool = False) -> Runner:
    """The config's own runner type, or mmengine's; whatever it loads goes through ``read_checkpoint``.

    Args:
        config: the config.
        whole: the checkpoint in ``load_from`` has to cover the whole model.
    """
    guard_mmengine()
    with explained():
        check_neck(config)
        runner = RUNNERS.build(config) if "runner_type" in config else Runner.from_cfg(config)
    if config.get("load_from") or config.get("resume"):
        runner.register_hook(CheckpointCheckHook(config.get("load_from") or "that was saved last", whole))
    return runner


def build_training_runner(
    config: Config,
    *,
    work_dir: str | None = None,
    resume: str | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    launcher: str = "none",
    trust: bool = False,
    tensorboard: bool = False,
) -> Runner:
    """Check all that can be checked without a model, then build the runner; the caller calls ``train()``.

    Args:
        config: the config.
        work_dir: where logs and checkpoints go.
        resume: checkpoint to go on from, or ``AUTO``.
        amp: mixed precision.
        auto_scale_lr: scale the learning rate with the global batch size.
        launcher: mmengine's launcher.
        trust: run the code in the checkpoint that is resumed or loaded.
        tensorboard: also log for TensorBoard.

    Raises:
        UsageError: framework, data, checkpoint or options cannot work.
    """
    framework_of(config)
    check_sections(config, ("model", "train_dataloader", "train_cfg", "optim_wrapper"), "training")
    set_launcher(config, launcher)
    set_work_dir(config, work_dir)
    if amp:
        enable_amp(config)
    if auto_scale_lr:
        enable_auto_scale_lr(config)
    if tensorboard:
        add_tensorboard(config)
    splits = ("train", "val") if config.get("val_cfg") else ("train",)
    check_data(config, splits)
    check_coco_classes(config, splits)
    if resume is not None:
        set_resume(config, resume)
    check_start(config, trust)
    keep_previous_checkpoint(config)
    write_checkpoints_atomically()
    runner = build_runner(config)
    runner.register_hook(LabelCheckHook(framework_of(config).scope))
    runner.register_hook(CurvesHook())
    return runner


def draw_predictions(config: Config, directory: str) -> None:
    """Make the framework's own visualization hook paint every test image into ``directory``."""
    if "visualization" not in config.get("default_hooks", {}):
        config.merge_from_dict({"default_hooks.visualization.type": framework_of(config).visualization_hook})
    hook = config.default_hooks.visualization
    if config.default_scope == "mmpretrain":
        hook.update(enable=True, interval=1, out_dir=directory)
    else:
        hook.update(draw=True, interval=1)
        # mmdet's hook nests its folder in the visualizer's; mmseg's has no folder of its own.
        if config.default_scope == "mmdet":
            hook.update(test_out_dir=str(Path(directory).resolve()))
        else:
            config.visualizer.update(save_dir=directory, vis_backends=[{"type": "LocalVisBackend"}])


def build_testing_runner(
    config: Config,
    checkpoint: str,
    *,
    work_dir: str | None = None,
    show_dir: str | None = None,
    out: str | None = None,
    launcher: str = "none",
) -> Runner:
    """Like ``build_training_runner``, for evaluation; the checkpoint has to cover the whole model.

    Args:
        config: the config.
        checkpoint: path or address.
        work_dir: where logs and metrics go.
        show_dir: draw every image with its prediction there.
        out: pickle file for the raw predictions.
        launcher: mmengine's launcher.

    Raises:
        UsageError: framework, data, checkpoint or options cannot work, or the weights do not fit the model.
    """
    framework_of(config)
    check_sections(config, ("model", "test_dataloader", "test_cfg", "test_evaluator"), "testing")
    set_launcher(config, launcher)
    set_work_dir(config, work_dir)
    config.update(load_from=checkpoint, resume=False)
    check_start(config)
    check_data(config, ("test",))
    check_coco_classes(config, ("test",))
    if out is not None:
        if Path(out).suffix not in (".pkl", ".pickle"):
            raise UsageError(
                f"--out {out}: the raw predictions are a pickle, so the name has to end in .pkl."
            )
        evaluators = (
            config.test_evaluator if isinstance(config.test_evaluator, list) else [config.test_evaluator]
        )
        dump = "DumpDetResults" if config.default_scope == "mmdet" else "DumpResults"
        config.test_evaluator = [*evaluators, {"type": dump, "out_file_path": out}]
    if show_dir is not None:
        draw_predictions(config, show_dir)
    return build_runner(config, whole=True)
