"""Tensors with many zeros in a small file, restored bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_sparse.core import need
from lightning_sparse.export.compare_models import shared_names
from lightning_sparse.functional import pack, unpack

__all__ = ["compact_size", "load_compact", "read_note", "save_compact"]

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_FORMAT = "lightning_sparse.compact.1"


def compact_size(total: int, kept: int, width: int = 4, gap: int = 1) -> int:
    r"""Bytes of a tensor in the file, without its entry in the header.

    $$ \min(n w, \; \lceil n / 8 \rceil + k w, \; k (w + g)) $$

    for n entries of w bytes of which k are not zero: dense; one bit per entry plus the values; or the values plus the
    distance of each from the previous one in g bytes.

    Args:
        total: n.
        kept: k.
        width: w, 4 for float32.
        gap: g: 1 if no two neighbors are more than 256 apart, 2 up to 65,536, else 4.

    Example:
        >>> compact_size(1000, 100), compact_size(1000, 10), compact_size(1000, 1000)
        (500, 50, 4000)
    """
    return min(total * width, (total + 7) // 8 + kept * width, kept * (width + gap))


def save_compact(tensors: Mapping[str, Tensor], path: str | Path, note: Any = None) -> int:
    """Write tensors to a safetensors file without their zeros; returns its size in bytes.

    A zero is an entry whose bits are all zero. Minus zero and NaN are ordinary values, so loaded tensors are bit-identical.
    Each tensor is stored in the smallest of the three forms of `compact_size`. A tensor with two names is stored once.

    Args:
        tensors: such as a state dict.
        path: path of the file.
        note: any JSON value, stored in the file's header.

    Raises:
        ValueError: if safetensors is not installed, or an entry is not a dense tensor.
    """
    store = need("safetensors.torch", "safetensors")
    parts: dict[str, Tensor] = {}
    forms: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(
                f"'{name}' is not a dense tensor ({type(tensor).__name__}), so it cannot be stored in a compact file."
            )
    again = shared_names(tensors)
    for name, tensor in tensors.items():
        if name in again:
            forms[name] = {"form": "same", "as": again[name]}
            continue
        whole = tensor.detach().cpu().contiguous()
        form, pieces = _encode(whole)
        forms[name] = {"form": form, "shape": list(whole.shape)}
        parts |= {f"{name}:{piece}": value for piece, value in pieces.items()}
    header = {"format": _FORMAT, "tensors": json.dumps(forms), "note": json.dumps(note)}
    store.save_file(parts, str(path), metadata=header)
    return Path(path).stat().st_size


def load_compact(path: str | Path) -> dict[str, Tensor]:
    """Load the tensors of a file that `save_compact` wrote; they are bit-identical.

    Raises:
        ValueError: if the file has another format.
    """
    header, parts = _open(path)
    tensors: dict[str, Tensor] = {}
    for name, how in json.loads(header["tensors"]).items():
        if how["form"] == "same":
            tensors[name] = tensors[how["as"]]
            continue
        pieces = {key: parts[f"{name}:{key}"] for key in _PIECES[how["form"]]}
        tensors[name] = _decode(how["form"], how["shape"], pieces)
    return tensors


def read_note(path: str | Path) -> Any:
    """The note stored in a file."""
    return json.loads(_open(path)[0]["note"])


_PIECES = {"dense": ("values",), "bits": ("bits", "values"), "gaps": ("gaps", "values")}


def _encode(tensor: Tensor) -> tuple[str, dict[str, Tensor]]:
    width = tensor.element_size()
    if width not in _WORDS or not tensor.numel():
        return "dense", {"values": tensor.clone()}
    words = tensor.flatten().view(_WORDS[width])  # some types can be stored, but not indexed
    kept = words != 0
    where = kept.nonzero().flatten()
    gaps = torch.diff(where, prepend=where.new_tensor([-1])) - 1  # zeros between a value and the previous one
    largest = int(gaps.max()) if len(gaps) else 0
    gap, kind = next((g, t) for g, t in _GAPS if largest < 2 ** (8 * g))
    values = words[kept].view(tensor.dtype)
    sizes = {
        "dense": tensor.numel() * width,
        "bits": (tensor.numel() + 7) // 8 + len(where) * width,
        "gaps": len(where) * (width + gap),
    }
    form = min(sizes, key=sizes.__getitem__)
    if form == "bits":
        return form, {"bits": pack(kept), "values": values}
    if form == "gaps":
        return form, {"gaps": gaps.to(kind), "values": values}
    return form, {"values": tensor.clone()}


# Two and four bytes as signed integers, which every version can convert: only the bits matter.
_GAPS = ((1, torch.uint8), (2, torch.int16), (4, torch.int32), (8, torch.int64))


def _decode(form: str, shape: list[int], pieces: dict[str, Tensor]) -> Tensor:
    values = pieces["values"]
    if form == "dense":
        return values
    words = values.view(_WORDS[values.element_size()])  # some types can be stored, but not assigned to
    flat = words.new_zeros(torch.Size(shape).numel())
    if form == "bits":
        where = unpack(pieces["bits"], tuple(shape)).flatten().nonzero().flatten()
    else:
        gaps = pieces["gaps"]
        where = (gaps.long() & (2 ** (8 * gaps.element_size()) - 1 if gaps.element_size() < 8 else -1)).add(1).cumsum(0) - 1
    flat[where] = words
    return flat.view(values.dtype).view(shape)


def _open(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    safe_open = need("safetensors", "safetensors").safe_open
    if not Path(path).is_file():
        raise FileNotFoundError(f"'{path}' is not a file; give one that an export wrote.")
    try:
        with safe_open(str(path), "pt") as file:
            header = file.metadata() or {}
            parts = {key: file.get_tensor(key) for key in file.keys()} if header.get("format") == _FORMAT else {}  # noqa: SIM118
    except Exception as error:
        raise ValueError(f"'{path}' cannot be read as safetensors ({str(error).splitlines()[0]}).") from None
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"'{path}' is a safetensors file, but not from a lightning_sparse export; load it with safetensors."
        )
    return header, parts
