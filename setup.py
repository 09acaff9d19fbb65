"""Entry point of the build; the metadata is in pyproject.toml."""

from setuptools import setup

setup()
