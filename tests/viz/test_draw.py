"""Pictures of single graphs: what is drawn, in which colour, with which texts."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import fx, nn

import qgraph
from qgraph.errors import UserError
from qgraph.ir.node_info import info, set_info
from qgraph.ir.op_table import FAKE_QUANT
from qgraph.viz import to_dot
from qgraph.viz.dot import quoted
from qgraph.viz.labels import is_hidden, wrapped
from qgraph.viz.style import Role
from tests.support.models import Residual, image
from tests.viz.pictures import MODELS, STAGES, Chain, Picture, parsed, read, stages, unquoted

ALL = [(model, stage) for model in MODELS for stage in STAGES]
TEXT = "{http://www.w3.org/2000/svg}text"


@cache
def picture(model: str, stage: str) -> Picture:
    return parsed(to_dot(stages(model)[stage]))


def visible_source(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0] if info(node).op is FAKE_QUANT else node


@pytest.mark.parametrize(("model", "stage"), ALL)
def test_every_visible_node_is_a_box_and_every_operand_an_edge(model: str, stage: str) -> None:
    drawn = picture(model, stage)
    visible = [node for node in stages(model)[stage].graph.nodes if not is_hidden(node)]
    assert drawn.boxes.keys() == {f"%{node.name}" for node in visible}
    expected = {
        (f"%{source.name}", f"%{node.name}")
        for node in visible
        for source in map(visible_source, node.all_input_nodes)
        if not is_hidden(source)
    }
    assert drawn.edges == expected
    assert drawn.values.keys() == {source for source, _ in expected}, "every value that is used is described"


@pytest.mark.parametrize(("model", "stage"), ALL)
def test_all_three_formats_are_written(model: str, stage: str, tmp_path: Path) -> None:
    gm = stages(model)[stage]
    assert qgraph.draw(gm, tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert qgraph.draw(gm, str(tmp_path / "graph.dot")).read_text(encoding="utf-8") == to_dot(gm).to_string()
    root = ElementTree.parse(qgraph.draw(gm, tmp_path / "graph.svg")).getroot()
    texts = {(entry.text or "").replace("\xa0", " ") for entry in root.iter(TEXT)}
    for lines in picture(model, stage).boxes.values():
        assert set(lines) <= texts
    assert {path.name for path in tmp_path.iterdir()} == {"graph.png", "graph.dot", "graph.svg"}


def test_modules_are_clusters() -> None:
    assert picture("shared", "captured").clusters == {"head": {"%head_0", "%head_1", "%head_2", "%head_3"}}
    assert picture("attention", "captured").clusters == {"mlp": {"%mlp_0", "%mlp_1", "%mlp_2"}}


def test_the_steps_of_a_composite_are_a_cluster_with_its_last_step() -> None:
    clusters = picture("attention", "prepared").clusters
    assert clusters["norm"] == {"%norm_rsqrt", "%norm_mul", "%norm"}
    assert "%generated_softmax_0" in clusters["_generated_softmax_0"]
    assert len(clusters["_generated_softmax_0"]) == 6


def test_stubs_stand_where_their_value_is_made() -> None:
    assert picture("shared", "prepared").clusters == {"head": {"%head_0", "%head_3", "%head_3_dequant"}}


def test_boxes_say_operator_site_and_weight() -> None:
    assert picture("residual", "captured").boxes["%conv1"] == ["conv2d", "conv1"]
    assert picture("residual", "fused").boxes["%conv2"] == ["conv2d + add + relu", "conv2"]
    for stage in ("prepared", "integer"):
        assert picture("residual", stage).boxes["%conv2"] == ["conv2d + add + relu", "conv2", "weight int8"]
    assert picture("residual", "integer").boxes["%output"] == ["output"]


def test_integer_operators_of_another_name_are_named() -> None:
    boxes = picture("attention", "integer").boxes
    assert boxes["%norm_rsqrt"][0] == "rsqrt: lookup_segments"
    assert boxes["%norm"][0] == "affine: requantize"
    assert boxes["%generated_softmax_0_sum"][0] == "sum: reduce_sum"
    assert boxes["%x_quant"][0] == "quant_stub"


@pytest.mark.parametrize("stage", STAGES)
def test_calls_that_share_weights_say_so(stage: str) -> None:
    boxes = picture("shared", stage).boxes
    assert boxes["%conv"][-1] == "shared: call 1 of 2"
    assert boxes["%conv_1"][-1] == "shared: call 2 of 2"
    assert sum("shared" in line for lines in boxes.values() for line in lines) == 2


@pytest.mark.parametrize(("scale", "words"), [(0.01, "conv2d + relu"), (0.1, "conv2d + clamp")])
def test_an_upper_bound_that_cuts_codes_is_no_relu(scale: float, words: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Flatten(), nn.Linear(144, 2)).eval()
    prepared = qgraph.prepare(model, image())
    qgraph.calibrate(prepared, [image()], progress=False)
    (fused,) = read(to_dot(prepared)).with_role(Role.FUSED)
    assert read(to_dot(prepared)).boxes[fused][0] == "conv2d + relu6"
    (rounding,) = [module for module in prepared.modules() if getattr(module, "site", "") == "0"]
    rounding.fixed_scale, rounding.scale, rounding._cached = scale, torch.tensor(scale), None
    assert read(to_dot(qgraph.convert(prepared))).boxes[fused][0] == words


def test_values_give_shapes_while_no_format_is_planned() -> None:
    shapes = {"f32[2,3,8,8]", "f32[2,4,8,8]", "f32[2,4,1,1]", "f32[2,4]", "f32[2,5]"}
    assert set(picture("residual", "captured").values.values()) == shapes


@pytest.mark.parametrize("model", list(MODELS))
def test_values_of_a_prepared_graph_give_format_and_scale(model: str) -> None:
    gm, values = stages(model)["prepared"], picture(model, "prepared").values
    rounded = [node for node in gm.graph.nodes if info(node).op is FAKE_QUANT]
    assert len(rounded) > 4
    for node in rounded:
        qparams = gm.get_submodule(node.target).qparams()
        first = values[f"%{node.all_input_nodes[0].name}"].splitlines()[0]
        assert first == f"{qparams.qtype} * {qparams.scale.item():.4g}"


@pytest.mark.parametrize("model", list(MODELS))
def test_values_of_an_integer_graph_give_format_and_scale(model: str) -> None:
    values = picture(model, "integer").values
    nodes = [node for node in stages(model)["integer"].graph.nodes if info(node).qparams is not None]
    assert len(nodes) > 4
    for node in nodes:
        qparams = info(node).qparams
        scale = f"{qparams.scale.item():.4g}" if qparams.axis is None else f"{qparams.scale.numel()} scales"
        assert values[f"%{node.name}"].splitlines()[0] == f"{qparams.qtype} * {scale}"


def test_movements_carry_the_format_of_what_they_move() -> None:
    values = picture("attention", "prepared").values
    linear = values["%qkv"].splitlines()[0]
    assert linear.startswith("int8 * ")
    assert values["%generated_permute_0"].splitlines() == [linear, "f32[3,2,2,5,4]"]
    assert values["%generated_unbind_0"].splitlines() == [linear, "3 values"]
    assert picture("attention", "captured").values["%generated_unbind_0"] == "3 values"


def test_sites_without_a_scale_yet_have_their_format() -> None:
    values = read(to_dot(qgraph.prepare(Residual().eval(), image()))).values
    assert values["%conv1"] == "int8\nf32[2,4,8,8]"


def test_colours_say_what_a_node_is() -> None:
    captured, fused = picture("residual", "captured"), picture("residual", "fused")
    assert captured.with_role(Role.FUSED) == set()
    assert captured.with_role(Role.MATMUL) == {"%stem", "%conv1", "%conv2", "%fc"}
    assert fused.with_role(Role.FUSED) == {"%conv1", "%conv2"}
    assert fused.with_role(Role.MATMUL) == {"%stem", "%fc"}
    assert picture("residual", "integer").with_role(Role.FUSED) == {"%conv1", "%conv2"}
    assert picture("residual", "integer").with_role(Role.STUB) == {"%x_quant", "%fc_dequant"}
    assert picture("attention", "integer").with_role(Role.TABLE) >= {"%norm_rsqrt", "%mlp_1"}


@pytest.mark.parametrize("stage", ["prepared", "integer"])
def test_float_islands_are_red_and_say_why(stage: str) -> None:
    drawn = picture("shared", stage)
    assert drawn.with_role(Role.ISLAND) == {"%generated_cumprod_0"}
    assert "float: no integer form of torch.cumprod is known" in " ".join(drawn.boxes["%generated_cumprod_0"])


@pytest.mark.parametrize(("model", "stage"), ALL)
def test_the_legend_explains_exactly_the_colours_that_occur(model: str, stage: str) -> None:
    drawn = picture(model, stage)
    assert set(re.findall(r'BGCOLOR="(#\w+)"', drawn.legend)) == set(drawn.fills.values())
    for role in Role:
        assert (f">{role.meaning}<" in drawn.legend) == (role.fill in drawn.fills.values())


def test_the_heading_names_model_stage_and_target() -> None:
    assert picture("residual", "captured").heading == "Residual (captured)"
    assert picture("residual", "integer").heading == "Residual (integer, target bpu)"
    assert read(to_dot(stages("residual")["captured"], title="my title")).heading == "my title"


def test_hovering_shows_the_text_form_and_the_source_line(tmp_path: Path) -> None:
    text = qgraph.draw(stages("residual")["fused"], tmp_path / "g.svg").read_text(encoding="utf-8")
    assert re.search(r'xlink:title="%conv2 = conv2d\(%conv1, %stem, [^"]*activation=relu\)&#10;models.py:\d+"', text)


def test_300_nodes_whose_modules_alternate_with_outer_nodes(tmp_path: Path) -> None:
    gm = qgraph.trace(Chain(75).eval(), image())
    assert len(gm.graph.nodes) > 300
    root = ElementTree.parse(qgraph.draw(gm, tmp_path / "long.svg")).getroot()
    width, height = (float(root.attrib[side].removesuffix("pt")) for side in ("width", "height"))
    assert width < 1000, "the blocks stand below each other"
    assert height > 75 * 100
    drawn = read(to_dot(gm))
    assert len(drawn.boxes) == sum(not is_hidden(node) for node in gm.graph.nodes)
    assert drawn.clusters["blocks.74"] == {"%blocks_74_0", "%blocks_74_1", "%blocks_74_2"}


NASTY = [
    'say "hi"',
    "back\\slash",
    "\\N\\G\\l",
    "a[0]",
    "a:b:c",
    "<g>",
    "<b>bold</b>",
    "x&amp;y",
    "dé日本",
    "graph",
    "new\nline",
    "{a|b}",
    '"quoted"',
]


@pytest.mark.parametrize("name", NASTY)
def test_names_are_shown_as_they_are(name: str, tmp_path: Path) -> None:
    gm = qgraph.trace(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).eval(), torch.randn(1, 2))
    for node in gm.graph.nodes:
        if node.op == "call_module" and node.target in ("0", "1"):
            set_info(node, replace(info(node), site=f"{name}.{node.target}", module=name))
    drawn = parsed(to_dot(gm, title=name))
    assert drawn.heading == name
    assert drawn.clusters == {name: {"%n0", "%n1"}}
    assert "\n".join(drawn.boxes["%n0"]) == f"linear\n{name}.0"
    root = ElementTree.parse(qgraph.draw(gm, tmp_path / "g.svg", title=name)).getroot()
    texts = [(entry.text or "").replace("\xa0", " ") for entry in root.iter(TEXT)]
    assert set(f"{name}.0".split("\n")) <= set(texts)
    assert texts.count(name.split("\n")[0]) >= 2, "heading and module"


class KeywordInputs(nn.Module):
    def forward(self, graph: torch.Tensor, node: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
        return graph + node * edge


def test_inputs_named_like_words_of_the_dot_language(tmp_path: Path) -> None:
    gm = qgraph.trace(KeywordInputs().eval(), tuple(torch.randn(2, 3) for _ in range(3)))
    drawn = parsed(to_dot(gm))
    assert {"%graph", "%node", "%edge"} <= drawn.boxes.keys()
    assert ("%graph", "%generated_add_0") in drawn.edges
    ElementTree.parse(qgraph.draw(gm, tmp_path / "g.svg"))


@pytest.mark.parametrize("text", ["", *NASTY, "tab\tnull\x00escape\x1b", '"', "\\", '\\"', "lone \udcff"])
def test_quoting_and_reading_back(text: str) -> None:
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    assert unquoted(quoted(text)) == shown
    quoted(text).encode()


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("short", 10, ["short"]),
        ("one two three", 8, ["one two", "three"]),
        ("no form of torch.cumsum is known", 14, ["no form of", "torch.cumsum", "is known"]),
        ("_generated_scaled_dot_product_0", 20, ["_generated_scaled_", "dot_product_0"]),
        ("encoder.layers.0.attention", 16, ["encoder.layers.", "0.attention"]),
        ("abcdefghij", 4, ["abcd", "efgh", "ij"]),
        ("", 4, [""]),
    ],
)
def test_wrapping(text: str, width: int, lines: list[str]) -> None:
    assert wrapped(text, width).split("\n") == lines


@pytest.mark.parametrize("thing", [nn.Linear(1, 1), fx.symbolic_trace(nn.Linear(1, 1)), None, "graph"])
def test_things_that_are_no_graph_of_qgraph(thing: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was not captured by qgraph"):
        qgraph.draw(thing, tmp_path / "g.dot")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="was not captured by qgraph"):
        qgraph.draw_diff(stages("residual")["captured"], thing, tmp_path / "g.dot")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
