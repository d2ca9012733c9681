"""The Simulator: recording, stopping, injecting, counting, kernels of one's own, wrong use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn

from qgraph.errors import MissingKernel, UserError
from qgraph.ir.node_info import info
from qgraph.quantization import ModuleNameQconfigSetter, calibrate, convert, get_qconfig, prepare
from qgraph.simulator import KERNEL_SETS, Simulator, register_kernel
from qgraph.simulator.reference import KERNELS
from tests.support.models import Attention, Forward, Residual, image

SITES = [
    "x",
    "x.quant",
    "stem",
    "conv1",
    "conv2",
    "_generated_adaptive_avg_pool2d_0",
    "_generated_flatten_0",
    "fc",
    "fc.dequant",
]


def integer_of(model: nn.Module, *example: torch.Tensor, setter: Any = None) -> fx.GraphModule:
    prepared = prepare(model.eval(), example, setter)
    calibrate(prepared, [example], progress=False)
    return convert(prepared)


@pytest.fixture(scope="module")
def residual() -> fx.GraphModule:
    torch.manual_seed(0)
    return integer_of(Residual(), image(4))


@pytest.fixture
def simulator(residual: fx.GraphModule) -> Simulator:
    return Simulator(residual)


@pytest.fixture
def x() -> torch.Tensor:
    return image(4)


# --- running -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 4, 7])
def test_computes_what_the_graph_does(simulator: Simulator, residual: fx.GraphModule, batch: int) -> None:
    """At the example's batch size of 4 and at others."""
    x = image(batch)
    assert torch.equal(simulator(x), residual(x))
    assert torch.equal(simulator(x=x), residual(x))
    assert torch.equal(simulator(x.contiguous(memory_format=torch.channels_last)), residual(x))


def test_structured_inputs_and_outputs() -> None:
    model = Forward(lambda m, pair: {"sum": pair[0] + pair[1], "both": [pair[0].relu(), pair[1].sigmoid()]})
    pair = (torch.randn(2, 4), torch.randn(2, 4))
    prepared = prepare(model.eval(), (pair,))
    calibrate(prepared, [(pair,)], progress=False)
    integer = convert(prepared)
    found, expected = Simulator(integer)(pair), integer(pair)
    assert found.keys() == expected.keys()
    assert torch.equal(found["sum"], expected["sum"])
    assert all(torch.equal(one, two) for one, two in zip(found["both"], expected["both"], strict=True))


def test_runs_leave_nothing_behind(simulator: Simulator, x: torch.Tensor) -> None:
    expected, kept = simulator(x), x.clone()
    run = simulator.run(x, record=True, inject={"stem": torch.zeros(4, 4, 8, 8, dtype=torch.int8)})
    assert not torch.equal(run.output, expected)
    run.values["conv1"].zero_()
    assert torch.equal(simulator(x), expected)
    assert torch.equal(x, kept)
    assert not run.output.requires_grad


# --- recording -----------------------------------------------------------------------------------------------------


def test_record_everything(simulator: Simulator, x: torch.Tensor) -> None:
    run = simulator.run(x, record=True)
    assert list(run.values) == SITES == list(simulator.sites)
    assert run.values["x"] is x
    assert run.values["conv1"].dtype is torch.int8
    assert run.values["fc"].dtype is torch.int32
    assert torch.equal(run.values["fc.dequant"], run.output)
    assert torch.equal(run.output, simulator(x))
    assert run.stopped_at is None
    assert [op.site for op in run.ops] == SITES[1:]


def test_record_some(simulator: Simulator, x: torch.Tensor) -> None:
    everything = simulator.run(x, record=True).values
    run = simulator.run(x, record=["fc", "stem"])
    assert list(run.values) == ["stem", "fc"]
    assert all(torch.equal(value, everything[site]) for site, value in run.values.items())
    assert simulator.run(x).values == {}
    assert simulator.run(x, record=iter(["fc"])).values.keys() == {"fc"}


def test_recorded_codes_stand_for_the_models_values(x: torch.Tensor) -> None:
    model = Residual().eval()
    integer = integer_of(model, x)
    run = Simulator(integer).run(x, record=True)
    with torch.no_grad():
        stem = model.stem(x)
    qparams = info(Simulator(integer).sites["stem"]).qparams
    assert (run.values["stem"] * qparams.scale - stem).abs().max() <= 3 * qparams.scale


