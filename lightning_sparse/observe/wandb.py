"""The dashboard on Weights & Biases; the only file that imports wandb, and only when it is used."""

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
    """What Weights & Biases can show beyond curves; it makes a panel for everything that is logged, without any clicks.

    Args:
        logger: logger of the Trainer; its run may be online or offline, new or resumed.
        facts: the configuration of the run.
        name: name of the run, if it has none.
        tags: tags added to those that it has.
    """

    def __init__(self, logger: WandbLogger, facts: Mapping[str, Any], name: str, tags: Sequence[str]) -> None:
        self.logger = logger
        run = logger.experiment
        # Lightning defines the step only for runs that it opened itself, and a sweep opens its own.
        run.define_metric(STEP)
        for section in SECTIONS:
            run.define_metric(section, step_metric=STEP)
        run.config.update(dict(facts), allow_val_change=True)
        if not run.name or run.name == run.id or re.fullmatch(r"[a-z]+-[a-z]+-\d+", run.name):  # the user has not chosen it
            run.name = name
        run.tags = tuple(dict.fromkeys([*(run.tags or ()), *tags]))

    def alert(self, title: str, text: str) -> None:
        """Send an alert to users who enabled alerts in Weights & Biases, once.

        Args:
            title: what happened.
            text: where, and what to do.
        """
        self.logger.experiment.alert(title=title, text=text, level="WARN")

    def pictures(
        self, step: int, survivors: Mapping[str, Tensor], masks: Mapping[str, Tensor], columns: Sequence[Sequence[float]]
    ) -> None:
        """Log histograms of the remaining weights, masks, and the heat map of layers over time.

        Args:
            step: the step of the readings.
            survivors: nonzero weights, by layer.
            masks: two-dimensional masks, by layer.
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
        """Log the table of layers, and the metric against sparsity.

        Args:
            step: the last step.
            run: the run in the form that the report takes.
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
        """Log the page of the run.

        Args:
            step: the last step.
            page: file of the page.
        """
        import wandb

        logged: dict[str, Any] = {"charts/report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)}
        self.logger.log_metrics(logged, step)

    def checkpoint(self, path: Path, run: Mapping[str, Any]) -> None:
        """Upload the sparse checkpoint as an artifact with its sparsity and its accuracy.

        Args:
            path: path of the checkpoint; one that misses the target is not uploaded.
            run: the run in the form that the report takes.
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
    """Lightning's `WandbLogger`, but the run stays on this machine, with a hint, if there is no account or network.

    Lightning opens runs before it calls any callback, so a callback cannot do this. The command line does it for every
    `WandbLogger`. A value of `WANDB_MODE` takes precedence.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        given = inspect.signature(WandbLogger).bind(*args, **options).arguments
        self.decided = bool(given.get("offline") or given.get("experiment"))
        """Whether the destination of the run has been decided."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run; opened, online or offline, at the first access."""
        if not self.decided and (hint := stay_offline()) is not None:
            rank_zero_warn(hint)
        self.decided = True
        return super().experiment


def open_in_group(logger: Any, group: str) -> None:
    """Open the run of a logger in a group, unless the user has set one; Weights & Biases fixes it when a run is opened.

    Args:
        logger: any logger; those other than `WandbLogger` are left alone.
        group: the group that the seeds of one configuration share.
    """
    if not isinstance(logger, WandbLogger):
        return
    import wandb

    settings = wandb.setup().settings
    before = settings.run_group
    settings.run_group = before or group  # the logger's own setting takes precedence
    try:
        _ = logger.experiment
    finally:
        settings.run_group = before


def default_entity() -> str:
    """The entity of the account.

    Raises:
        ValueError: if there is no account.
    """
    import wandb

    try:
        found = wandb.Api().default_entity if _has_key(wandb) else None
    except Exception as error:
        raise ValueError(
            f"Weights & Biases could not be queried for the account ({first_line(error)}); see `wandb login`."
        ) from None
    if not found:
        raise ValueError("there is no account of Weights & Biases on this machine; `wandb login` stores its key.")
    return str(found)


def _facts(run: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Facts about an artifact that are useful before loading it."""
    return {"method": run["method"], "model": run["model"], "sparsity": row["sparsity"], **row["metrics"]}


def stay_offline(timeout: float = 3.0) -> str | None:
    """Keep runs on this machine if they could not be sent anyway; call it before a logger opens one.

    Args:
        timeout: seconds after which the network counts as missing.

    Returns:
        One sentence with what is missing and what to do; None if nothing is missing or the user has chosen a mode.
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
    os.environ["WANDB_MODE"] = settings.mode = "offline"  # for processes started from here; this one has already read it
    return f"Weights & Biases stays offline, because {missing}; `wandb sync DIR` sends the run later."


def _has_key(wandb: Any) -> bool:
    try:
        return bool(wandb.login(prompt=False))
    except TypeError:  # for versions that can only prompt
        return bool(wandb.api.api_key)
    except Exception:  # a key that cannot be verified now; the network is checked next
        return True
