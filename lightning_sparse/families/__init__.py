"""Shared parts of related methods: each family leaves a method one or two functions to implement."""

from lightning_sparse.families.budgeted import Budgeted
from lightning_sparse.families.learned_threshold import LearnedThreshold
from lightning_sparse.families.masked import Masked
from lightning_sparse.families.pruning import Pruning
from lightning_sparse.families.pruning_at_init import PruningAtInit, PruningAtInitOnData
from lightning_sparse.families.rewiring import Rewiring
from lightning_sparse.families.sees_inputs import SeesInputs
from lightning_sparse.families.shadow_weights import ShadowWeights

__all__ = [
    "Budgeted",
    "LearnedThreshold",
    "Masked",
    "Pruning",
    "PruningAtInit",
    "PruningAtInitOnData",
    "Rewiring",
    "SeesInputs",
    "ShadowWeights",
]
