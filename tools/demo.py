"""The whole path in minutes on two CPU cores: make a data set, train a detector on it, evaluate, predict, and draw.

Every step is the command line that a user would type; each is printed before it runs.
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


def step(title: str, *command: str) -> None:
    """Run one tool; its output stays visible, and a failure ends the demo by its name."""
    print(f"\n=== {title}\n    python {' '.join(command)}", flush=True)
    if subprocess.run([sys.executable, "-W", "ignore", *command], cwd=ROOT, check=False).returncode:
        raise UsageError(f"the demo stopped at: {title}; the cause is printed above.")


def contact_sheet(pictures: list[Path], out: Path) -> None:
    """Tile pictures of one size (ground truth left, prediction right) under a line that says so."""
    tiles = [
        cv2.copyMakeBorder(cv2.imread(str(path)), 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        for path in pictures
    ]
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % SHEET_COLUMNS)
    rows = [np.hstack(tiles[i : i + SHEET_COLUMNS]) for i in range(0, len(tiles), SHEET_COLUMNS)]
    header = np.full((36, rows[0].shape[1], 3), 255, np.uint8)
    for column in range(SHEET_COLUMNS):
        text_at = (column * tiles[0].shape[1] + 8, 25)
        cv2.putText(
            header,
            "ground truth | prediction",
            text_at,
            cv2.FONT_HERSHEY_SIMPLEX,
            0.6,
            (0, 0, 0),
            1,
            cv2.LINE_AA,
        )
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
        # Evaluated at the end at least, and with a checkpoint to evaluate.
        options += [
            f"train_cfg.max_epochs={args.epochs}",
            "train_cfg.val_interval=1",
            "default_hooks.checkpoint.interval=1",
        ]

    step(
        "make textured shapes, 400 training and 80 held-out images",
        "tools/make_shapes.py",
        "--out",
        str(data),
    )
    step(
        "train a RetinaNet", "tools/train.py", CONFIG, "--work-dir", str(train_dir), "--cfg-options", *options
    )
    checkpoint = (train_dir / "last_checkpoint").read_text().strip()
    step(
        "evaluate on the held-out images, drawing each",
        *(
            "tools/test.py",
            CONFIG,
            checkpoint,
            "--work-dir",
            str(test_dir),
            "--show-dir",
            str(drawn),
            "--cfg-options",
            *options,
        ),
    )
    step(
        "predict the held-out images as if they were new",
        *(
            "tools/predict.py",
            CONFIG,
            checkpoint,
            str(data / "val"),
            "--out",
            str(work_dir / "predictions"),
            "--score-thr",
            "0.5",
        ),
    )
    step(
        "draw the curves",
        "tools/plot_curves.py",
        str(train_dir),
        "--out",
        str(work_dir / "curves.png"),
        "--metric",
        METRIC,
    )

    contact_sheet(sorted(drawn.rglob("*.png"))[:8], work_dir / "predictions.png")
    latest = max(test_dir.glob("*/*.json"), key=lambda path: path.stat().st_mtime)
    score = json.loads(latest.read_text().splitlines()[-1])[METRIC]
    losses = [record["loss"] for record in read_scalars(train_dir) if "loss" in record]
    print(
        f"\ndemo finished in {math.ceil((time.monotonic() - started) / 60)} minutes: loss {losses[0]:.2f} ->"
        f" {losses[-1]:.2f}"
    )
    print(f"  box AP50 on held-out images   {score:.3f}")
    print(f"  ground truth and predictions  {work_dir / 'predictions.png'}")
    print(f"  loss and AP50 curves          {work_dir / 'curves.png'}")
    print(f"  predictions as JSON           {work_dir / 'predictions' / 'predictions.json'}")
    print(f"  checkpoint and logs           {train_dir}")
    if not args.epochs and score < PASS_MARK:
        raise UsageError(
            f"the demo's box AP50 is {score:.3f}, and {PASS_MARK} was expected: the detector did not learn as"
            " it should."
        )


if __name__ == "__main__":
    run_tool(main)
