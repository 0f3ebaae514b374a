"""Optimizers that train sparse weights without a callback and without Lightning."""

from lightning_sparse.optim.lp_sphere import LpSGD, sphere_groups

__all__ = ["LpSGD", "sphere_groups"]
