"""HyperSparse, its stop rule, and the score by which it compares models."""

from lightning_sparse.methods.hypersparse.hypersparse import HyperSparse

__all__ = ["HyperSparse"]
