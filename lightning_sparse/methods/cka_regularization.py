"""A penalty on the similarity of layers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, final

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_sparse.core import FeatureLayer, FeatureTap, Position, RunLength, check_choice, feature_layers, group_features
from lightning_sparse.functional import PAIR_WEIGHTS, linear_cka_matrix, off_diagonal_mean, similarity_penalty
from lightning_sparse.loop import Shards, Sparsifier

__all__ = ["CKARegularization"]

PAIRS = ("auto", "stage", "all")
REDUCTIONS = ("sum", "mean")
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@final
class CKARegularization(Sparsifier):
    r"""Make the features of different layers less similar; use it beside any method, or alone for a dense start.

    At station `feature_penalty`, adds $\beta \sum_{i \ne j} w_{ij} \mathrm{CKA}(X_i, X_j)$, over the ordered pairs of layers
    within a stage, to the loss of every k-th batch, computed from the first few samples. With eight samples it costs less
    than one percent of the arithmetic of a ResNet-20 step; features that the autograd graph already holds are not copied.

    A layer called several times in a step contributes its last output. Calls in evaluation mode, without gradients, or on a
    copy of the model do not count. Each rank, and each batch of an accumulated step, has its own term, and the step uses
    their mean: similarity is not additive, so this differs from the similarity of the large batch. Growth by gradient (RigL)
    uses gradients of loss and penalty together. With TF32 matrix products the term is accurate to about three digits.

    Source: Ni et al. 2023, "Learning Sparse Neural Networks with Identity Layers", https://arxiv.org/abs/2307.07389, as in
    the published code and appendix. AugCKA-SR of the same appendix is `pairs="all", reduction="mean", unbiased=False,
    samples=None, every_n_batches=1` with a strength of 0.1.

    Args:
        strength: $\beta$, at least 0. As a sum over pairs the term grows with depth: a ResNet-20 has 18 ordered pairs, a
            ResNet-56 has 216.
        samples: number of samples used, from the start of each batch, at least 4; None uses all.
        every_n_batches: k; the term is added in batches 0, k, 2k, ... of each epoch, and is not scaled up to compensate.
        layers: patterns that select the layers; None finds residual and transformer blocks, or convolutions with their
            activations. See `core.feature_layers`.
        groups: patterns by group name, instead of `layers` and `pairs`.
        pairs: `stage` compares layers of equal resolution (all blocks of a transformer form one stage), `all` compares every
            layer with every other, `auto` uses stages unless no stage has two layers.
        pair_weight: `constant`, `adjacent` (three times the weight for neighbors), `inverse` (three divided by the
            distance), or your function of the distance.
        reduction: `sum` over ordered pairs, or their `mean`.
        unbiased: use the unbiased estimator; the biased one is uninformative with few samples.
        dtype: precision of the term, `float32` or `float64`.
        targets: weights used to check that a checkpoint fits; they are not modified. Exclude frozen ones.
        name: distinguishes several callbacks of the same class.

    Raises:
        ValueError: for layers that cannot be compared; at the start of fit, or in the first batch if it cannot be known
            earlier.
    """

    shards: ClassVar[Shards] = "data"

    removes_weights = False
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("sparsity", "allocation", "structure", "layer_sparsity"),
        "it removes nothing by itself; list it beside a method that does",
    )

    def __init__(
        self,
        *,
        strength: float = 1e-4,
        samples: int | None = 8,
        every_n_batches: int = 5,
        layers: str | Sequence[str] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        pairs: Literal["auto", "stage", "all"] = "auto",
        pair_weight: Literal["constant", "adjacent", "inverse"] | Callable[[int], float] = "constant",
        reduction: Literal["sum", "mean"] = "sum",
        unbiased: bool = True,
        dtype: Literal["float32", "float64"] = "float32",
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.strength, self.samples, self.every_n_batches = strength, samples, every_n_batches
        self.layers, self.groups, self.pairs = layers, groups, pairs
        self.pair_weight, self.reduction, self.unbiased, self.dtype = pair_weight, reduction, unbiased, dtype
        self._check_arguments()
        self._found: list[FeatureLayer] = []
        self._tap: FeatureTap | None = None
        self._due = self._announced = self._warned = False
        self._similarities: list[Tensor] = []

    def check(self, run: RunLength, until: float = 1.0) -> None:
        self._found = feature_layers(self.run.module, self._patterns, self.groups)

    def begin(self) -> None:
        self.resume()

    def resume(self) -> None:
        if "torch._dynamo" in sys.modules:  # any part may be compiled, as a module or through one of its functions
            torch.compiler.reset()  # graphs compiled earlier (a sanity check is enough) do not know about the hooks
        self._tap = FeatureTap(self._found)
        self._due = self._announced = self._warned = False
        self._similarities = []

    def before_batch(self, position: Position) -> None:
        if self._tap is not None:
            coming = self.run.batch_idx + 1
            self._due = self._tap.open = self.strength > 0 and coming % self.every_n_batches == 0

    def feature_penalty(self) -> Tensor | None:
        if self._tap is None or not self._due:
            return None
        self._due = False
        seen = self._tap.take()
        if self._announced and not seen:
            return None  # a batch that did not use the model
        layers, features = [layer for layer, _ in seen], [feature for _, feature in seen]
        groups = group_features(layers, [feature.shape for feature in features], self.pairs)
        self._announce(layers, features, groups)
        matrices = []
        for members in groups.values():
            _refuse_other_samples([(layers[i].name, len(features[i])) for i in members])
            if self.unbiased and len(features[members[0]]) < 4:
                self._warn_of_small_batches(len(features[members[0]]))
                continue
            chosen = [features[i] if self.samples is None else features[i][: self.samples] for i in members]
            matrices.append(linear_cka_matrix(chosen, self.unbiased, dtype=DTYPES[self.dtype]))
        self._similarities = [matrix.detach() for matrix in matrices]
        if not matrices:
            return None
        return self.strength * similarity_penalty(matrices, self._weight_of_pairs, self.reduction == "mean")

    def batch_end(self, output: Any, batch: Any) -> None:
        if self._tap is not None:
            self._tap.take()  # the term may not have been used

    def numbers(self) -> Mapping[str, float | Tensor]:
        """The mean similarity of the compared pairs."""
        return {"similarity": off_diagonal_mean(self._similarities)} if self._similarities else {}

    def release(self) -> None:
        if self._tap is not None:
            self._tap.remove()
        self._tap, self._found = None, []

    @property
    def _patterns(self) -> list[str] | None:
        return [self.layers] if isinstance(self.layers, str) else None if self.layers is None else list(self.layers)

    @property
    def _weight_of_pairs(self) -> Callable[[int], float]:
        return PAIR_WEIGHTS[self.pair_weight] if isinstance(self.pair_weight, str) else self.pair_weight

    def _announce(self, layers: list[FeatureLayer], features: list[Tensor], groups: Mapping[str, list[int]]) -> None:
        """Report once per fit which features are compared."""
        if self._announced:
            return
        self._announced = True
        rows = [("group", "layer", "type", "feature")]
        for name, members in groups.items():
            for i in members:
                shape = "x".join(map(str, features[i].shape[1:]))
                rows.append((name, layers[i].name, type(layers[i].module).__name__, shape))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        rank_zero_info("\n".join([f"{self.label} compares the layers of each group:", *lines]))

    def _warn_of_small_batches(self, samples: int) -> None:
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{self.label} skips batches of fewer than 4 samples (this one has {samples}), for which the unbiased "
                "similarity is undefined; increase the batch size."
            )

    def _check_arguments(self) -> None:
        strength: object = self.strength  # a config may contain anything
        samples: object = self.samples
        every: object = self.every_n_batches
        if not isinstance(strength, Real) or not 0 <= float(strength) < math.inf:
            raise ValueError(f"strength={strength!r} must be a number >= 0, such as 1e-4.")
        if samples is not None and (not isinstance(samples, Integral) or int(samples) < 4):
            raise ValueError(f"samples={samples!r} must be an integer >= 4, or None for the whole batch.")
        if not isinstance(every, Integral) or int(every) < 1:
            raise ValueError(f"every_n_batches={every!r} must be an integer >= 1.")
        if self.groups is not None and not isinstance(self.groups, Mapping):
            raise ValueError(f"groups={self.groups!r} must map names to patterns, such as {{'early': ['layer1.*']}}.")
        if self.groups is not None and (self.layers is not None or self.pairs != "auto" or not self.groups):
            raise ValueError(
                f"groups={dict(self.groups)!r} already selects the layers; name at least one, and omit layers and pairs."
            )
        check_choice("pairs", self.pairs, PAIRS)
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_choice("dtype", self.dtype, DTYPES)
        if not callable(self.pair_weight):
            check_choice("pair_weight", self.pair_weight, PAIR_WEIGHTS, " or give a function of the distance of two layers")


def _refuse_other_samples(counts: list[tuple[str, int]]) -> None:
    for name, count in counts:
        if count != counts[0][1]:
            raise ValueError(
                f"Layers '{counts[0][0]}' and '{name}' are compared, but their outputs have {counts[0][1]} and {count} "
                "samples; choose layers that process whole samples with layers=[...] or groups."
            )
