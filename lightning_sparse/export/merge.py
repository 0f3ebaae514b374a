"""Merge layers that act linearly into their successors: a genuinely shallower network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_sparse.core import (
    Call,
    analyze,
    copy_model,
    count_macs,
    find_networks,
    is_linear,
    padding_of,
    replace_module,
    shared_parameters,
    without_nested_tensors,
)
from lightning_sparse.export.compare_models import difference, measure, runner
from lightning_sparse.export.merge_judge import Judge, positive_shares
from lightning_sparse.export.merge_report import LayerVerdict, MergeReport, count_depth, count_parameters
from lightning_sparse.export.merge_surgery import Surgery

__all__ = ["fresh_start", "merge_layers", "pad_in_front"]


def merge_layers(
    model: nn.Module,
    inputs: Any = None,
    *,
    tolerance: float = 1e-3,
    input_range: Sequence[float] | None = None,
    allow_growth: bool = False,
    rounds: int = 20,
    network: str | None = None,
) -> tuple[nn.Module, MergeReport]:
    """A copy of a network in which layers that act linearly are merged into the next one, and a report.

    A layer merges if its activation has no effect: for all inputs (`certified`), or up to a negative part within the
    tolerance (`near`: the activation is deleted, the weights stay as they are). Merged layers are judged again until nothing
    changes. A residual block whose first layer is merged becomes one layer with its shortcut. Products are computed in
    float64. Batch normalization is folded where its layer merges, and stays elsewhere.

    The result is an `nn.Sequential` if modules simply follow each other, otherwise a `torch.fx.GraphModule`, in evaluation
    mode. For a LightningModule it is a copy with such networks. `F.dropout` is removed where a network is traced.

    Args:
        model: a network that torch.fx can trace, or a LightningModule that contains one.
        inputs: a batch, for the change of outputs, multiplications, latency, and fractions of positive pre-activations; a
            tuple holds positional arguments, a dict holds keyword arguments.
        tolerance: maximum ratio of negative part to whole that is merged, in [0, 1); 0 for certified merges only.
        input_range: the smallest and largest input, such as (0, 1); the first layer may then merge too.
        allow_growth: also merge where the product has more parameters than its factors.
        rounds: number of forward passes for the median latency; 0 skips it.
        network: name of the submodule that takes the inputs; None finds it.

    Raises:
        ValueError: if nothing in the model can be traced, or the tolerance is out of range.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = net[2].weight.data.abs_(), net[2].bias.data.abs_()
        >>> smaller, report = merge_layers(net)
        >>> report.depth, report.merged, smaller
        ((3, 2), ['2'], Sequential(
          (0): Linear(in_features=3, out_features=8, bias=True)
          (1): ReLU()
          (2): Linear(in_features=8, out_features=2, bias=True)
        ))
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance} must be in [0, 1): a ratio of norms.")
    before, after = (without_nested_tensors(copy_model(model).eval()) for _ in range(2))
    call = None if inputs is None else Call.of(inputs, network)
    networks, failures = find_networks(after)
    if not networks:
        reasons = "; ".join(f"'{name}': {reason}" for name, reason in list(failures.items())[:3])
        raise ValueError(
            f"Nothing in {type(model).__name__} can be merged: {reasons or 'it has no linear layer or convolution'}. Put "
            "the layers into a module that torch.fx can trace, such as nn.Sequential."
        )
    judge = Judge(tolerance, input_range, allow_growth, shared_parameters(after), positive_shares(before, call))
    for part in networks:
        smaller = Surgery(part, judge).operate()
        if smaller is not part.module:
            after = replace_module(after, part.path, smaller)
    judge.verdicts += [LayerVerdict(name, "active", False, note=reason) for name, reason in failures.items()]
    report = MergeReport(
        (count_depth(before), count_depth(after)),
        (count_parameters(before), count_parameters(after)),
        layers=judge.verdicts,
    )
    if call is not None:
        _compare(before, after, call, rounds, report)
    return after, report


def fresh_start(model: nn.Module) -> nn.Module:
    """Reinitialize all layers in place, for the `fresh` start of a refit; returns the model.

    Linear layers and convolutions get values that preserve the scale of signals through ReLUs (He et al. 2015,
    https://arxiv.org/abs/1502.01852) and biases of zero: with those of `nn.Linear` a deep network without normalization does
    not learn. Everything else resets itself.
    """
    for module in model.modules():
        reset = getattr(module, "reset_parameters", None)
        if is_linear(module):
            layer: Any = module
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif callable(reset):
            reset()
    return model


def pad_in_front(model: nn.Module) -> nn.Module:
    """A copy of a network with all padding moved to the front of each chain of convolutions, so that they can merge exactly.

    Padding zeros between two convolutions stand for values that the first one would have computed; a merge cannot account
    for that. At the front they do no harm. Outputs near the border change, so do this when a network is built, before it is
    trained.

    Args:
        model: a network, or a LightningModule that contains some.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        >>> net = pad_in_front(net)
        >>> net[0].padding, net[2].padding, net(torch.zeros(1, 1, 8, 8)).shape[2:]
        ((2, 2), (0, 0), torch.Size([8, 8]))
    """
    model = copy_model(model)
    shared = shared_parameters(model)
    for network in find_networks(model)[0]:
        links = analyze(network, (0.0, math.inf), shared, padded=True).links
        for link in reversed(links):
            first: Any = link.layer
            second: Any = model.get_submodule(link.successor)
            if isinstance(first, nn.Linear) or first.padding_mode != "zeros" or second.padding_mode != "zeros":
                continue
            ahead, behind = padding_of(first) or (), padding_of(second) or ()
            moved = tuple(p + s * q for p, s, q in zip(ahead, first.stride, behind, strict=True))
            for layer, padding in ((first, moved), (second, (0,) * len(behind))):
                layer.padding = padding
    return model


def _compare(before: nn.Module, after: nn.Module, inputs: Call, rounds: int, report: MergeReport) -> None:
    first, second = runner(before, inputs), runner(after, inputs)
    report.change = difference(first(), second())
    first_macs, second_macs = count_macs(before, first, inputs.samples), count_macs(after, second, inputs.samples)
    report.macs = sum(first_macs.values()), sum(second_macs.values())
    if rounds:
        report.milliseconds = measure(first, second, rounds, next(before.parameters()).device)
