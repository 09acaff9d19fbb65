"""LaplacianFormer in place of the backbone of any detection, segmentation or classification config."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from ..errors import UsageError
from ..frameworks import framework_of, load_config, type_name
from ..laplacianformer import LaplacianFormer
from ..presets import STRIDES
from ..weights.reading import is_remote, read_checkpoint
from .classifying import rewire_classifier, rewire_retriever
from .errors import SwapError
from .levels import Levels, choose_stages, measure_levels
from .rewiring import Rewiring, check_replaceable
from .settings import as_list, backbone_of, image_channels

# Pixels 0 to 255, red first: what ImageNet weights are trained with.
MEAN = [123.675, 116.28, 103.53]
STD = [58.395, 57.12, 57.375]
# AdamW for recipes of another optimizer (learning rate, images per step, weight decay): PVTv2's RetinaNet,
# Swin's UPerNet and Swin's ImageNet recipe.
_RECIPES = {"mmdet": (1e-4, 16, 1e-4), "mmseg": (6e-5, 16, 0.01), "mmpretrain": (1e-3, 1024, 0.05)}
_ADAM = ("Adam", "AdamW")
# torch's own, where a recipe states none.
_DEFAULT_LR = 1e-3
# These know parameters by mmengine's rules or by a backbone's own get_layer_depth.
_CONSTRUCTORS = ("", "DefaultOptimWrapperConstructor", "LearningRateDecayOptimWrapperConstructor")
_NO_BACKBONE = {
    "Detectron2Wrapper": "Detectron2Wrapper keeps its backbone in detectron2's own config",
    "MultimodalEncoderDecoder": (
        "MultimodalEncoderDecoder needs CLIP's image encoder, whose features its text encoder was trained "
        "with"
    ),
    "TimmClassifier": "TimmClassifier is a whole network of timm's",
    "HuggingFaceClassifier": "HuggingFaceClassifier is a whole network of transformers'",
    "OFA": "OFA's encoder reads text and the features of its own ResNet in one sequence",
}
# Where models of images and text keep their image encoder.
_ENCODERS = ("vision_encoder", "visual_encoder", "vision_backbone")
_RETRIEVER = "ImageToImageRetriever"


def _reads_vectors(model: dict[str, Any]) -> bool:
    """Whether a model's neck is one that could pool maps, and gets vectors instead: those of a ViT."""
    neck = model.get("neck")
    return isinstance(neck, dict) and neck.get("with_avg_pool") is False


