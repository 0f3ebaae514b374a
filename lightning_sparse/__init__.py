"""Sparse training for PyTorch Lightning: add a callback; your model, optimizer and checkpoints stay yours."""

from lightning_sparse.callbacks import (
    SET,
    GraNet,
    HyperSparse,
    LpSphere,
    MagnitudePruning,
    RandomSparsity,
    RigL,
    SparseConnectivityLearning,
    SparsityMixin,
)

__version__ = "0.1.0"

__all__ = [
    "SET",
    "GraNet",
    "HyperSparse",
    "LpSphere",
    "MagnitudePruning",
    "RandomSparsity",
    "RigL",
    "SparseConnectivityLearning",
    "SparsityMixin",
]
