"""The command line: `lightning-sparse fit|refit|validate|test|predict --config FILE ...`, and `report RUN...`."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning.pytorch as pl
import torch
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.table import Table

import lightning_sparse
import lightning_sparse.data
import lightning_sparse.models
import lightning_sparse.observe
from lightning_sparse.callbacks import LayerSparsity, Sparsifier
from lightning_sparse.export import fresh_start, merge_layers
from lightning_sparse.observe import SparsityMonitor, SparsityTable
from lightning_sparse.observe.report import find_reports, read_report, write_report
from lightning_sparse.observe.wandb import stay_offline

__all__ = ["SparseCLI", "main"]


class SparseParser(LightningArgumentParser):
    """Says what is wrong in one sentence: which key, and what to write instead."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        print(f"lightning-sparse: {explain(str(message))}", file=sys.stderr)
        sys.exit(2)


# As different versions of the parser say it.
_UNKNOWN_OPTION = r"Option '([^']+)' is not accepted|Key '([^']+)' is not expected|[Uu]nrecognized arguments: -*([\w.]+)"


def explain(message: str) -> str:
    """One sentence from the parser's report: the key, what is wrong with it, what to write instead.

    Example:
        >>> explain("Option 'sparsitty' is not accepted")
        "'sparsitty' is not an option; did you mean 'sparsity'?"
    """
    key = re.search(r'[Pp]arser key "([^"]+)"', message)
    where = f" in {key[1]}" if key else ""
    if unknown := re.search(_UNKNOWN_OPTION, message):
        name = next(filter(None, unknown.groups()))
        return f"'{name}'{where} is not an option; {_nearest_option(name)}"
    if unknown := re.search(r"Expected a dot import path string: (\w+)", message):
        near = difflib.get_close_matches(unknown[1], [cls.__name__ for cls in _known_classes()], n=1, cutoff=0.5)
        remedy = f"did you mean '{near[0]}'?" if near else "write its import path, such as package.module.Class."
        return f"'{unknown[1]}'{where} is no known class; {remedy}"
    noise = r"Parser key |Does not validate|Subtypes|Errors|Given value( type|: \[Namespace)|Not a valid|Expected a path but"
    lines = [line.strip(" -") for line in re.sub(r'[Pp]arser key "[^"]+":', "", message).splitlines()]
    causes = list(dict.fromkeys(line for line in lines if line and not re.match(noise, line)))
    text = re.sub(r"<class '([^']+)'>", r"\1", "; ".join(causes))
    return f"{key[1]}: {text}" if key else text


def _nearest_option(name: str) -> str:
    """Which option was meant, and whose it is if that is a short list."""
    path, _, name = name.rpartition(".")
    owners: dict[str, list[str]] = {}
    for cls in [pl.Trainer] if path == "trainer" else _known_classes():
        for option in inspect.signature(cls).parameters:
            owners.setdefault(option, []).append(cls.__name__)
    near = difflib.get_close_matches(name, owners, n=1, cutoff=0.5)
    if not near:
        return "see --help and --print_config for what is known."
    whose = f" of {' or '.join(owners[near[0]])}" if len(owners[near[0]]) < 3 else ""
    return f"did you mean '{near[0]}'{whose}?"


def _known_classes() -> list[type]:
    """Classes of this package that configs name."""
    modules = (lightning_sparse, lightning_sparse.models, lightning_sparse.data, lightning_sparse.observe)
    return [cls for module in modules for name in module.__all__ if inspect.isclass(cls := getattr(module, name))]


class SparseTrainer(pl.Trainer):
    """A Trainer that can also train a merged network on, as `lightning-sparse refit` does."""

    def refit(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str = "",
        start: Literal["warm", "fresh"] = "warm",
        tolerance: float = 1e-3,
        allow_growth: bool = False,
    ) -> pl.LightningModule:
        """Merge the linear layers of a trained model and fit what is left once more, without the layer penalty.

        Args:
            model: whose layers are merged.
            datamodule: to fit it to.
            ckpt_path: the checkpoint of a fit with LayerSparsity.
            start: from the merged weights (`warm`), or from new ones in the same structure (`fresh`).
            tolerance: the largest ratio of negative part to whole of a layer that is merged.
            allow_growth: merge also where the product has more parameters than its factors.
        """
        if not Path(ckpt_path).is_file():
            raise FileNotFoundError(f"ckpt_path='{ckpt_path}' is no file; give a checkpoint of a fit with LayerSparsity.")
        saved = torch.load(ckpt_path, map_location="cpu", weights_only=True)
        try:
            model.load_state_dict(saved["state_dict"])
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"ckpt_path='{ckpt_path}' holds another model than the one configured: {reason}.") from None
        methods = [c for c in self.callbacks if isinstance(c, LayerSparsity)]  # type: ignore[attr-defined]
        ranges = next((method.input_range for method in methods), None)
        merged, report = merge_layers(model, tolerance=tolerance, input_range=ranges, allow_growth=allow_growth)
        assert isinstance(merged, pl.LightningModule)
        rank_zero_only(print)(f"{report}\n")
        tests = is_overridden("test_step", merged)
        before = self.test(merged, datamodule=datamodule, verbose=False)[0] if tests else {}
        if start == "fresh":
            fresh_start(merged)
        for method in methods:  # what they pin the scale by is ordinary regularisation, and stays
            method.strength, method.layer_strength = 0.0, None
        self.fit(merged.train(), datamodule=datamodule)
        after = self.test(merged, datamodule=datamodule, verbose=False)[0] if tests else {}
        if tests and self.is_global_zero:
            Console().print(side_by_side("Refit", merged=before, refit=after))
        return merged


