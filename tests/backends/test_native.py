"""The native operators as operators.

How they are registered, compiled and repeated, on which instruction sets they run, and what they say when
they cannot serve.
"""

import logging
import os
import subprocess
import sys

import pytest
import torch

import lf_dense
from lf_dense import backends, info, laplacian_attention, laplacian_kernel, newton_schulz_inverse, use_backend
from lf_dense.backends import native
from lf_dense.blocks import ConvFFN
from support import ROOT, instruction_sets
from support.literal import gradients, gram, kappa, literal_attention, make_inputs, relative_error

CPU = torch.device("cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
obstacle = native.library_obstacle("cpu")
needs_native = pytest.mark.skipif(obstacle is not None, reason=str(obstacle))
on_each_backend = pytest.mark.usefixtures("each_backend")
each_device = pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def test_the_development_environment_has_the_operators():
    if os.environ.get("LF_DENSE_NO_NATIVE"):
        pytest.skip("LF_DENSE_NO_NATIVE is set")
    assert native.library_obstacle("cpu") is None


# Registration


def operator_calls(device, dtype):
    """Each operator's name and arguments, in the layout of projections."""
    ops = torch.ops.lf_dense
    projected = [torch.randn(2, 40, 2, 8, device=device).to(dtype) for _ in range(3)]
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in projected)
    landmarks = torch.randn(2, 2, 5, 8, device=device).to(dtype).requires_grad_()
    wide = native.compute_dtype(dtype)
    w = kappa(landmarks.detach().to(wide), landmarks.detach().to(wide)).requires_grad_()
    saved = [x.detach() for x in ops.laplacian_attention(q, k, v, landmarks, 4.0, 10, 1e-2, 1e-2)[1:]]
    plain = [x.detach() for x in (q, k, v, landmarks)]
    kernel_gradient = torch.randn(2, 2, 40, 5, device=device).to(dtype)
    return [
        (ops.laplacian_kernel, (q, landmarks, 4.0)),
        (ops.laplacian_kernel_backward, (kernel_gradient, plain[0], plain[3], 4.0)),
        (ops.newton_schulz_inverse, (w, 10, 1e-2)),
        (ops.laplacian_attention, (q, k, v, landmarks, 4.0, 10, 1e-2, 1e-2)),
        (ops.laplacian_attention_backward, (torch.randn_like(plain[2]), *plain, *saved, 4.0, 1e-2)),
    ]


@needs_native
@each_device
@each_dtype
def test_opcheck(device, dtype):
    for operator, args in operator_calls(device, dtype):
        # The second run of the check goes through torch.compile's tracing.
        torch.library.opcheck(operator, args)


@needs_native
@each_device
def test_outputs_lie_as_projections_do(device):
    q, k, v, landmarks = (x.to(device) for x in make_inputs(dtype=torch.float32))
    out = laplacian_attention(q, k, v, landmarks, backend="native")
    assert out.transpose(1, 2).is_contiguous()
    assert laplacian_kernel(q, landmarks, backend="native").is_contiguous()


@needs_native
@each_device
def test_compiles_without_a_graph_break_and_once_for_all_sizes(device):
    def step(q, k, v, landmarks):
        gram = laplacian_kernel(landmarks, landmarks, backend="native")
        inverse = newton_schulz_inverse(gram, backend="native")
        return laplacian_attention(q, k, v, landmarks, backend="native"), inverse

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n, m in ((60, 9), (77, 9), (130, 16), (64, 25)):
        inputs = [x.to(device).requires_grad_() for x in make_inputs(n=n, m=m, dtype=torch.float32)]
        got, expected = compiled(*inputs), step(*inputs)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
        grads = [torch.autograd.grad(out[0].sum() + out[1].sum(), inputs) for out in (got, expected)]
        for one, other in zip(*grads):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@needs_native
