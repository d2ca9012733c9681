"""Iterations of a dynamic block fuse alike and share scales, weights and settings."""

from __future__ import annotations

import torch
from torch import nn

from qgraph import (
    ModuleNameQconfigSetter,
    QConfig,
    Tracer,
    calibrate,
    check_consistency,
    convert,
    get_qconfig,
    graph_info,
    info,
    prepare,
)
from qgraph.ir.node_info import module_of
from qgraph.quantization.fake_quantize import FakeQuantize
from qgraph.quantization.observers import make_observer


class _Cameras(nn.Module):
    def __init__(self, *, skip_first: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.skip_first = skip_first

    def forward(self, cameras: list[torch.Tensor]) -> torch.Tensor:
        out = cameras[0]
        for number, camera in enumerate(cameras):
            with Tracer.dynamic_block(self, "camera"):
                found = self.norm(self.conv(camera))
                if number or not self.skip_first:
                    found = found + out
                out = torch.sigmoid(found)
        return out


def _cameras(count: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(2, 3, 6, 6, generator=generator) * (1 + number) for number in range(count)]


def _model(*, skip_first: bool = False) -> _Cameras:
    torch.manual_seed(0)
    return _Cameras(skip_first=skip_first).eval()


def _sites_by_quantizer(setter: object = None, *, skip_first: bool = False) -> list[set[str]]:
    gm = prepare(_model(skip_first=skip_first), (_cameras(),), setter)
    found: dict[int, set[str]] = {}
    for node in gm.graph.nodes:
        module = module_of(node) if node.op == "call_module" else None
        if isinstance(module, FakeQuantize):
            found.setdefault(id(module), set()).add(info(node).site.removesuffix(".fake_quant"))
    return list(found.values())


def test_conv_norm_and_add_fuse_in_every_iteration() -> None:
    gm = prepare(_model(), (_cameras(),))
    convs = [info(node) for node in gm.graph.nodes if info(node).op.name == "conv2d"]
    assert [record.site for record in convs] == ["conv", "conv(1)", "conv(2)"]
    for record, call in zip(convs, ("", "(1)", "(2)"), strict=True):
        assert set(record.stands_for) == {f"conv{call}", f"norm{call}", f"camera._generated_add_0{call}"}


def test_iterations_share_scales_and_weights() -> None:
    gm = prepare(_model(), (_cameras(),))
    groups = _sites_by_quantizer()
    assert {"conv", "conv(1)", "conv(2)"} in groups
    assert all(len(group) == 3 for group in groups if any("sigmoid" in site for site in group))
    weights = {id(module_of(node).weight) for node in gm.graph.nodes if info(node).op.name == "conv2d"}
    assert len(weights) == 1


def test_a_shared_scale_covers_every_iteration() -> None:
    gm = prepare(_model(), (_cameras(),))
    quantizer = next(module for module in gm.modules() if isinstance(module, FakeQuantize) and module.site == "conv")
    seen: list[torch.Tensor] = []
    quantizer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    calibrate(gm, [(_cameras(),)], progress=False)
    assert len(seen) == 3
    expected = make_observer("min_max", -1)
    for values in seen:
        expected(values)
    assert torch.equal(quantizer.scale, expected.qparams(quantizer.qtype, quantizer.scheme).scale)


def test_integers_agree_with_fake_quantization() -> None:
    gm = prepare(_model(), (_cameras(),))
    calibrate(gm, [(_cameras(),)], progress=False)
    assert check_consistency(gm, convert(gm), [(_cameras(),)]).differing == 0


def test_a_setting_by_name_holds_for_every_iteration() -> None:
    setter = ModuleNameQconfigSetter({"camera._generated_add_0": get_qconfig(out_dtype="int16")})
    gm = prepare(_model(), (_cameras(),), (setter, QConfig()))
    plans = [info(node).plan for node in gm.graph.nodes if info(node).op.name == "conv2d"]
    assert [str(plan.format) for plan in plans if plan is not None] == ["int16"] * 3


def test_calls_configured_apart_have_scales_of_their_own() -> None:
    setter = ModuleNameQconfigSetter({"conv(1)": get_qconfig(out_dtype="int16")})
    groups = _sites_by_quantizer((setter, QConfig()))
    assert {"conv", "conv(2)"} in groups
    assert {"conv(1)"} in groups


def test_an_iteration_that_fuses_differently_is_noted() -> None:
    gm = prepare(_model(skip_first=True), (_cameras(),))
    assert any("fused differently" in note and "conv(1)" in note for note in graph_info(gm).notes)
    groups = _sites_by_quantizer(skip_first=True)
    assert {"conv"} in groups
    assert {"conv(1)", "conv(2)"} in groups
