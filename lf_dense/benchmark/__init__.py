"""Measuring operators, the backbone and training steps."""
