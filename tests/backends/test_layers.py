"""The operators of whole layers: against float64 written out tap by tap, and when a block uses them."""

from __future__ import annotations

import copy
import functools
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from lf_dense import LaplacianAttention, LaplacianFormer, use_backend
from lf_dense.attention import RotaryTable
from lf_dense.backends import exporting, native
from lf_dense.backends.reference import compute_dtype
from lf_dense.blocks import SMALL_MAP, Block, ConvFFN, PatchEmbed
from support import instruction_sets
from support.processes import elsewhere

obstacle = native.library_obstacle("cpu")
pytestmark = pytest.mark.skipif(obstacle is not None, reason=str(obstacle))
CALLS = ("project_heads", "pool_tokens", "merge_heads", "conv_ffn")
WHOLE = ("attention_block", "norm_to_map")
# Odd sizes, one token, one row, maps whose hidden channels are cut (up to 512 tokens) or whose rows, maps cut
# into strips (more than 96 columns) and into many pieces.
MAPS = [(1, 1), (1, 7), (9, 1), (5, 7), (16, 32), (19, 27), (13, 96), (3, 97), (40, 130), (2, 257)]
if instruction_sets.is_another():
    MAPS = [(1, 7), (5, 7), (16, 32), (19, 27), (3, 97)]


@pytest.fixture
def calls(monkeypatch):
    """Which of the operators were called."""
    made = []

    def note(name, call):
        def noted(*args, **options):
            made.append(name)
            return call(*args, **options)

        monkeypatch.setattr(native, name, noted)

    for name in (*CALLS, *WHOLE):
        note(name, getattr(native, name))
    return made


def exact(layer: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().double().numpy() for name, value in layer.named_parameters()}


def exact_convolution(maps: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Depthwise 3 x 3 of ``(B, H, W, C)``, zeros around."""
    height, width = maps.shape[1:3]
    wide = np.pad(maps, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [wide[:, y : y + height, x : x + width] * weight[:, 0, y, x] for y in range(3) for x in range(3)]
    return sum(taps) + bias


def exact_embedding(layer: PatchEmbed, maps: np.ndarray) -> np.ndarray:
    """A strided convolution of ``(B, C, H, W)`` tap by tap, and the norm of its tokens."""
    w, (size, stride) = exact(layer), (layer.proj.kernel_size[0], layer.proj.stride[0])
    height, width = maps.shape[2:]
    wide = np.pad(maps, ((0, 0), (0, 0), (size // 2, size // 2), (size // 2, size // 2)))
    tokens = w["proj.bias"]
    for y in range(size):
        for x in range(size):
            near = wide[:, :, y : y + height : stride, x : x + width : stride]
            tokens = tokens + np.einsum("bchw,oc->bhwo", near, w["proj.weight"][:, :, y, x])
    return exact_norm(layer.norm, tokens.reshape(maps.shape[0], -1, tokens.shape[-1]))


def exact_ffn(layer: ConvFFN, x: np.ndarray, hw_shape: tuple[int, int]) -> np.ndarray:
    w = exact(layer)
    hidden = x @ w["fc1.weight"].T + w["fc1.bias"]
    maps = hidden.reshape(x.shape[0], *hw_shape, -1)
    hidden = exact_convolution(maps, w["dwconv.weight"], w["dwconv.bias"]).reshape(hidden.shape)
    erf = torch.erf(torch.from_numpy(hidden) / 2**0.5).numpy()
    return (hidden * (1 + erf) / 2) @ w["fc2.weight"].T + w["fc2.bias"]


def exact_pooling(tokens: np.ndarray, hw_shape: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Means of the cells, written out cell by cell."""
    (height, width), maps = hw_shape, tokens.reshape(tokens.shape[0], *hw_shape, -1)
    rows, columns = min(grid[0], height), min(grid[1], width)
    cells = []
    for i in range(rows):
        for j in range(columns):
            inside = maps[
                :,
                i * height // rows : -(-(i + 1) * height // rows),
                j * width // columns : -(-(j + 1) * width // columns),
            ]
            cells.append(inside.mean((1, 2)))
    return np.stack(cells, 1)


def exact_heads(layer: LaplacianAttention, tokens: np.ndarray, hw_shape: tuple[int, int]) -> list[np.ndarray]:
    w, table = exact(layer), RotaryTable(hw_shape, layer.head_dims, torch.device("cpu"))
    cos, sin = (part.double().numpy() for part in table.whole())
    results = []
    for name in "qkv":
        heads = tokens @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)
        heads = heads.reshape(*tokens.shape[:2], layer.num_heads, layer.head_dims)
        if name != "v" and layer.rotary:
            first, second = np.split(heads, 2, axis=-1)
            heads = heads * cos + np.concatenate([second, first], -1) * sin
        results.append(heads.reshape(tokens.shape))
    return results


