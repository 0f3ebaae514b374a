"""AC/DC: alternating compressed and dense phases."""

from lightning_sparse.methods.acdc.acdc import ACDC

__all__ = ["ACDC"]
