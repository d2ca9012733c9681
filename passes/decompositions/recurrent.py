"""Recurrent layers, unrolled over the length of the example.

    LSTM    i, f, g, o = x @ Wi^T + h @ Wh^T + b       i, f, o through sigmoid, g through tanh
            c' = f * c + i * g      h' = o * tanh(c')
    GRU     r, z = sigmoid(x @ Wi^T + h @ Wh^T + b)    n = tanh(x @ Win^T + bin + r * (h @ Whn^T + bhn))
            h' = n + z * (h - n)
The input's product is one linear over all steps, the state's one call of a linear per step, all with one weight. What a
zero initial state multiplies is left out. Every step's values are sites of their own (`lstm.l0.t3.cell`), int16 where
nobody says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from passes.decompositions.batch import fixed_axis
from passes.decompositions.steps import Decomposition, Steps, float_input, is_float32, parts_only, shape_of
from qgraph.ir import op_table as ops
from qgraph.ir.arguments import bind
from qgraph.ir.node_info import module_of
from qgraph.rewrite import Verdict, no, yes

_State = tuple[fx.Node | None, ...]


@dataclass(frozen=True)
class _Cell:
    """The weights of one layer in one direction.

    Args:
        steps: where its steps are created.
        name: what they are named after.
        key: what makes its linears the same at every step and call.
        gates: how many gates it has: 4 in an LSTM, 3 in a GRU.
        input_weight, state_weight: `[gates * hidden, *]`.
        input_bias, state_bias: `[gates * hidden]`, or None.
    """

    steps: Steps
    name: str
    key: tuple[Any, ...]
    gates: int
    input_weight: nn.Parameter
    state_weight: nn.Parameter
    input_bias: torch.Tensor | None
    state_bias: torch.Tensor | None

    @property
    def hidden(self) -> int:
        """Size of the state."""
        return self.state_weight.shape[0] // self.gates

    def _parameter(self, tensor: torch.Tensor) -> nn.Parameter:
        return nn.Parameter(tensor, self.input_weight.requires_grad)

    def project_input(self, x: fx.Node) -> fx.Node:
        """The gates' share of the input, and all of the bias that is not inside a gate."""
        bias = None
        if self.input_bias is not None and self.state_bias is not None:
            outside = self.state_bias.detach().clone()
            if self.gates == 3:
                outside[2 * self.hidden :] = 0
            bias = self._parameter(self.input_bias.detach() + outside)
        name = f"{self.name}input"
        return self.steps.linear(name, x, self.input_weight, bias, key=(*self.key, "input"), inner=True)

    def project_state(self, h: fx.Node, name: str) -> fx.Node:
        """The gates' share of the state."""
        bias = None
        if self.gates == 3 and self.state_bias is not None:
            inside = torch.zeros_like(self.state_bias)
            inside[2 * self.hidden :] = self.state_bias.detach()[2 * self.hidden :]
            bias = self._parameter(inside)
        return self.steps.linear(name, h, self.state_weight, bias, key=(*self.key, "state"), inner=True)

    def part(self, x: fx.Node, start: int, count: int, name: str) -> fx.Node:
        """`count` gates from the gate `start` on."""
        return self.steps.step(name, ops.NARROW, x, dim=-1, start=start * self.hidden, length=count * self.hidden)

    def advance(self, x: fx.Node, state: _State, place: str) -> _State:
        """The state after one step; `x` is the step's share of `project_input`."""
        return self._lstm(x, state, place) if self.gates == 4 else self._gru(x, state[0], place)

    def _lstm(self, x: fx.Node, state: _State, place: str) -> _State:
        step = self.steps.step
        h, c = state
        gates = x
        if h is not None:  # the sum is fused into the linear
            gates = step(f"{place}gates.sum", ops.ADD, self.project_state(h, f"{place}gates"), x)
        opened = []
        for position, (name, op) in enumerate(_LSTM_GATES):
            if name == "forget_gate" and c is None:
                continue
            cut = self.part(gates, position, 1, f"{place}{name}.pre")
            opened.append(step(f"{place}{name}", op, cut))
        if c is None:
            cell = step(f"{place}cell", ops.MUL, opened[0], opened[-2])
        else:
            update = step(f"{place}update", ops.MUL, opened[0], opened[-2])
            kept = step(f"{place}kept", ops.MUL, opened[1], c)
            cell = step(f"{place}cell", ops.ADD, kept, update)
        return step(f"{place}hidden", ops.MUL, opened[-1], step(f"{place}cell_tanh", ops.TANH, cell)), cell

    def _gru(self, x: fx.Node, h: fx.Node | None, place: str) -> _State:
        step = self.steps.step
        both = self.part(x, 0, 2, f"{place}gates.input")
        new = self.part(x, 2, 1, f"{place}new.input")
        if h is not None:
            state = self.project_state(h, f"{place}state")
            both = step(f"{place}gates.pre", ops.ADD, both, self.part(state, 0, 2, f"{place}gates.state"))
        gates = step(f"{place}gates", ops.SIGMOID, both)
        update = self.part(gates, 1, 1, f"{place}update_gate")
        reset = self.part(gates, 0, 1, f"{place}reset_gate")
        if h is not None:
            inside = step(f"{place}reset", ops.MUL, reset, self.part(state, 2, 1, f"{place}new.state"))
            new = step(f"{place}new.pre", ops.ADD, new, inside)
        elif self.state_bias is not None:
            bias = self.state_bias.detach()[2 * self.hidden :].clone()
            inside = self.steps.affine(f"{place}reset", reset, bias, torch.zeros_like(bias))
            new = step(f"{place}new.pre", ops.ADD, new, inside)
        new = step(f"{place}new", ops.TANH, new)
        if h is None:
            return (step(f"{place}hidden", ops.SUB, new, step(f"{place}update", ops.MUL, update, new)),)
        change = step(f"{place}change", ops.SUB, h, new)
        return (step(f"{place}hidden", ops.ADD, new, step(f"{place}update", ops.MUL, update, change)),)


