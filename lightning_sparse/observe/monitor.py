"""Log what the methods of a Trainer do to its model, to any logger."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich import get_console
from torch import Tensor, nn

from lightning_sparse.core import (
    Call,
    Masks,
    Target,
    changed_share,
    count_dead,
    count_macs,
    count_nonzero,
    describe,
    effective_macs,
    is_cut,
    parts_of,
)
from lightning_sparse.loop.dry_run import dry_run, size_of, take_step, train_but_leaves
from lightning_sparse.loop.phase import phase_of
from lightning_sparse.loop.privates import logged_step
from lightning_sparse.loop.sparsifier import Sparsifier, sparsifiers
from lightning_sparse.observe.asked import AskedMetric
from lightning_sparse.observe.facts import command_line_of, describe_run, name_of, tags_of
from lightning_sparse.observe.history import History, best_of, choose_metric
from lightning_sparse.observe.loggers import conclude, introduce
from lightning_sparse.observe.page import Run
from lightning_sparse.observe.pictures import corner, picture
from lightning_sparse.observe.report import FILE, describe_machine, why_unwritable, write_report
from lightning_sparse.observe.table import render
from lightning_sparse.observe.wandb import Dashboard

__all__ = ["SparsityMonitor", "run_folder"]

PICTURES = 3
"""Number of masks that are drawn, starting with the first layer."""


@dataclass(frozen=True)
class _Concluded:
    """A finished fit, to which later tests add their results."""

    run: Run
    page: Path | None
    step: int
    module: int
    boards: list[Dashboard]


@final
class SparsityMonitor(Callback):
    """Log overall and per-layer sparsity to every logger of the Trainer, and print a table at the end.

    Finds all methods by itself. At Lightning's log steps it logs target and actual sparsity, overall and by method, from
    counts that exist anyway. Once per epoch, at the cost of a few passes over the masks, it logs each layer, exact zeros as
    a second reading, churn, dead outputs, effective MACs and parameters. It does nothing in between. Holds one byte per
    masked weight. Once, at the start, it runs one forward pass of a copy of the module to count its MACs.

    Args:
        metric: the logged metric for the accuracy curves; None uses validation accuracy, or the closest match.
        table: print what is left of each layer when training ends.
        report: write `report.html`, one self-contained page, beside the logs of the first logger or into the Trainer's
            `default_root_dir`; `lightning-sparse report` compares several side by side.
        artifacts: upload the best checkpoint to Weights & Biases, with its sparsity and accuracy.

    Raises:
        ValueError: if a metric is never logged (before the first step, or after the first epoch if that could not be known
            earlier), or if there is no disk space for the report.
    """

    def __init__(self, metric: str | None = None, table: bool = True, report: bool = True, artifacts: bool = True) -> None:
        self.metric, self.table, self.report, self.artifacts = metric, table, report, artifacts
        self.history = History()
        """One row of readings per epoch."""
        self.macs: dict[str, int] = {}
        """MACs of the dense model by weight; empty if they could not be counted."""
        self._targets: dict[str, Target] = {}
        self._before: dict[str, Tensor] = {}
        self._boards: list[Dashboard] = []
        self._seen, self._begun = -1, False
        self._dead: set[str] = set()
        self._concluded: _Concluded | None = None
        self._asked = AskedMetric(metric)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history.load_state_dict(state_dict["history"])

    # ---- the run -----------------------------------------------------------------------------------------------------

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._begun = False
        self._asked.begin()
        if stage == "fit" and not sparsifiers(trainer):
            rank_zero_info("SparsityMonitor: no method of lightning_sparse in this Trainer; only exact zeros are counted.")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen, self._begun, self._concluded = trainer.global_step, False, None
        self._dead = set()
        if trainer.global_step == 0:
            self.history = History()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._asked.after_validation(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._asked.after_epoch(trainer)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self._asked.before_training(trainer, pl_module, batch)
        if not self._begun and (trainer.is_global_zero or is_cut(pl_module)):  # by now all methods have
            self._begun = True
            self._begin(trainer, pl_module, batch)

    def _begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        methods = sparsifiers(trainer)
        masked = [target for method in methods if method.mask_set is not None for target in method.chosen]
        chosen = masked or _weights_of(pl_module) or [target for method in methods for target in method.chosen]
        self._targets = {target.name: target for target in chosen}
        if not chosen:
            rank_zero_warn(
                f"SparsityMonitor: {type(pl_module).__name__} has no convolution, linear layer or attention projection, and "
                "no method has chosen other weights, so nothing is counted and no report is written; add a method with "
                "targets=['type:<class>'], or remove SparsityMonitor."
            )
            return
        if self.report and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = run_folder(trainer)
            if (reason := why_unwritable(folder)) is not None:
                raise ValueError(
                    f"SparsityMonitor cannot write its report into '{folder}' ({reason}); choose another "
                    "default_root_dir, or write report=False."
                )
        self._before = self._masks(trainer)
        if is_cut(pl_module):
            rank_zero_info("SparsityMonitor: MACs are not counted, because weights are sharded.")
        else:
            self.macs = self.macs or _dense_macs(trainer, pl_module, batch)
        if trainer.is_global_zero:
            facts, name, tags = describe_run(trainer, pl_module), name_of(trainer), tags_of(trainer)
            self._boards = [Dashboard(one, facts, name, tags) for one in trainer.loggers if isinstance(one, WandbLogger)]
            introduce(trainer, facts)
        plain = [type(logger).__name__ for logger in trainer.loggers if not isinstance(logger, WandbLogger | DummyLogger)]
        if plain:
            receive = "receives" if len(plain) == 1 else "receive"
            where = f"; pictures are in {FILE}" if self.report else ""
            rank_zero_info(f"SparsityMonitor: {' and '.join(plain)} {receive} numbers only{where}.")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen:
            return  # gradients are gathered
        self._seen = trainer.global_step
        if trainer.loggers and (logged_step(trainer) + 1) % max(trainer.log_every_n_steps, 1) == 0:  # type: ignore[attr-defined]
            self._log(trainer, _sparsities(sparsifiers(trainer)), logged_step(trainer))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._begun and self._targets:
            row = self._read(trainer, pl_module)
            self.history.add(row)
            self._warn(row)
            self._log(trainer, {**self._numbers(row), **self._layers(row, sparsifiers(trainer))}, row["step"])
            self._show(trainer, row)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._before = {}
        if not (self._begun and self.history.rows):  # no batch, nothing to show, or a rank that is not needed
            return
        try:
            self._asked.after_epoch(trainer)
        except ValueError as error:  # the only epoch is over, and its results stay
            rank_zero_warn(str(error))
        row = self.history.rows[-1]
        self._log(trainer, self._summary(), row["step"])
        conclude(trainer, describe_run(trainer, pl_module), {**self._numbers(row), **self._summary()})
        if self.table:
            for method in sparsifiers(trainer):
                if isinstance(masks := method.mask_set, Masks) and len(masks):
                    rows = method.summary()  # all ranks count together
                    if trainer.is_global_zero:
                        get_console().print("", render(rows, title=method.label))
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._conclude(trainer, pl_module, row["step"])

    def _conclude(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: int) -> None:
        """Write the report for browsers, and the same for dashboards."""
        folder = run_folder(trainer)
        run = self._describe(trainer, pl_module, folder)
        if not trainer.is_global_zero:
            return
        self._concluded = _Concluded(run, folder / FILE if self.report else None, step, id(pl_module), self._boards)
        if self._write():
            rank_zero_info(f"SparsityMonitor: see {folder / FILE}")
        best = _best_checkpoint(trainer)
        for board in self._boards:
            board.conclude(step, run)
            if run["rows"][-1]["phase"] not in (None, "at target"):
                text = (
                    f"{run['title']} ends at sparsity {run['rows'][-1]['sparsity']:.4f}, short of its target; train longer."
                )
                board.alert("The target was missed", text)
            if best and self.artifacts:
                board.checkpoint(best, run)
        self._boards = []

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add a test of the same module after the fit to its report."""
        done = self._concluded
        if done is not None and done.module == id(pl_module) and trainer.is_global_zero:
            done.run["test"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self._write()

    def beside_dense(self, tested: Mapping[str, float]) -> None:
        """Add the test results of a dense model, trained with the same recipe, to those of the last fit.

        Args:
            tested: what `Trainer.test` returned for it.
        """
        if self._concluded is not None:
            self._concluded.run["dense"]["test"] = {name: float(value) for name, value in tested.items()}
            self._write()

    def _write(self) -> bool:
        """Write the page; returns whether it exists now."""
        done = self._concluded
        assert done is not None
        if done.page is None:
            return False
        try:
            write_report(done.page, done.run)
        except OSError as error:  # training is over, and is worth more than its report
            rank_zero_warn(
                f"SparsityMonitor: '{done.page}' cannot be written ({error.strerror or error}), and the run continues "
                f"without "
                "it; free some space, and a test of the model in this process writes it again."
            )
            return False
        for board in done.boards:
            board.report(done.step, done.page)
        return True

    def _whole(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks that are drawn; with sharded weights, all ranks must call it, and the first one gets them."""
        layouts = {name: self._targets[name].layout for name in list(masks)[:PICTURES]}
        return {name: masks[name] if layout is None else layout.gather(masks[name]) for name, layout in layouts.items()}

    # ---- readings ----------------------------------------------------------------------------------------------------

    def _masks(self, trainer: pl.Trainer) -> dict[str, Tensor]:
        masked = [masks for method in sparsifiers(trainer) if (masks := method.mask_set) is not None]
        return {name: masks[name] for masks in masked for name in masks}

    @torch.no_grad()
    def _read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Everything that is known now."""
        methods, masks = sparsifiers(trainer), self._masks(trainer)
        weights = {name: target.weight for name, target in self._targets.items()}
        nonzero = count_nonzero(weights, self._targets)
        kept = {**nonzero, **count_nonzero(masks, self._targets)}
        total = sum(target.size for target in self._targets.values())
        dead = count_dead({name: masks.get(name, weight) for name, weight in weights.items()}, self._targets)
        row: dict[str, Any] = {
            "epoch": trainer.current_epoch,
            "step": logged_step(trainer) - 1,  # that of the epoch's last batch, which Lightning logs epochs at
            "phase": phase_of(methods),
            "sparsity": 1 - sum(kept.values()) / total,
            "zeros": 1 - sum(nonzero.values()) / total,
            "dead_outputs": sum(dead.values()),
            "parameters": sum(p.numel() for p in pl_module.parameters()) - total + sum(kept.values()),
            "layers": list(kept.values()),
            "metrics": {
                name: float(value) for name, value in trainer.callback_metrics.items() if not name.startswith("sparsity")
            },
        }
        if masks:
            row["churn"] = changed_share(self._before, masks, self._targets)
            self._before = masks
        if self.macs:
            row["macs"] = sum(effective_macs(self.macs, masks or weights).values())
        return row

    def _numbers(self, row: Mapping[str, Any]) -> dict[str, float]:
        """A row in logged form."""
        numbers = {f"sparsity/{key}": row[key] for key in ("zeros", "churn", "dead_outputs") if key in row}
        numbers |= {"sparsity/actual": row["sparsity"], "cost/parameters": row["parameters"]}
        if "macs" in row:
            numbers |= {"cost/macs": row["macs"], "cost/macs_fraction": row["macs"] / sum(self.macs.values())}
        return numbers

    def _summary(self) -> dict[str, float]:
        """The results of a run: the best of its last phase, and its position among other runs."""
        row = self.history.rows[-1]
        numbers = {"frontier/density": 1 - row["sparsity"]}
        metric = choose_metric(row["metrics"], self.metric)
        if metric and (best := best_of(self.history.rows, metric)):
            numbers |= {f"best/{metric}": best["metrics"][metric], "best/epoch": best["epoch"]}
        return numbers

    def _warn(self, row: Mapping[str, Any]) -> None:
        """Warn at once about layers with no weights left."""
        for name, kept in zip(self._targets, row["layers"], strict=True):
            if kept == 0 and name not in self._dead:
                self._dead.add(name)
                for board in self._boards:
                    text = (
                        f"{name} has no weight left after epoch {row['epoch'] + 1}; lower its sparsity with layer_sparsity."
                    )
                    board.alert("A layer is dead", text)

    def _layers(self, row: Mapping[str, Any], methods: list[Sparsifier]) -> dict[str, float]:
        """The sparsity of each layer, and its target where that is known."""
        sizes = {name: target.size for name, target in self._targets.items()}
        actual = {f"layers/{name}": 1 - kept / sizes[name] for name, kept in zip(sizes, row["layers"], strict=True)}
        goals = {name: kept for method in methods for name, kept in method.goal["layers"].items()}
        return actual | {f"layer_targets/{name}": 1 - kept / sizes[name] for name, kept in goals.items()}

    def _show(self, trainer: pl.Trainer, row: Mapping[str, Any]) -> None:
        """Log pictures about twenty times per run."""
        epochs = trainer.max_epochs or 0
        last = row["epoch"] + 1 == epochs
        if not self._boards or (row["epoch"] % max(1, epochs // 20) and not last):
            return
        weights = {name: target.weight.detach() for name, target in self._targets.items()}
        survivors = {name: weight[weight != 0] for name, weight in weights.items()}
        whole = self._whole(self._masks(trainer))
        if not trainer.is_global_zero:
            return
        masks = {name: corner(mask) for name, mask in whole.items()}
        sizes = [target.size for target in self._targets.values()]
        columns = [[1 - kept / size for kept, size in zip(row["layers"], sizes, strict=True)] for row in self.history.rows]
        for board in self._boards:
            board.pictures(row["step"], survivors, masks, columns)

    def _describe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, folder: Path) -> dict[str, Any]:
        """The run in the form that the report takes."""
        methods, masks = sparsifiers(trainer), self._masks(trainer)
        rows = self.history.rows
        goals = {name: kept for method in methods for name, kept in method.goal["layers"].items()}
        totals = [method.goal["total"] for method in methods if method.mask_set is not None]
        sizes = {name: target.size for name, target in self._targets.items()}
        known = totals and None not in totals
        dead = count_dead({name: masks.get(name, target.weight) for name, target in self._targets.items()}, self._targets)
        layers = [
            {
                "name": name,
                "size": sizes[name],
                "outputs": target.outputs,
                "dead": dead[name],
                "target": goals.get(name),
            }
            for name, target in self._targets.items()
        ]
        kinds = [type(method).__name__ for method in methods] or ["dense"]
        labels = [method.label for method in methods] or ["Dense"]
        inside = [type(child).__name__ for child in pl_module.children() if any(True for _ in child.parameters())]
        model = f"{type(pl_module).__name__} ({', '.join(inside)})" if inside else type(pl_module).__name__
        return {
            "title": f"{' + '.join(labels)} on {model}",
            "name": "/".join(folder.resolve().parts[-2:]),
            "method": " + ".join(kinds),
            "model": model,
            "seed": os.environ.get("PL_GLOBAL_SEED"),
            "metric": choose_metric(rows[-1]["metrics"], self.metric),
            "target": 1 - sum(totals) / sum(sizes.values()) if known else None,
            "dense": {"parameters": sum(p.numel() for p in pl_module.parameters()), "macs": sum(self.macs.values())},
            "layers": layers,
            "rows": rows,
            "pictures": {name: picture(mask) for name, mask in self._whole(masks).items() if mask.numel()},
            "config": _config(trainer, pl_module),
            "machine": describe_machine(),
        }

    def _log(self, trainer: pl.Trainer, numbers: Mapping[str, float], step: int) -> None:
        if numbers and trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.log_metrics(dict(numbers), step=step)


def _best_checkpoint(trainer: pl.Trainer) -> Path | None:
    """The file of the best model: at target sparsity, if a callback selected for that."""
    found = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]  # type: ignore[attr-defined]
    found.sort(key=lambda callback: getattr(callback, "phase", None) != "at target")
    paths = [Path(callback.best_model_path) for callback in found if callback.best_model_path]
    return next((path for path in paths if path.is_file()), None)


def run_folder(trainer: pl.Trainer) -> Path:
    """The folder where a run writes: its own folder if a logger provides one."""
    for logger in trainer.loggers:
        if getattr(logger, "log_dir", None):
            return Path(str(logger.log_dir))
        if logger.save_dir:
            version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
            return Path(logger.save_dir) / str(logger.name) / version
    return Path(trainer.default_root_dir)


def _config(trainer: pl.Trainer, module: pl.LightningModule) -> str:
    """The configuration of the run: complete from the command line, otherwise the hyperparameters of methods and module."""
    if (saved := command_line_of(trainer)) is not None:
        return str(saved.parser.dump(saved.config, skip_none=False))
    known: dict[str, Any] = {method.label: method.config() for method in sparsifiers(trainer)}
    known |= {
        type(module).__name__: dict(module.hparams),
        "Trainer": {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps},
    }
    return json.dumps(known, indent=1, default=str)


def _weights_of(module: nn.Module) -> list[Target]:
    """The weights that methods choose by default, frozen or not."""
    names = [candidate.name for candidate in describe(module, ["*"], frozen=True) if candidate.chosen]
    layers, parts = [module.get_submodule(name.rpartition(".")[0]) for name in names], parts_of(module)
    return [Target.of(name, parts[name], layer) for name, layer in zip(names, layers, strict=True)]


def _sparsities(methods: list[Sparsifier]) -> dict[str, float]:
    """Target and actual sparsity, overall and by method if there are several; waits for the device only for live masks."""
    masked = [(method, masks) for method in methods if (masks := method.mask_set) is not None]
    if not masked:
        return {}
    kept, total = [masks.kept for _, masks in masked], [masks.total for _, masks in masked]
    numbers = {}  # `sparsity/actual` is logged by the methods
    goals = [method.goal["total"] for method, _ in masked]
    if None not in goals:
        numbers["sparsity/target"] = 1 - sum(goals) / sum(total)
    if (phase := phase_of(methods)) is not None:
        numbers["sparsity/at_target"] = float(phase == "at target")
    if len(masked) > 1:
        for (method, _), left, size in zip(masked, kept, total, strict=True):
            numbers[f"sparsity/{method.label}"] = 1 - left / size
    return numbers


def _dense_macs(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> dict[str, int]:
    """MACs per sample of a forward pass, or of `training_step`; counted on a copy that logs nothing."""
    example = module.example_input_array
    inputs = batch[0] if isinstance(batch, list | tuple) and batch else batch
    inputs = inputs[:1] if isinstance(inputs, Tensor) and inputs.ndim else inputs  # one sample is enough
    ways: list[tuple[int, Callable[[Any], Any], Callable[[Any], Any]]] = [
        (size_of(inputs), lambda twin: twin(inputs), nn.Module.eval),
        (size_of(batch), lambda twin: take_step(twin, batch, 0), nn.Module.eval),
        (size_of(batch), lambda twin: take_step(twin, batch, 0), train_but_leaves),
    ]
    if example is not None:
        call = Call.of(example)
        ways.insert(0, (call.samples, call, nn.Module.eval))
    reasons = []
    for samples, run, set_mode in ways:
        try:
            with dry_run(trainer, module) as twin, trainer.precision_plugin.forward_context():
                counted = count_macs(twin, functools.partial(run, twin), samples, set_mode)
        except Exception as error:
            reasons.append(" ".join(f"{type(error).__name__}: {error}".split())[:120])
        else:
            if counted:
                return counted
    rank_zero_warn(f"SparsityMonitor: MACs are not counted, because no forward pass succeeded ({'; '.join(reasons)}).")
    return {}
