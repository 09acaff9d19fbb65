"""Exported graphs: what is in them in each form, and the standard one against the literal computation."""

from __future__ import annotations

from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import lf_dense
from lf_dense.attention import RotaryTable
from lf_dense.backends import exporting, native
from lf_dense.blocks import Block
from lf_dense.export import graphs
from lf_dense.export.parts import Backbone
from support import ROOT
from support.literal import literal_attention, make_inputs, relative_error

SMALL = {
    "embed_dims": (16, 32, 48, 64),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 2, 3, 4),
    "mlp_ratios": (2, 2, 2, 2),
}
BLOCK = ["ProjectHeads", "LaplacianAttention", "MergeHeads", "ConvFFN"]


def _body(scan):
    return next(attribute.g for attribute in scan.attribute if attribute.name == "body")


class Attention(nn.Module):
    def __init__(self, normalization):
        super().__init__()
        self.normalization = normalization

    def forward(self, q, k, v, landmarks):
        return lf_dense.laplacian_attention(q, k, v, landmarks, normalization=self.normalization)


class Model(nn.Module):
    """What ``Backbone`` takes the backbone of."""

    def __init__(self, **changes):
        super().__init__()
        self.backbone = lf_dense.LaplacianFormer(SMALL | changes).eval()


def session_of(model):
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def all_nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_nodes(attribute.g)


@pytest.fixture(scope="module", params=["mass", "whiten_keys", "whiten_landmarks"])
def attention(request):
    """One graph of the standard form for every number of tokens and landmarks."""
    auto, inputs = torch.export.Dim.AUTO, make_inputs(batch=3, n=300, dtype=torch.float32)
    tokens = {0: auto, 2: auto}
    with graphs._quiet(), torch.no_grad(), exporting("standard"):
        program = torch.export.export(
            Attention(request.param), tuple(inputs), dynamic_shapes=(*[tokens] * 3, tokens), strict=False
        )
        model = torch.onnx.export(program, dynamo=True, opset_version=graphs.OPSET, verbose=False)
    return request.param, session_of(model.model_proto), model.model_proto.graph


@pytest.mark.parametrize(
    ("n", "m"), [(1, 1), (2, 2), (33, 9), (127, 9), (128, 9), (129, 49), (256, 16), (1000, 49)]
)
def test_the_standard_form_is_the_literal_computation(attention, n, m):
    normalization, session, _ = attention
    exact = make_inputs(batch=2, n=n, m=m)
    wanted = literal_attention(*exact, normalization)
    inputs = [x.float() for x in exact]
    names = [value.name for value in session.get_inputs()]
    (out,) = session.run(None, dict(zip(names, (x.numpy() for x in inputs))))
    plain = lf_dense.laplacian_attention(*inputs, normalization=normalization, backend="reference")
    floor = torch.finfo(torch.float32).eps
    assert relative_error(torch.from_numpy(out), wanted) <= 2 * max(relative_error(plain, wanted), floor)


def test_differences_to_landmarks_are_taken_in_blocks_alone(attention):
    """Memory is linear in the tokens: outside the scans stands at most the landmarks' own matrix."""
    normalization, _, graph = attention
    outside = sum(node.op_type == "Abs" for node in graph.node)
    scans = [node for node in graph.node if node.op_type == "Scan"]
    inside = sum(node.op_type == "Abs" for scan in scans for node in all_nodes(_body(scan)))
    assert outside == (1 if normalization == "mass" else 0)
    assert inside == len(scans) == (2 if normalization == "mass" else 3)


@pytest.fixture(scope="module")
def standard():
    model = Model()
    graph = graphs.onnx_graph(Backbone(model), "standard", 3, None, tuple("abcd"))
    return model, graph


@pytest.fixture(scope="module")
def operator():
    model = Model()
    return model, graphs.onnx_graph(Backbone(model), "operator", 3, None, tuple("abcd"))


@pytest.fixture(scope="module")
def before_int8():
    model = Model()
    return model, graphs.onnx_graph(Backbone(model), "operator", 3, None, tuple("abcd"), int8=True)


def our_nodes(graph):
    return [node for node in all_nodes(graph.graph) if node.domain == graphs.DOMAIN]


def test_the_standard_form_needs_nothing_of_ours(standard):
    _, graph = standard
    onnx.checker.check_model(graph, full_check=True)
    assert {entry.domain for entry in graph.opset_import} <= {"", "pkg.onnxscript.torch_lib.common"}
    assert {node.domain for node in all_nodes(graph.graph)} == {""}
    assert not graph.functions


@pytest.mark.parametrize(
    ("batch", "height", "width"), [(1, 224, 224), (2, 33, 47), (1, 64, 96), (3, 161, 131), (1, 500, 333)]
)
def test_the_standard_form_takes_any_size(standard, batch, height, width):
    model, graph = standard
    image = torch.randn(batch, 3, height, width)
    with torch.no_grad():
        wanted = model.backbone(image)
    for out, expected in zip(session_of(graph).run(None, {"image": image.numpy()}), wanted):
        assert out.shape == expected.shape
        assert abs(out - expected.numpy()).max() <= 1e-5 * expected.abs().max()


