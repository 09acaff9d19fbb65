"""The CUDA sources compiled by g++ against cuda_emulation/emulation.h, one fibre per thread: their logic tested without a GPU."""

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "tests" / "cuda_emulation"
SOURCES = ("schemas.cpp", "cuda/newton_schulz_inverse.cu", "cuda/laplacian_kernel.cu", "cuda/laplacian_attention.cu")


def cuda_headers():
    """The toolkit's include folder, or None."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    return next((Path(home, "include") for home in homes if home and Path(home, "include", "cuda_fp16.h").exists()), None)


@functools.cache
def build():
    """Compile and load the library ``torch.ops.lf_dense_emulated``; what was compiled from the same sources is taken again."""
    headers, compiler = cuda_headers(), os.environ.get("CXX", "g++")
    if headers is None or shutil.which(shlex.split(compiler)[0]) is None:
        pytest.skip("the CUDA sources are emulated where the toolkit's headers and a C++ compiler are there")
    torch_folder = Path(torch.__file__).parent
    common = f"{compiler} -std=c++20 -O2 -fPIC -fvisibility=hidden {os.environ.get('LF_DENSE_CXXFLAGS', '')}"
    common += " -DLF_LIBRARY=lf_dense_emulated -DLF_CUDA_KEY=CPU -DTORCH_TARGET_VERSION=0x020b000000000000"
    common += f" -I{EMULATION} -isystem {headers} -isystem {torch_folder / 'include'}"
    content = [path.read_bytes() for path in sorted([*(ROOT / "ops").rglob("*.*"), *EMULATION.glob("*.h")])]
    key = hashlib.sha256(b"".join([common.encode(), torch.__version__.encode(), *content])).hexdigest()[:16]
    folder = ROOT / "build" / "cuda_emulation" / key
    library = folder / "operators.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        objects = []
        for source in SOURCES:
            objects.append(str(folder / (Path(source).name + ".o")))
            emulate = "-DLF_CUDA_EMULATION" if source.endswith(".cu") else ""
            run(f"{common} {emulate} -x c++ -c {ROOT / 'ops' / source} -o {objects[-1]}")
        partial = folder / f"operators.{os.getpid()}.so"
        run(f"{common} -shared {' '.join(objects)} -L{torch_folder / 'lib'} -ltorch_cpu -lc10 -o {partial}")
        partial.replace(library)
    torch.ops.load_library(str(library))
    return torch.ops.lf_dense_emulated


def run(command):
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr[-4000:]}"


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale):
        ctx.save_for_backward(x, y)
        ctx.scale = scale
        return build().laplacian_kernel(x, y, scale)

    @staticmethod
    def backward(ctx, grad):
        return *build().laplacian_kernel_backward(grad, *ctx.saved_tensors, ctx.scale), None


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w, iters, eps):
        inverse = build().newton_schulz_inverse(w, iters, eps)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        return -inverse.mT @ grad @ inverse.mT, None, None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, landmarks, scale, iters, eps, tau):
        out, *saved = build().laplacian_attention(q, k, v, landmarks, scale, iters, eps, tau)
        ctx.save_for_backward(q, k, v, landmarks, *saved)
        ctx.constants = scale, tau
        return out

    @staticmethod
    def backward(ctx, grad):
        grads = build().laplacian_attention_backward(grad, *ctx.saved_tensors, *ctx.constants)
        return *grads, None, None, None, None


def install(monkeypatch):
    """Let ``lf_dense.functional`` call the emulated operators where it would call the native ones."""
    from lf_dense import native

    build()

    def kernel(x, y, scale):
        out = _Kernel.apply(native._as_four(x), native._as_four(y), scale)
        return out.reshape(*x.shape[:-1], y.shape[-2])

    def inverse(w, iters, eps):
        return _Inverse.apply(w.to(native.compute_dtype(w.dtype)), iters, eps).to(w.dtype)

    monkeypatch.setattr(native, "obstacle", lambda *args: None)
    monkeypatch.setattr(native, "laplacian_kernel", kernel)
    monkeypatch.setattr(native, "newton_schulz_inverse", inverse)
    monkeypatch.setattr(native, "laplacian_attention", _Attention.apply)
