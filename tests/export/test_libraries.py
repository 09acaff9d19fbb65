"""Our operators in onnxruntime and OpenVINO, against plain PyTorch in float64."""

import ctypes
import itertools
import re
import runpy
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch

from lf_dense import laplacian_attention
from lf_dense.backends import layers  # noqa: F401  (its operators are torch.ops.lf_dense_export's)
from lf_dense.errors import UsageError
from lf_dense.export import libraries
from lf_dense.export.libraries import operator_library, register_onnxruntime, register_openvino
from support import ROOT

onnx = pytest.importorskip("onnx")
ATTRIBUTES = {"scale": 4.0, "iters": 10, "eps": 1e-2, "tau": 1e-2}
RUNTIMES = ("onnxruntime", "openvino")
NAMES = ("q", "k", "v", "landmarks")
TYPES = {torch.float32: onnx.TensorProto.FLOAT, torch.float16: onnx.TensorProto.FLOAT16}
MANY = 321 * 259
KEPT = []


@pytest.fixture(params=RUNTIMES)
def runtime(request):
    return needs(request.param)


# By their parameters the runtimes are in the tests' names, for tools/sanitize.py to choose from.
@pytest.fixture(params=["onnxruntime"])
def onnxruntime(request):
    return pytest.importorskip(needs(request.param))


@pytest.fixture(params=["openvino"])
def openvino(request):
    return pytest.importorskip(needs(request.param))


def needs(runtime):
    """Skip where there is no such runtime, or nothing to build its library with."""
    if find_spec(runtime) is None:
        pytest.skip(f"{runtime} is not installed")
    try:
        operator_library(runtime)
    except UsageError as error:
        why = cannot_build(runtime)
        if why is None:
            pytest.fail(f"what {runtime}'s library is built with is there, and the library is not: {error}")
        pytest.skip(f"{runtime}'s library was not built: {why}")
    return runtime


