"""The pyramid: shapes, training switches, registries, and one clear sentence for each wrong argument."""

import copy
import importlib
import math
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")

from mmengine.registry import MODELS

from lf_dense import LaplacianFormer
from lf_dense.blocks import DropPath
from lf_dense.presets import ARCHS

SMALL = {
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 2, 1, 2),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 2, 2),
}


def small(**settings):
    return LaplacianFormer(SMALL, **settings)


def loss_of(outs):
    """A random projection: the plain sum of a LayerNorm's output has no gradient."""
    generator = torch.Generator().manual_seed(3)
    return sum((out * torch.randn(out.shape, generator=generator)).sum() / out.shape[0] for out in outs)


@pytest.fixture(scope="module")
def tiny():
    return LaplacianFormer("tiny").eval()


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (224, 224), (256, 309), (800, 1333)], ids=str)
@torch.no_grad()
def test_shapes_and_strides(tiny, size):
    outs = tiny(torch.randn(1, 3, *size))
    assert isinstance(outs, tuple)
    for out, channels, stride in zip(outs, (64, 128, 320, 512), (4, 8, 16, 32)):
        assert out.shape == (1, channels, math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        assert out.is_contiguous()
        assert out.isfinite().all()
    assert len(outs) == 4


@torch.no_grad()
def test_maps_as_they_lie_in_memory():
    net, x = small().eval(), torch.randn(2, 3, 48, 40)
    as_they_lie = small(out_channels_last=True).eval()
    as_they_lie.load_state_dict(net.state_dict())
    for got, expected in zip(as_they_lie(x), net(x)):
        # is_contiguous is true of any 1 x 1 map, so the strides say it.
        assert got.stride()[1:] == (1, got.shape[1] * got.shape[3], got.shape[1])
        assert torch.equal(got, expected)


@torch.no_grad()
def test_memory_format_of_the_input_does_not_matter():
    net, x = small().eval(), torch.randn(2, 3, 48, 40)
    for got, expected in zip(net(x.contiguous(memory_format=torch.channels_last)), net(x)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("out_indices", [(0,), (3,), (1, 3), (0, 1, 2), [2, 3]], ids=str)
@torch.no_grad()
def test_out_indices(out_indices):
    x = torch.randn(1, 3, 64, 64)
    net = small().eval()
    part = small(out_indices=out_indices).eval()
    part.load_state_dict(net.state_dict())
    expected = [net(x)[index] for index in out_indices]
    got = part(x)
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


@pytest.mark.parametrize("option", ["with_cp", "ffn_with_cp"])
@pytest.mark.parametrize("normalization", ["mass", "whiten_keys", "whiten_landmarks"])
def test_checkpointing_changes_neither_output_nor_gradient(normalization, option):
    options = {"normalization": normalization, "drop_rate": 0.1, "drop_path_rate": 0.3}
    plain, recomputed = small(**options).train(), small(**options, **{option: True}).train()
    recomputed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 48)
    images, results = [x.clone().requires_grad_() for _ in range(2)], []
    for net, image in zip((plain, recomputed), images):
        torch.manual_seed(5)
        results.append(net(image))
        loss_of(results[-1]).backward()
    assert all(torch.equal(a, b) for a, b in zip(*results))
    torch.testing.assert_close(images[0].grad, images[1].grad)
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters()):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


def test_checkpointing_keeps_fewer_activations():
    def kept(net):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            net.train()(torch.randn(1, 3, 64, 64))
        return sum(saved)

    arch = SMALL | {"mlp_ratios": (8, 8, 4, 4)}  # as of every named one
    whole = kept(LaplacianFormer(arch))
    assert kept(LaplacianFormer(arch, with_cp=True)) < whole / 2
    assert kept(LaplacianFormer(arch, ffn_with_cp=True)) < 0.7 * whole


@pytest.mark.parametrize("frozen_stages", range(-1, 5))
def test_frozen_stages_do_not_move(frozen_stages):
    net = small(frozen_stages=frozen_stages, drop_path_rate=0.0)
    frozen = ["stages.0.patch_embed."] if frozen_stages >= 0 else []
    frozen += [f"stages.{index}." for index in range(max(frozen_stages, 0))]
    net.train()
    before = copy.deepcopy(net.state_dict())
    # Weight decay moves whatever the optimizer has a gradient for.
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.1)
    if frozen_stages < 4:
        loss_of(net(torch.randn(2, 3, 64, 64))).backward()
    optimizer.step()
    for name, parameter in net.named_parameters():
        is_frozen = name.startswith(tuple(frozen))
        assert parameter.requires_grad != is_frozen, name
        assert torch.equal(parameter, before[name]) == is_frozen, name
    for name, module in net.named_modules():
        if name and name != "stages":
            assert module.training != (name + ".").startswith(tuple(frozen)), name
    assert not any(module.training for module in net.eval().modules())


