"""Layer-wise learning-rate decay for models with a LaplacianFormer, in any framework that trains through mmengine."""

from __future__ import annotations

from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..errors import UsageError
from ..laplacianformer import LaplacianFormer


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimizer(DefaultOptimWrapperConstructor):
    """``optim_wrapper=dict(constructor="LayerDecayOptimizer", paramwise_cfg=dict(layer_decay_rate=0.8, ...), ...)``.

    A parameter of layer i of n (``LaplacianFormer.get_layer_depth``) learns at ``lr * layer_decay_rate ** (n
    - 1 - i)``; whatever is not in the backbone learns at ``lr``. The rest of ``paramwise_cfg`` is mmengine's
    (``norm_decay_mult``, ``custom_keys``, ...) and its factors multiply with the decay. Parameters of one
    layer and one setting share a group, named by ``param_names`` in the log.

    Raises:
        UsageError: the rate is missing or not in (0, 1], or the model has no LaplacianFormer.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
        rate = paramwise_cfg.pop("layer_decay_rate", None)
        if not isinstance(rate, (int, float)) or not 0 < rate <= 1:
            raise UsageError(
                f"paramwise_cfg.layer_decay_rate is {rate!r}: LayerDecayOptimizer needs a number in (0, 1],"
                " 0.8 for example."
            )
        # mmengine looks at none of its rules, nor calls add_params, where the rest is empty.
        super().__init__(optim_wrapper_cfg, paramwise_cfg or {"custom_keys": {}})
        self.layer_decay_rate = rate

    def add_params(
        self, params: list[dict], module: nn.Module, prefix: str = "", is_dcn_module: Any = None
    ) -> None:
        """mmengine's groups, one for each parameter, then, for the whole model, decayed and merged by layer."""
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
                "LayerDecayOptimizer decays by the layers of a LaplacianFormer, and the model has none: drop"
                " the constructor."
            )
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups: dict[tuple, dict] = {}
        for group in params:
            (parameter,) = group["params"]
            name = names[id(parameter)]
            prefix = next((prefix for prefix in backbones if name.startswith(prefix)), None)
            layer, num_layers = (
                (None, 0) if prefix is None else backbones[prefix].get_layer_depth(name, prefix)
            )
            settings = {key: value for key, value in group.items() if key != "params"}
            scale = 1.0 if layer is None else self.layer_decay_rate ** (num_layers - 1 - layer)
            settings["lr"] = settings.get("lr", self.base_lr) * scale
            key = (
                -1 if layer is None else layer,
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
