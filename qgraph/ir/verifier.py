"""The rules a graph keeps, one table for all stages.

A rule yields violations; `verify` collects those of all rules for the graph's stage and raises one error that lists
them. `VERIFIER_RULES.append(...)` adds one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from qgraph.errors import QGraphError, VerifyError
from qgraph.ir.arguments import bind
from qgraph.ir.identities import is_free_identity
from qgraph.ir.node_info import graph_info, has_info, info, where
from qgraph.ir.op import OpKind
from qgraph.ir.op_table import DEQUANT_STUB, FAKE_QUANT, OPAQUE, QUANT_STUB
from qgraph.ir.stage import Stage
from qgraph.ir.text import describe
from qgraph.ir.values import TensorSpec

_ALL = tuple(Stage)
_SHOWN = 8


@dataclass(frozen=True)
class Violation:
    """One place where a graph breaks a rule."""

    rule: str
    message: str
    node: fx.Node | None = None

    def __str__(self) -> str:
        place = f" at {where(self.node)}" if self.node is not None else ""
        return f"[{self.rule}] {self.message}{place}"


@dataclass(frozen=True)
class VerifierRule:
    """A named rule for some stages.

    Args:
        name: shown with each violation.
        stages: where it holds.
        check: yields violations of one graph.
    """

    name: str
    stages: tuple[Stage, ...]
    check: Callable[[fx.GraphModule], Iterator[tuple[str, fx.Node | None]]]


def verify(gm: fx.GraphModule, *, context: str = "") -> None:
    """Checks a graph against the rules of its stage.

    Raises:
        VerifyError: rules are broken; the message lists the first of them with their nodes.
    """
    violations = list(violations_of(gm))
    if not violations:
        return
    shown = [str(violation) for violation in violations[:_SHOWN]]
    more = f" and {len(violations) - _SHOWN} more" if len(violations) > _SHOWN else ""
    error = VerifyError(
        f"the graph breaks {len(violations)} rule(s) of stage {graph_info(gm).stage}"
        + (f" {context}" if context else ""),
        where="; ".join(shown) + more,
        fix="the pass that ran last broke them; QG_DUMP=folder writes the graph after each pass",
    )
    first = violations[0].node
    if first is not None:
        error.attach(neighbourhood(first))
    raise error


def violations_of(gm: fx.GraphModule) -> Iterator[Violation]:
    """Every violation of the rules of the graph's stage."""
    stage = graph_info(gm).stage
    for rule in VERIFIER_RULES:
        if stage in rule.stages:
            for message, node in rule.check(gm):
                yield Violation(rule.name, message, node)


def neighbourhood(node: fx.Node) -> str:
    """The text of a node, its inputs and its users."""

    def line(mark: str, other: fx.Node) -> str:
        try:
            text = describe(other) if has_info(other) and other.op != "output" else other.format_node()
        except QGraphError:  # the node itself is what is broken
            text = other.format_node()
        return f"{mark} %{other.name} = {text}"

    return "\n".join(
        [line("   ", used) for used in node.all_input_nodes]
        + [line("-->", node)]
        + [line("   ", user) for user in node.users]
    )


def structural_hash(gm: fx.GraphModule) -> str:
    """A digest of the computation: nodes, arguments, and the identity of the modules and tensors they use."""
    digest = hashlib.sha256()
    for node in gm.graph.nodes:
        held = ""
        if node.op in ("call_module", "get_attr"):
            held = str(id(_resolve(gm, str(node.target))))
        digest.update(f"{node.name}|{node.op}|{node.target}|{node.args}|{node.kwargs}|{held}\n".encode())
    return digest.hexdigest()


# --- rules -------------------------------------------------------------------------------------------------------


def _well_formed(gm: fx.GraphModule) -> Iterator[tuple[str, fx.Node | None]]:
    seen: set[fx.Node] = set()
    outputs = 0
    for node in gm.graph.nodes:
        for used in node.all_input_nodes:
            if used not in seen:
                yield f"it reads {used.name}, which comes later or belongs to another graph", node
        seen.add(node)
        outputs += node.op == "output"
    if outputs != 1:
        yield f"there are {outputs} output nodes", None


