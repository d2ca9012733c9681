"""What is part of every graph and computes nothing, and the stubs between float and integer."""

from __future__ import annotations

from qgraph.ir import functional as QF
from qgraph.ir.op import OpKind, QuantRule
from qgraph.ir.op_table.define import aten, define
from qgraph.nn import DeQuantStub, QuantStub

INPUT = define("input", OpKind.INPUT, lambda: None, "")
OUTPUT = define("output", OpKind.OUTPUT, lambda: None, "")
CONSTANT = define("constant", OpKind.CONSTANT, lambda: None, "")
GUARD = define("guard", OpKind.STRUCTURE, lambda: None, "")
OPAQUE = define("opaque", OpKind.OPAQUE, lambda: None, "")
ITEM = define("item", OpKind.STRUCTURE, lambda value, index: None, "value", target=QF.item)
FIELD = define("field", OpKind.STRUCTURE, lambda value, name: None, "value", target=QF.field)
REBUILD = define("rebuild", OpKind.STRUCTURE, lambda: None, "")
SCALAR = define("scalar", OpKind.STRUCTURE, lambda: None, "")
SIZE = define("size", OpKind.STRUCTURE, lambda input, dim=None: None, spelled=("size", aten.sym_size.int))

QUANT_STUB = define(
    "quant_stub",
    OpKind.STUB,
    lambda input: None,
    modules=(QuantStub,),
    quant=QuantRule.OWN,
    lowering="quantize",
)
DEQUANT_STUB = define("dequant_stub", OpKind.STUB, lambda input: None, modules=(DeQuantStub,), lowering="dequantize")
FAKE_QUANT = define("fake_quant", OpKind.STUB, lambda input: None, quant=QuantRule.SAME)
