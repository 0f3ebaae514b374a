"""Monitoring of sparse training; nothing here changes how it runs."""

from lightning_sparse.observe.checkpoint import SparsityCheckpoint
from lightning_sparse.observe.checkpoint_io import AtomicCheckpointIO
from lightning_sparse.observe.loggers import log_export
from lightning_sparse.observe.monitor import SparsityMonitor
from lightning_sparse.observe.similarity import SimilarityMap
from lightning_sparse.observe.table import SparsityTable
from lightning_sparse.observe.wandb import PatientWandbLogger

__all__ = [
    "AtomicCheckpointIO",
    "PatientWandbLogger",
    "SimilarityMap",
    "SparsityCheckpoint",
    "SparsityMonitor",
    "SparsityTable",
    "log_export",
]
