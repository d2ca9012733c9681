"""The batch size of a captured graph: free and right at every size, or fixed with a true reason and guarded."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import qgraph
from qgraph.capture import trace
from qgraph.errors import UserError
from tests.capture.checks import assert_agrees, run
from tests.support.models import Forward

EXAMPLES = (1, 2, 3)
SIZES = (1, 2, 5, 7)


def batch(size: int, *shape: int) -> torch.Tensor:
    return torch.randn(size, *(shape or (4, 6)))


# --- sizes that depend on the batch ----------------------------------------------------------------------------


def learned_tokens(m, x):
    return torch.cat([m.token.expand(x.shape[0], -1, -1), x], dim=1) + m.position


def repeated_queries(m, x):
    return m.token.repeat(x.shape[0], 1, 1) @ x.transpose(1, 2)


def zeros_and_writes(m, x):
    out = torch.zeros(x.shape[0], 5, 6)
    out[:, 1:] = x
    out[: x.shape[0], 0] = x[:, -1]
    return out


def write_then_view(m, x):
    out = torch.zeros(x.shape[0], 5, 6)
    out[:, 1:] = x
    return out.view(x.shape[0], -1)


def gathered_by_arange(m, x):
    return x[torch.arange(x.shape[0]), x.mean(-1).argmax(-1)]


def temporal(m, x):
    frames = x.view(x.shape[0], 2, 2, 6)
    merged = frames.flatten(0, 1)
    return (merged * 2).view(-1, 2, 2, 6).mean(1), merged.reshape(x.size(0) * 2, 12)


def in_place_position(m, x):
    residual = x
    x += m.position
    x = F.relu(x, inplace=True)
    return x.flatten(1) + residual.view(x.shape[0], -1)


def windows(m, x):
    """Swin's partition and its reverse, which finds the batch by a division of floats."""
    size, height, width = 2, 4, 6
    b = x.shape[0]
    cut = x.view(b, height // size, size, width // size, size, 1)
    cut = cut.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size * size, 1)
    mask = torch.zeros(6, 1, 1).fill_(0.5)
    cut = (cut.view(cut.shape[0] // 6, 6, size * size, 1) + mask).view(-1, size * size, 1)
    again = int(cut.shape[0] / (height * width / size / size))
    cut = cut.view(again, height // size, width // size, size, size, -1)
    return cut.permute(0, 1, 3, 2, 4, 5).contiguous().view(again, height, width)


def states_of_zeros(m, x):
    h = x.new_zeros(1, x.shape[0], 5)
    return m.rnn(x, (h, h))[0]


def attention(m, x):
    b, n, c = x.shape
    q, k, v = m.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(c // 2)
    scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)


def one_less(m, x):
    return torch.cat([torch.zeros(x.shape[0] - 1, 6), x[-1:, 0]]).sum(0)


FREE: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
    ("view", lambda m, x: x.view(x.shape[0], -1), {}),
    ("reshape_joins", lambda m, x: x.reshape(x.shape[0] * 4, 6), {}),
    ("reshape_splits", lambda m, x: x.flatten(0, 1).reshape(len(x), 4, 2, 3), {}),
    ("unflatten", lambda m, x: x.flatten(0, 1).unflatten(0, (x.shape[0], 4)), {}),
    ("learned_tokens", learned_tokens, {"token": torch.randn(1, 1, 6), "position": torch.randn(5, 6)}),
    ("repeated_queries", repeated_queries, {"token": torch.randn(1, 3, 6)}),
    ("repeat_interleave", lambda m, x: x.repeat_interleave(2, 0).view(x.shape[0], 2, 24), {}),
    ("arange", lambda m, x: x + torch.arange(x.shape[0]).view(-1, 1, 1), {}),
    ("arange_of_twice", lambda m, x: torch.arange(2 * x.shape[0]).view(2, x.size(0)).sum(0) + x[:, 0, 0], {}),
    ("linspace", lambda m, x: torch.linspace(0, 1, x.shape[0])[:, None, None] * x, {}),
    ("eye", lambda m, x: torch.eye(x.shape[0]) @ x.flatten(1), {}),
    ("full", lambda m, x: torch.full((x.shape[0], 1, 1), 2.0) * x, {}),
    ("new_tensor", lambda m, x: x.sum() / torch.tensor([x.shape[0]]), {}),
    ("mean_by_hand", lambda m, x: x.sum(0) / x.shape[0], {}),
    ("sizes_returned", lambda m, x: (x, x.shape[0], [x.numel(), x.shape[1]]), {}),
    ("zeros_and_writes", zeros_and_writes, {}),
    ("write_then_view", write_then_view, {}),
    ("in_place_methods", lambda m, x: (lambda y: (y.relu_(), y.add_(1), y.view(len(x), -1))[2])(x * 2), {}),
    ("gathered_by_arange", gathered_by_arange, {}),
    ("temporal", temporal, {}),
    ("windows", windows, {}),
    ("in_place_position", in_place_position, {"position": torch.randn(4, 6)}),
    ("states_of_zeros", states_of_zeros, {"rnn": nn.LSTM(6, 5, batch_first=True)}),
    ("attention", attention, {"qkv": nn.Linear(6, 18)}),
    ("chunks_of_channels", lambda m, x: torch.cat(x.chunk(3, -1)[::-1], -1), {}),
    ("pad_the_batch", lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 1)).view(x.shape[0] + 2, 24), {}),
    ("one_less", one_less, {}),
    ("slice_by_size", lambda m, x: x[: x.shape[0]] + x[-x.shape[0] :], {}),
    ("pairs", lambda m, x: (x[:, None] - x[None]).reshape(x.shape[0] ** 2, 24), {}),
    ("similarity", lambda m, x: F.normalize(x.flatten(1)) @ F.normalize(x.flatten(1)).T, {}),
    ("flip_and_roll", lambda m, x: x.flip(0).roll(1, 0), {}),
    ("interpolated", lambda m, x: F.interpolate(x, size=x.shape[-1] * 2), {}),
    ("split_by_size", lambda m, x: x.split(x.shape[0])[0] * 2, {}),
    ("broadcast_to", lambda m, x: torch.ones(4, 6).broadcast_to(x.shape) * x, {}),
    ("shape_tuple", lambda m, x: torch.zeros(x.shape).add(x), {}),
    ("as_strided_batch", lambda m, x: x.contiguous().as_strided((x.shape[0], 3, 6), (24, 6, 1)), {}),
]


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize(("function", "parts"), [case[1:] for case in FREE], ids=[case[0] for case in FREE])
def test_free(function: Callable[..., Any], parts: dict[str, Any], example: int) -> None:
    model = Forward(function, **parts).eval()
    gm = trace(model, batch(example))
    assert qgraph.graph_info(gm).batch_fixed is None
    for size in SIZES:
        assert_agrees(model, gm, batch(size))


