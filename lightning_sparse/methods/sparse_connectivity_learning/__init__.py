"""Sparse connectivity learning: mask variables that are trained, and a price per connection."""

from lightning_sparse.methods.sparse_connectivity_learning.sparse_connectivity_learning import SparseConnectivityLearning

__all__ = ["SparseConnectivityLearning"]