def attributes_of(node):
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def test_a_block_is_four_nodes(operator):
    _, graph = operator
    assert [node.op_type for node in our_nodes(graph)] == 4 * BLOCK
    project, attention, merge, ffn = map(attributes_of, our_nodes(graph)[:4])
    small = pytest.approx(1e-2)
    assert attention == {"scale": pytest.approx(4.0), "iters": 10, "eps": small, "tau": small}
    assert project == ffn == {"eps": pytest.approx(1e-6)}
    assert merge == {}
    # What is left: the patch embeddings' convolutions and norms, and the stages' norms.
    others = Counter(node.op_type for node in all_nodes(graph.graph))
    assert (others["Scan"], others["Conv"], others["LayerNormalization"]) == (0, 4, 8)


def test_weights_reach_the_nodes_as_they_are(operator):
    model, graph = operator
    weights = {tensor.name: tensor for tensor in graph.graph.initializer}
    layer = model.backbone.stages[0].blocks[0].ffn
    ffn = our_nodes(graph)[3]
    for name, tensor in ((ffn.input[3], layer.fc1.weight), (ffn.input[5], layer.dwconv.weight)):
        assert (onnx.numpy_helper.to_array(weights[name]) == tensor.detach().numpy()).all()


def test_int8_keeps_layers_that_the_quantiser_knows(before_int8):
    _, graph = before_int8
    assert [node.op_type for node in our_nodes(graph)] == ["LaplacianAttention"] * 4
    others = Counter(node.op_type for node in all_nodes(graph.graph))
    assert (others["Scan"], others["Conv"]) == (0, 12)


def test_tokens_reach_the_nodes_as_projections_leave_them(operator, before_int8):
    """The nodes' layout is the projections': no transpose stands on either side of them."""
    for _, graph in (operator, before_int8):
        made_by = {name: node for node in graph.graph.node for name in node.output}
        for node in our_nodes(graph):
            tokens = (
                node.input[:3] if node.op_type in ("LaplacianAttention", "MergeHeads") else node.input[:1]
            )
            assert not any(made_by[name].op_type == "Transpose" for name in tokens)


class OwnAttention(lf_dense.LaplacianAttention):
    """May do anything."""


def test_blocks_that_are_not_plain_have_the_attention_alone():
    model = Model(depths=(3, 1, 1, 1))
    (hooked, replaced, plain), (whitened,) = (stage.blocks for stage in model.backbone.stages[:2])
    hooked.ffn.fc1.register_forward_hook(lambda layer, inputs, output: output * 2)
    replaced.attn.__class__ = OwnAttention
    whitened.attn.normalization = "whiten_keys"
    graph = graphs.onnx_graph(Backbone(model), "operator", 3, (64, 96), tuple("abcd"))
    kinds = [node.op_type for node in our_nodes(graph)]
    assert kinds == ["LaplacianAttention"] * 2 + 3 * BLOCK
    assert plain.attn.normalization == "mass"


@pytest.mark.parametrize("options", [{}, {"rotary": False}, {"qkv_bias": False, "learn_kernel_scale": True}])
def test_a_block_as_nodes_is_the_block(options):
    block = Block(32, 2, lf_dense.LaplacianAttention(32, 2, **options)).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, hw_shape = torch.randn(2, 45, 32), (5, 9)
    table = RotaryTable(hw_shape, 16, x.device)
    with torch.no_grad(), lf_dense.use_backend("reference"):
        wanted = block(x, hw_shape, table)
        with exporting("layers"):
            assert block.operators(x).__name__ == "lf_dense.backends.layers"
            got = block(x, hw_shape, table)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_nodes_are_for_float32_alone():
    block = Block(32, 2, lf_dense.LaplacianAttention(32, 2)).double().eval()
    with torch.no_grad(), exporting("layers"):
        assert block.operators(torch.randn(1, 6, 32, dtype=torch.float64)) is None


def test_a_file_says_nothing_of_the_machine_that_made_it(standard, operator):
    for _, graph in (standard, operator):
        content = graph.SerializeToString()
        assert str(ROOT).encode() not in content
        assert b".py" not in content


@pytest.mark.parametrize("form", ["standard", "operator"])
def test_a_torch_graph_is_the_module(form):
    if form == "operator" and native.library_obstacle("cpu"):
        pytest.skip(f"no native operators: {native.library_obstacle('cpu')}")
    model = Model()
    program = graphs.torch_graph(Backbone(model), form, 3, None)
    # Its own native operators, and none that stand for nodes.
    ours = {str(node.target) for node in program.graph.nodes if "lf_dense" in str(node.target)}
    names = ("attention_block", "norm_to_map")
    assert ours == ({f"lf_dense.{name}.default" for name in names} if form == "operator" else set())
    for shape in ((2, 3, 96, 64), (1, 3, 161, 131)):
        image = torch.randn(shape)
        with torch.no_grad():
            for out, wanted in zip(program.module()(image), model.backbone(image)):
                torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


def test_the_legacy_exporter_is_refused(tmp_path):
    """It would write a file whose values are NaN, without a word."""
    with pytest.raises(RuntimeError, match="legacy ONNX exporter writes a wrong file"):
        torch.onnx.export(
            Model().backbone, (torch.randn(1, 3, 64, 64),), str(tmp_path / "wrong.onnx"), dynamo=False
        )
    assert not (tmp_path / "wrong.onnx").exists()


def test_tracing_without_an_export_goes_on_working():
    backbone = Model().backbone
    image = torch.randn(1, 3, 64, 64)
    traced = torch.jit.trace(backbone, image, check_trace=False)
    for out, wanted in zip(traced(image), backbone(image)):
        torch.testing.assert_close(out, wanted)