_LSTM_GATES = (
    ("input_gate", ops.SIGMOID),
    ("forget_gate", ops.SIGMOID),
    ("cell_gate", ops.TANH),
    ("output_gate", ops.SIGMOID),
)


def _states(hx: Any) -> tuple[Any, ...]:
    """The initial state as a tuple of nodes; empty if it is zero."""
    if hx is None:
        return ()
    return tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)


def _check_state(node: fx.Node, rank: int) -> Verdict:
    bound = bind(node)
    verdict = float_input(node)
    if not verdict:
        return verdict
    if len(shape_of(bound.operand("input"))) != rank:
        return no(f"its input has no batch (it has not {rank} dimensions)", node)
    if not all(is_float32(state) for state in _states(bound.operand("hx"))):
        return no("its initial state is not given as float32 tensors", node)
    return yes()


def _check_layer(node: fx.Node) -> Verdict:
    module: Any = module_of(node)
    verdict = _check_state(node, 3) and parts_only(node)
    if not verdict:
        return verdict
    if module.proj_size:
        return no("it projects its hidden state (proj_size)", node)
    if module.training and module.dropout and module.num_layers > 1:
        return no("its dropout is on", node)
    return fixed_axis(bind(node).operand("input"), 1 if module.batch_first else 0, "time steps")


def _check_cell(node: fx.Node) -> Verdict:
    is_lstm = isinstance(module_of(node), nn.LSTMCell)
    return _check_state(node, 2) and (parts_only(node) if is_lstm else yes())


