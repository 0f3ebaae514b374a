"""Heads of models that somebody else has written: half of them leave, and the outputs are those of the masked model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import MagnitudePruning
from lightning_sparse.core import Call, tensors_in
from lightning_sparse.export import remove_dead
from lightning_sparse.testing import trainer
from tests.helpers.zoo import ZOO, Batches, Guest

LEAVE: dict[str, int] = {}
"""Model -> how many attentions lose heads."""
STAY = {"t5": "with fewer heads the model does not run"}
"""Model -> why heads stay in all of its attentions."""
