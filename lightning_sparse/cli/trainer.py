"""The Trainer of the command line: Lightning's subcommands, and ours."""

from __future__ import annotations

from lightning_sparse.cli.export import Export
from lightning_sparse.cli.refit import Refit

__all__ = ["SparseTrainer"]


class SparseTrainer(Refit, Export):
    """A Trainer that can also merge a network and retrain it, or export it."""
