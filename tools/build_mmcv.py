"""Install mmcv with its C++ operators, compiled in a few large files in place of many small ones.

mmcv's build spends nearly all of its time on reading torch's headers, once for every file. A file that
includes the others reads them once. The result is checked: some operators are compared with the same
computation in torch. Where the files do not compile together, or an operator is wrong, mmcv is built as it
comes.

Run it by the interpreter that mmcv is for, which has torch and the build tools.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

FLAGS = "-O1 -g0 -w"
PIP = [sys.executable, "-m", "pip"]
# A plain install would build without torch, yield a wheel with no operators, and cache it. For pip, mmcv
# counts as installed even if it was compiled against another torch or without operators.
INSTALL = ["install", "--no-cache-dir", "--no-deps", "--no-build-isolation", "--force-reinstall"]
SOURCES = Path("mmcv", "ops", "csrc", "pytorch")
# The module itself: it takes longest, so it is compiled beside the others.
ALONE = {"pybind.cpp"}
# These define helpers of the same names.
ALONE_ON_CPU = {
    "modulated_deform_conv.cpp",
    "psamask.cpp",
    "roi_align.cpp",
    "roi_align_rotated.cpp",
    "rotated_feature_align.cpp",
}
UNITED = "united.cpp"

PROOF = """
import torch
from torch.nn import functional as F
from mmcv import ops

torch.manual_seed(0)

def same(name, found, wanted):
    if not torch.allclose(found, wanted, atol=1e-4):
        raise SystemExit(f"mmcv.ops.{name} is wrong by {(found - wanted).abs().max():.1e}")

x, weight = torch.randn(2, 4, 9, 11), torch.randn(6, 4, 3, 3)
offset, mask = torch.zeros(2, 18, 9, 11), torch.rand(2, 9, 9, 11)
wanted = F.conv2d(x, weight, padding=1)
same("deform_conv2d", ops.deform_conv2d(x, offset, weight, 1, 1), wanted)
plain = ops.modulated_deform_conv2d(x, offset, torch.ones_like(mask), weight, None, 1, 1)
same("modulated_deform_conv2d", plain, wanted)
patches = F.unfold(x, 3, padding=1).view(2, 4, 9, 9, 11) * mask[:, None]
same(
    "modulated_deform_conv2d with a mask",
    ops.modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1),
    torch.einsum("bckhw,ock->bohw", patches, weight.flatten(2)),
)

feature = torch.randn(1, 3, 8, 8)
whole = torch.tensor([[0.0, 0, 0, 8, 8]])
pooled = F.avg_pool2d(feature, 2)
same("roi_align", ops.roi_align(feature, whole, (4, 4), 1.0, 2, "avg", True), pooled)
turned = torch.tensor([[0.0, 4, 4, 8, 8, 0]])
same("roi_align_rotated", ops.roi_align_rotated(feature, turned, (4, 4), 1.0, 2, True), pooled)

def overlap(a, b):
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    both = (high - low).clamp_min(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    return both / (areas[0][:, None] + areas[1][None] - both)

corner = torch.rand(60, 2) * 50
boxes, scores = torch.cat([corner, corner + 5 + torch.rand(60, 2) * 20], 1), torch.rand(60)
same("bbox_overlaps", ops.bbox_overlaps(boxes, boxes), overlap(boxes, boxes))
upright = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2], torch.zeros(60, 1)], 1)
same("box_iou_rotated", ops.box_iou_rotated(upright, upright), overlap(boxes, boxes))
kept = []
for index in scores.argsort(descending=True).tolist():
    if all(overlap(boxes[index : index + 1], boxes[other : other + 1]) <= 0.4 for other in kept):
        kept.append(index)
for name, found in (
    ("nms", ops.nms(boxes, scores, 0.4)[1]),
    ("nms_rotated", ops.nms_rotated(upright, scores, 0.4)[1]),
):
    same(name, found.float(), torch.tensor(kept).float())

weights, spread = torch.randn(1, 9, 4, 4), torch.zeros(1, 16, 4, 4)
for row in range(4):
    for column in range(4):
        for cell in range(9):
            y, x = row + cell // 3 - 1, column + cell % 3 - 1
            if 0 <= y < 4 and 0 <= x < 4:
                spread[0, 4 * y + x, row, column] = weights[0, cell, row, column]
same("PSAMask", ops.PSAMask("collect", (3, 3))(weights), spread)
print("mmcv's operators agree with torch's")
"""


def run(command: list[str], folder: Path | None = None) -> int:
    environment = {**os.environ, "CFLAGS": FLAGS}
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def has_cuda() -> bool:
    """Whether torch is a build for CUDA: its files are compiled by nvcc, one by one."""
    code = "import sys, torch; sys.exit(torch.version.cuda is None)"
    return run([sys.executable, "-c", code]) == 0


def fetch(requirement: Path, folder: Path) -> Path:
    """Download the source distribution and unpack it; the folder of its sources."""
    options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:"]
    if run([*PIP, "download", *options, "-d", str(folder), "-r", str(requirement)]):
        raise OSError("pip could not fetch mmcv's sources")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
        else:
            tar.extractall(folder)
    (sources,) = (path for path in folder.iterdir() if path.is_dir())
    return sources


def unite(folder: Path, alone: set[str]) -> int:
    """Put one file that includes the others in the place of a folder's C++ files; returns their number.

    The others move to a folder beside it, so that includes relative to a file's folder still hold.
    """
    parts = folder.with_name(f"{folder.name}_parts")
    parts.mkdir()
    names = sorted(path.name for path in folder.glob("*.cpp") if path.name not in alone)
    for name in names:
        shutil.move(folder / name, parts / name)
    includes = [f'#include "{parts / name}"\n' for name in names]
    (folder / UNITED).write_text("".join(includes))
    return len(names)


def build_united(requirement: Path) -> bool:
    """Install mmcv from united files and compare its operators with torch; whether both went well."""
    with tempfile.TemporaryDirectory(prefix="mmcv_") as temporary:
        try:
            sources = fetch(requirement, Path(temporary))
            count = unite(sources / SOURCES / "cpu", ALONE_ON_CPU) + unite(sources / SOURCES, ALONE)
        except (OSError, ValueError, tarfile.TarError) as error:
            print(f"mmcv's files could not be put together ({error})", flush=True)
            return False
        print(f"{count} of mmcv's files are compiled as two", flush=True)
        if run([*PIP, *INSTALL, str(sources)]):
            return False
    return run([sys.executable, "-W", "ignore", "-c", PROOF]) == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("requirement", type=Path, help="file with mmcv's pinned version")
    args = parser.parse_args()
    if not has_cuda():
        if build_united(args.requirement):
            return 0
        print("mmcv is built file by file: its united build failed or was wrong, see above", flush=True)
    return run([*PIP, *INSTALL, "-r", str(args.requirement)])


if __name__ == "__main__":
    sys.exit(main())