def error(found: torch.Tensor, wanted: np.ndarray) -> float:
    return float(np.abs(found.double().numpy() - wanted).max() / np.abs(wanted).max())


def spread(layer: nn.Module) -> nn.Module:
    """Weights as large as trained ones, biases included."""
    for weight in layer.parameters():
        nn.init.normal_(weight, std=weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.3)
    return layer.eval()


def holds(found: torch.Tensor, plain: torch.Tensor, wanted: np.ndarray) -> None:
    """The error is at most twice plain PyTorch's; an ulp covers results that happen to be exact there."""
    allowed = 2 * error(plain, wanted) + 2 * torch.finfo(found.dtype).eps
    assert error(found, wanted) <= allowed


def exact_norm(layer: nn.LayerNorm, x: np.ndarray) -> np.ndarray:
    w = exact(layer)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + layer.eps) * w["weight"] + w["bias"]


def build_block(channels: int, heads: int, ratio: int, **options: object) -> Block:
    return spread(Block(channels, ratio, LaplacianAttention(channels, heads, **options), drop_path_rate=0.5))


def watch_attention(block: Block, monkeypatch, attended: torch.Tensor) -> list[list[torch.Tensor]]:
    """Put a constant in the attention's place, and note queries, keys, values and landmarks."""
    given = []

    def attend(q, k, v, hw_shape):
        landmarks = block.attn.pool_landmarks(q, hw_shape)
        given.append([tensor.flatten(2) for tensor in (q, k, v, landmarks.transpose(1, 2))])
        return attended.to(q.dtype)

    monkeypatch.setattr(block.attn, "attend", attend)
    return given


def taken_apart(block: Block) -> Block:
    """The same block, calling its operators one by one: somebody watches its attention."""
    block = copy.deepcopy(block)
    block.attn.attend = functools.partial(LaplacianAttention.attend, block.attn)
    return block


SETTINGS = [
    (64, 1, 8, {}),
    (40, 2, 3, {"qkv_bias": False}),
    (320, 5, 4, {}),
    (8, 2, 1, {"rotary": False}),
    (36, 1, 7, {}),
    (4, 1, 2, {"landmark_grid": (3, 5)}),
]


def check_block(block: Block, x: torch.Tensor, hw_shape: tuple[int, int], calls: list, monkeypatch) -> None:
    """The operators against the literal computation of what the weights say, beside plain PyTorch."""
    heads, head_dims = block.attn.num_heads, block.attn.head_dims
    table = RotaryTable(hw_shape, head_dims, x.device)
    attended = torch.randn(*x.shape[:2], heads, head_dims).to(x.dtype)
    given = watch_attention(block, monkeypatch, attended)
    found = block(x, hw_shape, table)
    assert calls == list(CALLS)
    with use_backend("reference"):
        plain = block(x, hw_shape, table)
    assert found.dtype == plain.dtype
    tokens = x.double().numpy()
    heads_wanted = exact_heads(block.attn, exact_norm(block.norm1, tokens), hw_shape)
    landmarks = exact_pooling(heads_wanted[0], hw_shape, block.attn.landmark_grid)
    for ours, theirs, wanted in zip(*given, [*heads_wanted, landmarks]):
        assert ours.dtype == theirs.dtype
        holds(ours, theirs, wanted)
    w = exact(block.attn)
    values = heads_wanted[2].reshape(x.shape[0], *hw_shape, -1)
    local = exact_convolution(values, w["dwconv.weight"], w["dwconv.bias"]).reshape(x.shape)
    tokens = (
        tokens + (local + attended.double().numpy().reshape(x.shape)) @ w["proj.weight"].T + w["proj.bias"]
    )
    holds(found, plain, tokens + exact_ffn(block.ffn, exact_norm(block.norm2, tokens), hw_shape))
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(block(strided, hw_shape, table), found)


