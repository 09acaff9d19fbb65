"""The attention layer: rotation, landmarks, views without copies, and what it may import."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lf_dense import LaplacianAttention, functional
from lf_dense.attention import RotaryTable, map_to_tokens, rotate, tokens_to_map
from lf_dense.backends import native

CPU = torch.device("cpu")


# Rotary embedding


def as_complex(table):
    """The unit numbers that a table multiplies its pairs of channels with: (H * W, pairs)."""
    cos, signed_sin = (part.squeeze(1).double() for part in table)
    half = cos.shape[-1] // 2
    assert torch.equal(cos[:, :half], cos[:, half:])
    assert torch.equal(signed_sin[:, :half], -signed_sin[:, half:])
    return torch.complex(cos[:, :half], signed_sin[:, half:])


@pytest.mark.parametrize("hw_shape", [(1, 1), (1, 7), (5, 3), (56, 56)], ids=str)
def test_rotation_keeps_the_norm(hw_shape):
    x = torch.randn(2, math.prod(hw_shape), 3, 16)
    torch.testing.assert_close(rotate(x, RotaryTable(hw_shape, 16, CPU)).norm(dim=-1), x.norm(dim=-1))


def test_inner_products_depend_on_the_offset_alone():
    height, width = 6, 9
    table = RotaryTable((height, width), 16, CPU)

    def one_vector_everywhere():
        tokens = torch.randn(16).expand(1, height * width, 1, 16)
        return rotate(tokens, table).view(height, width, 16)

    query, key = one_vector_everywhere(), one_vector_everywhere()
    for down, right in [(0, 0), (1, 0), (0, 1), (2, 3)]:
        products = (query[: height - down, : width - right] * key[down:, right:]).sum(-1)
        torch.testing.assert_close(products, products[:1, :1].expand_as(products), rtol=1e-4, atol=1e-5)
    assert (query[0, 0] * key[1, 0]).sum() != pytest.approx((query[0, 0] * key[0, 1]).sum().item(), abs=1e-2)


def test_positions_lie_in_the_unit_square_whatever_the_map():
    for hw_shape in [(7, 7), (56, 30), (200, 334)]:
        turns = as_complex(RotaryTable(hw_shape, 8, CPU).whole()).view(*hw_shape, 4)
        for axis, size in enumerate(hw_shape):
            positions = (torch.arange(size, dtype=torch.float64) * 2 + 1) / size - 1
            assert positions.abs().max() < 1
            # The first pair of each axis turns fastest: by 2 pi for every unit of position.
            along = turns[:, 0, 0] if axis == 0 else turns[0, :, 2]
            expected = torch.polar(torch.ones_like(positions), 2 * math.pi * positions)
            torch.testing.assert_close(along, expected, rtol=0, atol=1e-5)


def test_a_larger_map_interpolates():
    coarse = as_complex(RotaryTable((4, 6), 16, CPU).whole()).view(4, 6, 8)
    fine = as_complex(RotaryTable((8, 12), 16, CPU).whole()).view(4, 2, 6, 2, 8)
    # The angle of a cell is the mean of those of its four quarters, so its fourth power is their product.
    product = fine[:, 0, :, 0] * fine[:, 0, :, 1] * fine[:, 1, :, 0] * fine[:, 1, :, 1]
    torch.testing.assert_close(product, coarse**4, rtol=0, atol=2e-5)


# Landmarks


@pytest.mark.parametrize(("size", "stride"), [(56, 8), (28, 4), (14, 2), (7, 1)])
def test_landmarks_at_224_are_plain_pooling(size, stride):
    q = torch.randn(2, size * size, 3, 8)
    got = LaplacianAttention(24, 3).pool_landmarks(q, (size, size))
    expected = F.avg_pool2d(q.permute(0, 2, 3, 1).reshape(6, 8, size, size), stride).reshape(2, 3, 8, 49).mT
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("hw_shape", [(1, 1), (3, 5), (2, 20), (9, 4), (25, 42)], ids=str)
def test_number_of_landmarks(hw_shape):
    layer = LaplacianAttention(16, 2, landmark_grid=(6, 4))
    q = torch.randn(2, math.prod(hw_shape), 2, 8)
    landmarks = layer.pool_landmarks(q, hw_shape)
    assert landmarks.shape == (2, 2, min(6, hw_shape[0]) * min(4, hw_shape[1]), 8)


def test_a_map_smaller_than_the_grid_has_every_query_for_a_landmark():
    q = torch.randn(2, 15, 2, 8)
    torch.testing.assert_close(LaplacianAttention(16, 2).pool_landmarks(q, (3, 5)), q.transpose(1, 2))


def test_layer_pools_rotated_queries_and_passes_its_settings(monkeypatch):
    calls = []

    def spy(q, k, v, landmarks, **settings):
        calls.append((q, k, v, landmarks, settings))
        return real(q, k, v, landmarks, **settings)

    real = functional.laplacian_attention
    monkeypatch.setattr(functional, "laplacian_attention", spy)
    layer = LaplacianAttention(
        16, 2, landmark_grid=(2, 2), kernel_scale=2.0, newton_iters=7, normalization="whiten_keys", tau=0.5
    )
    x = torch.randn(2, 16, 16)
    layer(x, (4, 4))
    q, k, v, landmarks, settings = calls[0]
    table = RotaryTable((4, 4), 8, CPU)
    torch.testing.assert_close(q, rotate(layer.q(x).unflatten(2, (2, 8)), table).transpose(1, 2))
    torch.testing.assert_close(k, rotate(layer.k(x).unflatten(2, (2, 8)), table).transpose(1, 2))
    torch.testing.assert_close(v, layer.v(x).unflatten(2, (2, 8)).transpose(1, 2))
    torch.testing.assert_close(landmarks, q.unflatten(2, (2, 2, 2, 2)).mean((3, 5)).flatten(2, 3))
    assert settings == {"scale": 2.0, "iters": 7, "normalization": "whiten_keys", "tau": 0.5}


def test_layer_is_attention_plus_depthwise_convolution_of_the_values():
    layer = LaplacianAttention(16, 2)
    x = torch.randn(2, 20, 16)
    q, k, v = (project(x).unflatten(2, (2, 8)) for project in (layer.q, layer.k, layer.v))
    table = RotaryTable((4, 5), 8, CPU)
    q, k = rotate(q, table), rotate(k, table)
    attended = functional.laplacian_attention(*(y.transpose(1, 2) for y in (q, k, v, q)))
    local = layer.dwconv(layer.v(x).mT.reshape(2, 16, 4, 5)).flatten(2).mT
    expected = layer.proj(attended.transpose(1, 2).flatten(2) + local)
    torch.testing.assert_close(layer(x, (4, 5)), expected)
    torch.testing.assert_close(layer(x, (4, 5), table), expected)


def test_layer_without_rotary_embedding_does_not_know_where_a_token_is():
    layer = LaplacianAttention(16, 2, landmark_grid=(1, 1), rotary=False)
    layer.dwconv.requires_grad_(False).weight.zero_()
    x, order = torch.randn(2, 20, 16), torch.randperm(20)
    torch.testing.assert_close(layer(x[:, order], (4, 5)), layer(x, (4, 5))[:, order])
    layer.rotary = True
    assert (layer(x[:, order], (4, 5)) - layer(x, (4, 5))[:, order]).abs().max() > 1e-3


def test_a_learned_scale_is_a_kernel_scale_of_each_head():
    learned = LaplacianAttention(16, 2, learn_kernel_scale=True)
    assert learned.log_scale.shape == (2,)
    fixed = LaplacianAttention(16, 2)
    fixed.load_state_dict(learned.state_dict(), strict=False)
    x = torch.randn(2, 20, 16)
    torch.testing.assert_close(learned(x, (4, 5)), fixed(x, (4, 5)))
    with torch.no_grad():
        learned.log_scale += math.log(3.0)
    fixed.kernel_scale = 12.0
    torch.testing.assert_close(learned(x, (4, 5)), fixed(x, (4, 5)))
    learned(x, (4, 5)).square().sum().backward()
    assert (learned.log_scale.grad != 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dims": 16, "num_heads": 3}, "3 heads of 16 channels"),
        ({"embed_dims": 12, "num_heads": 2}, "2 heads of 12 channels.*multiple of 4"),
        ({"embed_dims": 16, "num_heads": 0}, "0 heads of 16 channels"),
        ({"landmark_grid": (0, 7)}, r"landmark grid \(0, 7\).*two positive integers"),
        ({"landmark_grid": 7}, "landmark grid 7.*two positive integers"),
        ({"landmark_grid": (7, 7.0)}, "two positive integers"),
        ({"landmark_grid": (7, 7, 7)}, "two positive integers"),
        ({"kernel_scale": 0.0}, r"kernel scale is 0\.0"),
        ({"kernel_scale": float("nan")}, "kernel scale is nan"),
        ({"newton_iters": 0}, "0 iterations"),
        ({"normalization": "softmax"}, "'softmax'.*mass"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        LaplacianAttention(**{"embed_dims": 16, "num_heads": 2, **arguments})


# Views


def test_tokens_and_maps_are_one_memory():
    tokens = torch.randn(2, 15, 8)
    as_map = tokens_to_map(tokens, (3, 5))
    assert as_map.shape == (2, 8, 3, 5)
    assert as_map.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(as_map[1, :, 2, 4], tokens[1, 14])
    back = map_to_tokens(as_map)
    assert torch.equal(back, tokens)
    assert as_map.data_ptr() == back.data_ptr() == tokens.data_ptr()


class Copies(TorchDispatchMode):
    """Lists the operators that copy a whole activation, from the first convolution's output on."""

    # The dispatcher's names of what makes a contiguous, converted or rearranged copy.
    NAMES = (
        "clone",
        "_to_copy",
        "copy_",
        "copy",
        "contiguous",
        "_reshape_copy",
        "_to_dense",
        "cat",
        "stack",
        "index_select",
    )

    def __init__(self, smallest, started):
        super().__init__()
        self.smallest, self.started, self.found = smallest, started, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.started and name in self.NAMES and max(x.numel() for x in tree_leaves(out)) >= self.smallest:
            self.found.append((name, tuple(out.shape)))
        self.started = self.started or name == "convolution"
        return out


