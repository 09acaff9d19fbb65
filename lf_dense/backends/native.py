"""The compiled operators of ``ops/``: loading, fakes for torch.compile, gradients and autocast.

They are registered as ``torch.ops.lf_dense.*`` when the first call asks for them. ``lf_dense.functional`` is
their caller; its docstrings say what they compute.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ..presets import EPS
from .reference import common_dtype, compute_dtype, inverse_gradient

MIN_TORCH = (2, 11)
MIN_CUDA_CAPABILITY = (8, 0)
# The operators' namespace in torch.ops; the tests put the emulated CUDA operators in its place.
LIBRARY = "lf_dense"
_FOLDER = Path(__file__).parent


def constant_result(function: Callable) -> Callable:
    """``torch.compiler.assume_constant_result`` without importing the compiler, which takes 1.7 s."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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


@functools.cache
def _cuda_launch_failure(index: int) -> str | None:
    """Why a kernel does not run on this GPU, in the CUDA runtime's words; None where one does.

    A library loads whatever the driver's version and whatever the GPU: only a launch tells.
    """
    probe = ctypes.CDLL(str(_FOLDER / "_operators_cuda.so")).lf_dense_launch_failure
    probe.restype = ctypes.c_char_p
    failure = probe(index)
    return failure.decode() if failure else None


def _cuda_index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@constant_result
def fused_head_dims(device: torch.device) -> float:
    """The most channels a head with which the attention is one operator; infinity where there is no limit."""
    if device.type != "cuda":
        return math.inf
    return fused_in(_cuda_shared_memory(_cuda_index(device)))


def fused_in(shared_memory: int) -> int:
    """The same for a GPU with so many bytes of shared memory a block.

    A block keeps three tiles of 64 tokens there. GPUs for graphics (8.6, 8.9) have 99 KB, those for computing
    163 and more.
    """
    return 128 if shared_memory >= 160 * 1024 else 64


def obstacle(device: torch.device) -> str | None:
    """Why the operators cannot serve a call with tensors on this device, as a clause; None where they can."""
    missing = library_obstacle(device.type)
    if missing or device.type != "cuda":
        return missing
    capability = _cuda_capability(_cuda_index(device))
    if capability < MIN_CUDA_CAPABILITY:
        wanted, found = ".".join(map(str, MIN_CUDA_CAPABILITY)), ".".join(map(str, capability))
        return f"they need a GPU of compute capability {wanted} or higher, and {device} has {found}"
    failure = _cuda_launch_failure(_cuda_index(device))
    return f"they do not run on {device} ({failure})" if failure else None


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
    if x.ndim == 4:
        return x
    return x.flatten(0, x.ndim - 4) if x.ndim > 4 else x[(None,) * (4 - x.ndim)]


