"""Predict an image or a folder of images: drawn pictures and one JSON file."""

from __future__ import annotations

from mmengine.device import get_device

from lf_dense.errors import run_tool, tool_parser
from lf_dense.training.cli import add_backbone_options, add_config_options, read_config
from lf_dense.training.explaining import explained
from lf_dense.training.prediction import Predictor, find_images, predict_images


def main() -> None:
    parser = tool_parser(description=__doc__)
    parser.add_argument("config", help="path or packaged name of the config")
    parser.add_argument("checkpoint", help="checkpoint with the weights")
    parser.add_argument(
        "source", metavar="IMAGE_OR_FOLDER", help="an image, or a folder that is searched for images"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for pictures and predictions.json"
    )
    parser.add_argument(
        "--score-thr", type=float, default=0.3, help="drop detections below this score (default: %(default)s)"
    )
    parser.add_argument("--device", default=get_device(), help="torch device (default here: %(default)s)")
    add_backbone_options(parser)
    add_config_options(parser)
    args = parser.parse_args()
    find_images(args.source)
    with explained():
        predictor = Predictor(read_config(args), args.checkpoint, args.device)
    print(
        f"wrote {predict_images(predictor, args.source, args.out, args.score_thr)} and the pictures beside it"
    )


if __name__ == "__main__":
    run_tool(main)
