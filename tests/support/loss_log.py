"""A hook for the tests of distributed training.

It writes the loss of every step, averaged over the processes, as JSON. At exit the threads are printed.
"""

import atexit
import json
from pathlib import Path

import torch
from mmengine.dist import all_reduce, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class LossLog(Hook):
    priority = "VERY_LOW"

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.losses: list[float] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        loss = torch.as_tensor(outputs["loss"]).detach().double().clone()
        all_reduce(loss, op="mean")
        self.losses.append(loss.item())
        if is_main_process():
            self.path.write_text(json.dumps(self.losses))


def print_threads() -> None:
    names = sorted((task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir())
    print(f"threads at exit: {names}", flush=True)


# A config imports this module early, and exit handlers run in reverse, so this one runs after the tool's own.
atexit.register(print_threads)
