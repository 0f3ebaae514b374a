"""What the tables share: names of variants, results by suite, and the words in a cell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.record import RESULTS, Row, pick, spread
from benchmarks.suites import SUITES

LABELS = {
    "dense": "dense (0%)",
    "random": "`RandomSparsity`",
    "random + CKA-SR": "with `CKARegularization(strength=1e-4)`",
    "L1, then one-shot": "`WeightPenalty`, L1, then one-shot",
    "lottery ticket": "`LotteryTicket`, 3 rounds in the same epochs",
    "one-shot + fine-tuning": "`MagnitudePruning`, one-shot in the middle",
    "gradual": "`MagnitudePruning`, gradual",
    "L1-ART": '`HyperSparse(penalty="l1")`',
    "AC/DC": "`ACDC`",
    "RigL, fan-in": '`RigL(structure="fan_in")`',
    "gradual, blocks of 4": '`MagnitudePruning(structure="block:4x4")`, gradual',
    "gradual 2:4": '`MagnitudePruning(structure="2:4")`, gradual',
    "AC/DC 2:4": '`ACDC(structure="2:4")`',
    "SR-STE": "`SRSTE()`",
    "S-STE": "`SRSTE(soft=True)`",
    "SR-STE, transposable": '`SRSTE(structure="transposable 2:4", every="40 steps")`',
    "SCL": "`SparseConnectivityLearning(sparsity=...)`",
    "static": "SGD, random static mask",
    "MagnitudePruning": "`MagnitudePruning`, a mask",
    "ModelPruning": "Lightning's `ModelPruning`, a mask",
    "torch.nn.utils.prune": "`torch.nn.utils.prune`, a mask",
    "parametrize": "`parametrize`, a mask",
    "fasterai Sparsifier": "fasterai `Sparsifier`, a mask",
    "WeightPenalty, L1": "`WeightPenalty`, L1",
    "fasterai penalty, L1": "fasterai, L1 in the loss",
    "WeightPenalty, group lasso": "`WeightPenalty`, group lasso",
    "Torch-Pruning penalty, group norm": "Torch-Pruning, group norm",
    "inside MagnitudePruning's stations": "inside `MagnitudePruning`",
}

MODELS = {"mlp": "perceptron", "resnet18": "ResNet-18", "vit": "ViT-tiny"}


def label(name: str) -> str:
    return LABELS.get(name, f"`{name}`")


def runs(name: str) -> list[dict[str, Any]]:
    return SUITES[name].content(RESULTS)["runs"]


def numbers(name: str) -> dict[str, Any]:
    return SUITES[name].content(RESULTS)["numbers"]


def tests(found: Sequence[Mapping[str, Any]], **what: Any) -> str:
    return spread([run["test"] for run in pick(found, **what)])


def best(cells: Iterable[str], lowest: bool = False) -> float:
    return (min if lowest else max)(float(cell.split()[0]) for cell in cells if cell)


def embolden(rows: Sequence[Row], columns: Iterable[int], lowest: bool = False) -> None:
    """Mark the best mean of each column."""
    for column in columns:
        wanted = best((row[column] for row in rows), lowest)
        for row in rows:
            mean, _, rest = row[column].partition(" ")
            if mean and float(mean) == wanted:
                row[column] = f"**{mean}** {rest}".rstrip()


def percent(sparsities: Sequence[float]) -> Row:
    return [f"{100 * sparsity:g}%" for sparsity in sparsities]


def ratio(found: dict[str, float], digits: int = 2) -> str:
    """A median with its middle half."""
    return f"{found['ratio']:.{min(3, digits + 1)}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def places(titles: Iterable[str]) -> Row:
    """Model and batch size, from titles that name them."""
    found = [re.search(r"(\w+), batch (\d+)", title) for title in titles]
    return [f"{MODELS[match[1]]}, {match[2]}" for match in found]
