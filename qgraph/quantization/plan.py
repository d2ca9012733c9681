"""The plan of a prepared graph: what was decided for every site, by whom, and instead of what.

A plan is a setter: given to `prepare` again, alone, it makes the graph it was taken from. It comes before `qconfig`
attributes of the model, which it records. A site it does not have is left to later setters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import fx

from qgraph.errors import QuantizationError, UserError, did_you_mean
from qgraph.files import write_at_once
from qgraph.ir.arguments import coded_operands
from qgraph.ir.node_info import NodeInfo, SitePlan, graph_info, info
from qgraph.ir.op import OpKind
from qgraph.ir.op_table import CONSTANT, EMBEDDING, FAKE_QUANT, QUANT_STUB
from qgraph.numerics import Format, Scheme, float32, qint32
from qgraph.quantization.config.qconfig import Setting
from qgraph.quantization.config.query import SiteQuery

STUB_RULE = "fixed scale of the QuantStub"
FLOAT_REASON = "qconfig is None"
EDITED_RULE = "plan"
_FLOAT_NOTE = re.compile(rf"float: (?P<site>.+) \((?P<op>\w+)\): {FLOAT_REASON} \((?P<rule>.*)\)")
ROLES = ("activation", "weight", "input")
SCALES = ("observed", "fixed", "target", "stub", "operand", "accumulator", "none")


@dataclass(frozen=True)
class PlannedSite:
    """What was decided for one site. Of what is None a plan says nothing.

    Args:
        site: its name; that of a weight ends in `.weight`, that of a converted operand in `_as_<format>`.
        format: number format; float32 for an operator that stays in float because its configuration is None.
        role: `activation`, `weight`, or `input` for an operand that is converted on its way into an operator.
        op: name of the operator.
        observer: finds the range, in text form.
        per_channel: whether there is one scale per output channel.
        scheme: how a range becomes scale and zero point.
        scale: where the scale comes from: `observed`, `fixed`, `target`, `stub` (a QuantStub with a scale), `operand`
            (the device keeps it), `accumulator`, or `none` in float.
        fixed_scale: the scale, if `scale` is fixed, target or stub.
        frozen: whether training leaves the scale as calibration found it.
        fake_quant: kind of fake quantization.
        rule: who decided.
        overrode: who would have decided otherwise, `name: what`.
        line: the user's line, `file.py:12`; two entries that differ in nothing else are equal.
        feeds: operator and position of a converted operand, `site[0]`.
    """

    site: str
    format: Format
    role: str = "activation"
    op: str = ""
    observer: str | None = None
    per_channel: bool | None = None
    scheme: Scheme | None = None
    scale: str | None = None
    fixed_scale: float | None = None
    frozen: bool = False
    fake_quant: str = "fake_quant"
    rule: str = EDITED_RULE
    overrode: tuple[str, ...] = ()
    line: str = field(default="", compare=False)
    feeds: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """What makes a difference for the graph, by name; the rest tells where it comes from."""
        names = ("format", "observer", "per_channel", "scheme", "scale", "fixed_scale", "frozen", "fake_quant")
        return {name: getattr(self, name) for name in names}

    @property
    def summary(self) -> str:
        """The settings in a line."""
        words = [str(self.format)]
        words += [self.observer] if self.observer and self.scale == "observed" else []
        words += ["per channel"] if self.per_channel else []
        words += [self.scheme.value] if self.scheme is not None else []
        words += [self.scale] if self.scale is not None else []
        words += [repr(self.fixed_scale)] if self.fixed_scale is not None else []
        words += ["frozen"] if self.frozen else []
        words += [self.fake_quant] if self.fake_quant != "fake_quant" else []
        return ", ".join(words)


@dataclass(frozen=True)
class PlanChange:
    """One difference between two plans; a value is None where a plan lacks the site."""

    site: str
    field: str
    before: Any
    after: Any

    def __str__(self) -> str:
        if self.field == "site":
            return f"{self.site}: only in the {'first' if self.after is None else 'second'} plan"
        return f"{self.site}: {self.field} {self.before} -> {self.after}"


@dataclass(frozen=True)
class Plan(Mapping[str, PlannedSite]):
    """Sites in the order of the graph.

    Args:
        sites: the sites by name.
        model: class name of the model, for the reader.
        target: name of the target, for the reader.
    """

    sites: Mapping[str, PlannedSite]
    model: str = ""
    target: str = ""

    @classmethod
    def of(cls, gm: fx.GraphModule) -> Plan:
        """The plan of a graph from `prepare`.

        Raises:
            UserError: the graph has no plan.
        """
        record = graph_info(gm)
        found = {entry.site: entry for node in gm.graph.nodes for entry in _entries(node)}
        for note in record.notes:
            removed = _FLOAT_NOTE.fullmatch(note)
            if removed and removed["site"] not in found:  # a QuantStub without a configuration leaves no node
                found[removed["site"]] = _float_entry(removed["site"], removed["op"], removed["rule"], "")
        if not found:
            raise UserError("the graph has no plan", fix="give what qgraph.prepare returned")
        return cls(found, record.model, "" if record.target is None else record.target.name)

    def __getitem__(self, site: str) -> PlannedSite:
        if site not in self.sites:
            raise KeyError(f"the plan has no site {site!r}; {did_you_mean(site, self.sites)}")
        return self.sites[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        rows = [
            (one.site, one.role, one.op, one.summary, one.rule, "; ".join(one.overrode), one.line)
            for one in self.sites.values()
        ]
        headers = ("site", "role", "operator", "plan", "decided by", "instead of", "line")
        return tabulate(rows, headers=headers, disable_numparse=True)

    def diff(self, other: Plan) -> tuple[PlanChange, ...]:
        """What would be quantized otherwise under `other`; rules and lines do not count."""
        changes = []
        for site in dict.fromkeys([*self.sites, *other.sites]):
            one, two = self.sites.get(site), other.sites.get(site)
            if one is None or two is None:
                changes.append(PlanChange(site, "site", one, two))
                continue
            after = two.settings
            changes += [
                PlanChange(site, name, value, after[name])
                for name, value in one.settings.items()
                if value != after[name]
            ]
        return tuple(changes)

    # --- files ------------------------------------------------------------------------------------------------

    def to_toml(self) -> str:
        """The plan as a text that can be edited."""
        from qgraph.quantization.plan_file import write

        return write(self)

    @classmethod
    def from_toml(cls, text: str, origin: str = "the plan") -> Plan:
        """Reads a text of `to_toml`, edited or not. An edited site is decided by `plan`.

        Raises:
            UserError: the text is no TOML or no plan; the message names key and line.
        """
        from qgraph.quantization.plan_file import read

        return read(text, origin)

    def save(self, path: str | Path) -> None:
        """Writes the file completely or not at all.

        Raises:
            UserError: it cannot be written.
        """
        write_at_once(Path(path), self.to_toml().encode("utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a file of `save`.

        Raises:
            UserError: it cannot be read, or is no plan.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"the plan {path} cannot be read",
                why=f"{type(error).__name__}: {error}",
                fix="give a file written by Plan.save",
            ) from error
        return cls.from_toml(text, str(path))

    # --- as a setter ------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return EDITED_RULE

    def cite(self, query: SiteQuery) -> str:
        """The rule written down for an operator in float; that of other sites follows in `planned`."""
        entry = self.sites.get(query.site)
        return entry.rule if entry is not None and entry.format == float32 else self.name

    def decide(self, query: SiteQuery) -> Setting | None:
        """Formats of the site, its weight and its operands; `planned` adds the rest where they are written down."""
        entry = self.sites.get(query.site) or self._first_part(query.site)
        if entry is not None and entry.format == float32:
            return Setting(stays_float=True)
        weight = self.sites.get(f"{query.site}.weight")
        inputs = self._conversions.get(query.site)
        if entry is None and weight is None and inputs is None:
            return None
        output = None if entry is None else entry.format
        # The table of an embedding is a weight that is a site of its own.
        own = output if entry is not None and entry.role == "weight" else None
        return Setting(
            output=output,
            weight=own if weight is None else weight.format,
            inputs=None if inputs is None else tuple(None if one is None else one.format for one in inputs),
        )

    def conversion(self, site: str, position: int) -> PlannedSite | None:
        """The entry of an operand that is converted on its way into a site."""
        known = self._conversions.get(site, ())
        return known[position] if position < len(known) else None

    def unused(self, queries: Sequence[SiteQuery]) -> list[str]:
        sites = {query.site for query in queries}
        return [
            entry.site
            for entry in self.sites.values()
            if entry.site not in sites
            and not (entry.role == "weight" and entry.site.removesuffix(".weight") in sites)
            and not (entry.role == "input" and reader_of(entry)[0] in sites)
        ]

    @cached_property
    def _conversions(self) -> dict[str, tuple[PlannedSite | None, ...]]:
        """Entries of converted operands by the site that reads them, in the order of its operands."""
        found: dict[str, dict[int, PlannedSite]] = {}
        for entry in self.sites.values():
            if entry.role == "input":
                reader, position = reader_of(entry)
                found.setdefault(reader, {})[position] = entry
        return {site: tuple(by.get(index) for index in range(max(by) + 1)) for site, by in found.items()}

    def _first_part(self, site: str) -> PlannedSite | None:
        """The first of the groups a constant's consumer was split into after it was asked for."""
        return self.sites.get(f"{site}.group0")

    def planned(self, site: str, plan: SitePlan) -> SitePlan:
        """A decision with what the plan says beyond formats."""
        entry = self.sites.get(site)
        if entry is None:
            return plan
        given: dict[str, Any] = {
            "observer": entry.observer,
            "fixed_scale": entry.fixed_scale if entry.scale == "fixed" else None,
        }
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("fixed_scale") is not None and entry.role == "weight":
            given["per_channel"] = False
        return replace(
            plan,
            rule=entry.rule,
            overrode=entry.overrode,
            frozen=entry.frozen,
            fake_quant=entry.fake_quant,
            **given,
        )

    def require(self, site: str, decided: SitePlan) -> None:
        """Refuses a decision that does not follow the plan.

        Raises:
            QuantizationError: the site came out otherwise; the message says in what.
        """
        entry = self.sites.get(site)
        if entry is None:
            return
        result = _settings_of(decided, scale_source(decided))
        for name, value in entry.settings.items():
            same_number = name == "scale" and {value, result[name]} <= {"stub", "fixed"}
            if value is not None and value != result[name] and not same_number:
                raise QuantizationError(
                    f"the plan wants {name} {value} for site {site}, which has {result[name]}",
                    why="the target or the model's own QuantStub decides it",
                    fix=f"write {result[name]}, or leave {name} out",
                )


