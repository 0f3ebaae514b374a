"""LpSphere, and the schedule of how much of a new direction its steps mix in."""

from lightning_sparse.methods.lp_sphere.lp_sphere import LpSphere

__all__ = ["LpSphere"]
