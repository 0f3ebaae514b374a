"""Sparse training for PyTorch Lightning: add a callback; your model, optimizer and checkpoints stay yours."""

from lightning_sparse.callbacks import (
    SET,
    SNIP,
    STR,
    GraNet,
    GraSP,
    HyperSparse,
    LotteryTicket,
    LpSphere,
    MagnitudePruning,
    RandomSparsity,
    RigL,
    SparseConnectivityLearning,
    SparsityMixin,
    SynFlow,
    TrainableThreshold,
    WeightPenalty,
)

__version__ = "0.1.0"

__all__ = [
    "SET",
    "SNIP",
    "STR",
    "GraNet",
    "GraSP",
    "HyperSparse",
    "LotteryTicket",
    "LpSphere",
    "MagnitudePruning",
    "RandomSparsity",
    "RigL",
    "SparseConnectivityLearning",
    "SparsityMixin",
    "SynFlow",
    "TrainableThreshold",
    "WeightPenalty",
]
