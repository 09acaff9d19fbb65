"""What takes part in a case: its operator's implementations, and other attentions on the same q, k and v."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import functional
from ..backends import native
from ..errors import UsageError, reason_of
from ..presets import EPS, KERNEL_SCALE, NEWTON_ITERS, TAU
from .cases import Case, Problem, pool_by_ratio, pool_to_grid

# Somebody else's attention, of a file that --peer names.
PEER = "peer"
OF_EVERY_OPERATOR = ("native", "reference", "compile")
SAME_FUNCTION = (*OF_EVERY_OPERATOR, PEER)
OTHER_ATTENTIONS = ("sdpa", "sra", "linear-sra")
CONTENDERS = OF_EVERY_OPERATOR + OTHER_ATTENTIONS
# Not an option: it takes part beside native, and measures the arithmetic that a kernel matrix cannot avoid.
FLOOR = "floor"

# PVTv2's: each side of the map shrinks by this before it gives keys and values.
REDUCTIONS = (8, 4, 2, 1)
# PVTv2's linear variant pools any map to this one.
LINEAR_GRID = (7, 7)


def load_peer(path: Path) -> Callable[..., Tensor]:
    """Return a call of the function ``attention(q, k, v, landmarks, scale, iters, eps, tau)`` of a file.

    Raises:
        UsageError: the file cannot be imported, or has no such function.
    """
    spec = importlib.util.spec_from_file_location("lf_dense_peer", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--peer {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        attention = module.attention
    # The file is the user's: whatever it raises is what to mend.
    except Exception as error:
        raise UsageError(f"--peer {path} has no attention to call: {reason_of(error)}.") from None
    return lambda q, k, v, landmarks: attention(q, k, v, landmarks, KERNEL_SCALE, NEWTON_ITERS, EPS, TAU)


# The call of the peer, where one takes part.
peers: dict[str, Callable[..., Tensor]] = {}


def implementation(case: Case, name: str) -> Callable[..., Tensor]:
    """Return the function that a contender calls on the problem's inputs, or on its first three."""
    ratio = REDUCTIONS[case.stage - 1]
    if name == "sdpa":
        return F.scaled_dot_product_attention
    if name == "sra":
        return lambda q, k, v: reduced_attention(q, k, v, lambda x: pool_by_ratio(x, case.map_shape, ratio))
    if name == "linear-sra":
        return lambda q, k, v: reduced_attention(
            q, k, v, lambda x: pool_to_grid(x, case.map_shape, LINEAR_GRID)
        )
    if name == PEER:
        return peers[PEER]
    function: Callable[..., Tensor] = getattr(functional, case.op)
    backend = "native" if name == "native" else "reference"
    return lambda *inputs: function(*inputs, backend=backend)


def reduced_attention(q: Tensor, k: Tensor, v: Tensor, pool: Callable[[Tensor], Tensor]) -> Tensor:
    """Attend by softmax to keys and values that ``pool`` has averaged over the map.

    This is the core of PVTv2's spatial-reduction attention. ``pool`` takes and returns ``(B, N, heads, d)``.
    """
    k, v = (pool(x.transpose(1, 2)).transpose(1, 2) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def softmax_macs(case: Case, name: str) -> float:
    """Multiply-adds of a softmax attention: two products forward, and five more backward."""
    ratio = REDUCTIONS[case.stage - 1]
    keys = {
        "sdpa": case.tokens,
        "sra": math.prod(side // ratio for side in case.map_shape),
        "linear-sra": math.prod(LINEAR_GRID),
    }
    products = 2 if case.direction == "forward" else 7
    return float(products * case.batch * case.heads * case.tokens * keys[name] * case.head_dims)


def bind(
    function: Callable[..., Tensor], problem: Problem, count: int | None = None
) -> Callable[[], list[Tensor]]:
    """Bind a function to a problem's first ``count`` inputs.

    The call takes no arguments. It returns the output, and the inputs' gradients where the case asks for
    them.
    """
    inputs = problem.inputs[:count]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [function(*inputs)]

    def forward_and_backward() -> list[Tensor]:
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, problem.grad)]

    return forward_and_backward if problem.backward else forward


def has_floor(device: torch.device) -> bool:
    """Whether the compiled operators can measure the device's arithmetic."""
    if native.obstacle(device) is not None or not hasattr(torch.ops.lf_dense, "arithmetic_floor"):
        return False
    try:
        torch.ops.lf_dense.arithmetic_floor(torch.zeros(1, device=device), 1024)
    except (NotImplementedError, RuntimeError):
        return False
    return True


def bind_floor(problem: Problem) -> Callable[[], list[Tensor]]:
    """Return a call that does a kernel matrix's arithmetic, and no other work."""
    like = problem.inputs[0].detach()
    return lambda: [torch.ops.lf_dense.arithmetic_floor(like, problem.case.pairs)]
