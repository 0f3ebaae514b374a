"""`lightning-sparse refit`: merge the linear layers of a trained network, and retrain the result."""

from __future__ import annotations

from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich import get_console

from lightning_sparse.cli.checkpoints import load_weights
from lightning_sparse.cli.results import side_by_side
from lightning_sparse.export import fresh_start, merge_layers
from lightning_sparse.methods import LayerSparsity

__all__ = ["Refit"]


class Refit(pl.Trainer):
    """A Trainer that can merge a network and retrain it."""

    def refit(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        ckpt_path: str = "",
        start: Literal["warm", "fresh"] = "warm",
        tolerance: float = 1e-3,
        allow_growth: bool = False,
    ) -> pl.LightningModule:
        """Merge the linear layers of a trained model and retrain what is left, without the layer penalty.

        Args:
            model: the model whose layers are merged.
            datamodule: data to fit it to.
            ckpt_path: the checkpoint of a fit with LayerSparsity.
            start: start from the merged weights (`warm`), or from new ones in the same structure (`fresh`).
            tolerance: maximum ratio of negative part to whole for a layer that is merged.
            allow_growth: also merge where the product has more parameters than its factors.
        """
        load_weights(model, ckpt_path)
        methods = [c for c in self.callbacks if isinstance(c, LayerSparsity)]  # type: ignore[attr-defined]
        ranges = next((method.input_range for method in methods), None)
        merged, report = merge_layers(model, tolerance=tolerance, input_range=ranges, allow_growth=allow_growth)
        assert isinstance(merged, pl.LightningModule)
        rank_zero_only(print)(f"{report}\n")
        tests = is_overridden("test_step", merged)
        before = self.test(merged, datamodule=datamodule, verbose=False)[0] if tests else {}
        if start == "fresh":
            fresh_start(merged)
        for method in methods:  # their scale term is ordinary regularization, and stays
            method.strength, method.layer_strength = 0.0, None
        self.fit(merged.train(), datamodule=datamodule)
        after = self.test(merged, datamodule=datamodule, verbose=False)[0] if tests else {}
        if tests and self.is_global_zero:
            get_console().print(side_by_side("Refit", merged=before, refit=after))
        return merged