def reader_of(entry: PlannedSite) -> tuple[str, int]:
    """Site and position a converted operand feeds."""
    site, _, position = (entry.feeds or "").rpartition("[")
    if not site or not position.rstrip("]").isdigit():
        raise UserError(
            f"site {entry.site} of the plan feeds {entry.feeds!r}", fix='give operator and position: feeds = "conv1[0]"'
        )
    return site, int(position.rstrip("]"))


def _entries(node: fx.Node) -> Iterator[PlannedSite]:
    """The sites of a node: its result, then its weight."""
    record = info(node)
    shown = "" if record.source is None else f"{Path(record.source.file).name}:{record.source.line}"
    if record.float_reason is not None and record.float_reason.startswith(FLOAT_REASON):
        rule = record.float_reason.removeprefix(FLOAT_REASON).strip(" ()")
        yield _float_entry(record.site, record.op.name, rule, shown)
    if record.plan is not None and record.op is not FAKE_QUANT:
        role, feeds = _role(node, record)
        yield _entry(record.site, role, record, record.plan, shown, feeds)
    if record.weight_plan is not None:
        yield _entry(f"{record.site}.weight", "weight", record, record.weight_plan, shown, None)


def _float_entry(site: str, op: str, rule: str, line: str) -> PlannedSite:
    return PlannedSite(site, float32, op=op, scale="none", rule=rule, line=line)


