"""SparseGPT: remove weights of a layer column by column, and adjust the remaining weights to compensate."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_sparse.functional.order import top_k_masks

__all__ = ["compensate", "inverse_factor"]

_TRIES = 8


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    r"""Return the upper triangular U with $U^\top U = (H + \lambda I)^{-1}$; $\lambda$ is `damping` times H's mean diagonal.

    If an input is always zero, its row and column of H are zero, and its diagonal entry is set to the mean diagonal. If a
    singular H is still not positive definite because of rounding, the damping is increased tenfold until it is.

    Args:
        hessian: sums of products of inputs, (groups, columns, columns); it is overwritten.
        damping: a positive number.

    Raises:
        ValueError: if the Hessian is zero everywhere or not finite.

    Example:
        >>> u = inverse_factor(torch.tensor([[[2.0, 1.0], [1.0, 1.0]]]), damping=1e-9)
        >>> u[0].T @ u[0]
        tensor([[ 1.0000, -1.0000],
                [-1.0000,  2.0000]])
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    live = (~dead).sum(-1)
    if not bool(hessian.isfinite().all()) or not bool((live > 0).any()):
        raise ValueError("The inputs are zero throughout or not finite, so nothing can make up for what is removed.")
    mean = (diagonal.clamp(min=0).sum(-1) / live.clamp(min=1)).unsqueeze(-1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))  # a convolution group whose inputs are all zero
    diagonal.copy_(torch.where(dead, mean, diagonal) + damping * mean)
    for attempt in range(_TRIES):
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not bool(failed.any()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed.any()):
                factor: Tensor = upper
                return factor
        diagonal.add_(mean * damping * 9 * 10**attempt)
    raise ValueError("The products of inputs are not positive definite even with much damping; look for very large inputs.")


def compensate(
    matrix: Tensor,
    factor: Tensor,
    keep: int,
    *,
    n_m: tuple[int, int] | None = None,
    dead: Tensor | None = None,
    block_size: int = 128,
) -> Tensor:
    r"""Remove weights and adjust the others so that a layer's outputs change least; column by column, in place.

    $$ \delta w_{i,\,j:} = -\frac{w_{ij}}{U_{jj}} U_{j,\,j:}, \qquad s_{ij} = \left(\frac{w_{ij}}{U_{jj}}\right)^2 $$

    for every removed $w_{ij}$. When a block of columns is reached, the scores $s$ of all its weights decide which ones are
    removed; with `n_m`, separately for every m columns and each row. Weights after the block are updated once per block.

    Source: Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    https://arxiv.org/abs/2301.00774, algorithm 1, without quantization. There, each block keeps the same share; here,
    the numbers kept in the blocks add up to `keep` exactly. Weights of inputs that are always zero are removed first; those
    that stay keep their values, whereas the published code sets them to zero.

    Args:
        matrix: the weights, (groups, outputs, columns); it is overwritten.
        factor: U, from `inverse_factor`.
        keep: total number of weights to keep.
        n_m: (n, m): keep n of m consecutive columns; `keep` is then ignored.
        dead: inputs that are always zero, (groups, columns).
        block_size: B_s, in columns.

    Returns:
        The mask, True = kept.

    Example:
        >>> w = torch.tensor([[[1.0, 2.0]]])
        >>> u = inverse_factor(torch.tensor([[[1.0, 0.5], [0.5, 1.0]]]), damping=1e-9)
        >>> compensate(w, u, 1), w  # what was lost in the first input comes back through the second, by half
        (tensor([[[False,  True]]]), tensor([[[0.0000, 2.5000]]]))
    """
    columns = matrix.shape[-1]
    mask = torch.ones(matrix.shape, dtype=torch.bool, device=matrix.device)
    if n_m is not None:
        block_size = max(block_size // n_m[1], 1) * n_m[1]
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        # Columns first, so that each is contiguous: the loop below goes through them one by one.
        block = matrix[..., start:end].transpose(1, 2).contiguous()
        corner = factor[:, start:end, start:end]
        pivots = corner.diagonal(dim1=-2, dim2=-1)
        empty = None if dead is None else dead[:, start:end, None]
        kept = torch.ones(block.shape, dtype=torch.bool, device=matrix.device)
        if n_m is None:
            number = round(keep * end / columns) - round(keep * start / columns)
            kept = top_k_masks([_scores(block, pivots, empty)], number)[0]
        errors = torch.zeros_like(block)
        for column in range(end - start):
            if n_m is not None and column % n_m[1] == 0:
                some = slice(column, column + n_m[1])
                score = _scores(block[:, some], pivots[:, some], None if empty is None else empty[:, some])
                best = score.sort(dim=1, descending=True, stable=True).indices[:, : n_m[0]]
                kept[:, some] = torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True)
            weight = block[:, column]
            error = errors[:, column] = (weight / pivots[:, column, None]).masked_fill_(kept[:, column], 0)
            rest = block[:, column + 1 :]
            if rest.numel():
                rest.baddbmm_(corner[:, column, column + 1 :, None], error[:, None, :], alpha=-1)
        matrix[..., start:end] = (block * kept).transpose(1, 2)
        mask[..., start:end] = kept.transpose(1, 2)
        if end < columns:
            matrix[..., end:].baddbmm_(errors.transpose(1, 2), factor[:, start:end, end:], alpha=-1)
    return mask


def _scores(block: Tensor, pivots: Tensor, empty: Tensor | None) -> Tensor:
    scores = (block / pivots.unsqueeze(-1)).square_()
    return scores if empty is None else scores.masked_fill_(empty, 0)
