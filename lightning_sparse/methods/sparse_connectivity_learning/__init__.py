"""Sparse connectivity learning: trainable mask variables, and a price per connection."""

from lightning_sparse.methods.sparse_connectivity_learning.sparse_connectivity_learning import SparseConnectivityLearning

__all__ = ["SparseConnectivityLearning"]
