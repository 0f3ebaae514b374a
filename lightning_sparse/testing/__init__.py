"""The contract that every method fulfills, to test your own methods: one pytest class, or one call."""

from typing import TYPE_CHECKING, Any

from lightning_sparse.testing.case import Case, Inapplicable, Make, Recording, recorded
from lightning_sparse.testing.contract import CHECKS, Check, check_method, run_check
from lightning_sparse.testing.ranks import fit_on_ranks, run_on_ranks
from lightning_sparse.testing.state import (
    Watcher,
    differences,
    left_behind,
    masks_of,
    method_of,
    nonzero,
    off_target,
    state_of,
    zeros_hold,
)
from lightning_sparse.testing.toys import (
    BATCH,
    BATCHES,
    EPOCHS,
    OPTIMIZERS,
    Architecture,
    Manual,
    Toy,
    attention_network,
    fit,
    loader,
    network,
    plain_network,
    toy,
    trainer,
    with_architecture,
)

if TYPE_CHECKING:
    from lightning_sparse.testing.suite import MethodContract

__all__ = [
    "BATCH",
    "BATCHES",
    "CHECKS",
    "EPOCHS",
    "OPTIMIZERS",
    "Architecture",
    "Case",
    "Check",
    "Inapplicable",
    "Make",
    "Manual",
    "MethodContract",
    "Recording",
    "Toy",
    "Watcher",
    "attention_network",
    "check_method",
    "differences",
    "fit",
    "fit_on_ranks",
    "left_behind",
    "loader",
    "masks_of",
    "method_of",
    "network",
    "nonzero",
    "off_target",
    "plain_network",
    "recorded",
    "run_check",
    "run_on_ranks",
    "state_of",
    "toy",
    "trainer",
    "with_architecture",
    "zeros_hold",
]


def __getattr__(name: str) -> Any:
    """Import pytest only when `MethodContract` is used."""
    if name == "MethodContract":
        from lightning_sparse.testing.suite import MethodContract

        return MethodContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
