"""State of `torch.nn` and `torch.optim`: which weights, their masks, their moments, how much, when."""

from lightning_sparse.core.budget import Budget, check_sparsity
from lightning_sparse.core.catch_up import Attempt, CatchUp
from lightning_sparse.core.masks import LiveMasks, MaskSet
from lightning_sparse.core.memory import Memory, Remembered
from lightning_sparse.core.moments import clear_moments
from lightning_sparse.core.rounds import Rounds
from lightning_sparse.core.snapshot import Snapshot
from lightning_sparse.core.sphere import FREE, Exponents, Sphere, check_exponents, find_spheres
from lightning_sparse.core.structure import Channels, NOfM, Structure, Unstructured, parse_structure
from lightning_sparse.core.summary import HEADER, LayerRow, format_table, summarize
from lightning_sparse.core.targets import Candidate, Target, describe, find_targets
from lightning_sparse.core.window import FINAL, Position, RunLength, Span, Window

__all__ = [
    "FINAL",
    "FREE",
    "HEADER",
    "Attempt",
    "Budget",
    "Candidate",
    "CatchUp",
    "Channels",
    "Exponents",
    "LayerRow",
    "LiveMasks",
    "MaskSet",
    "Memory",
    "NOfM",
    "Position",
    "Remembered",
    "Rounds",
    "RunLength",
    "Snapshot",
    "Span",
    "Sphere",
    "Structure",
    "Target",
    "Unstructured",
    "Window",
    "check_exponents",
    "check_sparsity",
    "clear_moments",
    "describe",
    "find_spheres",
    "find_targets",
    "format_table",
    "parse_structure",
    "summarize",
]
