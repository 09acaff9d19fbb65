"""Memory that a process keeps for its next step instead of giving it back to the system."""

from __future__ import annotations

import ctypes
import os
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_memory() -> bool:
    """Let the C library keep freed blocks for the whole process, from now on.

    glibc gives large blocks back when they are freed, and the next step's first touch of every page enters
    the kernel again: half the time of a model's step on a CPU. Kept, the process stays at its highest
    resident size between steps, and that grows a little, since blocks no longer fit each other's places
    exactly. Our tools call this; nothing does on import.

    Returns:
        Whether memory is kept. False without glibc (macOS, Windows, musl), and where the user has set the
        allocator up already, by ``MALLOC_...`` variables or ``GLIBC_TUNABLES``.
    """
    if any(name in os.environ for name in _VARIABLES) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    library = _glibc()
    # No block is mapped by itself, and the heap's end is never given back.
    return bool(library and library.mallopt(_M_MMAP_MAX, 0) and library.mallopt(_M_TRIM_THRESHOLD, -1))


def give_back() -> None:
    """Give freed memory back to the system once; blocks that are kept all the same fill up again later."""
    library = _glibc()
    if library:
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, where it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None
