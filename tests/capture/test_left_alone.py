"""What a capture must leave as it was: the model, the inputs, the process, the random states."""

from __future__ import annotations

import gc
import io
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qgraph.capture import trace
from qgraph.errors import CaptureError, QGraphError
from tests.capture.checks import network, process_state, snapshot, x
from tests.support.models import Forward

# --- what stays as it was --------------------------------------------------------------------------------------


def raises_in_forward(m, x):
    m.linear(x)
    raise ValueError("in the forward")


def raises_at_other_batches(m, x):
    if x.shape[0] > 2:
        raise ValueError("too many")
    return m.linear(x)


def writes_buffer(m, x):
    m.count += 1
    return x * m.count


def writes_parameter(m, x):
    m.linear.weight.data.mul_(2)
    return m.linear(x)


def rebinds_buffer(m, x):
    m.count = m.count + 1
    return x * m.count


def rebinds_parameter(m, x):
    m.linear.weight = nn.Parameter(m.linear.weight * 2)
    return m.linear(x)


def fills_a_cache(m, x):
    if m.cached is None:
        m.cached = x.mean()
    return x - m.cached


def fills_a_dict(m, x):
    key = x.shape[0]
    if key not in m.table:
        m.table[key] = x.mean(0)
    return x - m.table[key]


def keeps_a_history(m, x):
    m.history.append(x)
    return m.history[0][:1] + x


def counts_calls(m, x):
    m.calls += 1
    return x * m.calls


def counts_calls_with_a_fixed_batch(m, x):
    m.calls += 1
    return x.reshape(2, 24) * m.calls


def caches_with_a_fixed_batch(m, x):
    if m.cached is None:
        m.cached = x.mean()
    return x.reshape(2, 24) - m.cached


def remembers_the_last_input(m, x):
    last, m.cached = m.cached, x
    return x.reshape(2, 24) if last is None else x.reshape(2, 24) + last.reshape(2, 24)


def registers_a_buffer(m, x):
    if not hasattr(m, "position"):
        m.register_buffer("position", torch.arange(x.shape[1]).float())
    return x + m.position[:, None]


def makes_an_attribute(m, x):
    m.intermediate = x * 2
    return m.intermediate + 1


def makes_a_module(m, x):
    if not hasattr(m, "late"):
        m.late = nn.Softmax(-1)
    return m.late(x)


def reads_a_value(m, x):
    return x * float(x.max())


def draws(m, x):
    return x + torch.rand(6)


def casts_its_parameters(m, x):
    return F.linear(x.contiguous(), m.linear.weight.to(x.dtype), m.linear.bias.contiguous()) + m.count.type_as(x)


def writes_only_at_other_batches(m, x):
    if x.shape[0] > 2:
        m.count.add_(1)
    return m.linear(x)


FORWARDS = [
    raises_in_forward,
    raises_at_other_batches,
    writes_buffer,
    writes_parameter,
    rebinds_buffer,
    rebinds_parameter,
    fills_a_cache,
    fills_a_dict,
    keeps_a_history,
    counts_calls,
    counts_calls_with_a_fixed_batch,
    caches_with_a_fixed_batch,
    remembers_the_last_input,
    registers_a_buffer,
    makes_an_attribute,
    makes_a_module,
    reads_a_value,
    draws,
    casts_its_parameters,
    writes_only_at_other_batches,
]


def stateful(function: Callable[..., Any]) -> nn.Module:
    model = Forward(function, linear=nn.Linear(6, 6), count=torch.ones(1))
    model.cached, model.calls, model.table, model.history = None, 0, {}, []
    return model.eval()


@pytest.mark.parametrize("method", ["jit", "symbolic"])
@pytest.mark.parametrize("function", FORWARDS)
def test_model_and_process_are_not_changed(function: Callable[..., Any], method: str) -> None:
    model = stateful(function)
    held, around = snapshot(model), process_state()
    with suppress(QGraphError):
        trace(model, x(), method)
    assert snapshot(model) == held
    assert process_state() == around


@pytest.mark.parametrize("function", [raises_in_forward, rebinds_buffer, draws, casts_its_parameters])
def test_unverified_captures_leave_no_more(function: Callable[..., Any]) -> None:
    model = stateful(function)
    held, around = snapshot(model), process_state()
    with suppress(QGraphError):
        trace(model, x(), verify=False)
    assert snapshot(model) == held
    assert process_state() == around


STATEFUL = [
    writes_buffer,
    writes_parameter,
    rebinds_buffer,
    rebinds_parameter,
    fills_a_cache,
    counts_calls,
    counts_calls_with_a_fixed_batch,
    caches_with_a_fixed_batch,
    remembers_the_last_input,
    keeps_a_history,
]


@pytest.mark.parametrize("function", STATEFUL)
def test_a_forward_whose_second_call_differs_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(CaptureError):
        trace(stateful(function), x())


def test_a_counter_outside_the_model_is_refused_and_not_advanced() -> None:
    calls = torch.zeros(1)

    def forward(m, x):
        calls.add_(1)
        return x * calls

    with pytest.raises(CaptureError, match="state"):
        trace(Forward(forward).eval(), x())
    assert calls.item() == 0


