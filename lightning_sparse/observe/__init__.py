"""Looking at sparse training."""

from lightning_sparse.observe.similarity import SimilarityMap
from lightning_sparse.observe.table import SparsityTable

__all__ = ["SimilarityMap", "SparsityTable"]
