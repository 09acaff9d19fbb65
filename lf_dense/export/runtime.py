"""Exported models, run by ONNX Runtime or OpenVINO; neither torch nor the mm packages are needed."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import UsageError, reason_of
from . import decoding, drawing
from .decoding import Floats, Shape
from .metadata import Metadata, is_whole, read_metadata
from .preparing import (
    Pixels,
    Prepared,
    read_image,
)

MIN_ONNXRUNTIME = (1, 19)
MIN_OPENVINO = (2025, 0)
# Batches of one shape in a row after which OpenVINO gets a graph of that shape: compiling takes seconds.
BATCHES_OF_A_SHAPE = 3


class _Engine(Protocol):
    """A model that is loaded; sides that are not known are None, and a shape that is not known is ()."""

    inputs: dict[str, Shape]
    outputs: dict[str, Shape]

    def __call__(self, batch: Floats) -> list[npt.NDArray[Any]]: ...


def _check_version(package: str, found: str, wanted: tuple[int, int], extra: str) -> None:
    parts = tuple(int(part) for part in re.findall(r"\d+", found)[:2])
    if parts < wanted:
        least = ".".join(map(str, wanted))
        raise UsageError(
            f"{package} is {found}, and exported models need {least} or newer: pip install -U "
            f"'lf_dense[{extra}]'."
        )


def _not_installed(package: str, path: Path, extra: str) -> UsageError:
    return UsageError(f"{package} is not installed, which runs {path.name}: pip install 'lf_dense[{extra}]'.")


def _cannot_load(path: Path, package: str, version: str, error: Exception) -> UsageError:
    return UsageError(
        f"{package} {version} cannot load {path} ({_short_reason(error)}): give a model that tools/export.py "
        f"wrote, or install a newer {package}."
    )


def _short_reason(error: Exception) -> str:
    reason = reason_of(error)
    return reason if len(reason) <= 300 else reason[:297] + "..."


def session_options(own_operators: bool) -> Any:
    """``onnxruntime.SessionOptions`` for an exported model, with our operators where it has those.

    Raises:
        UsageError: the operators' library is not there, or this onnxruntime does not take it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Images differ in size, and a plan of memory for each would cost more memory than it saves.
    options.enable_mem_pattern = False
    # What goes wrong is raised; the log would say it a second time.
    options.log_severity_level = 4
    if own_operators:
        from .libraries import register_onnxruntime

        register_onnxruntime(options)
    return options


class _OnnxRuntime:
    def __init__(
        self,
        path: Path,
        metadata: Metadata,
        device: str,
        threads: int | None,
        providers: Sequence[Any] | None,
    ) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise _not_installed("onnxruntime", path, "runtime") from None
        _check_version("onnxruntime", onnxruntime.__version__, MIN_ONNXRUNTIME, "runtime")
        chosen = list(providers or {"cpu": [], "cuda": ["CUDAExecutionProvider"]}.get(device, [device]))
        there = onnxruntime.get_available_providers()
        for provider in chosen:
            name = provider if isinstance(provider, str) else provider[0]
            if name not in there:
                raise UsageError(
                    f"this onnxruntime has no {name!r}: use device='cpu', or providers of {', '.join(there)}."
                )
        if not providers:
            chosen.append("CPUExecutionProvider")
        options = session_options(metadata.own_operators)
        if threads:
            options.intra_op_num_threads = threads
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=chosen)
        except Exception as error:
            raise _cannot_load(path, "onnxruntime", onnxruntime.__version__, error) from error
        if device == "cuda" and not providers and "CUDAExecutionProvider" not in self.session.get_providers():
            raise UsageError("this onnxruntime finds no CUDA device that it can use: use device='cpu'.")
        self.inputs = {node.name: self._shape(node.shape) for node in self.session.get_inputs()}
        self.outputs = {node.name: self._shape(node.shape) for node in self.session.get_outputs()}
        self.names, self.input_name = list(metadata.outputs), metadata.input_name

    @staticmethod
    def _shape(sides: Sequence[Any]) -> Shape:
        return tuple(side if isinstance(side, int) else None for side in sides)

    def __call__(self, batch: Floats) -> list[npt.NDArray[Any]]:
        return self.session.run(self.names, {self.input_name: batch})


@functools.cache
def _openvino_core() -> Any:
    """One for the process, which stays.

    Each has its CPU plugin give the thread a stack for signals, and takes the memory back when it goes: with
    several, a later signal is handled on memory that is someone else's by then.
    """
    import openvino

    return openvino.Core()


