"""The methods: one file or folder per paper."""

from lightning_sparse.methods.acdc import ACDC
from lightning_sparse.methods.cka_regularization import CKARegularization
from lightning_sparse.methods.distillation import Distillation
from lightning_sparse.methods.granet import GraNet
from lightning_sparse.methods.grasp import GraSP
from lightning_sparse.methods.hypersparse import HyperSparse
from lightning_sparse.methods.keep_sparsity import KeepSparsity
from lightning_sparse.methods.layer_sparsity import LayerSparsity
from lightning_sparse.methods.lottery_ticket import LotteryTicket
from lightning_sparse.methods.lp_sphere import LpSphere
from lightning_sparse.methods.magnitude_pruning import MagnitudePruning
from lightning_sparse.methods.movement_pruning import MovementPruning
from lightning_sparse.methods.quantization_aware import QuantizationAware
from lightning_sparse.methods.random_sparsity import RandomSparsity
from lightning_sparse.methods.rigl import RigL
from lightning_sparse.methods.set import SET
from lightning_sparse.methods.snip import SNIP
from lightning_sparse.methods.sparse_connectivity_learning import SparseConnectivityLearning
from lightning_sparse.methods.sparsegpt import SparseGPT
from lightning_sparse.methods.srste import SRSTE
from lightning_sparse.methods.str import STR
from lightning_sparse.methods.synflow import SynFlow
from lightning_sparse.methods.trainable_threshold import TrainableThreshold
from lightning_sparse.methods.wanda import Wanda
from lightning_sparse.methods.weight_penalty import WeightPenalty

__all__ = [
    "ACDC",
    "SET",
    "SNIP",
    "SRSTE",
    "STR",
    "CKARegularization",
    "Distillation",
    "GraNet",
    "GraSP",
    "HyperSparse",
    "KeepSparsity",
    "LayerSparsity",
    "LotteryTicket",
    "LpSphere",
    "MagnitudePruning",
    "MovementPruning",
    "QuantizationAware",
    "RandomSparsity",
    "RigL",
    "SparseConnectivityLearning",
    "SparseGPT",
    "SynFlow",
    "TrainableThreshold",
    "Wanda",
    "WeightPenalty",
]
