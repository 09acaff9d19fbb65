"""The commands in README and docs: their tools take their options, and the configs that they name are there.

They are parsed, not run: most need data or a GPU. End-to-end tests run the tools.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys

import pytest

pytest.importorskip("mmengine")

from support import ROOT
from support.driving import load_tool

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"^ *(?:\.venv/bin/)?python tools/(\w+)\.py ((?:.*\\\n)*.*)$", re.M)


class Parsed(Exception):
    """A tool's command line was parsed to its end."""


def commands():
    for page in PAGES:
        for tool, rest in COMMAND.findall(page.read_text()):
            text = re.sub(r"\\\n\s*", "", rest)
            # What a shell fills in.
            text = re.sub(r"\$\{?@[^}\s]*\}?", "", text)
            yield pytest.param(tool, text, id=f"{page.name}:{tool} {text}"[:100])


def test_commands_are_found():
    assert len(list(commands())) > 45


@pytest.mark.parametrize(("tool", "text"), list(commands()))
def test_a_command_is_one_that_its_tool_takes(tool, text, monkeypatch):
    def alone(parse):
        def parse_alone(parser, *arguments):
            parse(parser, *arguments)
            raise Parsed

        return parse_alone

    def refuse(parser, message):
        pytest.fail(f"tools/{tool}.py {text}: {message}")

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, alone(getattr(argparse.ArgumentParser, name)))
    monkeypatch.setattr(argparse.ArgumentParser, "error", refuse)
    words = shlex.split(text, comments=True)
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *words])
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            load_tool(tool).main()
    else:
        with pytest.raises(Parsed):
            load_tool(tool).main()
    for word in words:
        if word.startswith("configs/"):
            assert (ROOT / word).is_file(), f"{word} is not there"
