"""Where configs find ``DistilledClassifier``: ``imports=["lf_dense", "lf_dense.distillation"]``."""

from .training.distillation import DistilledClassifier

__all__ = ["DistilledClassifier"]
