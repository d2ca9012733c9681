"""Names of sites, module paths, source lines and provenance of captured nodes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qgraph
from qgraph.capture import trace
from qgraph.errors import UserError
from qgraph.ir.node_info import info
from qgraph.ir.values import TensorSpec
from tests.capture.checks import assert_agrees, called_modules, calls, line_of, sites
from tests.support.models import Forward

METHODS = ["jit", "symbolic"]


def x() -> torch.Tensor:
    return torch.randn(2, 4, 6)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.act = nn.ReLU()

    def forward(self, x):
        y = self.act(self.linear(x) + x)
        return y + 1


class Thrice(nn.Module):
    """One block called three times."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(self.block(self.block(x))) * 2


@pytest.mark.parametrize("method", METHODS)
def test_a_shared_block_numbers_its_calls(method: str) -> None:
    gm = trace(Thrice().eval(), x(), method)
    once = ["block.linear", "block._generated_add_0", "block.act", "block._generated_add_1"]
    again = [[f"{site}({call})" for site in once] for call in (1, 2)]
    assert sites(gm) == [*once, *again[0], *again[1], "_generated_mul_0"]
    assert called_modules(gm) == ["block.linear", "block.act"] * 3


@pytest.mark.parametrize("method", METHODS)
def test_owner_of_every_node(method: str) -> None:
    gm = trace(Thrice().eval(), x(), method)
    assert {info(node).module for node in calls(gm)} == {"block", ""}
    assert info(calls(gm)[-1]).module == ""


class TwoBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x):
        x = x + 1
        x = self.first(x)
        x = x + 2
        x = self.second(x)
        return self.first(x) + 3


@pytest.mark.parametrize("method", METHODS)
def test_functional_counters_belong_to_one_run_of_the_owner(method: str) -> None:
    """A name does not depend on how often other modules ran, nor on what ran between."""
    gm = trace(TwoBlocks().eval(), x(), method)
    functional = [site for site in sites(gm) if "_generated_" in site]
    assert functional == [
        "_generated_add_0",
        "first._generated_add_0",
        "first._generated_add_1",
        "_generated_add_1",
        "second._generated_add_0",
        "second._generated_add_1",
        "first._generated_add_0(1)",
        "first._generated_add_1(1)",
        "_generated_add_2",
    ]


def test_counters_are_kept_per_function() -> None:
    gm = trace(Forward(lambda m, x: torch.relu(x + 1) * 2 + torch.relu(x) * 3).eval(), x())
    assert sites(gm) == [
        "_generated_add_0",
        "_generated_relu_0",
        "_generated_mul_0",
        "_generated_relu_1",
        "_generated_mul_1",
        "_generated_add_1",
    ]


def test_every_spelling_of_an_operator_has_one_name() -> None:
    def forward(m, x):
        x = x + 1
        x = x.add(1)
        x = torch.add(x, 1)
        x += 1
        x.add_(1)
        return 1 + x

    gm = trace(Forward(forward).eval(), x())
    assert sites(gm) == [f"_generated_add_{position}" for position in range(6)]


def test_shared_leaf_counts_its_calls() -> None:
    gm = trace(Forward(lambda m, x: m.l(m.l(m.l(x))), l=nn.Linear(6, 6)).eval(), x())
    assert sites(gm) == ["l", "l(1)", "l(2)"]
    assert called_modules(gm) == ["l"] * 3


def test_a_module_with_two_names_goes_by_the_first() -> None:
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first

        def forward(self, x):
            return self.second(self.first(x))

    model = Alias().eval()
    gm = trace(model, x())
    assert sites(gm) == ["first", "first(1)"]
    assert_agrees(model, gm, x())


def test_a_block_with_two_names_goes_by_the_first() -> None:
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Block()
            self.model = nn.ModuleDict({"encoder": self.encoder})

        def forward(self, x):
            return self.model["encoder"](x)

    model = Alias().eval()
    gm = trace(model, x())
    assert sites(gm)[0] == "encoder.linear"
    assert set(called_modules(gm)) <= {path for path, _ in model.named_modules()}


class Containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6), Block()])
        self.heads = nn.ModuleDict({"cls": nn.Linear(6, 2), "box head": nn.Linear(6, 4)})
        self.tail = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 2), nn.Tanh()))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        outputs = {name: head(x) for name, head in self.heads.items()}
        return self.tail(outputs["cls"]), outputs["box head"]


@pytest.mark.parametrize("method", METHODS)
def test_paths_through_containers(method: str) -> None:
    gm = trace(Containers().eval(), x(), method)
    assert called_modules(gm) == [
        "layers.0",
        "layers.1.linear",
        "layers.1.act",
        "heads.cls",
        "heads.box head",
        "tail.0",
        "tail.1.0",
        "tail.1.1",
    ]
    assert [site for site in sites(gm) if "_generated_" not in site] == called_modules(gm)


class FunctionalBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.skip = qgraph.FloatFunctional()
        self.join = qgraph.FloatFunctional()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        y = self.skip.add(self.linear(x), x)
        return self.join.cat([y, self.skip.mul(x, 2.0)], -1) + 1


@pytest.mark.parametrize("method", METHODS)
def test_float_functional_names_its_calls(method: str) -> None:
    gm = trace(FunctionalBlock().eval(), x(), method)
    assert sites(gm) == ["linear", "skip[add]", "skip[mul]", "join[cat]", "_generated_add_0"]


@pytest.mark.parametrize("method", METHODS)
def test_float_functional_inside_a_shared_block(method: str) -> None:
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = FunctionalBlock()

        def forward(self, x):
            return self.block(x)[..., :6] + self.block(x)[..., 6:]

    found = sites(trace(Twice().eval(), x(), method))
    assert [site for site in found if "skip[add]" in site] == ["block.skip[add]", "block.skip[add](1)"]


def test_float_functional_with_two_steps() -> None:
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.skip = qgraph.FloatFunctional()

        def forward(self, x):
            return self.skip.add_relu(x, x * 2) + self.skip.add(x, 1.0)

    found = sites(trace(Fused().eval(), x()))
    assert found[1].startswith("skip[add_relu]")
    assert found[2].startswith("skip[add_relu]")
    assert found[1] != found[2]
    assert "skip[add]" in found


def test_a_module_made_in_forward_belongs_to_the_running_module() -> None:
    class Inner(nn.Module):
        def forward(self, x):
            return nn.Softmax(-1)(x) + 1

    gm = trace(nn.ModuleDict({"inner": Inner()})["inner"].eval(), x())
    assert sites(gm) == ["_generated_softmax_0", "_generated_add_0"]
    outer = Forward(lambda m, x: m.inner(x), inner=Inner()).eval()
    assert sites(trace(outer, x())) == ["inner._generated_softmax_0", "inner._generated_add_0"]


def test_parts_of_a_tuple_are_named_after_it() -> None:
    gm = trace(Forward(lambda m, x: x.chunk(2, -1)[1] + m.rnn(x[:, :, :3])[0], rnn=nn.GRU(3, 3)).eval(), x())
    found = sites(gm)
    assert "_generated_chunk_0[1]" in found
    assert "rnn[0]" in found


def test_parameters_and_buffers_keep_their_paths() -> None:
    model = Forward(lambda m, x: F.linear(x, m.inner.weight) + m.shift, inner=nn.Linear(6, 6), shift=torch.ones(6))
    gm = trace(model.eval(), x())
    assert {node.target for node in gm.graph.nodes if node.op == "get_attr"} == {"inner.weight", "shift"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [Thrice, TwoBlocks, Containers, FunctionalBlock])
def test_names_are_unique_and_stable(build: type[nn.Module], method: str) -> None:
    first = trace(build().eval(), torch.randn(2, 4, 6), method)
    second = trace(build().eval(), torch.randn(3, 4, 6), method)
    assert sites(first) == sites(second)
    assert [node.name for node in first.graph.nodes] == [node.name for node in second.graph.nodes]
    everything = [info(node).site for node in first.graph.nodes]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("build", [Thrice, TwoBlocks, Containers])
