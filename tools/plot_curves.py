"""Draw the loss and metric curves of a work dir."""

from __future__ import annotations

import argparse
from pathlib import Path

from lf_dense.cli import run
from lf_dense.curves import plot_curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work_dir", help="work dir of a training run")
    parser.add_argument("--out", help="picture to write (default: WORK_DIR/curves.png)")
    parser.add_argument("--metric", default="coco/bbox_mAP_50", help="validation metric, as the log names it (default: %(default)s)")
    args = parser.parse_args()
    print(f"wrote {plot_curves(args.work_dir, args.out or Path(args.work_dir, 'curves.png'), args.metric)}")


if __name__ == "__main__":
    run(main)