# The largest map beside the widest layers would take as long as all others.
CASES = [(hw, each) for hw in MAPS for each in SETTINGS if hw != (40, 130) or each[0] != 320]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("hw_shape", "settings"), CASES, ids=str)
@torch.no_grad()
def test_a_block_is_the_literal_computation(hw_shape, settings, dtype, calls, monkeypatch):
    channels, heads, ratio, options = settings
    block = build_block(channels, heads, ratio, **options).to(dtype)
    x = torch.randn(2, hw_shape[0] * hw_shape[1], channels).to(dtype)
    check_block(block, x, hw_shape, calls, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hw_shape", [(5, 7), (19, 27), (3, 97)], ids=str)
@torch.no_grad()
def test_the_literal_computation_under_autocast(hw_shape, dtype, calls, monkeypatch):
    """Tokens as wide as the residual is, weights float32, products bfloat16."""
    block, x = build_block(64, 2, 4), torch.randn(2, hw_shape[0] * hw_shape[1], 64).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        check_block(block, x, hw_shape, calls, monkeypatch)


@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_one_call_is_its_operators_one_by_one(settings, dtype, cast, calls):
    channels, heads, ratio, options = settings
    block = build_block(channels, heads, ratio, **options).to(dtype)
    apart = taken_apart(block)
    with torch.autocast("cpu", cast or torch.bfloat16, enabled=cast is not None and dtype != torch.float64):
        for hw_shape in [(1, 1), (9, 11), (24, 23)]:
            x = torch.randn(2, hw_shape[0] * hw_shape[1], channels).to(dtype)
            assert torch.equal(run(block, x, hw_shape), run(apart, x, hw_shape))
    assert calls == ["attention_block", *CALLS] * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [2, 36, 320])
@torch.no_grad()
def test_a_stages_norm_writes_its_map(channels, dtype):
    norm = spread(nn.LayerNorm(channels)).to(dtype)
    for hw_shape in [(1, 1), (5, 13), (7, 64), (31, 9)]:
        x = torch.randn(2, *hw_shape, channels).to(dtype)
        tokens, maps = native.norm_to_map(x, norm, True)
        holds(tokens, norm(x), exact_norm(norm, x.double().numpy()))
        assert maps.is_contiguous()
        assert torch.equal(maps, tokens.permute(0, 3, 1, 2))
        alone, nothing = native.norm_to_map(x, norm, False)
        assert torch.equal(alone, tokens)
        assert nothing.numel() == 0


@torch.no_grad()
def test_the_backbones_maps_come_from_that_norm(calls):
    model, image = LaplacianFormer(arch="tiny").eval(), torch.randn(1, 3, 64, 96)
    maps = model(image)
    assert calls == [*["attention_block"] * 2, "norm_to_map"] * 4
    assert all(each.is_contiguous() for each in maps)
    model.out_channels_last = True
    for found, wanted in zip(model(image), maps):
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(found, wanted)
    calls.clear()
    model.stages[1].norm.register_forward_hook(lambda *unused: None)
    model(image)
    assert calls.count("norm_to_map") == 3