def _entry(site: str, role: str, record: NodeInfo, plan: SitePlan, line: str, feeds: str | None) -> PlannedSite:
    settings = _settings_of(plan, scale_source(plan))
    return PlannedSite(
        site=site,
        role=role,
        op=record.op.name,
        rule=plan.rule,
        overrode=plan.overrode,
        line=line,
        feeds=feeds,
        **settings,
    )


def _settings_of(plan: SitePlan, scale: str) -> dict[str, Any]:
    return {
        "format": plan.format,
        "observer": plan.observer,
        "per_channel": plan.per_channel,
        "scheme": plan.scheme,
        "scale": scale,
        "fixed_scale": plan.fixed_scale,
        "frozen": plan.frozen,
        "fake_quant": plan.fake_quant,
    }


def scale_source(plan: SitePlan) -> str:
    """Where the scale of a decision comes from."""
    if plan.format == qint32:
        return "accumulator"
    if plan.same_scale:
        return "operand"
    if plan.fixed_scale is None:
        return "observed"
    if plan.rule == STUB_RULE:
        return "stub"
    return "fixed" if plan.fixed_zero is None else "target"


def _role(node: fx.Node, record: NodeInfo) -> tuple[str, str | None]:
    """Role of a node's result, and what it feeds if it converts an operand."""
    if record.op is not QUANT_STUB:
        return "activation", None
    readers = [(user, node) for user in node.users if info(user).op is not FAKE_QUANT]
    readers += [(user, rounded) for rounded in node.users if info(rounded).op is FAKE_QUANT for user in rounded.users]
    if any(info(operand).op is CONSTANT for operand in node.all_input_nodes) and any(
        info(user).op is EMBEDDING for user, _ in readers
    ):
        return "weight", None
    if record.created_by != "assign-dtypes" or not readers:
        return "activation", None
    reader, value = readers[0]
    operands = coded_positions(reader)
    return "input", f"{info(reader).site}[{operands.index(value)}]"


def coded_positions(node: fx.Node) -> list[fx.Node]:
    """The operands whose formats can be asked for, in order: all that hold codes but a residual."""
    if info(node).op.kind is OpKind.OPAQUE:
        return []
    return [operand for name, operand in coded_operands(node) if name != "residual"]
