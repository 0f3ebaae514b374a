"""The mathematics: tensors in, tensors out; no modules, no state, no Lightning."""

from lightning_sparse.functional.allocation import (
    ALLOCATIONS,
    allocate,
    counts,
    er,
    erk,
    erk_plus,
    uniform,
    uniform_plus,
)
from lightning_sparse.functional.hypersparse import (
    HYPERSPARSE_ALIGNMENT,
    HyperSparseScale,
    hypersparse_gradient,
    hypersparse_loss,
    hypersparse_scale,
    quantile_rank,
)
from lightning_sparse.functional.masks import (
    apply_bits_,
    channel_score,
    expand_channels,
    mask_bits,
    n_m_mask,
    pack,
    unpack,
)
from lightning_sparse.functional.order import exact_count, kth_smallest, top_k_masks
from lightning_sparse.functional.regrowth import DROP_SCHEDULES, drop_count, held, regrow
from lightning_sparse.functional.schedules import SCHEDULES, constant, cosine, cubic, exponential, linear
from lightning_sparse.functional.scores import hashed_score, magnitude, random_generator, random_score
from lightning_sparse.functional.statistics import (
    layer_density,
    mask_overlap,
    mask_sparsity,
    over_parameterization_rate,
    zero_fraction,
)

__all__ = [
    "ALLOCATIONS",
    "DROP_SCHEDULES",
    "HYPERSPARSE_ALIGNMENT",
    "SCHEDULES",
    "HyperSparseScale",
    "allocate",
    "apply_bits_",
    "channel_score",
    "constant",
    "cosine",
    "counts",
    "cubic",
    "drop_count",
    "er",
    "erk",
    "erk_plus",
    "exact_count",
    "expand_channels",
    "exponential",
    "hashed_score",
    "held",
    "hypersparse_gradient",
    "hypersparse_loss",
    "hypersparse_scale",
    "kth_smallest",
    "layer_density",
    "linear",
    "magnitude",
    "mask_bits",
    "mask_overlap",
    "mask_sparsity",
    "n_m_mask",
    "over_parameterization_rate",
    "pack",
    "quantile_rank",
    "random_generator",
    "random_score",
    "regrow",
    "top_k_masks",
    "uniform",
    "uniform_plus",
    "unpack",
    "zero_fraction",
]
