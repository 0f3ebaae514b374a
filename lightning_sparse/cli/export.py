"""`lightning-sparse export`: from a checkpoint to smaller and faster files, verified and measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from rich import get_console
from torch import Tensor, nn

from lightning_sparse.cli.checkpoints import load_weights
from lightning_sparse.core import Call, callee, copy_model, first_line, is_linear, join
from lightning_sparse.export import ExportReport, Quantization, RungName, export_ladder
from lightning_sparse.export import recalibrate as recalibrate_norms
from lightning_sparse.loop.dry_run import record_calls
from lightning_sparse.observe.report import why_unwritable

__all__ = ["Export", "inputs_of"]


class Export(pl.Trainer):
    """A Trainer that can export a checkpoint."""

    def export(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str = "",
        to: str = "",
        rungs: list[RungName] | None = None,
        batch_size: int = 64,
        tolerance: float = 1e-5,
        fold: bool = False,
        recalibrate: int = 0,
        calibrate: int = 16,
        int8_tolerance: float = 0.01,
        input_range: list[float] | None = None,
        rounds: int = 30,
        compiled: bool = True,
        device: str = "cpu",
        precision: Literal["float32", "bfloat16", "float16"] = "float32",
        overwrite: bool = False,
        network: str | None = None,
    ) -> ExportReport:
        """Make a sparse checkpoint smaller and faster: every artifact is verified, and measured against the dense model.

        Args:
            model: the trained model.
            datamodule: its test set verifies, and its training set calibrates.
            ckpt_path: the checkpoint; without --config, the configuration of its run is searched next to it and above.
            to: output folder.
            rungs: the rungs to make; null makes all that suit the model.
            batch_size: batch size in deployment; latency is measured at it and at 1.
            tolerance: maximum change of an output, relative to the largest output.
            fold: fold batch normalization into the preceding layers.
            recalibrate: first re-estimate batch normalization on this many training batches; 0 for none.
            calibrate: calibrate int8 on this many training batches; 0 skips int8.
            int8_tolerance: maximum change of a test metric by int8, such as 0.01 for one percentage point of accuracy.
            input_range: the smallest and largest input, with which the first layer may merge.
            rounds: number of calls for the median latency.
            compiled: also measure the dense model and smaller networks under torch.compile, which takes half a minute
                the first time on a machine.
            device: device to export for, such as cuda for 2:4.
            precision: precision of the weights.
            overwrite: overwrite files that are already in the folder.
            network: name of the submodule that is exported. Its inputs are those of its call in test_step, unless a batch
                begins with a tensor; null exports the model itself on the first tensor of a batch.
        """
        _check(to, batch_size, recalibrate, calibrate)
        load_weights(model, ckpt_path)
        model = model.eval()
        if recalibrate:
            batches = inputs_of(model, datamodule, "train", network)
            measured = recalibrate_norms(model, (x for x, _ in zip(batches, range(recalibrate), strict=False)))
            rank_zero_only(print)(f"batch normalization measured again: {measured} layers on up to {recalibrate} batches")
        inputs = _one_batch(inputs_of(model, datamodule, "test", network), batch_size)
        training = inputs_of(model, datamodule, "train", network) if calibrate else ()
        few = [call for call, _ in zip(training, range(calibrate), strict=False)]
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
            inputs,
            to,
            rungs=rungs,
            tolerance=tolerance,
            fold=fold,
            input_range=input_range,
            rounds=rounds,
            compiled=compiled,
            evaluate=test if tests else None,
            quantization=Quantization(few, tolerance=int8_tolerance) if few else None,
            overwrite=overwrite,
        )
        rank_zero_only(get_console().print)(report.table())
        return report


def inputs_of(
    model: pl.LightningModule,
    datamodule: pl.LightningDataModule | None,
    stage: Literal["train", "test"],
    network: str | None = None,
) -> Iterator[Call]:
    """The inputs of a network on batches: the first tensor of each, or the inputs that a step of the model passes to it.

    Raises:
        ValueError: if there is no data, or no network is called.
    """
    if datamodule is None:
        raise ValueError("an export is verified on real inputs; configure --data.")
    datamodule.prepare_data()
    datamodule.setup("fit" if stage == "train" else "test")
    for batch in datamodule.train_dataloader() if stage == "train" else datamodule.test_dataloader():
        x = batch[0] if isinstance(batch, list | tuple) else batch
        plain = isinstance(x, Tensor) and network is None
        yield Call.of(x) if plain else _seen_call(model, batch, stage, network)


def _check(to: str, batch_size: int, recalibrate: int, calibrate: int) -> None:
    if not to:
        raise ValueError("to='' is not a folder; write --to FOLDER.")
    if (reason := why_unwritable(Path(to))) is not None:
        raise ValueError(f"to='{to}' cannot be written ({reason}); choose another folder.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be >= 1.")
    if recalibrate < 0:
        raise ValueError(f"recalibrate={recalibrate} must be a number of batches, or 0 to leave the statistics as they are.")
    if calibrate < 0:
        raise ValueError(f"calibrate={calibrate} must be a number of batches, or 0 to leave int8 out.")


def _one_batch(calls: Iterable[Call], batch_size: int) -> Call:
    """The first samples of calls whose shapes agree."""
    taken: list[Call] = []
    for call in calls:
        if taken and _shapes(call) != _shapes(taken[0]):  # sequences of a different length
            break
        taken.append(call)
        if sum(one.samples for one in taken) >= batch_size:
            break
    return join(taken).first(batch_size)


def _seen_call(model: pl.LightningModule, batch: Any, stage: Literal["train", "test"], network: str | None) -> Call:
    """How a step of the model calls its network on a batch; run on a copy that logs nothing."""
    twin: Any = copy_model(model).eval()
    vars(twin).update(log=_nothing, log_dict=_nothing)
    kind, step = (
        type(model).__name__,
        "test_step" if stage == "test" and is_overridden("test_step", model) else "training_step",
    )
    paths = [path for path, part in twin.named_modules() if any(map(is_linear, part.modules()))]
    if network is not None:
        paths = [callee(twin, network)[0]]
    with_index = is_param_in_hook_signature(getattr(twin, step), "batch_idx", min_args=2)
    try:
        calls = record_calls(twin, paths, lambda: getattr(twin, step)(*((batch, 0) if with_index else (batch,))))
    except Exception as error:
        raise ValueError(
            f"{step} of {kind} fails outside of a run, so the inputs of its network are unknown ({first_line(error)}); "
            "call export_ladder from Python with the network and its inputs."
        ) from error
    if len(calls) != 1:
        said = f"calls {[call.network for call in calls]}" if calls else f"does not call '{network or 'a network'}'"
        raise ValueError(
            f"{step} of {kind} {said}, so it is unclear what to export; set --network=NAME to a submodule that it calls."
        )
    return calls[0]


def _shapes(call: Call) -> list[torch.Size]:
    return [tensor.shape[1:] for tensor in call.tensors]


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass
