"""Numbers about sparse models, as torchmetrics."""

from lightning_sparse.metrics.hoyer import HoyerSparsity

__all__ = ["HoyerSparsity"]
