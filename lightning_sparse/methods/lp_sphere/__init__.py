"""LpSphere, and the schedule of its mixing rate."""

from lightning_sparse.methods.lp_sphere.lp_sphere import LpSphere

__all__ = ["LpSphere"]
