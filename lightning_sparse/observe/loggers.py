"""What loggers can show beyond curves: the configuration, results next to it, and charts laid out on a page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from lightning_sparse.observe.facts import flat

__all__ = ["LAYOUT", "conclude", "introduce", "log_export"]

LAYOUT = {
    "lightning_sparse": {
        "target against actual": ["Multiline", [r"^sparsity/actual$", r"^sparsity/target$", r"^sparsity/zeros$"]],
        "layers": ["Multiline", [r"^layers/.*"]],
        "churn": ["Multiline", [r"^sparsity/churn$"]],
        "dead outputs": ["Multiline", [r"^sparsity/dead_outputs$"]],
        "cost": ["Multiline", [r"^cost/macs_fraction$"]],
        "metrics": ["Multiline", [r"^(val|test)[/_].*"]],
    }
}
"""Custom scalars of TensorBoard: tags are regular expressions."""


def introduce(trainer: pl.Trainer, facts: Mapping[str, Any]) -> None:
    """Give loggers the configuration of a run at its start; TensorBoard gets it at the end, together with the results.

    Args:
        trainer: the Trainer whose loggers are used.
        facts: what `describe_run` returned.
    """
    short = {key: value for key, value in facts.items() if key != "command_line"}  # it is saved as a file beside the logs
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_custom_scalars(LAYOUT)
        elif isinstance(logger, MLFlowLogger):
            logger.log_hyperparams(flat(short))
        elif not isinstance(logger, WandbLogger):
            logger.log_hyperparams(short)


def conclude(trainer: pl.Trainer, facts: Mapping[str, Any], numbers: Mapping[str, float]) -> None:
    """Put the results next to the configuration, for loggers with a table of both: HParams of TensorBoard.

    Args:
        trainer: the Trainer whose loggers are used.
        facts: what `describe_run` returned.
        numbers: the results of the run.
    """
    short = flat({key: value for key, value in facts.items() if key != "command_line"})
    plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in short.items()}
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_hparams(plain, dict(numbers), run_name="results")


def log_export(logger: Logger, report: Mapping[str, Any]) -> None:
    """Log the results of an export: size of every file, latency, and speedup over the dense model.

    Args:
        logger: any Lightning logger.
        report: `to_json()` of what `export_ladder` returns, or the `report.json` that it writes.
    """
    batch, rungs = str(report["batch_size"]), report["rungs"]

    def latency(rung: Mapping[str, Any]) -> float | None:
        timed = {str(size): timing["median"] for size, timing in rung["latency"].items()}
        return timed.get(batch)

    numbers: dict[str, float] = {}
    dense = latency(rungs["dense"])
    for name, rung in rungs.items():
        if rung["bytes"] is not None:
            numbers[f"export/{name}/bytes"] = rung["bytes"]
        if (took := latency(rung)) is not None:
            numbers[f"export/{name}/latency_ms"] = took
            numbers |= {f"export/{name}/speed": dense / took} if dense else {}
    logger.log_metrics(numbers)