def _layer(node: fx.Node, steps: Steps) -> None:
    module: Any = module_of(node)
    bound = bind(node)
    x, initial = bound.operand("input"), _states(bound.operand("hx"))
    is_lstm = isinstance(module, nn.LSTM)
    axis = 1 if module.batch_first else 0
    directions = ("", "_reverse") if module.bidirectional else ("",)
    last: list[_State] = []
    for layer in range(module.num_layers):
        outputs = []
        for suffix in directions:
            place = f"l{layer}{suffix}."
            state: _State = tuple(
                steps.step(f"{place}initial{index}", ops.SELECT, given, dim=0, index=len(last))
                for index, given in enumerate(initial)
            ) or ((None, None) if is_lstm else (None,))
            cell = _cell_of(module, steps, place, f"_l{layer}{suffix}", 4 if is_lstm else 3)
            sequence, state = _run(cell, x, state, axis, backwards=bool(suffix))
            outputs.append(sequence)
            last.append(state)
        x = outputs[0] if len(outputs) == 1 else steps.step(f"l{layer}.cat", ops.CAT, outputs, dim=-1)
    _finish_layer(node, steps, x, last)


def _run(cell: _Cell, x: fx.Node, state: _State, axis: int, *, backwards: bool) -> tuple[fx.Node, _State]:
    """All steps of one layer in one direction: the sequence of hidden states, and the last state."""
    length = shape_of(x)[axis]
    shares = cell.project_input(x)
    hidden: list[fx.Node | None] = [None] * length
    for index in reversed(range(length)) if backwards else range(length):
        place = f"{cell.name}t{index}."
        share = cell.steps.step(f"{place}input", ops.SELECT, shares, dim=axis, index=index)
        state = cell.advance(share, state, place)
        hidden[index] = state[0]
    return cell.steps.step(f"{cell.name}sequence", ops.STACK, hidden, dim=axis), state


def _finish_layer(node: fx.Node, steps: Steps, output: fx.Node, last: list[_State]) -> None:
    used = {bind(user).option("index") for user in node.users}
    if 1 not in used:
        steps.finish_parts((output, None))
        return
    names = ("final_hidden", "final_cell")[: len(last[0])]
    final = tuple(
        steps.step(name, ops.STACK, [state[index] for state in last], dim=0) for index, name in enumerate(names)
    )
    steps.finish_parts((output, final if len(final) > 1 else final[0]))


def _single(node: fx.Node, steps: Steps) -> None:
    """A cell: one step."""
    module: Any = module_of(node)
    bound = bind(node)
    is_lstm = isinstance(module, nn.LSTMCell)
    cell = _cell_of(module, steps, "", "", 4 if is_lstm else 3)
    state = _states(bound.operand("hx")) or ((None, None) if is_lstm else (None,))
    after = cell.advance(cell.project_input(bound.operand("input")), state, "")
    if is_lstm:
        steps.finish_parts(after)
    else:
        assert after[0] is not None
        steps.finish_with(after[0])


def _cell_of(module: Any, steps: Steps, name: str, suffix: str, gates: int) -> _Cell:
    return _Cell(
        steps,
        name,
        (id(module), suffix),
        gates,
        getattr(module, f"weight_ih{suffix}"),
        getattr(module, f"weight_hh{suffix}"),
        getattr(module, f"bias_ih{suffix}", None) if module.bias else None,
        getattr(module, f"bias_hh{suffix}", None) if module.bias else None,
    )


_LSTM_STEPS = (ops.LINEAR, ops.NARROW, ops.ADD, ops.MUL, ops.SIGMOID, ops.TANH)
_GRU_STEPS = (*_LSTM_STEPS, ops.SUB, ops.AFFINE)
_SEQUENCE = (ops.SELECT, ops.STACK, ops.CAT)
LSTM = Decomposition(_check_layer, _layer, (*_LSTM_STEPS, *_SEQUENCE))
GRU = Decomposition(_check_layer, _layer, (*_GRU_STEPS, *_SEQUENCE))
LSTM_CELL = Decomposition(_check_cell, _single, _LSTM_STEPS)
GRU_CELL = Decomposition(_check_cell, _single, _GRU_STEPS)
