"""The presets of the pyramid, and the constants of the method that several parts share.

Source: "LaplacianFormer: Rethinking Linear Attention with Laplacian Kernel" (arXiv 2604.20368).
``docs/method.md`` says which values are the paper's and which are the project's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Best of the paper's ablation: the length over which the kernel falls by e.
KERNEL_SCALE = 4.0
# Landmarks are pooled over a fixed grid: at 224 x 224 this is the paper's pooling in every stage.
LANDMARK_GRID = (7, 7)
# The solver's steps, and its ridge on the diagonal of the landmarks' matrix.
NEWTON_ITERS = 10
EPS = 1e-2
# The kernel mass at which a query's row is half its own and half the mean.
TAU = 1e-2
# The ridge of the variances in the whitening forms.
DELTA = 1e-5
NORMALIZATION = "mass"

STRIDES = (4, 8, 16, 32)
NUM_STAGES = len(STRIDES)
_WIDTHS = {"embed_dims": (64, 128, 320, 512), "num_heads": (1, 2, 5, 8), "mlp_ratios": (8, 8, 4, 4)}
# Depths are reconstructed: the paper publishes parameters and FLOPs, and these meet both within 1 %.
ARCHS: dict[str, dict[str, tuple[int, ...]]] = {
    "tiny": {**_WIDTHS, "depths": (2, 2, 2, 2)},
    "small": {**_WIDTHS, "depths": (3, 3, 10, 3)},
    "medium": {**_WIDTHS, "depths": (3, 3, 19, 6)},
    "large": {**_WIDTHS, "depths": (3, 3, 35, 5)},
    "huge": {**_WIDTHS, "depths": (3, 5, 52, 3)},
}


def resolve_arch(arch: str | Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Look a preset up, or check a dict of one.

    A dict has the keys ``embed_dims``, ``depths``, ``num_heads`` and ``mlp_ratios``.

    Raises:
        ValueError: an unknown name, wrong keys, or values that are not four positive integers.
    """
    if isinstance(arch, str):
        if arch not in ARCHS:
            raise ValueError(f"the arch {arch!r} does not exist: use one of {', '.join(ARCHS)}, or a dict.")
        return ARCHS[arch]
    wanted = set(ARCHS["tiny"])
    if not isinstance(arch, Mapping) or set(arch) != wanted:
        got = sorted(arch) if isinstance(arch, Mapping) else type(arch).__name__
        raise ValueError(
            f"a custom arch is a dict with exactly the keys {sorted(wanted)}, and this one has {got}."
        )
    for key, values in arch.items():
        is_list = isinstance(values, (tuple, list)) and len(values) == NUM_STAGES
        if not is_list or not all(isinstance(n, int) and n >= 1 for n in values):
            raise ValueError(
                f"arch[{key!r}] is {values!r}, and has to be {NUM_STAGES} positive integers, one per stage."
            )
    return {key: tuple(values) for key, values in arch.items()}
