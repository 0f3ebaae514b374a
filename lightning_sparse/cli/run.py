"""LightningCLI with `refit` and `export`, models that fit their data, and the dense model beside the sparse one."""

from __future__ import annotations

import copy
import re
import sys
from typing import Any

import lightning.pytorch as pl
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich import get_console

from lightning_sparse._version import __version__
from lightning_sparse.cli.checkpoints import check_fit, usable
from lightning_sparse.cli.checks import check_overridden, check_settings, leave_out_shapes
from lightning_sparse.cli.parser import SparseParser
from lightning_sparse.cli.progress import OneLineBar
from lightning_sparse.cli.results import side_by_side
from lightning_sparse.cli.saved_config import SaveRunConfig
from lightning_sparse.cli.trainer import SparseTrainer
from lightning_sparse.loop import Sparsifier
from lightning_sparse.observe import AtomicCheckpointIO, SparsityMonitor, SparsityTable
from lightning_sparse.observe.facts import group_of
from lightning_sparse.observe.wandb import open_in_group, stay_offline

__all__ = ["SparseCLI", "options"]

COMMANDS = {**LightningCLI.subcommands(), "refit": {"model", "datamodule"}, "export": {"model", "datamodule"}}
"""Commands, and the arguments of their methods that are not options."""


class SparseCLI(LightningCLI):
    """LightningCLI that sets the model's shape from its data, and can train the dense model beside the sparse one."""

    def __init__(self, args: list[str] | None = None) -> None:
        self.parsers: list[LightningArgumentParser] = []
        """The main parser, then one for each command."""
        self._asked = next((arg for arg in args or () if arg in COMMANDS), None)
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            save_config_callback=SaveRunConfig,
            trainer_class=SparseTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Lightning's commands, `refit` and `export`; only the requested one, because each takes a second to prepare."""
        return COMMANDS if self._asked is None else {self._asked: COMMANDS[self._asked]}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = SparseParser(dump_header=[f"lightning_sparse=={__version__}"], **kwargs)
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="A configuration file; later ones override earlier ones."
        )
        self.parsers.append(parser)
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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse invalid settings before anything is created."""
        super().parse_arguments(parser, args)
        command = self.config.subcommand
        config = self.config[command]
        check_settings(command, config)
        if ckpt_path := config.get("ckpt_path"):
            config["ckpt_path"] = usable(ckpt_path, resume=command == "fit")
        self._model_given = copy.deepcopy(config.model)

    def after_instantiate_classes(self) -> None:
        """Refuse a checkpoint of another network before the data is read."""
        if ckpt_path := self.config[self.subcommand].get("ckpt_path"):
            check_fit(self.model, ckpt_path)

    def before_fit(self) -> None:
        """Refuse before training what would fail after it."""
        config = self.config[self.subcommand]
        if config.beside_dense and config.seed_everything is False:
            raise ValueError("beside_dense needs a seed, so that both models start the same; set seed_everything.")
        if config.beside_dense and not is_overridden("test_step", self.model):
            raise ValueError(f"beside_dense tests both models, but {type(self.model).__name__} has no test_step; write one.")
        for logger in self.trainer.loggers:
            open_in_group(logger, group_of(self.trainer))

    def before_instantiate_classes(self) -> None:
        """Say what a checkpoint overrides; keep a run on this machine if it cannot be sent, and continue."""
        config = self.config[self.subcommand]
        if ckpt_path := config.get("ckpt_path"):
            leave_out_shapes(config.model)
            check_overridden(self._model_given, config.model, ckpt_path)
        logger = str(config.get("trainer.logger", ""))
        if "WandbLogger" in logger and (hint := stay_offline()) is not None:
            rank_zero_only(print)(f"lightning-sparse: {hint}", file=sys.stderr)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Two methods of one class need names, or checkpoints could not distinguish them; the bar stays on one line."""
        settings = self.config_init[self.subcommand].trainer
        made = settings.callbacks if isinstance(settings.callbacks, list) else [one for one in (settings.callbacks,) if one]
        keys = [callback.state_key for callback in made if isinstance(callback, Sparsifier)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice:
            raise ValueError(f"{twice} is configured twice; keep one, or give each its own targets and a name.")
        callbacks = kwargs.get("callbacks", made)
        if settings.enable_progress_bar is not False and not any(isinstance(one, ProgressBar) for one in callbacks):
            kwargs["callbacks"] = [*callbacks, OneLineBar()]
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the user has not chosen another
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def after_fit(self) -> None:
        """Test the sparse model beside the dense one, if requested."""
        config = self.config[self.subcommand]
        if not config.beside_dense:
            return
        monitors = [c for c in self.trainer.callbacks if isinstance(c, SparsityMonitor)]  # type: ignore[attr-defined]
        sparse = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)[0]
        pl.seed_everything(config.seed_everything, workers=True)
        self.save_config_callback = None  # keep what the sparse run has written
        self.instantiate_classes()  # new model, data and callbacks, with the same arguments
        ours = (Sparsifier, SparsityMonitor, SparsityTable, Checkpoint, SaveConfigCallback)
        callbacks = [c for c in self.config_init[self.subcommand].trainer.callbacks or [] if not isinstance(c, ours)]
        quiet: dict[str, Any] = {"logger": DummyLogger(), "log_every_n_steps": 0}
        quiet |= {"enable_checkpointing": False, "enable_model_summary": False}
        trainer = self.instantiate_trainer(callbacks=callbacks, **quiet)
        trainer.fit(self.model, datamodule=self.datamodule)
        dense = trainer.test(self.model, datamodule=self.datamodule, verbose=False)[0]
        for monitor in monitors:
            monitor.beside_dense(dense)
        if trainer.is_global_zero:
            get_console().print(side_by_side("Same recipe, same seed", sparse=sparse, dense=dense))


class _Parsers(Exception):
    """Raised with the parsers, instead of parsing."""


class _Listing(SparseCLI):
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        raise _Parsers(self.parsers)


def options() -> dict[str, list[str]]:
    """The options of every command."""
    try:
        _Listing([])
    except _Parsers as made:
        commands = dict(zip(COMMANDS, made.args[0][1:], strict=True))
    return {
        name: list(dict.fromkeys(re.findall(r"^ +(?:-\w(?: \w+)?, )?(--[\w.]+)", parser.format_help(), flags=re.M)))
        for name, parser in commands.items()
    }
