"""Target files: every mistake is named with its place and what to do."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch

from qgraph.errors import TargetError
from qgraph.ir.op_table import OPS
from qgraph.numerics import QType, Scheme, SegmentForm, float16, qint8, qint16, qint32
from qgraph.targets import Memory, Target, get_target, load_target, parse_target

SMALL = """
name = "small"
description = "for tests"

[activations]
eight_bits = "int8"
int8 = "symmetric"

[weights]
per_channel = false
bias = "int32"
int8 = "symmetric_narrow"

[fusion]
residual = true

[tables]
int8 = "full"
int16 = 1024

[sampling]
weight_bits = 8

[arithmetic]
quantize = "divide:half_away"
factors = "float32"
product = "int32:wrap/fixed_point:24:half_even"
sum = "int32:wrap/fixed_point:24:half_even"
sample = "int32:wrap/fixed_point:24:half_even"
"add.sum" = "int32:wrap/float:half_even"

[[ops]]
names = ["conv2d", "linear"]
unit = "tensor"
legal = ["int8|int16, int8 -> int8|int32", "float16, float16 -> float16"]

[[ops]]
names = ["add"]
unit = "vector"
legal = ["int8 -> int8"]

[units.tensor]
"int8*int8" = 64

[units.vector]
int8 = 2.5

[memory]
clock_hz = 1e6

[memory.ddr]
bytes = 1e9
bytes_per_cycle = 4

