"""LaplacianFormer: a linear-attention backbone for dense prediction.

The attention and its functions need torch alone; the backbone is there, and registered, where mmengine is.
``lf_dense.export.Runtime`` runs exported models and needs neither.
"""

from importlib.util import find_spec as _find_spec

from . import export
from .allocator import keep_memory
from .threads import sleep_soon as _sleep_soon

__version__ = "0.1.0"

__all__ = [
    "LaplacianAttention",
    "LaplacianFormer",
    "LayerDecayOptimWrapperConstructor",
    "LayerDecayOptimizer",
    "__version__",
    "build_info",
    "export",
    "keep_memory",
    "laplacian_attention",
    "laplacian_kernel",
    "load_pretrained",
    "newton_schulz_inverse",
    "swap_backbone",
    "use_backend",
]

_sleep_soon()  # before torch

_missing = ""
if _find_spec("torch") is None:
    _missing = "torch: pip install torch"
else:
    from .attention import LaplacianAttention
    from .backends import use_backend
    from .backends.native import build_info
    from .functional import laplacian_attention, laplacian_kernel, newton_schulz_inverse

    if _find_spec("mmengine") is None:
        _missing = "mmengine: pip install onedl-mmengine (or mmengine)"
    else:
        from .frameworks import align_config_names as _align_config_names
        from .laplacianformer import LaplacianFormer
        from .swap.backbone import swap_backbone
        from .training.layer_decay import LayerDecayOptimWrapperConstructor
        from .weights.pretrained import load_pretrained

        LayerDecayOptimizer = LayerDecayOptimWrapperConstructor  # its name in version 0.1
        _align_config_names()

if _missing:

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(f"lf_dense.{name} needs {_missing}.")
        raise AttributeError(f"module 'lf_dense' has no attribute {name!r}")
