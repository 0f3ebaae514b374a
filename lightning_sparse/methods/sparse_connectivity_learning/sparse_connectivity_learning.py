"""Sparse connectivity learning: a trainable variable per connection decides whether it exists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, final

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_sparse.core import (
    Budget,
    LiveMasks,
    Position,
    Remembered,
    RunLength,
    Target,
    Window,
    lay_out,
    least_over_ranks,
    owner_of,
    refuse_shorter_run,
)
from lightning_sparse.families import ShadowWeights
from lightning_sparse.functional import (
    STEP_PROXIES,
    above,
    connection_price,
    cubic,
    dead_features,
    density_error,
    normalize_features_,
    steer_price,
)
from lightning_sparse.loop import Shards, Step
from lightning_sparse.methods.sparse_connectivity_learning.checks import check_arguments

__all__ = ["SparseConnectivityLearning"]

ONE_PRICE = "all connections pay one price, so layers find their own sparsity; choose weights with targets"

ARRIVAL = 2 / 3
"""When the controller aims to reach the target, as a fraction of the time until `end`. The rest selects at that density."""

STEERING = 0.005
"""The controller's update interval, as a fraction of the run. Counting waits for the device."""

FIRST_PRICE = 0.01
"""Initial price of the controller; a hundredth of the typical normalized gradient."""


