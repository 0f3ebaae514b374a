"""Which weights a method works on, selected by patterns, and why each is in or out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_sparse.core.computed import why_computed
from lightning_sparse.core.layers import kind_of
from lightning_sparse.core.layout import is_cut, part_of, total_over_ranks
from lightning_sparse.core.patterns import as_patterns, check_syntax, covering, matches_name
from lightning_sparse.core.target import Target

__all__ = ["Candidate", "Candidates", "Selection", "describe", "find_targets", "select_targets"]

FROZEN = "frozen (requires_grad=False)"


@dataclass(frozen=True)
class Candidate:
    """One parameter of the module: selected or not, and why."""

    name: str
    kind: str
    shape: tuple[int, ...]
    chosen: bool
    reason: str
    by_pattern: bool = False
    """Whether the patterns decided, and not the kind of parameter."""


@dataclass(frozen=True)
class Selection:
    """The weights that patterns select.

    Args:
        targets: the weights, in the order of the module.
        frozen: weights that are left out because they do not train.
        unfit: weights that are left out because a structure does not fit them, and why.
    """

    targets: list[Target]
    frozen: dict[str, nn.Parameter] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)


def find_targets(module: nn.Module, patterns: Sequence[str] = ("*",), frozen: bool = False) -> list[Target]:
    """Find the weights that the patterns select, in the order of the module.

    A pattern is a glob over names (`layer1.*`, or `layer1` for everything in it), a regular expression (`re:layer[12]`,
    anywhere in the parameter's name), a layer type (`type:Conv2d`, subclasses included), or one end of the network
    (`:first`, `:last`, in the order of the module). A leading `!` excludes.

    A weight is selected if any pattern includes it and none excludes it; if all patterns exclude, the rest is included. Name
    patterns select among the weights of layers in `LAYER_KINDS`: convolutions, linear and recurrent layers, attention
    projections, experts. A type pattern also reaches others (`type:Embedding`); `register_layer` adds more. Vectors (biases,
    norms) are never selected, and frozen weights are left out.

    Args:
        module: the module that holds the weights.
        patterns: patterns that select the weights.
        frozen: whether to include frozen weights.

    Raises:
        ValueError: if a pattern matches nothing, or only frozen weights; if nothing is selected, or a selected weight is
            uninitialized or computed by a parametrization or by the layer itself.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        >>> [target.name for target in find_targets(net, ["!:first"])]
        ['3.weight']
    """
    return select_targets(module, patterns, frozen).targets


def select_targets(
    module: nn.Module,
    patterns: Sequence[str] = ("*",),
    frozen: bool = False,
    misfit: Callable[[Target], str | None] | None = None,
) -> Selection:
    """The weights that the patterns select, and those that are left out because of their kind; see `find_targets`.

    Frozen weights and weights that do not fit are left out, unless a pattern matches nothing else.

    Args:
        module: the module that holds the weights.
        patterns: patterns that select the weights.
        frozen: whether to include frozen weights.
        misfit: returns why a weight cannot have a structure, or None.
    """
    patterns = as_patterns(patterns)
    parameters = _parameters(module, patterns)
    _check_patterns(patterns, parameters)
    chosen = [parameter for parameter in parameters if _reason(parameter, patterns)[0]]
    obstacles: dict[int, str] = {}
    selection = Selection([])
    for parameter in chosen:
        if not (frozen or parameter.weight.requires_grad):
            obstacles[id(parameter)] = f"is {FROZEN}; unfreeze it"
            selection.frozen[parameter.name] = parameter.weight
    usable = [parameter for parameter in chosen if id(parameter) not in obstacles]
    cut = is_cut(module)
    _check_usable(usable, cut)
    for parameter in usable:
        weight = part_of(parameter.weight) if cut else parameter.weight
        target = Target.of(parameter.name, weight, parameter.layer)
        why = None if misfit is None else misfit(target)
        if why is None:
            selection.targets.append(target)
        else:
            obstacles[id(parameter)] = f"{why}; take another structure"
            selection.unfit[parameter.name] = why
    for pattern in _including(patterns):
        hits = [parameter for parameter in chosen if parameter.matches(pattern)]
        if hits and all(id(hit) in obstacles for hit in hits):
            more = f" The same holds for {len(hits) - 1} more." if len(hits) > 1 else ""
            raise ValueError(
                f"targets: '{pattern}' chooses nothing that can be used: '{hits[0].name}' ({type(hits[0].layer).__name__}) "
                f"{obstacles[id(hits[0])]}, or choose other weights.{more}"
            )
    if not chosen:
        raise ValueError(_nothing_chosen(module, patterns, parameters))
    return selection


def describe(module: nn.Module, patterns: Sequence[str] = ("*",), frozen: bool = False) -> Candidates:
    """Every parameter of the module with the reason why it is in or out; print it for a table.

    Args:
        module: the module that holds the parameters.
        patterns: patterns that select among them.
        frozen: whether to include frozen weights.
    """
    patterns = as_patterns(patterns)
    return Candidates(_decide(parameter, patterns, frozen) for parameter in _parameters(module, patterns))


class Candidates(list[Candidate]):
    """All parameters of a module; prints as a table that says why each is in or out."""

    def __str__(self) -> str:
        rows = [("", "parameter", "layer", "shape", "why")]
        rows += [("x" if c.chosen else "", c.name, c.kind, "x".join(map(str, c.shape)), c.reason) for c in self]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


@dataclass
class _Parameter:
    """A parameter with every layer that holds it, and whether name patterns may select it."""

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
        """A layer that holds it and is of a kind that name patterns do not select."""
        for name, layer in self.owners:
            kind = kind_of(layer, name.rpartition(".")[2])
            if kind is None or not kind.by_name:
                return layer
        return None

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
        check_syntax(pattern)
    found: dict[int, _Parameter] = {}
    for prefix, layer in module.named_modules(remove_duplicate=False):
        _refuse_computed(prefix, layer, patterns)
        for leaf, parameter in layer.named_parameters(recurse=False):
            entry = found.setdefault(id(parameter), _Parameter(parameter, []))
            entry.owners.append((f"{prefix}.{leaf}" if prefix else leaf, layer))
    eligible = [entry for entry in found.values() if not entry.is_vector and entry.foreign is None]
    if eligible:
        eligible[0].end += " first"
        eligible[-1].end += " last"
    return list(found.values())


def _including(patterns: list[str]) -> list[str]:
    return [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]


def _decide(parameter: _Parameter, patterns: list[str], frozen: bool) -> Candidate:
    shape = () if isinstance(parameter.weight, UninitializedParameter) else tuple(parameter.weight.shape)
    chosen, reason, by_pattern = _reason(parameter, patterns)
    if chosen and not (frozen or parameter.weight.requires_grad):
        chosen, reason, by_pattern = False, FROZEN, False
    return Candidate(parameter.name, type(parameter.layer).__name__, shape, chosen, reason, by_pattern)


def _reason(parameter: _Parameter, patterns: list[str]) -> tuple[bool, str, bool]:
    if parameter.is_vector:
        return False, "a bias or a vector", False
    for pattern in patterns:
        if pattern.startswith("!") and parameter.matches(pattern[1:]):
            return False, f"excluded by '{pattern}'", True
    hits = [pattern for pattern in _including(patterns) if parameter.matches(pattern)]
    by_type = [pattern for pattern in hits if pattern.startswith("type:")]
    if by_type or (hits and parameter.foreign is None):
        return True, f"included by '{(by_type or hits)[0]}'", True
    if not hits:
        return False, "no pattern includes it", True
    return False, _why_foreign(parameter), False


def _why_foreign(parameter: _Parameter) -> str:
    foreign = parameter.foreign
    tied = "shared with " if foreign is not parameter.layer else ""
    kind, leaf = type(foreign).__name__, parameter.name.rpartition(".")[2]
    if isinstance(foreign, (nn.Embedding, nn.EmbeddingBag)):
        return f"{tied}{kind}, which only 'type:{kind}' chooses"
    return f"{tied}{kind}, whose weight '{leaf}' is not of a known kind; describe it with register_layer"


def _nothing_chosen(module: nn.Module, patterns: list[str], parameters: list[_Parameter]) -> str:
    said = f"targets={patterns} chooses no weight of {type(module).__name__}"
    matrices = [p for p in parameters if not p.is_vector and not isinstance(p.weight, UninitializedParameter)]
    if not matrices:
        return f"{said}, which has no matrix at all."
    largest = max(matrices, key=lambda p: p.weight.numel())
    kind, reason = type(largest.layer).__name__, _reason(largest, patterns)[1]
    return (
        f"{said}; its largest is '{largest.name}' ({reason}). Name it with targets=['type:{kind}'], or call "
        f"register_layer({kind})."
    )


def _check_patterns(patterns: list[str], parameters: list[_Parameter]) -> None:
    """Refuse a pattern that matches nothing, which is a typo; suggest the nearest name."""
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        if any(parameter.matches(bare) for parameter in parameters):
            continue
        if bare.startswith("type:"):
            known = sorted({type(parameter.layer).__name__ for parameter in parameters})
        else:
            known = [parameter.name for parameter in parameters]
            known += [name.rpartition(".")[0] for name in known]
        near = difflib.get_close_matches(bare.removeprefix("type:").removeprefix("re:"), known, n=1, cutoff=0.5)
        named = [parameter for parameter in parameters if not isinstance(parameter.layer, nn.Embedding)] or parameters
        some = [f"'{one.name}' or 'type:{type(one.layer).__name__}'" for one in named[:1]]
        hint = f"did you mean '{near[0]}'?" if near else f"write such as {some[0]}." if some else "it has no parameters."
        raise ValueError(f"targets: '{pattern}' matches nothing in the model; {hint}")


def _check_usable(chosen: list[_Parameter], cut: bool) -> None:
    for trouble, names in _troubles(chosen, cut):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            remedy = covering(names, [p.name for p in chosen])
            raise ValueError(f"'{names[0]}'{more}: {trouble}, or exclude with targets={remedy}.")


def _troubles(chosen: list[_Parameter], cut: bool) -> Iterator[tuple[str, list[str]]]:
    yield (
        "with sparse gradients; make the layer with sparse=False",
        [p.name for p in chosen if getattr(p.layer, "sparse", False)],
    )
    unshaped = [p.name for p in chosen if isinstance(p.weight, UninitializedParameter)]
    yield "without a shape yet; run one batch through the lazy layer", unshaped
    shaped = [p for p in chosen if not p.weight.is_meta]
    flags = [~(part_of(p.weight) if cut else p.weight).detach().isfinite().all() for p in shaped]
    if cut and flags:
        flags = list(total_over_ranks(torch.stack(flags).long()))  # or one rank alone would stop here
    yield "not finite (NaN or infinite); start from other weights", [p.name for p, f in zip(shaped, flags, strict=True) if f]


def _refuse_computed(name: str, layer: nn.Module, patterns: list[str]) -> None:
    """Refuse a computed weight: it cannot hold zeros of its own, and skipping it silently would be wrong."""
    why = why_computed(layer)
    if why is None:
        return
    stand_in = _Parameter(nn.Parameter(next(layer.parameters()).new_empty(0, 0)), [(f"{name}.weight", layer)])
    excluded = any(pattern.startswith("!") and stand_in.matches(pattern[1:]) for pattern in patterns)
    if not excluded and any(stand_in.matches(pattern) for pattern in _including(patterns) if not pattern.startswith(":")):
        raise ValueError(
            f"The weight of layer '{name}' ({type(layer).__name__}) is computed by {why}, so stored zeros would not "
            f"be zeros in use; remove that first, or exclude the layer with targets=['!{name}']."
        )