def cannot_build(runtime):
    """Why setup.py would not build the library here; None where it would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **unused: None)
        setup = runpy.run_path(str(ROOT / "setup.py"))
    if setup["flag"]("LF_DENSE_NO_NATIVE"):
        return "LF_DENSE_NO_NATIVE is set"
    try:
        setup["find_compiler"]()
        setup["find_ninja"]()
        setup["find_onnxruntime"]() if runtime == "onnxruntime" else setup["find_openvino"](True)
    except setup["CannotBuild"] as why:
        return str(why)
    return None


def make_model(path, dtype=torch.float32, version=1, **attributes):
    """A graph of the node alone, for any sizes."""
    helper, tokens, points = onnx.helper, ["b", "n", "heads", "d"], ["b", "heads", "m", "d"]
    attributes = {**ATTRIBUTES, **attributes}
    attributes = {name: value for name, value in attributes.items() if value is not None}
    node = helper.make_node("LaplacianAttention", NAMES, ["out"], domain="lf_dense", **attributes)
    shapes = dict.fromkeys("qkv", tokens) | {"landmarks": points}
    inputs = [helper.make_tensor_value_info(name, TYPES[dtype], shape) for name, shape in shapes.items()]
    output = helper.make_tensor_value_info("out", TYPES[dtype], tokens)
    graph = helper.make_graph([node], "attention", inputs, [output])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("lf_dense", version)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def make_cast_model(path):
    """The node in bfloat16, which numpy does not have: the graph casts before and behind it."""
    model = onnx.load(make_model(path))
    cast, (node,) = onnx.helper.make_node, list(model.graph.node)
    halves = [cast("Cast", [name], [f"{name}_half"], to=onnx.TensorProto.BFLOAT16) for name in NAMES]
    node.input[:], node.output[:] = [f"{name}_half" for name in NAMES], ["out_half"]
    back = cast("Cast", ["out_half"], ["out"], to=onnx.TensorProto.FLOAT)
    model.graph.ClearField("node")
    model.graph.node.extend([*halves, node, back])
    onnx.save(model, path)
    return path


def session(path, threads=2):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    register_onnxruntime(options)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def new_core():
    import openvino

    core = openvino.Core()
    # A core that goes takes back the memory on which its thread handles signals (runtime._openvino_core).
    KEPT.append(core)
    register_openvino(core)
    return core


def load(runtime, path):
    """The model as a function of numpy arrays."""
    if runtime == "onnxruntime":
        opened = session(path)
        return lambda *arrays: opened.run(None, dict(zip(NAMES, arrays)))[0]
    compiled = new_core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    request = compiled.create_infer_request()
    return lambda *arrays: infer(request, arrays)


def infer(request, arrays):
    """By a request of its own: where a model itself was called, OpenVINO overwrites those inputs later."""
    return request.infer(dict(zip(NAMES, arrays)))[0].copy()


def make_arrays(n, d=20, m=9, batch=1, heads=2, dtype=torch.float32):
    """Tokens so far apart that no rounding is amplified: on closer ones either error is a matter of luck."""
    generator = torch.Generator().manual_seed(n)
    tokens = [torch.randn(batch, n, heads, d, generator=generator) * 2 for _ in range(3)]
    landmarks = torch.randn(batch, heads, m, d, generator=generator) * 2
    return [x.to(dtype).numpy() for x in (*tokens, landmarks)]


def reference(arrays, dtype):
    q, k, v, landmarks = (torch.from_numpy(x).to(dtype) for x in arrays)
    out = laplacian_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), landmarks, backend="reference"
    )
    return out.transpose(1, 2)


def check(got, arrays):
    """The errors are at most twice those of plain PyTorch at that dtype."""
    exact, given = reference(arrays, torch.float64), torch.from_numpy(got)
    plain = reference(arrays, torch.float32).to(given.dtype)
    floor = 4 * torch.finfo(given.dtype).eps * exact.abs().max()
    assert given.shape == exact.shape
    assert (given.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + floor


def refusal(run, *arguments):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        run(*arguments)
    return " ".join(str(caught.value).split())


def test_the_node_rounds_like_plain_pytorch_at_every_size(runtime, tmp_path):
    # One session for all: every size is the call's own.
    run = load(runtime, make_model(tmp_path / "node.onnx"))
    for n, d, m in itertools.product((1, 2, 33), (4, 20, 64), (1, 9, 49)):
        for batch, heads in ((2, 1), (1, 2), (2, 5)):
            arrays = make_arrays(n, d, m, batch, heads)
            check(run(*arrays), arrays)


def test_many_tokens(runtime, tmp_path):
    run = load(runtime, make_model(tmp_path / "node.onnx"))
    arrays = make_arrays(MANY, 20, 49)
    check(run(*arrays), arrays)


def test_many_landmarks_are_inverted_by_all_threads(runtime, tmp_path):
    run = load(runtime, make_model(tmp_path / "node.onnx"))
    arrays = make_arrays(300, 16, 196, heads=1)
    check(run(*arrays), arrays)


def test_the_bits_are_those_of_the_native_operator(runtime, tmp_path):
    arrays = make_arrays(3001, 64, 49)
    q, k, v, landmarks = map(torch.from_numpy, arrays)
    try:
        tokens = (x.transpose(1, 2) for x in (q, k, v))
        expected = laplacian_attention(*tokens, landmarks, backend="native").transpose(1, 2)
    except RuntimeError as error:
        pytest.skip(str(error))
    got = load(runtime, make_model(tmp_path / "node.onnx"))(*arrays)
    assert torch.equal(torch.from_numpy(got), expected)


def test_float16(runtime, tmp_path):
    run = load(runtime, make_model(tmp_path / "node.onnx", torch.float16))
    for n in (1, 33, 500):
        arrays = make_arrays(n, dtype=torch.float16)
        got = run(*arrays)
        assert got.dtype == arrays[0].dtype
        check(got, arrays)


def test_bfloat16(runtime, tmp_path):
    run = load(runtime, make_cast_model(tmp_path / "node.onnx"))
    rounded = [torch.from_numpy(x).bfloat16().float().numpy() for x in make_arrays(500)]
    got = torch.from_numpy(run(*rounded))
    exact = reference(rounded, torch.float64)
    assert (got - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_no_images_are_no_error(runtime, tmp_path):
    arrays = make_arrays(33, batch=1)
    assert load(runtime, make_model(tmp_path / "node.onnx"))(*(x[:0] for x in arrays)).shape[0] == 0


def test_the_attributes_are_used(runtime, tmp_path):
    arrays = make_arrays(200)
    q, k, v, landmarks = map(torch.from_numpy, arrays)
    others = {"scale": 2.0, "iters": 8, "eps": 0.1, "tau": 0.5}
    tokens = [x.transpose(1, 2).double() for x in (q, k, v)]
    expected = laplacian_attention(*tokens, landmarks.double(), **others, backend="reference")
    got = load(runtime, make_model(tmp_path / "node.onnx", **others))(*arrays)
    torch.testing.assert_close(torch.from_numpy(got), expected.transpose(1, 2).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"scale": 0.0}, {"scale": float("nan")}, {"iters": 0}, {"eps": 0.0}, {"tau": -1.0}], ids=str
)
def test_attributes_that_cannot_be_are_one_sentence(runtime, wrong, tmp_path):
    said = refusal(load, runtime, make_model(tmp_path / "node.onnx", **wrong))
    assert "scale and eps have to be positive finite numbers, tau 0 or larger and iters at least 1." in said


def test_an_attribute_that_is_missing_is_named(runtime, tmp_path):
    assert "eps" in refusal(load, runtime, make_model(tmp_path / "node.onnx", eps=None))


def shapes_that_do_not_fit():
    q, k, v, landmarks = make_arrays(33)
    tokens = "and has to be (B, N, heads, d) with B = 1, N = 33, heads = 2, d = 20."
    points = "and has to be (B, heads, m, d) with B = 1, heads = 2, d = 20"
    yield f"k has shape (1, 32, 2, 20), {tokens}", (q, k[:, 1:], v, landmarks)
    yield f"v has shape (1, 33, 1, 20), {tokens}", (q, k, v[:, :, 1:], landmarks)
    empty = (x[:, :0] for x in (q, k, v))
    sentence = "q has shape (1, 0, 2, 20), and has to be (B, N, heads, d), where B alone may be 0."
    yield sentence, (*empty, landmarks)
    yield f"landmarks has shape (1, 1, 9, 20), {points}.", (q, k, v, landmarks[:, 1:])
    sentence = f"landmarks has shape (1, 2, 0, 20), {points}, where B alone may be 0."
    yield sentence, (q, k, v, landmarks[:, :, :0])
    yield f"landmarks has shape (1, 2, 9, 19), {points}.", (q, k, v, landmarks[..., 1:])


@pytest.mark.parametrize(("sentence", "arrays"), shapes_that_do_not_fit())
def test_shapes_that_do_not_fit_are_one_sentence(runtime, sentence, arrays, tmp_path):
    run = load(runtime, make_model(tmp_path / "node.onnx"))
    assert f"lf_dense's LaplacianAttention: {sentence}" in refusal(run, *arrays)
    # The session lives on.
    right = make_arrays(33)
    check(run(*right), right)


def test_the_number_of_threads_does_not_change_the_bits(onnxruntime, tmp_path):
    path, arrays = make_model(tmp_path / "node.onnx"), make_arrays(5000, 64, 49)
    feed = dict(zip(NAMES, arrays))
    one, many = (session(path, threads).run(None, feed)[0] for threads in (1, 5))
    assert (one == many).all()


def test_sessions_are_called_from_several_threads(onnxruntime, tmp_path):
    path = make_model(tmp_path / "node.onnx")
    inputs = [make_arrays(n, 32, 9) for n in (700, 1300, 33, 2000)]
    shared, alone = session(path), session(path, 1)
    expected = [shared.run(None, dict(zip(NAMES, arrays)))[0] for arrays in inputs]

    def run(turn):
        opened = shared if turn % 3 else alone
        got = opened.run(None, dict(zip(NAMES, inputs[turn % 4])))[0]
        return (got == expected[turn % 4]).all()

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(run, range(120)))


def test_infer_requests_run_at_the_same_time(openvino, tmp_path):
    path = str(make_model(tmp_path / "node.onnx"))
    inputs = [make_arrays(n, 32, 9) for n in (700, 1300, 33, 2000)]
    hints = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": 2, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = new_core().compile_model(path, "CPU", hints)
    request = compiled.create_infer_request()
    expected = [infer(request, arrays) for arrays in inputs]
    wrong = []

    def done(request, turn):
        if not (request.get_output_tensor(0).data == expected[turn % 4]).all():
            wrong.append(turn)

    queue = openvino.AsyncInferQueue(compiled, 4)
    queue.set_callback(done)
    for turn in range(120):
        queue.start_async(dict(zip(NAMES, inputs[turn % 4])), turn)
    queue.wait_all()
    assert wrong == []


def test_ir_files_are_read_again(openvino, tmp_path):
    core = new_core()
    openvino.save_model(core.read_model(str(make_model(tmp_path / "node.onnx"))), tmp_path / "node.xml")
    arrays = make_arrays(200, 64, 49)
    check(load("openvino", tmp_path / "node.xml")(*arrays), arrays)


def test_the_operator_is_float32_where_openvino_computes_in_halves(openvino, tmp_path):
    """A product before and one behind the node, which the hint is for."""
    opset, core = openvino.opset13, new_core()
    model = core.read_model(str(make_model(tmp_path / "node.onnx")))
    node = next(op for op in model.get_ops() if op.get_type_name() == "LaplacianAttention")
    weight = opset.constant(torch.eye(20).numpy())
    before = opset.matmul(node.input_value(0), weight, False, False)
    node.input(0).replace_source_output(before.output(0))
    behind = opset.matmul(node.output(0), weight, False, False)
    model = openvino.Model([behind.output(0)], model.get_parameters(), "products")
    arrays = make_arrays(200)
    exact = reference(arrays, torch.float64)
    for hint, allowed in (("f32", 1e-5), ("bf16", 2e-2), ("f16", 1e-2)):
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": hint})
        got = torch.from_numpy(infer(compiled.create_infer_request(), arrays))
        assert (got - exact).abs().max() <= allowed * exact.abs().max(), hint
        operations = {
            op.get_rt_info()["originalLayersNames"].astype(str): op.get_rt_info()
            for op in compiled.get_runtime_model().get_ops()
        }
        (own,) = [info for name, info in operations.items() if "out" in name.split(",")]
        assert own["runtimePrecision"].astype(str) == "f32", hint


def test_shapes_that_are_known_are_checked_when_the_model_is_read(openvino, tmp_path):
    model = new_core().read_model(str(make_model(tmp_path / "node.onnx")))
    shapes = {"q": [1, 33, 2, 20], "k": [1, 33, 2, 20], "v": [1, 33, 2, 20], "landmarks": [1, 3, 9, 20]}
    assert "landmarks has shape (1, 3, 9, 20), and has to be" in refusal(model.reshape, shapes)


# The layers around the attention


def layer_shapes(name, batch=2, height=5, width=7, channels=24, heads=2, hidden=40, turns=True):
    """The shapes of a node's inputs, in order."""
    norm = {"norm_weight": (channels,), "norm_bias": (channels,)}
    maps, pairs = (batch, height, width, channels), channels // heads // 4 if turns else 0

    def layer(name, rows, *columns):
        return {f"{name}_weight": (rows, *columns), f"{name}_bias": (rows,)}

    if name == "ProjectHeads":
        layers = {key: shape for part in "qkv" for key, shape in layer(part, channels, channels).items()}
        return {"x": maps, **norm, **layers, "rows": (2, pairs, height), "columns": (2, pairs, width)}
    if name == "MergeHeads":
        layers = {**layer("conv", channels, 1, 3, 3), **layer("proj", channels, channels)}
        return {"x": maps, "attended": maps, "values": maps, **layers}
    layers = {
        **layer("fc1", hidden, channels),
        **layer("conv", hidden, 1, 3, 3),
        **layer("fc2", channels, hidden),
    }
    return {"x": maps, **norm, **layers}


