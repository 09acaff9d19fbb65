"""Predict an image or a folder of images with an exported model: drawn pictures and one JSON file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import errors
from ..errors import UsageError, run_tool, tool_parser
from ..files import find_images, picture_names, write_atomically

if TYPE_CHECKING:
    from .runtime import Runtime


def predict_images(runtime: Runtime, source: str | Path, out: str | Path, score_thr: float = 0.3) -> Path:
    """Predict an image or a folder, as ``tools/predict.py`` does.

    Pictures go to ``out/pictures``, label maps to ``out/labels``, results to ``out/predictions.json``.

    Args:
        runtime: the model; a backbone alone predicts nothing.
        source: image file or folder (searched below, order by name).
        out: folder for the results.
        score_thr: detections below it are neither drawn nor listed.

    Returns:
        The JSON file: ``{"classes": [...], "images": {path relative to source: {"height", "width", ...}}}``.

    Raises:
        UsageError: no image, a model without predictions, or some images could not be read; the readable ones
            have been predicted and written by then.
    """
    from .preparing import read_image, write_png

    if runtime.task == "backbone":
        raise UsageError(
            f"{runtime.path} is a backbone, which predicts nothing: export a whole model, or take its maps "
            "from lf_dense.export.Runtime(...).predict."
        )
    out = Path(out)
    # Results of an earlier call below the source are no input.
    images = [image for image in find_images(source) if out.resolve() not in image.resolve().parents]
    root = Path(source) if Path(source).is_dir() else Path(source).parent
    pictures = picture_names(image.relative_to(root) for image in images)
    records: dict[str, Any] = {}
    unreadable: list[str] = []
    counted = len(images) > 1 and sys.stdout.isatty()
    for number, image in enumerate(images, 1):
        name = image.relative_to(root)
        pixels = read_image(image)
        if pixels is None:
            unreadable.append(str(image))
        else:
            result = runtime.predict(pixels, score_thr)
            write_png(out / "pictures" / pictures[name], runtime.draw(pixels, result, score_thr))
            labels = result.pop("labels", None)
            if labels is not None:
                write_png(out / "labels" / pictures[name], labels)
            records[name.as_posix()] = result
        if counted:
            print(f"\r{number} of {len(images)}", end="\n" if number == len(images) else "", flush=True)
    written = out / "predictions.json"
    write_atomically(
        written, json.dumps({"classes": list(runtime.classes), "images": records}, indent=1).encode()
    )
    if unreadable:
        raise UsageError(
            f"{len(unreadable)} of {len(images)} files could not be read as images: "
            f"{', '.join(unreadable[:5])}."
        )
    return written


def main() -> None:
    parser = tool_parser(description=__doc__)
    parser.add_argument("model", help="model.onnx or model.xml, with model.json beside it")
    parser.add_argument(
        "source", metavar="IMAGE_OR_FOLDER", help="an image, or a folder that is searched for images"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder for pictures and predictions.json"
    )
    parser.add_argument(
        "--score-thr", type=float, default=0.3, help="drop detections below this score (default: %(default)s)"
    )
    parser.add_argument(
        "--device", default="cpu", help="cpu, cuda, or one of OpenVINO's (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="threads of the model (default: all cores)")
    parser.add_argument(
        "--precision",
        choices=("f32", "bf16", "f16"),
        default="f32",
        help="OpenVINO's; the attention overflows in less than %(default)s, the default",
    )
    args = parser.parse_args()
    find_images(args.source)
    try:
        from . import Runtime
    except ImportError as error:
        raise UsageError(str(error)) from None
    runtime = Runtime(args.model, device=args.device, threads=args.threads, precision=args.precision)
    print(
        f"wrote {predict_images(runtime, args.source, args.out, args.score_thr)} and the pictures beside it"
    )


if __name__ == "__main__":
    errors.program = errors.program or "python -m lf_dense.export.run"
    run_tool(main)
