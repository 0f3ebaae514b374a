"""The networks in a module: those that `torch.fx` can trace, a copy to work on, and which of them takes the inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lightning_sparse.core.libraries import first_line
from lightning_sparse.core.linear import is_linear

__all__ = ["Network", "callee", "copy_model", "find_networks", "is_training", "shared_parameters", "trained_part"]


@dataclass(frozen=True)
class Network:
    """A part of a module that could be traced.

    Args:
        path: its name in the module; empty for the module itself.
        module: itself.
        graph: of its forward pass.
    """

    path: str
    module: nn.Module
    graph: fx.Graph


def find_networks(module: nn.Module) -> tuple[list[Network], dict[str, str]]:
    """The largest parts of a module that can be traced and hold layers, and why others cannot.

    A LightningModule is never traced itself: its `forward` is not what trains. Its networks are its submodules.
    """
    networks: list[Network] = []
    failures: dict[str, str] = {}

    def visit(path: str, part: nn.Module) -> None:
        if is_linear(part):
            failures.setdefault(path, "it stands alone: no module that can be traced holds it and its neighbors")
        if is_linear(part) or not any(map(is_linear, part.modules())):
            return
        if not hasattr(part, "training_step"):
            try:
                networks.append(Network(path, part, fx.Tracer().trace(part)))
                return
            except Exception as error:
                reason = (
                    f"{type(part).__name__} cannot be traced ({str(error).strip().splitlines()[0][:80] or 'no forward'})"
                )
                for name, layer in part.named_modules(prefix=path):
                    if is_linear(layer):
                        failures.setdefault(name, reason)
        for name, child in part.named_children():
            visit(f"{path}.{name}".lstrip("."), child)

    visit("", module)
    traced = {name for network in networks for name, _ in network.module.named_modules(prefix=network.path)}
    return networks, {name: reason for name, reason in failures.items() if name not in traced}


def shared_parameters(module: nn.Module) -> set[int]:
    """Parameters that several layers hold."""
    seen: set[int] = set()
    twice: set[int] = set()
    for part in module.modules():
        for _, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def is_training(model: nn.Module) -> bool:
    """Whether a Trainer is in the middle of fitting a model, a LightningModule."""
    state = getattr(_trainer_of(model), "state", None)
    return getattr(state, "status", None) == "running" and getattr(state, "fn", None) == "fit"


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy that leaves the Trainer of a LightningModule behind.

    Raises:
        ValueError: if it cannot be made.
    """
    trainer = _trainer_of(model)
    try:
        return copy.deepcopy(model, {} if trainer is None else {id(trainer): None})
    except Exception as error:
        said = f"{type(model).__name__} cannot be copied ({first_line(error)})"
        raise ValueError(f"{said}; make masks of torch.nn.utils.prune permanent with prune.remove.") from None


def _trainer_of(model: nn.Module) -> Any:
    """The Trainer that a LightningModule is attached to, if there is one."""
    if isinstance(getattr(type(model), "trainer", None), property):
        with suppress(RuntimeError):  # no Trainer has it
            return model.trainer
    return None


def callee(model: nn.Module, network: str | None = None) -> tuple[str, nn.Module]:
    """What is called with inputs: a model, or the only network of a LightningModule without a forward pass of its own.

    Args:
        model: that holds it.
        network: its name in the model, where it cannot be found.

    Returns:
        Its name in the model, empty for the model itself, and the module.

    Raises:
        ValueError: if there are several networks, or none has the name.
    """
    if network is not None:
        parts = dict(model.named_modules(remove_duplicate=False))
        if network not in parts:
            raise ValueError(
                f"network='{network}' is no part of {type(model).__name__}; it has "
                f"{[name for name in parts if name and '.' not in name]}."
            )
        return network, parts[network]
    if str(type(model).forward.__module__).partition(".")[0] not in ("lightning", "pytorch_lightning"):
        return "", model
    callable_ = list(_callable_parts(model))
    if len(callable_) == 1:
        return callable_[0]
    networks = find_networks(model)[0]
    if len(networks) != 1:
        names = [network.path for network in networks] or [name for name, _ in callable_]
        raise ValueError(
            f"{type(model).__name__} has no forward and holds the networks {names}, so it is unclear which one takes the "
            "inputs; give the name of one as network, or write a forward (only merge_layers works without inputs)."
        )
    return networks[0].path, networks[0].module


def _callable_parts(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The largest parts that can be called and hold layers; a list of layers cannot."""
    for name, child in module.named_children():
        if any(map(is_linear, child.modules())):
            inner = f"{path}.{name}".lstrip(".")
            if type(child).forward is nn.Module.forward:
                yield from _callable_parts(child, inner)
            else:
                yield inner, child


def trained_part(module: nn.Module, network: str | None, label: str) -> str:
    """The name of a part of a module: the one that is named, or the innermost that can be called and holds all that trains.

    Args:
        module: that holds it.
        network: its name, or None.
        label: who asks.

    Raises:
        ValueError: if no part has the name.
    """
    if network is not None:
        names = dict(module.named_modules())
        if network not in names:
            raise ValueError(
                f"{label}: network='{network}' is no part of {type(module).__name__}; it has "
                f"{[name for name in names if name and '.' not in name]}."
            )
        return network
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    path = trained[0]
    while path:
        path = path.rpartition(".")[0]
        callable_ = type(module.get_submodule(path)).forward is not nn.Module.forward  # a list of layers is not
        if callable_ and all(name.startswith(f"{path}.") for name in trained):
            break
    return path
