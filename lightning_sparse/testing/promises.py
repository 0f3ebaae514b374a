"""Points 1 to 4: target, zeros, exact resume, plain checkpoints; most checks share one recorded run."""

from __future__ import annotations

import torch
from torch import nn

from lightning_sparse.testing.case import OPTIONS, Case, recorded, require
from lightning_sparse.testing.state import differences, masks_of, nonzero, off_target, state_of
from lightning_sparse.testing.toys import BATCHES, EPOCHS, fit, toy

__all__ = ["goes_on_after_its_end", "is_resumed_exactly", "keeps_zeros", "reaches_its_target", "writes_plain_files"]

STOPS = {"sgd": (1, BATCHES, BATCHES + 2), "adamw": (BATCHES - 1, 2 * BATCHES, EPOCHS * BATCHES - 1)}
"""Steps at which runs are stopped: at the end of epochs and inside them, after the first step and before the last."""


def reaches_its_target(case: Case, optimizer: str) -> None:
    """Exactly the promised number of weights is kept, in total and in each layer, and the others are zero."""
    run = recorded(case, optimizer)
    for method in run.methods:
        wrong = off_target(method)
        require(not wrong, f"{method.label} has missed its target: {'; '.join(wrong)}.")
        wrong = nonzero(method, run.module)
        require(not wrong, f"{method.label} counts entries of {wrong} as dropped that are not zero.")


def keeps_zeros(case: Case, optimizer: str) -> None:
    """Removed entries are zero and without momentum for an earlier callback, in mid-epoch validation and in all files."""
    run = recorded(case, optimizer)
    require(not run.wrong, f"Seen {run.wrong[0] if run.wrong else ''} ({len(run.wrong)} such sights).")
    require(run.moments == {"batch end", "validation", "epoch end"}, f"The watcher was called at {run.moments} alone.")
    for method in run.methods:
        require(
            method.mask_set is None or method.mask_set.sparsity > 0,
            f"{method.label} has dropped nothing here; make it stronger.",
        )
    for kind in ("full", "bare"):
        for step, file in run.files(kind).items():
            weights = torch.load(file, weights_only=True)["state_dict"]
            wrong = [name for name, mask in run.kept[step].items() if weights[name][~mask].any()]
            require(not wrong, f"The {kind} checkpoint of step {step} has entries of {wrong} that should be zero.")


def is_resumed_exactly(case: Case, optimizer: str) -> None:
    """A run that is stopped and resumed ends bit for bit the same: weights, moments, memory, schedule, random state."""
    run = recorded(case, optimizer)
    files = run.files("full")
    for step in STOPS[optimizer]:
        torch.manual_seed(1000 + step)  # a new process would not have the old generators' states
        callbacks, methods = case.fresh()
        module = toy(optimizer, seed=step)
        runner = fit(module, *callbacks, ckpt_path=files[step], **OPTIONS)
        require(runner.global_step == run.trainer.global_step, f"Resumed at step {step}, it ends at {runner.global_step}.")
        wrong = differences(run.state, state_of(module, runner, *methods))
        require(not wrong, f"Resumed at step {step}, it differs from the uninterrupted run in {wrong[:4]}.")


def goes_on_after_its_end(case: Case) -> None:
    """Resuming a finished run with more epochs does not stretch its schedule."""
    run = recorded(case, "sgd")
    callbacks, methods = case.fresh()
    module = toy()
    fit(module, *callbacks, ckpt_path=run.files("full")[EPOCHS * BATCHES], max_epochs=EPOCHS + 2, **OPTIONS)
    for before, method in zip(run.methods, methods, strict=True):
        require(not nonzero(method, module), f"{method.label}: after the end, {nonzero(method, module)} have come back.")
        # Masks may change if removed entries keep their values and no count was promised.
        if method.goal["total"] is not None or not method.dropped_live_on:
            wrong = differences(masks_of(before), masks_of(method))
            require(not wrong, f"{method.label} has changed masks of {wrong} after the end of its schedule.")


def writes_plain_files(case: Case, optimizer: str) -> None:
    """Checkpoints load strictly and with `weights_only=True` into the bare module; names and groups are unchanged."""
    run = recorded(case, optimizer)
    parameters = dict(run.module.named_parameters())
    fresh = toy(optimizer, seed=7)
    require(list(parameters) == run.names, f"Parameters were {run.names} and are {list(parameters)}.")
    wrong = [name for name, parameter in parameters.items() if type(parameter) is not nn.Parameter]
    require(not wrong, f"{wrong} are no plain parameters anymore.")
    for kind in ("full", "bare"):
        step, file = list(run.files(kind).items())[-1]
        saved = torch.load(file, weights_only=True)["state_dict"]
        wrong = sorted(saved.keys() ^ fresh.state_dict().keys())
        require(not wrong, f"The {kind} checkpoint and the bare module differ in {wrong}.")
        fresh.load_state_dict(saved, strict=True)
        if step == run.trainer.global_step:
            wrong = differences(run.state["weights"], dict(fresh.state_dict()))
            require(not wrong, f"The last {kind} checkpoint is not the trained module: {wrong}.")
    saved = torch.load(run.files("full")[EPOCHS * BATCHES], weights_only=True)["optimizer_states"]
    groups = [group["params"] for state in saved for group in state["param_groups"]]
    require(groups == [list(range(len(run.names)))], f"The optimizer's groups are {groups}.")
