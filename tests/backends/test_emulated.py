"""The emulation of the CUDA sources: its own checks, and no operator that relies on a missing barrier."""

import ctypes
import os
import shlex
import subprocess

import pytest
import torch

from lf_dense import laplacian_attention, laplacian_kernel, newton_schulz_inverse, use_backend
from support import ROOT, emulated
from support.literal import exact_inverse, gradients, gram, kappa, make_inputs, relative_error
from support.multiprocessors import loads

ORDERS = ("forward", "reverse", "random")


def test_emulation_catches_what_a_gpu_would_get_wrong(tmp_path):
    headers = emulated.cuda_headers()
    if headers is None:
        pytest.skip("the CUDA toolkit's headers are not there")
    program = tmp_path / "selftest"
    source = emulated.EMULATION / "selftest.cpp"
    compiler = f"{os.environ.get('CXX', 'g++')} -std=c++20 -O1 -I{emulated.EMULATION} -isystem {headers}"
    emulated.run(f"{compiler} {shlex.quote(str(source))} -o {program}")
    for order in ORDERS:
        env = {**os.environ, "LF_EMULATION_ORDER": order}
        done = subprocess.run([program], env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip().endswith("ok")


@pytest.mark.parametrize(
    "shape", [{"n": 150, "d": 12, "m": 9}, {"n": 70, "d": 64, "m": 60}, {"n": 40, "d": 128, "m": 33}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_may_run_in_any_order(shape, dtype, monkeypatch):
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=1, heads=2, dtype=dtype, **shape)
    weight = torch.randn_like(inputs[2])
    upstream = torch.randn(1, 2, shape["n"], shape["m"], dtype=dtype)
    results = []
    with use_backend("native"):
        for order in ORDERS:
            monkeypatch.setenv("LF_EMULATION_ORDER", order)
            torch.manual_seed(1)
            everything = [
                laplacian_attention(*inputs),
                *gradients(laplacian_attention, inputs, weight),
                *gradients(laplacian_kernel, [inputs[0], inputs[3]], upstream),
                newton_schulz_inverse(gram(shape["m"], 0.5, dtype)),
            ]
            results.append(everything)
    for other in results[1:]:
        assert all(torch.equal(mine, right) for mine, right in zip(other, results[0]))


@pytest.mark.parametrize("m", [9, 60])
@pytest.mark.parametrize(
    ("limit", "d"),
    [(101376, 64), (101376, 100), (166912, 128), (232448, 128), (232448, 200)],
    ids=["sm_86", "sm_86 in slabs", "sm_80", "sm_90", "sm_90 in slabs"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gpus_with_less_shared_memory(m, limit, d, dtype, monkeypatch):
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=1, heads=1, n=100, d=d, m=m, dtype=dtype)
    weight = torch.randn_like(inputs[2])
    monkeypatch.setenv("LF_EMULATION_SHARED_BYTES", str(limit))
    assert_rounds_like_the_reference(inputs, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [129, 256, 300])
@pytest.mark.parametrize("m", [9, 60])
def test_heads_wider_than_shared_memory(d, m, dtype, monkeypatch):
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=2, heads=2, n=150, d=d, m=m, spread=0.1, dtype=dtype)
    for x in inputs:
        x[1, 1, 0] = inputs[3][1, 1, 0]
    assert_rounds_like_the_reference(inputs, torch.randn(inputs[2].shape).to(dtype))


def test_the_kernels_gradient_of_many_channels_is_a_slab_a_block(monkeypatch):
    """Each number of channels beside each number of landmarks; a blank image's gradient is 0."""
    emulated.install(monkeypatch)
    for channels in (1, 32, 33, 64, 65, 128, 129, 500):
        for m in (1, 8, 57):
            x, y = torch.randn(1, 2, 70, channels) / channels, torch.randn(1, 2, m, channels) / channels
            weight = torch.randn(1, 2, 70, m)
            with use_backend("native"):
                got = [laplacian_kernel(x, y), *gradients(laplacian_kernel, [x, y], weight)]
                blank = gradients(laplacian_kernel, [torch.ones_like(x), torch.ones_like(y)], weight)
            exact = [x.double(), y.double()]
            right = [kappa(*exact), *gradients(kappa, exact, weight.double())]
            for mine, other in zip(got, right):
                assert relative_error(mine, other) <= 2e-6, (channels, m)
            assert all(torch.equal(x, torch.zeros_like(x)) for x in blank)


@pytest.mark.parametrize(("dtype", "n"), [(torch.float64, 17_000), (torch.float32, 33_500)], ids=str)
def test_chunks_of_several_tiles(dtype, n, monkeypatch):
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=1, heads=1, n=n, d=4, m=3, dtype=dtype)
    assert_rounds_like_the_reference(inputs, torch.randn_like(inputs[2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [64, 150])
def test_rows_in_quads_and_rows_of_any_strides_agree(dtype, n, monkeypatch):
    """Heads of 64 channels have kernels of their own; odd strides or an odd address take the general ones."""
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=2, heads=2, n=n, d=64, m=12, spread=0.3, dtype=dtype)
    weight = torch.randn(inputs[2].shape).to(dtype)
    odd = [torch.empty(2, 2, x.shape[2], 65, dtype=dtype)[..., 1:].copy_(x) for x in inputs]
    apart = [torch.empty(2, 2, x.shape[2], 128, dtype=dtype)[..., ::2].copy_(x) for x in inputs]
    assert odd[0].stride(-1) == 1

    def everything(tensors):
        with use_backend("native"):
            return [laplacian_attention(*tensors), *gradients(laplacian_attention, tensors, weight)]

    tolerance = 4e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for other in (odd, apart):
        for one, right in zip(everything(other), everything(inputs)):
            assert one.dtype == dtype
            assert relative_error(one, right.double()) <= tolerance


@pytest.mark.parametrize("d", [12, 64, 100])
def test_gradients_between_points_that_coincide_are_zero(d, monkeypatch):
    """A blank image: every sign is that of 0, to the last bit, in whatever order the weights are added."""
    emulated.install(monkeypatch)
    q, k, _, landmarks = (
        torch.full_like(x, 0.7) for x in make_inputs(batch=1, heads=1, n=150, d=d, m=9, dtype=torch.float32)
    )
    values = torch.randn(1, 1, 150, d)
    weight = torch.randn_like(values)
    with use_backend("native"):
        dq, dk, dv, dlandmarks = gradients(laplacian_attention, [q, k, values, landmarks], weight)
        kernel = gradients(laplacian_kernel, [q, landmarks], torch.randn(1, 1, 150, 9))
    assert all(torch.equal(x, torch.zeros_like(x)) for x in (dq, dk, dlandmarks, *kernel))
    assert dv.abs().max() > 0


def test_a_landmark_that_is_a_token_does_not_drown_the_others(monkeypatch):
    """Its kernel is 1 and its sign 0; the others' kernels are 1e-8, and so is the gradient."""
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=1, heads=1, n=70, d=64, m=70, dtype=torch.float32)
    assert_rounds_like_the_reference(inputs, torch.randn_like(inputs[2]))


@pytest.mark.parametrize("power", [-126, -128, -60, 0, 60, 126])
def test_signs_of_differences_of_every_size(power, monkeypatch):
    """Differences from 2^-128 on have their sign exactly, denormal ones included; equal numbers have none."""
    emulated.install(monkeypatch)
    step = 2.0**power
    x = torch.tensor([[step, -step, 0.0, step]])
    y = torch.tensor([[0.0, 0.0, 0.0, step]])
    with use_backend("native"):
        dx, dy = gradients(laplacian_kernel, [x, y], torch.ones(1, 1))
    kernel = torch.exp(-(x - y).abs().sum() / 4)
    expected = -torch.sign(x - y) * kernel / 4
    torch.testing.assert_close(dx, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(dy, -expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("position", range(4), ids=["q", "k", "v", "landmarks"])
def test_nan_reaches_the_gradients(position, monkeypatch):
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=1, heads=2, n=70, d=64, m=9, dtype=torch.float32)
    inputs[position][0, 0, 0, 0] = float("nan")
    with use_backend("native"):
        grads = gradients(laplacian_attention, inputs, torch.randn_like(inputs[2]))
    assert grads[0][0, 0, 0].isnan().any()
    assert grads[3][0, 0].isnan().any()
    assert all(x[0, 1].isfinite().all() for x in grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_chunks_of_several_tiles_in_many_heads(dtype, monkeypatch):
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=20, heads=5, n=400, d=4, m=3, dtype=dtype)
    assert_rounds_like_the_reference(inputs, torch.randn_like(inputs[2]))


def test_an_images_bits_are_the_same_in_every_batch_of_up_to_16(monkeypatch):
    emulated.install(monkeypatch)
    inputs = make_inputs(batch=16, heads=1, n=500, d=4, m=9, dtype=torch.float32)
    weight = torch.randn_like(inputs[2])
    with use_backend("native"):
        many = [laplacian_attention(*inputs), *gradients(laplacian_attention, inputs, weight)]
        for image in (slice(0, 1), slice(5, 8)):
            some = [x[image] for x in inputs]
            few = [laplacian_attention(*some), *gradients(laplacian_attention, some, weight[image])]
            assert all(torch.equal(x[image], y) for x, y in zip(many, few))


@pytest.fixture(scope="module")
def chunk_tokens(tmp_path_factory):
    """A function that lists the tokens of a head's chunks."""
    folder = tmp_path_factory.mktemp("cut")
    (folder / "cut.cpp").write_text(f"""#include "{ROOT / "ops" / "cuda" / "cut.h"}"
extern "C" int chunk_tokens(
    int64_t batch, int64_t heads, int64_t tokens, int tile_tokens, int64_t* lengths) {{
  const lf::Cut cut = lf::Cut::of(batch, heads, tokens, tile_tokens);
  int64_t at = 0;
  for (int64_t block = 0; block < cut.chunks * cut.heads; block += cut.heads) {{
    const lf::Chunk chunk = cut.of_block(block);
    if (chunk.head != 0 || chunk.first != at) return -1;
    if (chunk.tokens != cut.chunk_tokens(chunk.index)) return -1;
    at += lengths[chunk.index] = chunk.tokens;
  }}
  return at == tokens ? cut.chunks : -1;
}}""")
    compiler = os.environ.get("CXX", "g++")
    emulated.run(f"{compiler} -std=c++20 -O1 -shared -fPIC {folder / 'cut.cpp'} -o {folder / 'cut.so'}")
    function = ctypes.CDLL(str(folder / "cut.so")).chunk_tokens
    function.argtypes = [*[ctypes.c_int64] * 3, ctypes.c_int, ctypes.POINTER(ctypes.c_int64)]

    def call(batch, heads, tokens, tile_tokens=64):
        lengths = (ctypes.c_int64 * 4096)()
        chunks = function(batch, heads, tokens, tile_tokens, lengths)
        assert 0 < chunks <= 4096
        return list(lengths[:chunks])

    return call


def test_chunks_follow_one_another_and_cover_every_token(chunk_tokens):
    some = [*range(1, 300), 3136, 16_700, 66_800, 66_801, 518_400, 10_000_000]
    for tokens in some:
        for batch, heads in ((1, 1), (1, 8), (16, 5), (17, 1), (128, 1), (128, 5), (2000, 8)):
            for tile in (32, 64):
                assert min(chunk_tokens(batch, heads, tokens, tile)) > 0


def test_batches_of_up_to_16_images_are_cut_like_one_image(chunk_tokens):
    for tokens in (196, 3136, 66_800):
        assert all(chunk_tokens(batch, 2, tokens) == chunk_tokens(1, 2, tokens) for batch in range(2, 17))


@pytest.mark.parametrize("tokens", [3136, 12_544, 16_700, 35_000, 66_800, 518_400])
@pytest.mark.parametrize("multiprocessors", [132, 108])
def test_multiprocessors_are_evenly_loaded(tokens, multiprocessors, chunk_tokens):
    for heads in (1, 2, 5):
        lengths = chunk_tokens(1, heads, tokens)
        tiles = -(-tokens // 64)
        for batch in (1, 2, 3, 7, 16):
            blocks = [-(-length // 64) for length in lengths for _ in range(batch * heads)]
            mean = batch * heads * tiles / multiprocessors
            # Where there are few tiles for each multiprocessor, single ones cannot do better than this.
            best = -(-batch * heads * tiles // multiprocessors)
            assert max(loads(blocks, multiprocessors)) <= max(1.05 * mean, best), (heads, batch)


def test_partial_sums_are_a_tenth_of_a_training_batch(chunk_tokens):
    batch, m, d = 128, 49, 64
    inputs = batch * 3136 * d * 2  # of bfloat16
    chunks = batch * len(chunk_tokens(batch, 1, 3136))
    assert 4 * chunks * (m * d + m + 2 * d) <= 0.1 * 3 * inputs  # beside q, k and v
    assert 4 * chunks * (3 * m * d + m + d) <= 0.1 * 4 * inputs  # and the upstream gradient


@pytest.mark.parametrize("m", [1, 4, 16, 49, 64, 100])
@pytest.mark.parametrize("eps", [1e-3, 1e-2, 0.1])
def test_the_attentions_own_solver_rounds_like_plain_pytorch_after_every_step(m, eps, monkeypatch):
    emulated.install(monkeypatch)
    attention = getattr(torch.ops, emulated.LIBRARY).laplacian_attention
    tokens = torch.randn(1, 1, 1, 16)
    for spread in (3.0, 0.1, 1e-2, 0.0):
        landmarks = spread * torch.randn(1, 1, m, 16)
        w = laplacian_kernel(landmarks.double(), landmarks.double(), backend="reference")
        exact = exact_inverse(w, eps)
        for iters in (1, 2, 3, 4, 5, 7, 9, 10, 14, 20):
            plain = newton_schulz_inverse(w.float(), iters, eps, backend="reference")
            inverse = attention(tokens, tokens, tokens, landmarks, 4.0, iters, eps, 1e-2)[1]
            assert relative_error(inverse, exact) <= 2 * relative_error(plain, exact) + 1e-6, (spread, iters)


@pytest.mark.parametrize(("m", "d"), [(49, 64), (16, 32), (64, 128)])
def test_launches_allocations_and_attributes_of_a_call(m, d, monkeypatch):
    emulated.install(monkeypatch)
    library = ctypes.CDLL(str(emulated.build()))
    operators = getattr(torch.ops, emulated.LIBRARY)
    inputs = make_inputs(batch=1, heads=1, n=100, d=d, m=m, dtype=torch.float32)

    def counted(call):
        launches, attributes = library.lf_emulation_launches(), library.lf_emulation_attribute_calls()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            result = call()
        allocations = sum(event.count for event in profile.key_averages() if "aten::empty" in event.key)
        attributes = library.lf_emulation_attribute_calls() - attributes
        return result, (library.lf_emulation_launches() - launches, allocations, attributes)

    def forward():
        return operators.laplacian_attention(*inputs, 4.0, 10, 1e-2, 1e-2)

    forward()
    (out, *saved), counts = counted(forward)
    assert counts[0] <= 3
    assert counts[2] == 0
    assert 1 <= counts[1] <= 6  # five results, one workspace
    again = [out, *inputs, *saved, 4.0, 1e-2]
    operators.laplacian_attention_backward(*again)
    counts = counted(lambda: operators.laplacian_attention_backward(*again))[1]
    assert counts[0] <= 6
    assert counts[2] == 0
    assert 1 <= counts[1] <= 5  # four gradients, one workspace


def assert_rounds_like_the_reference(inputs, weight):
    def everything(dtype):
        leaves = [x.to(dtype) for x in inputs]
        return [laplacian_attention(*leaves), *gradients(laplacian_attention, leaves, weight.to(dtype))]

    with use_backend("native"):
        got = everything(weight.dtype)
    with use_backend("reference"):
        plain, exact = everything(weight.dtype), everything(torch.float64)
    # Two float64 computations differ by their own rounding, and nothing more exact is there to compare with.
    floor = 1e-12 if weight.dtype == torch.float64 else 10 * torch.finfo(weight.dtype).eps
    for mine, other, right in zip(got, plain, exact):
        assert relative_error(mine, right) <= 2 * relative_error(other, right) + floor
