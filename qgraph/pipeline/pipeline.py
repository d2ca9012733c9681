"""Pipelines: ordered, printable lists of passes that are passes themselves.

    Pipeline.parse("canonicalize,fuse-conv-bn-add-relu").run(gm).gm

`run` works on a copy of the graph. After every pass that changed something the stage's rules are verified and the
outputs on the example inputs compared with those before; both can be switched off. Order is validated before anything
runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, ClassVar

from torch import fx

from qgraph.errors import PassError, QGraphError, UserError, did_you_mean
from qgraph.ir.copying import copy_graph, drop_unused_modules
from qgraph.ir.node_info import ExampleInputs, GraphInfo, graph_info, info, update_graph_info
from qgraph.ir.stage import Stage
from qgraph.ir.verifier import structural_hash, verify
from qgraph.memory import paused_collection
from qgraph.pipeline.base import Numerics, Pass, PassContext, PassReport, PassResult
from qgraph.pipeline.checks import (
    Difference,
    check_numerics,
    first_differing_node,
    outputs_differ,
    promise_broken,
    run_example,
)
from qgraph.pipeline.observers import PassObserver, environment_observers
from qgraph.pipeline.parse import Group, parse_passes

_UNKNOWN = object()


class CheckLevel(IntEnum):
    """How much a pipeline checks."""

    NONE = 0
    """Nothing."""
    STRUCTURE = 1
    """The stage's rules after every pass that changed something."""
    NUMERICS = 2
    """Also the outputs on the example inputs. The default."""
    CLAIMS = 3
    """Also that a pass that says it changed nothing did not. For tests of passes."""


@dataclass(frozen=True)
class PipelineResult(PassResult):
    """As `PassResult`, with one report per pass that ran."""

    reports: tuple[PassReport, ...] = ()


@dataclass(frozen=True)
class BisectResult:
    """The first pass of a pipeline after which the outputs differ.

    Args:
        pass_name: its name.
        position: its position in the flattened pipeline, from 0.
        output: which output differs, and by how much.
        node: name of the first node that differs; None if only the outputs as a whole do.
        site: its site.
        source: the user's line.
        difference: by how much that node differs.
    """

    pass_name: str
    position: int
    output: Difference
    node: str | None = None
    site: str | None = None
    source: str | None = None
    difference: Difference | None = None

    def __str__(self) -> str:
        text = f"{self.pass_name} (pass {self.position}) changed the outputs: {self.output}"
        if self.node is not None:
            text += f"\n  first at node {self.node}, site {self.site}, {self.source}: {self.difference}"
        return text


