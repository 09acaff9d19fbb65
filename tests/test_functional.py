"""The door to the mathematics: choice of backend and one clear sentence for each wrong argument."""

import pytest
import torch

from lf_dense import laplacian_attention, laplacian_kernel, newton_schulz_inverse, use_backend
from lf_dense.backends import ENVIRONMENT_VARIABLE, choose_backend, native, requested_backend

CPU = torch.device("cpu")


@pytest.fixture
def no_native(monkeypatch):
    monkeypatch.setattr(native, "obstacle", lambda *unused, **wide: "nobody compiled them")


def tensors(n=5, m=3, d=4, dtype=torch.float32):
    counts = {"q": n, "k": n, "v": n, "landmarks": m}
    return {name: torch.randn(1, 2, count, d).to(dtype) for name, count in counts.items()}


def test_argument_over_block_over_environment_over_auto(monkeypatch):
    assert requested_backend() == "auto"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "native")
    assert requested_backend() == "native"
    with use_backend("auto"):
        assert requested_backend() == "auto"
        with use_backend("reference"):
            assert requested_backend() == "reference"
            assert requested_backend("native") == "native"
        assert requested_backend() == "auto"
    assert requested_backend() == "native"


def test_block_ends_with_an_exception():
    with pytest.raises(KeyError), use_backend("native"):
        raise KeyError
    assert requested_backend() == "auto"


def test_unknown_backend_says_where_it_came_from(monkeypatch):
    x = torch.randn(3, 2)
    with pytest.raises(ValueError, match=r"argument backend.*'cuda'.*auto, reference, native"):
        laplacian_kernel(x, x, backend="cuda")
    said = r"use_backend.*'cuda'.*auto, reference, native"
    with pytest.raises(ValueError, match=said), use_backend("cuda"):
        pass
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "cuda")
    with pytest.raises(ValueError, match=r"LF_DENSE_BACKEND.*'cuda'.*auto, reference, native"):
        laplacian_kernel(x, x)
    laplacian_kernel(x, x, backend="reference")


@pytest.mark.usefixtures("no_native")
def test_native_without_operators_is_an_error_with_the_reason(monkeypatch):
    def asked(**kwargs):
        with pytest.raises(RuntimeError, match=r"nobody compiled them.*'auto' or 'reference'"):
            laplacian_attention(**tensors(), **kwargs)

    asked(backend="native")
    with use_backend("native"):
        asked()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "native")
    asked()
    x = torch.rand(3, 3)
    for call in (lambda: laplacian_kernel(x, x), lambda: newton_schulz_inverse(x @ x.mT)):
        with pytest.raises(RuntimeError, match="nobody compiled them"):
            call()


@pytest.mark.usefixtures("no_native")
def test_auto_without_operators_is_the_reference():
    for asked in ("auto", "reference", None):
        assert choose_backend(asked, CPU) == "reference"
    inputs = tensors()
    auto, reference = (laplacian_attention(**inputs, backend=name) for name in ("auto", "reference"))
    assert torch.equal(auto, reference)


@pytest.mark.parametrize("scale", [0, 0.0, -4.0, float("nan"), float("inf")])
def test_kernel_scale_out_of_range(scale):
    x = torch.randn(3, 2)
    for call in (
        lambda: laplacian_kernel(x, x, scale),
        lambda: laplacian_attention(**tensors(), scale=scale),
    ):
        with pytest.raises(ValueError, match=rf"kernel scale is {scale}.*positive"):
            call()


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("iters", 0, r"0 iterations.*at least 1"),
        ("iters", -3, r"-3 iterations.*at least 1"),
        ("eps", 0.0, r"eps is 0\.0.*positive"),
        ("eps", -1e-2, r"eps is -0\.01.*positive"),
        ("eps", float("nan"), r"eps is nan.*positive"),
    ],
)
def test_solver_constants_out_of_range(argument, value, message):
    for call in (
        lambda **c: newton_schulz_inverse(torch.ones(3, 3), **c),
        lambda **c: laplacian_attention(**tensors(), **c),
    ):
        with pytest.raises(ValueError, match=message):
            call(**{argument: value})


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("tau", -1e-3, r"tau is -0\.001.*0 or larger"),
        ("tau", float("nan"), "tau is nan"),
        ("tau", float("inf"), "tau is inf"),
        ("delta", 0.0, r"delta is 0\.0.*positive"),
        ("delta", float("nan"), "delta is nan"),
        ("normalization", "softmax", r"'softmax'.*mass, whiten_keys, whiten_landmarks"),
        ("normalization", None, r"None.*mass, whiten_keys, whiten_landmarks"),
    ],
)
def test_attention_constants_out_of_range(argument, value, message):
    with pytest.raises(ValueError, match=message):
        laplacian_attention(**tensors(), **{argument: value})


