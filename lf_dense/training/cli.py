"""What the command lines share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.device import get_device

from ..errors import UsageError
from ..frameworks import load_config, override_config
from ..presets import ARCHS
from ..swap.backbone import set_pretrained, swap_backbone
from ..weights.reading import trust_checkpoint
from .runs import DEFAULT_WORK_DIRS

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """``--cfg-options``."""
    add_settings(
        parser,
        "--cfg-options",
        'override settings of the config, by dotted key; lists as key="[a,b]"; data_root=... moves all'
        " data paths at once",
    )


def add_settings(parser: argparse.ArgumentParser, option: str, help: str) -> None:
    """An option that takes settings, ``KEY=VALUE`` each; a dict where it is given, else None."""
    parser.add_argument(option, nargs="+", action=DictAction, metavar="KEY=VALUE", help=help)


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument("--device", default=get_device(), help="torch device (default here: %(default)s)")


def add_backbone_options(parser: argparse.ArgumentParser) -> None:
    """``--backbone`` and ``--pretrained``."""
    parser.add_argument(
        "--backbone",
        choices=ARCHS,
        help="put a LaplacianFormer of this size in place of the config's backbone",
    )
    parser.add_argument("--pretrained", metavar="CKPT", help="start the LaplacianFormer from this checkpoint")
    add_trust_option(parser)


def add_trust_option(parser: argparse.ArgumentParser) -> None:
    """``--trust-checkpoint``."""
    parser.add_argument(
        "--trust-checkpoint",
        action="store_true",
        help=(
            "read the checkpoints named here even if they hold code, which then runs: only for files whose "
            "makers you trust"
        ),
    )


def trust_named(args: argparse.Namespace) -> None:
    """Do what ``--trust-checkpoint`` asks for: trust the checkpoints that the command line names."""
    for source in (getattr(args, "checkpoint", None), getattr(args, "pretrained", None)):
        if source and args.trust_checkpoint:
            trust_checkpoint(source)


def read_config(args: argparse.Namespace, training: bool = False) -> Config:
    """The config of a command line, with its backbone replaced where asked, and then its settings overridden.

    Args:
        args: what was parsed.
        training: also say what the new backbone means for a training.

    Raises:
        UsageError: config, backbone or weights cannot work.
    """
    config = load_config(args.config)
    trust_named(args)
    if args.backbone:
        config = swap_backbone(config, args.backbone, args.pretrained, training=training)
        config.setdefault(
            "work_dir", str(DEFAULT_WORK_DIRS / f"{Path(config.filename).stem}_lf-{args.backbone}")
        )
    elif args.pretrained:
        set_pretrained(config, args.pretrained)
    override_config(config, args.cfg_options)
    return config


def parse_point(text: str, option: str) -> tuple[float, float]:
    """``X,Y`` of a command line, pixels of an image.

    Raises:
        UsageError: it is not two numbers.
    """
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise UsageError(
            f"{option} {text} is no point: give X,Y in pixels of the image, like 120,80."
        ) from None
    return x, y


def add_launcher(parser: argparse.ArgumentParser) -> None:
    """``--launcher``, and the ``--local-rank`` that torch.distributed.launch passes."""
    parser.add_argument(
        "--launcher",
        choices=LAUNCHERS,
        default="none",
        help="what started the processes of a distributed job",
    )
    parser.add_argument("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def set_local_rank(local_rank: int) -> None:
    """Put the rank where mmengine reads it: torchrun does, and the older launcher does not."""
    os.environ.setdefault("LOCAL_RANK", str(local_rank))
