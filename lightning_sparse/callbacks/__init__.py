"""When: one callback per method, on the stations of `base`."""

from lightning_sparse.callbacks.base import Sparsifier
from lightning_sparse.callbacks.hypersparse import HyperSparse
from lightning_sparse.callbacks.lp_sphere import LpSphere
from lightning_sparse.callbacks.magnitude import MagnitudePruning
from lightning_sparse.callbacks.masked import Masked
from lightning_sparse.callbacks.mixin import SparsityMixin
from lightning_sparse.callbacks.pruning import Pruning
from lightning_sparse.callbacks.random_sparsity import RandomSparsity
from lightning_sparse.callbacks.stations import Step

__all__ = [
    "HyperSparse",
    "LpSphere",
    "MagnitudePruning",
    "Masked",
    "Pruning",
    "RandomSparsity",
    "Sparsifier",
    "SparsityMixin",
    "Step",
]
