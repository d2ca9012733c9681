"""Integer graphs that the tests of this folder save."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from qgraph.artifact.container import CHECKSUMS_MEMBER, _checksums, _zipped
from qgraph.quantization import calibrate, convert, prepare
from qgraph.targets import Target, get_target
from tests.support.models import Attention, Forward, Residual, image


class Pair(NamedTuple):
    """A result with names."""

    first: torch.Tensor
    second: torch.Tensor


def integer_of(model: nn.Module, *example: Any, target: Target | str = "bpu") -> fx.GraphModule:
    prepared = prepare(model.eval(), example, target=target)
    calibrate(prepared, [example], progress=False)
    return convert(prepared)


def residual() -> tuple[fx.GraphModule, tuple[Any, ...]]:
    x = image(2)
    return integer_of(Residual(), x), (x,)


def attention() -> tuple[fx.GraphModule, tuple[Any, ...]]:
    x = torch.randn(2, 5, 8)
    return integer_of(Attention(), x), (x,)


def islands() -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """Float functions, methods and modules of many kinds, sizes, structured inputs and outputs."""

    def forward(m: nn.Module, pair: dict[str, Any], scale: float) -> Any:
        x, (y, *_) = pair["x"], pair["rest"]
        spectrum = torch.fft.fft(x).real
        last, _ = m.gru(x.unsqueeze(1))
        odd = F.hardshrink(m.prelu(x)).cummax(1) if scale > 1 else x
        return {
            "spectrum": (spectrum, [torch.erf(m.norm(x)), m.prelu(y).sum()]),
            "batch": x.shape[0] * 3,
            "recurrent": torch.max(last, 1),
            "odd": odd,
            "sizes": x.shape,
            "sliced": x[:, 1:3].float() + y.logsumexp(1, keepdim=True),
        }

    torch.manual_seed(1)
    parts = {"norm": nn.LayerNorm(4), "prelu": nn.PReLU(4), "gru": nn.GRU(4, 3, num_layers=2)}
    example = {"x": torch.randn(2, 4), "rest": (torch.randn(2, 4), None, "text")}
    return integer_of(Forward(forward, **parts), example, 2.0), (example, 2.0)


def integers() -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """An embedding in float, an input of integers, a fixed batch."""

    def forward(m: nn.Module, tokens: torch.Tensor) -> Any:
        return m.head(m.table(tokens).flatten(1)).reshape(3, 2, 2)

    example = torch.randint(0, 10, (3, 4))
    return integer_of(Forward(forward, table=nn.Embedding(10, 5), head=nn.Linear(20, 4)), example), (example,)


def float_convolution() -> tuple[fx.GraphModule, tuple[Any, ...]]:
    """Channels-last weights of a convolution with one input channel that stays in float, and a named tuple."""

    def forward(m: nn.Module, x: torch.Tensor) -> Any:
        return Pair(torch.relu(m.depth(m.plain(x))), m.head(torch.max(x, 1).values))

    model = Forward(forward, plain=nn.Conv2d(3, 4, 3), depth=nn.Conv2d(4, 4, 3, groups=4), head=nn.Linear(8, 3))
    x = image(2)
    bpu = get_target("bpu")
    target = replace(bpu, name="no convolutions", ops={name: bpu.ops[name] for name in bpu.ops if name != "conv2d"})
    return integer_of(model, x, target=target), (x,)


GRAPHS: dict[str, Callable[[], tuple[fx.GraphModule, tuple[Any, ...]]]] = {
    "residual": residual,
    "attention": attention,
    "islands": islands,
    "integers": integers,
}


def members_of(path: Path) -> dict[str, bytes]:
    """The members of a file, in order."""
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_members(path: Path, members: dict[str, bytes], *, sums: bool = True) -> None:
    """A file of these members; checksums made anew unless told otherwise."""
    rest = {name: data for name, data in members.items() if name != CHECKSUMS_MEMBER}
    last = _checksums(rest) if sums else members[CHECKSUMS_MEMBER]
    path.write_bytes(_zipped({**rest, CHECKSUMS_MEMBER: last}))
