"""HyperSparse, its stop rule, and the score that compares its models."""

from lightning_sparse.methods.hypersparse.hypersparse import HyperSparse

__all__ = ["HyperSparse"]
