"""Which weights a method works on, chosen by patterns, and why each is in or out."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from lightning_sparse.core.layers import LayerKind, kind_of

__all__ = ["Candidate", "Candidates", "Target", "as_patterns", "describe", "find_targets", "matches_name"]


@dataclass(frozen=True)
class Target:
    """One weight that a method works on.

    Args:
        name: as in the module's state dict.
        weight: the parameter itself.
        output_dim: the dimension that counts outputs.
        input_dim: the dimension that counts inputs.
        groups: of a convolution, else 1.
    """

    name: str
    weight: nn.Parameter
    output_dim: int = 0
    input_dim: int = 1
    groups: int = 1

    @classmethod
    def of(cls, name: str, weight: nn.Parameter, layer: nn.Module) -> Target:
        """The weight of a layer, laid out as its kind is."""
        kind = kind_of(layer) or LayerKind(nn.Module)
        return cls(name, weight, kind.output_dim, kind.input_dim, int(getattr(layer, "groups", 1)))

    @property
    def shares_rows(self) -> bool:
        """Whether one row serves several outputs, as in a grouped transposed convolution."""
        return self.output_dim != 0 and self.groups > 1


@dataclass(frozen=True)
class Candidate:
    """One parameter of the module: chosen or not, and why."""

    name: str
    kind: str
    shape: tuple[int, ...]
    chosen: bool
    reason: str


def find_targets(module: nn.Module, patterns: Sequence[str] = ("*",)) -> list[Target]:
    """The weights that the patterns choose, in the order of the module.

    A pattern is a glob over names (`layer1.*`, or `layer1` for all that is in it), a regular expression
    (`re:layer[12]`, anywhere in the parameter's name), a layer type (`type:Conv2d`, subclasses included), or one end of
    the network (`:first`, `:last`, in the order of the module). With `!` in front it excludes.

    A weight is chosen if any pattern includes it and none excludes it; if all patterns exclude, the rest is included.
    Names choose among the weights of convolutions, linear layers and attention projections; a type also reaches others
    (`type:Embedding`). Vectors (biases, norms) are never chosen.

    Raises:
        ValueError: if a pattern matches nothing, nothing is chosen, or a chosen weight is frozen, uninitialized or
            computed by a parametrization.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        >>> [target.name for target in find_targets(net, ["!:first"])]
        ['3.weight']
    """
    patterns = as_patterns(patterns)
    parameters = _parameters(module, patterns)
    candidates = [_decide(parameter, patterns) for parameter in parameters]
    _check_patterns(patterns, parameters)
    chosen = [parameter for parameter, candidate in zip(parameters, candidates, strict=True) if candidate.chosen]
    if not chosen:
        raise ValueError(
            f"targets={patterns} chooses no weight of {type(module).__name__}; it needs a convolution, a linear layer "
            "or an attention projection, or name a layer type with 'type:<class>'."
        )
    _check_usable(chosen)
    return [Target.of(parameter.name, parameter.weight, parameter.layer) for parameter in chosen]


def describe(module: nn.Module, patterns: Sequence[str] = ("*",)) -> Candidates:
    """Every parameter of the module with the reason why it is in or out; print it for a table."""
    patterns = as_patterns(patterns)
    return Candidates(_decide(parameter, patterns) for parameter in _parameters(module, patterns))


def as_patterns(targets: str | Sequence[str]) -> list[str]:
    """One pattern or several, as a list.

    Raises:
        ValueError: if there is none, which would leave open whether all weights are meant or no weight.
    """
    if isinstance(targets, str):
        return [targets]
    if not isinstance(targets, Sequence) or not targets:
        raise ValueError(
            f"targets={targets!r} names no weights; write patterns such as ['encoder.*'], or leave it out for all."
        )
    return list(targets)


def matches_name(pattern: str, name: str) -> bool:
    """Whether a glob fits a parameter's name or that of a layer around it.

    Example:
        >>> matches_name("head", "head.2.weight"), matches_name("he", "head.2.weight")
        (True, False)
    """
    parts = name.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[: end + 1]), pattern) for end in range(len(parts)))


class Candidates(list[Candidate]):
    """All parameters of a module; prints as a table that says why each is in or out."""

    def __str__(self) -> str:
        rows = [("", "parameter", "layer", "shape", "why")]
        rows += [("x" if c.chosen else "", c.name, c.kind, "x".join(map(str, c.shape)), c.reason) for c in self]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


@dataclass
class _Parameter:
    """A parameter with every layer that holds it, and whether names may choose it."""

    weight: nn.Parameter
    owners: list[tuple[str, nn.Module]]
    end: str = ""

    @property
    def name(self) -> str:
        return self.owners[0][0]

    @property
    def layer(self) -> nn.Module:
        return self.owners[0][1]

    @property
    def is_vector(self) -> bool:
        uninitialized = isinstance(self.weight, UninitializedParameter)
        return "bias" in self.name.rpartition(".")[2] or (not uninitialized and self.weight.ndim < 2)

    @property
    def foreign(self) -> nn.Module | None:
        """A layer that holds it and is none of the kinds that names choose among."""
        return next((layer for _, layer in self.owners if kind_of(layer) is None), None)

    def matches(self, pattern: str) -> bool:
        if pattern.startswith(":"):
            return pattern[1:] in self.end.split()
        if pattern.startswith("type:"):
            return any(base.__name__ == pattern[5:] for base in type(self.layer).__mro__)
        if pattern.startswith("re:"):
            return any(re.search(pattern[3:], name) for name, _ in self.owners)
        return any(matches_name(pattern, name) for name, _ in self.owners)


def _parameters(module: nn.Module, patterns: list[str]) -> list[_Parameter]:
    for pattern in patterns:
        _check_syntax(pattern)
    found: dict[int, _Parameter] = {}
    for prefix, layer in module.named_modules(remove_duplicate=False):
        _check_parametrization(prefix, layer, patterns)
        for leaf, parameter in layer.named_parameters(recurse=False):
            entry = found.setdefault(id(parameter), _Parameter(parameter, []))
            entry.owners.append((f"{prefix}.{leaf}" if prefix else leaf, layer))
    eligible = [entry for entry in found.values() if not entry.is_vector and entry.foreign is None]
    if eligible:
        eligible[0].end += " first"
        eligible[-1].end += " last"
    return list(found.values())


def _decide(parameter: _Parameter, patterns: list[str]) -> Candidate:
    shape = () if isinstance(parameter.weight, UninitializedParameter) else tuple(parameter.weight.shape)
    chosen, reason = _reason(parameter, patterns)
    return Candidate(parameter.name, type(parameter.layer).__name__, shape, chosen, reason)


def _reason(parameter: _Parameter, patterns: list[str]) -> tuple[bool, str]:
    if parameter.is_vector:
        return False, "a bias or a vector"
    for pattern in patterns:
        if pattern.startswith("!") and parameter.matches(pattern[1:]):
            return False, f"excluded by '{pattern}'"
    included = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    hits = [pattern for pattern in included if parameter.matches(pattern)]
    by_type = [pattern for pattern in hits if pattern.startswith("type:")]
    if by_type or (hits and parameter.foreign is None):
        return True, f"included by '{(by_type or hits)[0]}'"
    if parameter.foreign is not None:
        tied = "shared with " if parameter.foreign is not parameter.layer else ""
        return False, f"{tied}{type(parameter.foreign).__name__}, not a convolution, linear layer or attention"
    return False, "no pattern includes it"


def _check_syntax(pattern: str) -> None:
    if not isinstance(pattern, str):
        raise ValueError(f"targets: {pattern!r} is not a pattern; write names such as 'encoder.*'.")
    bare = pattern.removeprefix("!")
    if bare.startswith("re:"):
        try:
            re.compile(bare[3:])
        except re.error as error:
            raise ValueError(f"targets: '{pattern}' is not a regular expression ({error}).") from None
    if bare.startswith(":") and bare not in (":first", ":last"):
        raise ValueError(f"targets: '{pattern}' is unknown; the ends of the network are ':first' and ':last'.")


def _check_patterns(patterns: list[str], parameters: list[_Parameter]) -> None:
    """A pattern that matches nothing is a typing error; say what is nearest."""
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        if any(parameter.matches(bare) for parameter in parameters):
            continue
        if bare.startswith("type:"):
            known = sorted({type(parameter.layer).__name__ for parameter in parameters})
        else:
            known = [parameter.name for parameter in parameters]
            known += [name.rpartition(".")[0] for name in known]
        near = difflib.get_close_matches(bare.removeprefix("type:").removeprefix("re:"), known, n=1, cutoff=0.3)
        near = near or known[:1]
        hint = f"did you mean '{near[0]}'?" if near else "the model has no parameters."
        raise ValueError(f"targets: '{pattern}' matches nothing in the model; {hint}")


def _check_usable(chosen: list[_Parameter]) -> None:
    unshaped = [p.name for p in chosen if isinstance(p.weight, UninitializedParameter)]
    frozen = [p.name for p in chosen if not p.weight.requires_grad]
    sparse = [p.name for p in chosen if getattr(p.layer, "sparse", False)]
    troubles = {
        "with sparse gradients; make the layer with sparse=False": sparse,
        "without a shape yet; run one batch through the lazy layer": unshaped,
        "frozen (requires_grad=False); unfreeze": frozen,
    }
    if not unshaped:
        finite = "not finite (NaN or infinite); start from other weights"
        troubles[finite] = [p.name for p in chosen if not (p.weight.is_meta or bool(p.weight.detach().isfinite().all()))]
    for trouble, names in troubles.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            remedy = _covering(names, [p.name for p in chosen])
            raise ValueError(f"'{names[0]}'{more}: {trouble}, or exclude with targets={remedy}.")


def _covering(names: list[str], chosen: list[str]) -> list[str]:
    """The shortest patterns that exclude these names and no others."""
    patterns: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        prefixes = [".".join(parts[: end + 1]) for end in range(len(parts))]
        safe = (p for p in prefixes if all(other in names for other in chosen if matches_name(p, other)))
        patterns[f"!{next(safe)}"] = None
    return list(patterns)


def _check_parametrization(name: str, layer: nn.Module, patterns: list[str]) -> None:
    """A computed weight cannot hold zeros of its own, so a method must not pass it over in silence."""
    if kind_of(layer) is None:
        return
    if parametrize.is_parametrized(layer) or "weight_orig" in dict(layer.named_parameters(recurse=False)):
        stand_in = _Parameter(nn.Parameter(torch.empty(0, 0)), [(f"{name}.weight", layer)])
        if not any(pattern.startswith("!") and stand_in.matches(pattern[1:]) for pattern in patterns):
            raise ValueError(
                f"The weight of layer '{name}' is computed by a parametrization or a pruning hook, so zeros cannot stay "
                "in it; remove that first (torch.nn.utils.parametrize or torch.nn.utils.prune)."
            )
