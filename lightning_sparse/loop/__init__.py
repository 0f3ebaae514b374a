"""The stations of a training step, and the Lightning callback that every method is."""

from lightning_sparse.loop.loop import Loop
from lightning_sparse.loop.method import Method, Shards
from lightning_sparse.loop.mixin import SparsityMixin
from lightning_sparse.loop.run import Run
from lightning_sparse.loop.sparsifier import Sparsifier, sparsifiers
from lightning_sparse.loop.step import Step

__all__ = ["Loop", "Method", "Run", "Shards", "Sparsifier", "SparsityMixin", "Step", "sparsifiers"]