def side_by_side(title: str, **results: Mapping[str, float]) -> Table:
    """Metrics of several tests, a column each."""
    table = Table("test", *results, title=title, title_justify="left")
    for metric in sorted(next(iter(results.values()))):
        table.add_row(metric.removeprefix("test/"), *(f"{result[metric]:.4f}" for result in results.values()))
    return table


class SparseCLI(LightningCLI):
    """LightningCLI whose model learns the shape of its data, and which can train the dense model beside the sparse one."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            trainer_class=SparseTrainer,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of Lightning, and `refit`."""
        return {**LightningCLI.subcommands(), "refit": {"model", "datamodule"}}

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

    def before_fit(self) -> None:
        """Refuse before training what would fail after it."""
        config = self.config[self.subcommand]
        if config.beside_dense and config.seed_everything is False:
            raise ValueError("beside_dense needs a seed, so that both models start alike; set seed_everything.")
        if config.beside_dense and not is_overridden("test_step", self.model):
            raise ValueError(f"beside_dense tests both models, but {type(self.model).__name__} has no test_step; write one.")

    def before_instantiate_classes(self) -> None:
        """A run that cannot be sent stays here, and the rest of it goes on."""
        logger = str(self.config[self.subcommand].get("trainer.logger", ""))
        if "WandbLogger" in logger and (hint := stay_offline()) is not None:
            rank_zero_only(print)(f"lightning-sparse: {hint}", file=sys.stderr)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Two methods of one class need names, or checkpoints could not tell them apart."""
        made = self.config_init[self.subcommand].trainer.callbacks or []
        keys = [callback.state_key for callback in made if isinstance(callback, Sparsifier)]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice:
            raise ValueError(f"{twice} is configured twice; keep one, or give each its own targets and a name.")
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Test the sparse model beside the dense one, if asked to."""
        config = self.config[self.subcommand]
        if not config.beside_dense:
            return
        sparse = self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)[0]
        pl.seed_everything(config.seed_everything, workers=True)
        self.save_config_callback = None  # what the sparse run has written stands
        self.instantiate_classes()  # model, data and callbacks once more, new, with the same arguments
        ours = (Sparsifier, SparsityMonitor, SparsityTable, Checkpoint, SaveConfigCallback)
        callbacks = [c for c in self.config_init[self.subcommand].trainer.callbacks or [] if not isinstance(c, ours)]
        quiet = {"logger": DummyLogger(), "enable_checkpointing": False, "enable_model_summary": False}
        trainer = self.instantiate_trainer(callbacks=callbacks, **quiet)
        trainer.fit(self.model, datamodule=self.datamodule)
        dense = trainer.test(self.model, datamodule=self.datamodule, verbose=False)[0]
        if trainer.is_global_zero:
            Console().print(side_by_side("Same recipe, same seed", sparse=sparse, dense=dense))


def report(args: list[str]) -> None:
    """`lightning-sparse report RUN...`: one page about several runs."""
    parser = argparse.ArgumentParser("lightning-sparse report", description="Lay runs side by side in one page.")
    parser.add_argument("runs", nargs="+", help="folders of runs, or their report.html")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="the page (default: comparison.html)")
    asked = parser.parse_args(args)
    write_report(asked.output, *(run for file in find_reports(asked.runs) for run in read_report(file)))
    print(asked.output)


def main(args: list[str] | None = None) -> None:
    """Entry point of `lightning-sparse`; what this package refuses ends in one sentence, not in a traceback."""
    given = sys.argv[1:] if args is None else args
    try:
        if given[:1] == ["report"]:
            report(given[1:])
        else:
            SparseCLI(args)
    except Exception as error:
        refusal = _our_refusal(error)
        if refusal is None:
            raise
        print(f"lightning-sparse: {refusal}", file=sys.stderr)
        sys.exit(2)


def _our_refusal(error: BaseException | None) -> str | None:
    """What this package has refused, if that is what an error comes from."""
    if isinstance(error, MisconfigurationException):
        return " ".join(str(error).split())
    while error is not None:
        *_, (last, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ValueError | FileNotFoundError) and last.f_globals["__name__"].startswith("lightning_sparse."):
            return str(error)
        if (
            isinstance(error, ValueError)
            and error.__context__ is None
            and last.f_globals["__name__"].startswith("jsonargparse")
        ):
            causes = re.findall(r"^\s*- (\w+=.+)$", str(error), flags=re.M)  # older versions keep only the text of a refusal
            return causes[0] if causes else None
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    main()