class _OpenVino:
    def __init__(
        self, path: Path, metadata: Metadata, device: str, threads: int | None, precision: str
    ) -> None:
        try:
            import openvino
        except ImportError:
            raise _not_installed("openvino", path, "runtime-openvino") from None
        _check_version("openvino", openvino.__version__, MIN_OPENVINO, "runtime-openvino")
        core = _openvino_core()
        there = core.available_devices
        if device.upper().split(".")[0] not in {name.split(".")[0] for name in there}:
            raise UsageError(f"this openvino has no device {device!r}: use one of {', '.join(there)}.")
        if metadata.own_operators:
            from .libraries import register_openvino

            register_openvino(core)
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision}
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        self._compile = functools.partial(core.compile_model, device_name=device.upper(), config=options)
        try:
            self._model = core.read_model(str(path))
            self._compiled = self._compile(self._model)
        except Exception as error:
            raise _cannot_load(path, "openvino", openvino.__version__.split("-")[0], error) from error
        self.request: Any = None
        self.inputs = self._ports(self._compiled.inputs)
        self.outputs = self._ports(self._compiled.outputs)
        self.names, self.input_name = metadata.outputs, metadata.input_name
        # Layers of ours take maps as they lie, and lose nothing in a graph of any shape.
        self._gains_by_shape = self._model.is_dynamic() and not metadata.own_operators
        self._graphs_shape: Shape = ()  # of self.request, () where it takes any
        self._shape: Shape = ()  # of the batch before, and how many there were in a row
        self._repeats = 0

    @staticmethod
    def _ports(ports: Sequence[Any]) -> dict[str, Shape]:
        return {
            name: ()
            if port.partial_shape.rank.is_dynamic
            else tuple(side.get_length() if side.is_static else None for side in port.partial_shape)
            for port in ports
            for name in port.get_names()
        }

    def _choose_graph(self, shape: Shape) -> None:
        """Have ``self.request`` take a batch of this shape.

        Around a convolution OpenVINO moves maps to another layout, and so twice copies them, unless it knows
        their shape when it compiles. A shape that comes again and again therefore gets a graph of its own.
        """
        self._repeats = self._repeats + 1 if shape == self._shape else 1
        self._shape = shape
        if self._graphs_shape and shape != self._graphs_shape:
            self.request, self._graphs_shape = None, ()
        elif not self._graphs_shape and self._gains_by_shape and self._repeats > BATCHES_OF_A_SHAPE:
            model = self._model.clone()
            model.reshape({self.input_name: shape})
            # The maps of both graphs at once would take twice the memory.
            self.request = None
            self._compiled.release_memory()
            self.request, self._graphs_shape = self._compile(model).create_infer_request(), shape
        if self.request is None:
            self.request = self._compiled.create_infer_request()

    def __call__(self, batch: Floats) -> list[npt.NDArray[Any]]:
        self._choose_graph(batch.shape)
        # A compiled model that is called directly keeps hold of the batch, and may write into it later.
        results = self.request.infer({self.input_name: batch})
        return [results[name] for name in self.names]