[memory.sram]
bytes = 1e6
bytes_per_cycle = 8
"""


ADD = 'legal = ["int8 -> int8"]\n'
SEGMENTS = 'int16 = { segments = 64, entries = 64, break_points = "even", fraction_bits = 8 }'


def small(old: str = "", new: str = "") -> Target:
    assert old in SMALL
    return parse_target(SMALL.replace(old, new, 1), origin="small.toml")


def test_everything_a_file_says_is_read() -> None:
    target = small()
    assert (target.name, target.description) == ("small", "for tests")
    assert target.eight_bits == qint8
    assert target.activation_scheme(qint8) is Scheme.SYMMETRIC
    assert target.weight_scheme(qint8) is Scheme.SYMMETRIC_NARROW
    assert target.weight_per_channel is False
    assert target.bias == qint32
    assert target.residual is True
    assert str(target.quantize_rule) == "divide:half_away"
    scales = torch.tensor(0.1), torch.tensor(0.3)
    assert target.factor("add", *scales, result=torch.tensor(0.7)) == (scales[0] * scales[1] / 0.7).double()
    assert target.table_form(qint8) is None
    assert target.table_form(qint16) == 1024
    assert target.weight_bits == 8
    assert str(target.step("product")) == "int32:wrap/fixed_point:24:half_even"
    assert list(target.ops) == ["conv2d", "linear", "add"]
    assert target.units == {"tensor": {"int8*int8": 64}, "vector": {"int8": 2.5}}
    assert str(target.step("sum")) == str(target.step("sum", "sub")) == "int32:wrap/fixed_point:24:half_even"
    assert str(target.step("sum", "add")) == "int32:wrap/float:half_even"
    assert target.step("rescale") == target.step("product")
    assert target.memories == {"ddr": Memory(1e9, 4), "sram": Memory(1e6, 8)}
    assert (target.bytes_per_cycle, target.clock_hz) == (4, 1e6)
    assert target.rule("matmul") is None


def test_segments() -> None:
    assert small("int16 = 1024", SEGMENTS).table_form(qint16) == SegmentForm(64, 64, False, 8)
    plain = 'int16 = { segments = 50, entries = 32, break_points = "curvature" }'
    assert small("int16 = 1024", plain).table_form(qint16) == SegmentForm(50, 32, True, 0)


def test_steps_of_formats() -> None:
    words = {"sum": "half_even", "sum.int16": "half_up", "add.sum": "half_away", "add.sum.int16": "floor"}
    lines = "\n".join(f'"{key}" = "int32:wrap/fixed_point:24:{word}"' for key, word in words.items() if key != "sum")
    target = small('"add.sum" = "int32:wrap/float:half_even"', lines)

    def found(op: str, source: QType) -> str:
        return str(target.step("sum", op, source)).rpartition(":")[2]

    assert [found(op, source) for op in ("sub", "add") for source in (qint8, qint16)] == list(words.values())
    assert target.step("rescale", "add", qint16) == target.step("product")


def test_positions_are_float_unless_the_file_says_otherwise() -> None:
    bits = "weight_bits = 8"
    assert not small().integer_positions
    assert not small(bits, bits + '\npositions = "float32"').integer_positions
    assert small(bits, bits + '\npositions = "integer"').integer_positions


def test_products_in_float32_and_quotients_in_float64() -> None:
    x, y, z = torch.tensor(0.1), torch.tensor(0.3), torch.tensor(0.7)
    target = small('factors = "float32"', 'factors = "float32_product"')
    assert target.factor("add", x, y, result=z) == (x * y).double() / z.double()


def test_legal_formats() -> None:
    rule = small().rule("linear")
    assert rule is not None
    assert rule.accepts([qint16, qint8], qint32)
    assert rule.accepts([float16, float16], float16)
    assert not rule.accepts([qint8, qint16], qint8)
    assert not rule.accepts([qint8, qint8], float16)
    assert not rule.accepts([qint8, float16], qint8)
    assert str(rule.legal[0]) == "int8|int16, int8 -> int8|int32"
    add = small().rule("add")
    assert add is not None
    assert add.accepts([qint8, qint8, qint8], qint8), "further operands follow the last column"


def test_who_decides_a_results_scale() -> None:
    kept = small(ADD, ADD + "same_scale = true\n").rule("add")
    fixed = small(ADD, ADD + "fixed_result = { int8 = [0.00390625, -128] }\n").rule("add")
    own = small().rule("add")
    assert kept is not None
    assert fixed is not None
    assert own is not None
    assert (kept.same_scale, fixed.same_scale, own.same_scale) == (True, False, False)
    assert (kept.fixed_result, fixed.fixed_result, own.fixed_result) == ({}, {"int8": (1 / 256, -128)}, {})


def test_what_a_device_lacks() -> None:
    more = 'without = ["groups"]\nfactor_range = [0.5, 256.0]\nleast_scale = 1e-6\ntensorflow_padding = true\n'
    less, plain = small(ADD, ADD + more).rule("add"), small().rule("add")
    assert less is not None
    assert plain is not None
    assert (less.without, less.factor_range, less.least_scale) == (("groups",), (0.5, 256.0), 1e-6)
    assert less.tensorflow_padding
    assert (plain.without, plain.factor_range, plain.least_scale, plain.tensorflow_padding) == ((), None, 0.0, False)


def test_the_nearest_legal_lines_come_first() -> None:
    target = small()
    assert target.nearest_legal("linear", [float16, qint8], float16).startswith("float16, float16 -> float16")
    assert target.nearest_legal("linear", [qint8, qint16], qint8).startswith("int8|int16, int8")
    assert target.nearest_legal("matmul", [qint8, qint8], qint8) == "small has no matmul"


def test_what_a_target_does_not_define_is_an_error() -> None:
    with pytest.raises(TargetError, match="defines no arithmetic for 'produkt'") as raised:
        small().step("produkt")
    assert "did you mean 'product'?" in str(raised.value)
    with pytest.raises(TargetError, match="has no function tables for int32"):
        small().table_form(qint32)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        # keys
        ("[fusion]", "[fusoin]", ["unknown key 'fusoin'", "did you mean 'fusion'"]),
        ('unit = "vector"', 'unti = "vector"', ["unknown key 'unti'", "did you mean 'unit'?", "[[ops]] number 2"]),
        ("weight_bits = 8", "weight_bit = 8", ["unknown key 'weight_bit'", "'weight_bits'", "[sampling]"]),
        ("clock_hz", "clock", ["clock is", "[memory]"]),
        ('name = "small"\n', "", ["lacks 'name'", "give a text"]),
        ("residual = true\n", "", ["lacks 'residual'", "give true or false", "[fusion]"]),
        ("product = ", "prodct = ", ["lacks 'product'", "[arithmetic]"]),
        ("weight_bits = 8\n", "", ["lacks 'weight_bits'", "[sampling]"]),
        ("bytes_per_cycle = 4\n", "", ["lacks 'bytes_per_cycle'", "[memory]"]),
        ("[sampling]\nweight_bits = 8\n", "", ["lacks 'sampling'", "give a table"]),
        ('legal = ["int8 -> int8"]\n', "", ["lacks 'legal'", "[[ops]] number 2"]),
        ('unit = "vector"\n', "", ["lacks 'unit'", "[[ops]] number 2"]),
        # kinds
        ('name = "small"', "name = 3", ["name is 3", "give a text"]),
        ('name = "small"', 'name = ""', ["name is ''", "not empty"]),
        (
            'int8 = "symmetric"',
            'int8 = "symetric"',
            ["int8 is 'symetric'", "did you mean 'symmetric'", "[activations]"],
        ),
        ('int8 = "symmetric"', 'in8 = "symmetric"', ["unknown number format 'in8'", "[activations]"]),
        ('bias = "int32"', 'bias = "int33x"', ["unknown number format 'int33x'", "[weights]"]),
        ('"divide:half_away"', '"divde:half_away"', ["is no way to quantize", "divide:half_away", "[arithmetic]"]),
        ('"float32"', '"float31"', ["factors is 'float31'", "did you mean 'float32'", "[arithmetic]"]),
        ('"add.sum"', '"ad.sum"', ["there is no operator 'ad'", "did you mean 'add'", "[arithmetic]"]),
        ("residual = true", 'residual = "yes"', ["residual is 'yes'", "give true or false"]),
        ("[memory.ddr]", "[memory.dram]", ["the memory 'ddr' is not described", "[memory]"]),
        ("bytes = 1e9", "bites = 1e9", ["unknown key 'bites'", "[ddr]"]),
        ("weight_bits = 8", "weight_bits = 8.5", ["weight_bits is 8.5", "whole number"]),
        ("weight_bits = 8", "weight_bits = true", ["weight_bits is True", "number"]),
        ("bytes_per_cycle = 4", "bytes_per_cycle = 0", ["bytes_per_cycle is 0", "positive number"]),
        ("bytes_per_cycle = 4", "bytes_per_cycle = nan", ["bytes_per_cycle is nan", "positive number"]),
        ("clock_hz = 1e6", "clock_hz = inf", ["clock_hz is inf", "positive number"]),
        ("int8 = 2.5", "int8 = -1", ["int8 is -1", "positive number", "[vector]"]),
        ('names = ["add"]', 'names = "add"', ["names is 'add'", "a list of texts"]),
        ('names = ["add"]', "names = []", ["names is []", "not empty"]),
        ('legal = ["int8 -> int8"]', "legal = [8]", ["legal is [8]", "a list of texts"]),
        ("[units.vector]\nint8 = 2.5", "[units]\nvector = 2.5", ["vector is 2.5", "give a table"]),
        # contents
        ('unit = "vector"', 'unit = "vectors"', ["unit 'vectors' is not described", "did you mean 'vector'?"]),
        ('names = ["add"]', 'names = ["add", "linear"]', ["operator 'linear' is described twice", "number 2"]),
        ('names = ["add"]', 'names = ["ad"]', ["there is no operator 'ad'", "or 'add'"]),
        ("half_even", "half_evn", ["half_evn", "half_even", "[arithmetic]"]),
        ("int32:wrap", "int32:warp", ["unknown overflow 'warp'", "did you mean 'wrap'?", "[arithmetic]"]),
        ("int32:wrap/fixed_point:24:half_even", "nonsense", ["is not an arithmetic", "write it like"]),
        ("int32:wrap", "int60:wrap", ["accumulator of 60 bits", "use at most"]),
        ('"int8 -> int8"', '"int8 -> in8"', ["unknown number format 'in8'", "did you mean 'int8'", "number 2"]),
        ('"int8 -> int8"', '"int8"', ["'int8' is not a line of legal formats", "write operands and results like"]),
        ('"int8 -> int8"', '"-> int8"', ["unknown number format ''"]),
        ('"int8*int8" = 64', '"int8*innt8" = 64', ["unknown number format 'innt8'", "[tensor]"]),
        ("int16 = 1024", "int16 = 1000", ["cannot have 1000 intervals", "power of two", "[tables]"]),
        ("int16 = 1024", 'int16 = "half"', ["int16 is 'half'", "[tables]"]),
        ("int16 = 1024", "int16 = { segments = 64 }", ["lacks 'break_points'", "[tables], int16"]),
        ("int16 = 1024", SEGMENTS.replace("even", "evn"), ["break_points is 'evn'", 'give "even" or "curvature"']),
        ("int16 = 1024", SEGMENTS.replace("64,", "63,", 1), ["63 segments", "power of two", "[tables], int16"]),
        ("int16 = 1024", SEGMENTS.replace("64,", "4096,", 1), ["262144 intervals", "[tables], int16"]),
        ("int16 = 1024", SEGMENTS.replace("entries", "entry"), ["unknown key 'entry'", "did you mean 'entries'"]),
        ("int16 = 1024", SEGMENTS.replace("= 8 }", "= 9 }"), ["9 fraction bits"]),
        ("int16 = 1024", SEGMENTS.replace("= 8 }", "= 1.5 }"), ["fraction_bits is 1.5", "whole number"]),
        ("int16 = 1024", "float16 = 1024", ["'float16' is not an integer format", "[tables]"]),
        # positions, steps of formats
        (
            "weight_bits = 8",
            'weight_bits = 8\npositions = "intger"',
            ["positions is 'intger'", "'integer'"],
        ),
        ('"add.sum"', '"add.sum.int7777777"', ["int7777777", "[arithmetic]"]),
        ('"add.sum"', '"ad.sum.int8"', ["there is no operator 'ad'", "did you mean 'add'"]),
        # scales that the device decides
        (ADD, ADD + "same_scal = true\n", ["unknown key 'same_scal'", "did you mean 'same_scale'", "number 2"]),
        (ADD, ADD + 'same_scale = "yes"\n', ["same_scale is 'yes'", "give true or false"]),
        (ADD, ADD + "fixed_result = 0.5\n", ["fixed_result is 0.5", "give a table"]),
        (ADD, ADD + "fixed_result = { in8 = [0.5, 0] }\n", ["'in8' is no format", "did you mean 'int8'"]),
        (ADD, ADD + "fixed_result = { int16 = [0.5, 0] }\n", ["'int16' is no format of the result", "[fixed_result]"]),
        (ADD, ADD + "fixed_result = { int8 = 0.5 }\n", ["int8 is 0.5", "a list of scale and zero point"]),
        (ADD, ADD + "fixed_result = { int8 = [0.5] }\n", ["int8 is [0.5]", "a list of scale and zero point"]),
        (ADD, ADD + "fixed_result = { int8 = [0.5, 0.0] }\n", ["int8 is [0.5, 0.0]", "scale and zero point"]),
        (ADD, ADD + "fixed_result = { int8 = [-1, 0] }\n", ["a fixed scale of -1.0", "[fixed_result]"]),
        (ADD, ADD + "fixed_result = { int8 = [0.5, 128] }\n", ["a zero point of 128 is no code of int8", "127"]),
        (ADD, ADD + "same_scale = true\nfixed_result = { int8 = [0.5, 0] }\n", ["not both"]),
        # what a device lacks
        (ADD, ADD + 'without = ["dilations"]\n', ["without has 'dilations'", "did you mean 'dilation'"]),
        (ADD, ADD + "without = true\n", ["without is True"]),
        (ADD, ADD + "factor_range = 256.0\n", ["factor_range is 256.0", "the smaller one first"]),
        (ADD, ADD + "factor_range = [256.0, 1.0]\n", ["factor_range is [256.0, 1.0]", "the smaller one first"]),
        (ADD, ADD + 'least_scale = "tiny"\n', ["least_scale is 'tiny'"]),
        (ADD, ADD + "tensorflow_padding = 1\n", ["tensorflow_padding is 1", "give true or false"]),
    ],
)
def test_mistakes(old: str, new: str, words: list[str]) -> None:
    with pytest.raises(TargetError) as raised:
        small(old, new)
    for word in ["small.toml", *words]:
        assert word in str(raised.value)


@pytest.mark.parametrize("text", ["name = ", "[[ops]\n", "name = 'a'\nname = 'b'", "\x00"])
def test_text_that_is_not_toml(text: str) -> None:
    with pytest.raises(TargetError, match="is not TOML") as raised:
        parse_target(text, origin="broken.toml")
    assert "broken.toml" in str(raised.value)
    assert raised.value.why


@pytest.mark.parametrize("text", ["", "ops = 3\nunits = {}", "ops = [3]\nunits = {}"])
def test_files_with_next_to_nothing(text: str) -> None:
    with pytest.raises(TargetError):
        parse_target(text, origin="empty.toml")


def test_a_file_is_found_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(SMALL, encoding="utf-8")
    assert load_target(path) == get_target(str(path)) == get_target(path) == small()
    assert get_target(path).origin == str(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="cannot be read") as raised:
        get_target(str(tmp_path / "none.toml"))
    assert "FileNotFoundError" in str(raised.value)
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(TargetError, match="cannot be read"):
        get_target(tmp_path / "folder.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xff\xfe"')
    with pytest.raises(TargetError, match="UnicodeDecodeError"):
        get_target(tmp_path / "latin.toml")


BPU = get_target("bpu")


@pytest.mark.parametrize("op", list(BPU.ops))
def test_every_operator_of_bpu_can_run_there(op: str) -> None:
    """Something lowers it; its formats are integers with tables where needed; its unit has a rate for them."""
    entry, rule = OPS.named(op), BPU.ops[op]
    assert entry.lowering is not None or entry.kind in ("move", "structure"), "an operator that nothing lowers"
    rates = BPU.units[rule.unit]
    for line in rule.legal:
        formats = [str(name) for column in line.operands for name in column]
        assert all(name.startswith("int") for name in formats)
        assert set(map(str, line.results)) <= {"int8", "int16", "int32"}
        if entry.kind == "matmul":
            pairs = {
                f"{first}*{second}" for first in map(str, line.operands[0]) for second in map(str, line.operands[1])
            }
            assert pairs <= rates.keys()
            assert "int16*int16" not in pairs, "the device has no such product"
        else:
            assert set(formats) <= rates.keys()
        if rule.unit == "table":
            assert set(formats) <= BPU.tables.keys()


def test_bpu_runs_every_operator_that_has_a_lowering() -> None:
    lowered = {op.name for op in OPS if op.lowering is not None}
    assert lowered - BPU.ops.keys() <= {"dequant_stub", "identity", "softmax"}, "lowered, but no target runs it"


def test_bpu_defines_every_step() -> None:
    assert BPU.arithmetic.keys() == {"product", "sum", "sample"}
    text = resources.files("qgraph.targets").joinpath("bpu.toml").read_text(encoding="utf-8")
    assert parse_target(text, origin="x") == BPU


FUNCTIONS = """
[functions]
values = "float32"
quantize = "reciprocal:half_up"
rescale = true
module = "qgraph.targets.mlas"

