"""Walks a frozen graph in order and writes each call to ONNX.

A site is `operator -> QuantizeLinear`, named `<site>.codes`; whoever needs real numbers reads `DequantizeLinear` of the
codes, named `<site>`. In the form "qoperator" operators on 8-bit codes take the place of the three where there is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import fx

from qgraph.errors import InternalError, UserError
from qgraph.export import elementwise, movement, products, selection, structure, windows  # noqa: F401 - to register
from qgraph.export.call import FLOAT, MOVES, Call, Result, Value, spec_dtype
from qgraph.export.quantized import QUANTIZED
from qgraph.export.writer import Dims, OnnxWriter
from qgraph.ir.arguments import quant_rule
from qgraph.ir.node_info import info, tensor_at, where
from qgraph.ir.op import OpKind, QuantRule
from qgraph.ir.op_table import CONSTANT, DEQUANT_STUB, FAKE_QUANT, GUARD, INPUT, ITEM, OPAQUE, OUTPUT, QUANT_STUB
from qgraph.ir.text import called_name
from qgraph.ir.values import TensorSpec
from qgraph.numerics import QParams, qint32

Form = Literal["qdq", "qoperator"]
INT16_OPSET = 21


class Walk:
    """One export.

    Args:
        gm: the frozen graph.
        writer: collects the model.
        form: which form quantized operators take.
        dims: sizes of every node's value on the example; None where they depend on the batch.
    """

    def __init__(self, gm: fx.GraphModule, writer: OnnxWriter, form: Form, dims: Mapping[fx.Node, Any]) -> None:
        self.gm = gm
        self.writer = writer
        self.form = form
        self.dims = dims
        self.values: dict[fx.Node, Any] = {}
        self.sites: dict[str, str] = {}
        self.outputs: list[str] = []

    def run(self) -> None:
        """Writes every node."""
        for node in self.gm.graph.nodes:
            op = info(node).op
            if op is INPUT:
                self._input(node)
            elif op is OUTPUT:
                self._output(node.args[0])
            elif op is CONSTANT:
                tensor = tensor_at(self.gm, str(node.target))
                name = self.writer.constant(info(node).site, tensor)
                self.values[node] = Value(info(node).site, tensor.dtype, tuple(tensor.shape), real=name)
            elif op in (FAKE_QUANT, DEQUANT_STUB):
                self.values[node] = self.values[node.all_input_nodes[0]]
            elif op is ITEM:
                self.values[node] = self._item(node)
            elif op is not GUARD:
                self.values[node] = self._call(node)

    # --- the ends of the graph -------------------------------------------------------------------------------

    def _input(self, node: fx.Node) -> None:
        spec = info(node).value
        if isinstance(spec, TensorSpec):
            dims = tuple("batch" if size is None else size for size in self.dims_of(node))
            name = self.writer.input(str(node.target), spec.dtype, dims)
            self.values[node] = Value(info(node).site, spec.dtype, self.dims_of(node), real=name)
        elif any(info(user).op is not GUARD for user in node.users):
            raise UserError(
                f"the input {node.target} is no tensor",
                where=where(node),
                why="inputs of an ONNX model are tensors",
                fix="pass its parts as arguments of their own",
            )

    def _output(self, returned: Any) -> None:
        inputs = {value.name for value in self.writer.inputs} | set(self.writer.initializers)
        for node in _leaves(returned):
            value = self.values.get(node) if isinstance(node, fx.Node) else None
            if not isinstance(value, Value):
                raise UserError(
                    f"the model returns {node!r}, which is no tensor",
                    why="outputs of an ONNX model are tensors",
                    fix="return tensors",
                )
            name = self.real(value)
            if name in inputs or name in self.outputs:
                name = self.writer.emit("Identity", [name], [f"{value.site}.output"])[0]
            self.writer.output(name, value.dtype, self._named(value.dims))
            self.outputs.append(name)

    def _named(self, dims: Dims) -> Dims:
        """Sizes for a signature: the first one that depends on the batch is the batch's own in every model we know."""
        return tuple("batch" if size is None and axis == 0 else size for axis, size in enumerate(dims))

    def _item(self, node: fx.Node) -> Value:
        source, index = node.args[0], node.args[1]
        parts = self.values.get(source) if isinstance(source, fx.Node) else None
        if not isinstance(parts, list) or not isinstance(index, int):
            raise UserError("a part of a structure cannot be exported to ONNX", where=where(node), fix="pass tensors")
        found: Value = parts[index]
        return found

    # --- calls -----------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node) -> Any:
        record = info(node)
        if record.op is OPAQUE or (record.op is not QUANT_STUB and record.op.name not in FLOAT):
            what = called_name(node) if record.op is OPAQUE else str(record.op)
            module = f", module {record.module}" if record.module else ""
            raise UserError(
                f"{what} cannot be exported to ONNX",
                where=f"{where(node)}{module}",
                why="no ONNX form of it is known",
                fix="write the model without it, or export the part of the model before it",
            )
        call = Call(node, self)
        qparams = record.qparams
        if qparams is None or not self.is_rounded(node):
            return self._computed(call, None)
        moved = record.op is not QUANT_STUB and quant_rule(node) is QuantRule.SAME and self._first_is_coded(call)
        if moved and self.form == "qoperator" and record.op.name in MOVES and qparams.qtype.bits == 8:
            call.on_codes = True
            return self._wrapped(call, FLOAT[record.op.name](call), qparams, are_codes=True)
        if self.form == "qoperator" and record.op.name in QUANTIZED:
            codes = QUANTIZED[record.op.name](call, qparams)
            if codes is not None:
                return self._wrapped(call, codes, qparams, are_codes=True)
        return self._computed(call, qparams)

    def _first_is_coded(self, call: Call) -> bool:
        first = next((self.values.get(node) for _, node in call.bound.nodes()), None)
        return isinstance(first, Value) and first.codes is not None

    def _computed(self, call: Call, qparams: QParams | None) -> Any:
        """A call in real numbers, rounded to codes if it is a site."""
        if info(call.node).op is QUANT_STUB:
            result: Result = self.real(self.values[call.node.all_input_nodes[0]])
        else:
            result = FLOAT[info(call.node).op.name](call)
        if qparams is None:
            return self._wrapped(call, result, None, are_codes=False)
        if isinstance(result, list):
            rounded: Result = [self.quantized(call.node, name, qparams, f".{i}") for i, name in enumerate(result)]
        elif call.late is not None:
            before = self.quantized(call.node, result, qparams, ".unbounded")
            result = call.late(self._dequantize(call.node, before, qparams, ".unbounded"))
            rounded = self.quantized(call.node, result, qparams, "" if call.then is None else ".unmoved")
        else:
            rounded = self.quantized(call.node, result, qparams, "" if call.then is None else ".unmoved")
        return self._wrapped(call, rounded, qparams, are_codes=True)

    def _wrapped(self, call: Call, result: Result, qparams: QParams | None, *, are_codes: bool) -> Any:
        """The call's result as a value, or as values."""
        node, site = call.node, call.site
        if isinstance(result, list):
            specs = info(node).value
            assert isinstance(specs, tuple)
            parts = zip(result, specs, self.dims[node], strict=True)
            return [_value(f"{site}.{i}", s, d, n, qparams, are_codes) for i, (n, s, d) in enumerate(parts)]
        if call.then is not None:
            result = call.then(result)
        name = self._renamed(result, f"{site}.codes" if are_codes else site)
        if are_codes and qparams is not None:
            self.sites[site] = name
            self.writer.describe(name, qparams.qtype.storage, self._named(self.dims_of(node)))
        number = not isinstance(info(node).value, TensorSpec)
        if number and info(node).op.kind is not OpKind.STRUCTURE:
            raise InternalError("the shape of a value is not known", where=where(node))
        real, codes = (None, name) if are_codes else (name, None)
        return Value(site, spec_dtype(node), () if number else self.dims_of(node), real, codes, qparams, number)

    def _renamed(self, name: str, wanted: str) -> str:
        """The result just computed under its site's name; as it is where nothing computed it."""
        last = self.writer.nodes[-1] if self.writer.nodes else None
        if last is None or list(last.output) != [name] or name == wanted:
            return name
        wanted = self.writer.free(wanted)
        last.output[0] = last.name = wanted
        return wanted

    # --- between codes and reals -----------------------------------------------------------------------------

    def real(self, value: Value) -> str:
        """The real numbers of a value; dequantized on first use."""
        if value.real is None:
            assert value.qparams is not None
            assert value.codes is not None
            scale, zero = self.parameters(value.site, value.qparams)
            name = self.writer.emit("DequantizeLinear", [value.codes, scale, zero], [value.site])[0]
            value.real = name
        return value.real

    def codes(self, value: Value) -> str:
        """The codes of a value."""
        if value.codes is None:
            raise InternalError(f"{value.site} has no codes")
        return value.codes

    def quantized(self, node: fx.Node, real: str, qparams: QParams, part: str = "") -> str:
        """Rounds a real value to codes."""
        if qparams.qtype.bits == 16 and self.writer.opset < INT16_OPSET:
            raise UserError(
                f"{info(node).site} is {qparams.qtype}, which opset {self.writer.opset} cannot quantize to",
                where=where(node),
                why=f"QuantizeLinear knows 16 bits from opset {INT16_OPSET} on",
                fix=f"export with opset={INT16_OPSET}, or prepare the model with 8 bits",
            )
        scale, zero = self.parameters(info(node).site, qparams)
        name = f"{info(node).site}{part}.codes"
        return self.writer.emit("QuantizeLinear", [real, scale, zero], [name], note=self.note(node))[0]

    def _dequantize(self, node: fx.Node, codes: str, qparams: QParams, part: str) -> str:
        scale, zero = self.parameters(info(node).site, qparams)
        return self.writer.emit("DequantizeLinear", [codes, scale, zero], [f"{info(node).site}{part}"])[0]

    def parameters(self, site: str, qparams: QParams) -> tuple[str, str]:
        """Initializers for scale and zero point of a site."""
        scale = self.writer.constant(f"{site}.scale", qparams.scale.to(torch.float32))
        zero = qparams.zero_points().to(qparams.qtype.storage).expand(qparams.scale.shape)
        return scale, self.writer.constant(f"{site}.zero_point", zero)

    # --- what translators ask --------------------------------------------------------------------------------

    def dims_of(self, node: fx.Node) -> Dims:
        """Sizes of a node's tensor."""
        found = self.dims[node]
        assert isinstance(found, tuple)
        return found

    def is_rounded(self, node: fx.Node) -> bool:
        """Whether a node's result is rounded to codes; an accumulator of 32 bits is as good as the real value."""
        qparams = info(node).qparams
        return qparams is not None and qparams.qtype != qint32 and not qparams.per_channel

    def note(self, node: fx.Node) -> str:
        """What a node says of its origin: site, module, source line."""
        record = info(node)
        return ", ".join(filter(None, (record.site, record.module, str(record.source or ""))))


def _value(site: str, spec: Any, dims: Any, name: str, qparams: QParams | None, are_codes: bool) -> Value:
    real, codes = (None, name) if are_codes else (name, None)
    return Value(site, spec.dtype, dims, real, codes, qparams)


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for entry in value for leaf in _leaves(entry)]
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in _leaves(entry)]
    return [value]
