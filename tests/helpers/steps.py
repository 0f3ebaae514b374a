"""What precision plugins and fused optimizers do to a step, on a CPU."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_sparse.testing import Toy


class SkippedSteps(L.pytorch.plugins.MixedPrecision):
    """What a gradient scaler does when it finds an infinity: everything but the step."""

    def __init__(self, skip: set[int]) -> None:
        super().__init__("bf16-mixed", "cpu")
        self.skip = skip

    def optimizer_step(self, optimizer: Any, model: Any, closure: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        if model.trainer.global_step in self.skip:
            result = closure()
            self._after_closure(model, optimizer)
            return result
        return super().optimizer_step(optimizer, model, closure, **kwargs)


class Unscaling(torch.optim.SGD):
    """Like a fused optimizer in 16-bit mixed precision: gradients come scaled by 8, and it divides by itself."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        result = closure() if closure is not None else None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(8)
        if self.finds_infinity:
            self.found_inf = torch.ones(1)
        else:
            super().step()
        return result

    finds_infinity = False


class Scaled(L.pytorch.plugins.MixedPrecision):
    """Multiplies the loss by 8, as a gradient scaler does."""

    class Scaler:
        def scale(self, value: Tensor) -> Tensor:
            return 8 * value

    def __init__(self) -> None:
        super().__init__("bf16-mixed", "cpu")

    def pre_backward(self, tensor: Tensor, module: Any) -> Tensor:  # type: ignore[override]
        return super().pre_backward(8 * tensor, module)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        self.scaler, kept = None, self.scaler  # the closure runs inside the step, as without a scaler
        try:
            return super().optimizer_step(*args, **kwargs)
        finally:
            self.scaler = kept


class SelfUnscaling(Toy):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Unscaling(self.parameters(), lr=0.05)


class PlainSGD(Toy):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)