@dataclass(frozen=True)
class Pipeline(Pass):
    """A list of passes.

    Args:
        passes: the passes, in order; pipelines may be nested.
        repeat: run the list until it changes nothing, at most this often.

    Raises:
        UserError: a member is no pass or declares itself wrongly, or `repeat` is below 1.
    """

    name: ClassVar[str] = "pipeline"
    stages: ClassVar[tuple[Stage, ...]] = tuple(Stage)

    passes: tuple[Pass, ...] = ()
    repeat: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        for member in self.passes:
            if not isinstance(member, Pass):
                raise UserError(
                    f"a pipeline holds passes, not {member!r}",
                    fix="give instances such as Canonicalize(), or use Pipeline.parse(text)",
                )
            _check_declarations(member)
        if self.repeat < 1:
            raise UserError(f"a pipeline cannot repeat {self.repeat} times")

    # --- making ----------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, text: str) -> Pipeline:
        """The pipeline a text names; see `qgraph.pipeline.parse` for the form.

        Raises:
            UserError: malformed text, unknown pass or option.
        """
        if not isinstance(text, str):
            raise UserError(
                f"a pipeline's text cannot be a {type(text).__name__}",
                fix='give a text such as "canonicalize,fuse-conv-bn-add-relu", or Pipeline([pass, ...])',
            )
        return cls._from_group(parse_passes(text))

    @classmethod
    def _from_group(cls, group: Group) -> Pipeline:
        members = tuple(cls._from_group(entry) if isinstance(entry, Group) else entry for entry in group.members)
        return cls(members, group.repeat)

    def insert_before(self, name: str, *added: Pass) -> Pipeline:
        """A pipeline with `added` before the pass called `name`."""
        at = self._index(name)
        return replace(self, passes=(*self.passes[:at], *added, *self.passes[at:]))

    def insert_after(self, name: str, *added: Pass) -> Pipeline:
        """A pipeline with `added` after the pass called `name`."""
        at = self._index(name) + 1
        return replace(self, passes=(*self.passes[:at], *added, *self.passes[at:]))

    def replace_pass(self, name: str, *substitutes: Pass) -> Pipeline:
        """A pipeline with `substitutes` in place of the pass called `name`."""
        at = self._index(name)
        return replace(self, passes=(*self.passes[:at], *substitutes, *self.passes[at + 1 :]))

    def remove(self, name: str) -> Pipeline:
        """A pipeline without the pass called `name`."""
        return self.replace_pass(name)

    def _index(self, name: str) -> int:
        names = [member.name for member in self.passes]
        if names.count(name) != 1:
            problem = "is not in" if name not in names else "occurs more than once in"
            raise UserError(f"{name!r} {problem} the pipeline", where=str(self), fix=did_you_mean(name, names))
        return names.index(name)

    def flat(self) -> Iterator[Pass]:
        """Every pass, nested ones in order; repeats count once."""
        for member in self.passes:
            if isinstance(member, Pipeline):
                yield from member.flat()
            else:
                yield member

    def __str__(self) -> str:
        return ",".join(
            f"[{member}]" + (f"*{member.repeat}" if member.repeat > 1 else "")
            if isinstance(member, Pipeline)
            else str(member)
            for member in self.passes
        )

    # --- running ---------------------------------------------------------------------------------------------

    def run(
        self,
        gm: fx.GraphModule,
        ctx: PassContext | None = None,
        *,
        checks: CheckLevel = CheckLevel.NUMERICS,
        observers: Iterable[PassObserver] = (),
        in_place: bool = False,
    ) -> PipelineResult:
        """Runs the passes on a copy of `gm`'s graph.

        Args:
            gm: a graph made by qgraph; it is not changed unless `in_place`.
            ctx: target and quantization choices; the example inputs default to those of the capture.
            checks: how much to check after each pass.
            observers: objects that watch the run.
            in_place: work on `gm` itself, for callers that own it; after an error it is left half done.

        Returns:
            The new module, whether anything changed, and a report per pass.

        Raises:
            UserError: the order of the passes cannot work; all problems are listed.
            PassError: a pass failed or broke its contract.
            VerifyError: a pass left the graph against its stage's rules.
            NumericCheckError: a pass changed the outputs by more than it declares.
        """
        self.validate(graph_info(gm))
        context = ctx or PassContext()
        if context.example is None:
            context = replace(context, example=graph_info(gm).example)
        runner = _Runner(context, checks, [*observers, *environment_observers()])
        with paused_collection():
            return runner.run_all(self, gm, in_place=in_place)

    def validate(self, start: GraphInfo) -> None:
        """Checks stages and requirements of the whole list before anything runs.

        Raises:
            UserError: some pass cannot run where it stands; every such place is listed.
        """
        stage, properties, problems = start.stage, set(start.properties), []
        later: dict[str, str] = {}
        members = list(self.flat())
        for member in reversed(members):
            later.update(dict.fromkeys(member.ensures, member.name))
        for position, member in enumerate(members):
            if stage not in member.stages:
                wanted = " or ".join(map(str, member.stages))
                problems.append(f"{position}. {member.name} works on a {wanted} graph, but gets a {stage} one")
            for missing in sorted(member.requires - properties):
                hint = f" (established by {later[missing]})" if missing in later else " (no pass here establishes it)"
                problems.append(f"{position}. {member.name} needs '{missing}' first{hint}")
            properties = (properties - member.breaks) | member.ensures
            stage = member.result_stage or stage
        if problems:
            raise UserError(
                "the pipeline cannot run in this order",
                where=str(self),
                why="; ".join(problems),
                fix="reorder the passes, or add the missing ones",
            )

    def bisect(
        self, gm: fx.GraphModule, ctx: PassContext | None = None, *, rtol: float | None = None
    ) -> BisectResult | None:
        """The first pass whose output differs from that of the pass before it, and the first node that does.

        Args:
            gm: the graph to start from.
            ctx: as for `run`.
            rtol: allowed difference relative to an output's largest magnitude; each pass's own promise if not given.

        Returns:
            What changed first, or None if nothing did.

        Raises:
            UserError: there are no example inputs to compare on.
            PassError: the graph cannot run any more after a pass; the message names it.
        """
        self.validate(graph_info(gm))
        context = ctx or PassContext()
        if context.example is None:
            context = replace(context, example=graph_info(gm).example)
        if context.example is None:
            raise UserError("bisecting needs example inputs", fix="pass PassContext(example=...)")
        runner = _Runner(context, CheckLevel.NONE, [])
        current, reference = copy_graph(gm), run_example(gm, context.example)
        for position, member in enumerate(self.flat()):
            before = copy_graph(current)
            current = runner.run_one(member, current).gm
            numerics = member.keeps if rtol is None else replace(member.keeps, rtol=rtol)
            try:
                outputs = run_example(current, context.example)
            except QGraphError:
                raise
            except Exception as error:
                raise _unable(member, error) from error
            found = None
            if rtol is not None and not numerics.redefines:
                found = outputs_differ(reference, outputs, numerics)
            elif not numerics.redefines:
                found = promise_broken(current, context.example, reference, outputs, numerics)
            if found is not None:
                return _locate(member, position, found, before, current, context.example, rtol)
            reference = outputs
        return None


