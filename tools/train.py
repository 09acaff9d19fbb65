"""Train from any config: our own, a path, or a packaged one.

A packaged one is named like mmdet::retinanet/retinanet_r50_fpn_1x_coco.py. The config's default_scope says
which framework it belongs to: detection, segmentation and classification start alike.
"""

from __future__ import annotations

from lf_dense.errors import run_tool, tool_parser
from lf_dense.training.cli import (
    add_backbone_options,
    add_config_options,
    add_launcher,
    read_config,
    set_local_rank,
)
from lf_dense.training.explaining import explained
from lf_dense.training.runs import AUTO, build_training_runner


def main() -> None:
    parser = tool_parser(description=__doc__)
    parser.add_argument("config", help="path or packaged name of the config")
    parser.add_argument(
        "--work-dir", help="folder for logs and checkpoints (default: work_dirs/CONFIG'S NAME)"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=AUTO,
        metavar="CKPT",
        help="go on from a checkpoint; without a value, from the newest readable one in the work dir",
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision (needs a GPU)")
    parser.add_argument(
        "--auto-scale-lr", action="store_true", help="scale the learning rate with the global batch size"
    )
    parser.add_argument(
        "--tensorboard", action="store_true", help="also log for TensorBoard (tensorboard --logdir WORK_DIR)"
    )
    add_backbone_options(parser)
    add_config_options(parser)
    add_launcher(parser)
    args = parser.parse_args()
    set_local_rank(args.local_rank)
    runner = build_training_runner(
        read_config(args, training=True),
        work_dir=args.work_dir,
        resume=args.resume,
        amp=args.amp,
        auto_scale_lr=args.auto_scale_lr,
        launcher=args.launcher,
        trust=args.trust_checkpoint,
        tensorboard=args.tensorboard,
    )
    with explained():
        runner.train()


if __name__ == "__main__":
    run_tool(main)
