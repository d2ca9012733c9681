"""Models with several control-flow paths: one graph per path, chosen by the inputs, with what is common shared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qgraph import (
    Examples,
    FakeQuantState,
    PathModel,
    Simulator,
    StateError,
    Tracer,
    UserError,
    calibrate,
    convert,
    graph_info,
    prepare,
    set_fake_quantize,
)
from qgraph.ir.node_info import info
from qgraph.quantization.fake_quantize import FakeQuantize


class _Cameras(nn.Module):
    """The number of cameras varies, and so does whether there is a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.map = nn.Conv2d(3, 3, 1)
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, cameras: list[torch.Tensor], chart: torch.Tensor | None = None) -> torch.Tensor:
        out = cameras[0]
        for camera in cameras:
            with Tracer.dynamic_block(self, "camera"):
                out = torch.sigmoid(self.norm(self.conv(camera)) + out)
        if chart is not None:
            out = out + self.map(chart)
        return self.head(out)


def _cameras(count: int, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * count + batch)
    return [torch.randn(batch, 3, 6, 6, generator=generator) for _ in range(count)]


def _chart() -> torch.Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(7))


def _model() -> _Cameras:
    torch.manual_seed(0)
    return _Cameras().eval()


def _prepared() -> PathModel:
    return prepare(_model(), Examples((_cameras(2),), (_cameras(3),), (_cameras(2), _chart())))


_DATA = [(_cameras(2), None), (_cameras(3), None), (_cameras(2), _chart())]


def test_each_call_takes_the_path_of_its_inputs() -> None:
    model, paths = _model(), _prepared()
    assert len(paths.graphs) == 3
    for number, inputs in enumerate([(_cameras(2, 5),), (_cameras(3),), (_cameras(2), _chart())]):
        assert paths.path_of(inputs, {}) == number
        with torch.no_grad():
            torch.testing.assert_close(paths(*inputs), model(*inputs))
            assert torch.equal(paths(*inputs), paths.graphs[number](*inputs))


def test_an_unseen_path_says_what_to_add() -> None:
    with pytest.raises(UserError, match="take a path of the model that no graph was captured for") as caught:
        _prepared()(_cameras(4))
    text = str(caught.value)
    assert "path 0: input cameras[2] is unexpected" in text
    assert "Examples(..., example)" in text


def test_paths_share_parameters_and_sites() -> None:
    first, second, third = _prepared().graphs
    for gm in (second, third):
        shared = {id(parameter) for parameter in first.parameters()} & {id(parameter) for parameter in gm.parameters()}
        assert len(shared) == 4  # weight and bias of conv and of head
    conv = [next(m for m in gm.modules() if isinstance(m, FakeQuantize) and m.site == "conv") for gm in (first, second)]
    assert conv[0] is conv[1]
    weights = [gm.get_submodule("conv").weight_fake_quant for gm in (first, second, third)]
    assert weights[0] is weights[1] is weights[2]


def test_calls_of_other_lines_do_not_share_a_scale() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, xs: list[torch.Tensor]) -> torch.Tensor:
            if len(xs) == 1:
                return self.a(xs[0]) * 2
            return self.b(xs[0] * xs[1])

    torch.manual_seed(0)
    one, two = prepare(
        Branches().eval(), Examples(([torch.randn(2, 4)],), ([torch.randn(2, 4), torch.randn(2, 4)],))
    ).graphs
    sites = [{module.site: module for module in gm.modules() if isinstance(module, FakeQuantize)} for gm in (one, two)]
    assert "_generated_mul_0" in sites[0]
    assert "_generated_mul_0" in sites[1]
    assert sites[0]["_generated_mul_0"] is not sites[1]["_generated_mul_0"]


def test_all_paths_calibrate_convert_and_simulate() -> None:
    paths = _prepared()
    calibrate(paths, _DATA, progress=False)
    integer = convert(paths)
    simulator = Simulator(integer)
    for inputs in ((_cameras(2, 5),), (_cameras(3, 1),), (_cameras(2), _chart())):
        number = paths.path_of(inputs, {})
        expected = Simulator(integer.graphs[number])(*inputs)
        assert torch.equal(simulator(*inputs), expected)
        assert (simulator(*inputs) - paths(*inputs)).abs().max() < (expected.abs().max() / 50)
    scale = {gm.get_submodule("quantizers.conv").scale.item() for gm in paths.graphs}
    assert len(scale) == 1


def test_a_path_without_data_is_an_error_and_changes_nothing() -> None:
    paths = _prepared()
    with pytest.raises(StateError, match="have not been calibrated"):
        calibrate(paths, _DATA[:2], progress=False)
    assert all(module.state is FakeQuantState.FLOAT for module in paths.modules() if isinstance(module, FakeQuantize))


def test_states_reach_every_path() -> None:
    paths = _prepared()
    set_fake_quantize(paths, FakeQuantState.CALIBRATION, ["map"])
    moved = {m.site for m in paths.modules() if isinstance(m, FakeQuantize) and m.state is FakeQuantState.CALIBRATION}
    assert moved == {"map"}
    with pytest.raises(UserError, match="no path has a site 'mapp'"):
        set_fake_quantize(paths, FakeQuantState.CALIBRATION, ["mapp"])


def test_training_moves_the_weights_of_every_path() -> None:
    paths = _prepared()
    optimizer = torch.optim.SGD(paths.parameters(), lr=0.1)
    paths(_cameras(3)).square().sum().backward()
    before = paths.graphs[0](_cameras(2)).detach()
    optimizer.step()
    assert not torch.equal(paths.graphs[0](_cameras(2)), before)


def test_examples_of_one_path_make_one_graph() -> None:
    paths = prepare(_model(), Examples((_cameras(2),), (_cameras(2, 5),)))
    assert len(paths.graphs) == 1
    assert any("takes the path of an earlier one" in note for note in graph_info(paths.graphs[0]).notes)
    assert any(info(node).site == "conv(1)" for node in paths.graphs[0].graph.nodes)
    with pytest.raises(UserError, match="holds no example"):
        Examples()
