"""The closed lists: what a file may name. A name is looked up here, never imported.

Functions and methods are those of the operator table, torch's own functions of tensors, those of the engines that
targets name, and what captured graphs add around them. An operator, function or module class of another package is
known once that package has registered it, or its target has been read.
"""

from __future__ import annotations

import collections
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from qgraph.capture.sizes.expressions import number_of_parts
from qgraph.errors import ArtifactError, did_you_mean
from qgraph.ir import functional as QF
from qgraph.ir.integer import NAMESPACE, integer_name, integer_operator
from qgraph.ir.op_table import OPS
from qgraph.targets import get_target
from qgraph.targets.inherit import BUILT_IN
from qgraph.targets.parse import ENGINE_FUNCTIONS

Function = Callable[..., Any]

_NAMESPACES: tuple[tuple[str, Any], ...] = (
    ("operator", operator),
    ("torch", torch),
    ("torch.nn.functional", F),
    ("torch.special", torch.special),
    ("torch.linalg", torch.linalg),
    ("torch.fft", torch.fft),
    ("torch.functional", torch.functional),
    ("torch.Tensor", torch.Tensor),
    ("math", math),
    ("qgraph.functional", QF),
)
# Arithmetic with sizes, and access to parts of inputs and results.
_STRUCTURE: dict[str, Function] = {
    "getattr": getattr,
    "round": round,
    "number_of_parts": number_of_parts,
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "getitem"),
            *("and_", "or_", "xor", "invert", "lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne"),
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
}
_NEW = frozenset({"new_empty", "new_full", "new_ones", "new_zeros"})
_CREATION = ("arange", "empty", "eye", "full", "linspace", "ones", "zeros")
# Methods that hand out memory, numbers or hooks instead of computing a tensor.
_NO_METHODS = frozenset(
    (
        *("backward", "const_data_ptr", "data_ptr", "numpy", "tolist", "storage", "untyped_storage", "module_load"),
        *("register_hook", "register_post_accumulate_grad_hook", "record_stream", "retain_grad"),
    )
)
_NO_LEAVES = frozenset(
    (
        *("AdaptiveLogSoftmaxWithLoss", "Container", "DataParallel", "Module", "ModuleDict", "ModuleList"),
        *("ParameterDict", "ParameterList", "RNNBase", "RNNCellBase", "Sequential", "Transformer"),
        *("TransformerDecoder", "TransformerDecoderLayer", "TransformerEncoder", "TransformerEncoderLayer"),
    )
)
_CONTAINERS: dict[str, type[Any]] = {
    "dict": dict,
    "list": list,
    "tuple": tuple,
    "torch.Size": torch.Size,
    "collections.OrderedDict": collections.OrderedDict,
    **{f"torch.return_types.{name}": kind for name, kind in vars(torch.return_types).items() if isinstance(kind, type)},
}


# --- functions -------------------------------------------------------------------------------------------------------


class KnownFunctions:
    """Functions by name and names by function, as the operator table is now."""

    def __init__(self) -> None:
        self._named: dict[str, Function] = dict(_STRUCTURE)
        own = [function for op in OPS for function in (op.target, *op.functions, *op.in_place)]
        for function in own:
            if callable(function) and not isinstance(function, str):
                self._add(function_name(function), function)
        for function in _engine_functions():
            self._add(function_name(function), function)
        for name, function in torch_functions().items():
            self._named.setdefault(name, function)

    def _add(self, name: str, function: Function) -> None:
        if self._named.setdefault(name, function) is not function:
            self._named[name] = _ambiguous

    def name(self, function: Any) -> str:
        """The name of a function.

        Raises:
            ArtifactError: a file cannot name it.
        """
        integer = integer_name(function)
        name = f"{NAMESPACE}.{integer}" if integer is not None else function_name(function)
        if integer is None and self._named.get(name) is not function:
            raise ArtifactError(
                f"a file cannot hold a call of {name}",
                why="it is no operator of qgraph and no function of torch, and loading a file runs no other code",
                fix="register the operator (qgraph.ir.op_table.OPS.define), or write the step with torch's functions",
            )
        return name

    def function(self, name: str) -> Function:
        """The function of that name.

        Raises:
            ArtifactError: none is known.
        """
        if name.startswith(f"{NAMESPACE}.") and name not in self._named:
            return _integer_operator(name.removeprefix(f"{NAMESPACE}."))
        found = self._named.get(name)
        if found is None or found is _ambiguous:
            raise ArtifactError(f"the graph calls {name!r}, which is not known here", fix=_register(name, self._named))
        return found


def function_name(function: Any) -> str:
    """How files call a function: its place in torch or Python, or else its module and name."""
    if isinstance(function, torch._ops.OpOverload):
        return f"{function.namespace}.{function._opname}.{function._overloadname}"
    plain = getattr(function, "__name__", type(function).__name__)
    for prefix, namespace in _NAMESPACES:
        if namespace.__dict__.get(plain) is function:
            return f"{prefix}.{plain}"
    try:
        if function in _other_names():
            return _other_names()[function]
    except TypeError:  # an object that cannot be hashed is none of them
        pass
    module = getattr(function, "__module__", None)
    qualified = getattr(function, "__qualname__", plain)
    return qualified if module in (None, "builtins") else f"{module}.{qualified}"


