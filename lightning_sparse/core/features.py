"""Which layer outputs are compared, found by the shape of the model or by patterns, and hooks that read them."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.core.linear import CHANNEL_NORMS, CONVOLUTIONS, is_layer

__all__ = ["FeatureLayer", "FeatureTap", "feature_layers", "group_features"]

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    getattr(nn, name)
    for name in ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Hardswish", "Tanh")
)


@dataclass(frozen=True)
class FeatureLayer:
    """A module whose output is a feature.

    Args:
        name: its name in `named_modules`, without the prefixes of `torch.compile`.
        module: the module itself.
        group: the group from the patterns; None if its resolution decides.
    """

    name: str
    module: nn.Module
    group: str | None = None

    @property
    def sample_dim(self) -> int:
        """The sample dimension: 1 around attention with the sequence first."""
        attention = (m for m in self.module.modules() if isinstance(m, nn.MultiheadAttention))
        return 1 if any(not m.batch_first for m in attention) else 0

    @property
    def convolves(self) -> bool:
        """Whether it contains a convolution, so that the dimensions after the channels are spatial."""
        return any(isinstance(m, CONVOLUTIONS) for m in self.module.modules())


def feature_layers(
    model: nn.Module, layers: Sequence[str] | None = None, groups: Mapping[str, Sequence[str]] | None = None
) -> list[FeatureLayer]:
    """Find the layers whose outputs are compared, in the order of the model.

    By default, these are the blocks of residual networks and transformers: modules with two or more convolutions or linear
    layers inside that are members of a `Sequential`, `ModuleList` or `ModuleDict`, of a class that occurs there twice. In a
    model without blocks, it is every convolution with the normalization and activation that follow it; with fewer than two
    convolutions, every linear layer too, except the last one, which makes the outputs.

    Patterns can also select them: a glob in which `*` stays between two dots (`layer1.*`), a regular expression
    (`re:blocks`), a type (`type:BasicBlock`); a leading `!` excludes. If all patterns exclude, they exclude from the
    default.

    Args:
        model: the model to search.
        layers: patterns.
        groups: patterns by group name; only layers of the same group are compared.

    Raises:
        ValueError: if a pattern matches nothing, fewer than two layers are found, or a group has fewer than two.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
        >>> [layer.name for layer in feature_layers(net)]
        ['2', '3']
    """
    named = {_plain_name(name): module for name, module in model.named_modules() if name}
    if groups is not None:
        found = [
            FeatureLayer(name, named[name], group)
            for group, patterns in groups.items()
            for name in _chosen(named, patterns, f"groups['{group}']")
        ]
        _refuse_small_groups(found, groups)
        return found
    patterns = [layers] if isinstance(layers, str) else list(layers or [])
    if any(not str(pattern).startswith("!") for pattern in patterns):
        names = _chosen(named, patterns, "layers")
    else:
        automatic = {name: named[name] for name in _automatic(model, named)}
        names = _chosen(automatic, ["re:", *patterns], "layers") if automatic else []
    if len(names) < 2:
        raise ValueError(
            f"{type(model).__name__} has {f'1 layer ({names[0]!r})' if names else 'no layer'} to compare, but it takes two; "
            "name them with layers=['layer1.*', ...]."
        )
    return [FeatureLayer(name, named[name]) for name in names]


def group_features(layers: Sequence[FeatureLayer], shapes: Sequence[torch.Size], pairs: str) -> dict[str, list[int]]:
    """Group the features that are compared with one another: the indices of the layers by group name.

    Args:
        layers: layers whose outputs were seen.
        shapes: shapes of their outputs.
        pairs: `stage` for layers of equal resolution, `all` for all, `auto` for stages unless no stage has two layers. Given
            groups are kept.

    Raises:
        ValueError: if no group has two layers.

    Example:
        >>> layers = [FeatureLayer(name, nn.Conv2d(1, 1, 1)) for name in "abc"]
        >>> shapes = [torch.Size([8, 4, 16, 16]), torch.Size([8, 4, 16, 16]), torch.Size([8, 8, 8, 8])]
        >>> group_features(layers, shapes, "stage")
        {'16x16': [0, 1]}
        >>> group_features(layers, shapes, "all")
        {'all': [0, 1, 2]}
    """
    by_name: dict[str, list[int]] = {}
    for index, (layer, shape) in enumerate(zip(layers, shapes, strict=True)):
        stage = "all" if pairs == "all" else _resolution(layer, shape)
        by_name.setdefault(layer.group or stage, []).append(index)
    groups = {name: members for name, members in by_name.items() if len(members) > 1}
    if groups:
        return groups
    if pairs == "auto" and len(layers) > 1 and layers[0].group is None:
        return {"all": list(range(len(layers)))}
    seen = ", ".join(f"{layer.name} {tuple(shape)}" for layer, shape in zip(layers, shapes, strict=True)) or "none"
    raise ValueError(
        f"No group has two layers whose outputs were seen in training mode and with gradients (seen: {seen}). Set "
        "pairs='all' or name groups; do not run layers under torch.no_grad, and do not checkpoint them with "
        "use_reentrant=True."
    )


class FeatureTap:
    """Records the outputs of layers while it is open; the last output of a layer counts.

    It records only calls in training mode with gradients, of the very modules it was made for: copies of the model carry its
    hooks along but are ignored.

    Args:
        layers: layers to record.
        grad: False also records calls in evaluation mode and without gradients.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> tap = FeatureTap([FeatureLayer("0", net[0])])
        >>> tap.open = True
        >>> _ = net(torch.ones(5, 2))
        >>> [tuple(feature.shape) for layer, feature in tap.take()]
        [(5, 3)]
        >>> tap.take()
        []
        >>> tap.remove()
    """

    def __init__(self, layers: Sequence[FeatureLayer], grad: bool = True) -> None:
        self.open = False
        self.grad = grad
        self.layers = list(layers)
        self._modules = [layer.module for layer in layers]
        self._seen: dict[int, Tensor] = {}
        self._handles = [module.register_forward_hook(self._hook(index)) for index, module in enumerate(self._modules)]

    def take(self) -> list[tuple[FeatureLayer, Tensor]]:
        """Return the recorded outputs, in the order of the layers, samples first; this closes the tap and releases them."""
        self.open = False
        seen, self._seen = self._seen, {}
        return [(self.layers[i], _samples_first(seen[i], self.layers[i].sample_dim)) for i in sorted(seen)]

    def remove(self) -> None:
        """Remove the hooks from the model; safe to call again."""
        self.take()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._modules = []

    def _hook(self, index: int) -> Any:
        # A function, not a method, so that a copy of the model shares it and does not copy the tap.
        def see(module: nn.Module, inputs: Any, output: Any) -> None:
            if self.open and self._modules[index] is module and (not self.grad or _learns(module)):
                self._seen[index] = _tensor(output, self.layers[index].name)

        return see


def _samples_first(feature: Tensor, dim: int) -> Tensor:
    # The gradient of a view, even of one that changes nothing, cannot be added in place to that of the other branches.
    return feature.transpose(0, dim) if dim else feature


def _learns(module: nn.Module) -> bool:
    return module.training and torch.is_grad_enabled()


def _tensor(output: Any, name: str) -> Tensor:
    if isinstance(output, list | tuple) and output:
        output = output[0]  # the other outputs of transformers are attentions and caches
    if not isinstance(output, Tensor) or output.ndim < 2 or not output.is_floating_point():
        what = f"a {output.dtype} of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"The output of layer '{name}' is {what}, but a feature is a tensor of numbers with samples first; choose "
            "other layers with layers=[...]."
        )
    return output


def _resolution(layer: FeatureLayer, shape: torch.Size) -> str:
    if len(shape) > 3 or (len(shape) == 3 and layer.convolves):
        return "x".join(map(str, shape[2:]))
    return {3: "tokens", 2: "vectors"}[len(shape)]


# ---- patterns ------------------------------------------------------------------------------------------------------------


def _plain_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _chosen(named: Mapping[str, nn.Module], patterns: Sequence[str], argument: str) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"{argument}: {pattern!r} is not a pattern; write names such as 'layer1.*'.")
        if not any(_matches(pattern.removeprefix("!"), name, module) for name, module in named.items()):
            kinds = [f"type:{kind}" for kind in sorted({type(module).__name__ for module in named.values()})]
            near = difflib.get_close_matches(pattern.removeprefix("!"), [*named, *kinds], n=1, cutoff=0.3)
            hint = f"did you mean '{near[0]}'?" if near else f"there are, for example, {list(named)[:3]}."
            raise ValueError(f"{argument}: '{pattern}' matches no layer; {hint}")
    included = [pattern for pattern in patterns if not pattern.startswith("!")]
    excluded = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    return [
        name
        for name, module in named.items()
        if any(_matches(pattern, name, module) for pattern in included)
        and not any(_matches(pattern, name, module) for pattern in excluded)
    ]


def _matches(pattern: str, name: str, module: nn.Module) -> bool:
    if pattern.startswith("type:"):
        return any(base.__name__ == pattern[5:] for base in type(module).__mro__)
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    parts, globs = name.split("."), pattern.split(".")
    return len(parts) == len(globs) and all(map(fnmatch.fnmatchcase, parts, globs))


def _refuse_small_groups(found: list[FeatureLayer], groups: Mapping[str, Sequence[str]]) -> None:
    sizes = Counter(layer.group for layer in found)
    for group in groups:
        if sizes[group] < 2:
            raise ValueError(
                f"groups['{group}']={groups[group]!r} has {sizes[group]} layer, but it takes two; widen its patterns."
            )


# ---- layers that are found by themselves ---------------------------------------------------------------------------------


def _automatic(model: nn.Module, named: Mapping[str, nn.Module]) -> list[str]:
    names = {id(module): name for name, module in named.items()}
    blocks = [block for child in model.children() for block in _blocks(child, isinstance(model, CONTAINERS))]
    common = Counter(type(block) for block in blocks)
    found = {names[id(block)]: None for block in blocks if common[type(block)] > 1}
    return list(found) if len(found) > 1 else _units({"": model, **named})


def _blocks(module: nn.Module, in_container: bool) -> Iterator[nn.Module]:
    """The outermost modules that look like blocks; a module that contains several blocks of one class is a stage."""
    if isinstance(module, CONTAINERS):
        for child in module.children():
            yield from _blocks(child, True)
    elif in_container and _weight_layers(module) > 1 and not _lines_up_blocks(module):
        yield module
    else:
        for child in module.children():
            yield from _blocks(child, False)


def _lines_up_blocks(module: nn.Module) -> bool:
    inside = Counter(
        type(block) for child in module.children() if isinstance(child, CONTAINERS) for block in _blocks(child, True)
    )
    return any(count > 1 for count in inside.values())


def _weight_layers(module: nn.Module) -> int:
    return sum(is_layer(m) for m in module.modules())


def _units(named: Mapping[str, nn.Module]) -> list[str]:
    """The end of each convolution or hidden linear layer: after its normalization and its activation."""
    attended = {id(part) for m in named.values() if isinstance(m, nn.MultiheadAttention) for part in m.modules()}
    # Not of children(), which hides repetitions.
    places = Counter(
        id(child)
        for parent in named.values()
        for name, child in parent.named_modules(remove_duplicate=False)
        if name and "." not in name
    )
    layers = [name for name, m in named.items() if is_layer(m) and id(m) not in attended]
    convolutions = [name for name in layers if isinstance(named[name], CONVOLUTIONS)]
    return [_end_of_unit(name, named, places) for name in (convolutions if len(convolutions) > 1 else layers[:-1])]


def _end_of_unit(name: str, named: Mapping[str, nn.Module], places: Mapping[int, int]) -> str:
    """Only in a `Sequential` is the order of modules in their parent the order of calls."""
    parent_name = name.rpartition(".")[0]
    siblings = [other for other in named if other and other.rpartition(".")[0] == parent_name]
    in_order = isinstance(named[parent_name], nn.Sequential)
    layer, end = named[name], name
    channels = getattr(layer, "out_channels", getattr(layer, "out_features", None))
    for sibling in siblings[siblings.index(name) + 1 :]:
        module = named[sibling]
        fits = getattr(module, "num_features", getattr(module, "num_channels", None)) == channels
        normalizes = isinstance(module, (*CHANNEL_NORMS, nn.GroupNorm)) and fits
        activates = in_order and isinstance(module, ACTIVATIONS) and places[id(module)] < 2
        if not (normalizes or activates):
            break
        end = sibling
        if activates:
            break
    return end
