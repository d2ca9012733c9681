"""The page about target files names everything the parser knows, and its package can be installed."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qgraph.numerics import Overflow, Rounding, ScaleForm, Scheme
from qgraph.targets import get_target, list_targets, parse
from qgraph.targets.target import FACTORS
from tests.docs.test_code_blocks import ROOT, blocks

PAGE = "docs/writing_a_target.md"
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
CODE = " ".join(re.findall(r"`([^`\n]+)`", TEXT))
READERS = {"text", "flag", "number", "texts", "table", "tables", "allow"}


def keys() -> Iterator[str]:
    """Keys that the parser reads or allows: what it gives to the methods that read, and looks for in tables."""
    yield from (*parse.KEYS, "base", "bytes", "ddr", *parse.STEPS)
    for node in ast.walk(ast.parse(Path(parse.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in READERS:
            yield from _texts(node.args)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In):
            yield from _texts([node.left])


def _texts(arguments: list[ast.expr]) -> Iterator[str]:
    for argument in arguments:
        parts = argument.elts if isinstance(argument, ast.Set) else [argument]
        yield from (part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str))


def named(word: str) -> bool:
    """Whether the page names a word in code, by itself."""
    return re.search(rf"(?<![A-Za-z_]){re.escape(word)}(?![A-Za-z_])", CODE) is not None


def test_the_parser_is_read() -> None:
    found = set(keys())
    assert {"eight_bits", "many_groups", "fraction_bits", "fixed_result", "bounds", "clock_hz", "module"} <= found


@pytest.mark.parametrize("key", sorted(set(keys())))
def test_every_key_is_on_the_page(key: str) -> None:
    assert named(key), f"{PAGE} does not name the key {key!r}"


@pytest.mark.parametrize(
    "word", sorted({*FACTORS, *parse._POSITIONS, *map(str, (*Scheme, *ScaleForm, *Rounding, *Overflow))})
)
def test_every_word_is_on_the_page(word: str) -> None:
    assert named(word), f"{PAGE} does not name {word!r}"


def test_the_package_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, info = tmp_path / "mychip", tmp_path / "mychip-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    monkeypatch.chdir(package)
    python = [code for _, code in blocks(PAGE)]
    exec(python[0], {})  # writes mychip.toml
    (provider,) = (code for code in python if "def target_file" in code)
    (package / "__init__.py").write_text(f"from pathlib import Path\n{provider}", encoding="utf-8")
    group, point = re.search(r'entry-points\."(.+?)"\]\n(.+)\n', TEXT).groups()  # type: ignore[union-attr]
    (info / "entry_points.txt").write_text(f"[{group}]\n{point.replace(chr(34), '')}\n", encoding="utf-8")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mychip\nVersion: 1.0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "mychip", raising=False)
    assert "mychip" in list_targets()
    assert get_target("mychip").step("product", "conv2d").rule.bits == 16
    sys.modules.pop("mychip")
