"""From trained weights to smaller and faster networks."""

from lightning_sparse.core import coupled_outputs
from lightning_sparse.export.adapters import AdapterRow, MergedAdapters, merge_adapters
from lightning_sparse.export.batch_norm import fold_norms, recalibrate
from lightning_sparse.export.blueprint import Blueprint, Kept, carry_optimizer, load_model, save_model
from lightning_sparse.export.compact import compact_size, load_compact, save_compact
from lightning_sparse.export.condensed import CondensedLinear
from lightning_sparse.export.edge import executorch_runner, save_ethos_u85, save_executorch
from lightning_sparse.export.export_report import ExportReport, Rung
from lightning_sparse.export.int8 import Int8Weights, save_int8
from lightning_sparse.export.kernel_choice import KernelChoice
from lightning_sparse.export.kernels import SparseLinear, choose_kernels, use_kernels
from lightning_sparse.export.ladder import RUNGS, RungName, export_ladder
from lightning_sparse.export.merge import fresh_start, merge_layers, pad_in_front
from lightning_sparse.export.merge_report import LayerVerdict, MergeReport, count_parameters
from lightning_sparse.export.onnx import compressed_size, onnx_runner, save_onnx
from lightning_sparse.export.quantization import Quantization
from lightning_sparse.export.removal import Removal, remove_dead
from lightning_sparse.export.semi_structured import choose_semi_structured
from lightning_sparse.export.whole_weights import whole_weights

__all__ = [
    "RUNGS",
    "AdapterRow",
    "Blueprint",
    "CondensedLinear",
    "ExportReport",
    "Int8Weights",
    "Kept",
    "KernelChoice",
    "LayerVerdict",
    "MergeReport",
    "MergedAdapters",
    "Quantization",
    "Removal",
    "Rung",
    "RungName",
    "SparseLinear",
    "carry_optimizer",
    "choose_kernels",
    "choose_semi_structured",
    "compact_size",
    "compressed_size",
    "count_parameters",
    "coupled_outputs",
    "executorch_runner",
    "export_ladder",
    "fold_norms",
    "fresh_start",
    "load_compact",
    "load_model",
    "merge_adapters",
    "merge_layers",
    "onnx_runner",
    "pad_in_front",
    "recalibrate",
    "remove_dead",
    "save_compact",
    "save_ethos_u85",
    "save_executorch",
    "save_int8",
    "save_model",
    "save_onnx",
    "use_kernels",
    "whole_weights",
]
