"""Distributed jobs: what a launcher has to have told a process, and processes on CPUs."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import is_cuda_available, is_mlu_available, is_musa_available, is_npu_available
from mmengine.logging import print_log

from ..errors import UsageError

# What tells a process its place in the job, for each launcher.
_RANK_VARIABLES = {
    "pytorch": ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODELIST"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
_HOW_TO_LAUNCH = {
    "pytorch": "start it with torchrun, or tools/dist_train.sh",
    "slurm": "start it with srun, or tools/slurm_train.sh",
    "mpi": "start it with Open MPI's mpirun",
}


def has_accelerator() -> bool:
    """Whether mmengine sees a GPU, or another device that its mixed precision and launchers work on."""
    return is_cuda_available() or is_npu_available() or is_mlu_available() or is_musa_available()


def set_launcher(config: Config, launcher: str) -> None:
    """Prepare a distributed job; mmengine does the rest.

    mmengine starts every launcher by choosing a GPU. Without one, torch.distributed is started here, by gloo
    and torchrun's variables, and mmengine finds it running.

    Raises:
        UsageError: the launcher's variables are missing, or it or the model cannot work without a GPU.
    """
    config.launcher = launcher
    if launcher == "none":
        return
    missing = [name for name in _RANK_VARIABLES[launcher] if name not in os.environ]
    if missing:
        raise UsageError(
            f"--launcher {launcher} needs {', '.join(missing)} in the environment: "
            f"{_HOW_TO_LAUNCH[launcher]}."
        )
    if has_accelerator():
        return
    if launcher != "pytorch":
        raise UsageError(
            f"--launcher {launcher} needs GPUs, and none is visible: on CPUs use torchrun and --launcher "
            "pytorch."
        )
    check_batch_norms(config)
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
        atexit.register(_leave_process_group)
    wrapper = {
        "type": "MMDistributedDataParallel",
        "broadcast_buffers": False,
        **(config.get("model_wrapper_cfg") or {}),
    }
    wrapper.setdefault("find_unused_parameters", config.get("find_unused_parameters", False))
    # mmengine names a GPU there, which a model on the CPU has none of.
    config.model_wrapper_cfg = {**wrapper, "device_ids": None}
    print_log("no GPU is visible: torch.distributed runs on CPUs, by gloo.", logger="current")


def _leave_process_group() -> None:
    """End gloo's threads while the interpreter runs: one that frees a tensor later aborts the process."""
    gc.collect()  # the runner's model holds the group too, and the runner is in reference cycles
    torch.distributed.destroy_process_group()


def check_batch_norms(config: Config) -> None:
    """Make sure that a model for processes on CPUs has no norm that exists on GPUs alone.

    Raises:
        UsageError: it has; the settings that ask for it are named.
    """

    def find(key: str, settings: Any) -> Iterator[str]:
        if isinstance(settings, dict):
            if settings.get("type") in ("SyncBN", "MMSyncBN", "naiveSyncBN"):
                yield f"{key}.type"
            for name, value in settings.items():
                yield from find(f"{key}.{name}", value)
        elif isinstance(settings, (list, tuple)):
            for index, value in enumerate(settings):
                yield from find(f"{key}.{index}", value)

    keys = list(find("model", config.model))
    if keys:
        raise UsageError(
            f"the model has SyncBN ({', '.join(keys[:3])}), which torch has for GPUs alone: for processes on "
            f"CPUs set BN or GN there, --cfg-options {keys[0]}=BN and the like."
        )
