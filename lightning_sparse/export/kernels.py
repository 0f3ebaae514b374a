"""Sparse kernels for linear layers on a CPU: all are measured, and the fastest is kept."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.core import Call, replace_module, without_nested_tensors
from lightning_sparse.export.compare_models import interleaved
from lightning_sparse.export.condensed import CondensedLinear
from lightning_sparse.export.kernel_choice import KernelChoice, layer_inputs
from lightning_sparse.export.semi_structured import SEMI_STRUCTURED, to_semi_structured_

__all__ = ["SparseLinear", "choose_kernels", "use_kernels"]

BLOCKS = (4, 8, 16, 32)


class SparseLinear(nn.Module):
    """A linear layer whose weight is stored in rows or blocks, for inference on a CPU.

    It computes (W x^T)^T, which is many times faster than x W^T in torch's kernels for these layouts.

    Args:
        layer: a layer with zeros in its weight.
        kernel: `csr`, or `bsr4`, `bsr8`, `bsr16`, `bsr32` for square blocks.

    Raises:
        ValueError: if torch has no such kernel for the weight.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> _ = layer.weight.data.mul_(torch.eye(4, 8))
        >>> torch.allclose(SparseLinear(layer, "csr")(torch.ones(2, 8)), layer(torch.ones(2, 8)))
        True
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, kernel: str) -> None:
        super().__init__()
        self.in_features, self.out_features, self.kernel = layer.in_features, layer.out_features, kernel
        self.register_buffer("weight", to_layout(layer.weight.detach(), kernel))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().clone())
        self.register_forward_pre_hook(_call_me)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        product = (self.weight @ flat.t()).t()
        if self.bias is not None:
            product = product + self.bias
        return product.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kernel={self.kernel}"


def _call_me(layer: nn.Module, args: Any) -> None:
    """Do nothing; `nn.TransformerEncoderLayer` calls its layers only if they have hooks, and else reads their weights."""


def to_layout(weight: Tensor, kernel: str) -> Tensor:
    """A weight in rows (`csr`) or square blocks (`bsr16`), with 4-byte indices where the kernel takes them."""
    if kernel == "csr":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*in beta state")
            csr = weight.to_sparse_csr()
            return torch.sparse_csr_tensor(
                csr.crow_indices().int(), csr.col_indices().int(), csr.values(), csr.shape, check_invariants=True
            )
    block = int(kernel.removeprefix("bsr")) if kernel.removeprefix("bsr").isdigit() and kernel.startswith("bsr") else 0
    if not block:
        raise ValueError(
            f"kernel='{kernel}' is unknown; choose condensed, csr, {', '.join(f'bsr{b}' for b in BLOCKS)} or 2:4."
        )
    if any(size % block for size in weight.shape):
        raise ValueError(f"kernel='{kernel}' needs sizes that are multiples of {block}, not {tuple(weight.shape)}.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*in beta state")
        return weight.to_sparse_bsr((block, block))


def with_kernel(layer: nn.Linear, kernel: str) -> CondensedLinear | SparseLinear:
    """Make a linear layer with another kernel.

    Raises:
        ValueError: if there is no such kernel, or the weight does not fit it.
    """
    return CondensedLinear(layer) if kernel == CondensedLinear.kernel else SparseLinear(layer, kernel)


def use_kernels(model: nn.Module, kernels: Mapping[str, str]) -> nn.Module:
    """Replace linear layers by ones with other kernels, in place.

    If there are any, an `nn.TransformerEncoder` packs padded inputs no longer into nested tensors, which no kernel supports.
    """
    if kernels:
        without_nested_tensors(model)
    for name, kernel in kernels.items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear):
            raise ValueError(f"'{name}' is a {type(layer).__name__}; only linear layers have sparse kernels.")
        if kernel == SEMI_STRUCTURED:
            to_semi_structured_(layer)
        else:
            model = replace_module(model, name, with_kernel(layer, kernel))
    return model


@torch.no_grad()
def choose_kernels(
    model: nn.Module,
    inputs: Any,
    *,
    rounds: int = 15,
    margin: float = 0.05,
    blocks: tuple[int, ...] = BLOCKS,
    network: str | None = None,
) -> list[KernelChoice]:
    """Measure every linear layer dense, condensed, in CSR and in BSR on its real inputs, and choose the fastest.

    Batch size and threads are those of this call: use the values of your deployment.

    Args:
        model: a model on a CPU.
        inputs: a batch; a tuple holds positional arguments, a dict holds keyword arguments.
        rounds: number of calls, with all kernels interleaved.
        margin: a kernel is kept only if it saves this fraction of the dense time, so that noise does not count as a gain.
        blocks: sizes of square blocks to try.
        network: name of the submodule that takes the inputs; None finds it.
    """
    given = layer_inputs(model, Call.of(inputs, network))
    choices = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            choices.append(_choose(name, layer, given.get(name), rounds, margin, blocks))
    return choices


def _choose(
    name: str, layer: nn.Linear, x: Tensor | None, rounds: int, margin: float, blocks: tuple[int, ...]
) -> KernelChoice:
    weight = layer.weight
    sparsity = float((weight == 0).double().mean())
    if type(layer) is not nn.Linear:
        return KernelChoice(name, sparsity, {}, "dense", f"a {type(layer).__name__} is not a plain linear layer")
    if x is None:
        return KernelChoice(name, sparsity, {}, "dense", "not called in a forward pass")
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.float64):
        where = f"{weight.dtype} on {weight.device.type}".removeprefix("torch.")
        return KernelChoice(
            name, sparsity, {}, "dense", f"no sparse kernel for {where}; move the model to the CPU in float32"
        )
    if sparsity < 0.5:
        return KernelChoice(name, sparsity, {}, "dense", "less than half of it is zero")
    tried: dict[str, Any] = {"dense": layer}
    for kernel in ("condensed", "csr", *(f"bsr{block}" for block in blocks)):
        try:
            made = with_kernel(layer, kernel)
            made(x)
        except (ValueError, RuntimeError):
            continue
        if not kernel.startswith("bsr") or made.weight.values().numel() < 0.5 * weight.numel():  # type: ignore[operator]
            tried[kernel] = made
    timings = interleaved({kernel: partial(made, x) for kernel, made in tried.items()}, rounds)
    times = {kernel: timing.median for kernel, timing in timings.items()}
    fastest = min(times, key=times.__getitem__)
    if times[fastest] > (1 - margin) * times["dense"]:
        fastest = "dense"
    return KernelChoice(name, sparsity, {k: round(t, 4) for k, t in times.items()}, fastest)