def gathers_heads(copy, batch):
    """Whether this is the one copy that the reference makes; the native operators make none.

    At several images and heads, torch.matmul gathers V as (B, heads, N, d).
    """
    name, shape = copy
    is_reference = native.library_obstacle("cpu") is not None
    is_all_heads = len(shape) == 4 and shape[0] == batch and shape[1] > 1
    return is_reference and batch > 1 and name == "clone" and is_all_heads


@pytest.mark.parametrize("batch", [1, 2])
def test_layer_copies_no_activation(batch):
    layer = LaplacianAttention(32, 4).eval()
    x = torch.randn(batch, 400, 32)
    # The rotary table is no activation: it is made once for a stage, for one image.
    table = RotaryTable((20, 20), 8, CPU)
    with torch.no_grad(), Copies(batch * 400 * 32, started=True) as copies:
        layer(x, (20, 20), table)
    assert [copy for copy in copies.found if not gathers_heads(copy, batch)] == []


@pytest.mark.parametrize("batch", [1, 2])
def test_backbone_copies_no_activation(batch):
    pytest.importorskip("mmengine")
    from lf_dense import LaplacianFormer

    net = LaplacianFormer("tiny", out_channels_last=True).eval()
    x = torch.randn(batch, 3, 320, 320)
    with torch.no_grad(), Copies(batch * 10 * 10 * 512, started=False) as copies:
        outs = net(x)
    assert copies.started
    # cat makes the rotary tables of the first stages, which are no activations.
    assert [copy for copy in copies.found if copy[0] != "cat" and not gathers_heads(copy, batch)] == []
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in outs)


# Layers of the house

WITHOUT_MM = """
import sys
for name in ("mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain"):
    sys.modules[name] = None  # importing it raises ImportError
"""


def run_python(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


def test_attention_works_without_mmengine():
    code = """
import torch
import lf_dense.attention, lf_dense.functional, lf_dense
assert lf_dense.LaplacianAttention(16, 2)(torch.randn(1, 12, 16), (3, 4)).shape == (1, 12, 16)
assert not [name for name in sys.modules if name.startswith("lf_dense.laplacianformer")]
try:
    lf_dense.LaplacianFormer
except ImportError as error:
    print(error)
try:
    lf_dense.nothing
except AttributeError as error:
    print(error)
"""
    done = run_python(WITHOUT_MM + code)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "LaplacianFormer needs mmengine" in first
    assert "pip install" in first
    assert "no attribute 'nothing'" in second


def test_from_import_without_mmengine_says_what_is_missing():
    done = run_python(WITHOUT_MM + "from lf_dense import LaplacianFormer")
    assert done.returncode != 0
    said = "ImportError: lf_dense.LaplacianFormer needs mmengine: pip install"
    assert done.stderr.splitlines()[-1].startswith(said)