def test_there_is_no_second_derivative_and_it_says_so():
    inputs = [x.requires_grad_() for x in make_inputs()]
    for out in (
        laplacian_attention(*inputs, backend="native"),
        laplacian_kernel(inputs[0], inputs[3], backend="native"),
    ):
        (grad,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
        with pytest.raises(NotImplementedError, match=r"no second derivative.*'reference'"):
            torch.autograd.grad(grad.sum(), inputs[0])


@on_each_backend
def test_mixed_dtypes_meet_in_the_widest_under_autocast():
    q, k, v, landmarks = make_inputs(dtype=torch.float32)
    mixed = (q, k.bfloat16(), v.half(), landmarks)
    with pytest.raises(TypeError, match="one dtype"):
        laplacian_attention(*mixed)
    with torch.autocast(q.device.type, dtype=torch.bfloat16):
        out = laplacian_attention(*mixed)
        kernel = laplacian_kernel(q.half(), landmarks)
        inverse = newton_schulz_inverse(gram(5, 1.0).bfloat16())
    assert out.dtype == kernel.dtype == torch.float32
    assert inverse.dtype == torch.bfloat16
    torch.testing.assert_close(out, laplacian_attention(*(x.float() for x in mixed)))


@needs_native
def test_registered_operators_widen_by_themselves_under_autocast():
    q, k, v, landmarks = make_inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = torch.ops.lf_dense.laplacian_attention(q, k.bfloat16(), v, landmarks, 4.0, 10, 1e-2, 1e-2)[0]
        inverse = torch.ops.lf_dense.newton_schulz_inverse(gram(5, 1.0).bfloat16(), 10, 1e-2)
        kernel = torch.ops.lf_dense.laplacian_kernel(q.bfloat16(), landmarks, 4.0)
    assert out.dtype == inverse.dtype == kernel.dtype == torch.float32


@on_each_backend
def test_tensors_on_two_devices_are_one_sentence(each_backend):
    if each_backend.startswith("reference"):
        pytest.skip("the reference is no operator")
    ops, device = native._operators(), torch.get_default_device().type
    calls = operator_calls(device, torch.float32)
    # The device's kernel itself: a meta tensor stands for one of another device.
    keys = torch._C.DispatchKeySet(
        torch._C.DispatchKey.CUDA if device == "cuda" else torch._C.DispatchKey.CPU
    )
    for operator, args in calls:
        overload = getattr(ops, operator._qualified_op_name.split("::")[1]).default
        plain = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
        overload.redispatch(keys, *plain)
        tensors = [place for place, arg in enumerate(plain) if isinstance(arg, torch.Tensor)]
        for place in tensors[1:]:
            mixed = list(plain)
            mixed[place] = mixed[place].to("meta")
            with pytest.raises(RuntimeError, match=r"this call are on different devices: move them to one"):
                overload.redispatch(keys, *mixed)


# Values


@on_each_backend
@each_dtype
def test_sanitizer_selection(dtype):
    """Every operator, forward and backward, at sizes that leave tiles, groups and vectors incomplete."""
    for n, m, d in ((1, 1, 1), (70, 9, 12), (33, 60, 40)):
        inputs = make_inputs(n=n, m=min(m, n), d=d, dtype=dtype)
        weight = torch.randn(inputs[2].shape).to(dtype)
        for value in (laplacian_attention(*inputs), *gradients(laplacian_attention, inputs, weight)):
            assert value.isfinite().all()
        grads = gradients(laplacian_kernel, inputs[:1] + inputs[3:], torch.ones(2, 2, n, min(m, n)).to(dtype))
        assert all(grad.isfinite().all() for grad in grads)
        assert newton_schulz_inverse(gram(m, 1.0)).isfinite().all()


@on_each_backend
@each_dtype
def test_memory_that_nobody_wrote_is_not_read(dtype, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    inputs = make_inputs(n=150, m=9, d=12, dtype=dtype)
    weight = torch.randn(inputs[2].shape).to(dtype)

    def everything():
        grads = gradients(laplacian_attention, inputs, weight)
        return [laplacian_attention(*inputs), *grads, laplacian_kernel(inputs[0], inputs[3])]

    expected = everything()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(4).isnan().all()
        got = everything()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(got, expected))


NAMES = """
import torch
from lf_dense import laplacian_attention, laplacian_kernel
from support.literal import gradients, make_inputs
"""


def run_native(code, **environment):
    """Run lines on the native backend in a process of their own, and return what they printed."""
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": path, "LF_DENSE_BACKEND": "native", **environment}
    command = [sys.executable, "-c", NAMES + code]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@needs_native
def test_scratch_that_nobody_wrote_is_not_read():
    # glibc fills what it hands out with 0x7f: 3.4e38 as a float32.
    code = """
torch.manual_seed(0)
for dtype in (torch.float64, torch.float32, torch.bfloat16):
    inputs = make_inputs(n=150, m=9, d=12, dtype=dtype)
    weight = torch.randn(inputs[2].shape).to(dtype)
    grads = gradients(laplacian_attention, inputs, weight)
    for x in (laplacian_attention(*inputs), *grads, laplacian_kernel(inputs[0], inputs[3])):
        print(x.double().sum().item().hex())
"""
    runs = [run_native(code, OMP_NUM_THREADS="1", **extra) for extra in ({}, {"MALLOC_PERTURB_": "128"})]
    assert runs[0] == runs[1]
    assert len(runs[0].split()) == 18


@on_each_backend
def test_the_same_bits_every_time():
    inputs = make_inputs(n=1500, d=16, m=49, dtype=torch.float32)
    weight = torch.randn_like(inputs[2])

    def everything():
        grads = gradients(laplacian_kernel, [inputs[0], inputs[3]], torch.ones(2, 2, 1500, 49))
        return [laplacian_attention(*inputs), *gradients(laplacian_attention, inputs, weight), *grads]

    first = everything()
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(first, everything()))


