"""Finding a target by name: built in, from a TOML file, or from another package.

Other packages join through the entry-point group `qgraph.targets`; the entry point is a `Target`, the path of a TOML
file, or a function that returns one of them.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from torch import fx

from qgraph.errors import QGraphError, TargetError, did_you_mean
from qgraph.ir.node_info import graph_info
from qgraph.targets.inherit import BUILT_IN, built_in_text, read_file
from qgraph.targets.parse import parse_target
from qgraph.targets.target import Target

ENTRY_POINT_GROUP = "qgraph.targets"


def get_target(target: Target | str | Path) -> Target:
    """The target with this name, or of this TOML file.

    Raises:
        TargetError: no target has the name, or its file is wrong.
    """
    if isinstance(target, Target):
        return target
    path = target_path(target)
    if path is not None:
        return load_target(path)
    if not isinstance(target, str):
        raise TargetError(
            f"a target cannot be of type {type(target).__name__}", fix="give a name, a TOML file or a Target"
        )
    if target in BUILT_IN:
        return _built_in(target)
    points = _entry_points()
    if target not in points:
        raise TargetError(
            f"no target is named {target!r}",
            fix=f"{did_you_mean(target, [*BUILT_IN, *points])}; the path of a target's file ends in .toml",
        )
    return _provided(points[target])


def target_path(target: object) -> Path | None:
    """The file that is meant where a target may be a name or a path; None for a name."""
    if isinstance(target, Path) or (isinstance(target, str) and target.endswith(".toml")):
        return Path(target)
    return None


def target_of(gm: fx.GraphModule) -> Target:
    """The target a graph was prepared for; the default one if none is recorded."""
    recorded = graph_info(gm).target
    return recorded if isinstance(recorded, Target) else get_target("bpu")


def list_targets() -> list[str]:
    """Names of all targets: built-in ones, then those of other packages.

    Raises:
        TargetError: two packages use the same name.
    """
    return [*BUILT_IN, *_entry_points()]


def load_target(path: Path) -> Target:
    """The target a TOML file describes.

    Raises:
        TargetError: the file cannot be read or is wrong.
    """
    return parse_target(read_file(path), origin=str(path), folder=path.parent)


@lru_cache
def _built_in(name: str) -> Target:
    text, origin = built_in_text(name)
    return parse_target(text, origin=origin)


def _entry_points() -> dict[str, EntryPoint]:
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in points or point.name in BUILT_IN:
            first = _owner(points[point.name]) if point.name in points else "qgraph"
            raise TargetError(
                f"a target named {point.name!r} exists already",
                why=f"it is registered by {first} and again by {_owner(point)}",
                fix="give one of them another name",
            )
        points[point.name] = point
    return points


def _provided(point: EntryPoint) -> Target:
    try:
        provided = point.load()
        if callable(provided):
            provided = provided()
    except QGraphError:
        raise
    except Exception as error:
        raise TargetError(
            f"the target {point.name!r} cannot be loaded from {point.value}",
            where=f"registered by {_owner(point)}",
            why=f"{type(error).__name__}: {error}",
        ) from error
    if isinstance(provided, (str, Path)):
        return load_target(Path(provided))
    if not isinstance(provided, Target):
        raise TargetError(
            f"{point.value} is a {type(provided).__name__}, not a target",
            where=f"registered as {point.name!r} by {_owner(point)}",
            fix="provide a Target, the path of a TOML file, or a function that returns one of them",
        )
    return provided


def _owner(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
