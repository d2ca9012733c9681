"""What engines cannot compute: left in float where the call itself does not fit, refused where the scales do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from qgraph.errors import QuantizationError
from qgraph.ir.node_info import info
from qgraph.quantization import convert, prepare
from tests.conformance.build import with_values
from tests.support.models import Forward

IMAGE = (1, 4, 6, 6)


def reasons(target: str, forward: Callable[..., Any], shape: tuple[int, ...], **children: nn.Module) -> list[str]:
    gm = prepare(Forward(forward, **children).eval(), torch.randn(shape), target=target)
    return [record.float_reason for node in gm.graph.nodes if (record := info(node)).float_reason]


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda m, x: m.up(x), "litert has no groups in conv_transpose2d"),
        (lambda m, x: m.wide(x), "litert has no dilation in conv_transpose2d"),
        (lambda m, x: m.plain(x), None),
        (lambda m, x: F.max_pool2d(x, 2, dilation=2), "litert has no dilation in max_pool2d"),
        (lambda m, x: F.max_pool2d(x, 3, 2, 1), None),
        # SAME of a kernel of 3 and a stride of 1 pads by 1; of a stride of 2 on 6 elements it pads behind only.
        (lambda m, x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False), None),
        (lambda m, x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), "TensorFlow"),
        (lambda m, x: F.avg_pool2d(x, 3, 2, 0, ceil_mode=True), None),
        (lambda m, x: F.avg_pool2d(x, 5, 4, 0, ceil_mode=True), "TensorFlow"),
        (lambda m, x: F.avg_pool2d(x, 4, 2), None),
    ],
)
def test_calls_that_litert_lacks(forward: Callable[..., Any], words: str | None) -> None:
    children = {
        "up": nn.ConvTranspose2d(4, 4, 2, groups=2),
        "wide": nn.ConvTranspose2d(4, 4, 2, dilation=2),
        "plain": nn.ConvTranspose2d(4, 4, 2, stride=2),
    }
    found = reasons("litert", lambda m, x: forward(m, x.relu()), IMAGE, **children)
    assert (found == []) if words is None else (len(found) == 1 and words in found[0])


@pytest.mark.parametrize(
    ("target", "module", "stays"),
    [
        ("x86", nn.Conv2d(6, 12, (3, 3), (1, 2), (1, 0), groups=6), True),
        ("x86-onednn", nn.Conv2d(6, 12, (3, 3), (1, 2), (1, 0), groups=6), True),
        ("x86-fbgemm", nn.Conv2d(6, 12, (3, 3), (1, 2), (1, 0), groups=6), False),
        ("bpu", nn.Conv2d(6, 12, (3, 3), (1, 2), (1, 0), groups=6), False),
        ("x86", nn.Conv2d(6, 6, (3, 3), (1, 2), (1, 0), groups=6), False),
        ("x86", nn.Conv2d(6, 12, (3, 3), (1, 2), (1, 1), groups=6), False),
        ("x86", nn.Conv2d(6, 12, (3, 3), (1, 2), (1, 0)), True),
        ("x86", nn.Conv2d(6, 12, (3, 1), (1, 3), (1, 0)), False),
    ],
)
def test_convolutions_that_onednn_computes_wrongly(target: str, module: nn.Module, stays: bool) -> None:
    found = reasons(target, lambda m, x: m.c(x.relu()), (1, 6, 6, 3), c=module)
    assert any("oneDNN computes wrong sums" in reason for reason in found) == stays


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda m, x: F.adaptive_avg_pool2d(x, (2, 2)), "mixes up channels"),
        (lambda m, x: F.max_pool2d(x, (1, 2), 1, (0, 1)), "mixes up channels"),
        (lambda m, x: F.adaptive_avg_pool2d(x, 1), None),
        (lambda m, x: m.c(x), "nothing but padding"),
    ],
)
def test_images_of_one_pixel_on_x86(forward: Callable[..., Any], words: str | None) -> None:
    conv = nn.Conv2d(4, 4, (1, 2), padding=(0, 1), dilation=(1, 2))
    found = reasons("x86", lambda m, x: forward(m, x.relu()), (1, 4, 1, 1), c=conv)
    assert (found == []) if words is None else (len(found) == 1 and words in found[0])
    assert reasons("bpu", lambda m, x: forward(m, x.relu()), (1, 4, 1, 1), c=conv) == []


class OfOne(nn.Module):
    """A function of one value."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def prepared(
    target: str, qtype: str, function: Callable[..., Any], site: str, scale: float, result: float
) -> fx.GraphModule:
    """A function of `[1, 2, 4, 4]` from one scale to another."""
    scales: dict[str, tuple[list[float], int]] = {"x.quant": ([scale], 0), site: ([result], 0)}
    formats = {name: (qtype, "int8") for name in scales}
    return with_values(OfOne(function), {"x": torch.zeros(1, 2, 4, 4)}, scales, {}, {}, formats, target)


# Target, format, function, its name; scales of operand and result that are refused, and how; scales that are not.
SCALES: dict[str, tuple[str, str, Callable[..., Any], str, tuple[float, float], str, tuple[float, float]]] = {
    "add 16": ("litert", "int16", lambda x: x + x, "add", (1.0, 2.0**-14), "factor is 1,", (1.0, 2.0**-13)),
    "sub 16": ("litert", "int16", lambda x: x - x, "sub", (1.0, 2.0**-15), "factor is 2,", (1.0, 2.0**-13)),
    "sub 8": ("litert", "int8", lambda x: x - x, "sub", (1.0, 2.0**-19), "factor is 1,", (1.0, 2.0**-18)),
    "hardswish": ("litert", "int8", F.hardswish, "hardswish", (2.0**26, 2.0**26), "32 bits", (2.0**24, 2.0**24)),
    "tanh": ("litert", "int16", torch.tanh, "tanh", (2.0**18, 2.0**-15), "32 bits", (2.0**17, 2.0**-15)),
    "mean": ("onnxruntime", "uint8", lambda x: x.mean((2, 3)), "mean", (4096.0, 1.0), "by 256", (4095.0, 1.0)),
    "litert relu6": ("litert", "int8", F.relu6, "relu6", (1e-9, 2e-9), "no relu6 a scale of 2e-09", (3e-9, 3e-9)),
    "gemmlowp": ("litert", "int16", F.relu6, "relu6", (2.0**19, 2.0**-13), "factor is above", (2.0**17, 2.0**-13)),
    "relu6": ("onnxruntime", "int8", F.relu6, "relu6", (1e-8, 1e-8), "no relu6 a scale of 1e-08", (1e-3, 1e-3)),
}


@pytest.mark.parametrize("name", SCALES)
def test_scales_that_an_engine_refuses(name: str) -> None:
    target, qtype, function, site, refused, words, fine = SCALES[name]
    site = f"_generated_{site}_0"
    with pytest.raises(QuantizationError, match="node ") as caught:
        convert(prepared(target, qtype, function, site, *refused))
    assert words in str(caught.value)
    assert site in str(caught.value)
    convert(prepared(target, qtype, function, site, *fine))
