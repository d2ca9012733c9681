"""What a caller of `trace` asks for, checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import nn

from qgraph.capture.model.copying import unwrapped
from qgraph.capture.model.names import walk_modules
from qgraph.capture.options.flags import check_waivers
from qgraph.capture.options.leaves import LeafChoice, LeafRule, leaf_rule
from qgraph.capture.values.structure import Inputs, as_example, bind_to_forward
from qgraph.capture.values.variants import check_inputs
from qgraph.errors import CaptureError, UserError, did_you_mean


class PrepareMethod(str, Enum):
    """How a model is captured; each stands for the text of its value."""

    AUTO = "auto"
    """`JIT`, then `EXPORT`, then `SYMBOLIC`: the first that captures the model faithfully."""
    JIT = "jit"
    """Runs the real forward on the example inputs and records it."""
    JIT_STRIP = "jit_strip"
    """As `JIT`, and keeps only what lies between the model's QuantStubs and DeQuantStubs."""
    SYMBOLIC = "symbolic"
    """Traces with torch.fx."""
    EXPORT = "export"
    """Exports with torch.export, sizes of the batch free."""

    def __str__(self) -> str:
        return self.value


METHODS = tuple(method.value for method in PrepareMethod)
ATTEMPTS = ("jit", "export", "symbolic")  # what `auto` tries, in this order


@dataclass(frozen=True)
class Request:
    """One call of `trace`.

    Args:
        model: the user's model, without wrappers.
        inputs: the example inputs by name, those given by position first.
        positional: how many were given by position.
        method: one of `METHODS`.
        leaf: which modules stay single nodes.
        waived: kinds of flags to accept.
        verify: whether to replay the graph.
    """

    model: nn.Module
    inputs: Inputs
    positional: int
    method: str
    leaf: LeafRule
    waived: frozenset[str]
    verify: bool

    @property
    def name(self) -> str:
        """The model's class name."""
        return type(self.model).__name__

    @property
    def writable(self) -> bool:
        """Whether the forward may write to the model's tensors."""
        return "state" in self.waived

    def by(self, method: str) -> Request:
        """The same request for another method."""
        return replace(self, method=method)

    def arguments(self, inputs: Inputs) -> tuple[tuple[Any, ...], Inputs]:
        """Named inputs as the example gives them: by position and by keyword."""
        names = list(inputs)
        by_position = tuple(inputs[name] for name in names[: self.positional])
        return by_position, {name: inputs[name] for name in names[self.positional :]}

    def call(self, model: nn.Module, inputs: Inputs) -> Any:
        """Calls a model with named inputs."""
        args, kwargs = self.arguments(inputs)
        return model(*args, **kwargs)


class ForwardFails(CaptureError):
    """The model's own forward raises on the example inputs: no method can help."""


def fails_on_example(model: str, where: str | None, error: Exception) -> ForwardFails:
    """What is raised where the model's own forward fails."""
    return ForwardFails(
        f"{model} fails on the example inputs",
        where=where,
        why=f"{type(error).__name__}: {error}",
        fix="give example inputs with which model(*example_inputs) runs",
    )


def check_request(
    model: nn.Module,
    example_inputs: Any,
    method: str,
    waive: Iterable[str] | str,
    leaf_modules: Iterable[LeafChoice] | LeafChoice,
    verify: bool,
) -> Request:
    """The request, if everything fits together.

    Raises:
        UserError: an argument is wrong, or the model is in no state to be captured.
    """
    if not isinstance(model, nn.Module):
        raise UserError(
            f"trace needs a torch.nn.Module, got a {type(model).__name__}",
            fix="pass an instance of the model's class, not the class or a function",
        )
    method = _known_method(method)
    model = unwrapped(model)
    _refuse_scripted(model)
    walked = walk_modules(model)
    _refuse_training(model, walked)
    _refuse_unspeakable_names(model, walked)
    example = as_example(example_inputs)
    inputs = bind_to_forward(model, example)
    check_inputs(inputs)
    leaf = leaf_rule(model, leaf_modules)
    return Request(model, inputs, len(example.args), method, leaf, check_waivers(waive), verify)


def _known_method(method: str) -> str:
    name = str(method).lower()
    if name == "eager":
        raise UserError(
            "the prepare method eager is not available",
            why="qgraph quantizes graphs, and a model prepared by hand has none",
            fix="use jit, which keeps stubs and FloatFunctionals that stand in the model",
        )
    if name not in METHODS:
        raise UserError(f"unknown capture method {method!r}", fix=did_you_mean(name, METHODS))
    return name


def _refuse_scripted(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError(
            f"{getattr(model, 'original_name', type(model).__name__)} is a TorchScript module",
            why="its forward is compiled, so there is no Python code to record",
            fix="trace the Python model it was made from, or a module that calls this one (it becomes one node)",
        )


def _refuse_unspeakable_names(model: nn.Module, walked: list[tuple[str, nn.Module]]) -> None:
    """Names appear in the code of a graph between double quotes, as they are."""
    for path, module in walked:
        for table in (module._modules, module._parameters, module._buffers):
            for name, _ in table.items():  # the tables of a scripted module iterate by number
                if not name.isprintable() or '"' in name or "\\" in name:
                    raise UserError(
                        f"a part of the model is called {name!r}",
                        where=path or type(model).__name__,
                        why="torch.fx cannot write a name with quotes, backslashes or control characters into code",
                        fix="register it under another name",
                    )


def _refuse_training(model: nn.Module, walked: list[tuple[str, nn.Module]]) -> None:
    training = [path or type(model).__name__ for path, module in walked if module.training]
    if training:
        shown = ", ".join(training[:5]) + (f" and {len(training) - 5} more" if len(training) > 5 else "")
        raise UserError(
            f"{type(model).__name__} is in training mode",
            where=shown,
            why="dropout and batch statistics make the forward random and change the model",
            fix="call model.eval() first; quantization-aware training starts after prepare",
        )
