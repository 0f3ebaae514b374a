"""Sparse training for PyTorch Lightning: add a callback; your model, optimizer and checkpoints stay yours."""

from lightning_sparse._version import __version__ as __version__
from lightning_sparse.core import register_layer
from lightning_sparse.export import merge_layers
from lightning_sparse.loop import SparsityMixin
from lightning_sparse.methods import (
    SET,
    SNIP,
    STR,
    CKARegularization,
    Distillation,
    GraNet,
    GraSP,
    HyperSparse,
    KeepSparsity,
    LayerSparsity,
    LotteryTicket,
    LpSphere,
    MagnitudePruning,
    MovementPruning,
    RandomSparsity,
    RigL,
    SparseConnectivityLearning,
    SparseGPT,
    SynFlow,
    TrainableThreshold,
    Wanda,
    WeightPenalty,
)
from lightning_sparse.observe import SparsityCheckpoint, SparsityMonitor

__all__ = [
    "SET",
    "SNIP",
    "STR",
    "CKARegularization",
    "Distillation",
    "GraNet",
    "GraSP",
    "HyperSparse",
    "KeepSparsity",
    "LayerSparsity",
    "LotteryTicket",
    "LpSphere",
    "MagnitudePruning",
    "MovementPruning",
    "RandomSparsity",
    "RigL",
    "SparseConnectivityLearning",
    "SparseGPT",
    "SparsityCheckpoint",
    "SparsityMixin",
    "SparsityMonitor",
    "SynFlow",
    "TrainableThreshold",
    "Wanda",
    "WeightPenalty",
    "__version__",
    "merge_layers",
    "register_layer",
]
