"""oneDNN's product in linear layers that train: against float64, and when they use it."""

from __future__ import annotations

import platform
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lf_dense import use_backend
from lf_dense.attention import LaplacianAttention
from lf_dense.backends import native, products
from lf_dense.blocks import ConvFFN
from lf_dense.fusing import apply_linear
from support.literal import relative_error

obstacle = native.library_obstacle("cpu")
pytestmark = [
    pytest.mark.skipif(obstacle is not None, reason=str(obstacle)),
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"),
]
# Tokens, channels in, channels out: odd ones, single ones, more out and more in, long sums.
SIZES = [((1,), 1, 1), ((7,), 3, 5), ((2, 33), 64, 17), ((3, 1, 5), 16, 130), ((2, 50), 2049, 8)]


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """As on a processor that uses them."""
    monkeypatch.setattr(products, "is_faster", lambda: True)


@pytest.fixture
def calls(monkeypatch):
    found, linear = [], products.linear
    monkeypatch.setattr(
        products, "linear", lambda x, layer: found.append(layer.out_features) or linear(x, layer)
    )
    return found


def with_gradients(function, x, layer, grad):
    x = x.detach().requires_grad_()
    out = function(x, layer)
    return out.detach(), *torch.autograd.grad(out, (x, *layer.parameters()), grad)


def torchs(x, layer):
    return layer(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("tokens", "channels", "out_channels"), SIZES, ids=str)
def test_the_literal_computation(tokens, channels, out_channels, bias):
    layer = nn.Linear(channels, out_channels, bias=bias)
    x, grad = torch.randn(*tokens, channels), torch.randn(*tokens, out_channels)
    found, others = (with_gradients(each, x, layer, grad) for each in (products.linear, torchs))
    rows, grads, weight = x.double().flatten(0, -2), grad.double().flatten(0, -2), layer.weight.double()
    out = torch.einsum("nc,oc->no", rows, weight) + (layer.bias.double() if bias else 0)
    wanted = [out, torch.einsum("no,oc->nc", grads, weight), torch.einsum("no,nc->oc", grads, rows)]
    wanted += [grads.sum(0)] if bias else []
    for ours, theirs, exact in zip(found, others, wanted):
        assert (ours.dtype, ours.shape) == (torch.float32, theirs.shape)
        exact = exact.detach().reshape(ours.shape)
        allowed = 2 * relative_error(theirs, exact) + 2 * torch.finfo(torch.float32).eps
        assert relative_error(ours, exact) <= allowed


def test_tensors_of_any_strides():
    layer, x = nn.Linear(6, 9), torch.randn(6, 5, 2).permute(2, 1, 0)
    for grad in (torch.randn(9, 5, 2).permute(2, 1, 0), torch.randn(9).expand(2, 5, 9)):
        found, others = (with_gradients(each, x, layer, grad) for each in (products.linear, torchs))
        for ours, theirs in zip(found, others):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(frozen):
    layer, x = nn.Linear(4, 3), torch.randn(2, 5, 4, requires_grad=frozen != "x")
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name != frozen)
    products.linear(x, layer).square().sum().backward()
    has_gradient = {"x": x.grad, "weight": layer.weight.grad, "bias": layer.bias.grad}
    assert {name: grad is None for name, grad in has_gradient.items()} == {
        name: name == frozen for name in has_gradient
    }


def test_there_is_a_second_derivative():
    layer, x = nn.Linear(5, 3), torch.randn(4, 5)
    seconds = []
    for function in (products.linear, torchs):
        own = x.clone().requires_grad_()
        first = torch.autograd.grad(function(own, layer).pow(3).sum(), (own, layer.weight), create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), (own, *layer.parameters())))
    for ours, theirs in zip(*seconds):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "part", [LaplacianAttention(16, 2), ConvFFN(16, 128, 0.0)], ids=lambda m: type(m).__name__
)
def test_the_parts_of_a_block_train_by_it(part, calls):
    x = torch.randn(2, 63, 16)
    gradients = []
    for backend in ("native", "reference"):
        with use_backend(backend):
            own = x.clone().requires_grad_()
            out = checkpoint(part, own, (7, 9), use_reentrant=False)
            gradients.append(torch.autograd.grad(out.square().mean(), (own, *part.parameters())))
    # Twice: the checkpoint computes again.
    assert calls == 2 * [layer.out_features for layer in part.modules() if isinstance(layer, nn.Linear)]
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_torch_counts_its_operations(calls):
    layer, x = nn.Linear(6, 9), torch.randn(2, 5, 6, requires_grad=True)
    counts = []
    for backend in ("native", "reference"):
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            apply_linear(layer, x).sum().backward()
        counts.append(counter.get_total_flops())
    assert len(calls) == 1
    assert counts == [3 * 2 * 10 * 6 * 9] * 2


def test_everything_else_is_the_layer(calls, monkeypatch):
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    with torch.no_grad():
        apply_linear(layer, x)
    with use_backend("reference"):
        apply_linear(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        apply_linear(layer, x)
    with torch.backends.mkldnn.flags(enabled=False):
        apply_linear(layer, x)
    assert apply_linear(layer, x[:0]).shape == (0, 4)
    apply_linear(nn.Linear(4, 4).double(), x.double())
    apply_linear(nn.Linear(4, 4, device="meta"), x.to("meta"))
    torch.compile(apply_linear, backend="eager")(layer, x)
    apply_linear(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), x)
    layer.register_forward_hook(lambda *unused: None)
    apply_linear(layer, x)
    monkeypatch.setattr(products, "is_faster", lambda: False)
    apply_linear(nn.Linear(4, 4), x)
    assert calls == []


@pytest.mark.parametrize(
    ("capability", "processor", "expected"),
    [
        ("AVX512", {"vendor_id": "AuthenticAMD", "cpu family": "26"}, True),
        ("AVX512", {"vendor_id": "AuthenticAMD", "cpu family": "25"}, False),
        ("AVX512", {"vendor_id": "GenuineIntel", "cpu family": "6"}, False),
        ("AVX2", {"vendor_id": "AuthenticAMD", "cpu family": "26"}, False),
        ("AVX512", {}, False),
    ],
)
def test_which_processors_use_it(capability, processor, expected, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(products, "_processor", lambda: processor)
    assert products.is_faster.__wrapped__() is expected


def test_the_processor_is_read_from_linux():
    if not sys.platform.startswith("linux"):
        assert products._processor() == {}
    elif platform.machine() == "x86_64":
        assert products._processor()["vendor_id"]
        assert int(products._processor()["cpu family"]) > 0
