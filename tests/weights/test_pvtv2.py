"""PVTv2's weights in their public forms.

Every tensor arrives where it belongs, bit for bit, and the parts that both networks share compute the same.
"""

import re

import pytest
import torch
from torch.nn import functional as F

from support.driving import call

pytest.importorskip("mmengine")
from lf_dense import LaplacianFormer, load_pretrained
from lf_dense.errors import UsageError
from lf_dense.weights.pretrained import find_backbone
from lf_dense.weights.pvtv2 import FORMS, convert_pvtv2
from lf_dense.weights.reading import read_checkpoint

B0 = {
    "embed_dims": (32, 64, 160, 256),
    "depths": (2, 2, 2, 2),
    "num_heads": (1, 2, 5, 8),
    "mlp_ratios": (8, 8, 4, 4),
}
B1 = "tiny"
B2 = {
    "embed_dims": (64, 128, 320, 512),
    "depths": (3, 4, 6, 3),
    "num_heads": (1, 2, 5, 8),
    "mlp_ratios": (8, 8, 4, 4),
}


def perturb(model):
    """Give every tensor values of its own: norms and biases start as ones and zeros."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def timm_model(name):
    timm = pytest.importorskip("timm")
    return perturb(timm.create_model(name, pretrained=False))


def mmdet_model():
    backbones = pytest.importorskip("mmdet.models.backbones")
    return perturb(backbones.PyramidVisionTransformerV2(embed_dims=64, num_layers=[2, 2, 2, 2]))


def authors_names(state):
    """timm's names turned into those of whai362/PVT, which timm was ported from."""
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^patch_embed\.", "patch_embed1.", key)
        key = re.sub(r"^stages\.(\d)\.downsample\.", lambda m: f"patch_embed{int(m[1]) + 1}.", key)
        key = re.sub(r"^stages\.(\d)\.blocks\.", lambda m: f"block{int(m[1]) + 1}.", key)
        key = re.sub(r"^stages\.(\d)\.norm\.", lambda m: f"norm{int(m[1]) + 1}.", key)
        renamed[key.replace(".mlp.dwconv.", ".mlp.dwconv.dwconv.")] = value
    return renamed


def expected_of_timm(state, depths):
    """Where each of our tensors comes from, written out by hand: our name, timm's, and which part of it."""
    for stage, depth in enumerate(depths):
        embed = "patch_embed" if stage == 0 else f"stages.{stage}.downsample"
        for kind in ("weight", "bias"):
            yield f"stages.{stage}.patch_embed.proj.{kind}", state[f"{embed}.proj.{kind}"]
            yield f"stages.{stage}.patch_embed.norm.{kind}", state[f"{embed}.norm.{kind}"]
            yield f"stages.{stage}.norm.{kind}", state[f"stages.{stage}.norm.{kind}"]
            for block in range(depth):
                ours = theirs = f"stages.{stage}.blocks.{block}"
                joint = state[f"{theirs}.attn.kv.{kind}"]
                half = joint.shape[0] // 2
                yield f"{ours}.attn.k.{kind}", joint[:half]
                yield f"{ours}.attn.v.{kind}", joint[half:]
                for name in ("norm1", "norm2", "attn.q", "attn.proj"):
                    yield f"{ours}.{name}.{kind}", state[f"{theirs}.{name}.{kind}"]
                for name in ("fc1", "fc2", "dwconv"):
                    yield f"{ours}.ffn.{name}.{kind}", state[f"{theirs}.mlp.{name}.{kind}"]


@pytest.mark.parametrize("names", ["timm", "authors"])
@pytest.mark.parametrize(
    ("model", "arch"),
    [("pvt_v2_b0", B0), ("pvt_v2_b1", B1), ("pvt_v2_b2", B2), ("pvt_v2_b2_li", B2)],
    ids=lambda value: str(value)[:12],
)
def test_every_tensor_is_its_source_s_bit_for_bit(tmp_path, model, arch, names):
    state = timm_model(model).state_dict()
    torch.save(state if names == "timm" else authors_names(state), tmp_path / "pvt.pth")
    net = LaplacianFormer(arch)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = load_pretrained(net, tmp_path / "pvt.pth")
    after = net.state_dict()
    expected = dict(expected_of_timm(state, net.depths))
    for name, value in expected.items():
        assert torch.equal(after[name], value), name
    assert {*report.taken, *report.converted} == set(expected)
    assert set(report.converted) == {name for name in expected if ".attn.k." in name or ".attn.v." in name}
    # PVTv2 lacks the convolution of the values alone, which keeps its own weights.
    convolutions = {name for name in after if ".attn.dwconv." in name}
    assert set(report.left) == convolutions == set(after) - set(expected)
    assert set(report.left.values()) == {"PVTv2 has no convolution of the values"}
    assert all(torch.equal(after[name], before[name]) for name in report.left)
    assert all(re.search(r"\.attn\.(sr|norm)\.|^head\.", name) for name in report.unused)
    assert len(report.unused) + len(report.taken) + len(report.converted) // 2 == len(state)
    assert report.form == ("timm's pvt_v2" if names == "timm" else "PVTv2 of whai362/PVT")
    assert bool(report.notes) == model.endswith("_li")


