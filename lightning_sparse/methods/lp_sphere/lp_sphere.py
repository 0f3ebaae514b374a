"""Train on unit Lp spheres, optionally dropping and growing connections."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Literal, final

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_sparse.core import (
    MaskSet,
    Position,
    Remembered,
    RunLength,
    Sphere,
    Window,
    find_spheres,
    spread_over,
)
from lightning_sparse.families import Masked
from lightning_sparse.functional import (
    counts,
    cubic,
    exact_count,
    from_dual,
    growth_factor,
    growth_score,
    lp_normalize,
    lp_sgd_,
    piecewise_linear,
    random_generator,
    relative_magnitude,
    to_dual,
    top_k_masks,
)
from lightning_sparse.loop import Shards, Step
from lightning_sparse.loop.rng import draw_seed
from lightning_sparse.methods.lp_sphere.checks import check_arguments
from lightning_sparse.methods.lp_sphere.mixing import Knots, read_knots

__all__ = ["LpSphere"]


@final
class LpSphere(Masked):
    r"""Keep the weights of every output on a unit Lp sphere; the closer p is to 1, the sparser they become.

    $$ v \leftarrow \frac{(1 - \eta) v - \eta \, \hat g}{\|\cdot\|_q}, \qquad w = sign(v) |v|^{1/(p-1)}, \qquad
       \hat g = m / \|m\|_q, \qquad q = p / (p-1) $$

    where m is the gradient after momentum. The callback makes this step itself, at station `after_step`, and hides the
    gradients of constrained weights from the optimizer until then. So the optimizer neither moves nor decays these weights
    and keeps no state for them, and gradient clipping uses the norm of the other gradients only (the step does not depend on
    the norm of its own). Cost: three powers per constrained weight and step; in memory and in checkpoints v and m, where SGD
    would keep m and Adam two moments.

    With a `sparsity`, connections also drop and return (at `evolve`, from the gradients of the same step). A connection
    drops when its weight is small compared with the mean of its output; others return where the gradient is large. Dropped
    weights are exactly zero in the model and in every checkpoint, but the callback keeps their v: it decays, and a
    connection that returns resumes from its remaining value immediately (the official code shows zero for one more forward
    pass). These masks cover all `targets`, including free ones.

    Source: Li et al. 2021, https://arxiv.org/abs/2103.16013, read from the official repository WilliamLiPro/LpSS; the text
    of the paper was not available. Its bugs are fixed: norms do not underflow, growth uses the magnitude of the gradient,
    and an output that has lost everything stays empty.

    Args:
        sparsity: the final fraction removed, in [0, 1); None trains on the spheres and removes nothing.
        p: the exponent of the sphere, above 1: one value for all, a list in the order of the constrained weights, or a
            mapping of glob over names -> p, where the first match counts. Published: 1.4 and 1.3 for half of the weights
            removed, 1.3 and 1.15 for 80%, 1.2 and 1.07 for 90% (first four layers, others).
        mixing: peak value of eta, in (0, 1]. Published: 2 / batch size, at 256.
        mixing_schedule: schedule of eta: `published` (up for a sixth of the run, down to a quarter, to zero at the end),
            `constant`, or knots of (fraction of the run, fraction of the peak) such as [[0, 0.1], [1, 1]].
        momentum: momentum of the gradient, in [0, 1).
        nesterov: use Nesterov momentum.
        mode: `official` steers toward the sparsity with the published controller, which may not reach it: choose p small
            enough for the sparsity. `feedback` is our extension: a cubic schedule, met exactly at every update.
        initial_sparsity: fraction removed at random from every layer at the start; at most `sparsity`.
        drop_threshold: initial value of h, the fraction of its output's mean below which a weight drops; a cosine takes it
            to 0.
        growth_margin: delta, by how much fewer connections return than drop below the target, and more above it.
        start: when connections start to drop and return: a fraction of the run, `'n epochs'` or `'n steps'`.
        end: when connections stop dropping and returning.
        every: time between updates, in steps or as a fraction; the published 40 steps are 1/300 of their run.
        of_all_parameters: count `sparsity` over all parameters of the module, norms and biases included, as published; the
            default counts over `targets`.
        seed: seed of the first masks. None uses the seed of `seed_everything`, or draws one.
        free: patterns of `targets` that stay off the spheres; by default the last layer, and layers whose name contains
            `shortcut` or `downsample`.
        targets: patterns that select the weights; see `core.find_targets`.
        name: distinguishes several callbacks of the same class.

    Example:
        >>> LpSphere(0.9, p=1.07).label
        'LpSphere'
    """

    shards: ClassVar[Shards] = "any"

    duals = Remembered[dict[str, Tensor]](dict, over="entries")
    """v of every constrained weight, including entries that masks have removed."""
    momenta = Remembered[dict[str, Tensor]](dict, over="entries")
    growth = Remembered[float](lambda: 0.95)
    """How many connections return at the next update for each one that drops, in official mode."""
    drawn_seed = Remembered(int)
    window = Remembered[Window]()

    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("allocation", "structure", "layer_sparsity"),
        "weights drop within each output's sphere, and only their total is controlled; choose weights with targets and free",
    )

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        p: float | Sequence[float] | Mapping[str, float],
        mixing: float = 2 / 256,
        mixing_schedule: Literal["published", "constant"] | Knots = "published",
        momentum: float = 0.9,
        nesterov: bool = True,
        mode: Literal["official", "feedback"] = "official",
        initial_sparsity: float = 0.2,
        drop_threshold: float = 0.2,
        growth_margin: float = 0.1,
        start: float | str = 0.2,
        end: float | str = 0.8,
        every: float | str = 1 / 300,
        of_all_parameters: bool = False,
        seed: int | None = None,
        free: str | Sequence[str] | None = None,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.p, self.sparsity, self.mode = p, sparsity, mode
        self.mixing, self.mixing_schedule = mixing, mixing_schedule
        self.momentum, self.nesterov = momentum, nesterov
        self.initial_sparsity, self.drop_threshold, self.growth_margin = initial_sparsity, drop_threshold, growth_margin
        self.start, self.end, self.every = start, end, every
        self.of_all_parameters, self.seed, self.free = of_all_parameters, seed, free
        check_arguments(self)
        self.knots = read_knots(mixing_schedule, mixing)
        self.window = Window(start, end, every)
        self.spheres: dict[str, Sphere] = {}
        self._hidden: dict[str, Tensor] = {}
        self._dense: dict[str, Tensor] = {}

    # ---- the start ---------------------------------------------------------------------------------------------------

    @property
    def mask_set(self) -> MaskSet | None:
        return None if self.sparsity is None else self.masks

    def check(self, run: RunLength, until: float = 1.0) -> None:
        found = find_spheres(self.run.module, self.p, self.targets, self.free)
        self.spheres = {sphere.target.name: sphere for sphere in found}
        if run.epochs is None and run.steps is None and self.mixing_schedule != "constant":
            raise ValueError(
                "The length of this run is unknown, so eta has no schedule; set max_epochs or max_steps, or "
                "mixing_schedule='constant'."
            )
        if self.sparsity is None:
            if run.epochs is not None:  # nothing drops, but a typo should still be refused
                self.window.check(run, 1.0, f"{self.label} ends its schedule")
            return
        self.window.check(run, until, f"{self.label} ends its schedule")
        total, removed = self._weights_in_all(), exact_count(self.sparsity, self._counted())
        if removed >= total:
            raise ValueError(
                f"sparsity={self.sparsity} of {self._counted():,} leaves nothing of the {total:,} weights that can be "
                "removed; lower it or choose more layers."
            )

    @property
    def moves(self) -> Collection[str]:
        return self.spheres.keys()

    @property
    def swaps_weights(self) -> bool:
        return True  # an average of two points on a sphere is not on it

    def begin(self) -> None:
        for name in self.spheres:
            self._enter(name)
        if self.sparsity is None:
            return
        super().begin()
        self.promise(self._kept_at(self.sparsity) if self.mode == "feedback" else None)
        self.drawn_seed = draw_seed(self.run.trainer, self.seed)
        share = min(self.initial_sparsity, self.sparsity)
        masks = {}
        for target in self.chosen:
            removed = min(math.ceil(share * target.size - 1e-6), target.size - 1)
            score = target.draw(random_generator(self.drawn_seed, 0, target.name))
            masks[target.name] = self._best(target.name, score, target.size - removed).to(target.weight.device)
        self.set_masks(masks)

    def resume(self) -> None:
        for name, sphere in self.spheres.items():
            weight = sphere.target.weight
            expected, found = from_dual(self.duals[name], sphere.p), weight.detach().to(self.duals[name].dtype, copy=True)
            self.masks.apply_({name: expected})
            self.masks.apply_({name: found})
            if (found - expected).norm() > 1e-2 * expected.norm():  # other weights were loaded since: start from them
                self._enter(name)
        super().resume()

    def _enter(self, name: str) -> None:
        """Project a weight onto its sphere."""
        sphere = self.spheres[name]
        self.duals[name] = to_dual(lp_normalize(sphere.target.weight, sphere.p, sphere.dim), sphere.p)
        if self.momentum:
            self.momenta[name] = torch.zeros_like(self.duals[name])
        sphere.target.weight.copy_(from_dual(self.duals[name], sphere.p))

    # ---- the step ----------------------------------------------------------------------------------------------------

    def before_step(self, step: Step) -> None:
        if self.sparsity is not None and self._is_due():
            self._dense.update({n: w.grad.clone() for n, w in step.weights.items() if w.grad is not None})

    def silence(self, step: Step) -> None:
        super().silence(step)
        moving = [name for name in self._constrained(step) if step.weights[name].grad is not None]
        if moving:
            self.run.unscale(step.optimizer)
        for name in moving:
            self._hidden[name] = step.weights[name].grad  # type: ignore[assignment]
            # A distributed checkpoint cannot be loaded if an optimizer has no state for a weight.
            step.weights[name].grad = torch.zeros_like(self._hidden[name]) if self.layouts else None

    def after_step(self, step: Step) -> None:
        for name in self._constrained(step):
            gradient = self._hidden.pop(name, None)
            self._move(name, gradient)
            step.weights[name].grad = gradient

    def after_unseen_step(self, step: Step) -> None:
        if self.sparsity is not None:
            super().after_unseen_step(step)
            super().silence(step)
        for name in self._constrained(step):  # the optimizer moved it too, which is discarded
            self._move(name, step.weights[name].grad)

    def undo_step(self, step: Step) -> None:
        for name, weight in step.weights.items():
            self._dense.pop(name, None)
            hidden = self._hidden.pop(name, None)
            if weight.grad is None:
                weight.grad = hidden

    def release(self) -> None:
        for name, gradient in self._hidden.items():
            self.weights[name].grad = gradient
        self._hidden, self._dense, self.spheres = {}, {}, {}

    def _constrained(self, step: Step) -> list[str]:
        return [name for name in step.weights if name in self.spheres]

    def _move(self, name: str, gradient: Tensor | None) -> None:
        sphere, dual = self.spheres[name], self.duals[name]
        if gradient is None:  # not used in this batch; but the optimizer may still have moved it
            sphere.target.weight.copy_(from_dual(dual, sphere.p))
            return
        lp_sgd_(
            sphere.target.weight,
            dual,
            self.momenta.get(name),
            gradient,
            self._mixing_at(self.position(under_way=1).fraction),
            sphere.p,
            momentum=self.momentum,
            nesterov=self.nesterov,
            dim=sphere.dim,
        )

    def _mixing_at(self, progress: float) -> float:
        """Eta at a fraction of the run."""
        return self.mixing * piecewise_linear(progress, self.knots)

    # ---- what falls, and what returns --------------------------------------------------------------------------------

    @torch.no_grad()
    def bring_in_line(self, name: str, entries: Tensor, copies: Sequence[Mapping[str, nn.Parameter]]) -> None:
        super().bring_in_line(name, entries, copies)
        if name in self.momenta:
            self.momenta[name].masked_fill_(entries, 0)
        if name in self.spheres:  # returning connections resume from their remaining v
            weight = self.spheres[name].target.weight
            weight.copy_(from_dual(self.duals[name], self.spheres[name].p))
            self.masks.apply_({name: weight})

    def evolve(self, position: Position) -> None:
        if self.sparsity is None or position.epoch_start:  # before a batch there is no gradient for growth
            return
        if self.window.take(position):
            update = {"official": self._steer, "feedback": self._follow}[self.mode]
            update(self.window.progress(position))
        self._dense.clear()

    def _is_due(self) -> bool:
        """Whether an update follows this step; with several optimizers, whether it may."""
        return self.window.tick(self.position(under_way=len(self.run.optimizers))) > self.window.done

    def _steer(self, progress: float) -> None:
        """The published update: everything below the threshold drops, and gamma times as many connections return."""
        threshold, masks = self._threshold(progress), {}
        for name, score in self._growth_scores().items():
            kept = self.masks[name] & (self._relative(name) >= threshold)
            [left] = self._counts({name: kept})
            returning = min(int((self.masks.counts[name] - left) * self.growth), self.masks.numel(name) - left)
            masks[name] = kept | self._best(name, score.masked_fill(kept, -torch.inf), returning)
        self.set_masks(masks)
        sparsity = self._removed() / self._counted()
        if self.sparsity:
            self.growth = growth_factor(sparsity, self.sparsity, threshold, self.growth_margin)

    def _follow(self, progress: float) -> None:
        """Our extension: as many return as the schedule needs; if too few dropped, the threshold rises."""
        start = min(self.initial_sparsity, self.sparsity or 0.0)
        wanted = self._kept_at(cubic(progress, start, self.sparsity or 0.0))
        threshold, scores = self._threshold(progress), self._growth_scores()
        relative = {name: self._relative(name) for name in self.weights}
        # A layer without a gradient in this batch drops only what the count requires.
        kept = {name: self.masks[name] & (r >= threshold if name in scores else True) for name, r in relative.items()}
        left = self._counts(kept)
        if sum(left) >= wanted:
            ranked = [r.masked_fill(~kept[name], -torch.inf) for name, r in relative.items()]
            self.set_masks(dict(zip(kept, top_k_masks(ranked, wanted, self.spread), strict=True)))
            return
        fallen = [self.masks.counts[name] - n for name, n in zip(kept, left, strict=True)]
        missing = wanted - sum(left)
        if sum(fallen) < missing:
            fallen = [self.masks.numel(name) - n if name in scores else 0 for name, n in zip(kept, left, strict=True)]
        missing = min(missing, sum(fallen))
        returning = counts([missing / max(sum(fallen), 1)] * len(fallen), fallen, missing)
        for (name, mask), number in zip(kept.items(), returning, strict=True):
            if number:
                kept[name] = mask | self._best(name, scores[name].masked_fill(mask, -torch.inf), number)
        self.set_masks(kept)

    def _counts(self, masks: Mapping[str, Tensor]) -> list[int]:
        """How many entries the masks keep on all ranks together, in order."""
        counted = self.masks.added_up({name: mask.count_nonzero() for name, mask in masks.items()})
        return list(counted.values())

    def _best(self, name: str, score: Tensor, number: int) -> Tensor:
        """The mask of the highest-scoring entries of a weight."""
        return top_k_masks([score], number, spread_over([self.layouts.get("entries", {}).get(name)]))[0]

    def _threshold(self, progress: float) -> float:
        return self.drop_threshold * (1 + math.cos(math.pi * progress)) / 2

    def _relative(self, name: str) -> Tensor:
        return relative_magnitude(self.weights[name].detach(), self.masks[name], self.output_dims[name])

    def _growth_scores(self) -> dict[str, Tensor]:
        return {name: growth_score(gradient, self.output_dims[name]) for name, gradient in self._dense.items()}

    def _weights_in_all(self) -> int:
        return sum(target.size for target in self.chosen)

    def _counted(self) -> int:
        """What `sparsity` is a fraction of."""
        if self.of_all_parameters:
            return sum(parameter.numel() for parameter in self.run.module.parameters())
        return self._weights_in_all()

    def _kept_at(self, sparsity: float) -> int:
        return self._weights_in_all() - exact_count(sparsity, self._counted())

    def _removed(self) -> int:
        return self.masks.total - self.masks.kept

    # ---- what is told ------------------------------------------------------------------------------------------------

    def numbers(self) -> Mapping[str, float | Tensor]:
        mixing = self._mixing_at(self.position().fraction)
        steered = self.sparsity is not None and self.mode == "official"
        return {"mixing": mixing, "growth": self.growth} if steered else {"mixing": mixing}

    def conclude(self) -> None:
        if self.sparsity is None:
            return
        reached = self._removed() / self._counted()
        if self.mode == "feedback" and not self.window.is_over:
            rank_zero_warn(self.window.unfinished(self.label, reached, self.sparsity))
        elif abs(reached - self.sparsity) > 0.03:
            rank_zero_info(
                f"{self.label} ends at sparsity {reached:.4f}, not {self.sparsity}: the published controller steers toward "
                f"the "
                "target without guaranteeing it. A smaller p or more mixing drops more weights; mode='feedback' is exact."
            )
