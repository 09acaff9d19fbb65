"""int8 for an exported graph: layers with weights in 8 bits, the attention in float.

Static quantisation by ONNX Runtime's tools, in the form that OpenVINO reads as well: pairs of QuantizeLinear
and and DequantizeLinear. Weights have a scale for each output channel. An activation has one scale, from the
smallest and largest values that the calibration images gave.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..files import find_images
from .preparing import Preparation, readable
from .runtime import session_options

# Nodes that may be layers. What stands inside a Scan is never quantised.
LAYERS = ("Conv", "Gemm", "MatMul")
CALIBRATION_IMAGES = 64
MEND = "take it out of the calibration's folder"


def calibration_images(source: str | Path, count: int = CALIBRATION_IMAGES) -> list[Path]:
    """At most ``count`` images of a folder, evenly from the list that is sorted by name.

    Raises:
        UsageError: there is no image, or one of these cannot be read.
    """
    images = find_images(source)
    picked = np.linspace(0, len(images) - 1, min(count, len(images))).round().astype(int)
    chosen = [images[index] for index in picked]
    # A file that is none is named at once, and not after the export.
    for path in chosen:
        readable(path, MEND)
    return chosen


class _Batches:
    """Images as the calibrater takes them, one at a time."""

    def __init__(self, images: Sequence[Path], preparation: Preparation) -> None:
        self._batches = self._prepared(images, preparation)

    @staticmethod
    def _prepared(images: Sequence[Path], preparation: Preparation) -> Iterator[npt.NDArray[np.float32]]:
        for path in images:
            yield preparation(readable(path, MEND)).batch

    def get_next(self) -> dict[str, npt.NDArray[np.float32]] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"image": batch}


def _layers(graph: Any) -> list[str]:
    """The names of the nodes with weights. Products of the attention's own matrices have none.

    The quantiser's option MatMulConstBOnly does not keep those out of the form with pairs: the inverse of the
    landmarks' matrix was in int8 with it.
    """
    weights = {tensor.name for tensor in graph.graph.initializer}
    return [node.name for node in graph.graph.node if node.op_type in LAYERS and node.input[1] in weights]


def _keep_float_elsewhere(model: Any, layers: set[str]) -> None:
    """Give other nodes than layers the tensor from before a pair: the attention's values, for one.

    The quantiser has every reader of a tensor read what one layer reads. A convolution's output is left in
    8 bits, since it is computed in 8 bits only then.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.name in layers or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        for index, name in enumerate(node.input):
            pair = makers.get(name)
            if pair is None or pair.op_type != "DequantizeLinear" or pair.input[0] not in makers:
                continue
            before = makers[pair.input[0]].input[0]
            if before not in makers or makers[before].op_type != "Conv":
                node.input[index] = before


def quantize(graph: Any, form: str, images: Sequence[Path], preparation: Preparation) -> Any:
    """A graph with its layers in int8.

    Args:
        graph: an ``onnx.ModelProto`` whose input is ``image``.
        form: ``"standard"`` or ``"operator"``.
        images: photographs of the kind that the model is for.
        preparation: from a photograph to the input.

    Returns:
        A new ``onnx.ModelProto``.

    Raises:
        UsageError: onnxruntime is not installed, or an image cannot be read.
    """
    try:
        import onnx
        import onnxruntime
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.calibrate import MinMaxCalibrater
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
        from onnxruntime.quantization.quant_utils import load_model_with_shape_infer
    except ModuleNotFoundError as error:
        raise UsageError(f"int8 needs {error.name}: pip install 'lf_dense[export]'.") from None

    class Calibrater(MinMaxCalibrater):
        """Knows our operators, and fuses what the runtime fuses, which leaves the ranges as they are."""

        def create_inference_session(self) -> None:
            options = session_options(form == "operator")
            self.infer_session = onnxruntime.InferenceSession(
                self.augmented_model_path, options, providers=["CPUExecutionProvider"]
            )

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "float.onnx")
        onnx.save(graph, str(source))
        calibrater = Calibrater(source, LAYERS, str(Path(folder, "calibration.onnx")))
        calibrater.augment_graph()
        calibrater.create_inference_session()
        calibrater.collect_data(_Batches(images, preparation))
        quantizer = QDQQuantizer(
            load_model_with_shape_infer(source),
            True,
            False,
            QuantType.QInt8,
            QuantType.QUInt8,
            calibrater.compute_data(),
            _layers(graph),
            [],
            list(LAYERS),
            {"OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )
        quantizer.quantize_model()
        _keep_float_elsewhere(quantizer.model.model, set(_layers(graph)))
        # Pairs were appended, and nodes of a graph stand in the order in which they run.
        quantizer.model.topological_sort()
        return quantizer.model.model
