"""Measuring operators, the backbone and training steps: what ``tools/benchmark.py`` is made of."""