def operator_calls(dtype, narrow=None):
    """Every operator with arguments; ``narrow`` is the dtype of the products' weights and of heads."""
    block, narrow = build_block(8, 2, 3), narrow or dtype
    attn, ffn = block.attn, block.ffn
    maps = torch.randn(2, 3, 4, 8).to(dtype)
    heads = [torch.randn(2, 3, 4, 8).to(narrow) for _ in range(2)]
    ops, wide = torch.ops.lf_dense, compute_dtype(dtype)
    axes = [axis.to(wide) for axis in RotaryTable((3, 4), 4, maps.device).axes]

    def vectors(*layers):
        return [weight.detach().to(wide) for layer in layers for weight in (layer.weight, layer.bias)]

    def products(*layers):
        return [
            part
            for layer in layers
            for part in (layer.weight.detach().to(narrow), layer.bias.detach().to(wide))
        ]

    qkv = products(attn.q, attn.k, attn.v)
    merging = (*vectors(attn.dwconv), *products(attn.proj))
    network = (
        *vectors(block.norm2),
        1e-6,
        *products(ffn.fc1),
        *vectors(ffn.dwconv),
        *products(ffn.fc2),
    )
    attention = (2, 2, 3, 4.0, 10, 0.01, 0.1)
    return [
        (ops.project_heads, (maps, *vectors(block.norm1), 1e-6, *qkv, *axes)),
        (ops.pool_tokens, (heads[0], 2, 3)),
        (ops.merge_heads, (maps, *heads, *merging)),
        (ops.conv_ffn, (maps, *network)),
        (
            ops.attention_block,
            (maps, *vectors(block.norm1), 1e-6, *qkv, *axes, *attention, *merging, *network),
        ),
        (ops.norm_to_map, (maps, *vectors(block.norm1), 1e-6, True)),
        (ops.norm_to_map, (maps, *vectors(block.norm1), 1e-6, False)),
    ]


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32,),
        (torch.float64,),
        (torch.bfloat16,),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_opcheck(dtypes):
    for operator, args in operator_calls(*dtypes):
        torch.library.opcheck(operator, args)


def test_a_gradient_is_refused_by_name():
    for operator, args in operator_calls(torch.float32):
        found = operator(args[0].requires_grad_(), *args[1:])
        with pytest.raises(NotImplementedError, match="no gradient"):
            (found[0] if isinstance(found, (tuple, list)) else found).sum().backward()


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.bfloat16,)], ids=str)
@pytest.mark.parametrize("operator", range(6))
def test_wrong_shapes_and_dtypes_are_refused(operator, dtypes):
    call, args = operator_calls(*dtypes)[operator]
    for index, tensor in enumerate(args):
        if not isinstance(tensor, torch.Tensor):
            continue
        wider, halved = torch.cat([tensor, tensor], -1), tensor.half()
        # Pooling takes any map.
        for wrong in [halved] if call is torch.ops.lf_dense.pool_tokens else [wider, halved]:
            with pytest.raises(RuntimeError, match="lf_dense"):
                call(*args[:index], wrong, *args[index + 1 :])


def test_what_does_not_fit_is_refused():
    (_, _), (pool, (maps, *_)), _, (ffn, args), (whole, parts), *_ = operator_calls(torch.float32)
    for heads in (0, 3):
        with pytest.raises(RuntimeError, match=f"{heads} heads do not divide 8 channels"):
            whole(*parts[:12], heads, *parts[13:])
    for grid in [(0, 2), (2, -1)]:
        with pytest.raises(RuntimeError, match="has no cells: it needs at least one row and one column"):
            pool(maps, *grid)
    odd = [tensor[..., :7].contiguous() if torch.is_tensor(tensor) else tensor for tensor in args[:4]]
    weight = torch.randn(24, 7, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="even number of channels, and here are 7"):
        ffn(*odd, weight, *args[5:])


def run(block: Block, x: torch.Tensor, hw_shape: tuple[int, int]) -> torch.Tensor:
    return block(x, hw_shape, RotaryTable(hw_shape, block.attn.head_dims, x.device))


@torch.no_grad()
def are_the_same_bits_on_threads(counts: list[int]) -> bool:
    """Of maps whose hidden channels are cut, and whose rows and columns are, in both families of layers."""
    block, same = build_block(64, 2, 5), True
    for hw_shape in [(17, 23), (70, 150)]:
        x = torch.randn(1, hw_shape[0] * hw_shape[1], 64)
        for layer, tokens in [(block, x), (copy.deepcopy(block).bfloat16(), x.bfloat16())]:
            found = []
            for count in counts:
                torch.set_num_threads(count)
                found.append(run(layer, tokens, hw_shape))
            same = same and all(torch.equal(each, found[0]) for each in found)
    return same


