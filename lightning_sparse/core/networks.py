"""Find the networks in a module: those that `torch.fx` can trace, and the one that takes the inputs; copy a model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from lightning_sparse.core.libraries import first_line
from lightning_sparse.core.linear import is_linear

__all__ = [
    "Network",
    "callee",
    "copy_model",
    "find_networks",
    "is_training",
    "replace_module",
    "shared_parameters",
    "trained_part",
    "without_nested_tensors",
]


@dataclass(frozen=True)
class Network:
    """A part of a module that `torch.fx` can trace.

    Args:
        path: its name in the module; empty for the module itself.
        module: the part itself.
        graph: the graph of its forward pass.
    """

    path: str
    module: nn.Module
    graph: fx.Graph


def find_networks(module: nn.Module) -> tuple[list[Network], dict[str, str]]:
    """Return the largest parts of a module that can be traced and contain layers, and why other parts cannot be traced.

    A LightningModule itself is never traced, because training does not run its `forward`. Its networks are its submodules.
    """
    networks: list[Network] = []
    failures: dict[str, str] = {}

    def visit(path: str, part: nn.Module) -> None:
        if is_linear(part):
            failures.setdefault(path, "it stands alone: no module that can be traced holds it and its neighbors")
        if is_linear(part) or not any(map(is_linear, part.modules())):
            return
        if any(part is network.module for network in networks):
            return  # under another name
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
    """Return the ids of parameters that several layers share."""
    seen: set[int] = set()
    twice: set[int] = set()
    for part in module.modules():
        for _, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            (twice if id(parameter) in seen else seen).add(id(parameter))
    return twice


def without_nested_tensors(model: nn.Module) -> nn.Module:
    """Stop each `nn.TransformerEncoder` from packing padded inputs into nested tensors, in place; returns the model.

    Nested tensors support few operations besides those of torch's own layers; outputs at positions that are not padded stay
    the same.
    """
    for part in model.modules():
        if isinstance(part, nn.TransformerEncoder) and hasattr(part, "use_nested_tensor"):
            part.use_nested_tensor = False
    return model


def replace_module(model: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Replace a module under all of its names, in place; return the model, or the new module in its stead.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> net = nn.ModuleDict({"norm": norm, "layers": nn.Sequential(nn.Linear(2, 2), norm)})
        >>> _ = replace_module(net, "norm", nn.Identity())
        >>> net["layers"][1]
        Identity()
    """
    old = model.get_submodule(name)
    if old is model:
        return new
    for path in [path for path, part in model.named_modules(remove_duplicate=False) if part is old]:
        model.set_submodule(path, new)
    return model


def is_training(model: nn.Module) -> bool:
    """Whether a Trainer is currently fitting a model, a LightningModule."""
    state = getattr(_trainer_of(model), "state", None)
    return getattr(state, "status", None) == "running" and getattr(state, "fn", None) == "fit"


def copy_model(model: nn.Module) -> nn.Module:
    """Return a deep copy of a model without the Trainer of a LightningModule.

    Raises:
        ValueError: if the model cannot be copied.
    """
    trainer = _trainer_of(model)
    try:
        return copy.deepcopy(model, {} if trainer is None else {id(trainer): None})
    except Exception as error:
        said = f"{type(model).__name__} cannot be copied ({first_line(error)})"
        raise ValueError(
            f"{said}; make masks of torch.nn.utils.prune permanent with prune.remove, and norms of weights with "
            "remove_weight_norm or remove_parametrizations."
        ) from None


def _trainer_of(model: nn.Module) -> Any:
    """Return the Trainer that a LightningModule is attached to, if any."""
    if isinstance(getattr(type(model), "trainer", None), property):
        with suppress(RuntimeError):  # not attached to a Trainer
            return model.trainer
    return None


def callee(model: nn.Module, network: str | None = None) -> tuple[str, nn.Module]:
    """Return the module to call with inputs: a model, or the only network of a LightningModule without its own `forward`.

    Args:
        model: the model.
        network: name of the network in the model, if it is not the only one.

    Returns:
        Its name in the model, empty for the model itself, and the module.

    Raises:
        ValueError: if there are several networks, or none has the name.
    """
    if network is not None:
        parts = dict(model.named_modules(remove_duplicate=False))
        if network not in parts:
            raise ValueError(
                f"network='{network}' is not a submodule of {type(model).__name__}; it has "
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
    """Yield the largest parts that can be called and contain layers; a `ModuleList` cannot be called."""
    for name, child in module.named_children():
        if any(map(is_linear, child.modules())):
            inner = f"{path}.{name}".lstrip(".")
            if type(child).forward is nn.Module.forward:
                yield from _callable_parts(child, inner)
            else:
                yield inner, child


def trained_part(module: nn.Module, network: str | None, label: str) -> str:
    """Return the name of a part: `network`, or the innermost callable module that holds all trainable parameters.

    Args:
        module: the module that holds it.
        network: name of the part, or None to find it.
        label: name of the caller, for the error message.

    Raises:
        ValueError: if no part has the name.
    """
    if network is not None:
        names = dict(module.named_modules())
        if network not in names:
            raise ValueError(
                f"{label}: network='{network}' is not a submodule of {type(module).__name__}; it has "
                f"{[name for name in names if name and '.' not in name]}."
            )
        return network
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    path = trained[0]
    while path:
        path = path.rpartition(".")[0]
        callable_ = type(module.get_submodule(path)).forward is not nn.Module.forward  # a ModuleList is not
        if callable_ and all(name.startswith(f"{path}.") for name in trained):
            break
    return path
