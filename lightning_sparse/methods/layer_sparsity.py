"""Layer sparsity: a penalty that makes whole layers linear."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, final

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_sparse.core import (
    Link,
    Position,
    Remembered,
    RunLength,
    Span,
    check_choice,
    check_number,
    effective_pair,
    find_chains,
    is_collapsed,
    matches_name,
)
from lightning_sparse.functional import (
    LAYER_NORMS,
    layer_penalty,
    layer_penalty_gradient,
    layer_prox_,
    negative_ratio,
    soft_threshold_,
)
from lightning_sparse.loop import Sparsifier, Step

__all__ = ["LayerSparsity"]


@final
class LayerSparsity(Sparsifier):
    r"""Make whole layers linear, so that `merge_layers` can make the network shallower.

    Adds to the loss, for every layer k that has non-negative inputs and can be merged into the next one once its own weights
    and biases are non-negative (see `core.find_chains`),

    $$ \sum_k r_k \| \min((W_k, b_k), 0) \|_F + c \sum \|W\|_F^2 + l \sum \|W\|_1 $$

    in closed form at station `weight_penalty`, or, with `proximal`, applies its first and last terms as a proximal map at
    station `project`. The sum of squares covers all chosen weights, including the first and last layers. Without it, the
    penalty could be avoided by making inner layers small and the last one large. The norm is not squared, so the negative
    part of a layer vanishes as a whole. Layers are judged by the ratio of the norm of that part to the norm of the whole
    layer. For a layer followed by batch normalization, the folded tensors are penalized.

    Deep networks without normalization need an initialization that preserves the scale of the signal, such as Kaiming's.
    From a smaller one this objective can end in a constant function, which is reported as collapsed.

    Costs one pass over the weights per step, and four more over those of layers that may merge. One ratio per layer is read
    back once per epoch.

    Source: Hebiri and Lederer 2020, "Layer Sparsity in Neural Networks", https://arxiv.org/abs/2006.15604. Only the abstract
    and the start of the introduction were available: the norm, the biases, all strengths and the optimization are ours.

    Args:
        strength: r, at least 0; 0 leaves only the other two terms, as for a refit. Useful values depend on the task; in a
            simulation, 0.1 to 1 worked with Adam, and ten times as much with proximal steps after Adam.
        norm: norm of the negative part: `fro` (the layer as a unit), `l1` (entry by entry) or `fro_sq` (never exactly zero).
        proximal: make proximal steps with the optimizer's learning rate, which give exact zeros; for SGD.
        scale_decay: c, which fixes the scale; applied through the gradient, not decoupled.
        l1: l, for sparse connections.
        layer_strength: glob -> r for individual layers.
        warmup: the span over which r rises from zero: a fraction of the run, `'n epochs'` or `'n steps'`.
        tolerance: a layer with a ratio up to this counts as inactive.
        input_range: the smallest and largest input of the network, such as (0, 1) for pixels that are not standardized; the
            first layer may then merge too. None: inputs may have any sign.
        targets: patterns that select the weights; see `core.find_targets`. A layer that is not selected is not penalized.
        name: distinguishes several callbacks of the same class.

    Raises:
        ValueError: if no chosen layer could ever merge, with the reason for each.

    Example:
        >>> LayerSparsity(strength=0.3).config()["norm"]
        'fro'
    """

    history = Remembered[list[dict[str, Any]]](list)
    """One entry per epoch, before its first batch, and one after the last: the ratio of every layer that may merge."""
    ramp = Remembered(float)
    """The fraction of the strength that is active: below 1 during warmup."""

    removes_weights = False
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("sparsity", "allocation", "structure", "layer_sparsity"),
        "whole layers become linear, and no number of zero weights is guaranteed; l1 adds sparse connections",
    )

    def __init__(
        self,
        *,
        strength: float = 0.3,
        norm: Literal["fro", "l1", "fro_sq"] = "fro",
        proximal: bool = False,
        scale_decay: float = 1e-3,
        l1: float = 0.0,
        layer_strength: Mapping[str, float] | None = None,
        warmup: float | str = 0.0,
        tolerance: float = 1e-3,
        input_range: Sequence[float] | None = None,
        targets: str | Sequence[str] = ("*",),
        name: str | None = None,
    ) -> None:
        super().__init__(targets=targets, name=name)
        self.strength, self.norm, self.proximal = strength, norm, proximal
        self.scale_decay, self.l1, self.layer_strength = scale_decay, l1, layer_strength
        self.warmup, self.tolerance, self.input_range = warmup, tolerance, input_range
        numbers: dict[str, Any] = {"strength": strength, "scale_decay": scale_decay, "l1": l1}
        numbers |= {f"layer_strength['{glob}']": value for glob, value in (layer_strength or {}).items()}
        for argument, value in numbers.items():
            check_number(argument, value)
        check_choice("norm", norm, LAYER_NORMS)
        if not (isinstance(tolerance, int | float) and 0 <= tolerance < 1):
            raise ValueError(f"tolerance={tolerance!r} must be in [0, 1): a ratio of norms.")
        if input_range is not None and not (len(input_range) == 2 and input_range[0] < input_range[1]):
            raise ValueError(f"input_range={input_range!r} must be the smallest and the largest input, such as [0, 1].")
        self._warmup = Span.parse(warmup, "warmup")
        self.links: list[Link] = []
        self._strengths: dict[str, float] = {}
        self._headline: dict[str, float | str] = {}

    # ---- which layers ------------------------------------------------------------------------------------------------

    def check(self, run: RunLength, until: float = 1.0) -> None:
        if self._warmup.value:
            self._warmup.fraction(run, "warmup")
        chosen = {target.name for target in self.chosen}
        chains = find_chains(self.run.module, self.input_range)
        links = [link for link in chains.links if link.activated and f"{link.name}.weight" in chosen]
        if not links and (self.strength or self.layer_strength):
            raise ValueError(self._nothing_to_merge(chains.obstacles, chosen))
        for link in links:
            if self.proximal and (link.norm is not None or link.low < 0):
                what = "batch normalization" if link.norm is not None else "inputs that may be negative"
                raise ValueError(
                    f"proximal=True has no closed form for '{link.name}', a layer with {what}; omit proximal, or "
                    f"exclude the layer with targets=['!{link.name}']."
                )
        own = self.layer_strength or {}
        for glob in own:
            if not any(matches_name(glob, f"{link.name}.weight") for link in links):
                names = [link.name for link in links]
                raise ValueError(f"layer_strength: '{glob}' matches none of the layers that may merge: {names}.")
        self.links = links
        self._strengths = {
            link.name: next((own[glob] for glob in own if matches_name(glob, f"{link.name}.weight")), self.strength)
            for link in links
        }

    def _nothing_to_merge(self, obstacles: Mapping[str, str], chosen: set[str]) -> str:
        reasons = [f"'{name}': {reason}" for name, reason in obstacles.items() if f"{name}.weight" in chosen]
        return (
            f"{self.label} found no chosen layer that could merge into the next one ({'; '.join(reasons[:4])}"
            f"{'; ...' if len(reasons) > 4 else ''}); it needs two layers with a ReLU between them, behind another ReLU."
        )

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The chosen weights, and what else makes a layer linear or not: biases, and the scales of normalizations."""
        found = super().weights
        for link in self.links:
            found |= {name: p for name, p in link.parameters().items() if p.requires_grad}
        return found

    def begin(self) -> None:
        self.ramp = 0.0 if self._warmup.value else 1.0

    def release(self) -> None:
        self.links = []

    # ---- every step --------------------------------------------------------------------------------------------------

    def evolve(self, position: Position) -> None:
        if self._warmup.value:
            span = self._warmup.fraction(RunLength(**self.begun_with), "warmup")
            self.ramp = min(1.0, position.fraction / span)
        if position.epoch_start:
            self._write_down(position.epoch)

    def weight_penalty(self, step: Step) -> Iterator[tuple[str, Tensor]]:
        for target in self.chosen:
            if target.name not in step.weights:
                continue
            weight = target.weight.detach()
            if self.scale_decay:
                yield from _scaled(step, target.name, weight, 2 * self.scale_decay)
            if self.l1 and not self.proximal:
                yield from _scaled(step, target.name, weight.sign(), self.l1)
        if self.proximal:
            return
        for link in self.links:
            strength = self._strengths[link.name] * self.ramp
            if strength:
                for name, gradient in self._gradients(link).items():
                    if name in step.weights:
                        yield from _scaled(step, name, gradient, strength)

    def _gradients(self, link: Link) -> dict[str, Tensor]:
        """Gradients of the norm of the negative part; through batch normalization where it is folded."""
        parameters = link.parameters()
        if link.norm is None and link.low == 0:
            return dict(zip(parameters, layer_penalty_gradient(list(parameters.values()), self.norm), strict=True))
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
            pair = effective_pair(link, leaves)
            outer = layer_penalty_gradient(pair, self.norm)
            inner = torch.autograd.grad(pair, list(leaves.values()), outer, allow_unused=True)
        return {name: gradient for name, gradient in zip(leaves, inner, strict=True) if gradient is not None}

    def project(self, step: Step) -> None:
        if not self.proximal:
            return
        if self.l1:
            for target in self.chosen:
                if target.name in step.weights:
                    soft_threshold_(target.weight, step.learning_rate(target.name) * self.l1)
        for link in self.links:
            weight, strength = f"{link.name}.weight", self._strengths[link.name] * self.ramp
            if weight in step.weights and strength:
                tensors = [p for name, p in link.parameters().items() if name in step.weights]
                layer_prox_(tensors, step.learning_rate(weight) * strength, self.norm)

    # ---- what can be seen --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def ratios(self) -> dict[str, float]:
        """How negative each layer that may merge is: 0 for a linear one."""
        if not self.links:
            return {}
        values = torch.stack([negative_ratio(effective_pair(link)).float() for link in self.links]).tolist()
        return {link.name: value for link, value in zip(self.links, values, strict=True)}

    def _write_down(self, epoch: int) -> None:
        ratios = self.ratios()
        active = sum(ratio > self.tolerance for ratio in ratios.values())
        self.history.append({"epoch": epoch, "active": active, "ratios": ratios})
        self._headline = {"active layers": f"{active}/{len(ratios)}"}

    def headline(self) -> Mapping[str, float | str]:
        return self._headline

    @torch.no_grad()
    def numbers(self) -> Mapping[str, float | Tensor]:
        if not self.history:
            return {}
        last = self.history[-1]
        shown: dict[str, float | Tensor] = {f"ratio/{name}": ratio for name, ratio in last["ratios"].items()}
        penalties = [self._strengths[k.name] * layer_penalty(effective_pair(k), self.norm) for k in self.links]
        shown["active layers"] = float(last["active"])
        return shown | ({"penalty": torch.stack(penalties).sum()} if penalties else {})

    def conclude(self) -> None:
        self._write_down(self.run.trainer.current_epoch)
        if not self.links:
            return
        collapsed = [link.name for link in self.links if is_collapsed(link)]
        if collapsed:
            rank_zero_warn(
                f"{self.label}: the weights of {collapsed} are almost zero: the signal is cut off, the layer is not linear. "
                "Lower the strength, scale_decay or l1."
            )
        last = self.history[-1]
        inactive = [name for name, ratio in last["ratios"].items() if ratio <= self.tolerance and name not in collapsed]
        then = "none can be merged yet: raise the strength, or train longer."
        if inactive:
            then = (
                "lightning_sparse.merge_layers(model) merges them, and `lightning-sparse refit` also fine-tunes the network."
            )
        count = f"{len(inactive)} of {len(self.links)} layers that may merge"
        rank_zero_info(f"{self.label}: {count} are linear to {self.tolerance:g}; {then}")


def _scaled(step: Step, name: str, gradient: Tensor, factor: float) -> Iterator[tuple[str, Tensor]]:
    """A gradient times a factor: added in place where that needs no copy, otherwise yielded."""
    present = step.weights[name].grad
    if present is None or step.gradient_scale is not None:
        yield name, gradient * factor
    else:
        present.add_(gradient, alpha=factor)
