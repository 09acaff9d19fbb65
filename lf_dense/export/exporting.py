"""Export, checked: a file is written where the runtime that will read it agrees with PyTorch."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch import Tensor

from ..errors import UsageError, one_line
from ..files import replace_all
from ..frameworks import framework_of
from ..training.prediction import build_model, dataset_meta
from .describing import describe
from .graphs import FORMS, onnx_graph, torch_graph
from .metadata import read_metadata
from .parts import Part, choose_part, reference_outputs
from .preparing import readable
from .quantizing import MEND, calibration_images, quantize
from .tracing import traceable

FORMATS = {"onnx": ".onnx", "openvino": ".xml", "torch_export": ".pt2", "aoti": ".pt2"}
# Those that lf_dense.export.Runtime runs.
RUNTIME_FORMATS = ("onnx", "openvino")
# (batch, height, width): odd sides, a batch, a map with fewer cells than landmarks, a detector's image.
CHECKED_SIZES = ((1, 224, 224), (2, 321, 259), (1, 64, 96), (1, 512, 512), (1, 800, 1333))
# torch.export guards maps of one row or column away, so that such graphs take no image as small as that.
SMALLEST_OF_TORCH = 160
# Of the largest value of an output, in float32.
TOLERANCE = 1e-4
# Of int8, the root mean square over an output's own, on photographs; and the share of labels that differ.
INT8_TOLERANCE = 0.3
INT8_CHECKED = 4

Floats = npt.NDArray[np.floating[Any]]
Runner = Callable[[npt.NDArray[np.float32]], list[npt.NDArray[Any]]]


class Check(NamedTuple):
    """How far an exported model is from PyTorch at one size: the largest difference of any output, relative
    to that output's largest value (of int8, the root mean square of both)."""

    what: str
    error: float


def _largest(difference: Floats, expected: Floats) -> float:
    return float(np.abs(difference).max() / max(np.abs(expected).max(), 1e-30))


def _root_mean_square(difference: Floats, expected: Floats) -> float:
    return float(np.sqrt(np.square(difference).mean() / max(np.square(expected).mean(), 1e-30)))


class Bound(NamedTuple):
    """How far an exported model may be from PyTorch.

    Attributes:
        name: of the error.
        size: of a difference, relative to the output.
        allowed: the largest error.
        wrong_labels: the share of labels that counts as that error; where two classes are level, rounding
            decides.
        mend: what to do where a model is off by more.
    """

    name: str
    size: Callable[[Floats, Floats], float]
    allowed: float
    wrong_labels: float
    mend: str


SAME = Bound(
    "relative error",
    _largest,
    TOLERANCE,
    1e-3,
    "where a layer computes sizes in Python, --size HEIGHT WIDTH exports the model for one size.",
)
INT8 = Bound(
    "int8, relative RMS error",
    _root_mean_square,
    INT8_TOLERANCE,
    INT8_TOLERANCE,
    "give images of the kind that the model was trained on, or export without --int8.",
)


def _apart(wanted: Tensor, got: npt.NDArray[Any], bound: Bound) -> float:
    expected = wanted.numpy()
    if got.shape != expected.shape:
        return float("inf")
    if not np.issubdtype(expected.dtype, np.floating):
        return float(np.mean(got != expected)) * bound.allowed / bound.wrong_labels
    if expected.size == 0:
        return 0.0
    exact = expected.astype(np.float64)
    return bound.size(got - exact, exact)


def _boxes_apart(wanted: Sequence[Tensor], got: Sequence[npt.NDArray[Any]]) -> float:
    """How far the boxes of two lists are apart, as parts of the largest coordinate.

    Each box is held against the nearest of its class: where two scores are level, their order is rounding's.
    """
    rows = []
    for boxes, scores, labels in (tuple(part.numpy() for part in wanted), got):
        size = max(float(np.abs(wanted[0].numpy()).max(initial=0)), 1.0)
        rows.append(np.column_stack([boxes / size, scores, labels]).astype(np.float64))
    if len(rows[0]) != len(rows[1]):
        return float("inf")
    if not len(rows[0]):
        return 0.0
    apart = np.abs(rows[0][:, None] - rows[1][None]).max(-1)
    return float(max(apart.min(0).max(), apart.min(1).max()))


