"""Applies rules until none fires.

Each change is followed by a fresh match of the nodes around it, so no rule acts on a stale picture. Nodes whose memory
is written in place are never matched. Every refusal is kept: "why was this not fused" is a question to the data.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from qgraph.errors import PassError
from qgraph.ir.editor import EditListener, Editor
from qgraph.ir.node_info import Refusal, info, where
from qgraph.ir.op import Op
from qgraph.rewrite.pattern import Call, Match, matches
from qgraph.rewrite.rule import Rule, Verdict, no

_LIMIT_PER_NODE = 20
_LIMIT_BASE = 1000


@dataclass
class Rewriting:
    """What a run of the driver did.

    Args:
        fired: rule name to number of rewrites.
        refusals: where a pattern matched and the rule was not applied in the end.
    """

    fired: dict[str, int] = field(default_factory=dict)
    refusals: dict[tuple[str, str], Refusal] = field(default_factory=dict)


def rewrite_graph(edit: Editor, rules: Sequence[Rule]) -> Rewriting:
    """Applies `rules` to the editor's graph until none fires.

    Raises:
        PassError: the rules do not come to an end; the message names the last ones that fired.
    """
    result = Rewriting()
    by_op = _rules_by_op(rules)
    queue = _Worklist(edit, by_op)
    last: deque[str] = deque(maxlen=6)
    budget = _LIMIT_BASE + _LIMIT_PER_NODE * len(edit.graph.nodes)
    while (node := queue.pop()) is not None:
        rule = _apply_first(node, by_op[info(node).op], edit, result)
        if rule is None:
            continue
        last.append(rule.name)
        budget -= 1
        if budget < 0:
            raise PassError(
                f"the rules of {edit.author} do not come to an end",
                where=where(queue.last_created) if queue.last_created is not None else None,
                why=f"the last rules that fired: {', '.join(last)}",
                fix="one of them undoes what another does: make its check refuse that case",
            )
    return result


def _apply_first(node: fx.Node, rules: list[Rule], edit: Editor, result: Rewriting) -> Rule | None:
    """Applies the first rule that may fire at `node`; keeps why the others may not."""
    for rule in rules:
        site = info(node).site
        refusal: Refusal | None = None
        for match in matches(rule.root, node):
            verdict = _guarded_check(rule, match)
            if verdict:
                result.refusals.pop((rule.name, site), None)
                rule.rewrite(match, edit)
                result.fired[rule.name] = result.fired.get(rule.name, 0) + 1
                return rule
            if verdict.reason:
                refusal = refusal or _refusal(rule, match, verdict)
        if refusal is not None:
            result.refusals[(rule.name, site)] = refusal
    return None


def _guarded_check(rule: Rule, match: Match) -> Verdict:
    for node in match.calls():
        record = info(node)
        if record.in_place or record.unstable:
            return no("its memory is written in place", node)
    verdict = rule.check(match)
    if not isinstance(verdict, Verdict):
        raise PassError(
            f"the check of rule {rule.name} returned {verdict!r}",
            where=where(match.root),
            fix="return yes(), no(reason) or skip()",
        )
    return verdict


def _refusal(rule: Rule, match: Match, verdict: Verdict) -> Refusal:
    record = info(verdict.node or match.root)
    members = tuple(info(node).site for node in match.calls())
    return Refusal(rule.name, verdict.reason or "", record.site, record.source, members)


def _rules_by_op(rules: Sequence[Rule]) -> dict[Op, list[Rule]]:
    table: dict[Op, list[Rule]] = {}
    for rule in rules:
        if not isinstance(getattr(rule, "root", None), Call) or not isinstance(getattr(rule, "name", None), str):
            raise PassError(
                f"the rule {type(rule).__name__} has no name or no root",
                fix='set both in its class: name = "my-rule"; root = call(MUL, any_value(), constant())',
            )
        for op in rule.root.ops:
            table.setdefault(op, []).append(rule)
    return table


class _Worklist:
    """Nodes that some rule may match, in execution order first, then in order of change."""

    def __init__(self, edit: Editor, by_op: dict[Op, list[Rule]]) -> None:
        self.by_op = by_op
        self.queue: deque[fx.Node] = deque(node for node in edit.graph.nodes if info(node).op in by_op)
        self.waiting = set(self.queue)
        self.gone: set[fx.Node] = set()
        self.last_created: fx.Node | None = None
        edit.listeners.append(
            EditListener(self._created, self.gone.add, self._add_with_users, lambda _, new: self._add_with_users(new))
        )

    def pop(self) -> fx.Node | None:
        while self.queue:
            node = self.queue.popleft()
            self.waiting.discard(node)
            if node not in self.gone:
                return node
        return None

    def _created(self, node: fx.Node) -> None:
        self.last_created = node

    def _add_with_users(self, node: fx.Node) -> None:
        for candidate in (node, *node.users):
            if candidate not in self.waiting and info(candidate).op in self.by_op:
                self.queue.append(candidate)
                self.waiting.add(candidate)
