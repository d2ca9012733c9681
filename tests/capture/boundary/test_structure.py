"""Nested inputs and outputs: taken apart, rebuilt, and checked at call time."""

from __future__ import annotations

import collections
import dataclasses
import enum
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import qgraph
from qgraph import ExampleInputs
from qgraph.capture import trace
from qgraph.errors import CaptureError, UserError
from tests.capture.checks import assert_agrees, run
from tests.support.models import Forward


def t(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (2, 3)))


class Point(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor | None = None


@dataclasses.dataclass
class Sample:
    image: torch.Tensor
    boxes: list[torch.Tensor] = dataclasses.field(default_factory=list)
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: torch.Tensor
    name: str = "n"


@dataclasses.dataclass
class Derived:
    value: torch.Tensor
    double: torch.Tensor = dataclasses.field(init=False)

    def __post_init__(self):
        self.double = self.value * 2


@dataclasses.dataclass(kw_only=True, slots=True)
class Slotted:
    value: torch.Tensor
    tags: tuple[str, ...] = ("a",)


@dataclasses.dataclass
class Scaled:
    """Its `__post_init__` may run only once."""

    value: torch.Tensor

    def __post_init__(self):
        self.value = self.value * 2


class Boxes(list):
    """A list with a name of its own."""


class Mode(enum.Enum):
    FAST = 1
    SLOW = 2


class Level(enum.IntEnum):
    LOW = 1


# --- outputs ---------------------------------------------------------------------------------------------------

OUTPUTS = {
    "tensor": lambda m, x: x * 2,
    "none": lambda m, x: None,
    "empty tuple": lambda m, x: (),
    "one-tuple": lambda m, x: (x * 2,),
    "list": lambda m, x: [x, x * 2],
    "dict": lambda m, x: {"a": x * 2, "b": {"c": [x, (x + 1, None)]}},
    "dict with other keys": lambda m, x: {0: x * 2, (1, 2): x + 1, None: x},
    "ordered dict": lambda m, x: collections.OrderedDict(b=x * 2, a=x),
    "ordered dict with integers": lambda m, x: collections.OrderedDict({1: x * 2, 0: x}),
    "default dict": lambda m, x: collections.defaultdict(list, a=x * 2),
    "named tuple": lambda m, x: Point(x * 2),
    "nested named tuple": lambda m, x: [Point(x * 2, x), {"p": Point(x)}],
    "dataclass": lambda m, x: Sample(x * 2, [x, x + 1], 0.5),
    "frozen dataclass": lambda m, x: Frozen(x * 2),
    "dataclass with a derived field": lambda m, x: Derived(x),
    "slotted dataclass": lambda m, x: [Slotted(value=x * 2)],
    "dataclass that changes its field": lambda m, x: Scaled(x),
    "list subclass": lambda m, x: {"boxes": Boxes([x, x * 2])},
    "mapping with names that are none": lambda m, x: collections.OrderedDict({"a b": x * 2, "class": x}),
    "counter": lambda m, x: (x, collections.Counter(a=2)),
    "return type": lambda m, x: x.max(-1),
    "plain values": lambda m, x: (x * 2, 3, 1.5, True, "s", None, torch.float32, 1j, b"b"),
    "infinities": lambda m, x: (x, float("inf"), float("-inf"), float("nan")),
    "shape": lambda m, x: (x * 2, x.shape),
    "shape alone": lambda m, x: x.shape,
    "sizes": lambda m, x: (x * 2, list(x.shape), x.dim()),
    "device and dtype": lambda m, x: (x * 2, x.device, x.dtype),
    "input": lambda m, x: x,
    "input twice": lambda m, x: (x, x),
    "input and a view of it": lambda m, x: (x, x[:, 0], x.T),
    "parameter": lambda m, x: m.weight,
    "buffer and input": lambda m, x: {"b": m.table, "x": x},
    "constant": lambda m, x: (x, torch.arange(3)),
    "constant from numpy": lambda m, x: (x, torch.from_numpy(np.arange(3))),
    "same tensor twice": lambda m, x: (lambda y: (y, [y], y))(x * 2),
    "written after it was put away": lambda m, x: (lambda y: ([y], y.add_(1)))(x * 2),
    "nothing computed": lambda m, x: {"one": 1},
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_output(name: str) -> None:
    model = Forward(OUTPUTS[name], weight=nn.Parameter(t(3)), table=t(4)).eval()
    gm = trace(model, t())
    for _ in range(2):
        example = t()
        assert_agrees(model, gm, example)
        assert type(run(gm, (example,))) is type(run(model, (example,)))


@pytest.mark.parametrize("name", ["named tuple", "dataclass", "frozen dataclass", "ordered dict"])
def test_output_classes_nested_in_lists_are_kept(name: str) -> None:
    model = Forward(lambda m, x: [OUTPUTS[name](m, x)]).eval()
    gm = trace(model, t())
    assert type(gm(t())[0]) is type(model(t())[0])


def test_a_parameter_in_the_output_is_a_copy() -> None:
    model = Forward(lambda m, x: (m.weight, x), weight=nn.Parameter(t(3))).eval()
    gm = trace(model, t())
    assert gm(t())[0].data_ptr() != model.weight.data_ptr()


def test_an_output_no_graph_can_rebuild_is_refused() -> None:
    class Custom:
        def __init__(self, value):
            self.value = value

    for function in (
        lambda m, x: Custom(x),
        lambda m, x: (x, {1, 2}),
        lambda m, x: (part for part in (x, x)),
        lambda m, x: (x, Level.LOW),
        lambda m, x: {Mode.FAST: x},
        lambda m, x: (x, np.float64(1.0)),
    ):
        with pytest.raises(CaptureError, match="cannot rebuild"):
            trace(Forward(function).eval(), t())


def test_an_output_class_with_another_constructor_is_refused() -> None:
    @dataclasses.dataclass
    class Measured:
        value: torch.Tensor
        unit: dataclasses.InitVar[str]

        def __post_init__(self, unit):
            self.unit_length = len(unit)

    with pytest.raises(CaptureError, match="Measured, which a graph cannot rebuild") as raised:
        trace(Forward(lambda m, x: Measured(x, "cm")).eval(), t())
    assert "unit" in str(raised.value)


def test_transformers_output() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")

    def forward(m, x):
        return outputs.BaseModelOutputWithPooling(last_hidden_state=x * 2, hidden_states=(x, x + 1))

    model = Forward(forward).eval()
    result = trace(model, t())(example := t())
    assert isinstance(result, outputs.BaseModelOutputWithPooling)
    assert result.pooler_output is None
    assert list(result) == ["last_hidden_state", "hidden_states"]
    assert torch.equal(result.last_hidden_state, example * 2)
    assert torch.equal(result[1][1], example + 1)


def test_transformers_cache_is_refused_clearly() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8, use_cache=True)
    model = transformers.GPT2Model(config).eval()
    with pytest.raises(CaptureError, match="DynamicCache"):
        trace(model, {"input_ids": torch.randint(0, 16, (2, 4))})


# --- inputs ----------------------------------------------------------------------------------------------------

INPUTS: dict[str, tuple[Any, Any]] = {
    "dict": (lambda m, d: d["a"] * d["b"]["c"], lambda: ({"a": t(), "b": {"c": t()}},)),
    "list": (lambda m, v: v[0] + v[1][0], lambda: ([t(), [t()]],)),
    "tuple": (lambda m, v: v[0] + v[1], lambda: ((t(), t()),)),
    "unpacked tuple": (lambda m, v: (lambda a, b: a * b)(*v), lambda: ((t(), t()),)),
    "named tuple": (lambda m, p: p.x * p.y + p[0], lambda: (Point(t(), t()),)),
    "named tuple with none": (lambda m, p: p.x if p.y is None else p.y, lambda: (Point(t()),)),
    "dataclass": (lambda m, s: s.image * s.scale + s.boxes[1], lambda: (Sample(t(), [t(), t()], 2.0),)),
    "frozen dataclass": (lambda m, s: s.value * 2 if s.name == "n" else s.value, lambda: (Frozen(t()),)),
    "dataclass with a derived field": (lambda m, s: s.value + s.double, lambda: (Derived(t()),)),
    "slotted dataclass": (lambda m, s: s.value * len(s.tags), lambda: (Slotted(value=t()),)),
    "dataclass that changes its field": (lambda m, s: s.value * 2, lambda: (Scaled(t()),)),
    "list subclass": (lambda m, b: sum(b) if isinstance(b, Boxes) else b[0], lambda: (Boxes([t(), t()]),)),
    "default dict": (lambda m, d: d["a"] + len(d["more"]), lambda: (collections.defaultdict(list, a=t(), more=[]),)),
    "ordered dict": (lambda m, d: sum(d.values()), lambda: (collections.OrderedDict(b=t(), a=t()),)),
    "none": (lambda m, x, mask: x if mask is None else x * mask, lambda: (t(), None)),
    "plain values": (
        lambda m, x, a, b, c: x * a if b == "scale" and c else x,
        lambda: (t(), 3, "scale", True),
    ),
    "enumeration": (lambda m, x, mode: x * 2 if mode is Mode.FAST else x, lambda: (t(), Mode.FAST)),
    "dtype": (lambda m, x, dtype: x.to(dtype), lambda: (t(), torch.float64)),
    "shape": (lambda m, x, size: x.reshape(-1, *size[1:]), lambda: (t(2, 6), torch.Size([2, 3, 2]))),
    "empty list": (lambda m, x, more: sum(more, x), lambda: (t(), [])),
    "unused input": (lambda m, x, y: x * 2, lambda: (t(), t())),
    "unused key": (lambda m, d: d["a"] * 2, lambda: ({"a": t(), "b": t(4)},)),
    "changed in the forward": (lambda m, d: d.pop("a") * d.setdefault("c", d["b"]), lambda: ({"a": t(), "b": t()},)),
    "integers": (lambda m, i, x: x[i], lambda: (torch.tensor([1, 0, 1]), t())),
}


@pytest.mark.parametrize("name", INPUTS)
def test_input(name: str) -> None:
    function, example = INPUTS[name]
    model = Forward(function).eval()
    given = example()
    gm = trace(model, given)
    for _ in range(2):
        assert_agrees(model, gm, *example())
    assert len(given) == len(example()), "the example is not taken apart"


class Signature(nn.Module):
    def forward(self, x, mask=None, *, scale=2.0, flag=True):
        y = x * scale
        y = y if mask is None else y * mask
        return y if flag else -y


@pytest.mark.parametrize(
    ("example", "args", "named"),
    [
        (lambda: t(), lambda: (t(),), dict),
        (lambda: (t(),), lambda: (t(),), dict),
        (lambda: (t(), t()), lambda: (t(), t()), dict),
        (lambda: {"x": t()}, lambda: (), lambda: {"x": t()}),
        (lambda: {"mask": t(), "x": t()}, lambda: (t(),), lambda: {"mask": t()}),
        (lambda: {"scale": 3.0, "x": t(), "mask": None}, lambda: (), lambda: {"mask": None, "x": t(), "scale": 3.0}),
        (lambda: ExampleInputs((t(),), {"flag": False}), lambda: (t(),), lambda: {"flag": False}),
        (lambda: ExampleInputs((t(), t()), {"scale": 1.5}), lambda: (t(), t()), lambda: {"scale": 1.5}),
    ],
)
def test_positional_and_keyword_examples(example: Any, args: Any, named: Any) -> None:
    model = Signature().eval()
    gm = trace(model, example())
    args, named = args(), named()
    assert torch.equal(gm(*args, **named), model(*args, **named))
    keyword = dict(zip(("x", "mask"), args, strict=False)) | named
    assert torch.equal(gm(**keyword), model(**keyword))


def test_only_tensor_arguments_keep_their_position() -> None:
    """A left-out default in between must not shift what comes after it."""
    model = Signature().eval()
    gm = trace(model, {"x": t(), "scale": 3.0})
    x, mask = t(), t()
    with pytest.raises((UserError, TypeError)):
        gm(x, mask)


class PositionalOnly(nn.Module):
    def forward(self, x, /, y):
        return x - y


def test_positional_only_parameters() -> None:
    model = PositionalOnly().eval()
    gm = trace(model, (t(), t()))
    assert_agrees(model, gm, t(), t())


class Variadic(nn.Module):
    def forward(self, first, *rest, scale=1.0, **named):
        total = first * scale
        for tensor in rest:
            total = total + tensor
        for name in sorted(named):
            total = total - named[name] * len(name)
        return total


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (1, {}),
        (3, {}),
        (1, {"a": None}),
        (2, {"bb": None, "a": None}),
        (3, {"scale": 2.0, "a": None}),
    ],
)
def test_variadic_forwards(args: int, named: dict[str, Any]) -> None:
    def inputs():
        return tuple(t() for _ in range(args)), {name: t() if value is None else value for name, value in named.items()}

    model = Variadic().eval()
    gm = trace(model, ExampleInputs(*inputs()))
    positional, keyword = inputs()
    expected = model(*positional, **keyword)
    names = ["first", "rest_0", "rest_1"][:args]
    assert torch.equal(gm(**dict(zip(names, positional, strict=True)), **keyword), expected)
    if not keyword:
        assert torch.equal(gm(*positional), expected)


