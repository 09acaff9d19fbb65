"""Any shape, on every backend."""

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from literal import gradients, kappa, literal_attention, make_inputs, relative_error

from lf_dense import laplacian_attention, laplacian_kernel
from lf_dense.functional import NORMALIZATIONS

# The backend is the same for all examples of a test.
any_example = settings(deadline=None, max_examples=25, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    torch.testing.assert_close(out, literal_attention(q, k, v, landmarks, normalization), rtol=1e-7, atol=1e-7)