def layer_arrays(name, **sizes):
    generator = torch.Generator().manual_seed(0)
    shapes = layer_shapes(name, **sizes)
    return {key: (torch.randn(shape, generator=generator) / 3).numpy() for key, shape in shapes.items()}


def operator_of(name):
    """The node in plain PyTorch, of which it is exported."""
    return getattr(torch.ops.lf_dense_export, re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()).default


def arguments_of(operator, arrays, dtype, eps=1e-6):
    return [
        torch.from_numpy(arrays[argument.name]).to(dtype) if argument.name in arrays else eps
        for argument in operator._schema.arguments
    ]


def make_layer_model(path, name, shapes=None, dtype=onnx.TensorProto.FLOAT, **attributes):
    """A graph of the node alone; without shapes it takes any sizes, and ranks that are the node's."""
    helper, known = onnx.helper, layer_shapes(name)
    shapes = shapes or {key: [None] * len(shape) for key, shape in known.items()}
    outputs = ["q", "k", "v"] if name == "ProjectHeads" else ["out"]
    attributes = {} if name == "MergeHeads" else {"eps": 1e-6, **attributes}
    node = helper.make_node(name, list(shapes), outputs, domain="lf_dense", **attributes)
    inputs = [helper.make_tensor_value_info(key, dtype, shape) for key, shape in shapes.items()]
    ends = [helper.make_tensor_value_info(key, dtype, None) for key in outputs]
    graph = helper.make_graph([node], "layer", inputs, ends)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("lf_dense", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def load_layer(runtime, path, hint="f32"):
    """The model as a function of its inputs by name."""
    if runtime == "onnxruntime":
        opened = session(path)
        return lambda arrays: opened.run(None, arrays)
    compiled = new_core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": hint})
    request = compiled.create_infer_request()

    def run(arrays):
        results = request.infer(arrays)
        return [results[output].copy() for output in compiled.outputs]

    return run


def check_layer(name, got, arrays):
    """The errors are at most twice those of plain PyTorch in float32."""
    operator = operator_of(name)

    def plain(dtype):
        results = operator(*arguments_of(operator, arrays, dtype))
        return [results] if isinstance(results, torch.Tensor) else results

    for found, exact, rounded in zip(got, plain(torch.float64), plain(torch.float32), strict=True):
        assert found.shape == exact.shape
        floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        error = (torch.from_numpy(found).double() - exact).abs().max()
        assert error <= 2 * (rounded.double() - exact).abs().max() + floor


@pytest.fixture(params=["ProjectHeads", "MergeHeads", "ConvFFN"])
def layer(request):
    return request.param


def test_fakes_are_of_what_the_operators_return(layer):
    for sizes in ({}, {"height": 1, "width": 1}, {"turns": False}):
        operator = operator_of(layer)
        arguments = arguments_of(operator, layer_arrays(layer, **sizes), torch.float32)
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_layers_round_like_plain_pytorch_at_every_size(runtime, layer, tmp_path):
    run = load_layer(runtime, make_layer_model(tmp_path / "node.onnx", layer))
    for batch, height, width in ((2, 5, 7), (1, 1, 1), (1, 33, 2), (2, 31, 130), (1, 8, 8)):
        for channels, heads, hidden in ((24, 2, 40), (64, 1, 512)):
            sizes = {"channels": channels, "heads": heads, "hidden": hidden}
            arrays = layer_arrays(layer, batch=batch, height=height, width=width, **sizes)
            check_layer(layer, run(arrays), arrays)


def test_heads_are_left_unturned_without_tables(runtime, tmp_path):
    run = load_layer(runtime, make_layer_model(tmp_path / "node.onnx", "ProjectHeads"))
    for turns in (False, True, False):
        arrays = layer_arrays("ProjectHeads", turns=turns)
        check_layer("ProjectHeads", run(arrays), arrays)


def test_layers_take_no_images(runtime, layer, tmp_path):
    run = load_layer(runtime, make_layer_model(tmp_path / "node.onnx", layer))
    assert all(len(out) == 0 for out in run(layer_arrays(layer, batch=0)))


def test_the_norm_adds_eps(runtime, tmp_path):
    arrays, operator = layer_arrays("ConvFFN"), operator_of("ConvFFN")
    (got,) = load_layer(runtime, make_layer_model(tmp_path / "node.onnx", "ConvFFN", eps=0.5))(arrays)
    expected = operator(*arguments_of(operator, arrays, torch.float64, eps=0.5))
    torch.testing.assert_close(torch.from_numpy(got).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ProjectHeads", "ConvFFN"])
def test_an_eps_that_cannot_be_is_one_sentence(runtime, name, tmp_path):
    said = refusal(load_layer, runtime, make_layer_model(tmp_path / "node.onnx", name, eps=0.0))
    assert f"lf_dense's {name}: eps is 0.000000, and has to be a positive finite number." in said


def layers_that_do_not_fit():
    """Inputs in place of those that fit, and the sentence."""
    for name, key, shape, sentence in (
        ("ProjectHeads", "q_weight", (24, 23), "(24, 23), and has to be (C, C) with C = 24."),
        ("ProjectHeads", "norm_bias", (23,), "(23), and has to be (C) with C = 24."),
        ("ProjectHeads", "rows", (2, 3, 6), "(2, 3, 6), and has to be (2, pairs, H) with H = 5."),
        (
            "ProjectHeads",
            "columns",
            (2, 2, 7),
            "(2, 2, 7), and has to be (2, pairs, W) with pairs = 3, W = 7.",
        ),
        (
            "ProjectHeads",
            "x",
            (2, 0, 7, 24),
            "(2, 0, 7, 24), and has to be (B, H, W, C), where B alone may be 0.",
        ),
        (
            "MergeHeads",
            "values",
            (1, 5, 7, 24),
            "(1, 5, 7, 24), and has to be (B, H, W, C) with B = 2, H = 5, W = 7, C = 24.",
        ),
        (
            "MergeHeads",
            "conv_weight",
            (24, 1, 5, 5),
            "(24, 1, 5, 5), and has to be (C, 1, 3, 3) with C = 24.",
        ),
        ("ConvFFN", "x", (2, 5, 0, 24), "(2, 5, 0, 24), and has to be (B, H, W, C), where B alone may be 0."),
        ("ConvFFN", "fc1_weight", (40, 12), "(40, 12), and has to be (hidden, C) with C = 24."),
        ("ConvFFN", "fc2_weight", (24, 39), "(24, 39), and has to be (C, hidden) with C = 24, hidden = 40."),
    ):
        yield name, {key: shape}, f"{key} has shape {sentence}"
    yield (
        "ProjectHeads",
        {"rows": (2, 5, 5), "columns": (2, 5, 7)},
        "the tables turn 5 pairs with the row and as many with the column, and 24 channels are no whole "
        "number of heads of 20.",
    )


@pytest.mark.parametrize(("name", "wrong", "sentence"), layers_that_do_not_fit())
def test_layers_that_do_not_fit_are_one_sentence(runtime, name, wrong, sentence, tmp_path):
    run = load_layer(runtime, make_layer_model(tmp_path / "node.onnx", name))
    right = layer_arrays(name)
    others = {key: torch.zeros(shape).numpy() for key, shape in wrong.items()}
    assert f"lf_dense's {name}: {sentence}" in refusal(run, right | others)
    check_layer(name, run(right), right)


@pytest.mark.parametrize(("name", "wrong", "sentence"), layers_that_do_not_fit())
def test_known_sizes_of_layers_are_checked_when_the_model_is_read(openvino, name, wrong, sentence, tmp_path):
    path = make_layer_model(tmp_path / "node.onnx", name, layer_shapes(name) | wrong)
    assert f"lf_dense's {name}: {sentence}" in refusal(load_layer, "openvino", path)


def test_another_rank_is_one_sentence(runtime, layer, tmp_path):
    shapes = layer_shapes(layer) | {"x": (24,)}
    path = make_layer_model(tmp_path / "node.onnx", layer, shapes)
    arrays = {key: torch.zeros(shape).numpy() for key, shape in shapes.items()}
    said = refusal(lambda: load_layer(runtime, path)(arrays))
    assert f"lf_dense's {layer}: x has shape (24), and has to be (B, " in said


def test_layers_are_for_float32(runtime, layer, tmp_path):
    path = make_layer_model(tmp_path / "node.onnx", layer, dtype=onnx.TensorProto.FLOAT16)
    said = refusal(load_layer, runtime, path)
    # onnxruntime knows the dtypes, and says so itself.
    own = "Type 'tensor(float16)' of input parameter (x)"
    ours = f"lf_dense's {layer}: the inputs are f16, and have to be f32."
    assert (own if runtime == "onnxruntime" else ours) in said


def test_an_input_that_is_missing_is_one_sentence(openvino, tmp_path):
    shapes = dict(list(layer_shapes("MergeHeads").items())[:-1])
    said = refusal(load_layer, "openvino", make_layer_model(tmp_path / "node.onnx", "MergeHeads", shapes))
    assert (
        "lf_dense's MergeHeads: it takes x, attended, values, conv_weight, conv_bias, proj_weight, proj_bias,"
        " and here are 6 inputs."
    ) in said


def test_sizes_pass_through_the_nodes_by_name(onnxruntime, layer, tmp_path):
    named = {key: ["b", "h", "w", 24] for key in ("x", "attended", "values")}
    named |= {"rows": [2, 3, "h"], "columns": [2, 3, "w"]}
    named = {key: shape for key, shape in named.items() if key in layer_shapes(layer)}
    wanted = [named["x"]] * (3 if layer == "ProjectHeads" else 1)
    path = make_layer_model(tmp_path / "node.onnx", layer, layer_shapes(layer) | named)
    assert [output.shape for output in session(path).get_outputs()] == wanted


def test_sizes_pass_through_the_nodes_as_ranges(openvino, layer, tmp_path):
    model = new_core().read_model(str(make_layer_model(tmp_path / "node.onnx", layer)))
    x = [[1, 4], -1, [2, 9], 24]
    shapes = layer_shapes(layer)
    ranges = dict.fromkeys(("x", "attended", "values"), x) | {"rows": [2, 3, -1], "columns": [2, 3, [2, 9]]}
    shapes |= {key: shape for key, shape in ranges.items() if key in shapes}
    model.reshape({key: openvino.PartialShape(list(shape)) for key, shape in shapes.items()})
    wanted = openvino.PartialShape(x)
    assert [output.partial_shape for output in model.outputs] == [wanted] * len(model.outputs)


def test_layers_in_ir_files_are_read_again(openvino, layer, tmp_path):
    model = new_core().read_model(str(make_layer_model(tmp_path / "node.onnx", layer)))
    openvino.save_model(model, tmp_path / "node.xml")
    arrays = layer_arrays(layer)
    check_layer(layer, load_layer("openvino", tmp_path / "node.xml")(arrays), arrays)


@pytest.mark.parametrize("hint", ["bf16", "f16"])
def test_layers_are_float32_where_openvino_computes_in_halves(openvino, layer, hint, tmp_path):
    path, arrays = make_layer_model(tmp_path / "node.onnx", layer), layer_arrays(layer)
    check_layer(layer, load_layer("openvino", path, hint)(arrays), arrays)


def test_the_number_of_threads_does_not_change_the_layers_bits(onnxruntime, layer, tmp_path):
    path, arrays = make_layer_model(tmp_path / "node.onnx", layer), layer_arrays(layer, height=70, width=130)
    for one, many in zip(*(session(path, threads).run(None, arrays) for threads in (1, 5))):
        assert (one == many).all()


# Libraries that are not there, or not for this runtime


def test_a_runtime_that_we_have_no_operator_for_is_one_sentence():
    with pytest.raises(UsageError, match=r"^the runtime 'tensorrt' has no operator library: use one of "):
        operator_library("tensorrt")


@pytest.mark.parametrize("runtime_name", RUNTIMES)
def test_a_library_that_is_missing_is_one_sentence(runtime_name, tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "_FOLDER", tmp_path)
    with pytest.raises(
        UsageError, match=rf"^lf_dense's operators for {runtime_name} were not built, since .*\.$"
    ):
        operator_library(runtime_name)


def test_a_library_that_does_not_load_is_one_sentence(runtime, tmp_path, monkeypatch):
    broken = tmp_path / f"_operators_{runtime}.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(libraries, "_FOLDER", tmp_path)
    run = session if runtime == "onnxruntime" else lambda path: new_core()
    with pytest.raises(UsageError, match=rf"^\w+ does not take {broken.name}: .*\.$") as caught:
        run(tmp_path / "node.onnx")
    assert "\n" not in str(caught.value)


def test_a_library_for_another_openvino_is_one_sentence(openvino, tmp_path, monkeypatch):
    other = operator_library("openvino").read_bytes()
    other = re.sub(rb"(operators for OpenVINO) [\d.]+", rb"\1 2019.1.0", other)
    (tmp_path / "_operators_openvino.so").write_bytes(other)
    monkeypatch.setattr(libraries, "_FOLDER", tmp_path)
    said = r"^lf_dense's operators were built for OpenVINO 2019\.1\.0, and this is [\d.]+: install lf_dense "
    with pytest.raises(UsageError, match=said):
        new_core()


def test_an_onnxruntime_that_is_too_old_is_one_sentence(onnxruntime, monkeypatch):
    """A runtime of our own making: its interface has one function and is of version 16."""
    create_status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    get_version = ctypes.CFUNCTYPE(ctypes.c_char_p)
    said = []

    class Api(ctypes.Structure):
        _fields_ = (("create_status", create_status),)

    class Base(ctypes.Structure):
        _fields_ = (("get_api", get_api), ("get_version", get_version))

    def say(code, text):
        said.append(text.decode())
        return 1

    api = Api(create_status(say))
    base = Base(
        get_api(lambda version: ctypes.addressof(api) if version <= 16 else None),
        get_version(lambda: b"1.16.3"),
    )
    register = ctypes.CDLL(str(operator_library("onnxruntime"))).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.POINTER(Base)]
    assert register(None, base) == 1
    assert said == [
        "lf_dense's operators need onnxruntime 1.17 or newer, and this is 1.16.3: upgrade onnxruntime."
    ]

    def refuse(path):
        raise RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : {said[0]}")

    with pytest.raises(
        UsageError, match=r"^onnxruntime does not take .*1\.17 or newer.*upgrade onnxruntime\.$"
    ):
        register_onnxruntime(SimpleNamespace(register_custom_ops_library=refuse))


def test_the_libraries_need_no_torch(runtime):
    content = operator_library(runtime).read_bytes()
    assert b"aoti_torch" not in content
    assert b"libtorch" not in content
