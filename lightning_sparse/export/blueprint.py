"""How a smaller model differs from a newly built one: sizes, folded normalizations, kernels; stored beside the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse.core import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS, out_count
from lightning_sparse.export.compact import load_compact, read_note, save_compact
from lightning_sparse.export.kernels import use_kernels

__all__ = ["Blueprint", "Kept", "add_bias", "carry_optimizer", "load_model", "save_model"]


@dataclass(frozen=True)
class Kept:
    """Which outputs and inputs of a layer are left, as positions in the layer it was; None for all.

    Args:
        outputs: rows, filters or channels, ascending.
        inputs: columns or channels that are read, ascending.
    """

    outputs: list[int] | None = None
    inputs: list[int] | None = None

    def then(self, after: Kept) -> Kept:
        """What is left if `after` is kept of what this keeps."""
        return Kept(_then(self.outputs, after.outputs), _then(self.inputs, after.inputs))


@dataclass(frozen=True)
class Blueprint:
    """The changes to a newly built model that make the weights of an export fit it.

    Args:
        kept: layer -> what is left of it.
        folded: normalizations that were folded.
        biased: layers that got a bias from one.
        kernels: layer -> the kernel that multiplies its weight, such as `csr`.
    """

    kept: Mapping[str, Kept] = field(default_factory=dict)
    folded: tuple[str, ...] = ()
    biased: tuple[str, ...] = ()
    kernels: Mapping[str, str] = field(default_factory=dict)

    @torch.no_grad()
    def apply(self, model: nn.Module) -> nn.Module:
        """Fold and cut a model in place, with its current weights; `load_model` sets kernels after the weights.

        Raises:
            ValueError: if the model has other layers.
        """
        modules = dict(model.named_modules())
        unknown = [name for name in (*self.folded, *self.biased, *self.kept, *self.kernels) if name not in modules]
        if unknown:
            raise ValueError(
                f"the export holds a layer '{unknown[0]}' that {type(model).__name__} does not have; build the model as it "
                "was trained."
            )
        for name in self.biased:
            add_bias(modules[name])
        for name in self.folded:
            model.set_submodule(name, nn.Identity())
        for name, kept in self.kept.items():
            cut(modules[name], kept)
        return model

    def then(self, kept: Mapping[str, Kept]) -> Blueprint:
        """The blueprint with layers cut once more."""
        joined = {name: self.kept.get(name, Kept()).then(kept.get(name, Kept())) for name in {**self.kept, **kept}}
        return replace(self, kept=joined)

    def to_json(self) -> dict[str, Any]:
        """The blueprint as plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Blueprint:
        """The blueprint from the values of `to_json`."""
        kept = {name: Kept(**parts) for name, parts in values["kept"].items()}
        return cls(kept, tuple(values["folded"]), tuple(values["biased"]), dict(values["kernels"]))


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
    """Turn a newly built model into the exported one: its size, its weights, its kernels; in place.

    The file says which outputs and inputs of each layer are left. Nothing is guessed, and only safetensors and the model's
    own class are needed.

    Args:
        model: built as for training, with any weights.
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


# ---- cutting ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def add_bias(layer: Any) -> None:
    """Give a layer a bias of zeros, if it has none."""
    if layer.bias is None:
        layer.bias = nn.Parameter(layer.weight.new_zeros(out_count(layer)))


def cut(layer: Any, kept: Kept) -> None:
    """Take outputs and inputs out of a layer, in place: its parameters, buffers and sizes."""
    pieces = {name: cut_tensor(layer, name, tensor, kept) for name, tensor in own_tensors(layer).items()}
    if isinstance(layer, CONVOLUTIONS):
        groups = _group_members(layer, kept)
        layer.groups = len(groups)
    for name, piece in pieces.items():
        old = getattr(layer, name)
        new: Any = nn.Parameter(piece, old.requires_grad) if isinstance(old, nn.Parameter) else piece
        setattr(layer, name, new)
    for names, indices in ((_OUT_NAMES, kept.outputs), (_IN_NAMES, kept.inputs)):
        for name in names:
            if indices is not None and hasattr(layer, name):
                setattr(layer, name, len(indices))


_OUT_NAMES = ("out_features", "out_channels", "num_features", "num_parameters")
_IN_NAMES = ("in_features", "in_channels")


def own_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of a layer itself."""
    return dict((*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)))


def cut_tensor(layer: nn.Module, name: str, tensor: Tensor, kept: Kept) -> Tensor:
    """What is left of a tensor in the shape of one of the layer's: a parameter, a gradient, a moment."""
    if name == "weight" and tensor.ndim >= 2:
        if not isinstance(layer, CONVOLUTIONS) or layer.groups == 1:
            first, second = (
                (kept.inputs, kept.outputs) if isinstance(layer, TRANSPOSED_CONVOLUTIONS) else (kept.outputs, kept.inputs)
            )
            return _take(_take(tensor, 0, first), 1, second)
        rows = [_take(_take(tensor, 0, ahead), 1, within) for ahead, within in _group_members(layer, kept)]
        return torch.cat(rows)
    if tensor.ndim == 1 and len(tensor) == out_count(layer):
        return _take(tensor, 0, kept.outputs)
    return tensor


def _group_members(layer: Any, kept: Kept) -> list[tuple[list[int], list[int]]]:
    """Of each group that is left: positions along the weight's first dimension, and along its second within the group."""
    outputs = range(layer.out_channels) if kept.outputs is None else kept.outputs
    inputs = range(layer.in_channels) if kept.inputs is None else kept.inputs
    per_out, per_in = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    within: list[tuple[list[int], list[int]]] = [([], []) for _ in range(layer.groups)]
    for output in outputs:
        within[output // per_out][0].append(output)
    for read in inputs:
        within[read // per_in][1].append(read)
    members = []
    for out, ins in within:
        if out and ins:
            transposed = isinstance(layer, TRANSPOSED_CONVOLUTIONS)
            members.append((ins, [o % per_out for o in out]) if transposed else (out, [i % per_in for i in ins]))
    if len({(len(ahead), len(within)) for ahead, within in members}) > 1:
        raise ValueError(f"groups of {layer} would differ in size.")
    return members


def _take(tensor: Tensor, dim: int, indices: Sequence[int] | None) -> Tensor:
    return tensor.clone() if indices is None else tensor.index_select(dim, torch.tensor(indices, device=tensor.device))


def _then(first: list[int] | None, second: list[int] | None) -> list[int] | None:
    if first is None or second is None:
        return second if first is None else first
    return [first[i] for i in second]


# ---- the optimizer ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def carry_optimizer(optimizer: Optimizer, before: nn.Module, after: nn.Module, blueprint: Blueprint) -> None:
    """Let an optimizer of the whole model go on with the smaller one: its moments are cut as the weights were; in place.

    Args:
        optimizer: whose parameters are those of `before`.
        before: the whole model, with its sizes unchanged.
        after: the smaller one, which is trained from here on.
        blueprint: by which it was made smaller.

    Raises:
        ValueError: if a memory of the optimizer has neither the shape of its parameter nor a single number.
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
