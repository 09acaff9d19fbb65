"""Our operators in other runtimes: the compiled libraries, and how a runtime gets them.

Models exported with nodes of ours need them. Neither torch nor mmengine is imported.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import UsageError, reason_of

__all__ = ["operator_library", "register_onnxruntime", "register_openvino"]

_FOLDER = Path(__file__).parents[1] / "backends"
# What the build wants of each runtime.
_NEEDED = {
    "onnxruntime": "onnxruntime's header, whose folder LF_DENSE_ONNXRUNTIME_INCLUDE names",
    "openvino": "the package openvino, which has to be installed before",
}


def operator_library(runtime: str) -> Path:
    """The library with our operators for ``"onnxruntime"`` or ``"openvino"``.

    A program of its own loads it with the runtime's C or C++ interface; it needs no Python.

    Raises:
        UsageError: there is no such runtime, or its library was not built.
    """
    if runtime not in _NEEDED:
        raise UsageError(f"the runtime {runtime!r} has no operator library: use one of {', '.join(_NEEDED)}.")
    library = _FOLDER / f"_operators_{runtime}.so"
    if not library.is_file():
        raise UsageError(
            f"lf_dense's operators for {runtime} were not built, since the build found no C++ compiler or "
            f"lacked {_NEEDED[runtime]}: install lf_dense again with --no-build-isolation where both are "
            "there (docs/operators.md), or export the model without the operators."
        )
    return library


def register_onnxruntime(session_options: Any) -> None:
    """Let sessions with these ``onnxruntime.SessionOptions`` run the nodes of the domain lf_dense.

    Raises:
        UsageError: the library was not built, or this onnxruntime is too old for it.
    """
    library = operator_library("onnxruntime")
    try:
        session_options.register_custom_ops_library(str(library))
    # onnxruntime's errors have no common class.
    except Exception as error:
        raise UsageError(f"onnxruntime does not take {library.name}: {reason_of(error)}.") from None


def register_openvino(core: Any) -> None:
    """Let this ``openvino.Core`` read and run the nodes of the domain lf_dense, in ONNX and IR files.

    Raises:
        UsageError: the library was not built, or was built for another version of OpenVINO.
    """
    import openvino

    library = operator_library("openvino")
    # Its C++ interface changes from one release to the next.
    built_for = re.search(rb"lf_dense's operators for OpenVINO ([\d.]+)", library.read_bytes())
    version = re.match(r"[\d.]+", openvino.get_version())
    if built_for and version and built_for[1].decode() != version[0]:
        raise UsageError(
            f"lf_dense's operators were built for OpenVINO {built_for[1].decode()}, and this is "
            f"{version[0]}: install lf_dense again with --no-build-isolation, which builds them for this one."
        )
    try:
        core.add_extension(str(library))
    except RuntimeError as error:
        raise UsageError(f"OpenVINO does not take {library.name}: {reason_of(error)}.") from None
