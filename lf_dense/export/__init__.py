"""Models as files that run without torch: how they are written, and the runtime that reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .runtime import Runtime

__all__ = ["Runtime"]


def __getattr__(name: str) -> object:
    # The runtime needs numpy and OpenCV, which nothing else of the package asks for.
    if name != "Runtime":
        raise AttributeError(f"module 'lf_dense.export' has no attribute {name!r}")
    try:
        from .runtime import Runtime
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "cv2"):
            raise
        raise ImportError(
            f"lf_dense.export.Runtime needs {error.name}: pip install 'lf_dense[runtime]'."
        ) from None
    return Runtime
