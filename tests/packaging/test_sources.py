"""Rules that hold for every source file: who imports whom, number formats, size, documentation."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import passes
import qgraph
import qgraph.passes
from qgraph.quantization import QConfigSetter
from tests.packaging.sources import FILES, ROOT, imports, name_of, tree

# Part of qgraph to the parts it may import; each may import itself. docs/architecture.md draws it.
LAYERS: dict[str, set[str]] = {"errors": set(), "memory": set(), "files": {"errors"}}
_BELOW = {"errors", "memory", "files"}
for _part in ("numerics", "nn", "ir"):
    LAYERS[_part] = set(_BELOW)
    _BELOW.add(_part)
LAYERS["rewrite"] = set(_BELOW)
LAYERS["targets"] = set(_BELOW)
LAYERS["capture"] = set(_BELOW)
LAYERS["pipeline"] = _BELOW | {"rewrite"}
LAYERS["simulator"] = _BELOW | {"targets"}
LAYERS["lowering"] = _BELOW | {"rewrite", "targets", "capture", "simulator"}
LAYERS["quantization"] = _BELOW | {"rewrite", "pipeline", "targets", "capture", "simulator", "lowering"}
LAYERS["artifact"] = _BELOW | {"targets", "capture", "simulator"}
LAYERS["passes"] = {"pipeline"}
_TOP = LAYERS["quantization"] | {"quantization"}
LAYERS["export"] = set(_TOP)
LAYERS["analysis"] = set(_TOP)
LAYERS["viz"] = set(_TOP)
LAYERS["demo"] = _TOP | {"analysis", "viz"}
LAYERS["cli"] = _TOP | {"analysis", "viz", "demo", "artifact"}
LAYERS["__main__"] = {"cli"}
LAYERS["__init__"] = _TOP | {"analysis", "viz", "artifact", "export"}

# Groups of capture, each standing on those before it.
CAPTURE = ("values", "model", "options", "sizes", "boundary", "recording", "verification", "batch", "writes", "api")

by_file = pytest.mark.parametrize("path", FILES, ids=name_of)


def part_of(path: Path) -> str:
    return path.relative_to(ROOT / "qgraph").parts[0].removesuffix(".py")


@by_file
def test_imports_point_one_way(path: Path) -> None:
    if path.is_relative_to(ROOT / "passes"):
        allowed = LAYERS["__init__"] - {"analysis", "viz", "artifact", "export"} | {"passes"}
        part = "a pass"
    else:
        part = part_of(path)
        allowed = LAYERS[part] | {part}
    for module, line in imports(path):
        names = module.split(".")
        if names[0] == "qgraph" and len(names) > 1 and names[1] in LAYERS:
            assert names[1] in allowed, f"{name_of(path)}:{line}: {part} must not import qgraph.{names[1]}"


def test_groups_of_capture_import_one_way() -> None:
    folder = ROOT / "qgraph/capture"
    assert {path.stem for path in folder.iterdir()} - {"__init__", "__pycache__"} == set(CAPTURE)
    for path in folder.rglob("*.py"):
        group = path.relative_to(folder).parts[0].removesuffix(".py")
        if group == "__init__":
            continue
        for module, line in imports(path, typing_only=True):
            if module.startswith("qgraph.capture."):
                other = module.split(".")[2]
                assert CAPTURE.index(other) <= CAPTURE.index(group), f"{name_of(path)}:{line}: {group} imports {other}"


@by_file
def test_only_the_facade_imports_passes(path: Path) -> None:
    if path.is_relative_to(ROOT / "passes") or path == ROOT / "qgraph/passes.py":
        return
    found = [line for module, line in imports(path, typing_only=True) if module.split(".")[0] == "passes"]
    assert not found, f"{name_of(path)}:{found[0]}: qgraph knows no concrete pass"


@by_file
def test_deprecated_quantization_of_torch_is_not_used(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.Attribute, ast.Import, ast.ImportFrom)):
            text = ast.unparse(node)
            for word in ("torch.ao", "torch.quantization", "from torch import ao", "from torch import quantization"):
                assert word not in text, f"{name_of(path)}:{node.lineno}: {text}"


_NAMED = {bound for bits in (4, 8, 16, 32) for bound in ((1 << bits - 1) - 1, 1 << bits - 1, (1 << bits) - 1)}
BOUNDS = _NAMED - {7, 8, 15}


@by_file
def test_bounds_of_number_formats_are_never_written_out(path: Path) -> None:
    """127, 128, 255, 32767, ...: `QType` owns them. The bounds of 4 bits are too small to tell from other numbers."""
    if path.is_relative_to(ROOT / "qgraph/numerics"):
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            where = f"{name_of(path)}:{node.lineno}"
            assert node.value not in BOUNDS or _is_size(path, node), f"{where}: {node.value} belongs to a QType"


def _is_size(path: Path, constant: ast.Constant) -> bool:
    """Whether a number is a keyword called for a size, such as `maxsize=256`."""
    parents = [node for node in ast.walk(tree(path)) if isinstance(node, ast.keyword) and node.value is constant]
    return any("size" in (node.arg or "") for node in parents)


@by_file
def test_files_are_short(path: Path) -> None:
    count = len(path.read_text(encoding="utf-8").splitlines())
    assert count < 500, f"{name_of(path)} has {count} lines: split it by subject"


@by_file
def test_library_code_does_not_print(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "breakpoint"), f"{name_of(path)}:{node.lineno}"


def test_both_packages_come_from_one_folder() -> None:
    assert Path(qgraph.__file__).parents[1] == Path(passes.__file__).parents[1] == ROOT


def test_the_facade_has_the_classes_of_the_package_itself() -> None:
    from passes.fuse_conv_bn_add_relu import FuseConvBnAddRelu

    assert qgraph.passes.FuseConvBnAddRelu is FuseConvBnAddRelu


@pytest.mark.parametrize("module", [qgraph, qgraph.passes], ids=lambda module: module.__name__)
def test_public_names_exist_once_and_are_documented(module) -> None:
    names = module.__all__
    assert len(set(names)) == len(names)
    for name in names:
        value = getattr(module, name)
        if name == "__version__":
            continue
        text = inspect.getdoc(value if callable(value) else type(value))
        assert text, f"{module.__name__}.{name} has no docstring"
        assert not text.startswith(f"{name}("), f"{module.__name__}.{name} has only the docstring of a dataclass"


def test_the_interface_of_the_design_is_there() -> None:
    for name in (
        "trace",
        "prepare",
        "calibrate",
        "set_fake_quantize",
        "convert",
        "draw",
        "Simulator",
        "FakeQuantState",
    ):
        assert name in qgraph.__all__


def test_every_module_can_be_imported_and_has_a_docstring() -> None:
    for package in (qgraph, passes):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name.endswith("__main__"):
                continue
            assert importlib.import_module(found.name).__doc__, found.name


def test_public_methods_of_public_classes_are_documented() -> None:
    for name in qgraph.__all__:
        cls = getattr(qgraph, name)
        if not inspect.isclass(cls):
            continue
        for attribute, member in vars(cls).items():
            own = not attribute.startswith("_") and (inspect.isfunction(member) or isinstance(member, property))
            bases = [*cls.__mro__[1:], QConfigSetter]  # setters keep a protocol, whose text is theirs
            if own and not any(hasattr(base, attribute) for base in bases):
                assert inspect.getdoc(member), f"{name}.{attribute}"
