"""The command line: `lightning-sparse fit|refit|export|validate|test|predict --config FILE ...`, and `report RUN...`."""

from lightning_sparse.cli.entry import main
from lightning_sparse.cli.sparse_cli import SparseCLI

__all__ = ["SparseCLI", "main"]
