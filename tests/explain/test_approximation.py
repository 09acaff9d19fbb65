"""What landmarks cost: the figures against their definition, written out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("mmengine")
from lf_dense.explain import capture
from lf_dense.explain.approximation import PLACES, costs, gaussian, pooled, sample_queries


@pytest.fixture
def layers(small):
    return capture(small(landmark_grid=(3, 3)), torch.randn(1, 3, 96, 160))


def literal_kernel(x, y, scale):
    return torch.exp(-(x[:, :, None] - y[:, None]).abs().sum(-1) / scale)


def literal_gaussian(x, y, scale):
    return torch.exp(-(x[:, :, None] - y[:, None]).square().sum(-1) / (2 * math.sqrt(x.shape[-1])))


def smoother(kernel, v, tau):
    mass = kernel.mean(-1, keepdim=True)
    mean = v.mean(1, keepdim=True)
    return kernel @ (v - mean) / kernel.shape[-1] / (mass + tau) + mean


@pytest.mark.parametrize("name", ["laplacian", "gaussian"])
def test_the_errors_are_those_of_the_definition(layers, name):
    inputs = layers[0]
    tokens = sample_queries(inputs, 20)
    kernel = literal_kernel if name == "laplacian" else literal_gaussian
    exact = smoother(
        kernel(inputs.q[:, tokens], inputs.k, inputs.layer.kernel_scale), inputs.v, inputs.layer.tau
    )
    (found,) = [cost for cost in costs(inputs, [5], 20, (name,)) if cost.place == "grid"]
    landmarks = pooled(inputs, 5, 5)
    assert found.landmarks == landmarks.shape[1] == 25
    scale = inputs.layer.kernel_scale
    solved = torch.linalg.inv(kernel(landmarks, landmarks, scale) + 1e-2 * torch.eye(25, dtype=torch.float64))
    whole = kernel(inputs.q[:, tokens], landmarks, scale) @ solved @ kernel(inputs.k, landmarks, scale).mT
    approximate = smoother(whole, inputs.v, inputs.layer.tau)
    error = (approximate - exact).norm()
    # Ten steps of the solver are not the inverse to the last digit.
    assert found.output == pytest.approx(float(error / exact.norm()), rel=0.02)
    centred = exact - inputs.v.mean(1, keepdim=True)
    assert found.deviation == pytest.approx(float(error / centred.norm()), rel=0.02)
    assert found.mass == pytest.approx(float(kernel(inputs.q[:, tokens], inputs.k, scale).mean()))
    assert (found.seconds is None) == (name == "gaussian")


def test_more_landmarks_cost_less_and_all_of_them_nearly_nothing(layers):
    for inputs in layers[1:]:
        found = [
            cost.deviation for cost in costs(inputs, [2, 4, 100], 40, ("laplacian",)) if cost.place == "grid"
        ]
        assert found[2] < 0.02
        assert found[2] < found[0]


def test_pooled_landmarks_are_the_layers_own(layers):
    for inputs in layers:
        mine = pooled(inputs, *inputs.grid)
        torch.testing.assert_close(mine, inputs.landmarks, rtol=1e-5, atol=1e-6)


def test_places(layers):
    inputs = layers[0]
    height, width = inputs.hw_shape
    taken = {name: place(inputs, 3) for name, place in PLACES.items()}
    assert taken["grid"].shape[1] == taken["centres"].shape[1] == taken["random"].shape[1] == 9
    # 24 x 40 tokens: two rows of four or five cells.
    assert taken["shaped"].shape[1] == 2 * round(9 / 2)
    maps = inputs.q.unflatten(1, inputs.hw_shape)
    middle = maps[:, [height // 6, height // 2, height * 5 // 6]][
        :, :, [width // 6, width // 2, width * 5 // 6]
    ]
    assert torch.equal(taken["centres"], middle.flatten(1, 2))
    assert torch.equal(taken["random"], PLACES["random"](inputs, 3))
    rows = {tuple(row) for row in inputs.q[0].tolist()}
    assert {tuple(row) for row in taken["random"][0].tolist()} <= rows


def test_places_of_a_map_smaller_than_the_grid(layers):
    inputs = layers[-1]
    for place in PLACES.values():
        landmarks = place(inputs, 30)
        assert landmarks.shape[1] <= inputs.q.shape[1]
        assert torch.isfinite(landmarks).all()


def test_gaussian_kernel_against_its_formula(layers):
    x, y = layers[0].q[:, :30], layers[0].k[:, :40]
    torch.testing.assert_close(gaussian(x, y, 4.0), literal_gaussian(x, y, 4.0), rtol=1e-9, atol=1e-12)


def test_sampled_queries_are_the_same_for_every_choice(layers):
    inputs = replace(layers[0])
    assert sample_queries(inputs, 10) == sample_queries(inputs, 10)
    assert len(sample_queries(layers[-1], 10**6)) == layers[-1].q.shape[1]
