"""Knowledge distillation for mmpretrain's classifiers.

The teacher is any model that mmpretrain can build; timm's are among them. Name this module in a config's
``custom_imports`` beside ``lf_dense``; it imports mmpretrain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from mmpretrain.models.classifiers import ImageClassifier
from mmpretrain.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UsageError

MODES = ("soft", "hard")


@MODELS.register_module()
class DistilledClassifier(ImageClassifier):
    """mmpretrain's ``ImageClassifier`` with a second loss: a teacher's view of the same augmented images.

    ``"hard"`` is the cross-entropy to the teacher's decision, ``"soft"`` the Kullback-Leibler divergence of
    both distributions at a temperature T, times T^2 (Touvron et al., "Training data-efficient image
    transformers & distillation through attention"). The whole loss is ``(1 - weight) loss + weight
    loss_distill``.

    The teacher is no part of the state dict and takes no gradient: checkpoints are those of an
    ``ImageClassifier``.

    Args:
        teacher: config of a model that maps images to logits when called with them alone:
            ``dict(type="TimmClassifier", model_name="regnety_160", pretrained=True)`` for example.
        mode: ``"hard"`` or ``"soft"``.
        weight: share of the teacher in the loss, in [0, 1].
        temperature: of ``"soft"``.
        teacher_mean, teacher_std: normalisation that the teacher was trained with, of RGB values from 0 to
            255; ImageNet's usual ones by default. The student's images are turned into it from the
            normalisation of its ``data_preprocessor``.
        teacher_classes: the teacher's index of each of the student's classes, where they differ.
        **kwargs: ``ImageClassifier``'s.

    Raises:
        UsageError: an argument is out of range, or the teacher's classes are not the student's.
    """

    def __init__(
        self,
        *args: Any,
        teacher: dict,
        mode: str = "hard",
        weight: float = 0.5,
        temperature: float = 3.0,
        teacher_mean: Sequence[float] = (123.675, 116.28, 103.53),
        teacher_std: Sequence[float] = (58.395, 57.12, 57.375),
        teacher_classes: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if mode not in MODES:
            raise UsageError(f"the distillation mode {mode!r} does not exist: use {' or '.join(MODES)}.")
        if not 0 <= weight <= 1 or not temperature > 0:
            raise UsageError(
                f"distillation: weight {weight}, temperature {temperature}: the first is in [0, 1], the "
                "second above 0."
            )
        self.mode = mode
        self.weight = weight
        self.temperature = temperature
        self.register_buffer("teacher_mean", torch.tensor(teacher_mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("teacher_std", torch.tensor(teacher_std).view(-1, 1, 1), persistent=False)
        self.teacher_classes = None if teacher_classes is None else list(teacher_classes)
        built = MODELS.build(teacher).eval().requires_grad_(False)
        # Beside torch's own bookkeeping: a registered teacher would be saved, counted and initialised with
        # the student.
        object.__setattr__(self, "teacher", built)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        """Move the teacher along with the student."""
        self.teacher._apply(fn)
        return super()._apply(fn, *args, **kwargs)

    @torch.no_grad()
    def teacher_logits(self, images: Tensor) -> Tensor:
        """What the teacher says of the student's images ``(B, 3, H, W)``: ``(B, num_classes)``."""
        preprocessor: Any = self.data_preprocessor
        if getattr(preprocessor, "mean", None) is not None:
            images = images * preprocessor.std + preprocessor.mean
        logits = self.teacher((images - self.teacher_mean) / self.teacher_std)
        return logits if self.teacher_classes is None else logits[:, self.teacher_classes]

    def loss(self, inputs: Tensor, data_samples: list) -> dict[str, Tensor]:
        """The head's losses, its first scaled, and ``loss_distill``."""
        feats = self.extract_feat(inputs)
        losses = self.head.loss(feats, data_samples)
        student, teacher = self.head(feats).float(), self.teacher_logits(inputs).float()
        if student.shape != teacher.shape:
            raise UsageError(
                f"the teacher tells {teacher.shape[1]} classes apart and the student {student.shape[1]}: give"
                " teacher_classes, the teacher's index of each of the student's classes."
            )
        if self.mode == "hard":
            distilled = F.cross_entropy(student, teacher.argmax(1))
        else:
            log_student, log_teacher = (
                F.log_softmax(logits / self.temperature, dim=1) for logits in (student, teacher)
            )
            divergence = F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
            distilled = divergence * self.temperature**2
        losses["loss"] = losses["loss"] * (1 - self.weight)
        losses["loss_distill"] = distilled * self.weight
        return losses