@pytest.mark.parametrize(
    ("x", "y"),
    [((3,), (3,)), ((5, 3), (4, 2)), ((2, 5, 3), (4, 3)), ((2, 5, 3), (1, 4, 3)), ((2, 5, 3), (3, 4, 3))],
    ids=str,
)
def test_kernel_shapes_that_do_not_fit(x, y):
    with pytest.raises(ValueError, match=r"x has shape \(.*and y \(.*\(\.\.\., N, d\)"):
        laplacian_kernel(torch.randn(x), torch.randn(y))


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 4, 3), (2, 0, 0)], ids=str)
def test_solver_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"w has shape .*\(\.\.\., m, m\)"):
        newton_schulz_inverse(torch.ones(shape))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 4), r"q, k and v have shapes \(2, 5, 4\).*\(B, heads, N, d\)"),
        ("k", (1, 2, 6, 4), r"q, k and v have shapes .*\(1, 2, 6, 4\).*all three the same"),
        ("v", (1, 2, 5, 3), r"q, k and v have shapes .*\(1, 2, 5, 3\).*all three the same"),
        ("landmarks", (2, 3, 4), r"landmarks have shape \(2, 3, 4\).*\(B, heads, m, d\)"),
        ("landmarks", (1, 1, 3, 4), r"landmarks have shape \(1, 1, 3, 4\).*same B, heads and d"),
        ("landmarks", (1, 2, 3, 8), r"landmarks have shape \(1, 2, 3, 8\).*same B, heads and d"),
        ("landmarks", (1, 2, 0, 4), r"landmarks have shape \(1, 2, 0, 4\).*m at least 1"),
    ],
)
def test_attention_shapes_that_do_not_fit(name, shape, message):
    with pytest.raises(ValueError, match=message):
        laplacian_attention(**{**tensors(), name: torch.randn(shape)})


def test_attention_without_tokens():
    with pytest.raises(ValueError, match="N at least 1"):
        laplacian_attention(**tensors(n=0))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_dtypes_that_are_not_supported(dtype):
    x = torch.ones(3, 3, dtype=dtype)
    calls = (
        lambda: laplacian_kernel(x, x),
        lambda: newton_schulz_inverse(x),
        lambda: laplacian_attention(**tensors(dtype=dtype)),
    )
    for name, call in zip(("x", "w", "q"), calls):
        with pytest.raises(TypeError, match=rf"{name} is {dtype}.*torch\.float32"):
            call()


@pytest.mark.parametrize("name", ["k", "v", "landmarks"])
def test_dtypes_that_differ(name):
    inputs = tensors()
    inputs[name] = inputs[name].double()
    said = rf"{name} is torch\.float64 on cpu and q is torch\.float32 on cpu.*one dtype"
    with pytest.raises(TypeError, match=said):
        laplacian_attention(**inputs)


def test_devices_that_differ():
    with pytest.raises(TypeError, match=r"y is .* on meta and x is .* on cpu"):
        laplacian_kernel(torch.ones(3, 2), torch.ones(3, 2, device="meta"))
