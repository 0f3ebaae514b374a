"""From trained weights to smaller and faster networks."""

from lightning_sparse.export.merge import fresh_start, merge_layers, pad_in_front
from lightning_sparse.export.report import LayerVerdict, MergeReport

__all__ = ["LayerVerdict", "MergeReport", "fresh_start", "merge_layers", "pad_in_front"]
