"""Linear centered kernel alignment: how similar two layers' features of the same samples are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = [
    "PAIR_WEIGHTS",
    "cka_from_hsic",
    "linear_cka",
    "linear_cka_matrix",
    "linear_hsic",
    "linear_hsic_matrix",
    "off_diagonal_mean",
    "similarity_penalty",
]

PAIR_WEIGHTS: Mapping[str, Callable[[int], float]] = {
    "constant": lambda distance: 1.0,
    "adjacent": lambda distance: 3.0 if distance == 1 else 1.0,
    "inverse": lambda distance: 3.0 / distance,
}
"""Weight of a pair of layers by their distance |i - j|, at least 1; the published code uses the first for training, the
second for ImageNet, and contains the third as a comment."""


def linear_cka(
    x: Tensor, y: Tensor, unbiased: bool = True, *, centered: bool = True, dtype: torch.dtype = torch.float32
) -> Tensor:
    r"""Similarity of two features of the same samples: the cosine of their centered Gram matrices.

    $\mathrm{CKA}(X, Y) = \langle \tilde K, \tilde L \rangle / (\|\tilde K\| \|\tilde L\|)$ with $K = X X^T$ and
    $L = Y Y^T$. Unbiased, the Gram matrices are U-centered, the similarity of independent features is zero on average, and
    it can be negative; it takes four samples. Biased, both sides are centered by the mean, and few samples of large
    features are always similar. A feature that does not vary over the samples has similarity zero with every other, and
    no gradient.

    Sources: Kornblith et al. 2019, https://arxiv.org/abs/1905.00414, equation 4 (biased); Nguyen et al. 2020,
    https://arxiv.org/abs/2010.15327, equations 2 and 3 (unbiased).

    Args:
        x: features of n samples, the samples along the first dimension; whatever follows is flattened.
        y: features of the same samples; the size may differ.
        unbiased: use the unbiased estimator, which is 0 for fewer than four samples.
        centered: False keeps the means; only with `unbiased=False`.
        dtype: dtype of the sums; features in a wider one keep theirs.

    Raises:
        ValueError: if the features are not of the same samples, or both uncentered and unbiased are requested.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
        >>> round(float(linear_cka(x, 2 * x.flip(1) + 5)), 6)
        1.0
    """
    return linear_cka_matrix([x, y], unbiased, centered=centered, dtype=dtype)[0, 1]


def linear_cka_matrix(
    features: Sequence[Tensor], unbiased: bool = True, *, centered: bool = True, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`linear_cka` of all pairs of features, as a symmetric matrix whose diagonal is 1 (0 for a constant feature).

    One Gram matrix per feature, one product for all pairs: n^2 times the sizes of all features, for n samples.

    Args:
        features: of the same samples; sizes may differ.
        unbiased: use the unbiased estimator.
        centered: False keeps the means; only with `unbiased=False`.
        dtype: dtype of the sums; features in a wider one keep theirs.

    Example:
        >>> features = [torch.tensor([[1.0], [2.0], [4.0], [8.0]]), torch.ones(4, 3)]
        >>> linear_cka_matrix(features).round(decimals=4)
        tensor([[1., 0.],
                [0., 0.]])
    """
    grams, _ = _centered_grams(features, unbiased, centered, dtype)
    norms = grams.square().sum(1, keepdim=True)
    # Made safe before the root and the division; otherwise the gradient of the unselected branch would be NaN.
    return _all_pairs(grams / torch.where(norms > 0, norms, 1).sqrt())


def linear_hsic(
    x: Tensor, y: Tensor, unbiased: bool = True, *, centered: bool = True, dtype: torch.dtype = torch.float32
) -> Tensor:
    r"""The Hilbert-Schmidt independence criterion of two features under linear kernels; not normalized.

    Unbiased $\langle \tilde K, \tilde L \rangle / (n (n - 3))$, the estimator of Song et al. written with U-centered
    matrices; biased $\langle H K H, H L H \rangle / (n - 1)^2$.

    Source: Song et al. 2012, https://jmlr.org/papers/v13/song12a.html, equation 5.

    Args:
        x: features of n samples.
        y: features of the same samples.
        unbiased: use the unbiased estimator, which is 0 for fewer than four samples.
        centered: False keeps the means; only with `unbiased=False`.
        dtype: dtype of the sums; features in a wider one keep theirs.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [0.0], [1.0], [0.0]])
        >>> round(float(linear_hsic(x, x, unbiased=False)), 4)
        0.09
    """
    return linear_hsic_matrix([x, y], unbiased, centered=centered, dtype=dtype)[0, 1]


