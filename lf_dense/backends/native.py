"""The compiled operators of ``ops/``: loading, fakes for torch.compile, gradients and autocast.

They are registered as ``torch.ops.lf_dense.*`` when the first call asks for them. ``lf_dense.functional`` is
their caller; its docstrings say what they compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reference import common_dtype, compute_dtype

MIN_TORCH = (2, 11)
# A block keeps three tiles of tokens in shared memory; GPUs for graphics (8.6, 8.9) have 99 KB of it, those
# for computing 163 and more.
MAX_CUDA_HEAD_DIMS, MAX_CUDA_HEAD_DIMS_IN_99_KB = 128, 64
MIN_CUDA_CAPABILITY = (8, 0)
# The operators' namespace in torch.ops; the tests put the emulated CUDA operators in its place.
LIBRARY = "lf_dense"
_FOLDER = Path(__file__).parent


def _torch_obstacle() -> str | None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version >= MIN_TORCH:
        return None
    return f"torch is {torch.__version__}, and the operators need {'.'.join(map(str, MIN_TORCH))} or newer"


@functools.cache
def library_obstacle(device_type: str) -> str | None:
    """Load the operators for ``"cpu"`` or ``"cuda"``; returns None, or as a clause why they are not there."""
    if device_type not in ("cpu", "cuda"):
        return f"they are written for the CPU and for CUDA, and the tensors are on {device_type}"
    obstacle = _torch_obstacle()
    if obstacle:
        return obstacle
    library = _FOLDER / f"_operators_{device_type}.so"
    if not library.exists():
        return f"they were not built for {device_type} (docs/operators.md says how)"
    if device_type == "cuda":
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        obstacle = library_obstacle("cpu")
        if obstacle:
            return f"the schemas are not there: {obstacle}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} did not load ({error})"
    if device_type == "cpu":
        try:
            _build_module().instruction_set()
        except RuntimeError as error:
            return str(error).rstrip(".")
        register(LIBRARY)
    return None


@functools.cache
def _cuda_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def _cuda_shared_memory(index: int) -> int:
    properties: Any = torch.cuda.get_device_properties(index)
    return properties.shared_memory_per_block_optin


def _cuda_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@torch.compiler.assume_constant_result
def max_head_dims(device: torch.device) -> float:
    """The most channels that a point may have on this device; infinity where there is no limit."""
    if device.type != "cuda" or library_obstacle("cuda"):
        return float("inf")
    roomy = _cuda_shared_memory(_cuda_index(device)) >= 160 * 1024
    return MAX_CUDA_HEAD_DIMS if roomy else MAX_CUDA_HEAD_DIMS_IN_99_KB


def obstacle(device: torch.device, *, wide: bool = False) -> str | None:
    """Why the operators cannot serve a call, as a clause; None where they can.

    Args:
        device: of the call's tensors.
        wide: whether points have more than ``max_head_dims(device)`` channels.
    """
    missing = library_obstacle(device.type)
    if missing or device.type != "cuda":
        return missing
    capability = _cuda_capability(_cuda_index(device))
    if capability < MIN_CUDA_CAPABILITY:
        wanted, found = ".".join(map(str, MIN_CUDA_CAPABILITY)), ".".join(map(str, capability))
        return f"they need a GPU of compute capability {wanted} or higher, and {device} has {found}"
    return (
        f"on this GPU they take up to {max_head_dims(device)} channels a head, and these have more"
        if wide
        else None
    )


def _build_module() -> Any:
    if find_spec("lf_dense.backends._build_info") is None:
        return None
    from . import _build_info  # type: ignore[attr-defined]

    return _build_info


def build_info() -> dict:
    """How the operators were built and what they would do here.

    Returns:
        ``built`` (whether anything was), ``compiler``, ``torch`` and ``torch_target`` (the version compiled
        against and the oldest that the binary serves), ``cuda`` and ``cuda_architectures`` (empty where CUDA
        was not built), ``instruction_sets_compiled`` and ``instruction_sets_supported`` (widest first; of
        this processor), ``instruction_set`` (the one in use, None with none).
    """
    module = _build_module()
    if module is None:
        return {"built": False, "instruction_set": None}
    try:
        chosen = module.instruction_set()
    except RuntimeError:
        chosen = None
    return {"built": True, **module.build_info(), "instruction_set": chosen}


def _operators() -> Any:
    return getattr(torch.ops, LIBRARY)


def _as_four(x: Tensor) -> Tensor:
    """``(..., N, d)`` as ``(B, heads, N, d)``."""
    if x.ndim > 4:
        return x.flatten(0, x.ndim - 4)
    return x[(None,) * (4 - x.ndim)]


def laplacian_kernel(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """See ``lf_dense.functional.laplacian_kernel``."""
    out = _operators().laplacian_kernel(_as_four(x), _as_four(y), scale)
    return out.reshape(*x.shape[:-1], y.shape[-2])


def newton_schulz_inverse(w: Tensor, iters: int, eps: float) -> Tensor:
    """See ``lf_dense.functional.newton_schulz_inverse``."""
    return _operators().newton_schulz_inverse(w.to(compute_dtype(w.dtype)), iters, eps).to(w.dtype)


def laplacian_attention(
    q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, scale: float, iters: int, eps: float, tau: float
) -> Tensor:
    """See ``lf_dense.functional.laplacian_attention``; normalization ``"mass"``."""
    return _operators().laplacian_attention(q, k, v, landmarks, scale, iters, eps, tau)[0]


def _tokens_like(x: Tensor) -> Tensor:
    """Empty ``(B, heads, N, d)`` with memory as ``(B, N, heads, d)``, which is what the operators return."""
    batch, heads, rows, channels = x.shape
    return x.new_empty(batch, rows, heads, channels).transpose(1, 2)


def _kernel_fake(x: Tensor, y: Tensor, scale: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], y.shape[-2])


def _kernel_backward_fake(grad: Tensor, x: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _tokens_like(x), _tokens_like(y)


def _inverse_fake(w: Tensor, iters: int, eps: float) -> Tensor:
    return torch.empty_like(w, memory_format=torch.contiguous_format)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, scale: float, iters: int, eps: float, tau: float
) -> tuple[Tensor, ...]:
    batch, heads, _, channels = q.shape
    m, dtype = landmarks.shape[2], compute_dtype(q.dtype)
    shapes = ((m, m), (m, channels), (m,), (channels,))
    return (_tokens_like(q), *(q.new_empty(batch, heads, *shape, dtype=dtype) for shape in shapes))


def _attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, *rest: object
) -> tuple[Tensor, ...]:
    return tuple(_tokens_like(x) for x in (q, k, v, landmarks))


def _kernel_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, y, ctx.scale = inputs
    ctx.save_for_backward(x, y)


def _kernel_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_operators().laplacian_kernel_backward(grad, *ctx.saved_tensors, ctx.scale), None


def _inverse_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(output)


def _inverse_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (inverse,) = ctx.saved_tensors
    return -inverse.mT @ grad @ inverse.mT, None, None


def _attention_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, _, _, ctx.tau = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _attention_gradient(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    grads = _operators().laplacian_attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.tau)
    return *grads, None, None, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "lf_dense's native operators have no second derivative: use the backend 'reference' for it."
    )


def _without_autocast(operator: torch._ops.OpOverload, always_wide: bool) -> object:
    """An operator's rule under autocast: mixed dtypes meet in the widest, and nothing inside is cast.

    ``always_wide`` makes that float32 at least, which the solver needs.
    """
    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
        torch._C.DispatchKey.AutocastCUDA
    )

    def run(*args: object) -> object:
        dtype = common_dtype(*(arg for arg in args if isinstance(arg, Tensor)))
        if always_wide:
            dtype = compute_dtype(dtype)
        with torch._C._ExcludeDispatchKeyGuard(autocast):
            return operator(*(arg.to(dtype) if isinstance(arg, Tensor) else arg for arg in args))

    return run


@functools.cache
def register(library: str) -> torch.library.Library:
    """Give a loaded library's operators their fakes, gradients and autocast rules, once.

    The rules live as long as what is returned.
    """
    operators, autocast_rules = getattr(torch.ops, library), torch.library.Library(library, "IMPL")
    fake: Callable[..., Any]
    for name, fake, setup, gradient in (
        ("laplacian_kernel", _kernel_fake, _kernel_setup, _kernel_gradient),
        ("newton_schulz_inverse", _inverse_fake, _inverse_setup, _inverse_gradient),
        ("laplacian_attention", _attention_fake, _attention_setup, _attention_gradient),
    ):
        torch.library.register_fake(f"{library}::{name}", fake)
        torch.library.register_autograd(f"{library}::{name}", gradient, setup_context=setup)
        rule = _without_autocast(
            getattr(operators, name).default, always_wide=name == "newton_schulz_inverse"
        )
        for key in ("AutocastCPU", "AutocastCUDA"):
            autocast_rules.impl(name, rule, key)
    for name, fake in (
        ("laplacian_kernel_backward", _kernel_backward_fake),
        ("laplacian_attention_backward", _attention_backward_fake),
    ):
        torch.library.register_fake(f"{library}::{name}", fake)
        torch.library.register_autograd(f"{library}::{name}", _no_second_derivative)
    return autocast_rules
