"""State of `torch.nn` and `torch.optim`: which weights, their masks, their moments, how much, when."""

from lightning_sparse.core.attention import Attention, find_attentions, places_of, resize, row_of, without_heads
from lightning_sparse.core.blocks import Blocks
from lightning_sparse.core.budget import AllocationName, Budget, BudgetName, ShapeAllocationName, UnscoredAllocationName
from lightning_sparse.core.calls import Call, exchange, fit_to, join, leaves
from lightning_sparse.core.census import changed_share, count_dead, count_nonzero
from lightning_sparse.core.chains import (
    Chains,
    Link,
    analyze,
    convolution_of,
    effective_pair,
    find_chains,
    is_collapsed,
)
from lightning_sparse.core.channel_costs import ChannelCosts
from lightning_sparse.core.checks import check_choice, check_number, check_schedule, check_sparsity, check_whole
from lightning_sparse.core.costs import BETWEEN_ACTIVATIONS, between_activations_of, count_macs, effective_macs, tensors_in
from lightning_sparse.core.coupled import Coupled
from lightning_sparse.core.coupling import CoupledVectors, Coupling, Place
from lightning_sparse.core.coupling_engine import CouplingEngine, Member, Positions
from lightning_sparse.core.coverage import Coverage, count_parameters, coverage
from lightning_sparse.core.cutting import Kept, cut, cut_tensor, own_tensors
from lightning_sparse.core.dependencies import Dependencies, Group, coupled_outputs, find_coupling
from lightning_sparse.core.fan_in import FanIn
from lightning_sparse.core.features import FeatureLayer, FeatureTap, feature_layers, group_features
from lightning_sparse.core.fewer_heads import FewerHeads
from lightning_sparse.core.heads import Heads
from lightning_sparse.core.inputs import InputTap, Reading, as_matrix, from_matrix, input_rows, shows_inputs
from lightning_sparse.core.layers import LAYER_KINDS, LayerKind, kind_of, register_layer
from lightning_sparse.core.layout import (
    Layout,
    Part,
    is_cut,
    layout_of,
    least_over_ranks,
    lent_gradients,
    local,
    owner_of,
    part_of,
    parts_of,
    spread_over,
    total_over_ranks,
)
from lightning_sparse.core.libraries import first_line, need, silenced, without_origins
from lightning_sparse.core.linear import (
    BATCH_NORMS,
    CHANNEL_NORMS,
    CONVOLUTIONS,
    PLAIN_CONVOLUTIONS,
    TRANSPOSED_CONVOLUTIONS,
    in_count,
    is_depthwise,
    is_layer,
    is_linear,
    out_count,
    padding_of,
)
from lightning_sparse.core.lp_sphere import FREE, Exponents, Sphere, check_exponents, find_spheres
from lightning_sparse.core.masks import LiveMasks, Masks, MaskSet, Mold, add_up
from lightning_sparse.core.memory import Layouts, Memory, Remembered
from lightning_sparse.core.moments import averages, check_moments, clear_moments, initial_state, restart
from lightning_sparse.core.networks import (
    Network,
    callee,
    copy_model,
    find_networks,
    is_training,
    replace_module,
    shared_parameters,
    trained_part,
    without_nested_tensors,
)
from lightning_sparse.core.patterns import as_patterns, matches_name
from lightning_sparse.core.pieces import Piece, like, put_back_, to_cpu, whole
from lightning_sparse.core.plan import Plan, lay_out
from lightning_sparse.core.sources import align_names, read_masks, read_tensors
from lightning_sparse.core.structure import Channels, NOfM, Structure, Unstructured
from lightning_sparse.core.structures import StructureName, parse_structure
from lightning_sparse.core.summary import HEADER, SUMS, LayerRow, format_table, summarize
from lightning_sparse.core.target import Target
from lightning_sparse.core.targets import Candidate, Selection, describe, find_targets, select_targets
from lightning_sparse.core.torch_pruning_engine import torch_pruning
from lightning_sparse.core.transposable import Transposable
from lightning_sparse.core.window import FINAL, Position, RunLength, Span, TooShort, Window, refuse_shorter_run

__all__ = [
    "BATCH_NORMS",
    "BETWEEN_ACTIVATIONS",
    "CHANNEL_NORMS",
    "CONVOLUTIONS",
    "FINAL",
    "FREE",
    "HEADER",
    "LAYER_KINDS",
    "PLAIN_CONVOLUTIONS",
    "SUMS",
    "TRANSPOSED_CONVOLUTIONS",
    "AllocationName",
    "Attention",
    "Blocks",
    "Budget",
    "BudgetName",
    "Call",
    "Candidate",
    "Chains",
    "ChannelCosts",
    "Channels",
    "Coupled",
    "CoupledVectors",
    "Coupling",
    "CouplingEngine",
    "Coverage",
    "Dependencies",
    "Exponents",
    "FanIn",
    "FeatureLayer",
    "FeatureTap",
    "FewerHeads",
    "Group",
    "Heads",
    "InputTap",
    "Kept",
    "LayerKind",
    "LayerRow",
    "Layout",
    "Layouts",
    "Link",
    "LiveMasks",
    "MaskSet",
    "Masks",
    "Member",
    "Memory",
    "Mold",
    "NOfM",
    "Network",
    "Part",
    "Piece",
    "Place",
    "Plan",
    "Position",
    "Positions",
    "Reading",
    "Remembered",
    "RunLength",
    "Selection",
    "ShapeAllocationName",
    "Span",
    "Sphere",
    "Structure",
    "StructureName",
    "Target",
    "TooShort",
    "Transposable",
    "UnscoredAllocationName",
    "Unstructured",
    "Window",
    "add_up",
    "align_names",
    "analyze",
    "as_matrix",
    "as_patterns",
    "averages",
    "between_activations_of",
    "callee",
    "changed_share",
    "check_choice",
    "check_exponents",
    "check_moments",
    "check_number",
    "check_schedule",
    "check_sparsity",
    "check_whole",
    "clear_moments",
    "convolution_of",
    "copy_model",
    "count_dead",
    "count_macs",
    "count_nonzero",
    "count_parameters",
    "coupled_outputs",
    "coverage",
    "cut",
    "cut_tensor",
    "describe",
    "effective_macs",
    "effective_pair",
    "exchange",
    "feature_layers",
    "find_attentions",
    "find_chains",
    "find_coupling",
    "find_networks",
    "find_spheres",
    "find_targets",
    "first_line",
    "fit_to",
    "format_table",
    "from_matrix",
    "group_features",
    "in_count",
    "initial_state",
    "input_rows",
    "is_collapsed",
    "is_cut",
    "is_depthwise",
    "is_layer",
    "is_linear",
    "is_training",
    "join",
    "kind_of",
    "lay_out",
    "layout_of",
    "least_over_ranks",
    "leaves",
    "lent_gradients",
    "like",
    "local",
    "matches_name",
    "need",
    "out_count",
    "own_tensors",
    "owner_of",
    "padding_of",
    "parse_structure",
    "part_of",
    "parts_of",
    "places_of",
    "put_back_",
    "read_masks",
    "read_tensors",
    "refuse_shorter_run",
    "register_layer",
    "replace_module",
    "resize",
    "restart",
    "row_of",
    "select_targets",
    "shared_parameters",
    "shows_inputs",
    "silenced",
    "spread_over",
    "summarize",
    "tensors_in",
    "to_cpu",
    "torch_pruning",
    "total_over_ranks",
    "trained_part",
    "whole",
    "without_heads",
    "without_nested_tensors",
    "without_origins",
]