@final
class SparseConnectivityLearning(ShadowWeights):
    r"""Learn which connections to keep, at one price for all: every layer finds its own sparsity.

    A weight w is used as $w \cdot H(s)$, where s is a trainable variable of its own and H is the unit step. The task
    gradient for s uses a proxy p for the step's derivative and is normalized per filter f; the connection count enters
    through its price:

    $$ g = \frac{\partial L}{\partial (w H)}\, w\, p(s), \qquad v \leftarrow \mu v + g / rms_f(g) + \lambda p(s), \qquad
       s \leftarrow s - \eta v $$

    Dropped connections have a gradient too, so they can return. Their weights get none, but the optimizer's weight decay and
    moments keep moving them. The callback keeps dense weights, variables and velocities; the model holds kept weights and
    exact zeros. Runs at stations `before_step` and `after_step`. Costs about twelve passes over the weights per step, and
    three more copies of the weights in memory (12 bytes per weight): variable, velocity, and the weight while it is dropped.
    They are float32, because in 16 bits a step of a variable would be lost in rounding.

    Source: Tang et al. 2022, "Automatic Sparse Connectivity Learning for Neural Networks", https://arxiv.org/abs/2201.05020,
    of which only the abstract was available: this follows the abstract, not the paper. All default values are ours. So is
    `sparsity`: a controller moves the price (below zero, a reward, if needed) until the density is reached; then exactly the
    promised number of connections with the highest variables is kept, and masks are fixed.

    Args:
        sparsity: the fraction removed, in (0, 1); or give a price instead, which guarantees no sparsity.
        price: price of a connection (lambda), positive; higher is sparser. With rms-normalized gradients useful values lie
            between 0.01 and 0.2. With a sparsity: the controller's initial price (0.01).
        proxy: proxy for the step's derivative: `identity` (the paper's), `leaky_relu`, `softplus`.
        norm: norm of the gradients of a feature: `rms`, `l2`, `max`, or `none`. Prices depend on it: l2 divides gradients by
            the root of the fan-in.
        feature: the unit of normalization: each `filter` (output channel, neuron), or the whole `layer`.
        initial: initial value of all variables, positive. Only its ratio to `learning_rate` matters (identity proxy).
        learning_rate: learning rate of the variables (eta). It follows the shape of the weights' schedule: it is multiplied
            by their rate divided by their highest or initial rate.
        momentum: momentum of the variables (mu), in [0, 1).
        warmup: span over which the price rises from zero: a fraction of the run, `'n epochs'` or `'n steps'`.
        end: when masks are fixed, so that the kept weights train on; with a sparsity, it is met here. `1.0` with a price:
            never.
        min_kept: minimum number of connections that every layer keeps.
        targets: patterns that select the weights; see `core.find_targets`. `"!:first"` and `"!:last"` exempt the first and
            last layers.
        name: distinguishes several callbacks of the same class.

    Raises:
        ValueError: for values out of range, or without a price and a sparsity.

    Example:
        >>> SparseConnectivityLearning(0.95).budget.sparsity, SparseConnectivityLearning(price=0.05).budget
        (0.95, None)
    """

    shards: ClassVar[Shards] = "data"

    variables = Remembered[dict[str, Tensor]](dict, over="entries")
    """One per connection, in float32 or wider; positive means kept."""
    velocity = Remembered[dict[str, Tensor]](dict, over="entries")
    """Momentum of the variables; it includes the price."""
    cost = Remembered(float)
    """The current price."""
    window = Remembered[Window]()
    _steering = Remembered[dict[str, float]](lambda: {"memory": math.asinh(1.0), "progress": 0.0})
    _full_rates = Remembered[dict[str, float]](dict)
    _regrown = Remembered[dict[str, Tensor]](dict, over="sums")
    _kept_before = Remembered[dict[str, int]](dict)
    _emptied = Remembered[list[str]](list)

    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("allocation", "structure", "layer_sparsity"), ONE_PRICE),
        "connection_cost": "the price of a connection is called price",
        "mask_lr": "the learning rate of the variables is called learning_rate",
        "mask_momentum": "the momentum of the variables is called momentum",
        "freeze": "when masks stop changing is called end",
    }

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        price: float | None = None,
        proxy: Literal["identity", "leaky_relu", "softplus"] = "identity",
        norm: Literal["rms", "l2", "max", "none"] = "rms",
        feature: Literal["filter", "layer"] = "filter",
        initial: float = 0.1,
        learning_rate: float = 0.01,
        momentum: float = 0.9,
        warmup: float | str = 0.0,
        end: float | str = 0.75,
        min_kept: int = 0,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.sparsity, self.price = sparsity, price
        self.proxy, self.norm, self.feature = proxy, norm, feature
        self.initial, self.learning_rate, self.momentum = initial, learning_rate, momentum
        self.warmup, self.end, self.min_kept = warmup, end, min_kept
        check_arguments(self)
        self.budget = None if sparsity is None else Budget(sparsity)
        self.rise = Window(0.0, warmup, STEERING, "warmup")
        self.window = Window(0.0, end, STEERING)
        self._masks = LiveMasks({})
        self._now: dict[str, Tensor] = {}

    # ---- what is asked of it -----------------------------------------------------------------------------------------

    def misfit(self, target: Target) -> str | None:
        if target.parts_outputs:
            return "is sharded along its inputs, and the gradient of a filter is normalized over all of them"
        return super().misfit(target)

    @property
    def mask_set(self) -> LiveMasks:
        if self._masks.variables is not self.variables:
            self._masks = LiveMasks(self.variables, self.layouts.get("entries"))
        return self._masks

    def shown(self, name: str, dense: Tensor) -> Tensor:
        return self._now[name] if name in self._now else above(self.variables[name])

    def check(self, run: RunLength, until: float = 1.0) -> None:
        for target in self.chosen:
            if self._full_rate(target.weight) <= 0:
                raise ValueError(
                    f"{self.label}: the optimizer does not step '{target.name}', whose learning rate is 0; set one, or "
                    f"exclude the weight with targets=['!{target.name}']."
                )
            if target.size < self.min_kept:
                raise ValueError(
                    f"min_kept={self.min_kept} is more than '{target.name}' has ({target.size:,}); lower it, or "
                    f"exclude the layer with targets=['!{target.name}']."
                )
        if self.layouts and (self.min_kept or (self.feature == "layer" and self.norm != "none")):
            given = f"min_kept={self.min_kept}" if self.min_kept else f"feature='{self.feature}'"
            raise ValueError(
                f"{self.label}: with sharded weights, {given} would make ranks communicate about every layer in every step; "
                "use min_kept=0 and feature='filter'."
            )
        if self.warmup:
            self.rise.resolve(run)
        if self.freezes:
            self.window.resolve(run)
        if self.budget is not None:
            self._check_target(self.budget, until)

    def begin(self) -> None:
        dtypes = {name: torch.promote_types(weight.dtype, torch.float32) for name, weight in self.weights.items()}
        self.variables = {
            name: torch.full_like(weight, self.initial, dtype=dtypes[name]) for name, weight in self.weights.items()
        }
        self.velocity = {name: torch.zeros_like(variable) for name, variable in self.variables.items()}
        self._full_rates = {name: self._full_rate(weight) for name, weight in self.weights.items()}
        self._regrown = {name: variable.new_zeros((), dtype=torch.int64) for name, variable in self.variables.items()}
        self._kept_before = {target.name: target.size for target in self.chosen}
        self.cost = self._first_price
        if self.budget is not None:
            self.promise(lay_out(self.budget, self.chosen).kept_units())
        super().begin()

    # ---- the step ----------------------------------------------------------------------------------------------------

    def before_step(self, step: Step) -> None:
        super().before_step(step)  # from here on `hidden` is free
        if self.frozen:
            return
        features = {target.name: target.output_dims if self.feature == "filter" else None for target in self.chosen}
        for name, weight in step.weights.items():
            if weight.grad is None:
                continue  # its optimizer skips it, so this does too
            gradient = self.hidden[name]
            if gradient.dtype == weight.dtype == weight.grad.dtype:
                torch.mul(weight, weight.grad, out=gradient)
            else:
                gradient.copy_(weight).mul_(weight.grad)
            if step.gradient_scale is not None:
                gradient.div_(step.gradient_scale)
            if self.proxy != "identity":
                gradient.mul_(STEP_PROXIES[self.proxy](self.variables[name]))
            normalize_features_(gradient, self.norm, features[name])

    def silence(self, step: Step) -> None:
        self._now = {name: above(self.variables[name]) for name in step.weights}  # used again after the step
        super().silence(step)

    def after_step(self, step: Step) -> None:
        if not self.frozen:
            rates = {id(weight): group["lr"] for group in step.optimizer.param_groups for weight in group["params"]}
            for name, weight in step.weights.items():
                if weight.grad is not None:
                    self._learn(name, self.learning_rate * float(rates[id(owner_of(weight))]) / self._full_rates[name])
        super().after_step(step)
        self._now = {}

    def undo_step(self, step: Step) -> None:
        super().undo_step(step)
        self._now = {}

    def _learn(self, name: str, rate: float) -> None:
        """Move the variables of one layer by the gradient stored in `hidden`."""
        variable, velocity, kept = self.variables[name], self.velocity[name], self._now[name]
        velocity.mul_(self.momentum).add_(self.hidden[name])
        if self.proxy == "identity":
            velocity.add_(self.cost)
        else:
            velocity.add_(STEP_PROXIES[self.proxy](variable), alpha=self.cost)
        variable.sub_(velocity, alpha=rate)
        if self.min_kept:
            least = variable.flatten().topk(self.min_kept).values[-1]
            variable.copy_(torch.where(variable >= least, variable.clamp(min=torch.finfo(variable.dtype).tiny), variable))
        self._now[name] = above(variable)
        if self.counts(name):
            self._regrown[name].add_((self._now[name] > kept).count_nonzero())

    # ---- the price and the freeze ------------------------------------------------------------------------------------

    @property
    def freezes(self) -> bool:
        """Whether masks are fixed before the run ends."""
        return self.budget is not None or self.end != 1

    @property
    def frozen(self) -> bool:
        """Whether masks are fixed now."""
        return self.window.is_over

    def evolve(self, position: Position) -> None:
        if not position.epoch_start and self.run.time_to_count:
            self._warn_of_empty_layers(self.mask_set.counts)
        if self.frozen:
            return
        if self.budget is None:
            self.cost = self._first_price * self.rise.progress(position)
        if not self.freezes or not self.window.take(position) or self.budget is None:
            return
        if self.window.is_over:
            self._settle(self.budget)
        else:
            self._steer(self.window.progress(position), self.budget.sparsity)

    def _steer(self, progress: float, sparsity: float) -> None:
        """Move the price so that the density follows a cubic path to its target."""
        masks, last = self.mask_set, self._steering
        wanted = 1 - cubic(min(1.0, progress / ARRIVAL), 0.0, sparsity)
        error = density_error(max(masks.kept, 0.5) / masks.total, wanted, 1 - sparsity)
        memory, drive = steer_price(last["memory"], error, progress - last["progress"])
        self._steering = {"memory": memory, "progress": progress}
        self.cost = connection_price(drive, self._first_price)

    def _settle(self, budget: Budget) -> None:
        """Keep exactly the promised number of connections: those with the highest variables."""
        scores = []
        for variable in self.variables.values():
            score = variable.clone(memory_format=torch.contiguous_format)
            if self.min_kept:
                score.view(-1)[variable.flatten().topk(self.min_kept).indices] = torch.inf
            scores.append(score)
        for variable, mask in zip(self.variables.values(), lay_out(budget, self.chosen).masks(scores), strict=True):
            kept = variable.clamp(min=torch.finfo(variable.dtype).tiny)
            variable.copy_(torch.where(mask, kept, variable.clamp(max=0)))
        self.take_in(self.weights)

    def conclude(self) -> None:
        if self.budget is not None and not self.frozen:
            rank_zero_warn(
                f"{self.label} ends at sparsity {self.mask_set.sparsity:.4f}, not {self.budget.sparsity}: training stopped "
                "before the masks were fixed. Train longer, or set an earlier end."
            )

    # ---- what it tells -----------------------------------------------------------------------------------------------

    def epoch_end(self) -> Mapping[str, float | Tensor]:
        counts, dims = self.mask_set.counts, self.output_dims
        self._warn_of_empty_layers(counts)
        regrown, dead, smallest = self._told(dims)
        numbers = {
            "kept": sum(counts.values()),
            "regrown": regrown,
            "pruned": regrown - sum(counts.values()) + sum(self._kept_before.values()),
            "dead_filters": dead,
            "smallest_variable": smallest,
            "cost": self.cost,
            **{f"kept/{name}": count for name, count in counts.items()},
        }
        for count in self._regrown.values():
            count.zero_()
        self._kept_before = counts
        return {key: float(value) for key, value in numbers.items()}

    def _told(self, dims: Mapping[str, tuple[int, ...]]) -> tuple[int, int, float]:
        """Connections that have returned, features without any, and the smallest variable; over all ranks."""
        dead = [dead_features(variable, dims[name]) for name, variable in self.variables.items()]
        smallest = torch.stack([v.min() if v.numel() else v.new_full((), math.inf) for v in self.variables.values()]).min()
        if self.spread is None:
            return sum(map(int, self._regrown.values())), sum(map(int, dead)), float(smallest)
        sums = self.spread.sums([*self._regrown.values()]), self.spread.sums(dead)
        return sum(sums[0]), sum(sums[1]), float(least_over_ranks(smallest))

    def _warn_of_empty_layers(self, counts: dict[str, int]) -> None:
        empty = [name for name, count in counts.items() if count == 0 and name not in self._emptied]
        for name in empty:
            self.warn_of_empty(name, "Lower the price, or set min_kept.")
        self._emptied = self._emptied + empty

    # ---- arguments ---------------------------------------------------------------------------------------------------

    @property
    def _first_price(self) -> float:
        return FIRST_PRICE if self.price is None else float(self.price)

    def _full_rate(self, weight: nn.Parameter) -> float:
        """The learning rate that schedules start from or rise to, for the group that contains a weight."""
        for optimizer in self.run.optimizers:
            for group in optimizer.param_groups:
                if any(parameter is owner_of(weight) for parameter in group["params"]):
                    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))
        return 0.0

    def _check_target(self, budget: Budget, until: float) -> None:
        plan = lay_out(budget, self.chosen)
        plan.check()
        promised = plan.kept_units()
        if promised < self.min_kept * len(self.chosen):
            raise ValueError(
                f"sparsity={self.sparsity} keeps {promised:,} connections, fewer than min_kept={self.min_kept} in each of "
                f"{len(self.chosen)} layers; lower one of them."
            )
        if not self.frozen:
            refuse_shorter_run(f"{self.label} fixes its masks", self.window.end, until)
