"""What a quiet tool shows: errors and our own warnings, and nothing that frameworks say."""

from __future__ import annotations

import io
import logging
import sys
import warnings

import pytest

pytest.importorskip("mmengine")
from mmengine.logging import MMLogger, print_log

from lf_dense.training import quietness
from lf_dense.training.quietness import end_bar, progress_bar, quiet


@pytest.fixture
def logged():
    """What reaches the handlers of mmengine's logger."""
    stream = io.StringIO()
    logger, handler = MMLogger.get_current_instance(), logging.StreamHandler(stream)
    logger.handlers.append(handler)
    yield stream
    logger.handlers.remove(handler)


def log_from(module, message, level):
    """Log as a module of that name would."""
    code = "print_log(message, logger='current', level=level)"
    exec(code, {"__name__": module, "print_log": print_log, "message": message, "level": level})


def say_everything():
    for module in ("mmdet.models", "lf_dense.weights.reading"):
        log_from(module, f"{module} informs", logging.INFO)
        log_from(module, f"{module} warns", logging.WARNING)
        log_from(module, f"{module} fails", logging.ERROR)


def test_errors_and_our_own_warnings_are_logged(logged):
    with quiet():
        say_everything()
    heard = logged.getvalue().splitlines()
    assert heard == ["mmdet.models fails", "lf_dense.weights.reading warns", "lf_dense.weights.reading fails"]
    say_everything()
    assert len(logged.getvalue().splitlines()) == 3 + 6  # nothing stays hidden after the block


def test_verbose_hides_nothing(logged, capsys):
    with quiet(verbose=True):
        say_everything()
        print("printed")
    assert len(logged.getvalue().splitlines()) == 6
    assert capsys.readouterr().out.endswith("printed\n")


def test_warnings_of_others_are_hidden():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet():
            for module in ("torch.functional", "lf_dense_other", "lf_dense.training.runs"):
                warnings.warn_explicit(f"from {module}", UserWarning, "x.py", 1, module=module)
    assert [str(one.message) for one in caught] == ["from lf_dense.training.runs"]


def test_what_others_print_is_hidden_until_the_end_of_the_block(capsys):
    def fail():
        with quiet():
            print("chatter")
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    print("result")
    assert capsys.readouterr().out == "result\n"


def test_a_bar_is_for_terminals(monkeypatch):
    monkeypatch.setattr(quietness.os, "isatty", lambda descriptor: False)
    assert progress_bar(3) is None
    end_bar(None)
    terminal = io.StringIO()
    monkeypatch.setattr(quietness.os, "isatty", lambda descriptor: True)
    monkeypatch.setattr(sys, "__stdout__", terminal)
    with quiet():
        bar = progress_bar(3)
        bar.update()
        end_bar(bar)
    assert "1/3" in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")