def _recorded(gm: fx.GraphModule) -> Iterator[tuple[str, fx.Node | None]]:
    for node in gm.graph.nodes:
        if not has_info(node):
            yield "it carries no record", node


def _resolvable(gm: fx.GraphModule) -> Iterator[tuple[str, fx.Node | None]]:
    for node in gm.graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        found = _resolve(gm, str(node.target))
        wanted = nn.Module if node.op == "call_module" else torch.Tensor
        if not isinstance(found, wanted):
            yield f"there is no {wanted.__name__.lower()} at {node.target!r}", node


def _unique_sites(gm: fx.GraphModule) -> Iterator[tuple[str, fx.Node | None]]:
    sites: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        if not has_info(node) or info(node).op.kind in (OpKind.STRUCTURE, OpKind.OUTPUT, OpKind.CONSTANT):
            continue
        site = info(node).site
        if site in sites:
            yield f"its site {site!r} is also that of {sites[site].name}", node
        sites[site] = node


def _arguments_fit(gm: fx.GraphModule) -> Iterator[tuple[str, fx.Node | None]]:
    for node in gm.graph.nodes:
        if not has_info(node) or node.op in ("placeholder", "get_attr", "output"):
            continue
        try:
            if info(node).op is not OPAQUE:
                bind(node)
        except QGraphError as error:
            yield error.what, node


def _no_identities(gm: fx.GraphModule) -> Iterator[tuple[str, fx.Node | None]]:
    for node in gm.graph.nodes:
        if is_free_identity(node):
            yield "an identity should have been removed by canonicalize", node


def _fake_quant_follows_plan(gm: fx.GraphModule) -> Iterator[tuple[str, fx.Node | None]]:
    for node in gm.graph.nodes:
        record = info(node)
        if record.op is FAKE_QUANT:
            if not isinstance(node.args[0], fx.Node) or info(node.args[0]).plan is None:
                yield "a fake quantization follows a value without a plan", node
        elif record.plan is not None and record.plan.observer != "none":
            others = [user for user in node.users if info(user).op is not FAKE_QUANT]
            if others or len(node.users) != 1:
                yield f"its value reaches {', '.join(u.name for u in others) or 'nobody'} unquantized", node


def _floats_behind_stubs(gm: fx.GraphModule) -> Iterator[tuple[str, fx.Node | None]]:
    """In the integer stage, an integer tensor meets a float one only at quantize and dequantize."""
    for node in gm.graph.nodes:
        target = str(node.target)
        if node.op in ("output", "placeholder", "get_attr") or "qgraph." in target:
            continue
        if info(node).op in (QUANT_STUB, DEQUANT_STUB, FAKE_QUANT):
            yield "a stub of the prepared stage is left", node
            continue
        kinds = {spec.dtype.is_floating_point for spec in _tensor_specs(node)}
        if len(kinds) > 1:
            yield "it mixes integer codes and floats", node


def _tensor_specs(node: fx.Node) -> list[TensorSpec]:
    quantized = [used for used in node.all_input_nodes if info(used).qparams is not None]
    others = [used for used in node.all_input_nodes if info(used).qparams is None]
    specs = [info(used).value for used in (*quantized, *others)]
    return [spec for spec in specs if isinstance(spec, TensorSpec)] if quantized else []


def _resolve(gm: fx.GraphModule, path: str) -> object:
    current: object = gm
    for part in path.split("."):
        current = getattr(current, part, None)
        if current is None:
            return None
    return current


VERIFIER_RULES: list[VerifierRule] = [
    VerifierRule("well-formed", _ALL, _well_formed),
    VerifierRule("recorded", _ALL, _recorded),
    VerifierRule("resolvable", _ALL, _resolvable),
    VerifierRule("unique-sites", _ALL, _unique_sites),
    VerifierRule("arguments-fit", (Stage.FUSED, Stage.PREPARED), _arguments_fit),
    VerifierRule("no-identities", (Stage.FUSED, Stage.PREPARED), _no_identities),
    VerifierRule("fake-quant-follows-plan", (Stage.PREPARED,), _fake_quant_follows_plan),
    VerifierRule("floats-behind-stubs", (Stage.INTEGER,), _floats_behind_stubs),
]