def test_islands_are_recorded_as_reals() -> None:
    model = Forward(lambda m, x: torch.cumprod(m.fc(x), 1).sigmoid(), fc=nn.Linear(4, 4))
    x = torch.randn(2, 4)
    run = Simulator(integer_of(model, x)).run(x, record=True)
    assert run.values["_generated_cumprod_0"].dtype is torch.float32
    assert torch.equal(run.values["_generated_cumprod_0"], run.values["fc.dequant"].cumprod(1))


def test_parts_of_tuples_are_sites_and_tuples_are_not() -> None:
    model = Forward(lambda m, x: (lambda a, b: a * b)(*m.fc(x).sigmoid().chunk(2, 1)), fc=nn.Linear(4, 4))
    x = torch.randn(2, 4)
    simulator = Simulator(integer_of(model, x))
    values = simulator.run(x, record=True).values
    whole = values["_generated_sigmoid_0"]
    assert torch.equal(values["_generated_chunk_0[1]"], whole[:, 2:])
    with pytest.raises(UserError, match=r"no site '_generated_chunk_0'") as caught:
        simulator.run(x, stop_at="_generated_chunk_0")
    assert "'_generated_chunk_0[0]'" in str(caught.value)


# --- stopping ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_stop_at(simulator: Simulator, x: torch.Tensor, site: str) -> None:
    everything = simulator.run(x, record=True).values
    run = simulator.run(x, stop_at=site)
    assert run.stopped_at == site
    assert run.output is None
    assert list(run.values) == [site]
    assert torch.equal(run.values[site], everything[site])


def test_stopping_runs_nothing_after(x: torch.Tensor, simulator: Simulator) -> None:
    run = simulator.run(x, stop_at="conv1", record=True)
    assert list(run.values) == SITES[: SITES.index("conv1") + 1]
    assert [op.site for op in run.ops] == ["x.quant", "stem", "conv1"]
    assert 0 < run.cycles < simulator.run(x, record=True).cycles


# --- injecting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES[1:])
def test_injecting_what_was_there_changes_nothing(simulator: Simulator, x: torch.Tensor, site: str) -> None:
    everything = simulator.run(x, record=True)
    run = simulator.run(x, inject={site: everything.values[site]})
    assert torch.equal(run.output, everything.output)


@pytest.mark.parametrize("site", SITES[1:])
def test_all_that_follows_sees_what_was_injected(simulator: Simulator, x: torch.Tensor, site: str) -> None:
    """As if another input had led there."""
    other = simulator.run(image(4) * 0.3, record=True)
    run = simulator.run(x, record=True, inject={site: other.values[site]})
    if site not in ("x.quant", "stem"):  # the residual of conv2 still comes from x
        before = SITES[: SITES.index(site)]
        own = simulator.run(x, record=True)
        assert all(torch.equal(run.values[name], own.values[name]) for name in before)
    if site in ("x.quant", "stem", "conv2", "fc"):
        assert torch.equal(run.output, other.output)
    assert torch.equal(run.values[site], other.values[site])


def test_several_injections(simulator: Simulator, x: torch.Tensor) -> None:
    codes = {"stem": torch.full((4, 4, 8, 8), 3, dtype=torch.int8), "conv1": torch.zeros(4, 4, 8, 8, dtype=torch.int8)}
    run = simulator.run(x, inject=codes, stop_at="conv2", record=["conv1", "stem"])
    assert torch.equal(run.values["conv1"], codes["conv1"])
    again = simulator.run(image(4), inject=codes, stop_at="conv2")
    assert torch.equal(run.values["conv2"], again.values["conv2"]), "nothing else of the input is left"


def test_reals_are_injected_into_islands() -> None:
    model = Forward(lambda m, x: torch.cumprod(m.fc(x), 1).sigmoid(), fc=nn.Linear(4, 4))
    x = torch.randn(2, 4)
    simulator = Simulator(integer_of(model, x))
    run = simulator.run(x, inject={"_generated_cumprod_0": torch.full((2, 4), -1e9)}, record=True)
    assert run.values["_generated_cumprod_0.quant"].eq(-128).all()
    assert {op.site: op.saturated for op in run.ops}["_generated_cumprod_0.quant"] == 8


