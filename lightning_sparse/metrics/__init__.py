"""What the field reads off sparse training, as torchmetrics classes; each has a twin in `functional`."""

from lightning_sparse.metrics.cka import CKA
from lightning_sparse.metrics.hoyer import HoyerSparsity
from lightning_sparse.metrics.masks import LayerDensity, MaskOverlap, OverParameterizationRate

__all__ = ["CKA", "HoyerSparsity", "LayerDensity", "MaskOverlap", "OverParameterizationRate"]
