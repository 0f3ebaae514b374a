"""When: one callback per method, on the stations of `base`."""

from lightning_sparse.callbacks.base import Sparsifier
from lightning_sparse.callbacks.cka import CKARegularization
from lightning_sparse.callbacks.granet import GraNet
from lightning_sparse.callbacks.grasp import GraSP
from lightning_sparse.callbacks.hypersparse import HyperSparse
from lightning_sparse.callbacks.layer_sparsity import LayerSparsity
from lightning_sparse.callbacks.learned_threshold import LearnedThreshold
from lightning_sparse.callbacks.lottery_ticket import LotteryTicket
from lightning_sparse.callbacks.lp_sphere import LpSphere
from lightning_sparse.callbacks.magnitude import MagnitudePruning
from lightning_sparse.callbacks.masked import Masked
from lightning_sparse.callbacks.mixin import SparsityMixin
from lightning_sparse.callbacks.pruning import Pruning
from lightning_sparse.callbacks.random_sparsity import RandomSparsity
from lightning_sparse.callbacks.rewiring import Rewiring
from lightning_sparse.callbacks.rigl import RigL
from lightning_sparse.callbacks.scl import SparseConnectivityLearning
from lightning_sparse.callbacks.set import SET
from lightning_sparse.callbacks.snip import SNIP
from lightning_sparse.callbacks.soft_threshold import STR
from lightning_sparse.callbacks.stations import Step
from lightning_sparse.callbacks.swapped import Swapped
from lightning_sparse.callbacks.synflow import SynFlow
from lightning_sparse.callbacks.trainable_threshold import TrainableThreshold
from lightning_sparse.callbacks.weight_penalty import WeightPenalty

__all__ = [
    "SET",
    "SNIP",
    "STR",
    "CKARegularization",
    "GraNet",
    "GraSP",
    "HyperSparse",
    "LayerSparsity",
    "LearnedThreshold",
    "LotteryTicket",
    "LpSphere",
    "MagnitudePruning",
    "Masked",
    "Pruning",
    "RandomSparsity",
    "Rewiring",
    "RigL",
    "SparseConnectivityLearning",
    "Sparsifier",
    "SparsityMixin",
    "Step",
    "Swapped",
    "SynFlow",
    "TrainableThreshold",
    "WeightPenalty",
]
