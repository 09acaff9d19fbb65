"""Layer-wise learning-rate decay for models with a LaplacianFormer, in any of the frameworks."""

from __future__ import annotations

from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..errors import UsageError
from ..laplacianformer import LaplacianFormer


# The second name is that of configs from before the class was named for what it is.
@OPTIM_WRAPPER_CONSTRUCTORS.register_module(name=["LayerDecayOptimWrapperConstructor", "LayerDecayOptimizer"])
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Optimizer settings whose learning rate decays from the last layer of a LaplacianFormer to its first.

    A config names it in ``optim_wrapper.constructor``, and the rate in ``paramwise_cfg.layer_decay_rate``.

    A parameter of layer i of n (``LaplacianFormer.get_layer_depth``) learns at
    ``lr * layer_decay_rate ** (n - 1 - i)``. What is not in the backbone learns at ``lr``. The rest of
    ``paramwise_cfg`` is mmengine's (``norm_decay_mult``, ``custom_keys``, ...) and its factors multiply with
    the decay. Parameters of one layer and one setting share a group, named by ``param_names`` in the log.

    Raises:
        UsageError: the rate is missing or not in (0, 1], or the model has no LaplacianFormer.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
        rate = paramwise_cfg.pop("layer_decay_rate", None)
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise UsageError(
                f"paramwise_cfg.layer_decay_rate is {rate!r}, and has to be a number in (0, 1], like 0.8."
            )
        # mmengine looks at none of its rules, nor calls add_params, where the rest is empty.
        super().__init__(optim_wrapper_cfg, paramwise_cfg or {"custom_keys": {}})
        self.layer_decay_rate = rate

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = "", is_dcn_module: Any = None
    ) -> None:
        """mmengine's groups, one for each parameter; those of the whole model are then merged by layer."""
        super().add_params(params, module, prefix=prefix, is_dcn_module=is_dcn_module)
        if not prefix:
            params[:] = self._by_layer(params, module)

    def _by_layer(self, params: list[dict], model: nn.Module) -> list[dict]:
        backbones = {
            f"{name}." if name else "": part
            for name, part in model.named_modules()
            if isinstance(part, LaplacianFormer)
        }
        if not backbones:
            raise UsageError(
                "LayerDecayOptimWrapperConstructor decays by the layers of a LaplacianFormer, and the model "
                "has none: drop the constructor."
            )
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups: dict[tuple, dict] = {}
        for group in params:
            (parameter,) = group["params"]
            name = names[id(parameter)]
            prefix = next((prefix for prefix in backbones if name.startswith(prefix)), None)
            layer, scale = -1, 1.0  # what is in no backbone
            if prefix is not None:
                layer, num_layers = backbones[prefix].get_layer_depth(name, prefix)
                scale = self.layer_decay_rate ** (num_layers - 1 - layer)
            settings: dict[str, Any] = {key: value for key, value in group.items() if key != "params"}
            base_lr: Any = settings.get("lr", self.base_lr)
            settings["lr"] = base_lr * scale
            key = (
                layer,
                prefix,
                *sorted((key, repr(value)) for key, value in settings.items()),
            )
            groups.setdefault(key, {"params": [], "param_names": [], **settings})
            groups[key]["params"].append(parameter)
            groups[key]["param_names"].append(name)
        # Shallow layers first, what is not in a backbone last.
        ordered = [groups[key] for key in sorted(groups, key=lambda key: (key[0] < 0, key[0], str(key)))]
        for group in ordered:
            shown = ", ".join(
                f"{key} {value:g}" for key, value in group.items() if isinstance(value, (int, float))
            )
            print_log(
                f"{shown}: {len(group['params'])} parameters, {group['param_names'][0]} the first",
                logger="current",
            )
        return ordered
