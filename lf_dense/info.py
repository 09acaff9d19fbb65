"""What is installed and which backend each function would use: ``python -m lf_dense.info``."""

from __future__ import annotations

import platform

import torch

from . import __version__, backends
from .backends import native

FUNCTIONS = ("laplacian_kernel", "newton_schulz_inverse", "laplacian_attention")


def _devices() -> list[torch.device]:
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *(gpus or [torch.device("cuda")])]


def _choice(device: torch.device) -> str:
    requested = backends.requested_backend()
    if requested == "reference":
        return "reference, since it is asked for"
    obstacle = native.obstacle(device)
    if obstacle is None:
        return "native"
    return (
        f"{'an error, since native is asked for and' if requested == 'native' else 'reference, since'} "
        f"{obstacle}"
    )


def report() -> str:
    """What ``python -m lf_dense.info`` prints: versions, the build, each function's backend and why."""
    build = native.build_info()
    rows = [
        ("lf_dense", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("backend asked for", backends.requested_backend()),
    ]
    if build["built"]:
        rows += [
            ("compiler", build["compiler"]),
            ("built against torch", f"{build['torch']}, serves {build['torch_target']} and newer"),
            (
                "CUDA operators",
                f"{build['cuda']}, for {build['cuda_architectures']}" if build["cuda"] else "not built",
            ),
            (
                "instruction sets",
                (
                    f"{', '.join(build['instruction_sets_compiled'])} compiled; {build['instruction_set']} "
                    "in use"
                ),
            ),
        ]
    else:
        rows.append(("native operators", "not built"))
    for device in _devices():
        name = (
            f" ({torch.cuda.get_device_name(device)})"
            if device.type == "cuda" and device.index is not None
            else ""
        )
        rows += [(f"{function} on {device}{name}", _choice(device)) for function in FUNCTIONS]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


if __name__ == "__main__":
    print(report())