def test_mmdet_s_form(tmp_path):
    source = mmdet_model()
    state = source.state_dict()
    prefixed = {f"backbone.{name}": value for name, value in state.items()}
    torch.save({"state_dict": prefixed}, tmp_path / "pvt.pth")
    net = LaplacianFormer("tiny")
    report = load_pretrained(net, tmp_path / "pvt.pth")
    after = net.state_dict()
    assert report.share > 0.99
    assert set(report.left) == {name for name in after if ".attn.dwconv." in name}
    pairs = (("patch_embed.proj", "0.projection"), ("patch_embed.norm", "0.norm"), ("norm", "2"))
    for stage in range(4):
        for kind in ("weight", "bias"):
            for ours, theirs in pairs:
                expected = state[f"layers.{stage}.{theirs}.{kind}"]
                assert torch.equal(after[f"stages.{stage}.{ours}.{kind}"], expected)
            for block in range(2):
                ours, theirs = f"stages.{stage}.blocks.{block}", f"layers.{stage}.1.{block}"
                for part, piece in zip("qkv", state[f"{theirs}.attn.attn.in_proj_{kind}"].chunk(3)):
                    assert torch.equal(after[f"{ours}.attn.{part}.{kind}"], piece)
                out_proj = state[f"{theirs}.attn.attn.out_proj.{kind}"]
                assert torch.equal(after[f"{ours}.attn.proj.{kind}"], out_proj)
                assert torch.equal(after[f"{ours}.norm1.{kind}"], state[f"{theirs}.norm1.{kind}"])
                assert torch.equal(after[f"{ours}.norm2.{kind}"], state[f"{theirs}.norm2.{kind}"])
                for name, index in (("fc1", 0), ("dwconv", 1), ("fc2", 4)):
                    value = state[f"{theirs}.ffn.layers.{index}.{kind}"]
                    assert torch.equal(after[f"{ours}.ffn.{name}.{kind}"].flatten(), value.flatten())


def test_shared_parts_compute_what_timm_s_do(tmp_path):
    source = timm_model("pvt_v2_b1")
    torch.save(source.state_dict(), tmp_path / "pvt.pth")
    net = LaplacianFormer("tiny").eval()
    load_pretrained(net, tmp_path / "pvt.pth")
    x = torch.randn(2, 3, 65, 98)
    with torch.no_grad():
        for index, (ours, theirs) in enumerate(zip(net.stages, source.stages)):
            embed = source.patch_embed if index == 0 else theirs.downsample
            tokens, hw_shape = ours.patch_embed(x.contiguous(memory_format=torch.channels_last))
            wanted = embed(x)
            assert tuple(wanted.shape[1:3]) == hw_shape
            torch.testing.assert_close(tokens, wanted.flatten(1, 2))
            for mine, block in zip(ours.blocks, theirs.blocks):
                torch.testing.assert_close(mine.norm1(tokens), block.norm1(tokens))
                torch.testing.assert_close(mine.norm2(tokens), block.norm2(tokens))
                torch.testing.assert_close(mine.ffn(tokens, hw_shape), block.mlp(tokens, list(hw_shape)))
                torch.testing.assert_close(mine.attn.q(tokens), block.attn.q(tokens))
                keys_and_values = torch.cat([mine.attn.k(tokens), mine.attn.v(tokens)], -1)
                torch.testing.assert_close(keys_and_values, block.attn.kv(tokens))
                torch.testing.assert_close(mine.attn.proj(tokens), block.attn.proj(tokens))
            torch.testing.assert_close(ours.norm(tokens), theirs.norm(tokens))
            x = F.gelu(wanted.permute(0, 3, 1, 2))


