"""The CUDA sources compiled by g++, so that their logic is tested without a GPU.

cuda_emulation/emulation.h stands in for CUDA: each thread is a fibre.
"""

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from lf_dense.backends import native
from support import ROOT

LIBRARY = "lf_dense_emulated"
EMULATION = ROOT / "tests" / "support" / "cuda_emulation"
SOURCES = (
    "schemas.cpp",
    "cuda/newton_schulz_inverse.cu",
    "cuda/laplacian_kernel.cu",
    "cuda/laplacian_attention.cu",
)


def cuda_headers():
    """The toolkit's include folder, or None."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    for home in filter(None, homes):
        if Path(home, "include", "cuda_fp16.h").exists():
            return Path(home, "include")
    return None


@functools.cache
def build():
    """Compile and load ``torch.ops.lf_dense_emulated`` once, and return its path.

    The same sources are not compiled again.
    """
    headers, compiler = cuda_headers(), os.environ.get("CXX", "g++")
    if headers is None or shutil.which(shlex.split(compiler)[0]) is None:
        pytest.skip("emulating the CUDA sources needs the toolkit's headers and a C++ compiler")
    torch_folder = Path(torch.__file__).parent
    common = f"{compiler} -std=c++20 -O2 -fPIC -fvisibility=hidden {os.environ.get('LF_DENSE_CXXFLAGS', '')}"
    common += f" -DLF_LIBRARY={LIBRARY} -DLF_CUDA_KEY=CPU -DTORCH_TARGET_VERSION=0x020b000000000000"
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
    return library


def run(command):
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr[-4000:]}"


def shared_memory():
    """Bytes that a block of the emulated GPU may ask for."""
    return int(os.environ.get("LF_EMULATION_SHARED_BYTES", 232448))


def install(monkeypatch):
    """Let the native backend be the emulated operators, whatever device is asked about."""
    build()
    native.register(LIBRARY)
    monkeypatch.setattr(native, "LIBRARY", LIBRARY)
    monkeypatch.setattr(native, "obstacle", lambda *unused: None)
    monkeypatch.setattr(native, "fused_head_dims", lambda *unused: native.fused_in(shared_memory()))
