"""Linear layers in training by oneDNN's product, on processors where MKL's is the slower one."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import flop_registry, register_flop_formula

# AMD's number of the family.
ZEN_5 = 26
# torch's own, for what torch.compile makes of linear layers; not every build has it.
_operator: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def _flops(x: tuple[int, ...], weight: tuple[int, ...], *rest: object, **unused: object) -> int:
    return 2 * math.prod(x) * weight[0]


if _operator is not None and _operator not in flop_registry:
    register_flop_formula(_operator)(_flops)


@functools.cache
def is_faster() -> bool:
    """Whether oneDNN's product of float32 is the faster one on this machine.

    torch multiplies by MKL, which has no AVX-512 for AMD's processors. From Zen 5 on these multiply 512 bits
    at once, and oneDNN takes half of MKL's time (docs/benchmark.md). With AVX2 both are about as fast.
    """
    processor = _processor()
    return (
        _operator is not None
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and processor.get("vendor_id") == "AuthenticAMD"
        and int(processor.get("cpu family", 0)) >= ZEN_5
    )


def _processor() -> dict[str, str]:
    """What Linux says of the first processor; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().split("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(x)`` of tokens ``(..., C)``, with gradients; float32 on a CPU, and not empty."""
    out: Tensor = _Linear.apply(x, layer.weight, layer.bias)
    return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``."""
    out: Tensor = _operator(x, weight, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x.contiguous(), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        rows, grads = x.flatten(0, -2), grad.flatten(0, -2)
        # With a second derivative to come the products are torch's, which have one.
        multiply = F.linear if torch.is_grad_enabled() else _product
        of_x, of_weight, of_bias = ctx.needs_input_grad
        dx = multiply(grad, weight.t()) if of_x else None
        dweight = None
        if of_weight:
            # The factor of fewer channels comes first: with the other one it takes up to twice as long.
            if weight.shape[0] <= weight.shape[1]:
                dweight = multiply(grads.t(), rows.t())
            else:
                dweight = multiply(rows.t(), grads.t()).t()
        return dx, dweight, grads.sum(0) if of_bias else None
