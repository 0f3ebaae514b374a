"""Files that specify which weights are zero: checkpoints, state dicts, safetensors, and masks themselves."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.core.libraries import first_line, need
from lightning_sparse.functional import unpack

__all__ = ["align_names", "read_masks", "read_tensors"]


def read_tensors(path: str | Path, argument: str) -> dict[str, Any]:
    """The tensors in a file by name: the weights of a checkpoint or a state dict, or the contents of a safetensors file.

    Args:
        path: path of the file; `.safetensors` is recognized by its suffix, anything else is read by `torch.load` with
            `weights_only=True`.
        argument: name of the argument that gave it, for messages.

    Raises:
        ValueError: if there is no file, or it cannot be read in any of these formats.
    """
    return _named(_load(path, argument), path, argument)


def read_masks(path: str | Path, shapes: Mapping[str, Sequence[int]], argument: str) -> dict[str, Tensor]:
    """Read the masks of some weights from a file; True = kept.

    A boolean tensor is a mask, and so is what `MaskSet.state_dict` returns; from `torch.nn.utils.prune` the `*_mask` is
    used. Any other tensor keeps its nonzero entries. In a checkpoint of a method of this package its masks take precedence
    over the weights. Names may differ by one prefix common to all names on one side.

    Args:
        path: path of the file; see `read_tensors`.
        shapes: shapes of the weights, by name.
        argument: name of the argument that gave the path, for messages.

    Raises:
        ValueError: if the file has no entry for a weight, or one of a different shape.
    """
    content = _load(path, argument)
    named = _named(content, path, argument)
    known: dict[str, Any] = {}
    for name, value in named.items():
        known.setdefault(name.removesuffix("_orig"), value)
    known.update({name.removesuffix("_mask"): value for name, value in named.items() if name.endswith("_mask")})
    known.update(_masks_of_methods(content))
    places = align_names([*shapes], known)
    masks = {}
    for name, shape in shapes.items():
        if name not in places:
            raise ValueError(
                f"{argument}='{path}' has nothing for '{name}'; it has {sorted(known)[:3]}. Give a file of this model, or "
                f"exclude the layer with targets=['!{name.rpartition('.')[0] or name}']."
            )
        mask = _as_mask(known[places[name]])
        if mask is None or list(mask.shape) != list(shape):
            found = "no tensor" if mask is None else f"shape {tuple(mask.shape)}"
            raise ValueError(
                f"{argument}='{path}': '{places[name]}' has {found}, but '{name}' has shape {tuple(shape)}; give a file of "
                "this model."
            )
        masks[name] = mask
    return masks


def align_names(wanted: Sequence[str], saved: Collection[str]) -> dict[str, str]:
    """The name in a file for each of the wanted names: the same, or with one prefix added or removed for all.

    The prefix that matches most names is used; names that are not found are left out.

    Example:
        >>> align_names(["net.fc.weight", "net.fc.bias"], ["fc.weight", "fc.bias"])
        {'net.fc.weight': 'fc.weight', 'net.fc.bias': 'fc.bias'}
        >>> align_names(["fc.weight"], ["model.fc.weight"])
        {'fc.weight': 'model.fc.weight'}
    """
    names = set(saved)
    shorter = {
        "".join(f"{part}." for part in name.split(".")[:end]) for name in wanted for end in range(name.count(".") + 1)
    }
    longer = {other[: -len(name)] for name in wanted[:1] for other in names if other.endswith(f".{name}")}
    ways = [
        {name: name[len(prefix) :] for name in wanted if name.startswith(prefix) and name[len(prefix) :] in names}
        for prefix in sorted(shorter, key=len)
    ]
    ways += [{name: prefix + name for name in wanted if prefix + name in names} for prefix in sorted(longer)]
    return max(ways, key=len, default={})


def _load(path: str | Path, argument: str) -> Any:
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{argument}='{path}' is not a file; give a checkpoint, a state dict, safetensors or masks.")
    try:
        if file.suffix == ".safetensors":
            return need("safetensors.torch", "safetensors").load_file(str(file))
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{argument}='{path}' cannot be read ({said}); save it as a state dict.") from None


def _named(content: Any, path: str | Path, argument: str) -> dict[str, Any]:
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{argument}='{path}' holds a {type(content).__name__}, not tensors by name; save a state dict.")
    return dict(content)


def _masks_of_methods(content: Any) -> dict[str, Any]:
    """The masks that methods have stored in a Lightning checkpoint."""
    found: dict[str, Any] = {}
    callbacks = content.get("callbacks") if isinstance(content, Mapping) else None
    for state in callbacks.values() if isinstance(callbacks, Mapping) else ():
        memory = state.get("memory") if isinstance(state, Mapping) else None
        masks = memory.get("masks") if isinstance(memory, Mapping) else None
        found.update(masks if isinstance(masks, Mapping) else {})
    return found


def _as_mask(value: Any) -> Tensor | None:
    if isinstance(value, Mapping) and value.keys() == {"shape", "kept"}:
        return unpack(value["kept"], tuple(value["shape"]))
    return value != 0 if isinstance(value, Tensor) else None