def test_names_of_variadic_inputs_do_not_collide() -> None:
    class Collides(nn.Module):
        def forward(self, *x, x_0, **named):
            return x[0] - x_0 * 2 + named["x_1"] * 3 + x[1] * 4

    model = Collides().eval()
    gm = trace(model, ExampleInputs((t(), t()), {"x_0": t(), "x_1": t()}))
    one, two, three, four = t(), t(), t(), t()
    expected = model(one, two, x_0=three, x_1=four)
    assert torch.equal(gm(x_0_=one, x_1_=two, x_0=three, x_1=four), expected)


def test_keywords_that_are_no_names_are_refused() -> None:
    class Named(nn.Module):
        def forward(self, **tensors):
            return sum(tensors.values())

    for name in ("a b", "class", ""):
        with pytest.raises(UserError, match="cannot name an input"):
            trace(Named().eval(), {"a": t(), name: t()})


def test_keyword_only_through_kwargs_alone() -> None:
    class Named(nn.Module):
        def forward(self, **tensors):
            return tensors["b"] - tensors["a"]

    model = Named().eval()
    gm = trace(model, {"b": t(), "a": t()})
    a, b = t(), t()
    assert torch.equal(gm(a=a, b=b), b - a)


def test_kwargs_are_guarded_by_name() -> None:
    class Counts(nn.Module):
        def forward(self, x, **named):
            return x * len(named)

    gm = trace(Counts().eval(), {"x": t(), "a": t()})
    with pytest.raises((UserError, TypeError)):
        gm(x=t(), a=t(), b=t())


