"""Sparse training for PyTorch Lightning: add a callback; your model, optimizer and checkpoints stay yours."""

from lightning_sparse.callbacks import HyperSparse, LpSphere, MagnitudePruning, RandomSparsity, SparsityMixin

__version__ = "0.1.0"

__all__ = ["HyperSparse", "LpSphere", "MagnitudePruning", "RandomSparsity", "SparsityMixin"]
