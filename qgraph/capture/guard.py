"""The check at a captured graph's entry: inputs of another shape would give wrong numbers, not an error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qgraph.capture.inputs import BatchChoice, Inputs, Place
from qgraph.capture.structure import Path, format_path, leaves
from qgraph.errors import UserError


@dataclass(frozen=True)
class _TensorRule:
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    batched: bool


class InputGuard(nn.Module):
    """Checks inputs against the example: structure, dtypes, shapes (batch excepted), and plain values.

    Args:
        inputs: the example inputs by name.
        choice: which tensors grow with the batch; None if the batch is fixed.
        fixed: why it is fixed.
    """

    def __init__(self, inputs: Inputs, choice: BatchChoice | None, fixed: str | None) -> None:
        super().__init__()
        batched: set[Place] = set(choice.places) if choice else set()
        self.names = tuple(inputs)
        self.fixed = fixed
        self.tensors: list[tuple[_TensorRule, ...]] = []
        self.values: list[tuple[tuple[Path, Any], ...]] = []
        for name, value in inputs.items():
            found = list(leaves(value))
            self.tensors.append(
                tuple(
                    _TensorRule(path, tuple(leaf.shape), leaf.dtype, (name, path) in batched)
                    for path, leaf in found
                    if isinstance(leaf, torch.Tensor)
                )
            )
            self.values.append(tuple((path, leaf) for path, leaf in found if not isinstance(leaf, torch.Tensor)))

    def __deepcopy__(self, memo: dict[int, object]) -> InputGuard:
        return self

    def forward(self, *inputs: Any) -> None:
        """Raises `UserError` at the first input that differs."""
        factors: set[float] = set()
        for name, value, tensors, values in zip(self.names, inputs, self.tensors, self.values, strict=True):
            for rule in tensors:
                factors |= self._check_tensor(name, value, rule)
            for path, expected in values:
                self._check_value(name, value, path, expected)
        if len(factors) > 1:
            raise UserError(
                "the inputs have different batch sizes",
                why=f"their first dimensions are {sorted(factors)} times those of the example",
                fix="give every input the same number of samples",
            )

    def _check_tensor(self, name: str, value: Any, rule: _TensorRule) -> set[float]:
        leaf = _leaf(name, value, rule.path)
        if not isinstance(leaf, torch.Tensor):
            raise _mismatch(name, rule.path, f"a {type(leaf).__name__}", "a tensor")
        if leaf.dtype is not rule.dtype:
            raise _mismatch(name, rule.path, f"dtype {leaf.dtype}", f"dtype {rule.dtype}")
        shape = tuple(leaf.shape)
        if shape == rule.shape:
            return {1.0} if rule.batched else set()
        if rule.batched and len(shape) == len(rule.shape) and shape[1:] == rule.shape[1:] and shape[0] > 0:
            return {shape[0] / rule.shape[0]}
        expected = ["any" if rule.batched and axis == 0 else str(size) for axis, size in enumerate(rule.shape)]
        why = "the graph was captured for these sizes"
        if self.fixed and shape[1:] == rule.shape[1:]:
            why = f"the batch size is fixed: {self.fixed}"
        raise UserError(
            f"input {format_path(name, rule.path)} has shape {list(shape)}, expected [{', '.join(expected)}]",
            why=why,
            fix="resize the input, or capture the model again with an example of this shape",
        )

    def _check_value(self, name: str, value: Any, path: Path, expected: Any) -> None:
        leaf = _leaf(name, value, path)
        if isinstance(leaf, torch.Tensor) or type(leaf) is not type(expected) or leaf != expected:
            found = f"a tensor of shape {list(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)
            raise _mismatch(name, path, found, repr(expected))

    def extra_repr(self) -> str:
        return ", ".join(self.names)


def _leaf(name: str, value: Any, path: Path) -> Any:
    for step, key in path:
        try:
            value = value[key] if step == "item" else getattr(value, key)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"input {name!r} has no {format_path(name, path)}",
                why="the graph was captured with this part present",
                fix="give inputs of the example's structure",
            ) from error
    return value


def _mismatch(name: str, path: Path, found: str, expected: str) -> UserError:
    return UserError(
        f"input {format_path(name, path)} is {found}, expected {expected}",
        why="the graph was captured with this value and holds no code for others",
        fix="give inputs like the example, or capture the model again",
    )