def linear_hsic_matrix(
    features: Sequence[Tensor], unbiased: bool = True, *, centered: bool = True, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`linear_hsic` of all pairs of features; zero wherever a feature does not vary over the samples.

    Args:
        features: of the same samples; sizes may differ.
        unbiased: use the unbiased estimator.
        centered: False keeps the means; only with `unbiased=False`.
        dtype: dtype of the sums; features in a wider one keep theirs.

    Example:
        >>> linear_hsic_matrix([torch.eye(5), torch.ones(5, 2)], unbiased=False)
        tensor([[0.2500, 0.0000],
                [0.0000, 0.0000]])
    """
    grams, levels = _centered_grams(features, unbiased, centered, dtype)
    n = len(features[0])
    pairs = n * (n - 3) if unbiased else (n - 1) ** 2
    return _all_pairs(grams) * levels.outer(levels) / max(pairs, 1)


def cka_from_hsic(hsic: Tensor) -> Tensor:
    """CKA from a matrix of HSIC values, or of their sums over batches: the ratio of means.

    Summed over batches before the ratio is taken, unbiased values give a CKA that hardly depends on the batch size.

    Source: Nguyen et al. 2020, https://arxiv.org/abs/2010.15327, equation 2.

    Args:
        hsic: symmetric, of all pairs; a diagonal entry of zero marks a constant feature, whose similarities are zero.

    Example:
        >>> cka_from_hsic(torch.tensor([[4.0, 1.0], [1.0, 1.0]]))
        tensor([[1.0000, 0.5000],
                [0.5000, 1.0000]])
    """
    spread = hsic.diagonal()
    scale = torch.where(spread > 0, spread, 1).rsqrt() * (spread > 0)
    return hsic * scale.outer(scale)


def similarity_penalty(
    matrices: Sequence[Tensor], pair_weight: Callable[[int], float] = PAIR_WEIGHTS["constant"], mean: bool = False
) -> Tensor:
    r"""The similarity of all ordered pairs of different layers, group by group.

    $\sum_g \sum_{i \ne j \in g} w_{|i - j|} \mathrm{CKA}(X_i, X_j)$, every unordered pair counted twice as in CKA-SR;
    the constant 1 of a layer with itself is left out. As a mean, divided by the number of pairs: AugCKA-SR for one group
    of all layers.

    Source: Ni et al. 2023, https://arxiv.org/abs/2307.07389.

    Args:
        matrices: from `linear_cka_matrix`, one per group.
        pair_weight: weight of two layers by their distance in the group; see `PAIR_WEIGHTS`.
        mean: divide by the number of pairs.

    Example:
        >>> similarity_penalty([torch.tensor([[1.0, 0.25], [0.25, 1.0]])])
        tensor(0.5000)
    """
    total = torch.stack([(matrix * _pair_weights(matrix, pair_weight)).sum() for matrix in matrices]).sum()
    return total / max(1, sum(len(matrix) * (len(matrix) - 1) for matrix in matrices)) if mean else total


def off_diagonal_mean(matrices: Sequence[Tensor]) -> Tensor:
    """The mean similarity of two different layers of a group, over all pairs of all groups.

    Example:
        >>> off_diagonal_mean([torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.eye(2)])
        tensor(0.2500)
    """
    return similarity_penalty(matrices, mean=True)


def _pair_weights(matrix: Tensor, pair_weight: Callable[[int], float]) -> Tensor:
    by_distance = [0.0] + [float(pair_weight(distance)) for distance in range(1, len(matrix))]
    rows = [[by_distance[abs(i - j)] for j in range(len(matrix))] for i in range(len(matrix))]
    return torch.tensor(rows, dtype=matrix.dtype, device=matrix.device)


def _centered_grams(features: Sequence[Tensor], unbiased: bool, centered: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Centered Gram matrices, one flat row per feature, and the mean square times size by which each was divided.

    Rows of features that do not vary are exactly zero.
    """
    if unbiased and not centered:
        raise ValueError("centered=False has no unbiased form; set unbiased=False.")
    counts = [len(feature) for feature in features]
    if len(set(counts)) > 1:
        raise ValueError(f"CKA compares features of the same samples, but these have {counts} samples.")
    n = counts[0]
    # 16-bit sums would overflow or lose the mean, and autocast would use 16 bits again.
    with torch.autocast(features[0].device.type, enabled=False):
        made = [_gram(feature, centered, torch.promote_types(dtype, feature.dtype)) for feature in features]
        wide = max((gram.dtype for gram, _ in made), key=lambda kind: torch.finfo(kind).bits)
        device = made[0][0].device  # a model may use several devices
        grams = torch.stack([gram.to(device, wide) for gram, _ in made])
        levels = torch.stack([level.to(device, wide) for _, level in made])
        if unbiased and n < 4:
            return (grams * 0).flatten(1), levels
        grams = (_u_center(grams) if unbiased else _center(grams) if centered else grams).flatten(1)
        # n is the largest norm there can be before centring. What is left of a constant feature is rounding.
        dead = grams.detach().square().sum(1, keepdim=True) <= (8 * torch.finfo(wide).eps * n) ** 2
        return torch.where(dead, 0, grams), levels


def _all_pairs(rows: Tensor) -> Tensor:
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ rows.T


def _gram(feature: Tensor, centered: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The Gram matrix of a feature scaled to mean square 1, so that no scale overflows, and the divisor."""
    x = feature.flatten(1).to(dtype)
    # The scale cancels in CKA, and in HSIC it is multiplied back: as a constant, or its gradient would count twice.
    peak = x.detach().abs().amax() if x.numel() else x.new_zeros(())
    peak = torch.where(peak > 0, peak, 1)
    x = x / peak
    square = x.detach().square().mean() if x.numel() else x.new_zeros(())
    square = torch.where(square > 0, square, 1)
    if centered:
        x = x - x.mean(0)
    size = max(1, x.shape[1])
    return x @ x.T / (square * size), square * peak.square() * size


def _u_center(grams: Tensor) -> Tensor:
    n = grams.shape[-1]
    off = 1 - torch.eye(n, dtype=grams.dtype, device=grams.device)
    grams = grams * off
    rows = grams.sum(-1, keepdim=True) / (n - 2)
    total = grams.sum((-2, -1), keepdim=True) / ((n - 1) * (n - 2))
    return (grams - rows - rows.transpose(-2, -1) + total) * off


def _center(grams: Tensor) -> Tensor:
    """Center again, after the features were centered: removes what rounding has left of the means."""
    return grams - grams.mean(-1, keepdim=True) - grams.mean(-2, keepdim=True) + grams.mean((-2, -1), keepdim=True)
