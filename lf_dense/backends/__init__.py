"""Which implementation serves a call.

The argument decides, else the ``use_backend`` block around the call, else the environment. ``"reference"`` is
plain PyTorch, ``"native"`` the compiled operators of ``ops/``, and ``"auto"`` native where it can serve and
the reference elsewhere.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
from collections.abc import Iterator

import torch

from . import native

BACKENDS = ("auto", "reference", "native")
# These are there while a model is exported, each a module beside this one: operators of every runtime, the
# attention as a node of our own, and a whole block as such nodes.
EXPORT_FORMS = ("standard", "node", "layers")
ENVIRONMENT_VARIABLE = "LF_DENSE_BACKEND"

_logger = logging.getLogger("lf_dense")
_in_block: contextvars.ContextVar[str | None] = contextvars.ContextVar("lf_dense_backend", default=None)


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"{origin} asks for the backend {name!r}, which does not exist: use one of {', '.join(BACKENDS)}."
        )
    return name


def requested_backend(argument: str | None = None) -> str:
    """The backend asked for.

    That is ``argument``, else the innermost ``use_backend``, else ``LF_DENSE_BACKEND``, else ``"auto"``.

    Raises:
        ValueError: the name is none of ``BACKENDS``; the message says where it came from.
    """
    if argument is not None:
        return _checked(argument, "the argument backend")
    in_block = _in_block.get()
    if in_block is not None:
        return in_block
    return _checked(
        os.environ.get(ENVIRONMENT_VARIABLE, "auto"), f"the environment variable {ENVIRONMENT_VARIABLE}"
    )


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every call in the block by the backend ``name``, unless the call names one itself.

    Raises:
        ValueError: the name is none of ``BACKENDS``.
    """
    token = _in_block.set(_checked(name, "use_backend"))
    try:
        yield
    finally:
        _in_block.reset(token)


@contextlib.contextmanager
def exporting(form: str) -> Iterator[None]:
    """Serve every call in the block in a form for other runtimes, one of ``EXPORT_FORMS``."""
    token = _in_block.set(form)
    try:
        yield
    finally:
        _in_block.reset(token)


def export_form() -> str | None:
    """Which of ``EXPORT_FORMS`` the call is traced in for another runtime; None where it is not."""
    form = _in_block.get()
    return form if form in EXPORT_FORMS else None


@functools.cache
def _log_once(obstacle: str) -> None:
    _logger.warning(
        "lf_dense runs its plain PyTorch reference in place of the native operators, since %s.", obstacle
    )


def _forward_mode() -> str | None:
    """The obstacle of a call within ``torch.func.jvp`` or ``dual_level``, whose tangents operators drop."""
    if torch.autograd.forward_ad._current_level < 0:
        return None
    return "the call is in forward-mode differentiation, and they have a backward pass alone"


@native.constant_result
def choose_backend(argument: str | None, device: torch.device) -> str:
    """Resolve a request to ``"reference"`` or ``"native"``, by the device.

    Within ``exporting`` it is that form. Under torch.compile this runs once, when the call is traced.

    ``"auto"`` that finds the native operators unable to serve logs the reason, once.

    Raises:
        RuntimeError: native was asked for and cannot serve.
        ValueError: the name is none of ``BACKENDS``.
    """
    requested = requested_backend(argument)
    if requested == "reference" or requested in EXPORT_FORMS:
        return requested
    obstacle = native.obstacle(device) or _forward_mode()
    if obstacle is None:
        return "native"
    if requested == "native":
        raise RuntimeError(
            f"the native operators cannot serve this call, since {obstacle}: use the backend 'auto' or "
            "'reference'."
        )
    _log_once(obstacle)
    return "reference"
