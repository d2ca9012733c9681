"""Makes a failing case small: fewer calls, smaller sizes, simpler scales and codes, as long as it still fails.

Greedy: every change is tried, the first that still fails is kept, and everything is tried again.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from qgraph.errors import QGraphError
from qgraph.ir.node_info import info
from qgraph.simulator import KERNEL_SETS, Simulator
from tests.conformance.build import Built, Case, build
from tests.conformance.compare import REFERENCE, Comparison, Mismatch
from tests.conformance.program import Program, Step
from tests.conformance.values import Values

Compare = Callable[[Built], Comparison]


@dataclass(frozen=True)
class Failure:
    """A case that fails, built, and how."""

    built: Built
    mismatch: Mismatch

    @property
    def case(self) -> Case:
        return self.built.case


Phase = Callable[[Failure], Iterator[Case]]


def shrink(case: Case, run: Compare, *, tries: int = 600) -> Failure:
    """The smallest failing case found within a number of tries.

    Raises:
        AssertionError: the case does not fail.
    """
    best = attempt(case, run)
    if best is None:
        raise AssertionError("the case to shrink does not fail")
    left, improved = tries, True
    while improved and left > 0:
        improved = False
        for phase in PHASES:
            best, left, changed = _phase(phase, best, run, left)
            improved |= changed
    return best


def _phase(phase: Phase, best: Failure, run: Compare, left: int) -> tuple[Failure, int, bool]:
    """One kind of change, until none of that kind fails any more."""
    changed, again = False, True
    while again and left > 0:
        again = False
        for candidate in phase(best):
            left -= 1
            found = attempt(candidate, run, (best.mismatch.who, best.mismatch.against))
            if found is not None:
                best, changed, again = found, True, True
                break
            if left <= 0:
                break
    return best, left, changed


def attempt(case: Case, run: Compare, who: tuple[str, str] | None = None) -> Failure | None:
    """Whether a case fails, between the two of `who` if given; a case that cannot be built does not."""
    try:
        case = replace(case, values=fitting(case))
        built = build(case)
        found = run(built)
    except (QGraphError, RuntimeError, ValueError, IndexError, KeyError, NotImplementedError):
        return None
    return next((Failure(built, m) for m in found.mismatches if who in (None, (m.who, m.against))), None)


def fitting(case: Case) -> Values:
    """The values of a case that fit its network; tensors are cut to its shapes, what is missing is drawn anew."""
    shapes = case.program.shapes()
    values = copy.copy(case.values)
    model = case.program.model()
    parameters = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    values.inputs = {
        name: cut(tensor, shapes[name])
        for name, tensor in values.inputs.items()
        if name in case.program.inputs and fits(tensor, shapes[name])
    }
    values.weights = _cut_all(values.weights, parameters)
    values.biases = _cut_all(values.biases, parameters)
    counts = {name: shape for name, shape in parameters.items() if name.endswith(".weight")}
    values.scales = dict(values.scales)
    for name, shape in counts.items():
        scales, zero = values.scales.get(name, ([], 0))
        axis = 1 if "ConvTranspose" in str(model.get_submodule(name.rpartition(".")[0])) else 0
        if len(scales) >= shape[axis]:
            values.scales[name] = (scales[: shape[axis]], zero)
        else:
            values.scales.pop(name, None)
    return values


def _cut_all(tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {
        name: cut(tensor, shapes[name])
        for name, tensor in tensors.items()
        if name in shapes and fits(tensor, shapes[name])
    }


def fits(tensor: torch.Tensor, shape: tuple[int, ...]) -> bool:
    return tensor.dim() == len(shape) and all(a >= b for a, b in zip(tensor.shape, shape, strict=True))


def cut(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    return tensor[tuple(slice(0, size) for size in shape)].clone()


# --- candidates ----------------------------------------------------------------------------------------------------


def windows(failure: Failure) -> Iterator[Case]:
    """Some consecutive calls alone, the shortest first; what they read becomes inputs with the codes they had."""
    case = failure.case
    steps = case.program.steps
    if len(steps) == 1:
        return
    known = Known(failure)
    spans = [(a, b) for a in range(len(steps)) for b in range(a + 1, len(steps) + 1) if b - a < len(steps)]
    wrong = {p for p, step in enumerate(steps) if known.sites.get(step.name) == failure.mismatch.site}
    spans = [span for span in spans if not wrong or wrong & set(range(*span))]
    for first, last in sorted(spans, key=lambda span: span[1] - span[0]):
        yield from known.alone(case, steps[first:last])


def fewer_steps(failure: Failure) -> Iterator[Case]:
    """A call left out: its users read one of its operands."""
    case = failure.case
    if len(case.program.steps) > 1:
        for step in case.program.steps:
            yield from (replace(case, program=changed) for changed in _without(case.program, step))


class Known:
    """The codes a failing case computes, by the names of its values."""

    def __init__(self, failure: Failure) -> None:
        built = failure.built
        self.codes = Simulator(built.integer, kernels=REFERENCE).run(*built.inputs, record=True).values
        self.formats = failure.case.formats
        self.qparams = {info(node).site: info(node).qparams for node in built.integer.graph.nodes}
        nodes = [node for node in built.integer.graph.nodes if info(node).site in self.codes]
        by_line = {info(n).source.line: info(n).site for n in nodes if n.op == "call_function" and info(n).source}
        self.sites = {name: f"{name}.quant" for name in failure.case.program.inputs}
        lines = failure.case.program.lines()
        for step in failure.case.program.steps:
            fused = self.sites.get(step.inputs[0], "")
            self.sites[step.name] = by_line.get(lines[step.name], fused)

    def alone(self, case: Case, steps: tuple[Step, ...]) -> Iterator[Case]:
        """The case of these steps alone."""
        made = {step.name for step in steps}
        read = dict.fromkeys(name for step in steps for name in step.inputs if name not in made)
        inputs = {name: shape for name, shape in case.program.inputs.items() if name in read}
        tensors, scales, formats = dict(case.values.inputs), dict(case.values.scales), dict(case.formats)
        for name in read:
            if name in inputs:
                continue
            site, fresh = self.sites[name], f"x_{name}"
            qparams = self.qparams.get(site)
            if qparams is None or qparams.per_channel:
                return
            reals = (self.codes[site].double() - qparams.zero) * qparams.scale.double()
            inputs[fresh], tensors[fresh] = tuple(reals.shape), reals.to(torch.float32)
            scales[f"{fresh}.quant"] = ([qparams.scale.item()], qparams.zero)
            formats[f"{fresh}.quant"] = (str(qparams.qtype), "int8")
            steps = tuple(_renamed(step, name, fresh) for step in steps)
        program = Program(inputs, steps)
        values = replace(case.values, inputs=tensors, scales=scales)
        yield replace(case, program=program.used(), values=values, formats=formats)


def smaller_options(failure: Failure) -> Iterator[Case]:
    """Kernels, strides, paddings and channels of the calls."""
    case = failure.case
    steps = case.program.steps
    for position, step in enumerate(steps):
        for name, value in step.options.items():
            for smaller in _smaller(value, step.least.get(name)):
                changed = replace(step, options={**step.options, name: smaller})
                yield replace(
                    case, program=case.program.with_steps([*steps[:position], changed, *steps[position + 1 :]])
                )


def without_groups(failure: Failure) -> Iterator[Case]:
    """The first group of a convolution alone: channels and groups go together."""
    case = failure.case
    program = case.program
    for position, step in enumerate(program.steps):
        groups, source = step.options.get("groups", 1), step.inputs[0]
        if groups == 1 or source not in program.inputs:
            continue
        batch, channels, *sizes = program.inputs[source]
        options = {**step.options, "groups": 1, "out": max(step.options["out"] // groups, 1)}
        steps = (*program.steps[:position], replace(step, options=options), *program.steps[position + 1 :])
        inputs = {**program.inputs, source: (batch, channels // groups, *sizes)}
        yield replace(case, program=Program(inputs, steps))


def _without(program: Program, step: Step) -> Iterator[Program]:
    """A step left out: its users read one of its operands."""
    for operand in step.inputs:
        rest = [_renamed(s, step.name, operand) for s in program.steps if s is not step]
        yield program.with_steps(rest).used()


def _renamed(step: Step, old: str, new: str) -> Step:
    return replace(step, inputs=tuple(new if name == old else name for name in step.inputs))


def _smaller(value: Any, least: Any) -> Iterator[Any]:
    if least is None or value == least:
        return
    if isinstance(value, bool):
        yield least
    elif isinstance(value, int):
        yield from dict.fromkeys(n for n in (least, value // 2, value - 1) if least <= n < value)
    elif isinstance(value, tuple):
        yield (least,) * len(value)
        for position, entry in enumerate(value):
            for smaller in _smaller(entry, least):
                yield (*value[:position], smaller, *value[position + 1 :])


def smaller_inputs(failure: Failure) -> Iterator[Case]:
    """One axis of the inputs cut, at its end or its start, in all inputs that share the size, or in one."""
    case = failure.case
    inputs = dict(case.program.inputs)
    for name, shape in inputs.items():
        for axis, size in enumerate(shape):
            for smaller in dict.fromkeys(n for n in (1, size // 2, size - 1) if 1 <= n < size):
                sharing = [n for n, s in inputs.items() if axis < len(s) and s[axis] == size]
                for names in (sharing, [name]) if sharing != [name] else ([name],):
                    yield from _cut_inputs(case, names, axis, smaller)


def _cut_inputs(case: Case, names: list[str], axis: int, size: int) -> Iterator[Case]:
    shapes, tensors = dict(case.program.inputs), case.values.inputs
    for name in names:
        shapes[name] = tuple(size if a == axis else s for a, s in enumerate(shapes[name]))
    program = replace(case.program, inputs=shapes)
    for at_end in (False, True):
        kept = {
            n: t.narrow(axis, t.shape[axis] - size if at_end else 0, size) for n, t in tensors.items() if n in names
        }
        yield replace(case, program=program, values=replace(case.values, inputs={**tensors, **kept}))


def simpler_values(failure: Failure) -> Iterator[Case]:
    """Scales, zero points and tensors."""
    case = failure.case
    values = case.values
    for site, (scales, zero) in values.scales.items():
        for simpler in _simpler_scales(scales, zero):
            yield replace(case, values=replace(values, scales={**values.scales, site: simpler}))
    for kind in ("biases", "weights", "inputs"):
        tensors = getattr(values, kind)
        for name, tensor in tensors.items():
            for smaller in _simpler_tensors(tensor, _unit(case, name)):
                yield replace(case, values=replace(values, **{kind: {**tensors, name: smaller}}))


def _unit(case: Case, name: str) -> float:
    """The step in which an input counts."""
    scales = case.values.scales.get(f"{name}.quant")
    return scales[0][0] if scales is not None else 1.0


def _simpler_scales(scales: list[float], zero: int) -> Iterator[tuple[list[float], int]]:
    if zero:
        yield scales, 0
        if abs(zero) > 1:
            yield scales, 1
    if any(scale != scales[0] for scale in scales):
        yield [scales[0]] * len(scales), zero
    if any(scale != 1.0 for scale in scales):
        yield [1.0] * len(scales), zero
    powers = [2.0 ** round(math.log2(scale)) for scale in scales]
    if powers != scales:
        yield powers, zero


def _simpler_tensors(tensor: torch.Tensor, unit: float) -> Iterator[torch.Tensor]:
    flat = tensor.reshape(-1)
    count = flat.numel()
    if not bool(flat.any()):
        return
    size = count
    while size >= 1:
        for first in range(0, count, size):
            part = flat[first : first + size]
            if bool(part.any()):
                smaller = flat.clone()
                smaller[first : first + size] = 0
                yield smaller.reshape(tensor.shape)
        if size <= count // 16:
            break
        size //= 2
    if count <= 16:
        for position in flat.nonzero()[:, 0].tolist():
            steps = flat[position].item() / unit
            for smaller_steps in (1.0, 0.5, math.trunc(steps / 2), steps / 2, math.trunc(steps)):
                if abs(smaller_steps) < abs(steps):
                    smaller = flat.clone()
                    smaller[position] = smaller_steps * unit
                    if not torch.equal(smaller, flat):
                        yield smaller.reshape(tensor.shape)


PHASES: tuple[Phase, ...] = (windows, fewer_steps, without_groups, smaller_inputs, smaller_options, simpler_values)

# --- the reproducer ------------------------------------------------------------------------------------------------


def reproducer(failure: Failure) -> str:
    """Python text that rebuilds the case, with what was expected and what came out."""
    case, mismatch = failure.case, failure.mismatch
    values, program = case.values, case.program
    sites = {name: value for name, value in values.scales.items() if name in _live(failure)}
    lines = [
        f"# {mismatch}",
        "import torch",
        "import torch.nn.functional as F",
        "from torch import nn",
        "",
        "import qgraph",
        "from tests.conformance.build import with_values",
        "",
        "",
        program.source(),
        "",
        "inputs = {",
        *(f"    {name!r}: {_text(values.inputs[name])}," for name in program.inputs),
        "}",
        "scales = {  # scale and zero point",
        *(f"    {site!r}: {pair!r}," for site, pair in sites.items()),
        "}",
        "weights = {  # codes",
        *(f"    {site!r}: {_text(codes)}," for site, codes in values.weights.items()),
        "}",
        "biases = {  # reals",
        *(f"    {site!r}: {_text(reals)}," for site, reals in values.biases.items()),
        "}",
        f"formats = {case.formats!r}",
        f"prepared = with_values(Model(), inputs, scales, weights, biases, formats, target={case.target.name!r})",
        "integer = qgraph.convert(prepared)",
        f"run = qgraph.Simulator(integer, kernels={_kernels(mismatch)!r}).run(*inputs.values(), record=True)",
        f"site = {mismatch.site!r}",
        f"got = {_text(mismatch.got)}  # {mismatch.who}",
        f"expected = {_text(mismatch.expected)}  # {mismatch.against}",
        "print(run.values[site], got, expected)",
    ]
    return "\n".join(lines)


def _kernels(mismatch: Mismatch) -> str:
    return mismatch.who if mismatch.who in KERNEL_SETS else REFERENCE


def _live(failure: Failure) -> set[str]:
    """Sites of the shrunk network; those of steps that are gone are left out."""
    from qgraph.quantization.sites import quantizers

    return {module.site for module in quantizers(failure.built.prepared)}


def _text(tensor: torch.Tensor) -> str:
    return f"torch.tensor({tensor.tolist()}, dtype={tensor.dtype})"
