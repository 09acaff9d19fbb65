"""Predict images, a video or a camera: drawn pictures and the predictions as JSON."""

from __future__ import annotations

from pathlib import Path

from lf_dense.errors import UsageError, run_tool, tool_parser
from lf_dense.files import find_images
from lf_dense.tiling import at_own_scale, predict_tiled, tile_options, what_predicts
from lf_dense.training.cli import (
    add_backbone_options,
    add_config_options,
    add_device,
    parse_point,
    read_config,
)
from lf_dense.training.explaining import explained
from lf_dense.training.prediction import Predictor, predict_images
from lf_dense.training.quietness import quiet
from lf_dense.training.video import PICTURES, RECORDS, Video, is_video, predict_video


def main() -> None:
    parser = tool_parser(description=__doc__)
    parser.add_argument("config", help="path or packaged name of the config")
    parser.add_argument("checkpoint", help="checkpoint with the weights")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="an image, a folder that is searched for images, a video, camera:0, or a stream's address",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--score-thr", type=float, default=0.3, help="drop detections below this score (default: %(default)s)"
    )
    parser.add_argument(
        "--show-attention",
        action="append",
        default=[],
        metavar="X,Y",
        help="also draw what the backbone attends to at this pixel, into DIR/attention (may be repeated)",
    )
    parser.add_argument(
        "--tile", type=int, metavar="SIZE", help="predict in tiles of at most SIZE x SIZE pixels of the image"
    )
    parser.add_argument(
        "--overlap",
        type=int,
        metavar="PX",
        help="pixels that neighbouring tiles share (default: a quarter of the tile)",
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="with --tile: scale the image by this (default: %(default)s)"
    )
    parser.add_argument(
        "--whole",
        action="store_true",
        help="with --tile: predict each image as a whole too, and say how far the two agree",
    )
    add_device(parser)
    parser.add_argument("--verbose", action="store_true", help="show the messages of the frameworks too")
    add_backbone_options(parser)
    add_config_options(parser)
    args = parser.parse_args()
    points = [parse_point(text, "--show-attention") for text in args.show_attention]
    out = Path(args.out)
    with quiet(args.verbose):
        if is_video(args.source) and points:
            raise UsageError("--show-attention is for images: save the frame that you want as an image.")
        video = Video(args.source) if is_video(args.source) else None
        if video is None:
            find_images(args.source)
        options = tile_options(args.tile, args.overlap, args.scale, args.whole)
        if options and (video or points):
            raise UsageError("--tile is for images, and does not go with --show-attention.")
        with explained():
            config = read_config(args)
            if options:
                at_own_scale(config, args.scale)
            predictor = Predictor(config, args.checkpoint, args.device)
        if options:
            about = what_predicts(config, args.checkpoint, args.scale)
            report = predict_tiled(predictor, args.source, out, options, args.score_thr, about)
            written = report.text(options)
        elif video is not None:
            frames = predict_video(predictor, video, out, args.score_thr)
            written = f"predicted {frames} frames: {out / RECORDS}, drawn in {out / PICTURES}"
        elif points:
            from lf_dense.explain import explain_image

            def explain(image: Path, name: Path) -> None:
                explain_image(predictor, image, points, out / "attention" / name.parent)

            result = predict_images(predictor, args.source, out, args.score_thr, explain)
            written = f"wrote {result}, the pictures beside it and {out / 'attention'}"
        else:
            result = predict_images(predictor, args.source, out, args.score_thr)
            written = f"wrote {result} and the pictures beside it"
    print(written)


if __name__ == "__main__":
    run_tool(main)