@needs_native
def test_forward_mode_drops_no_tangent():
    q, k, v, landmarks = make_inputs(dtype=torch.float32)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        # torch's cdist has no such derivative, and says so.
        with pytest.raises(NotImplementedError, match="forward AD"):
            laplacian_attention(dual, k, v, landmarks)
        with pytest.raises(RuntimeError, match="forward-mode differentiation"):
            laplacian_attention(dual, k, v, landmarks, backend="native")
    ffn = ConvFFN(8, 32, 0.0).eval().double()
    x, direction = torch.randn(2, 1, 30, 8, dtype=torch.float64)
    for gradients_too in (True, False):
        with torch.set_grad_enabled(gradients_too):
            _, found = torch.func.jvp(lambda tokens: ffn(tokens, (5, 6)), (x,), (direction,))
            wanted = (ffn(x + 1e-6 * direction, (5, 6)) - ffn(x - 1e-6 * direction, (5, 6))) / 2e-6
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


@needs_native
@pytest.mark.parametrize("d", [32, 48, 64])
def test_the_same_bits_of_bfloat16_at_any_address(d):
    """Rows of whole vectors are read as words of two channels, unless they begin within a word."""
    inputs = make_inputs(n=150, d=d, m=49, dtype=torch.bfloat16)
    expected = laplacian_attention(*inputs), laplacian_kernel(*(x.float() for x in (inputs[0], inputs[3])))
    for stride, offset in ((d, 1), (d + 1, 0), (d + 2, 2)):
        moved = []
        for x in inputs:
            rows = torch.empty(x[..., 0].numel() * stride + offset, dtype=x.dtype)[offset:]
            moved.append(rows.view(*x.shape[:-1], stride)[..., :d].copy_(x))
        assert torch.equal(laplacian_attention(*moved), expected[0])
        kernel = laplacian_kernel(moved[0], moved[3])
        torch.testing.assert_close(kernel.float(), expected[1], rtol=0.01, atol=1e-6)


@needs_native
def test_the_same_bits_on_any_number_of_threads():
    # In a process of its own: after torch.set_num_threads, torch 2.13's linalg.inv is wrong for other tests.
    code = """
torch.manual_seed(0)
inputs = make_inputs(n=1500, d=16, m=49, dtype=torch.float32)
weight = torch.randn_like(inputs[2])
results = []
for count in (1, 2, 3):
    torch.set_num_threads(count)
    results.append([laplacian_attention(*inputs), *gradients(laplacian_attention, inputs, weight)])
for other in results[1:]:
    assert all(torch.equal(x, y) for x, y in zip(results[0], other))
print("SAME", len(results))
"""
    assert run_native(code).split() == ["SAME", "3"]