def test_norm_eval():
    norms = [module for module in small(norm_eval=True).train().modules() if isinstance(module, nn.LayerNorm)]
    assert norms
    assert not any(norm.training for norm in norms)
    net = small(norm_eval=True).train()
    assert net.training
    assert all(block.training for stage in net.stages for block in stage.blocks)
    assert all(module.training for module in small().train().modules())


def test_train_returns_the_module_and_takes_a_mode():
    net = small(frozen_stages=1, norm_eval=True)
    assert net.train() is net
    assert net.train(False) is net
    assert not net.training


@pytest.mark.parametrize("normalization", ["mass", "whiten_keys", "whiten_landmarks"])
def test_every_parameter_gets_a_gradient(normalization):
    net = small(normalization=normalization, drop_path_rate=0.0)
    loss_of(net(torch.randn(2, 3, 64, 96))).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@torch.no_grad()
def test_state_dict_deepcopy_and_pickle(tmp_path):
    net, x = small().eval(), torch.randn(1, 3, 40, 56)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    loaded = small().eval()
    assert not torch.equal(loaded(x)[0], net(x)[0])
    loaded.load_state_dict(torch.load(tmp_path / "net.pth", weights_only=True))
    assert net.state_dict()._metadata[""]["version"] == 1
    for twin in (loaded, copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert all(torch.equal(a, b) for a, b in zip(twin(x), net(x)))


def test_init_weights_reads_a_checkpoint(tmp_path):
    net = small()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    twin = small(init_cfg={"type": "Pretrained", "checkpoint": str(tmp_path / "net.pth")})
    twin.init_weights()
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), net.state_dict().values()))


@torch.no_grad()
def test_torch_compile_agrees():
    net = LaplacianFormer({**SMALL, "depths": (1, 1, 1, 1)}, out_indices=(0, 1)).eval()
    x = torch.randn(1, 3, 64, 64)
    for got, expected in zip(torch.compile(net)(x), net(x)):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", ["eval", "train"])
@torch.no_grad()
def test_an_image_does_not_see_its_batch(mode):
    net = small(drop_path_rate=0.0).train(mode == "train")
    x, others = torch.randn(3, 3, 64, 80), 5 * torch.randn(3, 3, 64, 80)
    expected = net(x)
    for a, b in zip(net(torch.cat([x[:1], others[1:]])), expected):
        assert torch.equal(a[0], b[0])
    for a, b in zip(net(x.flip(0)), expected):
        torch.testing.assert_close(a.flip(0), b, rtol=1e-4, atol=1e-5)
    # Matrix products of another size may round otherwise, so alone it is the same to rounding.
    for a, b in zip(net(x[:1]), expected):
        torch.testing.assert_close(a[0], b[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalization", ["mass", "whiten_keys", "whiten_landmarks"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_blank_images_are_finite(normalization, value):
    net = small(normalization=normalization, drop_path_rate=0.0)
    x = torch.full((1, 3, 64, 64), value, requires_grad=True)
    outs = net(x)
    loss_of(outs).backward()
    assert all(out.isfinite().all() for out in outs)
    assert all(parameter.grad.isfinite().all() for parameter in (x, *net.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("blank", [True, False])
def test_autocast_is_finite(dtype, blank):
    net = small(drop_path_rate=0.0)
    x = torch.ones(2, 3, 64, 64) if blank else torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", dtype=dtype):
        outs = net(x)
    loss_of([out.float() for out in outs]).backward()
    assert all(out.isfinite().all() for out in outs)
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@torch.no_grad()
def test_autocast_rounds_the_image_and_no_float64():
    net, x = small().eval(), torch.randn(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        for got, expected in zip(net(x), net(x.bfloat16())):
            assert got.dtype == torch.bfloat16
            assert torch.equal(got, expected)
        assert all(out.dtype == torch.float64 for out in net.double()(x.double()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@torch.no_grad()
def test_other_dtypes(dtype):
    net, x = small().eval(), torch.randn(1, 3, 64, 64)
    expected = net(x)
    for got, out in zip(net.to(dtype)(x.to(dtype)), expected):
        assert got.dtype == dtype
        torch.testing.assert_close(got.float(), out, rtol=0, atol=1e-4 if dtype == torch.float64 else 0.3)


# Layer-wise decay


def test_layer_depth_grows_along_the_network():
    net = small()
    num_layers = sum(SMALL["depths"]) + 2
    names = [name for name, _ in net.named_parameters()]
    depths = {name: net.get_layer_depth(f"backbone.{name}", "backbone.") for name in names}
    assert {total for _, total in depths.values()} == {num_layers}
    # The parameters are registered in the order of the forward pass.
    in_order = [depth for depth, _ in depths.values()]
    assert in_order == sorted(in_order)
    assert set(in_order) == set(range(num_layers - 1))
    for name, (depth, _) in depths.items():
        assert (depth == 0) == name.startswith("stages.0.patch_embed.")
    assert net.get_layer_depth("stages.1.patch_embed.proj.weight") == (2, num_layers)
    assert net.get_layer_depth("stages.1.blocks.1.attn.q.bias") == (3, num_layers)
    assert net.get_layer_depth("stages.1.norm.bias") == (3, num_layers)


def test_layer_depth_outside_and_unknown():
    net = small()
    assert net.get_layer_depth("head.fc.weight", "backbone.") == (7, 8)
    said = r"is not a parameter of this LaplacianFormer under the prefix 'backbone\.'"
    for name in (
        "backbone.head.weight",
        "backbone.stages.0",
        "backbone.layers.0.1.weight",
        "backbone.",
        "backbone.stages.7.norm.bias",
    ):
        with pytest.raises(ValueError, match=said):
            net.get_layer_depth(name, "backbone.")


# Registries


def test_root_registry():
    assert MODELS.get("LaplacianFormer") is LaplacianFormer
    assert isinstance(MODELS.build({"type": "LaplacianFormer", "arch": SMALL}), LaplacianFormer)


@pytest.mark.parametrize("scope", ["mmdet", "mmseg", "mmpretrain"])
def test_type_resolves_in(scope):
    pytest.importorskip(scope)
    registry = importlib.import_module(f"{scope}.registry").MODELS
    net = registry.build({"type": "LaplacianFormer", "arch": SMALL, "out_indices": [1, 2]})
    assert type(net) is LaplacianFormer
    assert net.out_indices == (1, 2)


# Settings


def test_drop_path_of_a_sample():
    x = torch.ones(20_000, 2, 3)
    layer = DropPath(0.3)
    out = layer(x)
    assert torch.equal(out, out[:, :1, :1].expand_as(out))
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1.0).div(0.7).item()}
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(layer.eval()(x), x)
    assert torch.equal(DropPath(0.0).train()(x), x)


def test_drop_path_grows_to_the_last_block():
    rates = [block.drop_path.rate for stage in small(drop_path_rate=0.5).stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


@torch.no_grad()
def test_drop_path_is_for_training():
    net, x = small(drop_path_rate=0.9), torch.randn(2, 3, 32, 32)
    assert not all(torch.equal(a, b) for a, b in zip(net.train()(x), net(x)))
    assert all(torch.equal(a, b) for a, b in zip(net.eval()(x), net(x)))


@pytest.mark.parametrize("grid", [(3, 5), [3, 5], ((8, 8), (3, 5), (2, 2), [1, 1])], ids=str)
def test_landmark_grid_is_one_pair_or_one_per_stage(grid):
    net = small(landmark_grid=grid)
    expected = [tuple(pair) for pair in grid] if len(grid) == 4 else [(3, 5)] * 4
    assert [stage.blocks[0].attn.landmark_grid for stage in net.stages] == expected
    assert all(out.isfinite().all() for out in net(torch.randn(1, 3, 64, 64)))


def test_settings_reach_every_block():
    net = small(
        kernel_scale=2.0,
        newton_iters=8,
        normalization="whiten_keys",
        tau=0.5,
        rotary=False,
        learn_kernel_scale=True,
        drop_rate=0.25,
        in_channels=5,
    )
    for stage in net.stages:
        for block in stage.blocks:
            attn = block.attn
            assert (attn.kernel_scale, attn.newton_iters, attn.tau) == (2.0, 8, 0.5)
            assert (attn.normalization, attn.rotary) == ("whiten_keys", False)
            assert attn.log_scale.shape == (attn.num_heads,)
            assert attn.proj_drop.p == block.ffn.drop.p == 0.25
    assert net(torch.randn(1, 5, 32, 32))[0].shape == (1, 8, 8, 8)


def changed(key, value):
    return {**SMALL, key: value}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "giant"}, "arch 'giant' does not exist.*" + ", ".join(ARCHS)),
        ({"arch": {key: SMALL[key] for key in ("embed_dims", "depths")}}, "keys.*depths.*this one has"),
        ({"arch": {**SMALL, "extra": (1, 1, 1, 1)}}, "exactly the keys.*extra"),
        ({"arch": 7}, "exactly the keys.*int"),
        ({"arch": changed("depths", (1, 1, 1))}, r"arch\['depths'\] is \(1, 1, 1\).*4 positive integers"),
        ({"arch": changed("depths", (1, 1, 0, 1))}, r"arch\['depths'\].*4 positive integers"),
        ({"arch": changed("depths", (1, 1, 1.0, 1))}, r"arch\['depths'\].*4 positive integers"),
        ({"arch": changed("depths", 2)}, r"arch\['depths'\] is 2.*4 positive integers"),
        ({"arch": changed("num_heads", (1, 2, 5, 4))}, "5 heads of 24 channels"),
        ({"arch": changed("embed_dims", (6, 16, 24, 32))}, "1 heads of 6 channels.*multiple of 4"),
        ({"out_indices": ()}, r"out_indices is \(\).*0 to 3"),
        ({"out_indices": (0, 4)}, r"out_indices is \(0, 4\).*increasing stage numbers from 0 to 3"),
        ({"out_indices": (-1,)}, r"out_indices is \(-1,\).*0 to 3"),
        ({"out_indices": (1, 0)}, r"out_indices is \(1, 0\).*increasing"),
        ({"out_indices": (1, 1)}, r"out_indices is \(1, 1\).*increasing"),
        ({"out_indices": 2}, "out_indices is 2.*increasing"),
        ({"frozen_stages": 5}, "frozen_stages is 5.*-1.*4"),
        ({"frozen_stages": -2}, "frozen_stages is -2.*-1.*4"),
        ({"drop_rate": 1.0}, r"drop_rate is 1\.0.*\[0, 1\)"),
        ({"drop_path_rate": -0.1}, r"drop_path_rate is -0\.1.*\[0, 1\)"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate is nan"),
        ({"landmark_grid": (0, 7)}, r"landmark grid \(0, 7\).*two positive integers"),
        ({"landmark_grid": 7}, "landmark grid 7.*two positive integers"),
        ({"landmark_grid": (7, 7, 7)}, "two positive integers"),
        ({"landmark_grid": ((7, 7), (7, 7), (7, 7), (7, -7))}, r"landmark grid \(7, -7\)"),
        ({"landmark_grid": (7, 7, 7, 7)}, "landmark grid 7.*two positive integers"),
        ({"kernel_scale": 0.0}, r"kernel scale is 0\.0.*positive"),
        ({"kernel_scale": -4}, "kernel scale is -4.*positive"),
        ({"kernel_scale": float("nan")}, "kernel scale is nan"),
        ({"newton_iters": 0}, "0 iterations.*at least 1"),
        ({"normalization": "softmax"}, "'softmax'.*mass, whiten_keys, whiten_landmarks"),
        ({"in_channels": 0}, "in_channels is 0"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LaplacianFormer(**{"arch": SMALL, **settings})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"shape \(3, 64, 64\).*\(B, 3, H, W\)"),
        ((1, 4, 64, 64), r"shape \(1, 4, 64, 64\).*\(B, 3, H, W\)"),
        ((1, 3, 31, 64), "images are 31 x 64.*at least 32 x 32"),
        ((1, 3, 64, 16), "images are 64 x 16.*at least 32 x 32"),
    ],
    ids=str,
)
def test_bad_images(shape, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.randn(shape))


def test_images_of_bytes():
    with pytest.raises(TypeError, match=r"torch\.uint8.*floating point"):
        small()(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def test_stages_that_are_not_run_take_no_gradient():
    net = small(out_indices=(0, 1)).train()
    loss_of(net(torch.randn(1, 3, 64, 64))).backward()
    for name, parameter in net.named_parameters():
        used = int(name.split(".")[1]) <= 1
        assert parameter.requires_grad == used
        assert (parameter.grad is not None) == used, name