# --- what does not fit the example is refused, and the input is named ------------------------------------------------


def two(m, x, mask):
    return x * mask


@pytest.mark.parametrize(
    ("args", "named", "words"),
    [
        ((lambda: t(2, 4), lambda: t()), {}, "inputs_0 has shape [2, 4]"),
        ((lambda: t(), lambda: t(2, 3, 1)), {}, "inputs_1 has shape [2, 3, 1]"),
        ((lambda: t().double(), lambda: t()), {}, "inputs_0 is dtype torch.float64, expected dtype torch.float32"),
        ((lambda: t(), lambda: t().long()), {}, "inputs_1 is dtype torch.int64"),
        ((lambda: t(), lambda: None), {}, "inputs_1 is a NoneType, expected a tensor"),
        ((lambda: t(), lambda: 3.0), {}, "inputs_1 is a float, expected a tensor"),
        ((lambda: t(), lambda: [t()]), {}, "inputs_1 is a list, expected a tensor"),
        ((lambda: np.zeros((2, 3), "float32"), lambda: t()), {}, "inputs_0 is a ndarray, expected a tensor"),
        ((lambda: t(2), lambda: t()), {}, "inputs_0 has shape [2]"),
        ((lambda: torch.tensor(1.0), lambda: t()), {}, "inputs_0 has shape []"),
    ],
)
def test_wrong_tensor(args: Any, named: Any, words: str) -> None:
    gm = trace(Forward(two).eval(), (t(), t()))
    with pytest.raises(UserError) as raised:
        gm(*(make() for make in args), **named)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("args", "named", "words"),
    [
        ((), {}, "x"),
        ((t(),), {}, "mask"),
        ((t(), t(), t()), {}, "2"),
        ((t(), t()), {"more": t()}, "more"),
        ((t(),), {"x": t(), "mask": t()}, "x"),
        ((t(),), {"msk": t()}, "msk"),
    ],
    ids=["nothing", "missing", "too many", "unknown name", "given twice", "misspelt"],
)
def test_wrong_number_of_inputs(args: Any, named: Any, words: str) -> None:
    class Two(nn.Module):
        def forward(self, x, mask):
            return x * mask

    gm = trace(Two().eval(), (t(), t()))
    with pytest.raises(UserError) as raised:
        gm(*args, **named)
    assert words in str(raised.value)


