"""Looking at sparse training."""

from lightning_sparse.observe.table import SparsityTable

__all__ = ["SparsityTable"]
