"""AC/DC: compressed and dense phases in turns."""

from lightning_sparse.methods.acdc.acdc import ACDC

__all__ = ["ACDC"]
