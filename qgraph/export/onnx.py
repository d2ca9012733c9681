"""`export_onnx`: a prepared model as an ONNX file.

The file is written from the graph itself, with the scales and codes that `convert` would use, so that what an engine
computes can be compared with the simulator bit by bit.
"""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import fx

from qgraph.capture.boundary.guard import InputGuard
from qgraph.capture.values.variants import with_batch
from qgraph.errors import UserError
from qgraph.export.walk import Form, Walk
from qgraph.export.writer import OnnxWriter, onnx_package, save_atomically
from qgraph.ir.evaluate import bind_inputs, evaluate
from qgraph.ir.node_info import graph_info, info, module_of
from qgraph.ir.op_table import GUARD
from qgraph.ir.stage import Stage
from qgraph.ir.values import TensorSpec, ValueSpec, spec_of
from qgraph.quantization import freeze
from qgraph.quantization.sites import require_prepared
from qgraph.targets import target_of

ONNXRUNTIME_OPTIONS = {"session.qdqisint8allowed": "1", "session.disable_double_qdq_remover": "1"}
"""Session options with which onnxruntime computes what the file says: int8 values stay int8, and two roundings in a row
are both done."""

_OLDEST, _NEWEST = 13, 23
_LARGEST = 1 << 31  # protobuf holds no more in one file


def export_onnx(
    prepared: fx.GraphModule,
    path: str | Path,
    *,
    opset: int = 21,
    form: Form = "qdq",
    dynamic_batch: bool | None = None,
) -> Path:
    """Writes a calibrated model as ONNX.

    Args:
        prepared: a calibrated or trained graph of any target, or what `freeze` made of it; it is not changed.
        path: the file.
        opset: version of the standard operators, 13 to 23; 16-bit values need 21.
        form: "qdq" puts QuantizeLinear and DequantizeLinear around float operators, which every tool reads;
            "qoperator" writes QLinearConv and the like, which onnxruntime computes as they stand.
        dynamic_batch: whether dimension 0 of the inputs is free; if None, where the graph serves any batch.

    Returns:
        The path. `<site>.codes` are the codes of a site, `<site>` its real values; the metadata entry `qgraph.sites`
        maps sites to their codes.

    Raises:
        UserError: the package onnx is absent, an operator has no ONNX form, an option is wrong, or the file cannot be
            written. No file is left behind then, and one that stood there is unchanged.
        StateError: the model has not been calibrated.
    """
    file = _checked(path, opset, form)
    onnx_package()
    gm = prepared if _is_frozen(prepared) else freeze(require_prepared(prepared, "export_onnx"))
    writer = OnnxWriter(opset)
    walk = Walk(gm, writer, form, _sizes(gm, dynamic_batch))
    walk.run()
    record = graph_info(gm)
    metadata = {
        "qgraph.version": _version(),
        "qgraph.target": target_of(gm).name,
        "qgraph.form": form,
        "qgraph.sites": json.dumps(walk.sites),
    }
    model = writer.model(record.model, metadata, "qgraph")
    if model.ByteSize() >= _LARGEST:
        raise UserError("the model does not fit one ONNX file", why="a file holds 2 GiB", fix="export it in parts")
    save_atomically(model.SerializeToString(), file)
    return file


def _checked(path: str | Path, opset: int, form: str) -> Path:
    if not isinstance(opset, int) or not _OLDEST <= opset <= _NEWEST:
        raise UserError(f"opset is {opset!r}", fix=f"give a number from {_OLDEST} to {_NEWEST}")
    if form not in ("qdq", "qoperator"):
        raise UserError(f"form is {form!r}", fix='give "qdq" or "qoperator"')
    if not isinstance(path, (str, Path)):
        raise UserError(f"path is a {type(path).__name__}", fix="give the file's name")
    return Path(path)


def _is_frozen(gm: Any) -> bool:
    if not isinstance(gm, fx.GraphModule):
        return False
    return graph_info(gm).stage is Stage.PREPARED and "frozen" in graph_info(gm).properties


def _sizes(gm: fx.GraphModule, dynamic: bool | None) -> dict[fx.Node, Any]:
    """Sizes of every node's value; None where they differ between two batch sizes."""
    known = {node: info(node).value for node in gm.graph.nodes}
    guard = _guard(gm)
    fixed = graph_info(gm).batch_fixed or (None if guard is not None and guard.choice else "the example has no batch")
    if dynamic and fixed:
        raise UserError("the batch size of this model cannot change", why=fixed, fix="leave dynamic_batch out")
    example = graph_info(gm).example
    if dynamic is False or fixed or guard is None or guard.choice is None or example is None:
        return {node: _dims(spec, spec) for node, spec in known.items() if spec is not None}
    inputs = {str(node.target): value for node, value in bind_inputs(gm.graph, example.args, example.kwargs).items()}
    seen: dict[fx.Node, ValueSpec] = {}
    twice = with_batch(inputs, guard.choice, 2, 0)
    try:
        with torch.no_grad():
            evaluate(gm, (), twice, observe=lambda node, value: seen.update({node: spec_of(value)}))
    except UserError as error:
        if dynamic is None:
            return {node: _dims(spec, spec) for node, spec in known.items() if spec is not None}
        raise UserError(
            "the model does not serve twice the example's batch", why=str(error), fix="leave dynamic_batch out"
        ) from error
    return {node: _dims(spec, seen.get(node, spec)) for node, spec in known.items() if spec is not None}


def _guard(gm: fx.GraphModule) -> InputGuard | None:
    for node in gm.graph.nodes:
        module = module_of(node) if info(node).op is GUARD and node.op == "call_module" else None
        if isinstance(module, InputGuard):
            return module
    return None


def _dims(one: ValueSpec, two: ValueSpec) -> Any:
    if isinstance(one, TensorSpec) and isinstance(two, TensorSpec):
        return tuple(a if a == b else None for a, b in zip(one.shape, two.shape, strict=True))
    if isinstance(one, tuple) and isinstance(two, tuple):
        return [_dims(a, b) for a, b in zip(one, two, strict=True)]
    return ()


def _version() -> str:
    try:
        return version("qgraph-fx")
    except PackageNotFoundError:
        return "unknown"