STRUCTURE: dict[str, tuple[Any, Any, Any, str]] = {
    "missing key": (lambda m, d: d["a"] + d["b"], {"a": t(), "b": t()}, {"a": t()}, "'b'"),
    "extra key": (lambda m, d: sum(d.values()), {"a": t()}, {"a": t(), "b": t()}, "b"),
    "shorter list": (lambda m, v: sum(v), [t(), t()], [t()], "[1]"),
    "longer list": (lambda m, v: sum(v), [t(), t()], [t(), t(), t()], "inputs_0"),
    "filled empty list": (lambda m, v: sum(v[1:], v[0][0]), [[t()]], [[t()], t()], "inputs_0"),
    "filled empty dict": (lambda m, v: sum(v[1].values(), v[0]), (t(), {}), (t(), {"a": t()}), "inputs_0"),
    "emptied list": (lambda m, v: sum(v[1], v[0]), (t(), [t()]), (t(), []), "[0]"),
    "none became a tensor": (lambda m, v: v[0] if v[1] is None else v[1], (t(), None), (t(), t()), "[1]"),
    "tensor became none": (lambda m, v: v[0] * 2 if v[1] is None else v[1], (t(), t()), (t(), None), "[1]"),
    "other number": (lambda m, v: v[0] * v[1], (t(), 2), (t(), 3), "[1]"),
    "number of another type": (lambda m, v: v[0] * v[1], (t(), 1), (t(), True), "[1]"),
    "other string": (lambda m, v: v[0] if v[1] == "a" else -v[0], (t(), "a"), (t(), "b"), "[1]"),
    "dict instead of dataclass": (lambda m, s: s.image * 2, Sample(t()), {"image": t()}, "image"),
    "other dtype inside": (lambda m, d: d["a"][0] * 2, {"a": [t()]}, {"a": [t().half()]}, "['a'][0]"),
    "other shape inside": (lambda m, s: s.image * 2, Sample(t()), Sample(t(2, 4)), ".image"),
    "tuple instead of a list": (lambda m, v: sum(v), [t(), t()], (t(), t()), "a list with [0], [1]"),
    "other sign of zero": (lambda m, v: v[0] / v[1], (t(), 0.0), (t(), -0.0), "[1]"),
    "other field": (lambda m, s: s.image * s.scale, Sample(t()), Sample(t(), scale=2.0), ".scale"),
    "tensor instead of a list": (lambda m, v: sum(v), [t(3)], t(2, 3), "inputs_0"),
}


