"""Modules that appear in models and prepared graphs: stubs, named arithmetic, fused operators."""

from qgraph.nn.affine import Affine
from qgraph.nn.functional_modules import FloatFunctional
from qgraph.nn.fused import FUSED_CLASSES, Activation, Fused, as_fused, clone_module
from qgraph.nn.stubs import DeQuantStub, QuantStub

__all__ = [
    "FUSED_CLASSES",
    "Activation",
    "Affine",
    "DeQuantStub",
    "FloatFunctional",
    "Fused",
    "QuantStub",
    "as_fused",
    "clone_module",
]
