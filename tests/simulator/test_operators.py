"""`torch.ops.qgraph.*`: the kernels' results, shapes without values, graphs under torch.export and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from qgraph.ir.integer import integer_name
from qgraph.simulator.operators import FAKES, SCHEMAS
from qgraph.simulator.reference import KERNELS
from tests.simulator.cases import CASES, Case, Draw

OPERATORS = sorted(CASES)
SEEDS = range(40)


def drawn_case(operator: str, seed: int) -> Case:
    return CASES[operator](Draw(f"operators-{operator}-{seed}"))


def overload(operator: str) -> Any:
    return getattr(torch.ops.qgraph, operator).default


def signature(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def test_every_kernel_is_an_operator_with_a_fake() -> None:
    assert set(SCHEMAS) == set(FAKES) == set(KERNELS) == set(OPERATORS)


# --- one operator --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_equals_kernel(operator: str) -> None:
    for seed in SEEDS:
        case = drawn_case(operator, seed)
        result = overload(operator)(*case.arguments, **case.options)
        expected = KERNELS[operator](*case.arguments, **case.options)
        assert result.dtype == expected.dtype, case
        assert torch.equal(result, expected), case


@pytest.mark.parametrize("operator", OPERATORS)
def test_operator_leaves_its_arguments_alone(operator: str) -> None:
    for seed in SEEDS:
        case = drawn_case(operator, seed)
        before = [None if argument is None else argument.clone() for argument in case.arguments]
        result = overload(operator)(*case.arguments, **case.options)
        for argument, copy in zip(case.arguments, before, strict=True):
            if argument is None or copy is None:
                continue
            assert torch.equal(argument, copy), case
            assert result.untyped_storage().data_ptr() != argument.untyped_storage().data_ptr(), case


@pytest.mark.parametrize("operator", OPERATORS)
def test_fake_kernel_gives_shape_and_dtype(operator: str) -> None:
    for seed in SEEDS:
        case = drawn_case(operator, seed)
        expected = signature(KERNELS[operator](*case.arguments, **case.options))
        with FakeTensorMode() as mode:
            fakes = [None if argument is None else mode.from_tensor(argument) for argument in case.arguments]
            assert signature(overload(operator)(*fakes, **case.options)) == expected, case


@pytest.mark.parametrize("operator", OPERATORS)
def test_meta_tensors_give_shape_and_dtype(operator: str) -> None:
    for seed in SEEDS:
        case = drawn_case(operator, seed)
        expected = signature(KERNELS[operator](*case.arguments, **case.options))
        metas = [None if argument is None else argument.to("meta") for argument in case.arguments]
        result = overload(operator)(*metas, **case.options)
        assert signature(result) == expected, case
        assert result.device.type == "meta"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("operator", OPERATORS)
def test_opcheck(operator: str, seed: int) -> None:
    case = drawn_case(operator, seed)
    arguments = tuple(None if argument is None else argument.contiguous() for argument in case.arguments)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(overload(operator), arguments, case.options, test_utils=tests)


@pytest.mark.parametrize("operator", OPERATORS)
def test_fake_kernel_gives_strides(operator: str) -> None:
    for seed in SEEDS:
        case = drawn_case(operator, seed)
        for x in other_layouts(case.arguments[0]):
            arguments = [x, *case.arguments[1:]]
            metas = [None if argument is None else argument.to("meta") for argument in arguments]
            expected = strides(overload(operator)(*arguments, **case.options))
            assert strides(overload(operator)(*metas, **case.options)) == expected, case


def other_layouts(x: torch.Tensor | None) -> list[torch.Tensor]:
    if x is None or x.dim() < 2:
        return []
    turned = [x.transpose(0, -1).contiguous().transpose(0, -1)]
    return [*turned, x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else turned


def strides(tensor: torch.Tensor) -> list[int]:
    """Strides of the axes where they mean something."""
    return [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]


def test_fake_sum_over_no_axes() -> None:
    x = torch.ones(2, 3, dtype=torch.int8)
    one, zero = torch.tensor(1), torch.tensor(0)
    word = {"arithmetic": "int32:wrap/fixed_point:24:half_even", "low": -128, "high": 127, "format": "int8"}
    options = {"dims": [], "keepdim": False, **word}
    expected = signature(KERNELS["reduce_sum"](x, one, zero, **options))
    assert signature(overload("reduce_sum")(x.to("meta"), one.to("meta"), zero.to("meta"), **options)) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_a_convolution_without_a_batch(seed: int) -> None:
    """What torch allows: unbatched samples, computed as in a batch of one."""
    case = drawn_case("conv", seed)
    x, weight, bias, residual, *factors = case.arguments
    samples = [x[0], weight, bias, None if residual is None else residual[0], *factors]
    whole = [x[:1], weight, bias, None if residual is None else residual[:1], *factors]
    result = KERNELS["conv"](*samples, **case.options)
    assert torch.equal(result, KERNELS["conv"](*whole, **case.options)[0]), case
    metas = [None if argument is None else argument.to("meta") for argument in samples]
    assert signature(overload("conv")(*metas, **case.options)) == signature(result)


# --- a graph of operators ------------------------------------------------------------------------------------------

SINGLE = {"arithmetic": "int32:wrap/fixed_point:24:half_even", "low": -128, "high": 127, "format": "int8"}
SUM = {**SINGLE, "arithmetic": "int32:wrap/fixed_point:31:half_even"}
BILINEAR = {**SINGLE, "arithmetic": "int39:wrap/fixed_point:24:half_even"}
INT32 = {"low": -(2**31), "high": 2**31 - 1, "format": "int32"}
WINDOW = {"kernel_size": [2, 2], "stride": [2, 2], "padding": [0, 0]}
CONV = {
    "stride": [1, 1],
    "padding": [1, 1],
    "dilation": [1, 1],
    "output_padding": [0, 0],
    "transposed": False,
    "groups": 1,
}

PAIRS = {"stride": [1, 1], "padding": [1, 1]}


def build_graph() -> fx.GraphModule:
    """A float picture in, float scores out; every operator between them once."""
    generator = torch.Generator().manual_seed(0)
    root, graph = torch.nn.Module(), fx.Graph()

    def constant(name: str, value: torch.Tensor) -> fx.Node:
        root.register_buffer(name, value)
        return graph.get_attr(name)

    def codes(*shape: int, dtype: torch.dtype = torch.int8) -> torch.Tensor:
        return torch.randint(-128, 128, shape, generator=generator).to(dtype)

    def call(operator: str, *arguments: fx.Node | None, **options: Any) -> fx.Node:
        return graph.call_function(overload(operator), arguments, options)

    x = graph.placeholder("x")
    factor, shift = constant("factor", torch.tensor(12345678)), constant("shift", torch.tensor(31))
    large_factor = constant("large_factor", torch.tensor(2**31 - 12345))
    small_shift = constant("small_shift", torch.tensor(29))
    wide_shift = constant("wide_shift", torch.tensor(26))
    window_shift, grid_shift = constant("window_shift", torch.tensor(24)), constant("grid_shift", torch.tensor(46))
    plus, minus = constant("plus", torch.tensor(2**30)), constant("minus", torch.tensor(-(2**30) - 12345))
    positions = constant("positions", torch.tensor([[0, 0, 1], [1, 1, 1], [0, 1024, 700]]))
    channel_factors = constant("channel_factors", torch.tensor([9, 10, 11, 12]) << 20)

    picture = call("quantize", x, constant("scale", torch.tensor(0.03)), format="int8")
    weight, bias = constant("weight", codes(4, 3, 3, 3)), constant("bias", codes(4, dtype=torch.int32))
    y = call("conv", picture, weight, bias, None, channel_factors, shift, None, **CONV, **SINGLE)
    y = call("conv_pairs", y, constant("filters", codes(4, 1, 3, 3)), bias, factor, shift, **PAIRS, **SINGLE)
    y = call("lookup_two", y, constant("two_tables", codes(2, 256)), source="int8")
    y = call("max_pool", y, **WINDOW, dilation=[1, 1], ceil_mode=False)
    half, looked_up = (
        call("clamp", y, low=-100, high=100, format="int8"),
        call("lookup", y, constant("table", codes(17)), source="int8"),
    )
    y = call("add", half, looked_up, plus, minus, shift, **SUM)
    y = call("mul", y, half, factor, small_shift, **SINGLE)
    y = call("requantize", y, factor, window_shift, constant("offset", torch.tensor(99)), **SINGLE)
    exponents = {"dim": 1, **SINGLE, "arithmetic": "int32:wrap/tflite_softmax"}
    y = call("softmax", y, large_factor, constant("softmax_shift", torch.tensor(22)), **exponents)
    y = call("matmul", y, half, factor, shift, **SINGLE)
    small = call("avg_pool", y, factor, wide_shift, **WINDOW, output_size=[2, 2], **SINGLE)
    large = call("resize_bilinear", small, positions, positions, factor, grid_shift, weight_bits=11, **BILINEAR)
    large = sampled(constant, call, large, factor, window_shift, grid_shift)
    y = call("adaptive_avg_pool", large, factor, wide_shift, output_size=[2, 1], **SINGLE)
    y = call("reduce_sum", y, factor, wide_shift, dims=[-1], keepdim=False, **SINGLE)
    segments = [constant(f"segment_{i}", torch.tensor(v)) for i, v in enumerate(([*range(-64, 65)], [0, 128], [1, 1]))]
    y = call("lookup_segments", y, *segments, source="int8", fraction_bits=0, format="int8")
    mask = call("compare", y, y, factor, large_factor, relation="ge")
    steps = [constant("thresholds", torch.tensor([-9, 3])), constant("step_values", codes(3))]
    bent = call("prelu", y, large_factor, shift, factor, shift, **SINGLE)
    y = graph.call_function(torch.where, (mask, call("lookup_steps", y, *steps), bent))
    y = call("linear", y, constant("matrix", codes(5, 2)), None, None, factor, small_shift, None, **SINGLE)
    scales = constant("scales", torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))
    graph.output(call("dequantize", y, scales, axis=2))
    graph.lint()
    return fx.GraphModule(root, graph)


def sampled(
    constant: Callable[..., fx.Node],
    call: Callable[..., fx.Node],
    x: fx.Node,
    factor: fx.Node,
    single_shift: fx.Node,
    grid_shift: fx.Node,
) -> fx.Node:
    """`x` `[N, 4, 3, 3]` through the operators that sample, order and unfold; the same shape again."""
    window = {"kernel_size": [2, 2], "dilation": [1, 1], "padding": [0, 0], "stride": [1, 1]}
    place = {"position_bits": 11, "padding": "reflection", "align_corners": False}
    x = call("cumsum", x, factor, single_shift, dim=1, **SINGLE)
    x = call("fold", call("unfold", x, **window), factor, single_shift, output_size=[3, 3], **window, **SINGLE)
    taps = torch.tensor([[[0, 0, 1], [1, 2, 2]], [[1024, 100, 2048], [1024, 1948, 0]]])
    table = constant("table_of_taps", taps)
    x = call("resize", x, None, table, table, factor, grid_shift, **BILINEAR)
    pixels = constant("pixel_shift", torch.tensor(17))
    positions = call("requantize", x, factor, pixels, None, **{**SINGLE, **INT32})
    positions = torch_call(
        x.graph, torch.stack, [torch_call(x.graph, torch.select, positions, 1, i) for i in (0, 1)], -1
    )
    x = call("sample_bilinear", x, positions, factor, grid_shift, **place, **BILINEAR)
    x = call("sample_nearest", x, positions, **place)
    ranks = call("order", x, dim=1, descending=True, count=4)
    first = call("arg_extreme", x, dim=1, keepdim=True, largest=False)
    ranks = torch_call(x.graph, torch.maximum, ranks, first)
    return torch_call(x.graph, torch.gather, x, 1, ranks)


def torch_call(graph: fx.Graph, function: Callable[..., Any], *arguments: Any) -> fx.Node:
    return graph.call_function(function, arguments)


@pytest.fixture(scope="module")
def module() -> fx.GraphModule:
    return build_graph()


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(count))


def test_graph_holds_every_operator_and_its_scores_vary(module: fx.GraphModule) -> None:
    names = {name for node in module.graph.nodes if (name := integer_name(node.target))}
    assert names == set(KERNELS)
    assert len(module(pictures(3)).unique()) > 10


def test_graph_under_export(module: fx.GraphModule) -> None:
    exported = torch.export.export(module, (pictures(2),))
    assert torch.equal(exported.module()(pictures(2)), module(pictures(2)))


def test_graph_under_export_with_any_batch(module: fx.GraphModule) -> None:
    batch = torch.export.Dim("batch", min=1, max=16)
    exported = torch.export.export(module, (pictures(2),), dynamic_shapes=({0: batch},))
    for count in (1, 2, 5):
        assert torch.equal(exported.module()(pictures(count)), module(pictures(count)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_graph_under_compile(module: fx.GraphModule, backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)
    for count in (1, 2, 3):
        assert torch.equal(compiled(pictures(count)), module(pictures(count)))