@pytest.mark.parametrize("name", STRUCTURE)
def test_wrong_structure(name: str) -> None:
    function, example, other, words = STRUCTURE[name]
    gm = trace(Forward(function).eval(), (example,))
    with pytest.raises(UserError) as raised:
        gm(other)
    assert words in str(raised.value)
    assert "inputs_0" in str(raised.value)


def test_the_mapping_kind_may_differ() -> None:
    model = Forward(lambda m, d: d["a"] * 2).eval()
    gm = trace(model, ({"a": t()},))
    assert_agrees(model, gm, collections.OrderedDict(a=t()))


def test_the_order_of_keys_may_not_differ() -> None:
    model = Forward(lambda m, d: torch.cat(list(d.values()))).eval()
    gm = trace(model, ({"a": t(), "b": t()},))
    with pytest.raises(UserError, match="keys of input inputs_0 come in another order"):
        gm({"b": t(), "a": t()})


def test_a_number_that_is_not_a_number() -> None:
    model = Forward(lambda m, x, fill: x.nan_to_num(fill) if fill == fill else x * 2).eval()
    gm = trace(model, (t(), float("nan")))
    assert_agrees(model, gm, t(), float("nan"))


class Settings:
    """A plain object, as configurations often are."""

    def __init__(self, scale):
        self.scale = scale


