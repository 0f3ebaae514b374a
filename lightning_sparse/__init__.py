"""Sparse training for PyTorch Lightning: add a callback; your model, optimizer and checkpoints stay yours."""

from lightning_sparse.callbacks import (
    SET,
    CKARegularization,
    GraNet,
    HyperSparse,
    LayerSparsity,
    LpSphere,
    MagnitudePruning,
    RandomSparsity,
    RigL,
    SparseConnectivityLearning,
    SparsityMixin,
)
from lightning_sparse.export import merge_layers

__version__ = "0.1.0"

__all__ = [
    "SET",
    "CKARegularization",
    "GraNet",
    "HyperSparse",
    "LayerSparsity",
    "LpSphere",
    "MagnitudePruning",
    "RandomSparsity",
    "RigL",
    "SparseConnectivityLearning",
    "SparsityMixin",
    "merge_layers",
]