def _locate(
    member: Pass,
    position: int,
    found: Difference,
    before: fx.GraphModule,
    after: fx.GraphModule,
    example: ExampleInputs,
    rtol: float | None,
) -> BisectResult:
    numerics = member.keeps if rtol is None else replace(member.keeps, rtol=rtol)
    first = first_differing_node(before, after, example, numerics)
    if first is None:
        return BisectResult(member.name, position, found)
    node, difference = first
    record = info(node)
    return BisectResult(member.name, position, found, node.name, record.site, str(record.source), difference)


def _check_declarations(member: Pass) -> None:
    """Refuses a pass whose class forgot its name, or declares words that are no sets."""
    kind = type(member).__name__
    if not isinstance(getattr(member, "name", None), str):
        raise UserError(f"the pass {kind} has no name", fix='set it in the class: name: ClassVar[str] = "my-pass"')
    for declared in ("requires", "ensures", "breaks"):
        words = getattr(member, declared)
        if not isinstance(words, (set, frozenset)):
            raise UserError(
                f"{declared} of the pass {member.name} is {words!r}", fix='give a set: frozenset({"canonical"})'
            )
    if not isinstance(member.keeps, Numerics):
        raise UserError(
            f"keeps of the pass {member.name} is {member.keeps!r}", fix="give EXACT, close(rtol) or REDEFINES"
        )


def _unable(member: Pass, error: Exception) -> PassError:
    """The error of a pass whose result cannot run."""
    return PassError(
        f"the graph cannot run any more after the pass {member.name}",
        why=f"{type(error).__name__}: {error}",
        fix="look at the pass's rewrites: an operand, an option or a shape is wrong",
    )


