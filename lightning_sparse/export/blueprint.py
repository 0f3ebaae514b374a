"""How a smaller model differs from a newly built one: sizes, folded normalizations, kernels; stored with the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.core import Kept, cut, cut_tensor, out_count, replace_module, resize
from lightning_sparse.export.compact import load_compact, read_note, save_compact
from lightning_sparse.export.kernels import use_kernels

__all__ = ["Blueprint", "Kept", "add_bias", "carry_optimizer", "load_model", "save_model"]


@dataclass(frozen=True)
class Blueprint:
    """The changes to a newly built model that make the weights of an export fit it.

    Args:
        kept: layer -> what is left of it.
        folded: normalizations that were folded into the preceding layer.
        biased: layers that got a bias from a folded normalization.
        kernels: layer -> the kernel that multiplies its weight, such as `csr`.
        sizes: attributes of modules with fewer heads, by path.
    """

    kept: Mapping[str, Kept] = field(default_factory=dict)
    folded: tuple[str, ...] = ()
    biased: tuple[str, ...] = ()
    kernels: Mapping[str, str] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> nn.Module:
        """Fold and cut a model in place, with its current weights; `load_model` sets kernels after the weights.

        Raises:
            ValueError: if the model has other layers.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        resized = [path.rpartition(".")[0] for path in self.sizes]
        unknown = [name for name in (*self.folded, *self.biased, *self.kept, *self.kernels, *resized) if name not in modules]
        if unknown:
            raise ValueError(
                f"the export holds a layer '{unknown[0]}' that {type(model).__name__} does not have; build the model as it "
                "was trained."
            )
        for name in self.biased:
            add_bias(modules[name])
        for name in self.folded:
            replace_module(model, name, nn.Identity())
        resize(model, self.sizes)
        for name, kept in self.kept.items():
            cut(model.get_submodule(name), kept)
        return model

    def then(self, kept: Mapping[str, Kept], sizes: Mapping[str, Any] | None = None) -> Blueprint:
        """Return a blueprint that also cuts these layers further and sets these attributes."""
        joined = {name: self.kept.get(name, Kept()).then(kept.get(name, Kept())) for name in {**self.kept, **kept}}
        return replace(self, kept=joined, sizes={**self.sizes, **(sizes or {})})

    def to_json(self) -> dict[str, Any]:
        """Return the blueprint as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Blueprint:
        """Make a blueprint from the values of `to_json`."""
        kept = {name: Kept(**parts) for name, parts in values["kept"].items()}
        return cls(
            kept, tuple(values["folded"]), tuple(values["biased"]), dict(values["kernels"]), dict(values.get("sizes", {}))
        )


def save_model(model: nn.Module, path: str | Path, blueprint: Blueprint | None = None, note: Any = None) -> int:
    """Write a model's weights without their zeros, together with its differences from a newly built one.

    Args:
        model: the model, before its kernels are replaced.
        path: path of the file.
        blueprint: the differences; None if there are none.
        note: anything else to store, as JSON.

    Returns:
        Size of the file in bytes.
    """
    return save_compact(
        model.state_dict(),
        path,
        {"blueprint": (blueprint or Blueprint()).to_json(), "class": type(model).__name__, "note": note},
    )


def load_model(model: nn.Module, path: str | Path) -> nn.Module:
    """Turn a newly built model into the exported one, in place: its sizes, its weights and its kernels.

    The file states which outputs and inputs of each layer are left, so nothing is guessed. Only safetensors and the model's
    own class are needed.

    Args:
        model: a model built as for training, with any weights.
        path: path of a file that an export wrote.

    Raises:
        ValueError: if the file belongs to another model.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> net = nn.Linear(4, 2)
        >>> with TemporaryDirectory() as folder:
        ...     _ = save_model(net, folder + "/net.safetensors")
        ...     new = load_model(nn.Linear(4, 2), folder + "/net.safetensors")
        >>> torch.equal(new.weight, net.weight)
        True
    """
    note = read_note(path)
    if not isinstance(note, dict) or "blueprint" not in note:
        raise ValueError(f"'{path}' holds tensors without the structure of a model; read them with load_compact.")
    blueprint = Blueprint.from_json(note["blueprint"])
    try:
        blueprint.apply(model).load_state_dict(load_compact(path))
    except (IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"'{path}' does not fit {type(model).__name__} as it was built: {reason}.") from None
    return use_kernels(model, blueprint.kernels)


@torch.no_grad()
def add_bias(layer: Any) -> None:
    """Add a bias of zeros to a layer that has none."""
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(out_count(layer)))


# ---- the optimizer ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def carry_optimizer(optimizer: Optimizer, before: nn.Module, after: nn.Module, blueprint: Blueprint) -> None:
    """Move an optimizer from the whole model to the smaller one, in place: its moments are cut like the weights.

    Args:
        optimizer: an optimizer of the parameters of `before`.
        before: the whole model, with its sizes unchanged.
        after: the smaller model, which is trained from now on.
        blueprint: the changes from `before` to `after`.

    Raises:
        ValueError: if a state of the optimizer has neither the shape of its parameter nor a single number.
    """
    owners = {
        id(p): (path, layer, name)
        for path, layer in before.named_modules()
        for name, p in layer.named_parameters(recurse=False)
    }
    successors: dict[Tensor, Tensor] = {}
    memories: dict[Tensor, Any] = {}
    for old in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if id(old) not in owners:
            raise ValueError(
                "the optimizer holds a parameter that is not in the model `before`; give the model it was made for."
            )
        path, layer, name = owners[id(old)]
        kept = blueprint.kept.get(path, Kept())
        successors[old] = new = after.get_submodule(path).get_parameter(name)
        memories[new] = dict(optimizer.state.get(old, {}))
        for key, value in memories[new].items():
            if isinstance(value, Tensor) and value.numel() > 1:
                if value.shape != old.shape:
                    raise ValueError(
                        f"'{key}' of {type(optimizer).__name__} has the shape {tuple(value.shape)} for the parameter "
                        f"'{path}.{name}' of shape {tuple(old.shape)} and cannot be cut; start with a new optimizer."
                    )
                memories[new][key] = cut_tensor(layer, name, value, kept)
    for group in optimizer.param_groups:
        group["params"] = [successors[old] for old in group["params"]]
    for old in successors:
        optimizer.state.pop(old, None)
    optimizer.state.update({new: memory for new, memory in memories.items() if memory})
