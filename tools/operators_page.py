"""Writes docs/operators.md from the op table and the target files: `python -m tools.operators_page`."""

from __future__ import annotations

from pathlib import Path

from passes import decompose_composites, decompose_layers
from qgraph.ir.op import Op, OpKind
from qgraph.ir.op_table import OPS
from qgraph.rewrite.values_and_indices import STEPS
from qgraph.targets import Target, get_target
from qgraph.targets.find import BUILT_IN

PAGE = Path(__file__).parents[1] / "docs/operators.md"

HEAD = """# Operators

Which operator runs on which target, in which formats (operands -> result), or why it stays a float island: a dequantize
before it, a quantize behind it, float32 in between. Made from the op table and the target files by `python -m
tools.operators_page`; a test keeps it up to date.

*taken apart* means that a pass replaces the operator by simpler ones of this table, which the target has; their results
are sites of their own. A module, function, method or overload of the same meaning is the same operator. Where the
indices of `max` and `min` are read, they are `argmax` or `argmin` and `take_along_dim`.
"""

_TITLES = {
    OpKind.MATMUL: "Matrix products",
    OpKind.ARITHMETIC: "Arithmetic",
    OpKind.TABLE: "Functions of one value",
    OpKind.SELECT: "Selection, comparison, order",
    OpKind.REDUCE: "Pooling and reductions",
    OpKind.SAMPLE: "Sampling and resizing",
    OpKind.MOVE: "Movement",
    OpKind.COMPOSITE: "Composites",
}


def page() -> str:
    """The whole page."""
    targets = [get_target(name) for name in BUILT_IN]
    parts = [HEAD]
    for kind, title in _TITLES.items():
        ops = [op for op in OPS if op.kind is kind]
        if not ops:
            continue
        header = f"| operator | {' | '.join(target.name for target in targets)} |"
        rows = [f"| `{op.name}` | {' | '.join(cell(op, target) for target in targets)} |" for op in ops]
        parts.append("\n".join([f"## {title}\n", header, "|---" * (len(targets) + 1) + "|", *rows, ""]))
    return "\n".join(parts)


def cell(op: Op, target: Target) -> str:
    """What one target does with one operator."""
    rule = target.rule(op.name)
    if rule is not None and op.lowering is not None:
        return "; ".join(str(line).replace("|", "\\|") for line in rule.legal)
    steps = _steps(op)
    if steps is not None:
        lacking = [step for step in steps if target.rule(step) is None]
        return f"float: lacks {', '.join(lacking)}" if lacking else "taken apart"
    if op.lowering is None:
        return f"float: {op.refusal or 'no integer form is known'}"
    return "float: not in the target"


def _steps(op: Op) -> list[str] | None:
    """The operators one is taken apart into; None if nothing takes it apart."""
    if op in STEPS:
        return [step.name for step in STEPS[op]]
    for rules in (decompose_layers._RULES, decompose_composites._RULES):
        if op.decomposition in rules:
            return [step.name for step in rules[op.decomposition].steps]
    return None


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
