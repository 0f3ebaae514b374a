"""The command line: `lightning-sparse fit|refit|export|validate|test|predict --config FILE ...`, and `report RUN...`."""

from __future__ import annotations

import argparse
import difflib
import inspect
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

import lightning.pytorch as pl
import torch
import yaml  # type: ignore[import-untyped]
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lightning_sparse
import lightning_sparse.data
import lightning_sparse.models
import lightning_sparse.observe
from lightning_sparse.core import first_line
from lightning_sparse.export import ExportReport, export_ladder, fresh_start, merge_layers
from lightning_sparse.export import recalibrate as recalibrate_norms
from lightning_sparse.loop import Sparsifier
from lightning_sparse.methods import LayerSparsity
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
        load_weights(model, ckpt_path, "a checkpoint of a fit with LayerSparsity")
        methods = [c for c in self.callbacks if isinstance(c, LayerSparsity)]  # type: ignore[attr-defined]
        ranges = next((method.input_range for method in methods), None)
        merged, report = merge_layers(model, tolerance=tolerance, input_range=ranges, allow_growth=allow_growth)
        assert isinstance(merged, pl.LightningModule)
        rank_zero_only(print)(f"{report}\n")
        tests = is_overridden("test_step", merged)
        before = self.test(merged, datamodule=datamodule, verbose=False)[0] if tests else {}
        if start == "fresh":
            fresh_start(merged)
        for method in methods:  # what they pin the scale by is ordinary regularization, and stays
            method.strength, method.layer_strength = 0.0, None
        self.fit(merged.train(), datamodule=datamodule)
        after = self.test(merged, datamodule=datamodule, verbose=False)[0] if tests else {}
        if tests and self.is_global_zero:
            Console().print(side_by_side("Refit", merged=before, refit=after))
        return merged

    def export(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str = "",
        to: str = "",
        rungs: list[str] | None = None,
        batch_size: int = 64,
        tolerance: float = 1e-5,
        fold: bool = False,
        recalibrate: int = 0,
        input_range: list[float] | None = None,
        rounds: int = 30,
        device: str = "cpu",
        precision: Literal["float32", "bfloat16", "float16"] = "float32",
        overwrite: bool = False,
    ) -> ExportReport:
        """Make a sparse checkpoint smaller and faster: every artifact verified, and measured beside the dense model.

        Args:
            model: that was trained.
            datamodule: whose test set verifies, and whose training set calibrates.
            ckpt_path: the checkpoint; without --config, the configuration of its run is looked for beside it.
            to: the folder to write.
            rungs: of plain, compact, merged, removed, kernels, semi_structured, onnx; null takes all that suit.
            batch_size: in use, beside 1.
            tolerance: the largest change of an output, as a share of the largest.
            fold: batch normalization into the layers in front of it.
            recalibrate: batch normalization on so many training batches before anything else; 0 for none.
            input_range: the least and largest input, by which the first layer may merge.
            rounds: of calls that latency is the median of.
            device: to export for, such as cuda for 2:4.
            precision: of the weights.
            overwrite: files in the folder.
        """
        if not to:
            raise ValueError("to='' names no folder; write --to FOLDER.")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        if recalibrate < 0:
            raise ValueError(
                f"recalibrate={recalibrate} must be a number of batches, or 0 to leave the statistics as they are."
            )
        load_weights(model, ckpt_path, "one of the run to export")
        model = model.eval()
        if recalibrate:
            batches = inputs_of(datamodule, "train")
            measured = recalibrate_norms(model, (x for x, _ in zip(batches, range(recalibrate), strict=False)))
            rank_zero_only(print)(f"batch normalization measured anew: {measured} layers on up to {recalibrate} batches")
        images: list[Tensor] = []
        for x in inputs_of(datamodule, "test"):
            images.append(x)
            if sum(map(len, images)) >= batch_size:
                break
        try:
            model.to(device, getattr(torch, precision))
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f"device='{device}' cannot be used here ({first_line(error)}); write --device=cpu.") from None

        def test(made: nn.Module) -> Mapping[str, float]:
            assert isinstance(made, pl.LightningModule)
            return self.test(made, datamodule=datamodule, verbose=False)[0]

        tests = is_overridden("test_step", model) and precision == "float32"
        report = export_ladder(
            model,
            torch.cat(images)[:batch_size],
            to,
            rungs=rungs,
            tolerance=tolerance,
            fold=fold,
            input_range=input_range,
            rounds=rounds,
            evaluate=test if tests else None,
            overwrite=overwrite,
        )
        rank_zero_only(Console().print)(report.table())
        return report


