"""A tool's output without what frameworks and libraries say on the way."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

import cv2
import mmengine
from mmengine.logging import MMLogger

# What stands between the caller of print_log and a filter of the logger's.
_LOGGING = ("logging", "mmengine.logging", __name__)


def _is_heard(record: logging.LogRecord) -> bool:
    """Whether a record is an error, or a warning of ours: frameworks and this package share one logger."""
    if record.levelno != logging.WARNING:
        return record.levelno > logging.WARNING
    frame = sys._getframe(1)
    while frame.f_back and f"{frame.f_globals.get('__name__')}.".startswith(
        tuple(f"{name}." for name in _LOGGING)
    ):
        frame = frame.f_back
    return f"{frame.f_globals.get('__name__')}.".startswith("lf_dense.")


@contextlib.contextmanager
def quiet(verbose: bool = False) -> Iterator[None]:
    """Hide what frameworks and libraries print, log and warn of; errors and our own warnings are shown.

    Standard output is closed to everybody but mmengine's logger meanwhile: print after the block.

    Args:
        verbose: hide nothing.
    """
    if verbose:
        yield
        return
    # OpenCV's and FFmpeg's messages pass Python by.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    cv2_level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    # The logger takes hold of standard output when it is made, so it is made before that is closed.
    handlers = list(MMLogger.get_current_instance().handlers)
    for handler in handlers:
        handler.addFilter(_is_heard)
    try:
        with (
            open(os.devnull, "w") as nowhere,
            warnings.catch_warnings(),
            contextlib.redirect_stdout(nowhere),
        ):
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"lf_dense\b")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_heard)
        cv2.utils.logging.setLogLevel(cv2_level)


def progress_bar(total: int) -> mmengine.ProgressBar | None:
    """A started bar of ``total`` steps (0: not known) in a terminal, whoever has closed standard output.

    A bar of many lines is no bar: there is none where the output is a file.
    """
    if not os.isatty(1) or sys.__stdout__ is None:
        return None
    return mmengine.ProgressBar(total, file=sys.__stdout__)


def end_bar(bar: mmengine.ProgressBar | None) -> None:
    """End the line of a bar, where there is one."""
    if bar:
        bar.file.write("\n")
        bar.file.flush()
