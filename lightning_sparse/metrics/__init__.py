"""Metrics of sparse training as torchmetrics classes; each has a functional version in `functional` or `core`."""

from lightning_sparse.metrics.cka import CKA
from lightning_sparse.metrics.hoyer import HoyerSparsity
from lightning_sparse.metrics.model import DeadUnits, EffectiveMACs, EffectiveParameters, LayerDensity
from lightning_sparse.metrics.sparsity import MaskChurn, MaskOverlap, OverParameterizationRate, Sparsity

__all__ = [
    "CKA",
    "DeadUnits",
    "EffectiveMACs",
    "EffectiveParameters",
    "HoyerSparsity",
    "LayerDensity",
    "MaskChurn",
    "MaskOverlap",
    "OverParameterizationRate",
    "Sparsity",
]
