"""What people follow a training by: where its files are, curves that are redrawn, TensorBoard."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.runner import Runner

from ..errors import UsageError, reason_of
from ..frameworks import type_name
from .curves import main_metric, plot_curves

CURVES = "curves.png"
TENSORBOARD = "TensorboardVisBackend"


def add_tensorboard(config: Config) -> None:
    """Add mmengine's TensorBoard backend to a config's visualizer, beside what it has.

    Raises:
        UsageError: tensorboard is not installed.
    """
    if find_spec("tensorboard") is None:
        raise UsageError("--tensorboard needs tensorboard, which is not installed: pip install tensorboard.")
    if config.get("visualizer") is None:
        config.visualizer = {"type": "Visualizer"}
    backends = list(config.visualizer.get("vis_backends") or [{"type": "LocalVisBackend"}])
    if TENSORBOARD not in map(type_name, backends):
        config.visualizer.vis_backends = [*backends, {"type": TENSORBOARD}]


class CurvesHook(Hook):
    """Says where a training's files are, and draws its curves into the work dir as it goes.

    ``curves.png`` has the training loss, and the main metric once there is one. It is redrawn after every
    epoch and every evaluation, on the first process alone. A run that starts anew leaves the logs of earlier
    runs out. What fails while drawing is a warning: it never stops a training.
    """

    # The log and the checkpoints are written before this reads them.
    priority = "LOWEST"

    def __init__(self) -> None:
        self.metric: str | None = None

    def before_train(self, runner: Runner) -> None:
        runner.logger.info(
            f"log: {runner.log_dir}; checkpoints: {_checkpoint_folder(runner)}; curves, redrawn after each "
            f"epoch and evaluation: {Path(runner.work_dir, CURVES)}"
        )

    def after_train_epoch(self, runner: Runner) -> None:
        self._draw(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self.metric = self.metric or main_metric(metrics or {})
        self._draw(runner)

    def after_train(self, runner: Runner) -> None:
        drawn = self._draw(runner, last=True)
        kept = [f"{name}: {path}" for name, path in _checkpoints(runner).items()]
        curves = [f"curves: {Path(runner.work_dir, CURVES)}"] if drawn else []
        # The runner writes it there, with swapped backbone and overridden options.
        name = getattr(runner.cfg, "filename", None)
        config = (
            [f"config to test and predict with: {Path(runner.work_dir, Path(name).name)}"] if name else []
        )
        kept = kept or ["no checkpoint was saved"]
        runner.logger.info("; ".join([*kept, *curves, f"log: {runner.log_dir}", *config]))

    def _draw(self, runner: Runner, last: bool = False) -> bool:
        """Redraw, and say whether that worked; until something is logged there is nothing to draw."""
        if not is_main_process():
            return False
        # Without a resumption, iterations start again, and other runs' would lie among them.
        run = None if runner.cfg.get("resume") else Path(runner.log_dir).name
        try:
            plot_curves(runner.work_dir, Path(runner.work_dir, CURVES), self.metric or "", run)
        except UsageError:
            if last:
                runner.logger.warning(
                    f"{CURVES} was not drawn: no loss is in {runner.log_dir}. The visualizer needs a "
                    "LocalVisBackend, and default_hooks.logger.interval has to be within the training."
                )
            return False
        except Exception as error:
            runner.logger.warning(f"{CURVES} was not drawn: {reason_of(error)}.")
            return False
        return True


def _checkpoint_folder(runner: Runner) -> str:
    """Where the checkpoints go."""
    folders = [hook.out_dir for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    return str(folders[0]) if folders else "none"


def _checkpoints(runner: Runner) -> dict[str, str]:
    """The last checkpoint of a run, and the best by each metric that it was told to keep the best of."""
    info = runner.message_hub.runtime_info
    found = {"last checkpoint": info.get("last_ckpt")}
    for key in info:
        if key.startswith("best_ckpt"):
            metric = key.removeprefix("best_ckpt").lstrip("_")
            found[f"best checkpoint{f' by {metric}' if metric else ''}"] = info[key]
    return {name: str(path) for name, path in found.items() if path}
