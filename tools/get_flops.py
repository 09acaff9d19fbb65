"""Parameters and FLOPs of the presets, with the papers' 1000-way classifier: the table in the README."""

from __future__ import annotations

import argparse

from lf_dense import LaplacianFormer
from lf_dense.benchmark.complexity import count
from lf_dense.errors import run_tool, tool_parser
from lf_dense.presets import ARCHS

NUM_CLASSES = 1000


def main() -> None:
    parser = tool_parser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        "--arch", nargs="+", choices=list(ARCHS), default=list(ARCHS), help="presets to count"
    )
    parser.add_argument(
        "--shape", nargs=2, type=int, default=[224, 224], metavar=("H", "W"), help="input size"
    )
    args = parser.parse_args()
    print(
        "| arch | depths | params | FLOPs (convolutions and linear layers) | with the attention's own work |"
    )
    print("|---|---|---|---|---|")
    for arch in args.arch:
        backbone = LaplacianFormer(arch)
        found = count(backbone, tuple(args.shape))
        classifier = backbone.embed_dims[-1] * NUM_CLASSES
        params, macs = found.params + classifier + NUM_CLASSES, found.macs + classifier
        with_attention = macs + found.attention_macs
        print(
            f"| {arch} | {backbone.depths} | {params / 1e6:.2f} M | {macs / 1e9:.2f} G |"
            f" {with_attention / 1e9:.2f} G |"
        )


if __name__ == "__main__":
    run_tool(main)
