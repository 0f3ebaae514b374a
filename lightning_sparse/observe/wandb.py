"""The dashboard on Weights & Biases; the only file that imports wandb, and not before it is used."""

from __future__ import annotations

import inspect
import os
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sparse.core import first_line
from lightning_sparse.observe.history import stem

__all__ = ["Dashboard", "PatientWandbLogger", "default_entity", "open_in_group", "stay_offline"]

STEP = "trainer/global_step"
SECTIONS = (
    *("sparsity/*", "layers/*", "layer_targets/*", "cost/*", "best/*", "frontier/*", "export/*"),
    *("survivors/*", "masks/*", "charts/*"),
)
BINS, SAMPLE = 64, 100_000


class Dashboard:
    """What Weights & Biases can show beyond curves; it makes a panel for whatever is logged, so nobody has to click.

    Args:
        logger: of the Trainer; its run may be online or offline, new or resumed.
        facts: the configuration of the run.
        name: of the run, where it has none.
        tags: to find it by, besides those that it has.
    """

    def __init__(self, logger: WandbLogger, facts: Mapping[str, Any], name: str, tags: Sequence[str]) -> None:
        self.logger = logger
        run = logger.experiment
        # Lightning defines the step only for runs that it has opened itself, and a sweep opens them for it.
        run.define_metric(STEP)
        for section in SECTIONS:
            run.define_metric(section, step_metric=STEP)
        run.config.update(dict(facts), allow_val_change=True)
        if not run.name or run.name == run.id or re.fullmatch(r"[a-z]+-[a-z]+-\d+", run.name):  # nobody has chosen it
            run.name = name
        run.tags = tuple(dict.fromkeys([*(run.tags or ()), *tags]))

    def alert(self, title: str, text: str) -> None:
        """Tell whoever has asked Weights & Biases for alerts, once.

        Args:
            title: what has happened.
            text: where, and what to do.
        """
        self.logger.experiment.alert(title=title, text=text, level="WARN")

    def pictures(
        self, step: int, survivors: Mapping[str, Tensor], masks: Mapping[str, Tensor], columns: Sequence[Sequence[float]]
    ) -> None:
        """Histograms of the weights that are left, masks, and the heat map of layers over time.

        Args:
            step: at which they were so.
            survivors: weights that are not zero, by layer.
            masks: two-dimensional, by layer.
            columns: the sparsity of each layer, for each reading so far.
        """
        import wandb

        logged: dict[str, Any] = {}
        for name, values in survivors.items():
            some = values[:: max(1, -(-len(values) // SAMPLE))].float().cpu()
            counts, edges = torch.histogram(some if len(some) else torch.zeros(1), BINS)
            logged[f"survivors/{name}"] = wandb.Histogram(np_histogram=(counts.numpy(), edges.numpy()))
        for name, mask in masks.items():
            large = mask.cpu().byte().mul(255).repeat_interleave(4, 0).repeat_interleave(4, 1)
            logged[f"masks/{name}"] = wandb.Image(large.numpy(), caption="outputs down, inputs across; white is kept")
        left = 1 - torch.tensor(columns, dtype=torch.float32).T
        high, wide = (max(1, 300 // side) for side in left.shape)
        shades = left.mul(255).round().clamp(0, 255).byte().repeat_interleave(high, 0).repeat_interleave(wide, 1)
        caption = "a row for each layer, the first on top; a column for each epoch; darker is sparser"
        logged["charts/layers_over_time"] = wandb.Image(shades.numpy(), caption=caption)
        self.logger.log_metrics(logged, step)

    def conclude(self, step: int, run: Mapping[str, Any]) -> None:
        """The table of layers, and the metric against sparsity.

        Args:
            step: the last.
            run: as the report takes it.
        """
        import wandb

        layers = wandb.Table(columns=["layer", "kept", "of", "density", "target", "dead outputs"])
        for layer, kept in zip(run["layers"], run["rows"][-1]["layers"], strict=True):
            size = layer["size"]
            layers.add_data(layer["name"], kept, size, kept / size, layer["target"], layer["dead"])
        logged: dict[str, Any] = {"charts/layers": layers}
        metric = run["metric"]
        points = [[row["sparsity"], row["metrics"].get(metric), row["epoch"]] for row in run["rows"]] if metric else []
        if points:
            table = wandb.Table(columns=["sparsity", metric, "epoch"], data=points)
            logged[f"charts/{stem(metric).replace('/', '_')}_against_sparsity"] = wandb.plot.scatter(
                table, "sparsity", metric, f"{metric} against sparsity"
            )
        self.logger.log_metrics(logged, step)
        artifact = wandb.Artifact(f"layers-{self._id}", type="sparsity", metadata=_facts(run, run["rows"][-1]))
        artifact.add(layers, "layers")
        self.logger.experiment.log_artifact(artifact)

    def report(self, step: int, page: Path) -> None:
        """The page of the run.

        Args:
            step: the last.
            page: its file.
        """
        import wandb

        logged: dict[str, Any] = {"charts/report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)}
        self.logger.log_metrics(logged, step)

    def checkpoint(self, path: Path, run: Mapping[str, Any]) -> None:
        """The sparse checkpoint as an artifact that knows its sparsity and its accuracy.

        Args:
            path: of the checkpoint; one that falls short of the target is left where it is.
            run: as the report takes it.
        """
        import wandb

        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        weights = [saved["state_dict"][layer["name"]] for layer in run["layers"]]
        zeros = 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)
        if run["target"] is not None and zeros < run["target"] - 1e-6:
            rank_zero_warn(
                f"SparsityMonitor: '{path.name}', the best checkpoint, has sparsity {zeros:.4f}, not {run['target']:.4f}, "
                "and is not uploaded as an artifact; add SparsityCheckpoint, which chooses among those at target."
            )
            return
        row = next((row for row in run["rows"] if row["epoch"] == saved["epoch"]), run["rows"][-1])
        facts = {**_facts(run, row), "sparsity": zeros, "epoch": saved["epoch"], "global_step": saved["global_step"]}
        artifact = wandb.Artifact(f"sparse-model-{self._id}", type="model", metadata=facts)
        artifact.add_file(str(path), "model.ckpt")
        self.logger.experiment.log_artifact(artifact, aliases=["latest", "sparse"])

    @property
    def _id(self) -> str:
        return str(self.logger.version)


class PatientWandbLogger(WandbLogger):
    """Lightning's `WandbLogger`, whose run waits on this machine, with a hint, where there is no account or network.

    Lightning opens runs before any callback is asked, so this cannot be left to one. The command line does it for every
    `WandbLogger`. Whoever sets `WANDB_MODE` has decided already.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        given = inspect.signature(WandbLogger).bind(*args, **options).arguments
        self.decided = bool(given.get("offline") or given.get("experiment"))
        """Whether it is known where the run goes."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run; opened, online or offline, when it is first asked for."""
        if not self.decided and (hint := stay_offline()) is not None:
            rank_zero_warn(hint)
        self.decided = True
        return super().experiment


def open_in_group(logger: Any, group: str) -> None:
    """Open the run of a logger in a group, where the user has given none; Weights & Biases fixes it when a run is opened.

    Args:
        logger: any; others than `WandbLogger` are left alone.
        group: that the seeds of one configuration share.
    """
    if not isinstance(logger, WandbLogger):
        return
    import wandb

    settings = wandb.setup().settings
    before = settings.run_group
    settings.run_group = before or group  # what a logger is given goes first
    try:
        _ = logger.experiment
    finally:
        settings.run_group = before


def default_entity() -> str:
    """Whose account it is.

    Raises:
        ValueError: if there is none.
    """
    import wandb

    try:
        found = wandb.Api().default_entity if _has_key(wandb) else None
    except Exception as error:
        raise ValueError(
            f"Weights & Biases cannot be asked for the account ({first_line(error)}); see `wandb login`."
        ) from None
    if not found:
        raise ValueError("there is no account of Weights & Biases on this machine; `wandb login` stores its key.")
    return str(found)


def _facts(run: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """What to know of an artifact before loading it."""
    return {"method": run["method"], "model": run["model"], "sparsity": row["sparsity"], **row["metrics"]}


def stay_offline(timeout: float = 3.0) -> str | None:
    """Keep runs on this machine if they could not be sent anyway; to be called before a logger opens one.

    Args:
        timeout: seconds after which the network counts as missing.

    Returns:
        What was missing and what to do, in one sentence; None if all is there or the user has chosen a mode.
    """
    if os.environ.get("WANDB_MODE"):
        return None
    import wandb

    settings = wandb.setup().settings
    address = urlparse(str(settings.base_url))
    if not _has_key(wandb):
        missing = "there is no API key (`wandb login` stores one)"
    else:
        try:
            socket.create_connection((address.hostname, address.port or 443), timeout).close()
            return None
        except OSError:
            missing = f"{address.hostname} cannot be reached"
    os.environ["WANDB_MODE"] = settings.mode = "offline"  # processes started from here; this one has read it already
    return f"Weights & Biases stays offline, because {missing}; `wandb sync DIR` sends the run later."


def _has_key(wandb: Any) -> bool:
    try:
        return bool(wandb.login(prompt=False))
    except TypeError:  # of versions that can only ask
        return bool(wandb.api.api_key)
    except Exception:  # a key that cannot be verified now; whether the network is there is asked next
        return True