def check(part: Part, run: Runner, images: dict[str, Tensor], bound: Bound = SAME) -> list[Check]:
    """Run an exported model and its module on the same images, batches by what they are called."""
    checks = []
    for what, image in images.items():
        wanted, got = reference_outputs(part.module, image), run(image.numpy())
        if part.postprocess["kind"] == "boxes":
            worst = _boxes_apart(wanted, got)
        else:
            worst = max(_apart(*pair, bound) for pair in zip(wanted, got))
        checks.append(Check(what, float("inf") if np.isnan(worst) else worst))
    return checks


def _images(
    channels: int, size: tuple[int, int] | None, batch: int | None, smallest: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    if size:
        shapes: Sequence[tuple[int, int, int]] = ((batch or 1, *size),)
    else:
        shapes = [
            (batch or count, max(height, smallest), max(width, smallest + 32))
            for count, height, width in CHECKED_SIZES
        ]
    return {
        f"{count} x {height} x {width}": torch.randn(count, channels, height, width, generator=generator)
        for count, height, width in shapes
    }


def _write_onnx(model: Any, target: Path) -> None:
    import onnx

    onnx.checker.check_model(model)
    onnx.save(model, str(target))


def _write_openvino(model: Any, form: str, target: Path) -> None:
    try:
        import openvino
    except ModuleNotFoundError:
        raise UsageError("exporting to OpenVINO needs openvino: pip install 'lf_dense[export]'.") from None
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "model.onnx")
        _write_onnx(model, source)
        core = openvino.Core()
        if form == "operator":
            from .libraries import register_openvino

            register_openvino(core)
        openvino.save_model(core.read_model(source), target, compress_to_fp16=False)


def _write_graph(graph: Any, format_: str, form: str, target: Path) -> None:
    if format_ == "onnx":
        _write_onnx(graph, target)
    else:
        _write_openvino(graph, form, target)


def _write_aoti(program: torch.export.ExportedProgram, target: Path) -> None:
    import torch._inductor

    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(target))
    except Exception as error:  # a compiler of graphs fails in every way there is
        reason = str(error).strip().partition("\n")[0][:200]
        raise UsageError(
            f"AOTInductor cannot compile this graph ({reason}): --size HEIGHT WIDTH exports it for one size "
            "(--traceback shows more)."
        ) from error


def _runner(path: Path, format_: str) -> Runner:
    """What runs an exported file on a batch."""
    if format_ in RUNTIME_FORMATS:
        from .runtime import Runtime

        return Runtime(path).run
    if format_ == "torch_export":
        call: Any = torch.export.load(str(path)).module()
    else:
        call = torch._inductor.aoti_load_package(str(path))

    def run(batch: npt.NDArray[np.float32]) -> list[npt.NDArray[Any]]:
        with torch.no_grad():
            result = call(torch.from_numpy(batch))
        return [result.numpy()] if isinstance(result, Tensor) else [part.numpy() for part in result]

    return run


def _repeated(run: Runner) -> Runner:
    """A runner that first has its runtime make the graph of the batch's shape."""
    from .runtime import BATCHES_OF_A_SHAPE

    def run_again(batch: npt.NDArray[np.float32]) -> list[npt.NDArray[Any]]:
        for _ in range(BATCHES_OF_A_SHAPE):
            run(batch)
        return run(batch)

    return run_again


