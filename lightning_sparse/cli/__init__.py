"""The command line: `lightning-sparse COMMAND`; `lightning-sparse --help` lists the commands."""

from lightning_sparse.cli.entry import main
from lightning_sparse.cli.run import SparseCLI

__all__ = ["SparseCLI", "main"]