def test_both_methods_give_the_same_names(build: type[nn.Module]) -> None:
    model = build().eval()
    one, two = trace(model, x(), "jit"), trace(model, x(), "symbolic")
    assert sites(one) == sites(two)


# --- source lines ----------------------------------------------------------------------------------------------


class Lines(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.sequence = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6)))

    def forward(self, x):
        y = self.linear(x)  # leaf
        y = y + x  # operator
        y = self.encoder(y)  # encoder
        y = self.sequence(y)  # sequence
        y = F.normalize(y)  # library
        return helper(y)


def helper(y):
    return y * 2  # helper


def lines_of(gm) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for node in calls(gm):
        source = info(node).source
        assert source is not None, node
        assert source.file == __file__, node
        found.setdefault(info(node).site, set()).add(source.line)
    return found


def test_every_node_shows_the_users_line() -> None:
    gm = trace(Lines().eval(), x())
    found = lines_of(gm)
    assert found["linear"] == {line_of(__file__, "leaf")}
    assert found["_generated_add_0"] == {line_of(__file__, "operator")}
    assert found["_generated_mul_0"] == {line_of(__file__, "helper")}
    assert found["sequence.1.1"] == {line_of(__file__, "sequence")}
    inside = [lines for site, lines in found.items() if site.startswith("encoder")]
    assert len(inside) > 5
    assert all(lines == {line_of(__file__, "encoder")} for lines in inside)


def test_the_function_that_holds_the_line_is_named() -> None:
    gm = trace(Lines().eval(), x())
    functions = {info(node).site: info(node).source.function for node in calls(gm)}
    assert functions["linear"] == "forward"
    assert functions["_generated_mul_0"] == "helper"


