"""Merge adapters into a sparse base, which stays as sparse as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_sparse.core import Masks, copy_model, is_training, replace_module

__all__ = ["AdapterRow", "MergedAdapters", "merge_adapters"]


class AdapterRow(NamedTuple):
    """The effect of a merge on one weight.

    Args:
        name: name of the weight in the merged model.
        zeros: number of zero entries, before and after.
        total: number of entries.
        lost: the fraction of the adapter's change that fell on zeros and was dropped, by norm.
        stray: number of entries that the masks drop, but that something had written to before the merge; they are zero now.
    """

    name: str
    zeros: int
    total: int
    lost: float
    stray: int = 0


class MergedAdapters(NamedTuple):
    """A merged model, and the effect of the merge on it.

    Args:
        model: plain, without adapters.
        rows: one per weight that an adapter changed.
    """

    model: nn.Module
    rows: list[AdapterRow]

    def __str__(self) -> str:
        lines = [("weight", "zeros", "sparsity", "change left out", "")]
        for row in self.rows:
            note = f"{row.stray:,} of them were not zero before" if row.stray else ""
            zeros = f"{row.zeros:,} of {row.total:,}"
            lines.append((row.name, zeros, f"{row.zeros / row.total:.2%}", f"{row.lost:.2%}", note))
        widths = [max(len(line[column]) for line in lines) for column in range(5)]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def merge_adapters(
    model: nn.Module, masks: Mapping[str, Tensor] | Masks | None = None, adapters: Sequence[str] | None = None
) -> MergedAdapters:
    """Merge PEFT adapters into their base and keep the zeros of the base.

    A low-rank product is dense, so a plain merge fills the zeros of a sparse base. Here each merged weight is masked like
    its base, and the result is checked entry by entry. The dropped part no longer contributes to the model's outputs; the
    report says how much of each adapter's change that is.

    Args:
        model: a model from `peft.get_peft_model`, or a module that contains one, such as a LightningModule; it is not
            changed.
        masks: True = kept, by the names of base weights in the model (`KeepSparsity().masks` has them). For weights without
            a mask, and if masks is None, the current zeros are kept. Entries that the masks drop but something has written
            to are zero afterwards, and the report counts them.
        adapters: names of the adapters to merge; None uses the active ones.

    Raises:
        ValueError: if there are no adapters, they are already merged, their base has no zeros, or a Trainer is training the
            module.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> _ = net[0].weight.data[:, :2].zero_()
        >>> adapted = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        >>> merged, rows = merge_adapters(adapted)
        >>> [(row.name, row.zeros, row.total) for row in rows], type(merged[0]).__name__
        ([('0.weight', 8, 16)], 'Linear')
    """
    if is_training(model):
        raise ValueError(
            f"A Trainer is training this {type(model).__name__}, and what methods have attached to it would be copied too; "
            "merge after trainer.fit, or from a checkpoint."
        )
    merged = copy_model(model)
    places = [path for path, part in merged.named_modules() if _is_adapted(part)]
    outermost = [path for path in places if not any(path.startswith(f"{o}." if o else "") for o in places if o != path)]
    if not outermost:
        raise ValueError(f"{type(model).__name__} contains no PEFT adapters; give the model that get_peft_model returned.")
    changed: list[_Merged] = []
    for path, layer in merged.named_modules():
        if _is_tuned(layer):
            changed += _merge_layer(path, layer, masks, adapters)
    if all(bool(found.mask.all()) for found in changed):
        raise ValueError(
            "The base of these adapters has no zeros, so there is nothing to keep; merge them with merge_and_unload(), or "
            "give masks."
        )
    for path in outermost:
        part: Any = merged.get_submodule(path)
        merged = replace_module(merged, path, part.unload())
    names = {id(layer): path for path, layer in merged.named_modules()}
    rows = []
    for layer, leaf, mask, lost, stray in changed:
        name = f"{names.get(id(layer), type(layer).__name__)}.{leaf}".lstrip(".")
        weight = layer.get_parameter(leaf)
        if bool(weight[~mask.to(weight.device)].count_nonzero()):
            raise RuntimeError(
                f"'{name}' is not zero after the merge where its base was; its adapter merges in another way."
            )
        rows.append(AdapterRow(name, int((~mask).count_nonzero()), mask.numel(), lost, stray))
    return MergedAdapters(merged, rows)


class _Merged(NamedTuple):
    base: nn.Module
    leaf: str
    mask: Tensor
    lost: float
    stray: int


def _is_adapted(part: nn.Module) -> bool:
    """Whether this is a model with adapters; recognized by its methods, so that peft need not be imported."""
    return hasattr(part, "unload") and hasattr(part, "merge_and_unload")


def _is_tuned(layer: nn.Module) -> bool:
    return all(hasattr(layer, name) for name in ("get_base_layer", "merge", "merged", "base_layer"))


@torch.no_grad()
def _merge_layer(
    path: str, layer: Any, masks: Mapping[str, Tensor] | Masks | None, adapters: Sequence[str] | None
) -> list[_Merged]:
    """Merge the adapters of one layer, whose base has one weight or several."""
    if layer.merged:
        raise ValueError(
            f"The adapter of '{path}' is already merged, so the zeros of its base are unknown; call unmerge_adapter() first."
        )
    base: nn.Module = layer.get_base_layer()
    weights = {leaf: weight for leaf, weight in base.named_parameters(recurse=False) if weight.ndim > 1}
    for weight in weights.values():
        if not weight.is_floating_point():
            raise ValueError(
                f"The base of '{path}' is stored as {weight.dtype}, in which zeros cannot be kept; load it in 16 bits."
            )
    kept = {leaf: _mask(f"{path}.base_layer.{leaf}", weight, masks) for leaf, weight in weights.items()}
    before = {leaf: weight.detach().clone() for leaf, weight in weights.items()}
    layer.merge(safe_merge=True, adapter_names=None if adapters is None else list(adapters))
    found = []
    for leaf, mask in kept.items():
        weight = base.get_parameter(leaf)
        change = weight.detach().float() - before[leaf].float()
        whole = float(change.norm())
        lost = float(change[~mask].norm()) / whole if whole else 0.0
        weight.masked_fill_(~mask, 0)
        found.append(_Merged(base, leaf, mask, lost, int(before[leaf][~mask].count_nonzero())))
    return found


def _mask(name: str, weight: Tensor, masks: Mapping[str, Tensor] | Masks | None) -> Tensor:
    if masks is None or name not in masks:
        return weight.detach() != 0
    mask = masks[name]
    if mask.shape != weight.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"masks['{name}'] must be boolean of shape {tuple(weight.shape)}, not {mask.dtype} of {tuple(mask.shape)}."
        )
    return mask.to(weight.device)