def test_a_global_scratch_tensor_is_not_shared_with_the_graph() -> None:
    scratch = torch.zeros(2, 4, 6)

    def forward(m, x):
        scratch.copy_(x)
        return scratch * 2

    example = x()
    with suppress(CaptureError):
        gm = trace(Forward(forward).eval(), example)
        scratch.zero_()
        assert torch.equal(gm(example), example * 2)


def test_tensors_of_the_model_carry_nothing_of_the_capture() -> None:
    model = stateful(casts_its_parameters)
    trace(model, x())
    for tensor in (*model.parameters(), *model.buffers()):
        assert not tensor.__dict__


def test_a_traced_model_can_still_be_saved() -> None:
    model = network()
    model[0] = Casting()
    model.eval()
    trace(model, x())
    torch.save(model.state_dict(keep_vars=True), io.BytesIO())
    torch.save(model, io.BytesIO())


class Casting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("position", torch.randn(4, 6))

    def forward(self, x):
        return x + self.position.to(x.dtype)


def test_a_traced_model_can_still_be_copied() -> None:
    program = """
import copy, gc, torch, qgraph
class Casting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("position", torch.randn(4, 6))
    def forward(self, x):
        return x + self.position.to(x.dtype)
model = Casting().eval()
for _ in range(20):
    qgraph.trace(model, torch.randn(2, 4, 6))
    other = copy.deepcopy(model)
    del other
    gc.collect()
    junk = [torch.randn(size) for size in range(100)]
    model.position.__dict__.clear()
    gc.collect()
    junk = [torch.randn(size) for size in range(100)]
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}"
    assert "alive" in done.stdout


def test_a_capture_leaves_nothing_alive() -> None:
    from qgraph.capture.recording.recorder import Recorder

    model = Casting().eval()
    trace(model, x())
    gc.collect()
    assert not [entry for entry in gc.get_objects() if type(entry) is Recorder]


def test_the_graph_owns_its_tensors() -> None:
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.register_buffer("shift", torch.randn(6))
            self.table = torch.randn(6)
            self.rows = [torch.randn(6)]
            self.rnn = nn.GRU(6, 6, batch_first=True)

        def forward(self, x):
            return self.rnn(self.linear(x) + self.shift + self.table * self.rows[0])[0]

    model = Plain().eval()
    gm = trace(model, x())
    example = x()
    before = gm(example)
    with torch.no_grad():
        for tensor in (*model.parameters(), model.shift, model.table, model.rows[0]):
            tensor.zero_()
    assert torch.equal(gm(example), before)


def test_the_graph_owns_its_constants() -> None:
    table = torch.randn(6)
    gm = trace(Forward(lambda m, x: x + table).eval(), x())
    example = x()
    before = gm(example)
    table.zero_()
    assert torch.equal(gm(example), before)


def test_the_graph_owns_its_leaf_modules() -> None:
    class Leaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.randn(6)

        def forward(self, x):
            return x + self.table

    model = nn.Sequential(Leaf()).eval()
    gm = trace(model, x(), leaf_modules=[Leaf])
    example = x()
    before = gm(example)
    model[0].table.zero_()
    assert torch.equal(gm(example), before)


def test_example_inputs_are_not_changed_or_kept() -> None:
    model = Forward(lambda m, x: x.add_(1)).eval()
    example = x()
    before = example.clone()
    gm = trace(model, example)
    assert torch.equal(example, before)
    assert not example.__dict__
    gm(example)


# --- randomness ------------------------------------------------------------------------------------------------


def random_states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


@pytest.mark.parametrize("method", ["jit", "symbolic"])
def test_capture_of_a_deterministic_model_draws_nothing(method: str) -> None:
    model = network()
    before = random_states()
    trace(model, x_without_drawing(), method)
    assert random_states() == before


def x_without_drawing() -> torch.Tensor:
    return torch.arange(48.0).reshape(2, 4, 6) / 7


@pytest.mark.parametrize("source", ["torch", "python", "numpy"])
def test_capture_of_a_random_model_puts_the_states_back(source: str) -> None:
    draws_from = {
        "torch": lambda m, x: x + torch.rand(6),
        "python": lambda m, x: x * random.random(),
        "numpy": lambda m, x: x * float(np.random.rand()),
    }
    before = random_states()
    with pytest.raises(CaptureError, match="random"):
        trace(Forward(draws_from[source]).eval(), x_without_drawing())
    assert random_states() == before


def test_a_waived_random_model_is_compared_with_the_same_draws() -> None:
    torch.manual_seed(3)
    gm = trace(Forward(lambda m, x: x + torch.rand_like(x)).eval(), x(), waive=["random"])
    example = x()
    torch.manual_seed(5)
    expected = example + torch.rand_like(example)
    torch.manual_seed(5)
    assert torch.equal(gm(example), expected)


def test_dropout_that_is_always_on() -> None:
    with pytest.raises(CaptureError, match="random"):
        trace(Forward(lambda m, x: F.dropout(x, 0.5)).eval(), x())