@lru_cache
def _other_names() -> dict[Any, str]:
    """Functions that are called otherwise in their namespace than by themselves, such as `torch.fft.fft`."""
    found: dict[Any, str] = {number_of_parts: "number_of_parts"}
    for prefix, namespace in _NAMESPACES:
        for name, function in sorted(vars(namespace).items()):
            if not name.startswith("_") and inspect.isbuiltin(function):
                found.setdefault(function, f"{prefix}.{name}")
    return found


def _engine_functions() -> Iterable[Function]:
    """Functions of engines, of built-in targets and all others that have been read."""
    for target in BUILT_IN:
        get_target(target)
    return ENGINE_FUNCTIONS


@lru_cache
def torch_functions() -> dict[str, Function]:
    """Torch's functions of tensors, none of which writes to its operands."""
    table = torch.overrides.get_overridable_functions()
    modules = (torch, F, torch.special, torch.linalg, torch.fft, torch.functional)
    found = [function for module in modules for function in table.get(module, ())]
    found += [getattr(torch, name) for name in _CREATION]
    plain = [function for function in found if not inspect.isclass(function)]
    named = {function_name(function): function for function in plain}
    return {name: function for name, function in named.items() if not name.endswith("_") and "._" not in name}


@lru_cache
def _torch_methods() -> frozenset[str]:
    table = torch.overrides.get_overridable_functions()
    names = {str(getattr(function, "__name__", "_")) for function in table.get(torch.Tensor, ())}
    return frozenset(name for name in names if not name.startswith("_") and not name.endswith("_")) - _NO_METHODS | _NEW


def check_method(name: str) -> str:
    """`name`, if it is a tensor method that files may name.

    Raises:
        ArtifactError: it is not.
    """
    if OPS.method(name) is None and name not in _torch_methods():
        raise ArtifactError(
            f"a file cannot hold a call of the method {name!r}",
            why="it is no operator of qgraph and no method by which torch computes a tensor",
            fix="write the step with torch's functions",
        )
    return name


def check_attribute(function: Any, args: Sequence[Any]) -> None:
    """Checks that a call of `getattr` asks for a public attribute.

    Raises:
        ArtifactError: it does not.
    """
    if function in (getattr, QF.field):
        name = args[1] if len(args) == 2 else None
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
            raise ArtifactError(f"a file cannot hold an access to the attribute {name!r}")


def _integer_operator(name: str) -> Function:
    if name.isidentifier() and not name.startswith("_") and hasattr(getattr(torch.ops, NAMESPACE), name):
        operator_: Function = integer_operator(name)
        return operator_
    raise ArtifactError(
        f"the graph calls the integer operator {name!r}, which is not known here",
        fix="import the package that registers it (register_operator) before you load the graph",
    )


def _ambiguous() -> None:
    """Stands for a name that two functions have."""


def _register(name: str, known: Iterable[str]) -> str:
    before = "import the package that registers it, or read the target that names it, before you load the graph"
    return f"{before}; {did_you_mean(name, known)}"


# --- classes ---------------------------------------------------------------------------------------------------------


def module_classes() -> dict[str, type[nn.Module]]:
    """Classes of modules that may be part of a graph, by name."""
    return {class_name(kind): kind for kind in _module_classes()}


def _module_classes() -> Iterator[type[nn.Module]]:
    for op in OPS:
        yield from op.modules
    for name, kind in vars(nn).items():
        own = isinstance(kind, type) and issubclass(kind, nn.Module) and kind.__module__.startswith("torch.nn.modules")
        if own and name not in _NO_LEAVES and not name.startswith("Lazy"):
            yield kind


def class_name(kind: type[Any]) -> str:
    """How files call a class."""
    if kind.__module__.startswith("torch.nn.modules.") and vars(nn).get(kind.__name__) is kind:
        return f"torch.nn.{kind.__name__}"
    if kind.__module__ == "builtins":
        return kind.__qualname__
    return f"{kind.__module__}.{kind.__qualname__}"


class KnownClasses:
    """Classes of inputs and outputs: Python's and torch's containers, and those the caller vouches for."""

    def __init__(self, more: Iterable[type[Any]] = ()) -> None:
        self._given = {class_name(kind): kind for kind in more}

    def named(self, name: str) -> type[Any]:
        """The class of that name.

        Raises:
            ArtifactError: it is none of them.
        """
        found = _CONTAINERS.get(name) or self._given.get(name)
        if found is None:
            raise ArtifactError(
                f"the graph's inputs or outputs use the class {name}",
                why="loading imports nothing that a file names",
                fix=f"import it and say so: load(path, classes=[{name.rpartition('.')[2]}])",
            )
        return found
