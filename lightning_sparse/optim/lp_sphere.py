"""Gradient descent on unit Lp spheres, for some parameter groups, beside plain SGD for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

from lightning_sparse.core import Exponents, check_exponents, find_spheres
from lightning_sparse.functional import check_exponent, check_vectors, from_dual, lp_normalize, lp_sgd_, to_dual

__all__ = ["LpSGD", "sphere_groups"]


class LpSGD(Optimizer):
    r"""SGD that keeps the weights of every output on the unit Lp sphere, in the groups that have a `p`.

    $$ v \leftarrow \frac{(1 - \eta) v - \eta \, \hat g}{\|\cdot\|_q}, \qquad w = sign(v) |v|^{1/(p-1)}, \qquad
       \hat g = m / \|m\|_q $$

    where m is the gradient after momentum and eta the group's `lr`. Weights are projected onto the sphere when the optimizer
    is created; the closer p is to 1, the sparser they become. The state of a constrained weight is its dual coordinates v,
    in float32 or wider, and its momentum. The weight is recomputed from v in every step and by `load_state_dict`, so any
    other edit to it lasts for one forward pass only.

    Source: Li et al. 2021, https://arxiv.org/abs/2103.16013; `LpCGD` in the official repository WilliamLiPro/LpSS.

    Args:
        params: parameters or groups; `sphere_groups` makes groups from a module.
        lr: in a group without `p`, the learning rate; in a group with `p`, the mixing weight eta in (0, 1]. The published
            recipe uses 2.0 for the former, with the mean loss of a batch, and 2/256 for the latter, both with the same
            schedule.
        p: exponent of the sphere, above 1; None leaves a group free.
        momentum: momentum factor, in [0, 1).
        nesterov: use Nesterov momentum.
        weight_decay: weight decay of free groups; the norm of a constrained vector is fixed.
        dim: the output dimension: 0, or 1 for transposed convolutions.

    Raises:
        ValueError: if a value is out of range, or a weight has no vectors of at least two entries.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> groups = [{"params": [net[0].weight], "p": 1.2, "lr": 0.01}, {"params": [net[0].bias, *net[2].parameters()]}]
        >>> optimizer = LpSGD(groups, lr=0.1)
        >>> net(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> net[0].weight.detach().abs().pow(1.2).sum(1)
        tensor([1.0000, 1.0000, 1.0000])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        p: float | None = None,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        dim: int | tuple[int, ...] = 0,
    ) -> None:
        defaults = {"lr": lr, "p": p, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "dim": dim}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its constrained weights are projected onto the sphere."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise
        group = self.param_groups[-1]
        if group["p"] is not None:
            with torch.no_grad():
                for weight in group["params"]:
                    weight.copy_(lp_normalize(weight, group["p"], group["dim"]))

    @staticmethod
    def _check(group: dict[str, Any]) -> None:
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum={group['momentum']} must be in [0, 1).")
        if group["weight_decay"] < 0:
            raise ValueError(f"weight_decay={group['weight_decay']} must be >= 0.")
        if group["p"] is None:
            if group["lr"] < 0:
                raise ValueError(f"lr={group['lr']} must be >= 0.")
            return
        check_exponent(group["p"])
        if not 0 < group["lr"] <= 1:
            raise ValueError(
                f"lr={group['lr']} of a group with p={group['p']} is a mixing weight and must be in (0, 1]; the published "
                "peak is 2/256."
            )
        for position, weight in enumerate(group["params"]):
            check_vectors(weight, f"Parameter {position} of a group with p", "put it into a group without p", group["dim"])

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move all parameters that have a gradient.

        Args:
            closure: reevaluates the loss and returns it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moving = [parameter for parameter in group["params"] if parameter.grad is not None]
            (self._step_freely if group["p"] is None else self._step_on_spheres)(group, moving)
        return loss

    def _step_freely(self, group: dict[str, Any], parameters: list[nn.Parameter]) -> None:
        buffers: list[Tensor | None] = [self.state[parameter].get("momentum_buffer") for parameter in parameters]
        sgd(
            parameters,  # type: ignore[arg-type]
            [parameter.grad for parameter in parameters],  # type: ignore[misc]
            buffers,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"],
            maximize=False,
        )
        if group["momentum"]:
            for parameter, buffer in zip(parameters, buffers, strict=True):
                self.state[parameter]["momentum_buffer"] = buffer

    def _step_on_spheres(self, group: dict[str, Any], weights: list[nn.Parameter]) -> None:
        rate, p = group["lr"], group["p"]
        if not isinstance(rate, Tensor) and not 0 <= rate <= 1:
            raise ValueError(f"A scheduler set lr={rate} for a group with p={p}; a mixing weight must stay in [0, 1].")
        for weight in weights:
            state = self.state[weight]
            if not state:
                state["dual"] = to_dual(lp_normalize(weight, p, group["dim"]), p)
                if group["momentum"]:
                    state["momentum_buffer"] = torch.zeros_like(state["dual"])
            lp_sgd_(
                weight,
                state["dual"],
                state.get("momentum_buffer"),
                weight.grad,  # type: ignore[arg-type]
                rate,
                p,
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                dim=group["dim"],
            )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved state, and set constrained weights from it."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for group in self.param_groups:
            for weight, index in zip(group["params"], saved, strict=False):
                state = self.state.get(weight, {})
                if "dual" in state:
                    # torch cast the state to the type of the weight, which may be too narrow for it.
                    for name, value in state_dict["state"][index].items():
                        state[name] = value.to(device=weight.device, dtype=value.dtype, copy=True)
                    weight.copy_(from_dual(state["dual"], group["p"]))


def sphere_groups(
    module: nn.Module,
    p: Exponents,
    *,
    lr: float,
    mixing: float = 2 / 256,
    targets: str | Sequence[str] = ("*",),
    free: str | Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for `LpSGD`: the weights of a module grouped by their p, then everything that stays free.

    Biases and norms stay free, and so does everything outside `targets`, and by default the last layer and layers whose name
    contains `shortcut` or `downsample`.

    Args:
        module: the module whose parameters are grouped.
        p: exponent of the spheres: one for all, a list in the order of the constrained weights, or a mapping of glob over
            names -> p.
        lr: learning rate of the free parameters.
        mixing: mixing weight of the constrained groups, in (0, 1].
        targets: patterns that select the weights; see `core.find_targets`.
        free: patterns of weights that stay off the spheres, instead of the default.

    Raises:
        ValueError: if p or a pattern does not fit the module.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> [(group.get("p"), len(group["params"])) for group in sphere_groups(net, [1.4, 1.2], lr=0.1)]
        [(1.4, 1), (1.2, 1), (None, 6)]
    """
    check_exponents(p)
    groups: dict[tuple[float, int | tuple[int, ...]], list[nn.Parameter]] = {}
    for sphere in find_spheres(module, p, targets, free):
        groups.setdefault((sphere.p, sphere.dim), []).append(sphere.target.weight)
    taken = {id(weight) for weights in groups.values() for weight in weights}
    rest = [parameter for parameter in module.parameters() if id(parameter) not in taken and parameter.requires_grad]
    made: list[dict[str, Any]] = [
        {"params": weights, "p": value, "lr": mixing, "dim": dim} for (value, dim), weights in groups.items()
    ]
    return [*made, {"params": rest, "lr": lr}] if rest else made