def export_model(
    config: Config,
    checkpoint: str | None,
    out: str | Path,
    format: str = "onnx",
    form: str = "standard",
    part: str = "model",
    output: str | None = None,
    size: tuple[int, int] | None = None,
    image: str | Path | None = None,
    int8: str | Path | None = None,
    tell: Callable[[str], None] = print,
) -> list[Check]:
    """Export a model, run what was exported, and write it where it agrees with PyTorch.

    Beside ``out`` stands a JSON file of the same stem, which ``lf_dense.export.Runtime`` reads; an OpenVINO
    model has its weights in a ``.bin``.

    Args:
        config: of any of the three frameworks.
        checkpoint: path or address, which has to cover the whole model; None exports random weights.
        out: the file to write; its suffix is the format's, one of ``FORMATS``.
        format: a key of ``FORMATS``.
        form: ``"standard"``: operators that every runtime has. ``"operator"``: ours for the attention and,
            without ``int8``, for the layers around it; for runtimes that load their library.
        part: ``"model"``, or ``"backbone"`` alone.
        output: one of ``parts.OUTPUTS`` of the task; None takes the first.
        size: the (height, width) of a model that takes no other; None makes height, width and batch dynamic.
        image: a photograph to check besides, prepared as the model's test pipeline does.
        int8: a folder of images to calibrate with: layers with weights are in int8, the attention is not.
        tell: gets a line for each size that was checked.

    Returns:
        What was checked.

    Raises:
        UsageError: an argument does not fit, a model of this kind is not exported, or the exported model is
            further than ``TOLERANCE`` (int8: ``INT8_TOLERANCE``) from PyTorch; nothing is written then.
    """
    out = Path(out)
    _check_arguments(out, format, form, int8)
    pixels = readable(image, "give a photograph to check with") if image else None
    calibration = calibration_images(int8) if int8 else []
    scope = framework_of(config).scope
    model, loaded = build_model(config, checkpoint)
    if checkpoint is None:
        message = "no checkpoint was given: the exported model has random weights."
        print_log(message, logger="current", level=logging.WARNING)
    meta = dataset_meta(config, loaded, checkpoint or "a checkpoint") if part == "model" else {"classes": []}
    chosen = choose_part(model.eval(), scope, part, output)
    description = describe(chosen, config, meta, form, size, "int8" if int8 else "float32")
    channels = getattr(model.backbone, "in_channels", 3)
    # Final boxes are those of one image.
    batch = 1 if description["postprocess"]["kind"] == "boxes" else None
    if int8 and batch:
        raise UsageError(
            "int8 is not for a detector whose graph ends in boxes: leave --output out, and the runtime "
            "decodes the maps."
        )
    with tempfile.TemporaryDirectory(dir=_existing(out.parent), prefix=f".{out.stem}.") as folder:
        target = Path(folder, out.name)
        traced = traceable(chosen.module)
        if format in RUNTIME_FORMATS:
            graph = onnx_graph(traced, form, channels, size, chosen.outputs, batch, bool(int8))
            _write_graph(graph, format, form, target)
        else:
            program = torch_graph(traced, form, channels, size, batch)
            if format == "torch_export":
                torch.export.save(program, str(target))
            else:
                _write_aoti(program, target)
        target.with_suffix(".json").write_text(json.dumps(description, indent=1))
        prepared = read_metadata(target.with_suffix(".json")).preparation
        photograph = (
            {} if pixels is None else {Path(str(image)).name: torch.from_numpy(prepared(pixels).batch)}
        )
        smallest = 0 if format in RUNTIME_FORMATS else SMALLEST_OF_TORCH
        images = _images(channels, size, batch, smallest) | photograph
        run = _runner(target, format)
        checks = check(chosen, run, images)
        if format == "openvino" and form == "standard" and not size:
            what = list(images)[1]
            checks += check(chosen, _repeated(run), {f"{what}, repeated": images[what]})
        _judge(checks, SAME, tell)
        if int8:
            _write_graph(quantize(graph, form, calibration, prepared), format, form, target)
            images = {
                path.name: torch.from_numpy(prepared(readable(path, MEND)).batch)
                for path in calibration[:INT8_CHECKED]
            } | photograph
            quantised = check(chosen, _runner(target, format), images, INT8)
            _judge(quantised, INT8, tell)
            checks += quantised
        replace_all(Path(folder), out.parent)
    return checks


def _check_arguments(out: Path, format_: str, form: str, int8: str | Path | None) -> None:
    if format_ not in FORMATS:
        raise UsageError(f"the format {format_!r} does not exist: use one of {', '.join(FORMATS)}.")
    if form not in FORMS:
        raise UsageError(f"the form {form!r} does not exist: use one of {', '.join(FORMS)}.")
    if out.suffix != FORMATS[format_]:
        raise UsageError(f"{out} does not end in {FORMATS[format_]}, as a file of the format {format_} does.")
    if int8 and format_ not in RUNTIME_FORMATS:
        raise UsageError(f"int8 is not there for {format_}: use one of {', '.join(RUNTIME_FORMATS)}.")
    if int8 and (format_, form) == ("openvino", "operator"):
        # Measured with 2026.4.1; what feeds the operator its landmarks is wrong there, and only there.
        raise UsageError(
            "OpenVINO computes wrong landmarks for our operator in an int8 model: use --attention standard, "
            "or --format onnx."
        )


def _judge(checks: list[Check], bound: Bound, tell: Callable[[str], None]) -> None:
    """Tell of each check, and refuse a model that is off by more than is allowed."""
    for row in checks:
        tell(f"{row.what:<24} {bound.name} {row.error:.1e}")
    worst = max(checks, key=lambda row: row.error)
    if worst.error > bound.allowed:
        raise UsageError(
            f"the exported model is off by {worst.error:.1e} ({bound.name}) at {worst.what}, and "
            f"{bound.allowed:g} is allowed, so nothing is written: {bound.mend}"
        )


def _existing(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made ({one_line(error)}): give another --out.") from None
    return folder
