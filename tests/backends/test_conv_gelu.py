"""The operator that trains a feed-forward network's middle: against float64, and when the network uses it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lf_dense import use_backend
from lf_dense.backends import native
from lf_dense.blocks import ConvFFN
from support import instruction_sets
from support.literal import relative_error
from support.processes import elsewhere

obstacle = native.library_obstacle("cpu")
pytestmark = pytest.mark.skipif(obstacle is not None, reason=str(obstacle))
# Odd sizes, one pixel, one row, one column; parts of 16 rows and of 128 channels that are and are not full.
MAPS = [(1, 1, 1, 1), (2, 5, 7, 3), (1, 1, 9, 16), (1, 17, 1, 130), (2, 16, 4, 64), (1, 33, 6, 257)]


def build_conv(channels: int, dtype: torch.dtype = torch.float32) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels).to(dtype)


def exact(x, weight, bias, grad):
    """The map and the gradients tap by tap, in float64: out, dx, dweight, dbias."""
    x, weight, bias, grad = (tensor.detach().double() for tensor in (x, weight, bias, grad))
    height, width = x.shape[1:3]
    padded = x.new_zeros(x.shape[0], height + 2, width + 2, x.shape[3])
    padded[:, 1:-1, 1:-1] = x
    before = bias + torch.zeros_like(x)
    for row in range(3):
        for column in range(3):
            before += weight[:, 0, row, column] * padded[:, row : row + height, column : column + width]
    share = 0.5 * (1 + torch.erf(before / math.sqrt(2)))
    grad = grad * (share + before * torch.exp(-(before**2) / 2) / math.sqrt(2 * math.pi))
    dpadded, dweight = torch.zeros_like(padded), torch.zeros_like(weight)
    for row in range(3):
        for column in range(3):
            there = slice(None), slice(row, row + height), slice(column, column + width)
            dpadded[there] += weight[:, 0, row, column] * grad
            dweight[:, 0, row, column] = (padded[there] * grad).sum((0, 1, 2))
    return before * share, dpadded[:, 1:-1, 1:-1], dweight, grad.sum((0, 1, 2))


def plain(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    return nn.functional.gelu(conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


def with_gradients(function, x, conv, grad):
    x = x.detach().requires_grad_()
    out = function(x, conv)
    return out.detach(), *torch.autograd.grad(out, (x, conv.weight, conv.bias), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_the_literal_computation(shape, dtype):
    x, grad, conv = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), build_conv(shape[3])
    conv = conv.to(dtype)
    found, others = (with_gradients(each, x, conv, grad) for each in (native.conv_gelu, plain))
    for ours, theirs, wanted in zip(found, others, exact(x, conv.weight, conv.bias, grad)):
        assert ours.dtype == dtype
        assert ours.shape == wanted.shape
        assert relative_error(ours, wanted) <= 2 * relative_error(theirs, wanted) + 2 * torch.finfo(dtype).eps


def test_far_from_zero_the_slope_is_0_or_1():
    conv = build_conv(1)
    nn.init.zeros_(conv.weight)
    nn.init.ones_(conv.weight[:, :, 1:2, 1:2])
    nn.init.zeros_(conv.bias)
    x = torch.tensor([-1e30, -50.0, -9.0, -6.0, 6.0, 9.0, 50.0, 1e30])[None, None, :, None]
    out, slope, *_ = with_gradients(native.conv_gelu, x, conv, torch.ones_like(x))
    wanted, wanted_slope, *_ = exact(x, conv.weight, conv.bias, torch.ones_like(x))
    assert (out - wanted).abs().nan_to_num().max() <= 1e-6 * 6
    assert (slope - wanted_slope).abs().max() <= 2e-7


def test_nan_stays_in_its_neighbourhood():
    conv, x = build_conv(18), torch.randn(1, 20, 9, 18)
    x[0, 16, 8, 17] = float("nan")
    out, dx, dweight, _ = with_gradients(native.conv_gelu, x, conv, torch.ones_like(x))
    near = [[y, z, 17] for y in (15, 16, 17) for z in (7, 8)]
    assert out.isnan()[0].nonzero().tolist() == near
    # What follows from those pixels is two away.
    assert dx.isnan()[0].nonzero().tolist() == [[y, z, 17] for y in range(14, 19) for z in (6, 7, 8)]
    assert dweight.isnan().flatten(1).any(1).nonzero().tolist() == [[17]]


def test_gradcheck():
    conv = build_conv(3, torch.float64)
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64, requires_grad=True)
    arguments = (x, conv.weight, conv.bias)
    assert torch.autograd.gradcheck(torch.ops.lf_dense.conv_gelu, arguments)
    (slope,) = torch.autograd.grad(native.conv_gelu(x, conv).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        slope.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    conv, x = build_conv(6, dtype), torch.randn(2, 3, 4, 6, dtype=dtype)
    operators, arguments = torch.ops.lf_dense, (x, conv.weight.detach(), conv.bias.detach())
    torch.library.opcheck(operators.conv_gelu, arguments)
    torch.library.opcheck(operators.conv_gelu, (x.clone().requires_grad_(), conv.weight, conv.bias))
    torch.library.opcheck(operators.conv_gelu_backward, (torch.randn_like(x), *arguments))


def test_strided_and_empty_maps():
    conv, x = build_conv(8), torch.randn(2, 8, 6, 5)
    grad = torch.randn(2, 8, 6, 5).permute(0, 2, 3, 1)
    found = with_gradients(native.conv_gelu, x.permute(0, 2, 3, 1), conv, grad)
    wanted = with_gradients(native.conv_gelu, x.permute(0, 2, 3, 1).contiguous(), conv, grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    nothing = torch.randn(0, 4, 4, 8)
    out, dx, dweight, dbias = with_gradients(native.conv_gelu, nothing, conv, nothing)
    assert out.shape == dx.shape == nothing.shape
    assert not dweight.any()
    assert not dbias.any()


def test_wrong_arguments_are_refused():
    conv, x = build_conv(8), torch.randn(1, 3, 4, 8)
    good = (x, conv.weight.detach(), conv.bias.detach())
    for index, wrong in [(0, x.half()), (0, x.transpose(1, 2)), (1, good[1].double()), (2, good[2][:4])]:
        with pytest.raises(RuntimeError, match="lf_dense"):
            torch.ops.lf_dense.conv_gelu(*good[:index], wrong, *good[index + 1 :])
    for grad in (x[:, :2].contiguous(), x.double(), x.transpose(1, 2)):
        with pytest.raises(RuntimeError, match="lf_dense"):
            torch.ops.lf_dense.conv_gelu_backward(grad, *good)


def bits_on_threads(counts: list[int]) -> list[bool]:
    conv, x, grad = build_conv(300), torch.randn(2, 50, 9, 300), torch.randn(2, 50, 9, 300)
    found = []
    for count in counts:
        torch.set_num_threads(count)
        found.append(with_gradients(native.conv_gelu, x, conv, grad))
    return [all(map(torch.equal, each, found[0])) for each in found]


def test_the_same_bits_on_any_number_of_threads():
    assert elsewhere(bits_on_threads, [1, 2, 3]) == [True] * 3


# The network


@pytest.fixture
def calls(monkeypatch):
    """How often the operator was called."""
    made, run = [], native.conv_gelu
    monkeypatch.setattr(native, "conv_gelu", lambda *arguments: made.append(1) or run(*arguments))
    return made


def step(ffn: ConvFFN, x: torch.Tensor) -> list[torch.Tensor]:
    ffn.zero_grad()
    x = x.detach().requires_grad_()
    out = ffn(x, (6, 7))
    out.square().sum().backward()
    return [out.detach(), x.grad, *(weight.grad for weight in ffn.parameters() if weight.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_network_trains_by_it(dtype, calls):
    ffn, x = ConvFFN(8, 40, 0.0).to(dtype).train(), torch.randn(2, 42, 8, dtype=dtype)
    found = step(ffn, x)
    assert calls == [1]
    with use_backend("reference"):
        wanted = step(ffn, x)
    assert calls == [1]
    assert len(found) == len(wanted) == 8
    for ours, theirs in zip(found, wanted):
        assert relative_error(ours, theirs.double()) <= 20 * torch.finfo(dtype).eps


def test_frozen_weights_and_a_missing_bias(calls):
    ffn, x = ConvFFN(8, 40, 0.0), torch.randn(2, 42, 8)
    ffn.dwconv.bias = None
    ffn.fc1.requires_grad_(False)
    found = step(ffn, x)
    assert calls == [1]
    with use_backend("reference"):
        wanted = step(ffn, x)
    assert len(found) == len(wanted) == 5
    assert all(relative_error(ours, theirs.double()) <= 1e-5 for ours, theirs in zip(found, wanted))


def test_dropout_follows_it(calls):
    ffn, x = ConvFFN(8, 40, 0.5).train(), torch.randn(2, 42, 8)
    torch.manual_seed(3)
    found = step(ffn, x)
    torch.manual_seed(3)
    with use_backend("reference"):
        wanted = step(ffn, x)
    assert calls == [1]
    assert all(relative_error(ours, theirs.double()) <= 1e-5 for ours, theirs in zip(found, wanted))


def test_what_is_not_plain_runs_as_layers(calls):
    x = torch.randn(2, 42, 8)
    hooked, other, mixed, plain_ffn = (ConvFFN(8, 40, 0.0) for _ in range(4))
    seen = []
    hooked.dwconv.register_forward_hook(lambda *unused: seen.append(1))
    other.act = nn.GELU(approximate="tanh")
    step(hooked, x)
    assert seen == [1]
    found = step(other, x)[0]
    with use_backend("reference"):
        # The exact GELU differs by ten times as much.
        torch.testing.assert_close(found, step(other, x)[0], rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        step(plain_ffn, x)
    with use_backend("reference"):
        step(plain_ffn, x)
    step(mixed.to(torch.bfloat16), x.to(torch.bfloat16))
    with torch.no_grad():
        plain_ffn(x, (6, 7))
        torch.testing.assert_close(other(x, (6, 7)), found, rtol=1e-5, atol=1e-6)
    assert calls == []


def test_one_hidden_map_less_is_kept():
    x, ffn = torch.randn(2, 42, 8, requires_grad=True), ConvFFN(8, 40, 0.0)

    def hidden_maps() -> int:
        kept = set()

        def note(tensor):
            if tensor.numel() == 2 * 42 * 40:
                kept.add(tensor.data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            ffn(x, (6, 7))
        return len(kept)

    assert hidden_maps() == 2
    with use_backend("reference"):
        assert hidden_maps() == 3


def test_operations_are_counted():
    ffn, x = ConvFFN(8, 40, 0.0), torch.randn(2, 42, 8, requires_grad=True)

    def count(function, *arguments) -> int:
        with FlopCounterMode(display=False) as counter:
            function(*arguments)
        return counter.get_total_flops()

    forward = count(ffn, x, (6, 7))
    with use_backend("reference"):
        assert forward == count(ffn, x, (6, 7)) > 0
    # Each product and each convolution has two in the backward pass. (Torch counts those of a depthwise
    # convolution as of a full one.)
    assert count(step, ffn, x) == 3 * forward


@pytest.mark.parametrize("name", ["avx512bf16", "avx512", "avx2", "plain"])
def test_other_instruction_sets(name):
    environment = instruction_sets.environment_of(name)
    instruction_sets.assert_tests_pass(__file__, "literal or slope or nan", environment)
