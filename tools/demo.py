"""The whole path in minutes on two CPU cores: make data, train a detector, evaluate, predict, draw.

Every step is the command line that a user would type. Each is printed before it runs.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np

from lf_dense.errors import UsageError, run_tool, tool_parser
from lf_dense.training.curves import read_scalars

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/retinanet_lf_demo.py"
METRIC = "coco/bbox_mAP_50"
PASS_MARK = 0.5
SHEET_COLUMNS = 2
BLACK, WHITE = (0, 0, 0), (255, 255, 255)


def step(title: str, *command: object) -> None:
    """Run one tool and show its output; a failure ends the demo and names the step."""
    arguments = [str(part) for part in command]
    print(f"\n=== {title}\n    python {' '.join(arguments)}", flush=True)
    if subprocess.run([sys.executable, "-W", "ignore", *arguments], cwd=ROOT, check=False).returncode:
        raise UsageError(f"the demo stopped at: {title}; the cause is printed above.")


def contact_sheet(pictures: list[Path], out: Path) -> None:
    """Tile pictures of one size (ground truth left, prediction right) under a line that says so."""
    images = [cv2.imread(str(path)) for path in pictures]
    tiles = [cv2.copyMakeBorder(image, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=WHITE) for image in images]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % SHEET_COLUMNS)
    rows = [np.hstack(tiles[i : i + SHEET_COLUMNS]) for i in range(0, len(tiles), SHEET_COLUMNS)]
    header = np.full((36, rows[0].shape[1], 3), 255, np.uint8)
    text, font = "ground truth | prediction", cv2.FONT_HERSHEY_SIMPLEX
    for column in range(SHEET_COLUMNS):
        text_at = (column * tiles[0].shape[1] + 8, 25)
        cv2.putText(header, text, text_at, font, 0.6, BLACK, 1, cv2.LINE_AA)
    cv2.imwrite(str(out), np.vstack([header, *rows]))


def main() -> None:
    parser = tool_parser(description=__doc__)
    parser.add_argument(
        "--work-dir",
        default="work_dirs/demo",
        help="folder for everything the demo writes (default: %(default)s)",
    )
    parser.add_argument(
        "--epochs", type=int, help="train for fewer or more epochs than the config; the AP is then not judged"
    )
    args = parser.parse_args()
    started = time.monotonic()
    work_dir = (Path.cwd() / args.work_dir).resolve()
    data, train_dir, test_dir, drawn = (work_dir / name for name in ("data", "train", "test", "drawn"))
    # An earlier demo's logs would be drawn into this one's curves.
    for folder in (train_dir, test_dir, drawn, work_dir / "predictions"):
        shutil.rmtree(folder, ignore_errors=True)
    options = [f"data_root={data}"]
    if args.epochs:
        # Few epochs, too, need an evaluation and a checkpoint to evaluate.
        options += [
            f"train_cfg.max_epochs={args.epochs}",
            "train_cfg.val_interval=1",
            "default_hooks.checkpoint.interval=1",
        ]

    making = ["tools/make_shapes.py", "--out", data, "--overwrite"]
    step("make textured shapes, 400 training and 80 held-out images", *making)
    training = ["tools/train.py", CONFIG, "--work-dir", train_dir]
    step("train a RetinaNet", *training, "--cfg-options", *options)
    checkpoint = (train_dir / "last_checkpoint").read_text().strip()
    testing = ["tools/test.py", CONFIG, checkpoint, "--work-dir", test_dir, "--show-dir", drawn]
    step("evaluate on the held-out images, drawing each", *testing, "--cfg-options", *options)
    predicting = ["tools/predict.py", CONFIG, checkpoint, data / "val", "--out", work_dir / "predictions"]
    step("predict the held-out images as if they were new", *predicting, "--score-thr", "0.5")
    plotting = ["tools/plot_curves.py", train_dir, "--out", work_dir / "curves.png"]
    step("draw the curves", *plotting, "--metric", METRIC)

    contact_sheet(sorted(drawn.rglob("*.png"))[:8], work_dir / "predictions.png")
    latest = max(test_dir.glob("*/*.json"), key=lambda path: path.stat().st_mtime)
    score = json.loads(latest.read_text().splitlines()[-1])[METRIC]
    losses = [record["loss"] for record in read_scalars(train_dir) if "loss" in record]
    minutes = math.ceil((time.monotonic() - started) / 60)
    print(f"\ndemo finished in {minutes} minutes: loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    print(f"  box AP50 on held-out images   {score:.3f}")
    print(f"  ground truth and predictions  {work_dir / 'predictions.png'}")
    print(f"  loss and AP50 curves          {work_dir / 'curves.png'}")
    print(f"  predictions as JSON           {work_dir / 'predictions' / 'predictions.json'}")
    print(f"  checkpoint and logs           {train_dir}")
    if not args.epochs and score < PASS_MARK:
        raise UsageError(
            f"the demo's box AP50 is {score:.3f}, and {PASS_MARK} was expected: "
            "the detector did not learn as it should."
        )


if __name__ == "__main__":
    run_tool(main)
