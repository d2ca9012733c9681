"""What a pass is: a small frozen value with a name, typed options, and one method.

    @dataclass(frozen=True)
    class FoldSomething(RewritePass):
        name: ClassVar[str] = "fold-something"
        keeps: ClassVar[Numerics] = close(2e-6)

        def rules(self, gm: fx.GraphModule, ctx: PassContext) -> Sequence[Rule]:
            return [SomethingRule()]

Run passes through a `Pipeline` (one is enough): it checks order, verifies the result and compares the numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from torch import fx, nn

from qgraph.ir.editor import Editor
from qgraph.ir.node_info import ExampleInputs, Refusal
from qgraph.ir.stage import Stage
from qgraph.rewrite import Rule, rewrite_graph

if TYPE_CHECKING:
    from qgraph.quantization.config.query import SiteQuery
    from qgraph.quantization.config.setters import QConfigSetter
    from qgraph.targets import Target


@dataclass(frozen=True)
class Numerics:
    """What a pass promises about the graph's outputs on the example inputs.

    Args:
        rtol: largest difference allowed, relative to the largest magnitude of each output; 0 is bit for bit.
        redefines: the outputs are meant to change (float to integers): nothing is compared.
    """

    rtol: float = 0.0
    redefines: bool = False

    def __str__(self) -> str:
        if self.redefines:
            return "redefines the outputs"
        return "exact" if self.rtol == 0 else f"within {self.rtol:g}"


EXACT = Numerics()
REDEFINES = Numerics(redefines=True)


def close(rtol: float) -> Numerics:
    """Outputs may differ by `rtol`, relative to the largest magnitude of each output."""
    return Numerics(rtol)


Execute: TypeAlias = Callable[[fx.GraphModule, ExampleInputs], Any]


@dataclass
class PassContext:
    """What a pass may know besides the graph.

    Args:
        example: example inputs; passes that need values or shapes run the graph on them.
        target: the hardware, for passes that decide or lower.
        setters: the user's quantization choices, highest priority first.
        execute: faster ways to run graphs of some stages for numeric checks; bit-identical to calling them.
        classes: classes of the user's modules by path, for setters that go by type.
        left_float: sites a pass left in float because the setters say so: their settings had an effect.
    """

    example: ExampleInputs | None = None
    target: Target | None = None
    setters: tuple[QConfigSetter, ...] = ()
    execute: Mapping[Stage, Execute] = field(default_factory=dict)
    classes: Mapping[str, type[nn.Module]] = field(default_factory=dict)
    left_float: list[SiteQuery] = field(default_factory=list)

    def edit(self, gm: fx.GraphModule, owner: Pass) -> Editor:
        """The editor through which `owner` changes `gm`."""
        return Editor(gm, owner.name)


@dataclass(frozen=True)
class PassResult:
    """What a pass returns.

    Args:
        gm: the module, usually the one it was given.
        changed: whether the computation changed; records alone do not count.
        notes: remarks for the user.
        refusals: rules that matched and did not fire.
    """

    gm: fx.GraphModule
    changed: bool
    notes: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Pass(ABC):
    """Base of all passes.

    Class attributes:
        name: unique name, used in pipelines, messages and dumps.
        stages: stages it accepts.
        result_stage: the stage it leaves the graph in; None if it does not change it.
        requires: properties earlier passes must have established.
        ensures: properties it establishes.
        breaks: properties that no longer hold after it.
        keeps: what it promises about the numbers.
        annotates: whether it only writes records, so that nothing is computed differently.
    """

    name: ClassVar[str]
    stages: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED, Stage.FUSED)
    result_stage: ClassVar[Stage | None] = None
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    breaks: ClassVar[frozenset[str]] = frozenset()
    keeps: ClassVar[Numerics] = EXACT
    annotates: ClassVar[bool] = False

    @abstractmethod
    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        """Changes `gm` in place through an `Editor` and says whether it did.

        Called by a pipeline, which regenerates the module's code afterwards. Tensors are replaced, never written to.
        """

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if getattr(self, option.name) != option.default
        }

    def __str__(self) -> str:
        """Pipeline text: `name` or `name{option=value,...}`."""
        options = self.options()
        if not options:
            return self.name
        return self.name + "{" + ",".join(f"{key}={_text(value)}" for key, value in options.items()) + "}"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "+".join(map(_text, value))
    return str(value)


@dataclass(frozen=True)
class RewritePass(Pass):
    """A pass made of rules."""

    @abstractmethod
    def rules(self, gm: fx.GraphModule, ctx: PassContext) -> Sequence[Rule]:
        """The rules, in order of preference."""

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
        edit = ctx.edit(gm, self)
        done = rewrite_graph(edit, self.rules(gm, ctx))
        notes = tuple(f"{rule}: {count}" for rule, count in done.fired.items())
        changed = edit.changes > 0 or bool(done.fired)  # a rule may have gone around the editor
        return PassResult(gm, changed, notes, tuple(done.refusals.values()))


@dataclass(frozen=True)
class PassReport:
    """What happened when a pipeline ran one pass."""

    name: str
    seconds: float
    changed: bool
    notes: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    checks: tuple[str, ...] = field(default_factory=tuple)
