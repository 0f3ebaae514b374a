"""How much of a model is chosen, what is missed, and when that is said."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from lightning_sparse import MagnitudePruning
from lightning_sparse.core import find_targets
from lightning_sparse.core.coverage import Coverage, coverage
from lightning_sparse.testing import Toy, fit, network


class Strange(nn.Module):
    """A matrix that is not known, and what looks like one but is none."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs))
        self.gain = nn.Parameter(torch.ones(1, outputs, 1))
        self.class_token = nn.Parameter(torch.zeros(2, outputs))


def net(inputs: int = 4) -> nn.Module:
    return nn.ModuleDict({"words": nn.Embedding(9, 5), "body": nn.Linear(10, 20), "own": Strange(inputs, 10)})


def measured(module: nn.Module, patterns: Sequence[str] = ("*",)) -> Coverage:
    return coverage(module, patterns, {target.name for target in find_targets(module, patterns)})


def test_what_is_missed_is_counted_and_named() -> None:
    found = measured(net())
    assert found.model == 45 + 220 + 40 + 10 + 20
    assert (found.matrices, found.missed, found.largest, found.layer) == (240, 40, "own.kernel", "Strange")
    assert found.warning == (
        "leaves out 17% of the trainable weights in matrices, embeddings not counted; the largest is 'own.kernel' (Strange, "
        "of which no weight 'kernel' is known; register_layer says how it is laid out). register_layer makes Strange known, "
        "targets=['*', 'type:Strange'] takes it as it is, and targets=['*', '!type:Strange'] leaves it out without this "
        "warning."
    )


@pytest.mark.parametrize(
    ("module", "patterns"),
    [
        (net(2), ["*"]),  # 20 of 220
        (net(), ["!type:Strange"]),
        (net(), ["body"]),
        (net(), ["*", "type:Strange"]),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(40, 40).requires_grad_(False)), ["*"]),
    ],
)
def test_nothing_is_said_of_a_tenth_or_of_what_was_asked_for(module: nn.Module, patterns: list[str]) -> None:
    assert measured(module, patterns).warning is None


def test_a_layer_of_one_input_or_output_has_a_matrix() -> None:
    assert measured(nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 1))).matrices == 16


def test_a_shared_weight_counts_once() -> None:
    module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    module[1].weight = module[0].weight
    assert measured(module) == Coverage(model=16, matrices=16)


def test_a_fit_says_it() -> None:
    module = Toy(net=nn.Sequential(*network(), Strange(4, 400)))
    module.net[-1].forward = lambda x: x
    with pytest.warns(UserWarning, match=r"MagnitudePruning leaves out \d+% .*'net.9.kernel'"):
        fit(module, MagnitudePruning(0.5), max_epochs=1)
