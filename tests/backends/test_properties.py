"""Any shape, on every backend."""

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lf_dense import laplacian_attention, laplacian_kernel, newton_schulz_inverse
from lf_dense.functional import NORMALIZATIONS
from support.literal import exact_inverse, gradients, kappa, literal_attention, make_inputs

# The backend is the same for all examples of a test.
any_example = settings(
    deadline=None,
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
pytestmark = pytest.mark.usefixtures("each_backend")


@any_example
@given(
    batch=st.integers(0, 2),
    heads=st.integers(1, 3),
    n=st.integers(1, 20),
    m=st.integers(1, 10),
    d=st.integers(1, 9),
    spread=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    normalization=st.sampled_from(NORMALIZATIONS),
)
def test_any_shape(batch, heads, n, m, d, spread, normalization):
    q, k, v, _ = make_inputs(batch, heads, n, d, 1, spread)
    landmarks = spread * torch.randn(batch, heads, m, d, dtype=torch.float64)
    out = laplacian_attention(q, k, v, landmarks, normalization=normalization)
    expected = literal_attention(q, k, v, landmarks, normalization)
    torch.testing.assert_close(out, expected, rtol=1e-7, atol=1e-7)


@any_example
@given(
    lead=st.lists(st.integers(0, 2), max_size=3),
    n=st.integers(0, 70),
    m=st.integers(0, 20),
    d=st.integers(1, 40),
    step=st.integers(1, 3),
    swapped=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_kernel_of_any_shape_and_strides(lead, n, m, d, step, swapped, dtype):
    def points(rows):
        size = (*lead, d * step, rows) if swapped else (*lead, rows, d * step)
        x = torch.randn(size).to(dtype)
        return (x.mT if swapped else x)[..., ::step]

    x, y = points(n), points(m)
    exact = kappa(x.double(), y.double())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain = kappa(x.to(wide), y.to(wide)).to(dtype)
    floor = torch.finfo(dtype).eps
    got = laplacian_kernel(x, y)
    assert got.shape == (*lead, n, m)
    assert got.dtype == dtype
    if got.numel():
        assert (got.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + floor
    weight = torch.randn(got.shape, dtype=torch.float64)
    expected = gradients(kappa, [x.double(), y.double()], weight)
    for mine, right in zip(gradients(laplacian_kernel, [x, y], weight.to(dtype)), expected):
        assert mine.shape == right.shape
        largest = right.abs().max().item() if right.numel() else 0
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=40 * floor * max(1.0, largest))


@any_example
@given(m=st.integers(1, 70), spread=st.sampled_from([0.0, 0.05, 1.0]), batch=st.integers(0, 3))
def test_solver_of_any_size(m, spread, batch):
    points = spread * torch.randn(batch, m, 8, dtype=torch.float64)
    w = kappa(points, points)
    torch.testing.assert_close(newton_schulz_inverse(w), exact_inverse(w), rtol=0, atol=1e-4)
