"""How command lines end: user errors with a sentence and exit code 2, everything else as it is."""

from __future__ import annotations

import sys
import warnings

import pytest

from lf_dense.errors import UsageError, reason_of, run_tool, tool_parser


def ended(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["tool", *arguments])
    with pytest.raises(SystemExit) as info:
        run_tool(main)
    return info.value.code


def raising(error):
    def main():
        raise error

    return main


def test_a_user_error_is_one_sentence_and_exit_code_2(monkeypatch, capsys):
    assert ended(monkeypatch, raising(UsageError("no such file: give another."))) == 2
    assert capsys.readouterr().err == "error: no such file: give another.\n"


def test_traceback_shows_a_user_error_whole(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool", "--traceback"])
    with pytest.raises(UsageError):
        run_tool(raising(UsageError("no such file")))


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tool"])
    with pytest.raises(ZeroDivisionError):
        run_tool(lambda: 1 // 0)


@pytest.mark.parametrize("code", [None, 0, 1])
def test_the_code_that_main_returns_is_the_exit_code(monkeypatch, code):
    assert ended(monkeypatch, lambda: code) == code


def test_a_torchvision_without_its_decoders_is_no_news(monkeypatch):
    text = "Failed to load image Python extension: 'image.so'"

    def main():
        with warnings.catch_warnings(record=True) as caught:
            for module in ("torchvision.io.image", "mine"):
                warnings.warn_explicit(text, UserWarning, "image.py", 13, module=module)
        return len(caught)

    assert ended(monkeypatch, main) == 1


def test_every_tool_takes_traceback():
    assert tool_parser("what it does").parse_args(["--traceback"]).traceback
    assert not tool_parser("what it does").parse_args([]).traceback


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("two\n  lines."), "two lines"),
        (KeyError("it's missing"), "it's missing"),
        (AssertionError(), "a AssertionError without a message"),
    ],
)
def test_reasons_are_one_line(error, reason):
    assert reason_of(error) == reason