[arithmetic]
"""
TABLE_OPS = """
[[ops]]
names = [
    "sigmoid", "silu", "tanh", "exp", "gelu", "hardsigmoid", "hardswish", "leaky_relu", "rsqrt", "sqrt", "erf",
]
unit = "vector"
legal = ["int8 -> int8"]

[units.tensor]
"""


def with_functions(old: str = "", new: str = "") -> Target:
    text = SMALL.replace("\n[arithmetic]\n", FUNCTIONS, 1).replace("\n[units.tensor]\n", TABLE_OPS, 1)
    assert old in text
    return parse_target(text.replace(old, new, 1), origin="small.toml")


def test_how_function_tables_are_made() -> None:
    plain, given = small().functions, with_functions().functions
    assert (plain.values, plain.quantize, plain.rescale, plain.own) == (torch.float64, None, False, {})
    assert (given.values, str(given.quantize), given.rescale) == (torch.float32, "reciprocal:half_up", True)
    assert {"sigmoid", "gelu", "rsqrt"} <= given.own.keys()


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ('values = "float32"', 'values = "float16"', ["values is 'float16'", "float32 or float64"]),
        ('"reciprocal:half_up"', '"multiply:half_up"', ["'multiply:half_up' is no way to quantize"]),
        ("rescale = true", "rescale = 1", ["rescale is 1", "true or false"]),
        ('module = "qgraph.targets.mlas"', 'modul = "x"', ["unknown key 'modul'", "'module'"]),
        ("qgraph.targets.mlas", "qgraph.targets.missing", ["ModuleNotFoundError", "importable module"]),
        ("qgraph.targets.mlas", "qgraph.targets.find", ["AttributeError", "FUNCTIONS"]),
        ('"silu", ', "", ["a function for 'silu', which the target does not run"]),
    ],
)
def test_mistakes_about_function_tables(old: str, new: str, parts: list[str]) -> None:
    with pytest.raises(TargetError) as caught:
        with_functions(old, new)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
