"""When a block's layers run as native operators: the same function in fewer passes, without gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .backends import choose_backend, export_form, native, products


def native_dtype(x: Tensor) -> torch.dtype | None:
    """In what the native operators multiply these tokens; None where they are not chosen or do not serve."""
    return native.layers_dtype(x) if choose_backend(None, x.device) == "native" else None


def asks_gradient(x: Tensor, module: nn.Module) -> bool:
    """Whether autograd will follow a module on this tensor."""
    return torch.is_grad_enabled() and (x.requires_grad or any(w.requires_grad for w in module.parameters()))


def is_plain(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether calling the modules inside does what their weights say and no more.

    A module of another kind, a replaced, parametrized or pruned one, one that a hook watches, one whose
    ``forward`` somebody replaced, one that drops something and a GELU by another formula are not plain; nor
    is any while ``torch.jit`` traces, for tools that count the operations in its graph.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    # As Module.modules(), without its bookkeeping: every block asks on every pass.
    parts: list[nn.Module | None] = [module]
    for part in parts:
        if part is None:
            continue
        if type(part) not in kinds or part._forward_hooks or part._forward_pre_hooks:
            return False
        if "forward" in vars(part):
            return False
        if isinstance(part, nn.Dropout) and part.training and part.p > 0:
            return False
        if isinstance(part, nn.GELU) and part.approximate != "none":
            return False
        parts += part._modules.values()
    return True


def can_rewrite(x: Tensor, module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a plain module of these kinds, eager and without gradients, may compute the same otherwise."""
    return not (torch.compiler.is_compiling() or asks_gradient(x, module)) and is_plain(module, *kinds)


def can_fuse(x: Tensor, module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the native operators serve a plain module of these kinds on this tensor."""
    return not asks_gradient(x, module) and is_plain(module, *kinds) and native_dtype(x) is not None


def can_train(x: Tensor, *modules: nn.Module) -> bool:
    """Whether a native operator with a gradient serves these plain layers, in eager mode.

    ``torch.compile`` has its own way with layers, and under autocast they multiply in another dtype.
    """
    return (
        not torch.compiler.is_compiling()
        and any(asks_gradient(x, module) for module in modules)
        and all(is_plain(module, nn.Linear, nn.Conv2d, nn.GELU) for module in modules)
        and all(w.dtype == x.dtype for module in modules for w in module.parameters())
        and native_dtype(x) in (torch.float32, torch.float64)
    )


def apply_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)``; in training by the product that is the faster one on this processor."""
    if (
        x.dtype == torch.float32
        and x.numel() > 0
        and torch.backends.mkldnn.enabled
        and products.is_faster()
        and can_train(x, layer)
    ):
        return products.linear(x, layer)
    out: Tensor = layer(x)
    return out


def can_be_nodes(x: Tensor, module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a plain module of these kinds is exported as nodes of its own, which are float32's."""
    return export_form() == "layers" and is_plain(module, *kinds) and x.dtype == torch.float32


def can_pool(x: Tensor) -> bool:
    """Whether the native operator averages these tokens, without a gradient."""
    return (
        not (torch.is_grad_enabled() and x.requires_grad)
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and native_dtype(x) is not None
    )
