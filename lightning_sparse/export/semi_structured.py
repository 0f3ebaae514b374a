"""Two of four weights: linear layers for the sparse tensor cores of a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.core import Call
from lightning_sparse.export.compare_models import interleaved
from lightning_sparse.export.kernel_choice import KernelChoice, layer_inputs

__all__ = ["SEMI_STRUCTURED", "choose_semi_structured", "to_semi_structured_"]

SEMI_STRUCTURED = "2:4"


def why_not(layer: nn.Module, needs_gpu: bool = True) -> str:
    """Why a linear layer cannot run on the sparse tensor cores; empty if it can."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    rows, columns = weight.shape
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__} is not a plain linear layer"
    if columns % 4 or bool(((weight.detach() != 0).view(rows, -1, 4).sum(-1) > 2).any()):
        return "more than two of four neighboring weights are not zero; train with structure='2:4'"
    if weight.dtype not in (torch.float16, torch.bfloat16):
        return f"{str(weight.dtype).removeprefix('torch.')} has no sparse kernel; convert the model to bfloat16 or float16"
    if rows % 32 or columns % 64:
        return f"its size {rows} x {columns} is not a multiple of 32 x 64"
    if needs_gpu and (not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0)):
        return "it needs a CUDA device of compute capability 8.0 or later (Ampere)"
    return ""


def to_semi_structured_(layer: nn.Linear) -> None:
    """Store a layer's weight as two of four, in place.

    Raises:
        ValueError: if that is not possible.
    """
    if reason := why_not(layer):
        raise ValueError(f"a linear layer of size {tuple(layer.weight.shape)} cannot be 2:4: {reason}.")
    sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
    layer.weight = nn.Parameter(sparse, requires_grad=False)


@torch.no_grad()
def choose_semi_structured(
    model: nn.Module, inputs: Any, *, rounds: int = 30, margin: float = 0.02, network: str | None = None
) -> list[KernelChoice]:
    """Measure every linear layer dense and as two of four on its real inputs, and choose the faster.

    Args:
        model: in bfloat16 or float16 on a CUDA device, trained with `structure="2:4"`.
        inputs: a batch; a tuple holds positional arguments, a dict holds keyword arguments.
        rounds: number of calls, interleaved.
        margin: the fraction of the dense time that must be saved.
        network: name of the submodule that takes the inputs; None finds it.
    """
    given = layer_inputs(model, Call.of(inputs, network))
    choices = []
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        sparsity = float((layer.weight == 0).double().mean())
        reason = why_not(layer) or ("" if name in given else "not called in a forward pass")
        if reason:
            choices.append(KernelChoice(name, sparsity, {}, "dense", reason))
            continue
        x = given[name]
        sparse = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        sparse.weight, sparse.bias = layer.weight, layer.bias
        to_semi_structured_(sparse)
        both = {"dense": lambda f=layer, x=x: f(x), SEMI_STRUCTURED: lambda f=sparse, x=x: f(x)}
        times = {key: t.median for key, t in interleaved(both, rounds, x.device).items()}
        faster = SEMI_STRUCTURED if times[SEMI_STRUCTURED] < (1 - margin) * times["dense"] else "dense"
        choices.append(KernelChoice(name, sparsity, {k: round(t, 4) for k, t in times.items()}, faster))
    return choices
