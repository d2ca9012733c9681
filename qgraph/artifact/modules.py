"""Modules of a graph: its input guard, and what stays in float, as constructor options and tensors.

A module is saved only if building its class from the options found on it gives the same module again; what differs is
named, so nothing is lost in silence.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from torch import nn

from qgraph.artifact.known import class_name, module_classes
from qgraph.artifact.records import RecordReader, RecordWriter
from qgraph.artifact.values import flag, listed, mapping, text, understood, whole
from qgraph.capture.boundary.guard import InputGuard, Rule
from qgraph.capture.sizes.expressions import Condition
from qgraph.capture.values.variants import BatchChoice
from qgraph.errors import ArtifactError
from qgraph.nn import Activation, Affine, Fused
from qgraph.nn.fused import FUSED_CLASSES, as_fused

GUARD = "qgraph.InputGuard"
_GUARD_FIELDS: dict[str, Any] = {
    "names": tuple[str, ...],
    "fixed": str | None,
    "layout": bool,
    "choice": BatchChoice | None,
    "conditions": tuple[Condition, ...],
    "proven": set[int],
    "rules": tuple[Rule, ...],
}
_TABLES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training")
_HOOKS = tuple(name for name in vars(nn.Module()) if "_hook" in name)
_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
_FUSED: dict[type[nn.Module], type[nn.Module]] = {fused: plain for plain, fused in FUSED_CLASSES.items()}


# --- writing ---------------------------------------------------------------------------------------------------------


def write_module(writer: RecordWriter, module: nn.Module, path: str) -> dict[str, Any]:
    """A module as JSON.

    Raises:
        ArtifactError: its class is not known, or it is more than its class makes of its options.
    """
    if isinstance(module, InputGuard):
        fields = {name: writer.typed(getattr(module, name), hint) for name, hint in _GUARD_FIELDS.items()}
        return {"class": GUARD, **fields}
    kind = type(module)
    if module_classes().get(class_name(kind)) is not kind:
        raise ArtifactError(
            f"a file cannot hold the module {path} of class {class_name(kind)}",
            why="loading a file runs no code that is not qgraph's or torch's",
            fix="do not name it in leaf_modules, so that its steps are captured, or build it from torch.nn modules",
        )
    options = _options(module)
    _check_same(module, _built(kind, options), path)
    written: dict[str, Any] = {"class": class_name(kind)}
    if options:
        written["options"] = {name: writer.value(value) for name, value in options.items()}
    tensors = {name: _write_tensor(writer, tensor, f"{path}.{name}") for name, tensor in _tensors(module)}
    if tensors:
        written["tensors"] = tensors
    training = [name for name, part in module.named_modules() if part.training]
    return {**written, "training": training} if training else written


def write_tensor(writer: RecordWriter, tensor: torch.Tensor, path: str) -> dict[str, Any]:
    """A tensor that the graph holds, as JSON."""
    return _write_tensor(writer, tensor, path)


def _write_tensor(writer: RecordWriter, tensor: torch.Tensor, path: str) -> dict[str, Any]:
    written: dict[str, Any] = {"tensor": writer.tensors.add(tensor, path)}
    if isinstance(tensor, nn.Parameter):
        written["parameter"] = True
    return {**written, "requires_grad": True} if tensor.requires_grad else written


def _options(module: nn.Module) -> dict[str, Any]:
    """Constructor options that the module shows as attributes and that differ from the defaults."""
    if isinstance(module, Affine):
        return {}
    kind = _FUSED.get(type(module), type(module))
    parameters = inspect.signature(kind.__init__).parameters
    names = [name for name in parameters if name not in ("self", "args", "kwargs", "device", "dtype")]
    if isinstance(module, nn.RNNBase):
        own = {nn.RNN: ["nonlinearity"], nn.LSTM: ["proj_size"]}
        names = [*_RECURRENT, *own.get(type(module), [])]
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(module, name, inspect.Parameter.empty)
        if name == "bias" and not isinstance(value, bool):
            value = _has_bias(module)
        if value is inspect.Parameter.empty or isinstance(value, torch.Tensor):
            continue
        default = parameters[name].default if name in parameters else inspect.Parameter.empty
        if type(value) is not type(default) or value != default:
            found[name] = value
    if isinstance(module, Fused):
        found.update(activation=module.activation.value, adds=module.adds)
    return found


def _has_bias(module: nn.Module) -> bool:
    return any("bias" in name for name, _ in module.named_parameters())


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _check_same(module: nn.Module, twin: nn.Module, path: str) -> None:
    parts, others = dict(module.named_modules(remove_duplicate=False)), dict(twin.named_modules(remove_duplicate=False))
    if parts.keys() != others.keys():
        raise _unlike(path, "it has other parts than its class makes")
    for name, part in parts.items():
        place = f"{path}.{name}".rstrip(".")
        if type(part) is not type(others[name]):
            raise _unlike(place, f"it is a {class_name(type(part))}")
        if any(getattr(part, hooks) for hooks in _HOOKS):
            raise _unlike(place, "it has hooks")
        _check_attributes(part, others[name], place)
    for (name, tensor), (other, like) in zip(_tensors(module), _tensors(twin), strict=False):
        if name != other or (tensor.shape != like.shape and not isinstance(module, Affine)):
            raise _unlike(path, f"its tensor {name} has the shape {list(tensor.shape)}")
    if len(list(_tensors(module))) != len(list(_tensors(twin))):
        raise _unlike(path, "it holds other tensors")


def _check_attributes(part: nn.Module, twin: nn.Module, place: str) -> None:
    own, like = vars(part), vars(twin)
    for name in own.keys() | like.keys():
        if name in _TABLES or name in _HOOKS or name in ("_flat_weights", "_flat_weight_refs"):
            continue
        if name not in own or name not in like or not _equal(own[name], like[name]):
            raise _unlike(place, f"its attribute {name} is {own.get(name, 'missing')!r}"[:200])


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, (list, tuple)) and type(one) is type(two):
        return len(one) == len(two) and all(map(_equal, one, two))
    plain = (bool, int, float, str, type(None), torch.dtype, torch.device, Enum)
    return one is two or (type(one) is type(two) and isinstance(one, plain) and one == two)


def _unlike(place: str, why: str) -> ArtifactError:
    return ArtifactError(
        f"the module {place} cannot be built again from its class and options",
        why=why,
        fix="use a module as its class makes it, or let its steps be captured",
    )


# --- reading ---------------------------------------------------------------------------------------------------------


def read_module(reader: RecordReader, entry: Any, path: str) -> nn.Module:
    """The module that some JSON stands for.

    Raises:
        ArtifactError: its class is not known, or options or tensors do not fit it.
    """
    if mapping(entry).get("class") == GUARD:
        return _read_guard(reader, entry)
    found = mapping(entry, frozenset(("class",)), frozenset(("options", "tensors", "training")))
    name = text(found["class"])
    kind = module_classes().get(name)
    if kind is None:
        raise ArtifactError(
            f"the graph has a module of class {name[:80]!r}, which is not known here",
            fix="import the package that registers it before you load the graph",
        )
    tensors = mapping(found.get("tensors", {}))
    options = {name: reader.value(value) for name, value in mapping(found.get("options", {})).items()}
    if whole(options.get("num_layers", 1)) > max(len(tensors), 1):
        raise ArtifactError(f"the module {path} has fewer tensors than layers")
    with understood(f"the module {path}"):
        module = _built(kind, options)
    _fill(reader, module, tensors, path)
    _set_training(module, [text(part) for part in listed(found.get("training", []))], path)
    return module


def read_tensor(reader: RecordReader, entry: Any) -> torch.Tensor:
    """A tensor that the graph holds, a parameter if it was one."""
    found = mapping(entry, frozenset(("tensor",)), frozenset(("parameter", "requires_grad")))
    tensor = reader.tensors.get(found["tensor"])
    needs_gradient = flag(found.get("requires_grad", False))
    if needs_gradient and not tensor.is_floating_point() and not tensor.is_complex():
        raise ArtifactError("a tensor of integers asks for gradients")
    if flag(found.get("parameter", False)):
        known = reader.parameters.setdefault(found["tensor"], nn.Parameter(tensor, requires_grad=needs_gradient))
        if known.requires_grad is not needs_gradient:
            raise ArtifactError("a parameter both asks for gradients and does not")
        return known
    return tensor.requires_grad_() if needs_gradient else tensor


def _built(kind: type[nn.Module], options: dict[str, Any]) -> nn.Module:
    """The module that a class makes of options, without values."""
    with torch.device("meta"):
        if kind is Affine:
            return Affine(torch.empty(0), torch.empty(0))
        if kind not in _FUSED:
            return kind(**options)
        rest = dict(options)
        activation, adds = Activation(rest.pop("activation")), rest.pop("adds")
        fused = as_fused(_FUSED[kind](**rest))
        fused.activation, fused.adds = activation, adds
        return fused


def _fill(reader: RecordReader, module: nn.Module, tensors: dict[str, Any], path: str) -> None:
    expected = dict(_tensors(module))
    if expected.keys() != tensors.keys():
        names = ", ".join(sorted(expected.keys() ^ tensors.keys()))
        raise ArtifactError(f"the tensors of the module {path} do not fit its class: {names[:200]}")
    for name, like in expected.items():
        tensor = read_tensor(reader, tensors[name])
        fits = tensor.shape == like.shape or isinstance(module, Affine)
        if not fits or isinstance(like, nn.Parameter) != isinstance(tensor, nn.Parameter):
            raise ArtifactError(f"the tensor {path}.{name} is not what its module's class and options ask for")
        owner, _, last = name.rpartition(".")
        setattr(module.get_submodule(owner), last, tensor)


def _set_training(module: nn.Module, training: list[str], path: str) -> None:
    parts = dict(module.named_modules())
    for name in training:
        if name not in parts:
            raise ArtifactError(f"the module {path} has no part {name[:80]!r}")
    for name, part in parts.items():
        part.training = name in training


def _read_guard(reader: RecordReader, entry: Any) -> InputGuard:
    found = mapping(entry, frozenset(("class", *_GUARD_FIELDS)), frozenset())
    guard = InputGuard({}, None, None)
    for name, hint in _GUARD_FIELDS.items():
        setattr(guard, name, reader.typed(found[name], hint, name))
    if len(guard.names) != len(guard.rules) or any(not inner.place for inner in guard.rules):
        raise ArtifactError("the input guard does not have one rule for each input")
    guard.training = False
    return guard
