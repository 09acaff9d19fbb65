"""Export a model to ONNX, OpenVINO, torch.export or AOTInductor, checked against PyTorch."""

from __future__ import annotations

from lf_dense.errors import run_tool, tool_parser
from lf_dense.export.exporting import FORMATS, export_model
from lf_dense.export.graphs import FORMS
from lf_dense.export.parts import OUTPUTS
from lf_dense.training.cli import add_backbone_options, add_config_options, read_config
from lf_dense.training.explaining import explained


def main() -> None:
    parser = tool_parser(
        description=__doc__,
        epilog=(
            "The model runs in the new format at several sizes, and is written where it agrees with PyTorch. "
            "python -m lf_dense.export.run MODEL IMAGES --out DIR predicts with it, without torch."
        ),
    )
    parser.add_argument("config", help="path or packaged name of the config")
    parser.add_argument("checkpoint", nargs="?", help="checkpoint with the weights (default: random ones)")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: %(default)s")
    parser.add_argument("--out", required=True, metavar="FILE", help="model.onnx, model.xml or model.pt2")
    parser.add_argument(
        "--attention",
        choices=FORMS,
        default="standard",
        help=(
            "standard: operators that every runtime has; operator: our own, also for the layers around it, "
            "for runtimes that load their library (default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--part", choices=("model", "backbone"), default="model", help="default: the whole model"
    )
    outputs = "; ".join(f"{task}: {', '.join(names)}" for task, names in OUTPUTS.items() if len(names) > 1)
    parser.add_argument("--output", help=f"what the graph ends in, the first by default ({outputs})")
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="take this size alone (default: any height, width and batch)",
    )
    parser.add_argument("--image", help="a photograph to check with, besides made-up images")
    parser.add_argument(
        "--int8",
        metavar="IMAGES",
        help=(
            "layers in int8, calibrated with images of this folder, of the kind that the model is for; the "
            "attention stays in float"
        ),
    )
    add_backbone_options(parser)
    add_config_options(parser)
    args = parser.parse_args()
    with explained():
        export_model(
            read_config(args),
            args.checkpoint,
            args.out,
            args.format,
            args.attention,
            args.part,
            args.output,
            tuple(args.size) if args.size else None,
            args.image,
            args.int8,
        )
    print(f"wrote {args.out} and its description beside it")


if __name__ == "__main__":
    run_tool(main)
