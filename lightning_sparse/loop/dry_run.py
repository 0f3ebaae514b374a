"""For methods that try something on the training set without any side effects."""

from __future__ import annotations

import copy
import functools
import itertools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from lightning_sparse.core import Call, callee, first_line, is_cut
from lightning_sparse.loop.in_place import in_place
from lightning_sparse.loop.privates import combined_loader, compiler_context, forget_iterator

__all__ = [
    "dry_run",
    "example_inputs",
    "is_repeatable",
    "loss_of",
    "record_calls",
    "refuse_unrepeatable_data",
    "size_of",
    "take_step",
    "train_but_leaves",
    "training_batches",
    "training_outputs",
]


@contextmanager
def dry_run(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[pl.LightningModule]:
    """A copy of a module that logs nothing and steps nothing; all generators are restored at the end.

    The copy knows the trainer, so `self.trainer` and `self.current_epoch` work in its `training_step`, but its `log` does
    nothing, and its `optimizers()` are stand-ins. Sharded weights cannot be copied: then it is the module itself, and
    everything that it holds is restored at the end. All ranks must call it together.

    Args:
        trainer: the running Trainer.
        module: the module that is trained; weights, buffers, metrics and gradients stay as they are.
    """
    generators = list(_generators(_combined(trainer)))
    states = [generator.get_state() for generator in generators]
    with isolate_rng():
        try:
            with in_place(module) if is_cut(module) else nullcontext():
                yield _quiet(trainer, module)
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def training_outputs(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[tuple[Any, Any]]:
    """Batches of the training set on the device, each with what `training_step` of a copy that logs nothing returns for it.

    This is a separate pass over the data: loaders are copied before they are opened. It is as long as an epoch, with the
    order and the augmentation of the epoch that is about to start.

    Args:
        trainer: the running Trainer.
        module: from `dry_run`.
    """
    for index, batch in enumerate(training_batches(trainer)):
        with trainer.precision_plugin.train_step_context():
            output = take_step(module, batch, index)
        yield batch, output


def training_batches(trainer: pl.Trainer) -> Iterator[Any]:
    """Batches of the training set on the device, in a separate pass; see `training_outputs`."""
    precision, batches = trainer.precision_plugin, trainer.num_training_batches
    loader = _own_pass(_combined(trainer))
    for batch in itertools.islice(loader, None if batches == float("inf") else int(batches)):
        yield trainer.strategy.batch_to_device(precision.convert_input(batch))


def take_step(module: pl.LightningModule, batch: Any, index: int) -> Any:
    """Call `training_step`, which may or may not take the index of the batch."""
    with_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    return module.training_step(batch, index) if with_index else module.training_step(batch)


def example_inputs(trainer: pl.Trainer, module: pl.LightningModule, label: str, weights: Iterable[str]) -> list[Call]:
    """Calls of the networks that hold some weights: with `example_input_array`, or as `training_step` calls them.

    The networks are the largest submodules that are called on the first batch and hold one of the weights; the module itself
    if it calls its own `forward`.

    Args:
        trainer: the running Trainer.
        module: from `dry_run`.
        label: name of the method that asks, for messages.
        weights: names of weights.

    Raises:
        ValueError: if no such call is seen.
    """
    if module.example_input_array is not None:
        with suppress(ValueError):  # several networks: Lightning does not say which of them the example is for
            return [Call.of(module.example_input_array, callee(module)[0])]
    refuse_unrepeatable_data(trainer, module, label)
    owners = {name.rpartition(".")[0] for name in weights}
    paths = [path for path, _ in module.named_modules() if any(_holds(path, owner) for owner in owners)]
    kind, example = type(module).__name__, f"set example_input_array in {type(module).__name__}"
    try:
        with torch.enable_grad():
            calls = record_calls(module, paths, lambda: next(training_outputs(trainer, module), None))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{label} must record how training_step of {kind} calls its network, but it fails on a copy of the module "
            f"({type(error).__name__}: {first_line(error)}); {example}."
        ) from error
    if not calls:
        raise ValueError(
            f"{label} must record how {kind} calls its network, but training_step calls no module that holds "
            f"'{next(iter(weights))}' on the first batch; {example}."
        )
    return calls


def record_calls(module: nn.Module, paths: Iterable[str], run: Callable[[], Any]) -> list[Call]:
    """The first call of each submodule while something runs, except calls inside another of these calls.

    Args:
        module: the module that holds the submodules.
        paths: their names.
        run: function that calls them.
    """
    seen: dict[str, Call] = {}

    def note(path: str, part: nn.Module, args: Any, kwargs: Any) -> None:
        if not any(_holds(other, path) for other in seen):
            seen[path] = Call(args, kwargs, path).map(lambda tensor: tensor.detach().clone())

    handles = [
        module.get_submodule(path).register_forward_pre_hook(functools.partial(note, path), with_kwargs=True)
        for path in paths
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [call for path, call in seen.items() if not any(other != path and _holds(other, path) for other in seen)]


def _holds(path: str, inner: str) -> bool:
    """Whether a submodule is another, or contains it."""
    return path in ("", inner) or inner.startswith(f"{path}.")


def refuse_unrepeatable_data(trainer: pl.Trainer, module: pl.LightningModule, label: str) -> None:
    """Refuse data that `training_outputs` could not go through.

    Raises:
        ValueError: if the data can be read only once, or `training_step` fetches its batches itself.
    """
    if _fetches(module):
        raise ValueError(
            f"{label} makes its own pass over the training set, which training_step(dataloader_iter) does not allow; take "
            "batches instead."
        )
    for data in _read_once(trainer):
        raise ValueError(
            f"{label} makes its own pass over the training set, but {type(data).__name__} can be read only once; "
            "use a loader that restarts with every iter()."
        )


def is_repeatable(trainer: pl.Trainer, module: pl.LightningModule) -> bool:
    """Whether `training_outputs` can go through the training set without training losing any of it."""
    return not _fetches(module) and next(_read_once(trainer), None) is None


def _fetches(module: pl.LightningModule) -> bool:
    return is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True)


def _read_once(trainer: pl.Trainer) -> Iterator[Any]:
    for loader in _combined(trainer).flattened:
        yield from (data for data in (loader, getattr(loader, "dataset", None)) if isinstance(data, Iterator))


def train_but_leaves(module: nn.Module) -> None:
    """Set train mode for modules that compute a loss only there, and evaluation mode for norms and dropout.

    Modules without children and modules of torch (the layers) are put in evaluation mode. All others are in train mode:
    models and their heads, which may return a loss there and predictions in evaluation mode. A
    `F.dropout(training=self.training)` in such a module drops as in training.
    """
    for part in module.modules():
        leaf = next(part.children(), None) is None or type(part).__module__.startswith("torch.nn.")
        part.training = not leaf


def loss_of(output: Any) -> Tensor | None:
    """The loss in the output of a `training_step`."""
    return output.get("loss") if isinstance(output, Mapping) else output


def size_of(batch: Any) -> int:
    """The number of samples in a batch: the length of its first tensor, or of a list of targets; 1 if there is neither."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        targets = [part for part in batch if isinstance(part, list | tuple) and isinstance(next(iter(part), None), Mapping)]
        if targets:  # as detectors take them, beside a list of images
            return len(targets[0])
        return next((size_of(part) for part in batch if not isinstance(part, str | int | float)), 1)
    return 1


def _quiet(trainer: pl.Trainer, module: pl.LightningModule) -> pl.LightningModule:
    twin = module if is_cut(module) else _copy(trainer, module)
    optimizers = [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0) for _ in trainer.optimizers]
    schedulers = [torch.optim.lr_scheduler.ConstantLR(optimizers[0], 1.0) for _ in trainer.lr_scheduler_configs]
    silent: dict[str, Any] = {
        "_trainer": trainer,
        "log": _nothing,
        "log_dict": _nothing,
        "manual_backward": _nothing,
        "clip_gradients": _nothing,
        "toggle_optimizer": _nothing,
        "untoggle_optimizer": _nothing,
        "optimizers": lambda use_pl_optimizer=True: optimizers[0] if len(optimizers) == 1 else optimizers,
        "lr_schedulers": lambda: schedulers if len(schedulers) > 1 else next(iter(schedulers), None),
    }
    vars(twin).update(silent)
    return twin


def _copy(trainer: pl.Trainer, module: pl.LightningModule) -> pl.LightningModule:
    # Hooks may be methods of callbacks, and callbacks lead to everything else: these stay the same objects.
    known = [trainer, *trainer.callbacks, compiler_context(module)]  # type: ignore[attr-defined]
    try:
        twin = copy.deepcopy(module, {id(item): item for item in known})
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__} cannot be copied with copy.deepcopy ({error}), which is needed to score a copy of the "
            "model; keep what cannot be copied outside the module."
        ) from error
    # Compiled or wrapped methods are functions on the instance, and still bound to the original.
    for name in [name for name, value in vars(twin).items() if isinstance(value, types.FunctionType)]:
        if hasattr(type(twin), name):
            delattr(twin, name)
    return twin


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _combined(trainer: pl.Trainer) -> CombinedLoader:
    loader = combined_loader(trainer)
    if loader is None:
        raise ValueError("There is no training set; give trainer.fit a train_dataloader.")
    return loader


def _own_pass(combined: CombinedLoader) -> Iterator[Any]:
    """Batches as Lightning combines them, from copies of the loaders, so that no loader's position changes."""
    mine, loaders = copy.copy(combined), []
    for loader in combined.flattened:
        loader = copy.copy(loader)
        forget_iterator(loader)
        loaders.append(loader)
    mine.flattened = loaders
    for batch, _, _ in mine:
        yield batch


def _generators(combined: CombinedLoader) -> Iterator[torch.Generator]:
    """Generators that a user gave to loaders and samplers; passes share them."""
    for loader in combined.flattened:
        sampler = getattr(loader, "sampler", None)
        batch_sampler = getattr(loader, "batch_sampler", None)
        for owner in (loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                yield generator