def test_shared_parts_compute_what_mmdet_s_do(tmp_path):
    source = mmdet_model()
    torch.save(source.state_dict(), tmp_path / "pvt.pth")
    net = LaplacianFormer("tiny").eval()
    load_pretrained(net, tmp_path / "pvt.pth")
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for ours, (embed, blocks, norm) in zip(net.stages, source.layers):
            # mmdet gives this norm 1e-6; the authors, whose weights it loads, have torch's 1e-5.
            embed.norm.eps = 1e-5
            tokens, hw_shape = ours.patch_embed(x.contiguous(memory_format=torch.channels_last))
            wanted, their_shape = embed(x)
            assert their_shape == hw_shape
            torch.testing.assert_close(tokens, wanted)
            for mine, block in zip(ours.blocks, blocks):
                torch.testing.assert_close(mine.norm1(tokens), block.norm1(tokens))
                expected = block.ffn(tokens, hw_shape, identity=tokens)
                torch.testing.assert_close(tokens + mine.ffn(tokens, hw_shape), expected)
            torch.testing.assert_close(ours.norm(tokens), norm(tokens))
            x = wanted.transpose(1, 2).unflatten(2, hw_shape)


def test_another_depth_goes_block_by_block_when_asked(tmp_path):
    state = timm_model("pvt_v2_b2").state_dict()
    torch.save(state, tmp_path / "pvt.pth")
    net = LaplacianFormer("small")
    with pytest.raises(UsageError, match=r"only .*% of the backbone .*timm's pvt_v2.*strict=False"):
        load_pretrained(net, tmp_path / "pvt.pth")
    report = load_pretrained(net, tmp_path / "pvt.pth", strict=False)
    after = net.state_dict()
    for block in range(6):
        name = f"stages.2.blocks.{block}.attn.q.weight"
        assert torch.equal(after[name], state[name])
    assert report.left["stages.2.blocks.6.attn.q.weight"] == "stage 2 has 6 blocks in the file"
    assert "stages.1.blocks.3.attn.q.weight" in report.unused


def test_the_form_can_be_stated(tmp_path):
    torch.save(timm_model("pvt_v2_b0").state_dict(), tmp_path / "pvt.pth")
    assert load_pretrained(LaplacianFormer(B0), tmp_path / "pvt.pth", form="timm").share > 0.99
    with pytest.raises(UsageError, match=r"whai362.*it has patch_embed\.proj\.weight"):
        load_pretrained(LaplacianFormer(B0), tmp_path / "pvt.pth", form="pvtv2")
    with pytest.raises(ValueError, match=r"the form .pvt. .* use one of auto"):
        load_pretrained(LaplacianFormer(B0), tmp_path / "pvt.pth", form="pvt")
    path = str(tmp_path / "pvt.pth")
    init_cfg = {"type": "LaplacianPretrained", "checkpoint": path, "source": "timm"}
    net = LaplacianFormer(B0, init_cfg=init_cfg)
    net.init_weights()
    assert torch.equal(net.stages[0].norm.weight, read_checkpoint(path)["stages.0.norm.weight"])


def test_relatives_without_the_depthwise_convolution_are_not_taken_for_it(tmp_path):
    whole = authors_names(timm_model("pvt_v2_b0").state_dict())
    state = {name: value for name, value in whole.items() if "dwconv" not in name}
    with pytest.raises(UsageError, match="no LaplacianFormer in it"):
        find_backbone(state, "pvt_v1.pth")


def test_no_form_has_the_markers_of_another():
    state = timm_model("pvt_v2_b0").state_dict()
    forms = {"timm": state, "pvtv2": authors_names(state), "mmdet": mmdet_model().state_dict()}
    for name, tensors in forms.items():
        fitting = [other for other, form in FORMS.items() if set(form.markers) <= set(tensors)]
        assert fitting == [name]
    assert not convert_pvtv2(LaplacianFormer(B0).state_dict(), FORMS["timm"]).changed


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_the_tool(tmp_path, ending):
    if ending == "safetensors":
        pytest.importorskip("safetensors")
    torch.save(timm_model("pvt_v2_b1").state_dict(), tmp_path / "pvt.pth")
    out = tmp_path / f"lf.{ending}"
    printed = call("convert_pvtv2.py", tmp_path / "pvt.pth", out, "--arch", "tiny")
    assert "converted  stages.0.blocks.0.attn.k.weight (k of stages.0.blocks.0.attn.kv.weight)" in printed
    left = "stages.0.blocks.0.attn.dwconv.weight (PVTv2 has no convolution of the values)"
    assert f"left       {left}" in printed
    direct, through_file = LaplacianFormer("tiny"), LaplacianFormer("tiny")
    load_pretrained(direct, tmp_path / "pvt.pth")
    report = load_pretrained(through_file, out)
    assert report.form == "LaplacianFormer"
    assert not report.unused
    for name in report.taken:
        assert torch.equal(through_file.state_dict()[name], direct.state_dict()[name])
    assert all(".attn.dwconv." in name for name in report.left)