class SymbolicLines(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.sequence = nn.Sequential(nn.Linear(6, 6), nn.ReLU())

    def forward(self, x):
        y = self.linear(x)  # symbolic leaf
        y = self.sequence(y)  # symbolic sequence
        return y + x  # symbolic operator


@pytest.mark.parametrize("method", METHODS)
def test_lines_of_both_methods(method: str) -> None:
    found = lines_of(trace(SymbolicLines().eval(), x(), method))
    assert found["linear"] == {line_of(__file__, "symbolic leaf")}
    assert found["sequence.0"] == found["sequence.1"] == {line_of(__file__, "symbolic sequence")}
    assert found["_generated_add_0"] == {line_of(__file__, "symbolic operator")}


def test_a_line_inside_torch_only_shows_the_line_that_calls_trace() -> None:
    gm = trace(nn.Sequential(nn.Linear(6, 6), nn.ReLU()).eval(), x())  # no code of the user
    assert all(lines == {line_of(__file__, "no code of the user")} for lines in lines_of(gm).values())


def test_lines_in_comprehensions_lambdas_and_properties() -> None:
    class Tricky(nn.Module):
        @property
        def scale(self):
            return torch.ones(6) * 3  # property

        def forward(self, x):
            parts = [part + 1 for part in x.chunk(2, -1)]  # comprehension
            twice = lambda value: value * 2  # noqa: E731  # lambda
            return twice(torch.cat(parts, -1)) - self.scale

    found = lines_of(trace(Tricky().eval(), x()))
    assert found["_generated_add_0"] == found["_generated_add_1"] == {line_of(__file__, "comprehension")}
    assert found["_generated_mul_0"] == {line_of(__file__, "lambda")}
    assert found["_generated_mul_1"] == {line_of(__file__, "property")}


@pytest.mark.parametrize("name", ["<stdin>", "<ipython-input-3-0123456789ab>"])
def test_code_typed_into_an_interpreter_is_user_code(name: str) -> None:
    code = "import torch\nclass Typed(torch.nn.Module):\n    def forward(self, x):\n        return x + 1\n"
    space: dict[str, type[nn.Module]] = {"__name__": "__main__"}  # type: ignore[dict-item]
    exec(compile(code, name, "exec"), space)
    gm = trace(space["Typed"]().eval(), x())
    source = info(calls(gm)[0]).source
    assert source is not None
    assert (source.file, source.line) == (name, 4)


# --- provenance ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_record_of_a_captured_node(method: str) -> None:
    gm = trace(SymbolicLines().eval(), x(), method)
    node = next(node for node in gm.graph.nodes if info(node).site == "_generated_add_0")
    record = qgraph.info(node)
    assert record.op.name == "add"
    assert record.module == ""
    assert record.value == TensorSpec((2, 4, 6), torch.float32)
    assert record.created_by == "capture"
    assert record.origins == ()
    assert record.stands_for == ("_generated_add_0",)
    assert not record.in_place
    assert not record.unstable
    assert not record.inner
    assert record.plan is None
    assert record.qparams is None
    assert record.float_reason is None


@pytest.mark.parametrize("method", METHODS)
def test_every_node_has_a_record(method: str) -> None:
    gm = trace(Containers().eval(), x(), method)
    for node in gm.graph.nodes:
        record = qgraph.info(node)
        assert record.site
        if node.op in ("call_module", "placeholder", "get_attr") and node.name != "input_guard":
            assert record.value is not None


def test_values_of_nested_results() -> None:
    gm = trace(Forward(lambda m, x: m.rnn(x), rnn=nn.LSTM(6, 5, batch_first=True)).eval(), x())
    node = next(node for node in gm.graph.nodes if info(node).site == "rnn")
    state = TensorSpec((1, 2, 5), torch.float32)
    assert info(node).value == (TensorSpec((2, 4, 5), torch.float32), (state, state))


def test_graph_record() -> None:
    model = SymbolicLines().eval()
    record = qgraph.graph_info(trace(model, x()))
    assert (record.model, record.method, record.stage) == ("SymbolicLines", "jit", qgraph.Stage.CAPTURED)
    assert record.example is not None
    assert list(record.example.kwargs) == ["x"]
    assert record.history == ()
    assert record.notes == ()
    assert torch.equal(record.expected, model(record.example.kwargs["x"]))


def test_the_example_in_the_record_is_a_copy() -> None:
    example = x()
    gm = trace(SymbolicLines().eval(), example)
    before = qgraph.graph_info(gm).example.kwargs["x"].clone()
    example.zero_()
    assert torch.equal(qgraph.graph_info(gm).example.kwargs["x"], before)


# --- leaves ----------------------------------------------------------------------------------------------------


def test_leaf_class_and_path() -> None:
    assert called_modules(trace(Thrice().eval(), x(), leaf_modules=[Block])) == ["block"] * 3
    assert called_modules(trace(TwoBlocks().eval(), x(), leaf_modules=["second"])).count("second") == 1


def test_leaves_may_come_from_a_generator() -> None:
    gm = trace(TwoBlocks().eval(), x(), leaf_modules=(path for path in ["second"]))
    assert "second" in called_modules(gm)


@pytest.mark.parametrize("leaf", ["second", Block], ids=["path", "class"])
def test_a_single_leaf_without_a_list(leaf: object) -> None:
    gm = trace(TwoBlocks().eval(), x(), leaf_modules=leaf)
    assert "second" in called_modules(gm)


def test_leaf_path_of_a_module_with_two_names() -> None:
    model = TwoBlocks()
    model.other = model.second
    assert "second" in called_modules(trace(model.eval(), x(), leaf_modules=["other"]))


def test_unknown_leaf_path_has_close_matches() -> None:
    with pytest.raises(UserError, match="did you mean 'second'"):
        trace(TwoBlocks().eval(), x(), leaf_modules=["secnd"])


def test_a_module_instance_is_no_leaf_rule() -> None:
    with pytest.raises(UserError, match="module classes or module paths"):
        trace(TwoBlocks().eval(), x(), leaf_modules=[nn.Linear(1, 1)])
