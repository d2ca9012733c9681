"""What can make a capture unsound, named; each is an error unless the caller waives it by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qgraph.errors import CaptureError, UserError, did_you_mean
from qgraph.ir.node_info import SourceLine

KINDS: dict[str, str] = {
    "scalar": "a tensor's value became a Python number, so the graph would keep the example's value",
    "numpy": "a tensor's values left torch, so what is computed outside is frozen in the graph",
    "data-shaped": "a size that depends on the values was read, so the graph would keep the example's size",
    "random": "random numbers are drawn during the forward, so no two runs agree",
    "autocast": "ops run under autocast, which a graph does not record",
    "state": "the forward changes the module's own tensors, so the next call computes something else",
    "lost": "a tensor computed from the inputs reached an op on a way the recorder could not see",
}

_REMEDIES: dict[str, str] = {
    "scalar": "replace the branch or number by tensor arithmetic (torch.where, broadcasting)",
    "numpy": "use the torch function of the same name",
    "data-shaped": "use a fixed size (topk, padding) or move this step out of the model",
    "random": "draw outside and pass the numbers in, or call model.eval()",
    "autocast": "trace outside autocast, in float32",
    "state": "keep the state outside the model and pass it in and out",
    "lost": "call torch functions directly instead of compiled or native code",
}


@dataclass(frozen=True)
class Flag:
    """One place where a capture may be unsound.

    Args:
        kind: a key of `KINDS`.
        what: the call that raised it.
        module: path of the module running at the time.
        source: the user's line.
    """

    kind: str
    what: str
    module: str
    source: SourceLine | None

    def __str__(self) -> str:
        owner = f" in {self.module}" if self.module else ""
        return f"{self.kind}: {self.what}{owner} at {self.source or 'an unknown line'}"


class Unfaithful(CaptureError):
    """What was recorded is not what the model does; `kinds` says why, in words of `KINDS` or as `replay`."""

    kinds: frozenset[str] = frozenset()


def check_waivers(waive: Iterable[str]) -> frozenset[str]:
    """The waived kinds.

    Raises:
        UserError: a name is no kind of flag.
    """
    names = frozenset([waive] if isinstance(waive, str) else waive)
    for name in sorted(names - KINDS.keys()):
        raise UserError(f"no capture flag is named {name!r}", fix=did_you_mean(name, KINDS))
    return names


def raise_unless_waived(flags: Iterable[Flag], waived: frozenset[str], model: str) -> tuple[str, ...]:
    """Notes about waived flags.

    Raises:
        CaptureError: a flag is not waived; the message names every line.
    """
    unique = list(dict.fromkeys(flags))
    open_flags = [flag for flag in unique if flag.kind not in waived]
    if open_flags:
        kinds = list(dict.fromkeys(flag.kind for flag in open_flags))
        error = Unfaithful(
            f"the capture of {model} would not be faithful",
            where="; ".join(map(str, open_flags)),
            why="; ".join(f"{kind}: {KINDS[kind]}" for kind in kinds),
            fix="; ".join(_REMEDIES[kind] for kind in kinds)
            + f"; if it is harmless, pass waive={tuple(kinds)!r} to trace or prepare",
        )
        error.kinds = frozenset(kinds)
        raise error
    return tuple(f"waived {flag}" for flag in unique)