def test_the_same_bits_on_any_number_of_threads_and_from_any_cut():
    assert elsewhere(are_the_same_bits_on_threads, [1, 2, 3, 8])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_nan_stays_in_its_neighbourhood(dtype):
    block = build_block(16, 2, 2).to(dtype)
    x = torch.randn(1, 9, 11, 16).to(dtype)
    for row, column in [(0, 0), (4, 10), (5, 0), (8, 10)]:
        spoilt = x.clone()
        spoilt[0, row, column] = float("nan")
        found = native.conv_ffn(spoilt, block.norm2, block.ffn.fc1, block.ffn.dwconv, block.ffn.fc2)
        near = [
            [y, z]
            for y in range(max(0, row - 1), min(9, row + 2))
            for z in range(max(0, column - 1), min(11, column + 2))
        ]
        assert found[0].isnan().any(-1).nonzero().tolist() == near
        assert found[0].isnan().all(-1).nonzero().tolist() == near


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1.2e-6), (torch.bfloat16, 1e-5)], ids=str)
@torch.no_grad()
def test_gelu_of_large_numbers(dtype, allowed):
    """A network that returns the GELU of its convolution's bias: far left 0, far right the number itself."""
    ends = torch.tensor([-3e38, -1e4, 1e4, 3e38])
    numbers = torch.cat([torch.linspace(-12, 12, 2044), torch.linspace(-5, 5, 2048), ends])
    layer, norm = ConvFFN(4096, 4096, 0.0), nn.LayerNorm(4096)
    for weight in (layer.fc1.weight, layer.fc1.bias, layer.fc2.bias, layer.dwconv.weight):
        weight.zero_()
    layer.fc2.weight.copy_(torch.eye(4096))
    layer.dwconv.bias.copy_(numbers)
    layer, norm, x = layer.to(dtype), norm.to(dtype), torch.zeros(1, 1, 1, 4096, dtype=dtype)
    found = native.conv_ffn(x, norm, layer.fc1, layer.dwconv, layer.fc2).flatten()
    wanted = nn.functional.gelu(layer.dwconv.bias.double())
    relative = max(1e-7, 1.1 * torch.finfo(dtype).eps)
    assert ((found - wanted).abs() <= allowed + relative * wanted.abs()).all()


class Watched(nn.Linear):
    """A layer that is not torch's own."""


class OwnAttention(LaplacianAttention):
    """A layer that is not ours."""


def hooked_deep_inside(block):
    block.ffn.fc1.register_forward_hook(lambda *unused: None)


def hooked(block):
    block.attn.register_forward_pre_hook(lambda *unused: None)


def replaced(block):
    block.ffn.fc2 = Watched(64, 16)


def another_attention(block):
    block.attn = OwnAttention(16, 2)


def given_another_forward(block):
    block.ffn.fc1.forward = nn.Identity()


def pruned(block):
    prune.random_unstructured(block.ffn.fc1, "weight", 0.5)


def dropping(block):
    block.ffn.drop.p = 0.5
    block.train()


def dropping_paths(block):
    block.train()


