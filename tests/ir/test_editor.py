"""The editor keeps records, counts changes and refuses what would break the graph."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from qgraph.capture import trace
from qgraph.errors import InternalError, PassError
from qgraph.ir.editor import EditListener, Editor, node_name
from qgraph.ir.node_info import has_info, info
from qgraph.ir.op_table import IDENTITY, MUL, RELU, SIGMOID
from tests.support.models import Residual, image
from tests.support.passes import nodes_of


@pytest.fixture
def edit() -> Editor:
    return Editor(trace(Residual().eval(), image()), "test")


def test_created_nodes_inherit_source_shape_and_origin(edit: Editor) -> None:
    relu = nodes_of(edit.gm, RELU)[0]
    node = edit.call(SIGMOID, relu.args[0], like=relu)
    record = info(node)
    assert record.source == info(relu).source
    assert record.value == info(relu).value
    assert record.stands_for == info(relu).stands_for
    assert (record.created_by, record.op) == ("test", SIGMOID)
    assert edit.changes == 1


def test_a_node_with_a_site_of_its_own_has_no_foreign_origin(edit: Editor) -> None:
    relu = nodes_of(edit.gm, RELU)[0]
    node = edit.call(SIGMOID, relu.args[0], like=relu, site="relu.inner")
    assert info(node).stands_for == ("relu.inner",)
    assert info(node).value is None, "its shape is its own to state"


def test_replace_joins_origins_and_moves_users(edit: Editor) -> None:
    relu = nodes_of(edit.gm, RELU)[0]
    users, norm = list(relu.users), relu.all_input_nodes[0]
    node = edit.call(SIGMOID, norm.args[0], like=relu, site="fused")
    edit.replace(relu, node, absorbs=[norm])
    edit.erase(norm)
    assert list(node.users) == users
    assert info(node).origins == ("bn1", "relu")


def test_absorb_keeps_name_and_site_of_the_absorbing_node(edit: Editor) -> None:
    relu = nodes_of(edit.gm, RELU)[0]
    norm = relu.all_input_nodes[0]
    edit.absorb(relu, norm)
    assert (norm.name, info(norm).site) == ("bn1", "bn1")
    assert info(norm).origins == ("bn1", "relu")


def test_erasing_a_used_node_names_its_users(edit: Editor) -> None:
    relu = nodes_of(edit.gm, RELU)[0]
    with pytest.raises(PassError, match="still used") as raised:
        edit.erase(relu)
    assert "conv2" in str(raised.value)


def test_unknown_options_and_operators_without_function_are_refused(edit: Editor) -> None:
    relu = nodes_of(edit.gm, RELU)[0]
    with pytest.raises(InternalError, match="no option"):
        edit.call(SIGMOID, relu, like=relu, dim=1)
    with pytest.raises(InternalError, match="no function"):
        edit.call(IDENTITY, relu, like=relu)


def test_listeners_hear_of_every_edit(edit: Editor) -> None:
    heard: list[tuple[str, str]] = []
    edit.listeners.append(
        EditListener(
            created=lambda node: heard.append(("created", node.name)),
            erased=lambda node: heard.append(("erased", node.name)),
            changed=lambda node: heard.append(("changed", node.name)),
            replaced=lambda old, new: heard.append(("replaced", f"{old.name}>{new.name}")),
        )
    )
    relu = nodes_of(edit.gm, RELU)[0]
    name = relu.name
    node = edit.call(SIGMOID, relu.args[0], like=relu)
    edit.replace(relu, node)
    edit.replace_input(node, node.args[0], node.args[0].args[0])
    assert heard == [
        ("created", node.name),
        ("replaced", f"{name}>{node.name}"),
        ("erased", name),
        ("changed", node.name),
    ]


def test_constants_become_buffers_with_unique_paths(edit: Editor) -> None:
    relu = nodes_of(edit.gm, RELU)[0]
    first = edit.constant(torch.ones(2), path="table", like=relu)
    second = edit.constant(torch.zeros(2), path="table", like=relu)
    assert (first.target, second.target) == ("table", "table_1")
    assert dict(edit.gm.named_buffers())["table_1"].sum() == 0
    assert str(info(first).value) == "f32[2]"


def test_a_constant_below_a_leaf_module_is_kept_at_the_root(edit: Editor) -> None:
    relu = nodes_of(edit.gm, RELU)[0]
    node = edit.constant(torch.ones(2), path="stem.table", like=relu)
    assert node.target == "stem_table", "the user's module is shared and must not be extended"


def test_modules_are_put_at_nested_paths(edit: Editor) -> None:
    edit.set_module("a.b.c", nn.Identity())
    assert isinstance(edit.gm.get_submodule("a.b.c"), nn.Identity)
    assert edit.free_path("a.b.c") == "a.b.c_1"


def test_annotations_are_no_changes(edit: Editor) -> None:
    relu = nodes_of(edit.gm, RELU)[0]
    edit.annotate(relu, float_reason="a test")
    assert (edit.changes, edit.annotations) == (0, 1)
    assert info(relu).float_reason == "a test"


def test_rename_takes_the_name_only_if_it_is_free(edit: Editor) -> None:
    relu = nodes_of(edit.gm, RELU)[0]
    twin = edit.call(SIGMOID, relu.args[0], like=relu)
    assert twin.name == "relu_2", "relu and relu_1 are taken"
    edit.rename(twin)
    assert twin.name == "relu_2"
    edit.replace(relu, twin)
    edit.rename(twin)
    assert twin.name == "relu"


@pytest.mark.parametrize(
    ("site", "name"), [("a.b(1)", "a_b_1"), ("0.conv", "n0_conv"), ("skip[add]", "skip_add"), ("", "value")]
)
def test_node_names_are_identifiers(site: str, name: str) -> None:
    assert node_name(site) == name


def test_nodes_made_past_the_editor_are_found_out() -> None:
    gm = trace(Residual().eval(), image())
    relu = nodes_of(gm, RELU)[0]
    with gm.graph.inserting_after(relu):
        stray = gm.graph.call_function(torch.neg, (relu,))
    assert not has_info(stray)
    with pytest.raises(InternalError, match="carries no qgraph record"):
        info(stray)
    assert isinstance(stray, fx.Node)
    assert MUL.name == "mul"