def load_weights(model: pl.LightningModule, ckpt_path: str, which: str) -> None:
    """Give a model the weights of a checkpoint.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no checkpoint, or holds another model.
    """
    if not Path(ckpt_path).is_file():
        raise FileNotFoundError(f"ckpt_path='{ckpt_path}' is no file; give {which}.")
    with readable(ckpt_path):
        weights = torch.load(ckpt_path, map_location="cpu", weights_only=True)["state_dict"]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise ValueError(f"ckpt_path='{ckpt_path}' holds another model than the one configured: {reason}.") from None


@contextmanager
def readable(ckpt_path: str) -> Iterator[None]:
    """Has a sentence for a file that is no checkpoint.

    Raises:
        ValueError: if reading it fails.
    """
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"ckpt_path='{ckpt_path}' cannot be read as a checkpoint ({said}); give one that a run saved."
        ) from None


def inputs_of(datamodule: pl.LightningDataModule | None, stage: Literal["train", "test"]) -> Iterator[Tensor]:
    """The inputs of batches, without their labels.

    Raises:
        ValueError: if there is no data, or a batch does not begin with a tensor.
    """
    if datamodule is None:
        raise ValueError("an export verifies on real inputs; configure --data.")
    datamodule.prepare_data()
    datamodule.setup("fit" if stage == "train" else "test")
    for batch in datamodule.train_dataloader() if stage == "train" else datamodule.test_dataloader():
        x = batch[0] if isinstance(batch, list | tuple) else batch
        if not isinstance(x, Tensor):
            raise ValueError(
                f"a {stage} batch begins with a {type(x).__name__}, not a tensor; call export_ladder from Python."
            )
        yield x


def with_saved_config(args: list[str], folder: str) -> list[str]:
    """Arguments of an export with the model and data of the run its checkpoint is from, unless they name a configuration.

    Raises:
        FileNotFoundError: if there is no checkpoint.
        ValueError: if none lies beside the checkpoint or above it.
    """
    given = [arg.partition("=")[0] for arg in args]
    if args[:1] != ["export"] or {"-c", "--config", "--model", "-h", "--help"} & set(given) or "--ckpt_path" not in given:
        return args
    position = given.index("--ckpt_path")
    checkpoint = args[position].partition("=")[2] or "".join(args[position + 1 : position + 2])
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"ckpt_path='{checkpoint}' is no file; give one of the run to export.")
    found = next((f for f in (p / "config.yaml" for p in Path(checkpoint).resolve().parents[:4]) if f.is_file()), None)
    if found is None:
        raise ValueError(f"'{checkpoint}' has no config.yaml beside it or above; give the files of its run with --config.")
    saved = yaml.safe_load(found.read_text())
    kept = Path(folder) / "config.yaml"
    kept.write_text(yaml.safe_dump({key: saved[key] for key in ("seed_everything", "model", "data") if key in saved}))
    return ["export", f"--config={kept}", "--trainer.logger=false", *args[1:]]


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
        """Those of Lightning, `refit` and `export`."""
        return {**LightningCLI.subcommands(), "refit": {"model", "datamodule"}, "export": {"model", "datamodule"}}

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

    def _parse_ckpt_path(self) -> None:
        """Where Lightning reads hyperparameters from a checkpoint, and there is no public way to see it first."""
        with readable(str(self.config[self.config.subcommand].get("ckpt_path"))):
            super()._parse_ckpt_path()

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
            return
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python")
            SparseCLI(with_saved_config(given, folder))
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
        if isinstance(error, ValueError | FileNotFoundError) and str(last.f_globals.get("__package__")).startswith(
            "lightning_sparse"
        ):
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