# --- sizes that depend on the batch in another way than linearly ---------------------------------------------------


def group_statistics(m, x):
    """The minibatch-deviation layer of GANs: groups of at most four samples."""
    groups = min(4, x.shape[0])
    usable = x[: x.shape[0] // groups * groups]
    return usable.reshape(groups, -1, 4, 6).square().mean(0)


def in_pieces(m, x):
    """Samples are worked on four at a time, as memory-saving code does."""
    count = math.ceil(x.shape[0] / 4)
    return torch.cat([piece * (index + 1) for index, piece in enumerate(x.tensor_split(count))])


def halves(m, x):
    first = x.shape[0] // 2
    rest = x.shape[0] - first
    return torch.ones(rest, 3).sum() * x


NONLINEAR: list[tuple[str, Callable[..., Any]]] = [
    ("half_rounded_up", lambda m, x: torch.ones((x.shape[0] + 1) // 2).sum() * x),
    ("half_rounded_down", lambda m, x: x[: x.shape[0] // 2].sum() + x.sum()),
    ("second_half", lambda m, x: torch.stack([x[-(x.shape[0] // 2) :].sum(), x.sum()])),
    ("halves", halves),
    ("rounded", lambda m, x: x * round(x.shape[0] / 2)),
    ("three_quarters", lambda m, x: x * int(x.shape[0] * 0.75)),
    ("at_most_four", lambda m, x: torch.arange(min(x.shape[0], 4)).sum() * x),
    ("at_least_four", lambda m, x: torch.arange(max(x.shape[0], 4)).sum() * x),
    ("group_statistics", group_statistics),
    ("in_pieces", in_pieces),
    ("square", lambda m, x: x.new_ones(x.shape[0] * x.shape[0]).view(x.shape[0], -1) @ x.flatten(1)),
    ("square_root", lambda m, x: x * int(math.sqrt(x.shape[0]))),
    ("triangle", lambda m, x: torch.ones(x.shape[0] * (x.shape[0] + 1) // 2).sum() * x),
    ("bit_length", lambda m, x: x * x.shape[0].bit_length()),
    ("remainder", lambda m, x: x + x.shape[0] % 4),
    ("float_of_size", lambda m, x: x.sum(0) * (1 / x.shape[0])),
    ("odd_or_even", lambda m, x: x * 2 if x.shape[0] % 2 else x),
    ("more_than_four", lambda m, x: x * 2 if x.shape[0] > 4 else x),
    ("more_than_ten", lambda m, x: x * 2 if x.shape[0] > 10 else x),
    ("a_single_sample", lambda m, x: x.squeeze(0) * 2 if x.shape[0] == 1 else x),
    ("loop_over_samples", lambda m, x: torch.stack([sample * 2 for sample in x])),
    ("unpacked_splits", lambda m, x: torch.cat([part + 1 for part in x.split(1)])),
    ("enumerated_chunks", lambda m, x: torch.cat([part + i for i, part in enumerate(x.chunk(2))])),
    ("len_at_most", lambda m, x: x * min(len(x), 4)),
    ("len_odd_or_even", lambda m, x: x * 2 if len(x) % 2 else x),
    ("int_at_most", lambda m, x: x * min(int(x.shape[0]), 4)),
    ("int_more_than", lambda m, x: x * 2 if int(x.shape[0]) > 6 else x),
    ("clipped_by_numpy", lambda m, x: x * float(np.clip(x.shape[0], 0, 4))),
    ("root_by_numpy", lambda m, x: x * int(np.sqrt(x.shape[0]))),
    ("product_by_numpy", lambda m, x: x.reshape(int(np.prod(x.shape)) // 6, 6)),
    ("size_of_a_slice", lambda m, x: x[:4].sum() / x[:4].shape[0]),
    ("size_of_every_second", lambda m, x: x[::2].reshape(x[::2].shape[0], -1)),
    ("squeezed", lambda m, x: x.mean((1, 2)).squeeze() * 2),
    ("dimensions_when_squeezed", lambda m, x: x.mean((1, 2)).squeeze().dim() * x),
    ("one_of", lambda m, x: x * 2 if x.shape[0] in (2, 3) else x),
    ("key_of_a_dict", lambda m, x: x * {1: 1.0, 2: 2.0, 3: 3.0}.get(x.shape[0], 9.0)),
    ("whole_shape", lambda m, x: x * 2 if x.shape == torch.Size((2, 4, 6)) else x),
    ("sum_of_a_range", lambda m, x: x * sum(range(x.shape[0]))),
    ("length_of_a_range", lambda m, x: torch.stack([x.sum() * i for i in range(x.shape[0] % 3)] + [x.sum()])),
    ("digits", lambda m, x: x * len(str(x.shape[0]))),
    ("hash", lambda m, x: x * (hash(x.shape[0]) % 3)),
    ("exact_type", lambda m, x: x * 2 if type(x.shape[0]) is int else x * 3),
    ("pooled", lambda m, x: F.max_pool1d(F.pad(x[:, :, 0].T[None], (1, 1)), 2).shape[-1] * x),
    ("stride", lambda m, x: x.transpose(0, 1).contiguous().stride(0) * x),
    ("numel_of_the_shape", lambda m, x: x * x.shape.numel()),
    ("best_half", lambda m, x: x.sum((1, 2)).topk(max(1, x.shape[0] // 2)).values),
    ("power", lambda m, x: x * 2 ** x.shape[0]),
    ("rounded_digits", lambda m, x: x * round(x.shape[0] * 0.3, 1)),
    ("fixed_reshape", lambda m, x: x.reshape(-1, 6)[:4].reshape(1, 4, 6) + x[:1]),
]


@pytest.mark.parametrize("example", [*EXAMPLES, 8])
@pytest.mark.parametrize("function", [case[1] for case in NONLINEAR], ids=[case[0] for case in NONLINEAR])
def test_free_or_fixed_but_never_wrong(function: Callable[..., Any], example: int) -> None:
    model = Forward(function).eval()
    gm = trace(model, batch(example))
    fixed = qgraph.graph_info(gm).batch_fixed
    assert_agrees(model, gm, batch(example))
    for size in (1, 2, 4, 5, 7, 8, 11, 12):
        if fixed is None:
            assert_agrees_or_refuses(model, gm, size)
        elif size != example:
            with pytest.raises(UserError, match="batch size is fixed"):
                gm(batch(size))


def assert_agrees_or_refuses(model: nn.Module, gm: fx.GraphModule, size: int) -> None:
    """A batch size at which the forward takes another path is refused with the line that decides."""
    try:
        gm(batch(size))
    except UserError as error:
        assert f"does not serve a batch size of {size}" in str(error)  # noqa: PT017
        assert "test_batch.py" in str(error)  # noqa: PT017
    else:
        assert_agrees(model, gm, batch(size))


@pytest.mark.parametrize(
    ("function", "example", "served", "refused"),
    [
        (lambda m, x: x * round(x.shape[0] / 2), 2, (1, 2, 3, 5, 12), ()),
        (lambda m, x: x.sum(0) * (1 / x.shape[0]), 2, (1, 2, 3, 5, 12), ()),
        (lambda m, x: torch.ones((x.shape[0] + 1) // 2).sum() * x, 2, (1, 2, 3, 5, 12), ()),
        (lambda m, x: x.new_ones(x.shape[0] ** 2).sum() * x, 3, (1, 2, 3, 5, 12), ()),
        (lambda m, x: torch.arange(min(x.shape[0], 4)).sum() * x, 1, (1, 2, 3, 4), (5, 12)),
        (lambda m, x: x * 2 if x.shape[0] % 2 else x, 3, (1, 3, 5), (2, 4)),
        (lambda m, x: x * 2 if x.shape[0] > 4 else x, 5, (5, 6, 12), (1, 4)),
        (lambda m, x: x * 2 if x.shape[0] == 1 else x, 2, (2, 3, 12), (1,)),
        (lambda m, x: x.expand(x.shape[0], 4, 6) * 2 if x.shape[0] > 1 else x * 2, 2, (1, 2, 3, 12), ()),
        (lambda m, x: torch.cat([part * i for i, part in enumerate(x.chunk(2))]), 2, (2, 3, 12), (1,)),
    ],
    ids=["round", "float", "half", "square", "min", "parity", "threshold", "single", "single all the same", "chunks"],
)
def test_which_sizes_are_served(
    function: Callable[..., Any], example: int, served: tuple[int, ...], refused: tuple[int, ...]
) -> None:
    model = Forward(function).eval()
    gm = trace(model, batch(example))
    assert qgraph.graph_info(gm).batch_fixed is None
    for size in served:
        assert_agrees(model, gm, batch(size))
    for size in refused:
        with pytest.raises(UserError, match=f"does not serve a batch size of {size}"):
            gm(batch(size))


def test_conditions_of_a_graph_inside_a_model_still_hold() -> None:
    inner = trace(Forward(lambda m, x: x * 2 if x.shape[0] > 1 else x).eval(), batch(2))
    model = Forward(lambda m, x: m.inner(x) + 1, inner=inner).eval()
    gm = trace(model, batch(2))
    assert_agrees(model, gm, batch(5))
    with pytest.raises(UserError, match="does not serve a batch size of 1"):
        gm(batch(1))


# --- the reason for a fixed batch ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda m, x: x.reshape(2, 24), "fails at batch"),
        (lambda m, x: x * math.sqrt(x.shape[0]), "1.4142135623730951 becomes"),
        (lambda m, x: x * 2 if x.shape[0] > 2 else x + 1, "control flow depends on it"),
        (lambda m, x: torch.stack([sample * 2 for sample in x]), "depends on it"),
        (lambda m, x: x + torch.from_numpy(__import__("numpy").full(6, len(x), "float32")), "other values"),
        (lambda m, x: x.sum(), None),
    ],
    ids=["fails", "float", "branch", "loop", "numpy constant", "no batch in the output"],
)
def test_reason(function: Callable[..., Any], reason: str | None) -> None:
    gm = trace(Forward(function).eval(), batch(2))
    fixed = qgraph.graph_info(gm).batch_fixed
    if reason is None:
        assert fixed is None
        return
    assert fixed is not None
    assert reason in fixed
    with pytest.raises(UserError) as raised:
        gm(batch(5))
    assert "inputs_0" in str(raised.value)
    assert fixed in str(raised.value)


def test_reason_names_the_users_line() -> None:
    gm = trace(Forward(lambda m, x: x * math.sqrt(x.shape[0])).eval(), batch(2))
    assert "test_batch.py" in str(qgraph.graph_info(gm).batch_fixed)


def test_reason_when_inputs_have_no_dimension() -> None:
    gm = trace(Forward(lambda m, x: x * 2).eval(), torch.tensor(1.5))
    assert "no input has a first dimension" in str(qgraph.graph_info(gm).batch_fixed)
    assert_agrees(Forward(lambda m, x: x * 2).eval(), gm, torch.tensor(-3.0))


# Nothing in these depends on the batch: what depends is how the recorder runs the model the second time.


def on_the_cpu(m, x):
    return m.linear(x) if x.device.type == "cpu" else m.linear(x) + 0


@functools.cache
def positions(length: int) -> torch.Tensor:
    return torch.arange(length).float()


@functools.cache
def batch_positions(size: int) -> torch.Tensor:
    return torch.arange(size).float()


def test_a_branch_on_the_device_leaves_the_batch_free() -> None:
    model = Forward(on_the_cpu, linear=nn.Linear(6, 6)).eval()
    assert qgraph.graph_info(trace(model, batch(2))).batch_fixed is None


def test_a_cached_constant_leaves_the_batch_free() -> None:
    model = Forward(lambda m, x: x + positions(x.shape[1])[:, None]).eval()
    for _ in range(2):
        positions.cache_clear()
        gm = trace(model, batch(2))
        assert qgraph.graph_info(gm).batch_fixed is None
        assert_agrees(model, gm, batch(5))


def test_the_shape_run_leaves_nothing_in_the_users_caches() -> None:
    batch_positions.cache_clear()
    model = Forward(lambda m, x: x + batch_positions(x.shape[0])[:, None, None]).eval()
    trace(model, batch(2))
    for size in (1, 2, 4, 6, 8):
        assert run(model, (batch(size),)).device.type == "cpu"
        assert batch_positions(size).device.type == "cpu"
        assert not batch_positions(size).__dict__, "and no attributes on the user's tensors"


def test_one_tensor_given_twice_leaves_the_batch_free() -> None:
    model = Forward(lambda m, a, b: a * b).eval()
    same = batch(2)
    gm = trace(model, (same, same))
    assert qgraph.graph_info(gm).batch_fixed is None
    assert_agrees(model, gm, batch(5), batch(5))


# --- which inputs carry the batch ------------------------------------------------------------------------------


def test_two_inputs_with_the_same_batch() -> None:
    model = Forward(lambda m, a, b: a * b.view(b.shape[0], 1, 6)).eval()
    gm = trace(model, (batch(2), batch(2, 6)))
    for size in SIZES:
        assert_agrees(model, gm, batch(size), batch(size, 6))


def test_different_batches_are_refused_by_name() -> None:
    gm = trace(Forward(lambda m, a, b: a + b.mean()).eval(), (batch(2), batch(2)))
    with pytest.raises(UserError, match="different batch sizes"):
        gm(batch(5), batch(7))


def test_second_input_has_twice_the_batch() -> None:
    model = Forward(lambda m, a, b: a + b.view(a.shape[0], 2, 4, 6).mean(1)).eval()
    gm = trace(model, (batch(2), batch(4)))
    assert qgraph.graph_info(gm).batch_fixed is None
    for size in SIZES:
        assert_agrees(model, gm, batch(size), batch(2 * size))
    with pytest.raises(UserError, match="different batch sizes"):
        gm(batch(3), batch(4))


@pytest.mark.parametrize("order", ["batched first", "batched last"])
def test_only_one_input_is_batched(order: str) -> None:
    def forward(m, a, b):
        x, table = (a, b) if order == "batched first" else (b, a)
        return x @ table.view(5, 6).T

    model = Forward(forward).eval()
    table = batch(5, 6)
    arrange = (lambda x: (x, table)) if order == "batched first" else (lambda x: (table, x))
    gm = trace(model, arrange(batch(2)))
    assert qgraph.graph_info(gm).batch_fixed is None
    for size in SIZES:
        assert_agrees(model, gm, *arrange(batch(size)))


def test_a_table_of_the_same_size_by_accident() -> None:
    """Dimension 0 of a table equals the batch of the example: right or refused, never wrong."""
    model = Forward(lambda m, x, table: x * table.view(2, 6).sum(0)).eval()
    gm = trace(model, (batch(2), batch(2, 6)))
    for size in SIZES:
        try:
            gm(batch(size), batch(2, 6))
        except UserError:
            continue
        assert_agrees(model, gm, batch(size), batch(2, 6))


def test_sequence_first_models() -> None:
    """Dimension 0 is the length there; another batch (dimension 1) is refused, not computed wrongly."""
    model = Forward(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(6, 5)).eval()
    gm = trace(model, torch.randn(4, 2, 6))
    assert_agrees(model, gm, torch.randn(7, 2, 6))
    with pytest.raises(UserError, match=r"expected \[any, 2, 6\]"):
        gm(torch.randn(4, 3, 6))


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(6, 5, 2, proj_size=3, bidirectional=True),
        nn.LSTM(6, 5, batch_first=True),
        nn.GRU(6, 5, 2, batch_first=True, bidirectional=True),
        nn.RNN(6, 5),
    ],
    ids=["lstm", "lstm batch first", "gru", "rnn"],
)
@pytest.mark.parametrize("samples", ["many", "one"])
@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_shapes_of_recurrent_layers(layer: nn.RNNBase, samples: str) -> None:
    def forward(m, x):
        output, state = m.layer(x if samples == "many" else x[:, 0])
        parts = [output, *(state if isinstance(state, tuple) else (state,))]
        return [part.reshape(part.shape[0], part.shape[1], -1) * part.shape[0] for part in parts]

    model = Forward(forward, layer=layer).eval()
    gm = trace(model, batch(2))
    assert qgraph.graph_info(gm).batch_fixed is None
    for size in SIZES:
        assert_agrees(model, gm, batch(size))


def test_nested_inputs_carry_the_batch() -> None:
    model = Forward(lambda m, d: d["a"][0] * d["b"] + torch.arange(d["b"].shape[0])[:, None]).eval()
    gm = trace(model, ({"a": [batch(2, 3), 1.0], "b": batch(2, 3)},))
    assert qgraph.graph_info(gm).batch_fixed is None
    for size in SIZES:
        assert_agrees(model, gm, {"a": [batch(size, 3), 1.0], "b": batch(size, 3)})


def test_an_empty_batch_is_served_or_refused_clearly() -> None:
    model = Forward(lambda m, x: x * 2).eval()
    gm = trace(model, batch(2))
    try:
        result = gm(batch(0))
    except UserError as error:
        assert "any" not in str(error), str(error)  # noqa: PT017
    else:
        assert result.shape == (0, 4, 6)


def test_an_empty_example_batch() -> None:
    model = Forward(lambda m, x: x * 2).eval()
    try:
        gm = trace(model, batch(0))
    except UserError as error:
        assert "empty" in str(error) or "zero" in str(error)  # noqa: PT017
        return
    fixed = qgraph.graph_info(gm).batch_fixed
    assert fixed is None or "no input has a first dimension" not in fixed


def test_without_verification_the_batch_is_free_as_well() -> None:
    model = Forward(learned_tokens, token=torch.randn(1, 1, 6), position=torch.randn(5, 6)).eval()
    gm = trace(model, batch(2), verify=False)
    assert qgraph.graph_info(gm).batch_fixed is None
    for size in SIZES:
        assert_agrees(model, gm, batch(size))


def test_without_verification_a_model_with_a_fixed_batch_says_so() -> None:
    gm = trace(Forward(lambda m, x: x.reshape(2, 24)).eval(), batch(2), verify=False)
    assert "fails at batch" in str(qgraph.graph_info(gm).batch_fixed)


@pytest.mark.parametrize("size", SIZES)
def test_symbolic_capture_keeps_sizes(size: int) -> None:
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 6))

        def forward(self, x):
            tokens = self.token.expand(x.shape[0], -1, -1)
            return torch.cat([tokens, x], 1).reshape(x.size(0), -1)

    model = Tokens().eval()
    gm = trace(model, batch(2), "symbolic")
    assert qgraph.graph_info(gm).batch_fixed is None
    assert_agrees(model, gm, batch(size))
