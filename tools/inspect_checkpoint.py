"""Say what a checkpoint is: its model, arch, size and metadata, and whether the hash in its name fits."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lf_dense import LaplacianFormer
from lf_dense.errors import UsageError, run_tool, tool_parser
from lf_dense.presets import ARCHS
from lf_dense.training.cli import add_trust_option
from lf_dense.weights.pretrained import compare, find_backbone
from lf_dense.weights.publishing import arch_of
from lf_dense.weights.reading import HASHED_NAME, is_remote, read_checkpoint, tensors_of, trust_checkpoint


def parse_args() -> argparse.Namespace:
    parser = tool_parser(description=__doc__)
    parser.add_argument("checkpoint", help="path or address, .pth or .safetensors")
    parser.add_argument(
        "--arch", choices=ARCHS, help="list what a LaplacianFormer of this size would take from it"
    )
    parser.add_argument("--tensors", action="store_true", help="list every tensor")
    add_trust_option(parser)
    return parser.parse_args()


def say(name: str, value: object) -> None:
    print(f"{name:<18}{value}")


def count(tensors: Mapping[str, Tensor]) -> str:
    return f"{sum(value.numel() for value in tensors.values()):,}"


def describe_hash(path: Path) -> str:
    """The hash of a file, and whether it is the one in its name."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    named = HASHED_NAME.search(path.name)
    if not named:
        return digest
    if digest.startswith(named[1]):
        return f"{digest}, as its name says"
    return f"{digest}, NOT {named[1]} as its name says"


def main() -> None:
    args = parse_args()
    if args.trust_checkpoint:
        trust_checkpoint(args.checkpoint)
    checkpoint = read_checkpoint(args.checkpoint)
    tensors = tensors_of(checkpoint)
    try:
        found = find_backbone(checkpoint, args.checkpoint)
    except UsageError as error:
        found = None
        say("backbone", f"none: {error}")
    else:
        say("backbone", f"{found.form}, {count(found.tensors)} numbers, arch {arch_of(found.tensors)}")
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in tensors.values())
    say("tensors", f"{len(tensors)}, {count(tensors)} numbers: {dict(dtypes)}")
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        say("finite", f"no: {len(broken)} tensors with NaN or infinity, {broken[0]} the first")
    else:
        say("finite", "yes")
    others = [key for key in checkpoint if key not in ("state_dict", "meta") and key not in tensors]
    say("beside them", ", ".join(others) or "nothing")
    meta = checkpoint.get("meta") if isinstance(checkpoint.get("meta"), dict) else {}
    for key, value in meta.items():
        say(key, value if key != "cfg" else f"a config of {len(str(value).splitlines())} lines")
    if not is_remote(args.checkpoint):
        say("sha256", describe_hash(Path(args.checkpoint)))
    if args.tensors:
        for name, value in tensors.items():
            print(f"  {name}  {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}")
    if args.arch and found:
        print("\n".join(compare(LaplacianFormer(args.arch).state_dict(), found, args.checkpoint)[0].lines()))


if __name__ == "__main__":
    run_tool(main)
