"""Number formats, and how the inputs lie in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qgraph.capture import trace
from qgraph.capture.values.layout import TensorLayout, copy_tensor, laid_out_as, strides_like
from qgraph.errors import UserError
from tests.capture.checks import Mixed, assert_agrees, x
from tests.support.models import Forward

# --- number formats and memory layouts -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_formats_are_exact(dtype: torch.dtype) -> None:
    model = Mixed().eval().to(dtype)
    gm = trace(model, torch.randn(2, 3, 6, 6, dtype=dtype))
    assert gm(torch.randn(2, 3, 6, 6, dtype=dtype)).dtype is dtype
    for size in (1, 2, 5):
        assert_agrees(model, gm, torch.randn(size, 3, 6, 6, dtype=dtype))


def test_formats_mixed_in_the_forward() -> None:
    def forward(m, x):
        half = m.linear(x.half())
        return (half.float().double() + x).to(torch.bfloat16), half

    model = Forward(forward, linear=nn.Linear(6, 6).half()).eval()
    gm = trace(model, x())
    assert_agrees(model, gm, x(5))


LAYOUTS: dict[str, Callable[[int], torch.Tensor]] = {
    "channels_last": lambda size: torch.randn(size, 3, 6, 6).to(memory_format=torch.channels_last),
    "transposed": lambda size: torch.randn(6, 6, 3, size).permute(3, 2, 1, 0),
    "sliced": lambda size: torch.randn(size, 6, 12, 12)[:, ::2, ::2, ::2],
    "expanded": lambda size: torch.randn(1, 3, 1, 6).expand(size, 3, 6, 6),
    "offset": lambda size: torch.randn(size + 1, 3, 6, 6)[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_example(layout: str) -> None:
    make = LAYOUTS[layout]
    model = Mixed().eval()
    gm = trace(model, make(2))
    for size in (1, 2, 5):
        assert_agrees(model, gm, make(size))
        assert_agrees(model, gm, torch.randn(size, 3, 6, 6))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_call(layout: str) -> None:
    model = Mixed().eval()
    gm = trace(model, torch.randn(2, 3, 6, 6))
    for size in (1, 2, 5):
        assert_agrees(model, gm, LAYOUTS[layout](size))


def test_a_channels_last_model() -> None:
    model = Mixed().eval().to(memory_format=torch.channels_last)
    gm = trace(model, LAYOUTS["channels_last"](2))
    assert_agrees(model, gm, LAYOUTS["channels_last"](5))


def test_a_forward_that_needs_the_layout_of_the_example() -> None:
    model = Forward(lambda m, x: x.permute(0, 2, 3, 1).view(x.shape[0], -1) * 2).eval()
    gm = trace(model, LAYOUTS["channels_last"](2))
    assert_agrees(model, gm, LAYOUTS["channels_last"](5))


def test_strides_read_in_the_forward() -> None:
    def windows(m, x):
        rows, columns = x.stride()
        return x.as_strided((x.shape[0], 4, 3), (rows, columns, columns)) * 2

    model = Forward(windows).eval()
    gm = trace(model, torch.randn(2, 6))
    given = torch.randn(6, 2).t()
    try:
        result = gm(given)
    except UserError:
        return
    assert torch.equal(result, model(given))


def test_a_branch_on_the_layout() -> None:
    model = Forward(lambda m, x: x * 2 if x.is_contiguous() else x * 3).eval()
    gm = trace(model, torch.randn(2, 6))
    given = torch.randn(6, 2).t()
    try:
        result = gm(given)
    except UserError:
        return
    assert torch.equal(result, model(given))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_write_to_what_may_be_a_copy_of_the_input(transposed: bool) -> None:
    def forward(m, x):
        z = x.contiguous()
        z.add_(1)
        return x + z

    def make(flag: bool) -> torch.Tensor:
        return torch.randn(6, 2).t() if flag else torch.randn(2, 6)

    model = Forward(forward).eval()
    gm = trace(model, make(transposed))
    given = make(transposed)
    assert torch.equal(gm(given.clone()), model(given.clone()))
    with pytest.raises(UserError, match="strides"):
        gm(make(not transposed))


def test_a_write_to_a_copy_that_is_the_only_one_used_does_not_tie_the_layout() -> None:
    def forward(m, x):
        z = (x * 2).transpose(0, 1).contiguous()
        z.add_(1)
        return z.flatten()

    model = Forward(forward).eval()
    gm = trace(model, torch.randn(2, 6))
    given = torch.randn(6, 2).t()
    assert torch.equal(gm(given), model(given))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_keep_the_layout(layout: str) -> None:
    tensor = LAYOUTS[layout](3)
    copied = copy_tensor(tensor)
    assert copied.stride() == tensor.stride()
    assert torch.equal(copied, tensor)
    assert copied.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
@pytest.mark.parametrize("size", [2, 3, 6])
def test_a_larger_batch_lies_in_memory_as_the_example_does(layout: str, size: int) -> None:
    example = LAYOUTS[layout](2)
    sized = LAYOUTS[layout](size)
    assert strides_like(example, sized.shape) == sized.stride()
    assert TensorLayout(example).fits(sized)
    assert torch.equal(laid_out_as(sized.contiguous(), example), sized)


def test_layouts_are_told_apart() -> None:
    contiguous, transposed = torch.randn(2, 6), torch.randn(6, 2).t()
    assert not TensorLayout(contiguous).fits(transposed)
    assert not TensorLayout(transposed).fits(contiguous)
    assert not TensorLayout(transposed).fits(torch.randn(6, 1).t()), "which counts as contiguous"
    assert TensorLayout(contiguous).fits(torch.randn(1, 6))
    assert not TensorLayout(torch.randn(2, 12)[:, ::2]).fits(contiguous)


def test_the_layout_is_guarded_only_where_it_matters() -> None:
    reads = trace(Forward(lambda m, x: x * x.stride()[0]).eval(), torch.randn(2, 6))
    with pytest.raises(UserError) as raised:
        reads(torch.randn(6, 2).t())
    assert "inputs_0 has strides [1, 2], expected the layout of the example, whose strides are [6, 1]" in str(
        raised.value
    )
    trace(Forward(lambda m, x: x * 2).eval(), torch.randn(2, 6))(torch.randn(6, 2).t())
