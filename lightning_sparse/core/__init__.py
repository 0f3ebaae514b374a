"""State of `torch.nn` and `torch.optim`: which weights, their masks, their moments, how much, when."""

from lightning_sparse.core.budget import Budget, check_sparsity
from lightning_sparse.core.chains import (
    Chains,
    Link,
    Network,
    analyze,
    convolution_of,
    effective_pair,
    find_chains,
    find_networks,
    is_collapsed,
    is_linear,
    padding_of,
    shared_parameters,
)
from lightning_sparse.core.costs import BETWEEN_ACTIVATIONS, count_macs, effective_macs
from lightning_sparse.core.coupling import Coupling, Place
from lightning_sparse.core.features import FeatureLayer, FeatureTap, feature_layers, group_features
from lightning_sparse.core.lp_sphere import FREE, Exponents, Sphere, check_exponents, find_spheres
from lightning_sparse.core.masks import LiveMasks, MaskSet
from lightning_sparse.core.memory import Memory, Remembered
from lightning_sparse.core.moments import clear_moments
from lightning_sparse.core.structure import Channels, Coupled, NOfM, Structure, Unstructured, parse_structure
from lightning_sparse.core.summary import HEADER, LayerRow, format_table, summarize
from lightning_sparse.core.targets import Candidate, Target, describe, find_targets, matches_name
from lightning_sparse.core.window import FINAL, Position, RunLength, Span, Window

__all__ = [
    "BETWEEN_ACTIVATIONS",
    "FINAL",
    "FREE",
    "HEADER",
    "Budget",
    "Candidate",
    "Chains",
    "Channels",
    "Coupled",
    "Coupling",
    "Exponents",
    "FeatureLayer",
    "FeatureTap",
    "LayerRow",
    "Link",
    "LiveMasks",
    "MaskSet",
    "Memory",
    "NOfM",
    "Network",
    "Place",
    "Position",
    "Remembered",
    "RunLength",
    "Span",
    "Sphere",
    "Structure",
    "Target",
    "Unstructured",
    "Window",
    "analyze",
    "check_exponents",
    "check_sparsity",
    "clear_moments",
    "convolution_of",
    "count_macs",
    "describe",
    "effective_macs",
    "effective_pair",
    "feature_layers",
    "find_chains",
    "find_networks",
    "find_spheres",
    "find_targets",
    "format_table",
    "group_features",
    "is_collapsed",
    "is_linear",
    "matches_name",
    "padding_of",
    "parse_structure",
    "shared_parameters",
    "summarize",
]
