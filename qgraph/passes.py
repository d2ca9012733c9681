"""The public passes: `from qgraph.passes import FuseConvBnAddRelu`.

A thin facade over the top-level package `passes`, which comes with qgraph and holds one pass per file.
"""
# ruff: noqa: TID251, E402 - the one place that may import the concrete passes, after making sure whose they are

from qgraph.pipeline.registry import check_passes_package

check_passes_package()

from passes.assign_dtypes import AssignDtypes
from passes.canonicalize import Canonicalize
from passes.clean_up_integer import CleanUpInteger
from passes.decompose_composites import DecomposeComposites
from passes.decompose_layers import DecomposeLayers
from passes.detect_shared_modules import DetectSharedModules, SharedModule, find_shared_modules
from passes.eliminate_dead_code import EliminateDeadCode
from passes.equalize_channels import EqualizeChannels
from passes.fold_constants import FoldConstants
from passes.freeze_qparams import FreezeQParams
from passes.fuse_conv_bn_add_relu import FuseConvBnAddRelu
from passes.high_precision_output import HighPrecisionOutput
from passes.insert_fake_quant import InsertFakeQuant
from passes.insert_quant_stubs import InsertQuantStubs
from passes.lower_to_integer import LowerToInteger
from passes.split_nonuniform_constants import SplitNonuniformConstants
from passes.split_shared_modules import SplitSharedModules
from passes.use_channels_last import UseChannelsLast

__all__ = [
    "AssignDtypes",
    "Canonicalize",
    "CleanUpInteger",
    "DecomposeComposites",
    "DecomposeLayers",
    "DetectSharedModules",
    "EliminateDeadCode",
    "EqualizeChannels",
    "FoldConstants",
    "FreezeQParams",
    "FuseConvBnAddRelu",
    "HighPrecisionOutput",
    "InsertFakeQuant",
    "InsertQuantStubs",
    "LowerToInteger",
    "SharedModule",
    "SplitNonuniformConstants",
    "SplitSharedModules",
    "UseChannelsLast",
    "find_shared_modules",
]
