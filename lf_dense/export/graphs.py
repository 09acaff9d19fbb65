"""A module as a graph: torch.export's, and ONNX's with or without nodes of our own."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import exporting, use_backend
from ..errors import UsageError

OPSET = 18
DOMAIN = "lf_dense"
# Any sizes will do to trace with; sides of 1 and equal sides would be taken for constants.
_TRACED_SIZE = (256, 288)
_TRACED_BATCH = 2
# An operator of ours stands in a graph as a node; "standard" has nodes of ONNX alone.
FORMS = ("standard", "operator")
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell of every step, and of passes that a caller cannot mend."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)


def example_image(channels: int, size: tuple[int, int] | None, batch: int | None = None) -> Tensor:
    """Images to trace with: ``size`` (height, width), or any where it is None."""
    shape = (batch or (1 if size else _TRACED_BATCH), channels, *(size or _TRACED_SIZE))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _dynamic_shapes(size: tuple[int, int] | None, batch: int | None) -> Any:
    if size:
        return None
    auto = torch.export.Dim.AUTO
    return ({2: auto, 3: auto} if batch else {0: auto, 2: auto, 3: auto},)


def torch_graph(
    module: nn.Module, form: str, channels: int, size: tuple[int, int] | None, batch: int | None = None
) -> torch.export.ExportedProgram:
    """``torch.export`` of a module, for PyTorch itself and AOTInductor.

    Args:
        module: takes images ``(B, channels, H, W)``.
        form: ``"standard"`` has operators of PyTorch alone, ``"operator"`` our native ones.
        channels: of an image.
        size: the (height, width) of a graph that takes no other; None makes them, and the batch, dynamic.
        batch: where it is given, the graph takes no other batch.

    Raises:
        RuntimeError: the native operators are not there.
    """
    image = example_image(channels, size, batch)
    backend = "reference" if form == "standard" else "native"
    with _quiet(), torch.no_grad(), use_backend(backend):
        shapes = _dynamic_shapes(size, batch)
        return torch.export.export(module, (image,), dynamic_shapes=shapes, strict=False)


def _translations() -> dict[Any, Callable[..., Any]]:
    """How the operators of ``lf_dense_export`` become nodes."""
    from onnxscript import opset18 as op

    from ..backends import layers  # noqa: F401  (its operators are in the table)
    from . import detecting  # noqa: F401  (so is its own)

    def suppress(boxes: Any, scores: Any, iou_threshold: float, score_thr: float) -> Any:
        every = op.Constant(value_ints=[torch.iinfo(torch.int64).max])
        chosen = op.NonMaxSuppression(
            op.Unsqueeze(boxes, op.Constant(value_ints=[0])),
            op.Unsqueeze(scores, op.Constant(value_ints=[0, 1])),
            every,
            op.Constant(value_floats=[iou_threshold]),
            op.Constant(value_floats=[score_thr]),
        )
        return op.Squeeze(op.Slice(chosen, [2], [3], [1]), op.Constant(value_ints=[1]))

    operators = torch.ops.lf_dense_export
    table: dict[Any, Callable[..., Any]] = {operators.nms.default: suppress}
    for name, operator in (
        ("ProjectHeads", operators.project_heads.default),
        ("MergeHeads", operators.merge_heads.default),
        ("ConvFFN", operators.conv_ffn.default),
    ):
        table[operator] = _node(name, operator, _FLOATS[:1])
    node = _node("LaplacianAttention", operators.laplacian_attention.default, _FLOATS)

    def attend(q: Any, k: Any, v: Any, landmarks: Any, *attributes: float) -> Any:
        # The node takes tokens as projections leave them, so that these transposes and the model's cancel.
        tokens = [op.Transpose(x, perm=[0, 2, 1, 3]) for x in (q, k, v)]
        return op.Transpose(node(*tokens, landmarks, *attributes), perm=[0, 2, 1, 3])

    table[operators.laplacian_attention.default] = attend
    return table


def _node(name: str, operator: torch._ops.OpOverload, dtypes: list[str]) -> Callable[..., Any]:
    """A node of ours with an operator's inputs and outputs; its numbers are the attributes."""
    import onnx
    from onnxscript.values import Op, Opset

    arguments, returns = operator._schema.arguments, operator._schema.returns
    kinds, define = {"float": "FLOAT", "int": "INT"}, onnx.defs.OpSchema
    schema = define(
        name,
        DOMAIN,
        1,
        inputs=[define.FormalParameter(a.name, "T") for a in arguments if str(a.type) == "Tensor"],
        outputs=[define.FormalParameter(f"out_{index}", "T") for index in range(len(returns))],
        type_constraints=[("T", dtypes, "as docs/operators.md says")],
        attributes=[
            define.Attribute(a.name, getattr(define.AttrType, kinds[str(a.type)]), required=True)
            for a in arguments
            if str(a.type) in kinds
        ],
    )
    node, names = Op(Opset(DOMAIN, 1), name, schema), [a.name for a in arguments]
    return lambda *given: node(**dict(zip(names, given)))


def onnx_graph(
    module: nn.Module,
    form: str,
    channels: int,
    size: tuple[int, int] | None,
    outputs: tuple[str, ...],
    batch: int | None = None,
    int8: bool = False,
) -> Any:
    """An ``onnx.ModelProto`` of a module; the input's name is ``image``.

    Args:
        module, channels, size, batch: as in ``torch_graph``.
        form: ``"standard"`` has operators of ONNX alone, ``"operator"`` four nodes of our own for each plain
            block and one for each other attention.
        outputs: names of what the module returns.
        int8: the graph will be quantised: linear layers and convolutions then stay nodes of ONNX, and ours
            are the attentions alone.

    Raises:
        UsageError: onnx or onnxscript is not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise UsageError(
            f"exporting to ONNX and OpenVINO needs {error.name}: pip install 'lf_dense[export]'."
        ) from None

    image = example_image(channels, size, batch)
    ours = "node" if int8 else "layers"
    with _quiet(), torch.no_grad(), exporting("standard" if form == "standard" else ours):
        shapes = _dynamic_shapes(size, batch)
        program = torch.export.export(module, (image,), dynamic_shapes=shapes, strict=False)
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(outputs),
            custom_translation_table=_translations(),
            verbose=False,
        )
    assert exported is not None
    return _cleaned(exported.model_proto)


def _cleaned(model: Any) -> Any:
    """A model without the exporter's notes, which hold source lines and paths of this machine."""

    def clean(graph: Any) -> None:
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    clean(attribute.g)
        for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
            del value.metadata_props[:]
            value.doc_string = ""
        del graph.metadata_props[:]
        graph.doc_string = ""

    clean(model.graph)
    del model.metadata_props[:]
    for function in model.functions:
        del function.metadata_props[:]
        for node in function.node:
            del node.metadata_props[:]
            node.doc_string = ""
    model.doc_string = ""
    model.producer_name = "lf_dense"
    return model
