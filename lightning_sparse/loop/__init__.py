"""When: the stations of a training step, and the Lightning callback that every method is."""

from lightning_sparse.loop.loop import Step
from lightning_sparse.loop.mixin import SparsityMixin
from lightning_sparse.loop.sparsifier import Sparsifier, sparsifiers

__all__ = ["Sparsifier", "SparsityMixin", "Step", "sparsifiers"]