@pytest.mark.parametrize(
    "given",
    [Settings(2.0), Settings(t()), np.ones(3, "float32"), {1, 2}, nn.Linear(3, 3), lambda value: value],
    ids=["settings", "object with a tensor", "array", "set", "module", "function"],
)
def test_objects_that_may_change_unnoticed_are_refused(given: Any) -> None:
    """The graph would keep what they hold now, and a detection model's `NestedTensor` would become a constant."""
    model = Forward(lambda m, batch: batch["x"] * 2).eval()
    with pytest.raises(UserError) as raised:
        trace(model, ({"x": t(), "more": [given]},))
    assert f"inputs_0['more'][0] is a {type(given).__name__}" in str(raised.value)
    assert "pass what the forward needs of it" in str(raised.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (torch.ones(2, 3).to_sparse(), "is a torch.sparse_coo tensor"),
        (torch.ones(2, 3, device="meta"), "is on the meta device"),
        (torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged), "is a nested tensor"),
    ],
    ids=["sparse", "meta", "nested"],
)
def test_tensors_without_plain_memory_are_refused(given: torch.Tensor, words: str) -> None:
    with pytest.raises(UserError) as raised:
        trace(Forward(lambda m, v: v[0] * 2).eval(), ([t(), given],))
    assert f"inputs_0[1] {words}" in str(raised.value)


def test_calling_does_not_change_the_inputs() -> None:
    model = Forward(lambda m, d: d["a"].add_(1) * 2).eval()
    gm = trace(model, ({"a": t()},))
    given = {"a": t()}
    before = given["a"].clone()
    gm(given)
    assert list(given) == ["a"]
    assert torch.equal(given["a"], before) or torch.equal(given["a"], before + 1), "as the model, or not at all"


def test_the_graph_can_be_copied_and_printed() -> None:
    import copy

    model = Forward(lambda m, d: {"out": Sample(d["a"] * 2, [d["a"]])}).eval()
    gm = trace(model, ({"a": t()},))
    example = {"a": t()}
    assert torch.equal(copy.deepcopy(gm)(example)["out"].image, gm(example)["out"].image)
    assert "mul" in qgraph.print_graph(gm)
