"""SR-STE: n of every m weights shown from the first step on, all of them trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, final

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_sparse.core import (
    Budget,
    LiveMasks,
    NOfM,
    Plan,
    Remembered,
    RunLength,
    StructureName,
    Target,
    Transposable,
    Window,
    check_number,
    lay_out,
    parse_structure,
)
from lightning_sparse.families import ShadowWeights
from lightning_sparse.functional import apply_bits_, group_soft_threshold, least_squares_scale, magnitude, mask_bits
from lightning_sparse.loop import Step

__all__ = ["SRSTE"]

PUBLISHED = {False: 2e-4, True: 0.0}
"""The strength of SR-STE, and of S-STE."""


@final
class SRSTE(ShadowWeights):
    r"""Train n:m sparse from scratch: the model holds n of every m weights, and all of them are trained.

    The largest of each group are shown; the loss has its gradient at what is shown, and the dense weights W take it as if it
    were theirs (a straight-through estimator), dropped ones too, so they can return at every step. A decay that only dropped
    weights have keeps the masks from swinging:

    $$ W \leftarrow W - \eta \, \big( g(\tilde W) + \lambda \, (1 - M) \odot W \big), \qquad \tilde W = M \odot W $$

    With `soft=True` it is S-STE: what is shown is also made smaller by the largest weight that its group drops, so that it
    moves without jumps when masks change, and then larger by a factor for each layer that is fixed at the start.

    Dense weights are the callback's; the model holds what is shown and exact zeros, and its checkpoints are plain, of linear
    layers and convolutions alike. At stations `weight_penalty`, `before_step` and `after_step`, at the cost of some twelve
    passes over the weights per step and of the choice of masks, of one more copy of the weights in memory (with `soft` of
    two), and of a byte per weight.

    Sources: Zhou et al. 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
    https://arxiv.org/abs/2102.04010, equation 8; Hu, Zhu and Chen 2024, "S-STE: Continuous Pruning Function for Efficient
    2:4 Sparse Pre-training", https://arxiv.org/abs/2409.09099 (without its sparse gradients and 8-bit numbers, which need
    kernels of their own).

    Args:
        structure: `n:m`: n of every m consecutive inputs are kept; or `transposable n:m`, of every m outputs too, for a
            sparse backward pass.
        strength: lambda, from 0 up; None is what is published: 2e-4, and with `soft` 0. In the gradient, as there, so with
            Adam its size depends on that of the gradients.
        soft: show what S-STE shows.
        every: time between choices of masks: a fraction of the run, `'n epochs'` or `'n steps'`. The papers choose at every
            step; transposable masks take longer to find, and Hu et al. 2024 (https://arxiv.org/abs/2404.01847) choose them
            every 40 steps.
        end: when masks stop changing, so that what is shown trains on.
        targets: patterns that choose the weights; see `core.find_targets`.
        name: tells two callbacks of one class apart.

    Example:
        >>> SRSTE(structure="2:4").budget.sparsity
        0.5
    """

    alive = Remembered[dict[str, Tensor]](dict, over="entries")
    """The masks as they are now; True is shown."""
    window = Remembered[Window]()
    scales = Remembered[dict[str, Tensor]](dict)
    """By what S-STE multiplies, by weight."""

    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("sparsity", "allocation", "layer_sparsity"),
            "structure says what is kept, n of every m in every layer; choose layers with targets",
        ),
        "decay": "the decay of dropped weights is called strength, like every factor of a penalty",
    }

    def __init__(
        self,
        *,
        structure: StructureName = "2:4",
        strength: float | None = None,
        soft: bool = False,
        every: float | str = "1 step",
        end: float | str = 1.0,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.structure, self.strength, self.soft = structure, strength, soft
        self.every, self.end = every, end
        parsed = parse_structure(structure)
        if not isinstance(parsed, NOfM):
            raise ValueError(f"structure='{structure}' keeps no n of m, which is what SRSTE trains; write '2:4'.")
        self.pattern = parsed
        if strength is not None:
            check_number("strength", strength)
        if soft and isinstance(parsed, Transposable):
            raise ValueError(
                f"soft=True has groups of inputs alone, not structure='{structure}'; write '{parsed.n}:{parsed.m}', or "
                "leave soft out."
            )
        self.window = Window(0.0, end, every)
        self.budget = Budget(None, structure=structure)
        self.hidden_dtype = torch.float64 if soft else torch.float32  # what is shown is not a part of the weight with `soft`
        self._plan: Plan | None = None
        self._targets: dict[str, Target] = {}
        self._asked, self._due = -1, False
        self._masks = LiveMasks({})

    # ---- what is asked of it -----------------------------------------------------------------------------------------

    def misfit(self, target: Target) -> str | None:
        return self.pattern.unfit(target)

    def check(self, run: RunLength, until: float = 1.0) -> None:
        self.window.check(run, until, f"{self.label} chooses its last masks")
        self._asked = -1
        self._plan = lay_out(self.budget, self.chosen)
        self._targets = {target.name: target for target in self.chosen}

    @property
    def mask_set(self) -> LiveMasks:
        if self._masks.variables is not self.alive:
            self._masks = LiveMasks(self.alive, self.layouts.get("entries"))
        return self._masks

    @property
    def dropped_learn(self) -> bool:
        return True

    def begin(self) -> None:
        assert self._plan is not None, "asked before `check`"
        self.promise(*self._plan.kept_weights())
        for name, weight in self.weights.items():
            self.choose_mask(name, weight)
            if self.soft:
                dense = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
                self.scales[name] = least_squares_scale(dense, self._softened(name, dense), self.total(name))
        super().begin()

    def resume(self) -> None:
        if self.soft:
            for name, weight in self.weights.items():
                dense = (weight + self.hidden[name]).to(weight.dtype)
                if not self._shown_value(name, dense).to(weight.dtype).equal(weight):
                    self.hidden[name].zero_()  # somebody has changed the weight, and what the model shows counts
            self.take_in(self.weights)
        else:
            super().resume()

    def release(self) -> None:
        self._plan, self._targets = None, {}

    # ---- the step ----------------------------------------------------------------------------------------------------

    def weight_penalty(self, step: Step) -> Iterable[tuple[str, Tensor]]:
        strength = PUBLISHED[self.soft] if self.strength is None else self.strength
        for name, weight in step.weights.items():
            if strength and weight.grad is not None:  # without one its optimizer skips it
                yield name, self._dropped(name).mul(strength)

    def _dropped(self, name: str) -> Tensor:
        """The dense values of dropped entries, zero elsewhere."""
        hidden = self.hidden[name]
        return hidden.masked_fill(self.alive[name], 0) if self.soft else hidden

    def silence(self, step: Step) -> None:
        """Nothing: dropped entries take the gradient too."""

    def after_step(self, step: Step) -> None:
        self._choose_masks(step)
        super().after_step(step)

    def after_unseen_step(self, step: Step) -> None:
        self.reveal(step.weights)
        self._choose_masks(step)
        self.hide(step.weights)

    def _choose_masks(self, step: Step) -> None:
        if self._asked != self.steps:  # the weights of all optimizers that move in this step
            self._asked, self._due = self.steps, self.window.take(self.position(under_way=1))
        if self._due:
            for name, weight in step.weights.items():
                self.choose_mask(name, weight)

    def choose_mask(self, name: str, dense: Tensor) -> None:
        """Show the largest of each group from now on."""
        self.alive[name] = self.pattern.best(magnitude(dense), self._targets[name])

    # ---- what is shown -----------------------------------------------------------------------------------------------

    def shown(self, name: str, dense: Tensor) -> Tensor:
        return self.alive[name]

    def _softened(self, name: str, dense: Tensor) -> Tensor:
        return group_soft_threshold(dense, self.alive[name], self.pattern.m, self._targets[name].input_dim)

    def _shown_value(self, name: str, dense: Tensor) -> Tensor:
        return self._softened(name, dense.to(self.scales[name].dtype)).mul_(self.scales[name])

    def hide(self, weights: Mapping[str, nn.Parameter]) -> None:
        """As in `ShadowWeights`; with `soft`, what is hidden is the weight without what is shown of it.

        That is kept in twice the precision, so that their sum is the weight again, bit for bit.
        """
        if not self.soft:
            super().hide(weights)
            return
        averages = self.run.averages()
        for name, weight in weights.items():
            self.hidden[name].copy_(weight)
            weight.copy_(self._shown_value(name, weight.detach()))
            self.hidden[name].sub_(weight)
            for average in averages:
                apply_bits_(average[name], mask_bits(self.alive[name]).to(average[name].device))

    def conclude(self) -> None:
        if not self.window.is_over and self.end != 1:
            rank_zero_warn(
                f"{self.label} ends before its masks have settled, at end={self.end!r}; train on, or end earlier."
            )

    def numbers(self) -> Mapping[str, float | Tensor]:
        """The mean size of dropped weights, which the decay keeps small."""
        sizes = [self.total(name)(self._dropped(name).abs().sum()) for name in self.weights]
        together = torch.stack([size.to(sizes[0].device) for size in sizes]).sum()
        return {"dropped_size": together / max(self.mask_set.total - self.mask_set.kept, 1)}
