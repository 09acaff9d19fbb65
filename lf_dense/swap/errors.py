"""The error of a swap that cannot be made."""

from __future__ import annotations

from ..errors import UsageError


class SwapError(UsageError):
    """The backbone of a config cannot be replaced by a four-level pyramid; the message says why."""