def laplacian_kernel(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """See ``lf_dense.functional.laplacian_kernel``."""
    out = _operators().laplacian_kernel(_as_four(x), _as_four(y), scale)
    return out if x.ndim == 4 else out.reshape(*x.shape[:-1], y.shape[-2])


def newton_schulz_inverse(w: Tensor, iters: int, eps: float) -> Tensor:
    """See ``lf_dense.functional.newton_schulz_inverse``."""
    return _operators().newton_schulz_inverse(w.to(compute_dtype(w.dtype)), iters, eps).to(w.dtype)


def laplacian_attention(
    q: Tensor, k: Tensor, v: Tensor, landmarks: Tensor, scale: float, iters: int, eps: float, tau: float
) -> Tensor:
    """See ``lf_dense.functional.laplacian_attention``; ``"mass"``, up to ``fused_head_dims`` channels."""
    return _operators().laplacian_attention(q, k, v, landmarks, scale, iters, eps, tau)[0]


def layers_dtype(x: Tensor) -> torch.dtype | None:
    """In what the operators of whole layers multiply these tokens; None where they do not serve them.

    They are written for the CPU: float64, float32, and bfloat16, whether tokens have it or autocast asks for
    it. Sums of products and all between them are float32, but for hidden activations, which are rounded.
    """
    if x.device.type != "cpu":
        return None
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    if dtype == torch.bfloat16:
        return dtype if x.dtype in (torch.float32, torch.bfloat16) and x.shape[-1] % 2 == 0 else None
    return dtype if dtype == x.dtype == compute_dtype(dtype) else None


def project_heads(
    x: Tensor,
    norm: nn.LayerNorm,
    q: nn.Linear,
    k: nn.Linear,
    v: nn.Linear,
    turns: tuple[Tensor, Tensor] | None,
    library: str = "lf_dense",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of ``norm(x)``, maps ``(B, H, W, C)`` all; no gradient.

    Queries and keys are turned by ``turns``, the ``axes`` of a ``lf_dense.attention.RotaryTable``, or not,
    where that is None. All three have the dtype ``layers_dtype(x)``. ``library`` has the operator in
    ``torch.ops``, here and below.
    """
    wide, dtype = compute_dtype(x.dtype), layers_dtype(x)
    projections = (tensor for layer in (q, k, v) for tensor in _weights(layer, wide, dtype))
    operator = getattr(torch.ops, library).project_heads
    return operator(x, *_weights(norm, wide), norm.eps, *projections, *_axes(x, turns, wide))


def pool_tokens(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map ``(B, H, W, C)`` averaged over a grid as adaptive pooling does, ``(B, m, C)``; no gradient.

    A map that is smaller than the grid has a cell for each of its tokens.
    """
    return torch.ops.lf_dense.pool_tokens(x.contiguous(), *grid)


def merge_heads(
    x: Tensor,
    attended: Tensor,
    values: Tensor,
    conv: nn.Conv2d,
    proj: nn.Linear,
    library: str = "lf_dense",
) -> Tensor:
    """``x + proj(attended + conv(values))`` of maps ``(B, H, W, C)``; no gradient.

    ``attended`` and ``values`` have the dtype ``layers_dtype(x)``.
    """
    wide, dtype = compute_dtype(x.dtype), layers_dtype(x)
    layers = (*_weights(conv, wide), *_weights(proj, wide, dtype))
    return getattr(torch.ops, library).merge_heads(x, attended, values, *layers)


def conv_ffn(
    x: Tensor,
    norm: nn.LayerNorm,
    fc1: nn.Linear,
    conv: nn.Conv2d,
    fc2: nn.Linear,
    library: str = "lf_dense",
) -> Tensor:
    """``x + fc2(GELU(conv(fc1(norm(x)))))`` of a map ``(B, H, W, C)``; no gradient.

    The hidden map is never there as a whole: each thread holds the activations of a few rows.
    """
    wide, dtype = compute_dtype(x.dtype), layers_dtype(x)
    layers = (*_weights(fc1, wide, dtype), *_weights(conv, wide), *_weights(fc2, wide, dtype))
    return getattr(torch.ops, library).conv_ffn(x, *_weights(norm, wide), norm.eps, *layers)


def conv_gelu(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """``GELU(conv(x))`` of a map ``(B, H, W, C)`` of float32 or float64, with conv's dtype the same.

    What it keeps for the gradient is ``x``: the backward pass convolves again.
    """
    return torch.ops.lf_dense.conv_gelu(x.contiguous(), *_weights(conv, x.dtype))


def attention_block(
    x: Tensor,
    norm1: nn.LayerNorm,
    attn: Any,
    norm2: nn.LayerNorm,
    ffn: Any,
    turns: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """All of a block of a map ``(B, H, W, C)`` in one call: the operators above around the attention.

    ``attn`` is a ``LaplacianAttention`` of normalization ``"mass"`` without a learnt scale, ``ffn`` a
    ``ConvFFN``; no gradient.
    """
    wide, dtype = compute_dtype(x.dtype), layers_dtype(x)
    return torch.ops.lf_dense.attention_block(
        x,
        *_weights(norm1, wide),
        norm1.eps,
        *_weights(attn.q, wide, dtype),
        *_weights(attn.k, wide, dtype),
        *_weights(attn.v, wide, dtype),
        *_axes(x, turns, wide),
        attn.num_heads,
        *attn.landmark_grid,
        attn.kernel_scale,
        attn.newton_iters,
        EPS,
        attn.tau,
        *_weights(attn.dwconv, wide),
        *_weights(attn.proj, wide, dtype),
        *_weights(norm2, wide),
        norm2.eps,
        *_weights(ffn.fc1, wide, dtype),
        *_weights(ffn.dwconv, wide),
        *_weights(ffn.fc2, wide, dtype),
    )


def norm_to_map(x: Tensor, norm: nn.LayerNorm, with_map: bool) -> tuple[Tensor, Tensor]:
    """``norm(x)`` of a map ``(B, H, W, C)``, as such a map and as ``(B, C, H, W)``; no gradient.

    The latter is empty unless it is asked for.
    """
    weights = _weights(norm, compute_dtype(x.dtype))
    return torch.ops.lf_dense.norm_to_map(x, *weights, norm.eps, with_map)


def _axes(x: Tensor, turns: tuple[Tensor, Tensor] | None, wide: torch.dtype) -> tuple[Tensor, ...]:
    """The rotary tables of a map ``(B, H, W, C)`` in ``wide``; empty ones where nothing turns."""
    if turns is None:
        return tuple(x.new_empty(2, 0, size, dtype=wide) for size in x.shape[1:3])
    return tuple(axis.to(wide) for axis in turns)


def _weights(
    layer: nn.Linear | nn.Conv2d | nn.LayerNorm, wide: torch.dtype, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """A layer's weight in ``dtype``, or else in ``wide``, and its bias in ``wide``.

    A bias that is not there is zeros.
    """
    weight = _as(layer.weight, dtype or wide)
    bias = weight.new_zeros(weight.shape[0], dtype=wide) if layer.bias is None else _as(layer.bias, wide)
    return weight, bias


def _as(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous and of a dtype; the questions are cheaper than the calls, of which a block makes many."""
    x = x if x.dtype == dtype else x.to(dtype)
    return x if x.is_contiguous() else x.contiguous()


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


def _project_fake(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, q_weight: Tensor, *layers: object
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape, dtype=q_weight.dtype) for _ in range(3))


def _pool_fake(x: Tensor, rows: int, columns: int) -> Tensor:
    cells = torch.sym_min(rows, x.shape[1]) * torch.sym_min(columns, x.shape[2])
    return x.new_empty(x.shape[0], cells, x.shape[3])


def _like_first_fake(x: Tensor, *layers: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _map_fake(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, with_map: bool
) -> tuple[Tensor, Tensor]:
    batch, height, width, channels = x.shape
    return _like_first_fake(x), x.new_empty(batch if with_map else 0, channels, height, width)


def laplacian_attention_macs(
    num_heads: int, num_tokens: int, num_landmarks: int, head_dims: int, iters: int
) -> int:
    """Operations of one call of ``laplacian_attention`` for one image under ``"mass"``.

    Three kernel matrices (queries, keys, landmarks), ``C_k^T V`` and ``C_q U`` with their mass columns, and
    two products of m x m matrices per solver step.
    """
    kernels = (2 * num_tokens + num_landmarks) * num_landmarks * head_dims
    products = 2 * num_tokens * num_landmarks * (head_dims + 1) + num_landmarks**2 * (head_dims + 1)
    return num_heads * (kernels + products + 2 * iters * num_landmarks**3)


def _attention_flops(
    q: tuple[int, ...],
    k: object,
    v: object,
    landmarks: tuple[int, ...],
    scale: float,
    iters: int,
    *rest: object,
    **unused: object,
) -> int:
    batch, heads, tokens, dims = q
    return 2 * batch * laplacian_attention_macs(heads, tokens, landmarks[2], dims, iters)


def _project_flops(x: tuple[int, ...], *layers: object, **unused: object) -> int:
    """As torch counts: a multiply-add is two; the norm, the rotation and the GELU are none."""
    return 2 * 3 * math.prod(x) * x[-1]


def _no_flops(x: tuple[int, ...], *rest: object, **unused: object) -> int:
    """Of what multiplies nothing: torch counts products alone."""
    return 0


def _merge_flops(x: tuple[int, ...], *layers: object, **unused: object) -> int:
    return 2 * math.prod(x) * (x[-1] + 9)


def _conv_ffn_flops(
    x: tuple[int, ...],
    weight: object,
    bias: object,
    eps: object,
    fc1: tuple[int, ...],
    *layers: object,
    **unused: object,
) -> int:
    return 2 * math.prod(x[:-1]) * fc1[0] * (2 * x[-1] + 9)


def _block_flops(x: tuple[int, ...], *arguments: Any, **unused: object) -> int:
    """Those of the operators that it stands for; places are the schema's."""
    _, height, width, channels = x
    heads, grid_rows, grid_columns, _, iters = arguments[11:16]
    landmarks = min(grid_rows, height) * min(grid_columns, width)
    macs = laplacian_attention_macs(heads, height * width, landmarks, channels // heads, iters)
    ffn = _conv_ffn_flops(x, None, None, None, arguments[25])
    return _project_flops(x) + 2 * x[0] * macs + _merge_flops(x) + ffn


def _conv_gelu_flops(x: tuple[int, ...], *layers: object, **unused: object) -> int:
    return 2 * 9 * math.prod(x)


def _conv_gelu_backward_flops(grad: tuple[int, ...], *rest: object, **unused: object) -> int:
    """As of the two convolutions of a layer's gradient: that which it does again is its own affair."""
    return 2 * _conv_gelu_flops(grad)


def _conv_gelu_backward_fake(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return tuple(_like_first_fake(x) for x in inputs)


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
    return inverse_gradient(inverse, grad), None, None


def _attention_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, _, _, ctx.tau = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _attention_gradient(ctx: Any, grad: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
    grads = _operators().laplacian_attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.tau)
    return *grads, None, None, None, None


def _conv_gelu_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _conv_gelu_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return torch.ops.lf_dense.conv_gelu_backward(grad.contiguous(), *ctx.saved_tensors)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "lf_dense's native operators have no second derivative: use the backend 'reference' for it."
    )


def _no_gradient(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "lf_dense's operators of whole layers have no gradient: the layers themselves train in plain PyTorch."
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
        ("conv_gelu", _like_first_fake, _conv_gelu_setup, _conv_gelu_gradient),
    ):
        torch.library.register_fake(f"{library}::{name}", fake)
        torch.library.register_autograd(f"{library}::{name}", gradient, setup_context=setup)
        rule = _without_autocast(
            getattr(operators, name).default, always_wide=name == "newton_schulz_inverse"
        )
        for key in ("AutocastCPU", "AutocastCUDA"):
            autocast_rules.impl(name, rule, key)
    register_flop_formula(operators.conv_gelu)(_conv_gelu_flops)
    register_flop_formula(operators.conv_gelu_backward)(_conv_gelu_backward_flops)
    for name, fake in (
        ("laplacian_kernel_backward", _kernel_backward_fake),
        ("laplacian_attention_backward", _attention_backward_fake),
        ("conv_gelu_backward", _conv_gelu_backward_fake),
    ):
        torch.library.register_fake(f"{library}::{name}", fake)
        torch.library.register_autograd(f"{library}::{name}", _no_second_derivative)
    register_flop_formula(operators.laplacian_attention)(_attention_flops)
    for name, fake, flops in (
        ("project_heads", _project_fake, _project_flops),
        ("pool_tokens", _pool_fake, _no_flops),
        ("merge_heads", _like_first_fake, _merge_flops),
        ("conv_ffn", _like_first_fake, _conv_ffn_flops),
        ("attention_block", _like_first_fake, _block_flops),
        ("norm_to_map", _map_fake, _no_flops),
    ):
        torch.library.register_fake(f"{library}::{name}", fake)
        torch.library.register_autograd(f"{library}::{name}", _no_gradient)
        register_flop_formula(getattr(operators, name))(flops)
    return autocast_rules
