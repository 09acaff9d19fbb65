"""The emulation of the CUDA sources: its own checks, and no operator that relies on a missing barrier."""

import os
import shlex
import subprocess

import pytest
import torch

from lf_dense import laplacian_attention, laplacian_kernel, newton_schulz_inverse, use_backend
from support import emulated
from support.literal import gradients, gram, make_inputs, relative_error

ORDERS = ("forward", "reverse", "random")


def test_emulation_catches_what_a_gpu_would_get_wrong(tmp_path):
    headers = emulated.cuda_headers()
    if headers is None:
        pytest.skip("the CUDA toolkit's headers are not there")
    program = tmp_path / "selftest"
    source = emulated.EMULATION / "selftest.cpp"
    compiler = f"{os.environ.get('CXX', 'g++')} -std=c++20 -O1 -I{emulated.EMULATION} -isystem {headers}"
    emulated.run(f"{compiler} {shlex.quote(str(source))} -o {program}")
    for order in ORDERS:
        env = {**os.environ, "LF_EMULATION_ORDER": order}
        done = subprocess.run([program], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip().endswith("ok")


@pytest.mark.parametrize(
    "shape", [{"n": 150, "d": 12, "m": 9}, {"n": 70, "d": 64, "m": 60}, {"n": 40, "d": 128, "m": 33}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_may_run_in_any_order(shape, dtype, monkeypatch):
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=1, heads=2, dtype=dtype, **shape)
    weight = torch.randn_like(inputs[2])
    upstream = torch.randn(1, 2, shape["n"], shape["m"], dtype=dtype)
    results = []
    with use_backend("native"):
        for order in ORDERS:
            monkeypatch.setenv("LF_EMULATION_ORDER", order)
            torch.manual_seed(1)
            everything = [
                laplacian_attention(*inputs),
                *gradients(laplacian_attention, inputs, weight),
                *gradients(laplacian_kernel, [inputs[0], inputs[3]], upstream),
                newton_schulz_inverse(gram(shape["m"], 0.5, dtype)),
            ]
            results.append(everything)
    for other in results[1:]:
        assert all(torch.equal(mine, right) for mine, right in zip(other, results[0]))


@pytest.mark.parametrize("m", [9, 60])
@pytest.mark.parametrize(
    ("limit", "d"), [(101376, 64), (166912, 128), (232448, 128)], ids=["sm_86", "sm_80", "sm_90"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gpus_with_less_shared_memory(m, limit, d, dtype, monkeypatch):
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=1, heads=1, n=100, d=d, m=m, dtype=dtype)
    weight = torch.randn_like(inputs[2])
    monkeypatch.setenv("LF_EMULATION_SHARED_BYTES", str(limit))
    assert_rounds_like_the_reference(inputs, weight)


@pytest.mark.parametrize(("dtype", "n"), [(torch.float64, 17_000), (torch.float32, 33_500)], ids=str)
def test_chunks_of_several_tiles(dtype, n, monkeypatch):
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=1, heads=1, n=n, d=4, m=3, dtype=dtype)
    assert_rounds_like_the_reference(inputs, torch.randn_like(inputs[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [64, 150])
def test_rows_in_quads_and_rows_of_any_strides_agree(dtype, n, monkeypatch):
    """Heads of 64 channels have kernels of their own; odd strides or an odd address take the general ones."""
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=2, heads=2, n=n, d=64, m=12, spread=0.3, dtype=dtype)
    weight = torch.randn(inputs[2].shape).to(dtype)
    odd = [torch.empty(2, 2, x.shape[2], 65, dtype=dtype)[..., 1:].copy_(x) for x in inputs]
    apart = [torch.empty(2, 2, x.shape[2], 128, dtype=dtype)[..., ::2].copy_(x) for x in inputs]
    assert odd[0].stride(-1) == 1

    def everything(tensors):
        with use_backend("native"):
            return [laplacian_attention(*tensors), *gradients(laplacian_attention, tensors, weight)]

    tolerance = 4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for other in (odd, apart):
        for one, right in zip(everything(other), everything(inputs)):
            assert one.dtype == dtype
            assert relative_error(one, right.double()) <= tolerance


@pytest.mark.parametrize("d", [12, 64, 100])
def test_gradients_between_points_that_coincide_are_zero(d, monkeypatch):
    """A blank image: every sign is that of 0, to the last bit, in whatever order the weights are added."""
    emulated.install(monkeypatch)
    q, k, _, landmarks = (
        torch.full_like(x, 0.7) for x in make_inputs(batch=1, heads=1, n=150, d=d, m=9, dtype=torch.float32)
    )
    values = torch.randn(1, 1, 150, d)
    weight = torch.randn_like(values)
    with use_backend("native"):
        dq, dk, dv, dlandmarks = gradients(laplacian_attention, [q, k, values, landmarks], weight)
        kernel = gradients(laplacian_kernel, [q, landmarks], torch.randn(1, 1, 150, 9))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in (dq, dk, dlandmarks, *kernel))
    assert dv.abs().max() > 0


def test_a_landmark_that_is_a_token_does_not_drown_the_others(monkeypatch):
    """Its kernel is 1 and its sign 0; the others' kernels are 1e-8, and so is the gradient."""
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=1, heads=1, n=70, d=64, m=70, dtype=torch.float32)
    assert_rounds_like_the_reference(inputs, torch.randn_like(inputs[2]))


@pytest.mark.parametrize("power", [-126, -128, -60, 0, 60, 126])
def test_signs_of_differences_of_every_size(power, monkeypatch):
    """Differences from 2^-128 on have their sign exactly, denormal ones included; equal numbers have none."""
    emulated.install(monkeypatch)
    step = 2.0**power
    x = torch.tensor([[step, -step, 0.0, step]])
    y = torch.tensor([[0.0, 0.0, 0.0, step]])
    with use_backend("native"):
        dx, dy = gradients(laplacian_kernel, [x, y], torch.ones(1, 1))
    kernel = torch.exp(-(x - y).abs().sum() / 4)
    expected = -torch.sign(x - y) * kernel / 4
    torch.testing.assert_close(dx, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(dy, -expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("position", range(4), ids=["q", "k", "v", "landmarks"])
def test_nan_reaches_the_gradients(position, monkeypatch):
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=1, heads=2, n=70, d=64, m=9, dtype=torch.float32)
    inputs[position][0, 0, 0, 0] = float("nan")
    with use_backend("native"):
        grads = gradients(laplacian_attention, inputs, torch.randn_like(inputs[2]))
    assert grads[0][0, 0, 0].isnan().any()
    assert grads[3][0, 0].isnan().any()
    assert all(x[0, 1].isfinite().all() for x in grads)


def assert_rounds_like_the_reference(inputs, weight):
    def everything(dtype):
        leaves = [x.to(dtype) for x in inputs]
        return [laplacian_attention(*leaves), *gradients(laplacian_attention, leaves, weight.to(dtype))]

    with use_backend("native"):
        got = everything(weight.dtype)
    with use_backend("reference"):
        plain, exact = everything(weight.dtype), everything(torch.float64)
    # Two float64 computations differ by their own rounding, and nothing more exact is there to compare with.
    floor = 1e-12 if weight.dtype == torch.float64 else 10 * torch.finfo(weight.dtype).eps
    for mine, other, right in zip(got, plain, exact):
        assert relative_error(mine, right) <= 2 * relative_error(other, right) + floor
