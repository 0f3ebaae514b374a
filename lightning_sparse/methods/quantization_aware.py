"""Quantization-aware training: the model computes as it will in int8, and masks stay as they are."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_sparse.core import MaskSet, Position, Remembered, RunLength, Target
from lightning_sparse.functional import fake_quantize, round_symmetric
from lightning_sparse.loop import Sparsifier, Step

__all__ = ["QuantizationAware"]


@final
class QuantizationAware(Sparsifier):
    r"""Train with weights and inputs rounded as `int8` will round them, beside a method that holds the zeros.

    $$ \hat w = s_o \, \mathrm{round}(w / s_o), \qquad s_o = \max_i |w_{oi}| / 127 $$

    for each output o, without a zero point, so a pruned weight has code 0 and stays exactly zero. The optimizer moves w,
    which the callback keeps; the model and all checkpoints hold the rounded weights, and w receives their gradient
    (straight-through). A normalization that is folded later scales whole outputs, so the codes stay as trained. The inputs
    of the chosen layers are rounded too, with one range per sample.

    Train sparse first. Then fine-tune with this callback and one whose masks no longer change, such as `KeepSparsity`, in
    either order. Then `export` with the rung `int8`. Refused are zeros that no method holds, and weights that another method
    keeps outside the model, moves itself, or thresholds anew in every step.

    Runs at stations `before_step` and `after_step`. Costs about ten passes over the weights per step, three over the inputs
    of each layer, and one more copy of the weights in memory and in checkpoints.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", https://arxiv.org/abs/1712.05877; ranges per output are from Krishnamoorthi 2018,
    https://arxiv.org/abs/1806.08342. Ranges per sample, where the paper averages over batches, are ours.

    Args:
        bits: bits per weight, from 2 to 8.
        inputs: also round the inputs of the layers, to 8 bits.
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class.

    Example:
        >>> QuantizationAware().label
        'QuantizationAware'
    """

    removes_weights = False
    refused: ClassVar[Mapping[str, str]] = {
        "sparsity": "it removes nothing; give sparsity to the method beside it",
        "activations": "the inputs of layers are rounded with inputs=True",
    }

    dense = Remembered[dict[str, Tensor]](dict, over="entries")
    """The dense weights that the optimizer moves."""
    rounds = Remembered(bool)
    """Whether the model shows rounded weights yet: masks read off the weights at the start see the original ones."""

    def __init__(
        self,
        *,
        bits: int = 8,
        inputs: bool = True,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.bits, self.inputs = bits, inputs
        given: object = bits  # a config may contain anything
        if not isinstance(given, Integral) or not 2 <= int(given) <= 8:
            raise ValueError(f"bits={bits!r} must be an integer from 2 to 8.")
        if not isinstance(inputs, bool):
            raise ValueError(f"inputs={inputs!r} must be True or False.")
        self._handles: list[RemovableHandle] = []

    def misfit(self, target: Target) -> str | None:
        if target.parts_outputs:
            return "is sharded along its inputs, and the scale of an output needs all of them on one rank"
        return super().misfit(target)

    @property
    def swaps_weights(self) -> bool:
        return True

    def check(self, run: RunLength, until: float = 1.0) -> None:
        mine = {id(weight) for weight in self.weights.values()}
        for other in self.run.trainer.callbacks:  # type: ignore[attr-defined]
            if other is self or not isinstance(other, Sparsifier):
                continue
            shared = next((name for name, weight in other.weights.items() if id(weight) in mine), None)
            if shared and (other.dropped_live_on or isinstance(other, QuantizationAware)):
                raise ValueError(
                    f"{other.label} and {self.label} both keep a '{shared}' that differs from the model's; train with "
                    f"{other.label} first, then fine-tune with {self.label} and a method that keeps the masks."
                )
        if self.brought is None:
            self._refuse_loose_zeros()

    def _refuse_loose_zeros(self) -> None:
        """Zeros of a model that was pruned earlier need a method that holds them; zeros from rounding do not."""
        others = [other for other in self.run.trainer.callbacks if isinstance(other, Sparsifier)]  # type: ignore[attr-defined]
        held = {id(weight) for other in others if other.removes_weights for weight in other.weights.values()}
        for name, weight in self.weights.items():
            share = float((weight == 0).float().mean())
            if id(weight) in held or not share >= 0.1 or torch.equal(weight, self._rounded(name, weight)):
                continue
            raise ValueError(
                f"{share:.0%} of '{name}' are zero, and {self.label} alone would train them; add KeepSparsity(), "
                "or exclude such weights from its targets."
            )

    def begin(self) -> None:
        self.dense = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self._listen()

    def resume(self) -> None:
        self._listen()

    def before_batch(self, position: Position) -> None:
        if not self.rounds:
            self.rounds = True
            for name, weight in self.weights.items():
                self.dense[name].copy_(weight)
            with torch.no_grad():
                self._round(self.weights)

    def before_step(self, step: Step) -> None:
        for name, weight in step.weights.items():
            weight.copy_(self._take_in(name, weight))

    def after_step(self, step: Step) -> None:
        for name, weight in step.weights.items():
            self.dense[name].copy_(weight)
        self._round(step.weights)

    def after_unseen_step(self, step: Step) -> None:
        for name, weight in step.weights.items():
            dense = self.dense[name]
            dense.add_(weight - self._rounded(name, dense))
        self._round(step.weights)

    def undo_step(self, step: Step) -> None:
        self._round(step.weights)

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def numbers(self) -> Mapping[str, float | Tensor]:
        """How far rounding moves the weights, as a fraction of them."""
        wrong = [(weight - self.dense[name]).square().sum() for name, weight in self.weights.items()]
        whole = [dense.square().sum() for dense in self.dense.values()]
        return {"rounding": (torch.stack(wrong).sum() / torch.stack(whole).sum()).sqrt()}

    def _rounded(self, name: str, dense: Tensor) -> Tensor:
        return round_symmetric(dense, self.output_dims[name], self.bits)

    def _round(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Put the int8-rounded dense weights into the model."""
        for name, weight in weights.items():
            weight.copy_(self._rounded(name, self.dense[name]))

    def _take_in(self, name: str, weight: Tensor) -> Tensor:
        """The dense weight; where the model's value is not its rounding, as after a prune, the model's value wins."""
        dense = self.dense[name]
        dense.copy_(torch.where(weight == self._rounded(name, dense), dense, weight))
        for masks in self._masks():
            if name in masks:
                masks.apply_({name: dense})  # an entry that rounds to zero does not show that it was pruned
        return dense

    def _masks(self) -> Iterator[MaskSet]:
        """Masks of other methods."""
        for other in self.run.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, Sparsifier) and isinstance(other.mask_set, MaskSet):
                yield other.mask_set

    def _listen(self) -> None:
        """Round the inputs of the layers of the weights."""
        if not self.inputs:
            return
        if "torch._dynamo" in sys.modules:  # any part may be compiled, as a module or through one of its functions
            torch.compiler.reset()  # graphs compiled earlier (a sanity check is enough) do not know about the hooks
        for path in dict.fromkeys(name.rpartition(".")[0] for name in self.weights):
            layer = self.run.module.get_submodule(path)
            self._handles.append(layer.register_forward_pre_hook(_round_first, with_kwargs=True))


def _round_first(layer: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any] | None:
    """The first argument as int8 would hold it, if it is a floating-point tensor."""
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        return (fake_quantize(args[0]), *args[1:]), named
    given = named.get("input")
    if isinstance(given, Tensor) and given.is_floating_point():
        return args, {**named, "input": fake_quantize(given)}
    return None