class _Runner:
    """Runs passes one by one, with everything around them."""

    def __init__(self, ctx: PassContext, checks: CheckLevel, observers: Sequence[PassObserver]) -> None:
        self.ctx = ctx
        self.checks = checks
        self.observers = observers
        self.reports: list[PassReport] = []
        self.reference: Any = _UNKNOWN

    def run_all(self, pipeline: Pipeline, gm: fx.GraphModule, *, in_place: bool) -> PipelineResult:
        expected = graph_info(gm).expected
        if expected is not None:
            self.reference = expected
        elif self.checks >= CheckLevel.NUMERICS and self.ctx.example is not None and not _redefined(pipeline):
            self.reference = self._outputs(gm, self.ctx.example)
        current, changed = self._run_members(pipeline, gm if in_place else copy_graph(gm))
        drop_unused_modules(current)
        current.recompile()
        update_graph_info(current, expected=None if self.reference is _UNKNOWN else self.reference)
        notes = tuple(note for report in self.reports for note in report.notes)
        refusals = tuple(refusal for report in self.reports for refusal in report.refusals)
        return PipelineResult(current, changed, notes, refusals, tuple(self.reports))

    def _run_members(self, pipeline: Pipeline, gm: fx.GraphModule) -> tuple[fx.GraphModule, bool]:
        changed_at_all = False
        for _ in range(pipeline.repeat):
            changed = False
            for member in pipeline.passes:
                if isinstance(member, Pipeline):
                    gm, inner = self._run_members(member, gm)
                    changed |= inner
                else:
                    result = self.run_one(member, gm)
                    gm, changed = result.gm, changed or result.changed
            changed_at_all |= changed
            if not changed:
                break
        return gm, changed_at_all

    def run_one(self, member: Pass, gm: fx.GraphModule) -> PassResult:
        """Runs one pass with its checks and observers."""
        for observer in self.observers:
            observer.before(member, gm)
        started = time.perf_counter()
        before = structural_hash(gm) if self.checks >= CheckLevel.CLAIMS else None
        result = self._call(member, gm)
        _record_run(member, result)
        done = self._check(member, result, before)
        report = PassReport(
            member.name, time.perf_counter() - started, result.changed, result.notes, result.refusals, tuple(done)
        )
        self.reports.append(report)
        for observer in self.observers:
            observer.after(member, result.gm, report)
        return result

    def _call(self, member: Pass, gm: fx.GraphModule) -> PassResult:
        try:
            result = member.run(gm, self.ctx)
        except UserError:
            raise
        except QGraphError as error:
            error.attach(self._progress(member))
            raise
        except Exception as error:
            wrapped = PassError(
                f"the pass {member.name} failed",
                why=f"{type(error).__name__}: {error}",
                fix="this is a bug of the pass: please report it with the graph text of QG_DUMP=folder",
            )
            wrapped.attach(self._progress(member))
            raise wrapped from error
        if not isinstance(result, PassResult):
            raise PassError(
                f"the pass {member.name} returned a {type(result).__name__}", fix="return PassResult(gm, changed)"
            )
        return result

    def _check(self, member: Pass, result: PassResult, before: str | None) -> list[str]:
        done: list[str] = []
        if before is not None and not result.changed and structural_hash(result.gm) != before:
            raise PassError(
                f"the pass {member.name} changed the graph and said it did not",
                fix="return PassResult(gm, changed=edit.changes > 0)",
            )
        if not result.changed and member.result_stage is None:
            return done
        if self.checks >= CheckLevel.STRUCTURE:
            try:
                verify(result.gm, context=f"after {member.name}")
            except QGraphError as error:
                error.attach(self._progress(member))
                raise
            done.append("structure")
        if self.checks >= CheckLevel.NUMERICS and self.ctx.example is not None and result.changed:
            self._compare(member, result.gm)
            done.append("numerics")
        elif result.changed and (member.keeps.redefines or member.keeps.rtol):
            self.reference = _UNKNOWN
        return done

    def _compare(self, member: Pass, gm: fx.GraphModule) -> None:
        assert self.ctx.example is not None
        try:
            outputs = self._outputs(gm, self.ctx.example)
        except QGraphError as error:
            error.attach(self._progress(member))
            raise
        except Exception as error:
            wrapped = _unable(member, error)
            wrapped.attach(self._progress(member))
            raise wrapped from error
        if self.reference is not _UNKNOWN and not member.keeps.redefines:
            try:
                check_numerics(member, gm, self.ctx.example, self.reference, outputs)
            except QGraphError as error:
                error.attach(self._progress(member))
                raise
        self.reference = outputs

    def _outputs(self, gm: fx.GraphModule, example: ExampleInputs) -> Any:
        return run_example(gm, example, self.ctx.execute.get(graph_info(gm).stage))

    def _progress(self, member: Pass) -> str:
        ran = ", ".join(report.name for report in self.reports) or "none"
        return f"passes that ran before {member.name}: {ran}"


def _redefined(pipeline: Pipeline) -> bool:
    """Whether a pass redefines the outputs before any other changes them: then nobody needs the old ones."""
    first = next((member for member in pipeline.flat() if not member.annotates), None)
    return first is not None and first.keeps.redefines


def _record_run(member: Pass, result: PassResult) -> None:
    record = graph_info(result.gm)
    refusals = tuple(dict.fromkeys((*record.refusals, *result.refusals)))
    update_graph_info(
        result.gm,
        stage=member.result_stage or record.stage,
        properties=(record.properties - member.breaks) | member.ensures,
        history=(*record.history, member.name),
        refusals=refusals,
    )
