"""Say what a checkpoint is: its model, arch, size and metadata, and whether the hash in its name fits."""

from __future__ import annotations

from lf_dense.errors import run_tool, tool_parser
from lf_dense.presets import ARCHS
from lf_dense.training.cli import add_trust_option, trust_named
from lf_dense.weights.inspecting import inspect


def main() -> None:
    parser = tool_parser(description=__doc__)
    parser.add_argument("checkpoint", help="path or address, .pth or .safetensors")
    parser.add_argument(
        "--arch", choices=ARCHS, help="list what a LaplacianFormer of this size would take from it"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    add_trust_option(parser)
    args = parser.parse_args()
    trust_named(args)
    print("\n".join(inspect(args.checkpoint, args.arch, args.tensors)))


if __name__ == "__main__":
    run_tool(main)