class _Swap:
    """One config that gets another backbone; ``notes`` collects what its user should know."""

    def __init__(self, config: Config, backbone: dict[str, Any]) -> None:
        self.config = config
        self.scope = framework_of(config).scope
        self.backbone = backbone
        self.notes: list[str] = []
        # These concern only who trains.
        self.training_notes: list[str] = []

    def run(self) -> None:
        holder, old = self._find()
        owners = (self.config, self.config.model, holder)
        preprocessors = [owner.get("data_preprocessor") for owner in owners]
        channels = min(image_channels(holder, preprocessor) for preprocessor in preprocessors)
        if channels != 3 or "in_channels" in old:
            self.backbone.setdefault("in_channels", channels)
        if old.get("with_cp"):
            self.backbone.setdefault("with_cp", True)
        if type_name(holder) in ("ImageClassifier", _RETRIEVER) or _reads_vectors(holder):
            self._rewire_last_map(holder, old)
        else:
            self._rewire(holder, old)
        if type_name(holder) != _RETRIEVER:
            holder["backbone"] = ConfigDict(self.backbone)
        self._drop_weights(holder)
        if channels == 3:
            self._set_preprocessing(preprocessors)
        self._set_optimizer(type_name(old))
        self._import_lf_dense()

    def _find(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model with the backbone to replace, and the backbone's settings.

        A tracker's backbone is its detector's.
        """
        model = self.config.get("model")
        if not isinstance(model, dict):
            raise SwapError(
                "the config has no model, so there is no backbone to replace: it is a part for other configs,"
                " or no training config."
            )
        name = type_name(model)
        if name in _NO_BACKBONE:
            raise SwapError(f"the backbone cannot be replaced: {_NO_BACKBONE[name]}.")
        if any(isinstance(model.get(key), dict) for key in _ENCODERS):
            raise SwapError(
                f"the backbone cannot be replaced: the text side of {name} was trained with its image "
                "encoder, and reads what that returns."
            )
        if name == _RETRIEVER:
            return model, self._retriever_backbone(model)
        holder = model if isinstance(model.get("backbone"), dict) else model.get("detector")
        if not isinstance(holder, dict) or not isinstance(holder.get("backbone"), dict):
            raise SwapError(
                f"the backbone cannot be replaced: {name} has none (no model.backbone and no "
                "model.detector.backbone)."
            )
        if not holder["backbone"].get("type"):
            raise SwapError(
                f"the backbone cannot be replaced: the {name} of this config does not say which one it has."
            )
        if type_name(holder["backbone"]) == "LaplacianFormer":
            raise SwapError(
                "the config has a LaplacianFormer already: set model.backbone.arch to change its size."
            )
        return holder, holder["backbone"]

    def _retriever_backbone(self, model: dict[str, Any]) -> dict[str, Any]:
        old = backbone_of(model)
        if old is None or model.get("backbone"):
            raise SwapError(
                f"the backbone cannot be replaced: the image_encoder of this {_RETRIEVER} is no list of a "
                "backbone and its pooling."
            )
        if type_name(old) == "LaplacianFormer":
            raise SwapError("the config has a LaplacianFormer already: set its arch to change its size.")
        return old

    def _rewire(self, holder: dict[str, Any], old: dict[str, Any]) -> None:
        check_replaceable(holder, self.scope)
        before = measure_levels(old, self.scope)
        stages = tuple(self.backbone.get("out_indices") or choose_stages(before))
        if len(stages) != len(before.channels):
            raise SwapError(
                f"out_indices is {stages}, and the config's neck or heads read {len(before.channels)} maps: "
                "give as many."
            )
        self.backbone["out_indices"] = stages
        dims = self._build_on_meta().embed_dims
        after = Levels(tuple(dims[stage] for stage in stages), tuple(STRIDES[stage] for stage in stages))
        Rewiring(holder, before, after, by_index=self.scope == "mmseg").run()
        if before.strides != after.strides:
            self.notes.append(f"its maps had strides {before.strides}, and have {after.strides} now")

    def _rewire_last_map(self, model: dict[str, Any], old: dict[str, Any]) -> None:
        """A classifier, a retriever and a neck on tokens read the last map, pooled."""
        self.backbone["out_indices"] = (3,)
        width = self._build_on_meta().embed_dims[-1]
        if type_name(model) == _RETRIEVER:
            rewire_retriever(model, self.backbone, width)
        elif type_name(model) == "ImageClassifier":
            self.notes += rewire_classifier(model, old, width)
        else:
            check_replaceable(model, self.scope)
            model["neck"].update(in_channels=width, with_avg_pool=True)
            self.notes.append(f"the neck {type_name(model['neck'])} read tokens, and pools the last map now")

    def _build_on_meta(self) -> LaplacianFormer:
        """Our backbone, without memory for its tensors: it checks the options and knows widths and names."""
        options = {key: value for key, value in self.backbone.items() if key not in ("type", "init_cfg")}
        with torch.device("meta"):
            return LaplacianFormer(**options)

    def _drop_weights(self, holder: dict[str, Any]) -> None:
        """Drop all weights of the old model: none are loaded in part."""
        for settings in (self.config.model, holder):
            settings.pop("pretrained", None)
            initializers = as_list(settings.get("init_cfg"))
            if any(type_name(initializer) == "Pretrained" for initializer in initializers):
                kept = [part for part in initializers if type_name(part) != "Pretrained"]
                settings["init_cfg"] = kept or None
                self.training_notes.append(
                    "the weights that init_cfg loaded for the whole model are not loaded, since they belong "
                    "to the old backbone"
                )
        if self.config.get("load_from"):
            self.config.load_from = None
            self.training_notes.append("load_from is dropped, since its weights belong to the old backbone")

    def _set_preprocessing(self, preprocessors: list[Any]) -> None:
        """Normalise with ImageNet's mean and deviation, red first."""
        changed = False
        for settings in preprocessors:
            while isinstance(settings, dict) and isinstance(settings.get("data_preprocessor"), dict):
                settings = settings["data_preprocessor"]
            if not isinstance(settings, dict):
                continue
            is_classifier = self.scope == "mmpretrain" or type_name(settings) == "ReIDDataPreprocessor"
            order = "to_rgb" if is_classifier else "bgr_to_rgb"
            wanted = {"mean": MEAN, "std": STD, order: True}
            if any(settings.get(key) != value for key, value in wanted.items()):
                settings.pop("rgb_to_bgr", None)
                settings.update(copy.deepcopy(wanted))
                changed = True
        if changed:
            self.notes.append(
                "images are normalised with ImageNet's mean and deviation, red first, which is not what the "
                "old backbone had"
            )

    def _set_optimizer(self, old_name: str) -> None:
        wrapper = self.config.get("optim_wrapper")
        if not wrapper:
            return
        if "optimizer" not in wrapper:
            raise SwapError(
                "the backbone cannot be replaced: the config has several optimizers, and which one is the "
                "backbone's is unknown."
            )
        optimizer = wrapper["optimizer"]
        is_adam = type_name(optimizer) in _ADAM
        if is_adam:
            new = {**optimizer, "type": "AdamW", "lr": optimizer.get("lr", _DEFAULT_LR)}
        else:
            new = self._starting_point(optimizer, old_name)
        wrapper["optimizer"] = ConfigDict(new)

        constructor = type_name({"type": wrapper.get("constructor")})
        is_known = constructor in _CONSTRUCTORS
        if not is_known:
            wrapper.pop("constructor")
            self.training_notes.append(
                f"{constructor} knows the layers of {old_name} alone, and is dropped: all layers have one "
                "learning rate"
            )
        rules = dict(wrapper.get("paramwise_cfg") or {}) if is_known else {}
        if not is_adam:
            rules.pop("bias_lr_mult", None)
            # Rules for LARS name norms and biases, which the rules below do for AdamW.
            named = rules.get("custom_keys") or {}
            rules["custom_keys"] = {key: rule for key, rule in named.items() if "lars_exclude" not in rule}
        rules.update(norm_decay_mult=0.0, bias_decay_mult=0.0, bypass_duplicate=True)
        keys = self._custom_keys(rules.get("custom_keys") or {})
        # Where every key was the old backbone's, none is left.
        rules.pop("custom_keys", None)
        if keys:
            rules["custom_keys"] = keys
        wrapper["paramwise_cfg"] = ConfigDict(rules)

    def _starting_point(self, optimizer: dict[str, Any], old_name: str) -> dict[str, Any]:
        """AdamW in place of another kind of optimizer; the schedule's learning rates follow."""
        lr, images, decay = _RECIPES[self.scope]
        base = (self.config.get("auto_scale_lr") or {}).get("base_batch_size") or images
        new = {"type": "AdamW", "lr": lr * base / images, "weight_decay": decay}
        self.training_notes.append(
            f"{type_name(optimizer)} at {optimizer.get('lr')} was tuned for {old_name}, and is AdamW at "
            f"{new['lr']:g} with weight decay {decay:g} now: a starting point, not a tuned recipe"
        )
        self._scale_schedule(new["lr"] / optimizer.get("lr", _DEFAULT_LR))
        return new

    def _custom_keys(self, old_keys: dict[str, Any]) -> dict[str, Any]:
        """The optimizer's rules by name, without those that name parts of the old backbone."""
        keys = {key: value for key, value in old_keys.items() if not key.startswith("backbone.")}
        if "backbone" in keys:
            # A custom key outranks the rule for norms and biases, so each of the backbone's is named.
            for name, parameter in self._build_on_meta().named_parameters():
                if parameter.ndim == 1:
                    owner = name.rpartition(".")[0] if "norm" in name else name
                    keys[f"backbone.{owner}"] = {**keys["backbone"], "decay_mult": 0.0}
        return keys

    def _scale_schedule(self, ratio: float) -> None:
        """Scale the learning rates that the schedule states as the optimizer's was."""
        for scheduler in as_list(self.config.get("param_scheduler")):
            if type_name(scheduler).endswith("LR"):
                for key in ("eta_min", "eta_max"):
                    if scheduler.get(key):
                        scheduler[key] = scheduler[key] * ratio

    def _import_lf_dense(self) -> None:
        """Let the new config import this package, so that any tool finds the backbone."""
        imports = self.config.get("custom_imports") or ConfigDict(imports=[], allow_failed_imports=False)
        listed = imports["imports"]
        imports["imports"] = [*([listed] if isinstance(listed, str) else listed), "lf_dense"]
        self.config.custom_imports = imports


def set_pretrained(config: Config, checkpoint: str) -> None:
    """Start a config's LaplacianFormer from a checkpoint.

    Args:
        config: changed in place.
        checkpoint: path or address; a path has to be there and readable, so that a mistake shows before
            anything is built.

    Raises:
        UsageError: the config has no LaplacianFormer, or the checkpoint cannot be read.
    """
    backbone = backbone_of(config.get("model") or {})
    if backbone is None or type_name(backbone) != "LaplacianFormer":
        raise UsageError("--pretrained is for a LaplacianFormer, and the config has none: add --backbone.")
    if not is_remote(checkpoint):
        read_checkpoint(checkpoint)
    backbone["init_cfg"] = ConfigDict(type="LaplacianPretrained", checkpoint=checkpoint)


def swap_backbone(
    cfg: str | Config,
    arch: str | dict[str, Any] = "tiny",
    pretrained: str | None = None,
    *,
    training: bool = True,
    **backbone_options: Any,
) -> Config:
    """Replace the backbone of a config by a LaplacianFormer, and rewire all that depends on it.

    These change: neck and head channels, the strides they state, auxiliary heads, image normalisation, the
    optimizer (AdamW, no decay on norms and biases) and weights of the old backbone, which are dropped. An
    Adam recipe keeps its learning rate, and the schedule stays. Levels are matched by stride where the old
    backbone has strides of ours, otherwise in order. A tracker's detector changes, and its
    re-identification model does not. What the user of the new config should know is logged as a warning.

    Args:
        cfg: path, packaged name (``mmdet::...``, ``mmseg::...``, ``mmpretrain::...``) or Config; a Config is
            not modified.
        arch: a preset's name, or a dict as ``LaplacianFormer`` takes it.
        pretrained: checkpoint of a LaplacianFormer: a bare backbone, a classifier, a detector or a segmentor.
        training: also log what concerns only a training with the new config: optimizer and weights.
        **backbone_options: any other argument of ``LaplacianFormer``, ``drop_path_rate`` for example.

    Returns:
        The new config, self-contained: ``dump("new.py")`` writes it.

    Raises:
        SwapError: the model has no backbone that a four-level pyramid can stand for.
        UsageError: the config cannot be read, or its framework is not installed.
        ValueError, TypeError: an option is none of ``LaplacianFormer``'s, or out of its range.
    """
    config = load_config(cfg) if isinstance(cfg, str) else copy.deepcopy(cfg)
    swap = _Swap(config, {"type": "LaplacianFormer", "arch": arch, "init_cfg": None, **backbone_options})
    swap.run()
    if pretrained:
        set_pretrained(config, pretrained)
    for note in [*swap.notes, *(swap.training_notes if training else ())]:
        print_log(f"backbone replaced: {note}.", logger="current", level=logging.WARNING)
    return config