class Runtime:
    """An exported model, ready for images.

    An OpenVINO model of any size and standard operators is compiled again when a fourth batch of one shape
    comes in a row: that batch takes seconds, and those after it little more than half the time.

    Args:
        path: ``model.onnx`` for ONNX Runtime, or ``model.xml`` (``model.bin`` beside it) for OpenVINO;
            ``model.json`` lies beside either.
        device: ``"cpu"``; ``"cuda"`` for ONNX Runtime, or the name of one of OpenVINO's devices.
        threads: of one model; None leaves it to the runtime, which takes all cores.
        providers: ONNX Runtime's execution providers, in place of those of ``device``.
        precision: OpenVINO's, ``"f32"``, ``"bf16"`` or ``"f16"``. The attention overflows in less than f32.

    Raises:
        UsageError: a file is missing or damaged, the two do not fit, or the runtime is not there.
    """

    def __init__(
        self,
        path: str | Path,
        device: str = "cpu",
        threads: int | None = None,
        providers: Sequence[Any] | None = None,
        precision: str = "f32",
    ) -> None:
        path = self.path = Path(path)
        if path.suffix not in (".onnx", ".xml"):
            raise UsageError(f"{path} is no exported model: give a file that ends with .onnx or .xml.")
        if not path.is_file():
            raise UsageError(f"{path} is not there: give a model that tools/export.py wrote.")
        if threads is not None and not is_whole(threads):
            raise UsageError(f"threads is {threads!r}: give a whole number from 1, or leave it out.")
        if precision not in ("f32", "bf16", "f16"):
            raise UsageError(f"precision is {precision!r}: use f32, bf16 or f16.")
        self._metadata = read_metadata(path.with_suffix(".json"))
        if path.suffix == ".onnx":
            if precision != "f32":
                raise UsageError(
                    "ONNX Runtime runs a model in the precision that it has: leave precision out, or give an "
                    ".xml."
                )
            self._engine: _Engine = _OnnxRuntime(path, self._metadata, device, threads, providers)
        else:
            if providers:
                raise UsageError("OpenVINO has no providers: leave them out, or give an .onnx.")
            if not path.with_suffix(".bin").is_file():
                raise UsageError(
                    f"{path.with_suffix('.bin')} is not there, which holds the model's weights: keep it "
                    f"beside {path.name}."
                )
            self._engine = _OpenVino(path, self._metadata, device, threads, precision)
        self._check_ports()

    def _check_ports(self) -> None:
        """Compare the model's input and outputs with the metadata, as far as their shapes are known."""
        engine, metadata = self._engine, self._metadata
        if set(engine.inputs) != {metadata.input_name}:
            raise UsageError(
                f"{self.path} takes {', '.join(map(repr, engine.inputs)) or 'nothing'}, and its metadata "
                f"name {metadata.input_name!r}: keep the two files of one export together, or export the "
                "model again."
            )
        missing = [name for name in metadata.outputs if name not in engine.outputs]
        if missing:
            raise UsageError(
                f"{self.path} has no output {', '.join(map(repr, missing))}, which its metadata name: keep "
                "the two files of one export together, or export the model again."
            )
        size: Shape = metadata.preparation.fixed_size or (None, None)
        taken = engine.inputs[metadata.input_name]
        if taken and not (
            len(taken) == 4
            and taken[1] in (3, None)
            and all(a == b or (a is None and b is not None) for a, b in zip(taken[2:], size))
        ):
            sides = [str(side or "any") for side in (*taken, *size)]
            raise UsageError(
                f"{self.path} takes an input of {' x '.join(sides[:-2])}, and its metadata say images of "
                f"{' x '.join(sides[-2:])}: keep the two files of one export together, or export the model "
                "again."
            )
        given = [engine.outputs[name] for name in metadata.outputs]
        decoding.check_shapes(metadata.outputs, given, metadata.shapes, str(self.path))

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names, in the order of their numbers."""
        return self._metadata.classes

    @property
    def task(self) -> str:
        """``"detection"``, ``"segmentation"``, ``"classification"`` or ``"backbone"``."""
        return self._metadata.task

    def run(self, batch: Floats) -> list[npt.NDArray[Any]]:
        """Run the network alone.

        Args:
            batch: ``(B, 3, H, W)`` float32, prepared.

        Returns:
            The outputs, in the order of the metadata.

        Raises:
            UsageError: the model does not run on this, or its outputs do not fit its metadata.
        """
        if not isinstance(batch, np.ndarray) or batch.ndim != 4 or batch.dtype != np.float32:
            shape = f"{batch.dtype} {batch.shape}" if isinstance(batch, np.ndarray) else type(batch).__name__
            raise UsageError(f"the batch is {shape}: give a numpy array of float32, (B, 3, H, W).")
        try:
            outputs = self._engine(np.ascontiguousarray(batch))
        except Exception as error:
            raise UsageError(
                f"{self.path} does not run on a batch of {' x '.join(map(str, batch.shape))} "
                f"({_short_reason(error)}): give what it was exported for."
            ) from error
        shapes = [output.shape for output in outputs]
        decoding.check_shapes(self._metadata.outputs, shapes, self._metadata.shapes, str(self.path))
        for name, output in zip(self._metadata.outputs, outputs):
            if output.size and output.dtype.kind == "f" and np.isnan(output.min()):
                raise UsageError(
                    f"{self.path} gives values in {name!r} that are no numbers: its weights are damaged, or "
                    "its precision is too low, so use precision='f32'."
                )
        return outputs

    def predict(self, image: str | Path | Pixels, score_thr: float = 0.3) -> dict[str, Any]:
        """Predict one image.

        Args:
            image: a file, or ``(H, W, 3)`` uint8 BGR pixels.
            score_thr: detections below it are left out.

        Returns:
            ``height`` and ``width``, and by the task

            - detection: ``predictions``, best first, each with ``class``, ``score`` and ``bbox`` (x1, y1, x2,
              y2 in the image's pixels, to the hundredth);
            - segmentation: ``classes``, each class's share of the pixels, and ``labels``, the map of class
              numbers, ``(height, width)`` uint8 (uint16 for more than 256 classes);
            - classification: ``predictions``, the five best, each with ``class`` and ``score``;
            - backbone: ``maps``, a list of ``(1, C, H, W)`` float32.

        Raises:
            UsageError: the image cannot be read or does not fit the model, or its outputs do not fit.
        """
        pixels = self._pixels(image)
        prepared = self._metadata.preparation(pixels)
        outputs = self.run(prepared.batch)
        height, width = prepared.original
        make = {
            "detection": self._detections,
            "segmentation": self._segmentation,
            "classification": self._classification,
            "backbone": lambda prepared, outputs, score_thr: {"maps": outputs},
        }[self.task]
        return {"height": height, "width": width, **make(prepared, outputs, score_thr)}

    def draw(
        self, image: str | Path | Pixels, result: dict[str, Any] | None = None, score_thr: float = 0.3
    ) -> Pixels:
        """Draw what ``predict`` gave over its image.

        Args:
            image: a file, or ``(H, W, 3)`` uint8 BGR pixels.
            result: of ``predict`` for this image; None predicts it first.
            score_thr: detections below it are not drawn.

        Returns:
            ``(H, W, 3)`` uint8 BGR pixels; a backbone's maps leave the image as it is.

        Raises:
            UsageError: as ``predict``.
        """
        pixels = self._pixels(image)
        if result is None:
            result = self.predict(pixels, score_thr)
        colours = self._metadata.palette or drawing.palette(len(self.classes))
        if self.task == "detection":
            found = [entry for entry in result["predictions"] if entry["score"] >= score_thr]
            return drawing.draw_boxes(pixels, found, dict(zip(self.classes, colours)))
        if self.task == "segmentation":
            return drawing.draw_labels(pixels, result["labels"], self.classes, colours)
        if self.task == "classification":
            return drawing.draw_scores(pixels, result["predictions"])
        return pixels.copy()

    @staticmethod
    def _pixels(image: str | Path | Pixels) -> Pixels:
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise UsageError(
                    f"the image is an array of {image.dtype} {image.shape}: give uint8 pixels, (H, W, 3), in "
                    "the order blue, green, red."
                )
            return image
        pixels = read_image(image)
        if pixels is None:
            raise UsageError(f"{image} could not be read as an image: give a JPEG, PNG or another picture.")
        return pixels

    def _detections(
        self, prepared: Prepared, outputs: list[npt.NDArray[Any]], score_thr: float
    ) -> dict[str, Any]:
        where = prepared.shape, prepared.scale_factor
        anchors = self._metadata.anchors
        if anchors:
            found = decoding.detections_of_anchors(anchors, outputs, *where)
        else:
            found = decoding.detections_of_boxes(outputs, len(self.classes), *where)
        return {
            "predictions": [
                {"class": self.classes[label], "score": score, "bbox": [round(x, 2) for x in box]}
                for box, score, label in zip(
                    found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()
                )
                if score >= score_thr
            ]
        }

    def _segmentation(self, prepared: Prepared, outputs: list[npt.NDArray[Any]], _: float) -> dict[str, Any]:
        sizes = prepared.padded, prepared.shape, prepared.original
        (output,) = outputs
        labels: npt.NDArray[Any]
        if self._metadata.kind == "logits":
            align, threshold = self._metadata.align_corners, self._metadata.threshold
            labels = decoding.label_map_of_logits(output[0], *sizes, align, threshold)
        else:
            labels = decoding.label_map_of_labels(output[0], len(self.classes), *sizes)
        counts = np.bincount(labels.ravel(), minlength=1).tolist()
        shares = {self.classes[label]: count / labels.size for label, count in enumerate(counts) if count}
        return {"classes": shares, "labels": labels}

    def _classification(
        self, prepared: Prepared, outputs: list[npt.NDArray[Any]], _: float
    ) -> dict[str, Any]:
        scores = outputs[0][0] if self._metadata.kind == "scores" else decoding.softmax(outputs[0][0])
        best = np.argsort(-scores, kind="stable")[:5].tolist()
        return {
            "predictions": [{"class": self.classes[index], "score": float(scores[index])} for index in best]
        }