@pytest.mark.parametrize(
    ("site", "given", "words"),
    [
        ("conv1", torch.zeros(4, 4, 8, 8), r"\[4, 4, 8, 8\] torch.float32, the site holds \[4, 4, 8, 8\] torch.int8"),
        ("conv1", torch.zeros(4, 4, 8, 8, dtype=torch.int16), "torch.int16"),
        ("conv1", torch.zeros(4, 4, 8, 7, dtype=torch.int8), r"\[4, 4, 8, 7\]"),
        ("conv1", torch.zeros(1, 4, 8, 8, dtype=torch.int8), "as many samples"),
        ("conv1", [[1]], "a list is injected"),
        ("conv1", None, "a NoneType is injected"),
        ("x", image(4), "'x' is an input of the graph"),
        ("conv3", torch.zeros(1), "did you mean 'conv2' or 'conv1'"),
        ("input_guard", torch.zeros(1), "no site 'input_guard'"),
        ("stem_weight", torch.zeros(1), "no site 'stem_weight'"),
    ],
)
def test_wrong_injections(simulator: Simulator, x: torch.Tensor, site: str, given: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        simulator.run(x, inject={site: given})


def test_an_injection_that_is_never_reached(simulator: Simulator, x: torch.Tensor) -> None:
    codes = torch.zeros(4, 5, dtype=torch.int32)
    with pytest.raises(UserError, match="the tensor injected at 'fc' would never be used") as caught:
        simulator.run(x, inject={"fc": codes}, stop_at="conv1")
    assert "stops at 'conv1'" in str(caught.value)
    assert torch.equal(simulator.run(x, inject={"fc": codes}, stop_at="fc").values["fc"], codes)


# --- counting ------------------------------------------------------------------------------------------------------


def test_saturations_of_a_hand_made_input() -> None:
    """Scale 0.5 holds -64 to 63.5; of six inputs three are beyond, of their doubles five."""
    setter = ModuleNameQconfigSetter(
        {name: get_qconfig(fix_scale=0.5) for name in ("inputs_0.quant", "_generated_mul_0")}
    )
    x = torch.tensor([[1.0, -100.0, 63.8, 40.0, 64.5, -33.0]])
    simulator = Simulator(integer_of(Forward(lambda m, x: x * 2.0), x, setter=setter))
    run = simulator.run(x, record=True)
    assert run.values["inputs_0.quant"].tolist() == [[2, -128, 127, 80, 127, -66]]
    assert run.values["_generated_mul_0"].tolist() == [[4, -128, 127, 127, 127, -128]]
    counts = {op.site: (op.saturated, op.elements) for op in run.ops}
    assert counts == {"inputs_0.quant": (3, 6), "_generated_mul_0": (5, 6), "_generated_mul_0.dequant": (0, 6)}
    assert run.saturated == 8


def test_a_bound_of_an_activation_is_no_saturation() -> None:
    layer = nn.Linear(1, 1, bias=False)
    nn.init.constant_(layer.weight, -1.0)  # code -128: +1 would be 127 of 128
    setter = ModuleNameQconfigSetter({"": get_qconfig(fix_scale=1.0)})
    model = Forward(lambda m, x: m.fc(x).relu().sigmoid(), fc=layer)
    x = torch.tensor([[100.0], [3.0], [-5.0], [-100.0]])
    run = Simulator(integer_of(model, x, setter=setter)).run(x, record=True)
    assert run.values["fc"].flatten().tolist() == [0, 0, 5, 100]
    assert {op.site: op.saturated for op in run.ops}["fc"] == 0


def test_overflows_of_the_accumulator_are_counted() -> None:
    """300 000 products of the largest codes: 4.9e9 does not fit 32 bits and wraps."""
    count = 300_000
    layer = nn.Linear(count, 1, bias=False)
    nn.init.ones_(layer.weight)
    simulator = Simulator(integer_of(nn.Sequential(layer), torch.ones(1, count)))
    run = simulator.run(torch.ones(1, count), record=True)
    code, weight = run.values["input.quant"][0, 0].item(), 127
    total = count * code * weight
    assert total > 2**31
    assert run.values["0"].item() == (total + 2**31) % 2**32 - 2**31
    assert {op.site: op.overflowed for op in run.ops}["0"] == 1


def test_only_recording_runs_count(simulator: Simulator, x: torch.Tensor) -> None:
    run = simulator.run(x, record=["fc"])
    for ask in (lambda: run.saturated, lambda: run.cycles, run.report):
        with pytest.raises(UserError, match="this run counted nothing") as caught:
            ask()
        assert "record=True" in str(caught.value)


def test_report(simulator: Simulator, x: torch.Tensor) -> None:
    lines = simulator.run(x, record=True).report().splitlines()
    assert lines[0].split() == ["site", "op", "unit", "MACs", "bytes", "cycles", "bound", "saturated"]
    assert [line.split()[0] for line in lines[2:]] == SITES[1:]


# --- kernels -------------------------------------------------------------------------------------------------------


@pytest.fixture
def kernel_set() -> Iterator[str]:
    yield "test"
    KERNEL_SETS.pop("test", None)


def test_kernels_of_ones_own(kernel_set: str, residual: fx.GraphModule, x: torch.Tensor) -> None:
    calls: list[str] = []

    def counted(name: str) -> Callable[..., torch.Tensor]:
        def kernel(*args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(name)
            return KERNELS[name](*args, **kwargs)

        return kernel

    for name in KERNELS:
        register_kernel(kernel_set, name, "*", counted(name))
    register_kernel(kernel_set, "linear", "bpu", KERNELS["linear"])
    assert torch.equal(Simulator(residual, kernels=kernel_set)(x), residual(x))
    assert calls == ["quantize", "conv", "conv", "conv", "adaptive_avg_pool", "dequantize"], "bpu's own linear wins"


def test_a_place_is_taken_once(kernel_set: str) -> None:
    register_kernel(kernel_set, "conv", "bpu", KERNELS["conv"])
    with pytest.raises(UserError, match=r"has a kernel for \(conv, bpu\) already"):
        register_kernel(kernel_set, "conv", "bpu", KERNELS["conv"])


def test_a_missing_kernel_is_an_error_before_the_run(kernel_set: str, residual: fx.GraphModule) -> None:
    for name in KERNELS:
        if name != "conv":
            register_kernel(kernel_set, name, "*", KERNELS[name])
    register_kernel(kernel_set, "conv", "another target", KERNELS["conv"])
    with pytest.raises(MissingKernel, match="kernel set 'test' has no kernel for conv on bpu") as caught:
        Simulator(residual, kernels=kernel_set)
    assert f"there are kernels for {', '.join(sorted({*KERNELS} - {'conv'}))}" in str(caught.value)
    assert "register_kernel" in str(caught.value)
    assert "node stem" in str(caught.value)
    assert "models.py:" in str(caught.value)


def test_unknown_kernel_sets(residual: fx.GraphModule) -> None:
    with pytest.raises(UserError, match="did you mean 'reference'"):
        Simulator(residual, kernels="referense")


# --- wrong use -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["conv1", 3, None], ids=["text", "number", "none"])
def test_wrong_record(simulator: Simulator, x: torch.Tensor, wrong: Any) -> None:
    with pytest.raises(UserError, match="give True or a list of sites"):
        simulator.run(x, record=wrong)


@pytest.mark.parametrize("where", ["record", "stop_at"])
def test_unknown_sites(simulator: Simulator, x: torch.Tensor, where: str) -> None:
    with pytest.raises(UserError, match="no site 'conv9'") as caught:
        simulator.run(x, **{where: ["conv9"] if where == "record" else "conv9"})
    assert "'conv1'" in str(caught.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda sim: sim(), "input 'x' is missing"),
        (lambda sim: sim(image(), image()), r"takes 1 inputs? \(x\), got 2"),
        (lambda sim: sim(y=image()), r"no input \['y'\]"),
        (lambda sim: sim(image(), x=image()), "given twice"),
        (lambda sim: sim(torch.randn(4, 3, 9, 9)), r"shape \[4, 3, 9, 9\], expected \[any, 3, 8, 8\]"),
        (lambda sim: sim(image().double()), "float64"),
        (lambda sim: sim(image().half()), "float16"),
        (lambda sim: sim(image().numpy()), "ndarray"),
        (lambda sim: sim(torch.zeros(4, 3, 8, 8, dtype=torch.int8)), "int8"),
    ],
)
def test_wrong_inputs(simulator: Simulator, call: Callable[[Simulator], Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        call(simulator)


def test_special_values(simulator: Simulator, x: torch.Tensor) -> None:
    """NaN is code 0, infinities saturate: counted, not refused."""
    x = x.clone()
    x[0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    run = simulator.run(x, record=True)
    assert run.values["x.quant"][0, 0, 0, :3].tolist() == [0, 127, -128]
    assert {op.site: op.saturated for op in run.ops}["x.quant"] >= 3


def test_graphs_that_are_not_integer() -> None:
    prepared = prepare(Attention().eval(), torch.randn(2, 5, 8))
    for wrong in (prepared, Attention(), None):
        with pytest.raises(UserError, match="the simulator runs integer graphs") as caught:
            Simulator(wrong)
        assert "qgraph.convert" in str(caught.value)