CHANGES = [
    hooked_deep_inside,
    hooked,
    replaced,
    another_attention,
    given_another_forward,
    pruned,
    dropping,
    dropping_paths,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_layers_that_do_more_than_their_weights_say_run_by_themselves(change, calls):
    block = build_block(16, 2, 4)
    change(block)
    run(block, torch.randn(1, 6, 16), (2, 3))
    assert set(calls) <= {"pool_tokens"}


def test_what_asks_for_a_gradient_trains_in_plain_pytorch(calls):
    block, x = build_block(16, 2, 4), torch.randn(1, 6, 16)
    run(block, x, (2, 3)).sum().backward()
    assert all(weight.grad is not None for weight in block.parameters())
    block.requires_grad_(False)
    assert run(block, x.requires_grad_(), (2, 3)).requires_grad
    assert calls == []
    run(block, x.detach(), (2, 3))
    assert calls == ["attention_block"]


@torch.no_grad()
def test_a_learnt_scale_reaches_the_attention(calls):
    block, x = build_block(16, 2, 4, learn_kernel_scale=True), torch.randn(1, 12, 16)
    found = run(block, x, (3, 4))
    assert calls == list(CALLS)
    with use_backend("reference"):
        torch.testing.assert_close(found, run(block, x, (3, 4)), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_other_dtypes_devices_and_traces_run_by_themselves(calls):
    block, x = build_block(16, 2, 4), torch.randn(1, 6, 16)
    with torch.autocast("cpu", torch.float16):
        run(block, x, (2, 3))
    with torch.autocast("cpu", torch.bfloat16):
        run(block.double(), x.double(), (2, 3))
    run(block.half(), x.half(), (2, 3))
    block.float().requires_grad_(False)
    with use_backend("reference"):
        run(block, x, (2, 3))
    torch.jit.trace(lambda tokens: run(block, tokens, (2, 3)), x, check_trace=False)
    run(block.to("meta"), x.to("meta"), (2, 3))
    assert calls == []


@torch.no_grad()
def test_torch_counts_their_operations(calls):
    block, x = build_block(16, 2, 4), torch.randn(2, 15, 16)

    def count(block, backend):
        with use_backend(backend), FlopCounterMode(display=False) as counter:
            run(block, x, (3, 5))
        return {str(name).split(".")[-1]: n for name, n in counter.get_flop_counts()["Global"].items()}

    whole, native_parts = count(block, "native"), count(taken_apart(block), "native")
    reference = count(block, "reference")
    assert calls == ["attention_block", *CALLS]
    assert whole == {"attention_block": sum(native_parts.values())}
    # Pooling the landmarks and the attention of the reference are products too; the layers alone count.
    layers = sum(native_parts[name] for name in CALLS if name in native_parts)
    assert layers == sum(reference[name] for name in ("addmm", "convolution")) > 0


@torch.no_grad()
def test_one_graph_for_all_sizes(calls):
    """Without gradients torch.compile keeps the operators, in one graph."""
    block = build_block(16, 2, 4)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for hw_shape in [(4, 5), (7, 3), (6, 11)]:
        x = torch.randn(2, hw_shape[0] * hw_shape[1], 16)
        torch.testing.assert_close(compiled(block, x, hw_shape), run(block, x, hw_shape))
    assert "attention_block" in calls


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("hw_shape", [(1, 5), (7, 4), (11, 3)], ids=str)
@torch.no_grad()
def test_strips_give_the_bits_of_the_whole(hw_shape, rows, monkeypatch):
    layer = spread(ConvFFN(16, 64, 0.0))
    x = torch.randn(2, hw_shape[0] * hw_shape[1], 16)
    heights, whole = [], layer.whole

    def note(tokens, shape):
        heights.append(shape[0])
        return whole(tokens, shape)

    monkeypatch.setattr(layer, "whole", note)
    monkeypatch.setattr("lf_dense.blocks.STRIP_BYTES", {"cpu": rows * 2 * hw_shape[1] * 64 * 4})
    found = layer(x, hw_shape)
    assert len(heights) == -(-hw_shape[0] // rows)
    assert max(heights) <= rows + 2
    assert torch.equal(found, whole(x, hw_shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("in_channels", "size", "stride"), [(3, 7, 4), (20, 3, 2)])
@pytest.mark.parametrize("hw_shape", [(1, 1), (8, 9), (13, 14)], ids=str)
@torch.no_grad()
def test_a_small_maps_embedding_is_a_product(hw_shape, in_channels, size, stride, dtype, monkeypatch):
    layer = spread(PatchEmbed(in_channels, 24, size, stride)).to(dtype)
    maps = torch.randn(1, in_channels, *hw_shape).to(dtype).contiguous(memory_format=torch.channels_last)
    patched, unfold = [], torch.nn.functional.unfold
    monkeypatch.setattr(
        torch.nn.functional, "unfold", lambda *args, **kinds: patched.append(1) or unfold(*args, **kinds)
    )
    found, shape = layer(maps)
    assert (len(patched), shape) == (1, tuple(-(-n // stride) for n in hw_shape))
    monkeypatch.setattr("lf_dense.blocks.SMALL_MAP", 0)
    plain, plain_shape = layer(maps)
    assert (len(patched), plain_shape) == (1, shape)
    assert (found.dtype, found.shape) == (plain.dtype, plain.shape)
    holds(found, plain, exact_embedding(layer, maps.double().numpy()))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        convolved = layer(maps)[0]
        monkeypatch.setattr("lf_dense.blocks.SMALL_MAP", SMALL_MAP)
        multiplied = layer(maps)[0]
    assert multiplied.dtype == convolved.dtype
    torch.testing.assert_close(multiplied, convolved, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=str)
@torch.no_grad()
def test_the_norm_of_an_embedding_in_bfloat16_is_the_operators(cast, monkeypatch):
    norms, norm_to_map = [], native.norm_to_map
    monkeypatch.setattr(
        native, "norm_to_map", lambda *args, **kinds: norms.append(1) or norm_to_map(*args, **kinds)
    )
    layer, maps = spread(PatchEmbed(3, 24, 7, 4)), torch.randn(2, 3, 41, 57)
    layer(maps)
    assert not norms
    if cast is None:
        layer, maps = layer.bfloat16(), maps.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=cast is not None):
        found, _ = layer(maps)
        assert len(norms) == 1
        with use_backend("reference"):
            plain, _ = layer(maps)
    assert (len(norms), found.dtype) == (1, plain.dtype)
    holds(found, plain, exact_embedding(layer, maps.double().numpy()))


def test_other_embeddings_are_convolutions(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "unfold", None)
    layer = PatchEmbed(3, 8, 3, 2)
    layer(torch.randn(1, 3, 4, 4))[0].sum().backward()
    assert layer.proj.weight.grad is not None
    with torch.no_grad():
        layer(torch.randn(SMALL_MAP + 1, 3, 2, 2))
        layer.proj.register_forward_hook(lambda *unused: None)
        layer(torch.randn(1, 3, 4, 4))


def test_rotary_tables_are_kept_for_later_passes():
    device = torch.device("cpu")
    with torch.inference_mode():
        kept = RotaryTable((5, 6), 8, device)
    assert not any(axis.is_inference() for axis in kept.axes)
    again = RotaryTable((6, 5), 8, device)
    assert again.axes[0] is kept.axes[1]
    assert again.axes[1] is kept.axes[0]
    with FakeTensorMode():
        fake = RotaryTable((5, 6), 8, device)
    assert all(isinstance(axis, FakeTensor) for axis in fake.axes)
    assert RotaryTable((5, 6), 8, device).axes[0] is kept.axes[0]


def test_importing_leaves_the_compiler_alone():
    script = "import sys, lf_dense; raise SystemExit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0

    def function():
        pass

    marked = torch.compiler.assume_constant_result(function)
    assert vars(marked).items() <= vars(native.fused_head_dims).items()
    assert vars(marked)


@pytest.mark.parametrize(("ratio", "groups"), [(8, 4), (9, 4), (4, 1)])
@torch.no_grad()
def test_exported_networks_add_up_groups_of_hidden_channels(ratio, groups, monkeypatch):
    layer, x = spread(ConvFFN(16, 16 * ratio, 0.0)), torch.randn(2, 35, 16)
    convolutions, convolve = [], torch.nn.functional.conv2d

    def note(maps, *arguments, **options):
        convolutions.append(maps.shape[1])
        return convolve(maps, *arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "conv2d", note)
    with exporting("standard"):
        found = layer(x, (5, 7))
    assert convolutions == [16 * ratio // groups] * groups
    holds(found, layer.whole(x, (5, 7)), exact_ffn(layer, x.double().numpy(), (5, 7)))


@pytest.mark.parametrize("name", ["avx512", "avx2", "plain"])
def test_other_instruction_sets(name):
    environment = instruction_sets.environment_of(name)
    instruction_sets.assert_tests_pass(__file__, "literal or gelu", environment)
