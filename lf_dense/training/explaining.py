"""Errors that a config causes deep inside mmengine or torch, as a ``UsageError`` that says what to set."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Iterator

from ..errors import UsageError, reason_of
from ..frameworks import type_name

# What a config's values make a constructor raise. Anything else is a defect, and keeps its traceback.
_BUILD_ERRORS = (AssertionError, AttributeError, ImportError, KeyError, TypeError, ValueError)
_BUILDERS = ("build_from_cfg", "build_optim_wrapper")
_CHANNELS = (
    re.compile(r"expected input\[.*\] to have (?P<wanted>\d+) channels, but got (?P<given>\d+) channels"),
    re.compile(r"mat1 and mat2 shapes cannot be multiplied \(\d+x(?P<given>\d+) and (?P<wanted>\d+)x\d+\)"),
)


def _being_built(error: BaseException) -> str | None:
    """The type of the component that mmengine was building when the error was raised, if any."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    settings = [frame.f_locals.get("cfg") for frame in frames if frame.f_code.co_name in _BUILDERS]
    if not settings:
        return None
    return type_name(settings[-1]) if isinstance(settings[-1], dict) else "component"


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Explain what a block raises where the config is the cause.

    Raises:
        UsageError: a component of the config cannot be built, or a layer gets too few or too many channels.
    """
    try:
        yield
    except UsageError:
        raise
    except RuntimeError as error:
        found = next(filter(None, (pattern.search(str(error)) for pattern in _CHANNELS)), None)
        if found is None:
            raise
        raise UsageError(
            f"a layer of the model takes {found['wanted']} channels and gets {found['given']}: in_channels "
            "of the neck and the heads have to be those of the maps that they read (--traceback shows which)."
        ) from error
    except _BUILD_ERRORS as error:
        component = _being_built(error)
        if component is None:
            raise
        raise UsageError(
            f"the config's {component} cannot be built: {reason_of(error)} (--traceback shows where)."
        ) from error
