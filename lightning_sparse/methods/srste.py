"""SR-STE: the model uses n of every m weights from the first step, while all of them are trained."""

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
    Position,
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
from lightning_sparse.functional import (
    apply_bits_,
    group_soft_threshold,
    least_squares_scale,
    magnitude,
    mask_bits,
    show_softly_,
)
from lightning_sparse.loop import Step

__all__ = ["SRSTE"]

PUBLISHED = {False: 2e-4, True: 0.0}
"""The strength of SR-STE, and of S-STE."""


@final
class SRSTE(ShadowWeights):
    r"""Train n:m sparse from scratch: the model holds n of every m weights, and all of them are trained.

    The model shows the largest weights of each group. The loss gradient at the shown weights is applied to the dense weights
    W directly (a straight-through estimator), including dropped ones, so they can return at every step. A decay on dropped
    weights only keeps the masks from oscillating:

    $$ W \leftarrow W - \eta \, \big( g(\tilde W) + \lambda \, (1 - M) \odot W \big), \qquad \tilde W = M \odot W $$

    `soft=True` is S-STE: shown weights are also reduced by the largest weight that their group drops, so that they change
    without jumps when masks change, and then scaled up by a factor per layer that is fixed at the start.

    The callback keeps the dense weights; the model holds the shown weights and exact zeros, and its checkpoints are plain,
    for linear layers and convolutions alike. Runs at stations `weight_penalty`, `before_step` and `after_step`. Costs about
    eight passes over the weights per step plus the choice of masks, which takes as long as four to six more on a CPU, one
    more copy of the weights in memory (two with `soft`), and one byte per weight.

    Sources: Zhou et al. 2021, "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
    https://arxiv.org/abs/2102.04010, equation 8; Hu, Zhu and Chen 2024, "S-STE: Continuous Pruning Function for Efficient
    2:4 Sparse Pre-training", https://arxiv.org/abs/2409.09099 (without its sparse gradients and 8-bit numbers, which need
    custom kernels).

    Args:
        structure: `n:m`: n of every m consecutive inputs are kept; or `transposable n:m`, of every m outputs too, for a
            sparse backward pass.
        strength: lambda, at least 0; None is the published value: 2e-4, and 0 with `soft`. It enters the gradient, as
            published, so with Adam its effect depends on the size of the gradients.
        soft: use S-STE.
        every: time between choices of masks: a fraction of the run, `'n epochs'` or `'n steps'`. The papers choose at every
            step; transposable masks take longer to find, and Hu et al. 2024 (https://arxiv.org/abs/2404.01847) choose them
            every 40 steps.
        end: when masks are fixed, so that the shown weights train on.
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class.

    Example:
        >>> SRSTE(structure="2:4").budget.sparsity
        0.5
    """

    alive = Remembered[dict[str, Tensor]](dict, over="entries")
    """The current masks; True is shown."""
    window = Remembered[Window]()
    scales = Remembered[dict[str, Tensor]](dict)
    """The scale factors of S-STE, by weight."""

    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(
            ("sparsity", "allocation", "layer_sparsity"),
            "structure determines what is kept, n of every m in every layer; choose layers with targets",
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
            raise ValueError(f"structure='{structure}' is not an n:m pattern, which SRSTE needs; use '2:4'.")
        self.pattern = parsed
        if strength is not None:
            check_number("strength", strength)
        if soft and isinstance(parsed, Transposable):
            raise ValueError(
                f"soft=True supports only groups of inputs, not structure='{structure}'; use '{parsed.n}:{parsed.m}', or "
                "omit soft."
            )
        self.window = Window(0.0, end, every)
        self.budget = Budget(None, structure=structure)
        self._plan: Plan | None = None
        self._targets: dict[str, Target] = {}
        self._asked, self._due = -1, False
        self._masks = LiveMasks({})
        self._seen: dict[str, Tensor] = {}  # with `soft`: what the model held when its weights were last hidden

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
        assert self._plan is not None, "called before `check`"
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
                dense = self.hidden[name].to(self.scales[name].dtype)
                shown = self._softened(name, dense).mul_(self.scales[name]).to(weight.dtype)
                if not shown.equal(weight):
                    self.hidden[name].copy_(weight)  # the weight was changed from outside, and the model's value wins
                self._seen[name] = weight.detach().clone()
            self.take_in(self.weights)
        else:
            super().resume()

    def release(self) -> None:
        self._plan, self._targets, self._seen = None, {}, {}

    # ---- the step ----------------------------------------------------------------------------------------------------

    def weight_penalty(self, step: Step) -> Iterable[tuple[str, Tensor]]:
        strength = PUBLISHED[self.soft] if self.strength is None else self.strength
        for name, weight in step.weights.items():
            if strength and weight.grad is not None:  # without a gradient, its optimizer skips it
                yield name, self._dropped(name).mul(strength)

    def _dropped(self, name: str) -> Tensor:
        """The dense values of dropped entries, zero elsewhere."""
        hidden = self.hidden[name]
        return hidden.masked_fill(self.alive[name], 0) if self.soft else hidden

    def silence(self, step: Step) -> None:
        """Do nothing: dropped entries take the gradient too."""

    def after_step(self, step: Step) -> None:
        self._choose_masks(step)
        if self.soft:
            self._show_softly(step.weights, choose=self._due)
        else:
            super().after_step(step)

    def after_unseen_step(self, step: Step) -> None:
        self.reveal(step.weights)
        self.after_step(step)

    def evolve(self, position: Position) -> None:
        if self.window.by_epochs and self.window.take(position):
            weights = self.weights
            self.reveal(weights)
            if self.soft:
                self._show_softly(weights, choose=True)
                return
            for name, weight in weights.items():
                self.choose_mask(name, weight)
            self.hide(weights)

    def _choose_masks(self, step: Step) -> None:
        if (
            self._asked != self.steps and not self.window.by_epochs
        ):  # for the weights of all optimizers that move in this step
            self._asked, self._due = self.steps, self.window.take(self.position(under_way=1))
        if self._due and not self.soft:
            for name, weight in step.weights.items():
                self.choose_mask(name, weight)

    def choose_mask(self, name: str, dense: Tensor) -> None:
        """Show the largest entries of each group from now on."""
        self.alive[name] = self.pattern.best(magnitude(dense), self._targets[name])

    # ---- what is shown -----------------------------------------------------------------------------------------------

    def shown(self, name: str, dense: Tensor) -> Tensor:
        return self.alive[name]

    def _softened(self, name: str, dense: Tensor) -> Tensor:
        return group_soft_threshold(dense, self.alive[name], self.pattern.m, self._targets[name].input_dim)

    def reveal(self, weights: Mapping[str, nn.Parameter]) -> None:
        if not self.soft:
            super().reveal(weights)
            return
        for name, weight in weights.items():  # exact where the model still holds what it was shown; other changes are added
            weight.sub_(self._seen[name]).add_(self.hidden[name])

    def hide(self, weights: Mapping[str, nn.Parameter]) -> None:
        """As in `ShadowWeights`; with `soft`, `hidden` holds whole weights, since shown values are no part of them."""
        if self.soft:
            self._show_softly(weights, choose=False)
        else:
            super().hide(weights)

    def _show_softly(self, weights: Mapping[str, nn.Parameter], choose: bool) -> None:
        averages, (n, m) = self.run.averages(), (self.pattern.n, self.pattern.m)
        for name, weight in weights.items():
            seen = self._seen[name] if name in self._seen else torch.empty_like(weight)
            dim, mask = self._targets[name].input_dim, self.alive[name]
            show_softly_(weight, self.hidden[name], mask, seen, self.scales[name], m, dim, n if choose else None)
            self._seen[name] = seen
            for average in averages:
                apply_bits_(average[name], mask_bits(mask).to(average[name].device))

    def conclude(self) -> None:
        if not self.window.is_over and self.end != 1:
            rank_zero_warn(
                f"{self.label} ends before its masks are fixed, at end={self.end!r}; train longer, or set an earlier end."
            )

    def numbers(self) -> Mapping[str, float | Tensor]:
        """The mean magnitude of dropped weights, which the decay keeps small."""
        sizes = [self.total(name)(self._dropped(name).abs().sum()) for name in self.weights]
        together = torch.stack([size.to(sizes[0].device) for size in sizes]).sum()
        return {"dropped_size": together / max(self.mask_set.total - self.mask_set.kept, 1)}
