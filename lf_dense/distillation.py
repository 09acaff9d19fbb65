"""The address of ``DistilledClassifier`` in configs: ``custom_imports=dict(imports=["lf_dense", "lf_dense.distillation"])``."""

from .training.distillation import DistilledClassifier

__all__ = ["DistilledClassifier"]
