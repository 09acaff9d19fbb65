"""Which test files are begun first."""

# Those that take minutes, the longest first: begun last, one of them would keep a process busy alone.
LONG = (
    "training/test_end_to_end.py",
    "training/test_configs.py",
    "export/test_exporting.py",
    "export/test_graphs.py",
    "project/test_site.py",
    "swap/test_survey.py",
    "benchmark/test_kernels.py",
    "tiling/test_predicting.py",
    "project/test_build.py",
    "training/test_distributed.py",
    "backends/test_layers.py",
    "export/test_quantizing.py",
)


def rank(name: str) -> int:
    """A file's place, by its folder and name."""
    return LONG.index(name) if name in LONG else len(LONG)
