"""docs/operators.md is what the op table and the targets say."""

from __future__ import annotations

from qgraph.ir.op import OpKind
from qgraph.ir.op_table import OPS
from tools.operators_page import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run: python -m tools.operators_page"


def test_every_operator_is_on_the_page() -> None:
    text = page()
    hidden = (OpKind.INPUT, OpKind.OUTPUT, OpKind.CONSTANT, OpKind.STRUCTURE, OpKind.STUB, OpKind.OPAQUE)
    for op in OPS:
        assert (f"| `{op.name}` |" in text) == (op.kind not in hidden), op
