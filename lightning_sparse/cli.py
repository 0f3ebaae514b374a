"""The command line: `lightning-sparse fit|validate|test|predict --config FILE ...`."""

from __future__ import annotations

import difflib
import inspect
import re
import sys
import traceback
from importlib import import_module
from typing import Any, NoReturn

import lightning.pytorch as pl
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console
from rich.table import Table

import lightning_sparse
import lightning_sparse.data
import lightning_sparse.models
from lightning_sparse.callbacks import Sparsifier
from lightning_sparse.observe import SparsityTable

__all__ = ["SparseCLI", "main"]


class SparseParser(LightningArgumentParser):
    """Says what is wrong in one sentence: which key, and what to write instead."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"lightning-sparse: {explain(str(message))}", file=sys.stderr)
        sys.exit(2)


def explain(message: str) -> str:
    r"""One sentence from the parser's report.

    Example:
        >>> explain("Parser key \\"trainer.max_epoch\\": Option 'max_epoch' is not accepted")
        "'max_epoch' in trainer.max_epoch is unknown; see --help or --print_config for what is accepted."
    """
    key = re.search(r'[Pp]arser key "([^"]+)"', message)
    where = f" in {key[1]}" if key else ""
    if unknown := re.search(r"Option '([^']+)' is not accepted", message):
        name = unknown[1]
        owner = re.search(r"Problem with given class_path '([^']+)'", message)
        known = _arguments(owner[1]) if owner else []
        place = f" of {owner[1].rpartition('.')[2]}" if owner else ""
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        remedy = f"did you mean '{near[0]}'?" if near else (f"it takes {', '.join(known)}." if known else "")
        return f"'{name}'{place}{where} is unknown; {remedy or 'see --help or --print_config for what is accepted.'}"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    causes = [
        line
        for line in lines
        if not re.match(r"(Parser key|Does not validate|Subtypes|Errors|Given value|Not a valid|Expected a)", line)
    ]
    text = " ".join((causes or lines)[:3])
    return f"{text}{where if where not in text else ''}"


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return [p for p in inspect.signature(getattr(import_module(module), name)).parameters if p != "self"]
    except (ImportError, AttributeError, ValueError):
        return []


class SparseCLI(LightningCLI):
    """LightningCLI whose model learns the shape of its data, and which can train the dense model beside the sparse one."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            args=args,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = SparseParser(dump_header=[f"lightning_sparse=={lightning_sparse.__version__}"], **kwargs)
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="A configuration file; later ones go on top.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for shape in ("num_classes", "in_channels", "image_size"):
            parser.link_arguments(f"data.{shape}", f"model.init_args.{shape}", apply_on="instantiate")
        parser.add_argument(
            "--beside_dense",
            type=bool,
            default=False,
            help="After fit, train the same model with the same seed but without the sparse methods, and test both.",
        )

    def after_fit(self) -> None:
        """Test the sparse model beside the dense one, if asked to."""
        config = self.config[self.subcommand]
        if not config.beside_dense:
            return
        sparse = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)[0]
        self._set_seed()
        twin = self.parser.instantiate_classes(self.config)[self.subcommand]
        callbacks = [c for c in twin.trainer.callbacks or [] if not isinstance(c, (Sparsifier, SparsityTable, Checkpoint))]
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = self.trainer_class(**{**twin.trainer, **quiet, "callbacks": callbacks})
        trainer.fit(twin.model, datamodule=twin.data)
        dense = trainer.test(twin.model, datamodule=twin.data, verbose=False)[0]
        if trainer.is_global_zero:
            table = Table("test", "sparse", "dense", title="Same recipe, same seed", title_justify="left")
            for metric in sorted(sparse):
                table.add_row(metric.removeprefix("test/"), f"{sparse[metric]:.4f}", f"{dense[metric]:.4f}")
            Console().print(table)


def main(args: list[str] | None = None) -> None:
    """Entry point of `lightning-sparse`; what this package refuses ends in one sentence, not in a traceback."""
    try:
        SparseCLI(args)
    except (ValueError, FileNotFoundError) as error:
        frames = list(traceback.walk_tb(error.__traceback__))
        if not frames[-1][0].f_globals.get("__name__", "").startswith("lightning_sparse."):
            raise
        print(f"lightning-sparse: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
