"""What several tests share: driving the tools, references, emulated operators, hostile files."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
