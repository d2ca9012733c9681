"""Names of passes, each mapped to where its class is imported from.

Built-in passes are listed here as text, so that the framework imports no concrete pass. Other packages join through the
entry-point group `qgraph.passes`: `my-pass = "my_package.my_pass:MyPass"`.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path

from qgraph.errors import PassError, UserError, did_you_mean
from qgraph.pipeline.base import Pass

ENTRY_POINT_GROUP = "qgraph.passes"

_BUILT_IN = {
    "canonicalize": "passes.canonicalize:Canonicalize",
    "eliminate-dead-code": "passes.eliminate_dead_code:EliminateDeadCode",
    "fold-constants": "passes.fold_constants:FoldConstants",
    "detect-shared-modules": "passes.detect_shared_modules:DetectSharedModules",
    "split-shared-modules": "passes.split_shared_modules:SplitSharedModules",
    "fuse-conv-bn-add-relu": "passes.fuse_conv_bn_add_relu:FuseConvBnAddRelu",
    "use-channels-last": "passes.use_channels_last:UseChannelsLast",
    "equalize-channels": "passes.equalize_channels:EqualizeChannels",
    "split-nonuniform-constants": "passes.split_nonuniform_constants:SplitNonuniformConstants",
    "decompose-layers": "passes.decompose_layers:DecomposeLayers",
    "decompose-composites": "passes.decompose_composites:DecomposeComposites",
    "insert-quant-stubs": "passes.insert_quant_stubs:InsertQuantStubs",
    "assign-dtypes": "passes.assign_dtypes:AssignDtypes",
    "high-precision-output": "passes.high_precision_output:HighPrecisionOutput",
    "insert-fake-quant": "passes.insert_fake_quant:InsertFakeQuant",
    "freeze-qparams": "passes.freeze_qparams:FreezeQParams",
    "lower-to-integer": "passes.lower_to_integer:LowerToInteger",
    "clean-up-integer": "passes.clean_up_integer:CleanUpInteger",
}


class PassRegistry:
    """Pass names and their import paths.

    Args:
        built_in: names that exist from the start.
    """

    def __init__(self, built_in: dict[str, str]) -> None:
        self._targets: dict[str, tuple[str, str]] = {name: (target, "qgraph") for name, target in built_in.items()}
        self._classes: dict[str, type[Pass]] = {}
        self._extended = False

    def register(self, name: str, target: str | type[Pass], *, owner: str) -> None:
        """Adds a pass.

        Args:
            name: its name, equal to the class's `name`.
            target: the class, or `package.module:Class`, imported when first asked for.
            owner: who adds it, for messages.

        Raises:
            UserError: the name is taken; the message names both owners.
        """
        if name in self._targets:
            raise UserError(
                f"a pass named {name!r} exists already",
                why=f"it is registered by {self._targets[name][1]} and again by {owner}",
                fix="give one of them another name",
            )
        if isinstance(target, str):
            self._targets[name] = (target, owner)
        else:
            self._targets[name] = (f"{target.__module__}:{target.__qualname__}", owner)
            self._classes[name] = target

    def names(self) -> list[str]:
        """All names, in order of registration."""
        self._extend()
        return list(self._targets)

    def owner(self, name: str) -> str:
        """Who registered a pass."""
        self._extend()
        return self._targets[name][1]

    def get(self, name: str) -> type[Pass]:
        """The class of a pass.

        Raises:
            UserError: no pass has that name, or its class cannot be imported.
        """
        self._extend()
        if name not in self._targets:
            raise UserError(f"no pass is named {name!r}", fix=did_you_mean(name, self._targets))
        if name not in self._classes:
            self._classes[name] = self._load(name)
        return self._classes[name]

    def _load(self, name: str) -> type[Pass]:
        target, owner = self._targets[name]
        module_name, _, class_name = target.partition(":")
        if module_name.split(".")[0] == "passes":
            check_passes_package()
        try:
            loaded = getattr(importlib.import_module(module_name), class_name)
        except (ImportError, AttributeError) as error:
            raise UserError(
                f"the pass {name!r} cannot be imported from {target}",
                why=f"{type(error).__name__}: {error}",
                fix=f"look at its registration by {owner}",
            ) from error
        if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
            raise UserError(f"{target}, registered as the pass {name!r} by {owner}, is not a Pass class")
        if loaded.name != name:
            raise PassError(f"the pass registered as {name!r} calls itself {loaded.name!r}", where=target)
        return loaded

    def _extend(self) -> None:
        if self._extended:
            return
        self._extended = True
        for point in entry_points(group=ENTRY_POINT_GROUP):
            package = point.dist.name if point.dist is not None else point.value
            self.register(point.name, point.value, owner=package)


@lru_cache(maxsize=1)
def check_passes_package() -> None:
    """Makes sure that `import passes` means the package that came with this qgraph.

    Raises:
        UserError: another package of that name comes first on the import path.
    """
    import qgraph

    home = Path(str(qgraph.__file__)).resolve().parent.parent
    try:
        package = importlib.import_module("passes")
    except ImportError as error:
        raise UserError(
            "the package 'passes' that belongs to qgraph is missing",
            where=str(home),
            fix="install qgraph again",
        ) from error
    locations = [Path(entry).resolve() for entry in getattr(package, "__path__", [])]
    if home / "passes" not in locations:
        found = getattr(package, "__file__", None) or ", ".join(map(str, locations))
        raise UserError(
            "a package of your own named 'passes' hides the one that belongs to qgraph",
            where=str(found),
            why=f"qgraph's is {home / 'passes'}, but Python found yours first on sys.path",
            fix="rename your package, or run from a folder that does not contain it",
        )


REGISTRY = PassRegistry(_BUILT_IN)