@on_each_backend
def test_nan_and_inf_where_the_reference_has_them():
    for value in (float("nan"), float("inf"), -float("inf")):
        for position in range(4):
            inputs = make_inputs(dtype=torch.float32)
            inputs[position][0, 0, 3, 1] = value
            weight = torch.ones_like(inputs[2])
            got = [laplacian_attention(*inputs), *gradients(laplacian_attention, inputs, weight)]
            with use_backend("reference"):
                expected = [laplacian_attention(*inputs), *gradients(laplacian_attention, inputs, weight)]
            assert torch.equal(got[0].isnan(), expected[0].isnan())
            for mine, other in zip(got[1:], expected[1:]):
                # What the reference could not compute is never a finite number here.
                assert not (mine.isfinite() & ~other.isfinite()).any()
            x, y = inputs[0], inputs[3]
            with use_backend("reference"):
                pattern = laplacian_kernel(x, y)
            torch.testing.assert_close(laplacian_kernel(x, y), pattern, equal_nan=True)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_values_of_ten_thousand(dtype):
    inputs = make_inputs(n=100, m=9, spread=1e4 if dtype == torch.float32 else 1e3, dtype=dtype)
    inputs[2] = (inputs[2].float() * 1e4).clamp(-6e4, 6e4).to(dtype)
    exact = literal_attention(*(x.double() for x in inputs))
    plain = literal_attention(*(x.float() for x in inputs)).to(dtype)
    got = laplacian_attention(*inputs)
    floor = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (got.double() - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + floor


@on_each_backend
def test_offsets_beyond_31_bits():
    if torch.get_default_device().type == "cuda":
        pytest.skip("8 GB of address space are free on the host alone")
    # Rows 2^31 elements apart; pages between them are never touched.
    memory = torch.empty(2**32 + 64, dtype=torch.bfloat16)
    far = memory.as_strided((1, 1, 3, 8), (0, 0, 2**31, 1))
    near = torch.randn(1, 1, 3, 8).bfloat16()
    far.copy_(near)
    inputs = make_inputs(batch=1, heads=1, n=3, m=2, dtype=torch.bfloat16)
    assert torch.equal(laplacian_kernel(far, inputs[3]), laplacian_kernel(near, inputs[3]))
    inputs[0] = near
    expected = laplacian_attention(*inputs)
    inputs[0] = far
    assert torch.equal(laplacian_attention(*inputs), expected)


@on_each_backend
@pytest.mark.parametrize(("m", "d"), [(57, 128), (196, 128), (260, 128), (49, 132), (60, 300)])
def test_many_landmarks_and_wide_heads(m, d, each_backend):
    if each_backend.startswith("reference"):
        pytest.skip("torch.cdist adds 128 channels in one chain, which rounds more than the literal sum")
    inputs = make_inputs(batch=1, heads=2, n=300, d=d, m=m, spread=0.3, dtype=torch.float32)
    weight = torch.randn_like(inputs[2])
    exact_inputs = [x.double() for x in inputs]
    exact = [literal_attention(*exact_inputs), *gradients(literal_attention, exact_inputs, weight.double())]
    plain = [literal_attention(*inputs), *gradients(literal_attention, inputs, weight)]
    got = [laplacian_attention(*inputs), *gradients(laplacian_attention, inputs, weight)]
    for mine, other, right in zip(got, plain, exact):
        assert relative_error(mine, right) <= 2 * relative_error(other, right) + 4e-7


@needs_native
@pytest.mark.parametrize("name", ["avx2", "plain"])
def test_other_instruction_sets_are_right_too(name):
    environment = instruction_sets.environment_of(name)
    instruction_sets.assert_tests_pass("tests/backends/test_mathematics.py", "native-cpu", environment)
    command = [sys.executable, "-c", "import lf_dense; print(lf_dense.build_info()['instruction_set'])"]
    said = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == name


@needs_native
def test_an_instruction_set_that_is_not_there_is_an_error_with_the_names():
    code = "import torch, lf_dense; x = torch.ones(2, 2); lf_dense.laplacian_kernel(x, x, backend='native')"
    environment = {**os.environ, "LF_DENSE_INSTRUCTION_SET": "sse9"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "LF_DENSE_INSTRUCTION_SET is 'sse9'" in done.stderr
    assert "plain" in done.stderr


# Rules, and what is said of them


@pytest.fixture
def fresh_rules():
    """Answers that a test forces do not outlive it."""
    caches = native.library_obstacle, backends._log_once
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("fresh_rules")
class TestRules:
    def refused(self, x, match):
        sentence = f"(?s)cannot serve this call, since {match}.*'auto' or 'reference'"
        with pytest.raises(RuntimeError, match=sentence):
            laplacian_kernel(x, x, backend="native")
        with pytest.raises(RuntimeError, match=sentence):
            newton_schulz_inverse(x @ x.mT, backend="native")

    def test_older_torch(self, monkeypatch):
        monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
        self.refused(torch.rand(3, 3), r"torch is 2\.10\.1\+cpu, and the operators need 2\.11 or newer")

    def test_not_built(self, monkeypatch, tmp_path):
        monkeypatch.setattr(native, "_FOLDER", tmp_path)
        self.refused(torch.rand(3, 3), "they were not built for cpu")

    def test_damaged_library(self, monkeypatch, tmp_path):
        (tmp_path / "_operators_cpu.so").write_bytes(b"no library")
        monkeypatch.setattr(native, "_FOLDER", tmp_path)
        self.refused(torch.rand(3, 3), r"_operators_cpu\.so did not load")

    def test_other_devices(self):
        reason = "they are written for the CPU and for CUDA, and the tensors are on meta"
        self.refused(torch.rand(3, 3, device="meta"), reason)

    def test_cuda_that_is_not_there(self):
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        assert native.obstacle(torch.device("cuda")) in (
            "torch sees no CUDA device",
            "they were not built for cuda (docs/operators.md says how)",
        )

    def test_cuda_capability_and_head_dims(self, monkeypatch):
        monkeypatch.setattr(native, "library_obstacle", lambda device: None)
        monkeypatch.setattr(native, "_cuda_capability", lambda index: (7, 5))
        gpu = torch.device("cuda:0")
        assert "compute capability 8.0 or higher, and cuda:0 has 7.5" in native.obstacle(gpu)
        monkeypatch.setattr(native, "_cuda_capability", lambda index: (9, 0))
        monkeypatch.setattr(native, "_cuda_launch_failure", lambda index: None)
        assert native.obstacle(gpu) is None
        for shared_memory, limit in ((232448, 128), (101376, 64)):
            monkeypatch.setattr(native, "_cuda_shared_memory", lambda index, size=shared_memory: size)
            assert native.fused_head_dims(gpu) == limit

    def test_a_gpu_that_no_kernel_runs_on(self, monkeypatch, caplog):
        asked = []

        def failure(index):
            asked.append(index)
            return "CUDA driver version is insufficient for CUDA runtime version"

        monkeypatch.setattr(native, "library_obstacle", lambda device: None)
        monkeypatch.setattr(native, "_cuda_capability", lambda index: (9, 0))
        monkeypatch.setattr(native, "_cuda_shared_memory", lambda index: 232448)
        monkeypatch.setattr(native, "_cuda_launch_failure", failure)
        gpu = torch.device("cuda:1")
        reason = "they do not run on cuda:1 (CUDA driver version is insufficient for CUDA runtime version)"
        assert native.obstacle(gpu) == reason
        assert asked == [1]
        with caplog.at_level(logging.WARNING, logger="lf_dense"):
            assert backends.choose_backend("auto", gpu) == "reference"
        assert reason in caplog.text
        with pytest.raises(RuntimeError, match="cannot serve this call, since they do not run on cuda:1"):
            backends.choose_backend("native", gpu)

    def test_a_launch_is_tried_once_for_each_gpu(self, monkeypatch):
        asked = []

        class Library:
            def __init__(self, path):
                self.lf_dense_launch_failure = self

            def __call__(self, index):
                asked.append(index)
                return b"no kernel image is available" if index else None

        monkeypatch.setattr(native.ctypes, "CDLL", Library)
        native._cuda_launch_failure.cache_clear()
        try:
            answers = [native._cuda_launch_failure(index) for index in (0, 1, 0, 1)]
        finally:
            native._cuda_launch_failure.cache_clear()
        assert answers == [None, "no kernel image is available"] * 2
        assert asked == [0, 1]

    def test_auto_says_once_why_it_is_the_reference(self, monkeypatch, tmp_path, caplog):
        monkeypatch.setattr(native, "_FOLDER", tmp_path)
        x = torch.rand(3, 3)
        with caplog.at_level(logging.WARNING, logger="lf_dense"):
            for _ in range(3):
                laplacian_kernel(x, x)
                laplacian_attention(*make_inputs())
        assert [record.message for record in caplog.records] == [
            "lf_dense runs its plain PyTorch reference in place of the native operators, "
            "since they were not built for cpu (docs/operators.md says how)."
        ]

    def test_the_reference_asked_for_says_nothing(self, monkeypatch, tmp_path, caplog):
        monkeypatch.setattr(native, "_FOLDER", tmp_path)
        laplacian_kernel(torch.rand(3, 3), torch.rand(3, 3), backend="reference")
        assert not caplog.records


@needs_native
def test_auto_is_native():
    inputs = make_inputs(dtype=torch.float32)
    assert backends.choose_backend(None, CPU) == "native"
    assert torch.equal(laplacian_attention(*inputs), laplacian_attention(*inputs, backend="native"))


# What is reported


def test_build_info_and_the_info_command():
    build = lf_dense.build_info()
    command = [sys.executable, "-m", "lf_dense.info"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert info.report() in done.stdout
    for function in ("laplacian_kernel", "newton_schulz_inverse", "laplacian_attention"):
        assert function in done.stdout
    if build["built"]:
        assert build["compiler"] in done.stdout
        assert build["instruction_set"] in build["instruction_sets_supported"]
        assert set(build["instruction_sets_supported"]) <= set(build["instruction_sets_compiled"])
    if not torch.cuda.is_available():
        assert "reference, since" in done.stdout
