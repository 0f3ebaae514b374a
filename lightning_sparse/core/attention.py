"""Find attention heads by tracing dependencies, not by layer names; this works for any layout from any library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.core.calls import Call
from lightning_sparse.core.costs import tensors_in
from lightning_sparse.core.cutting import Kept, cut
from lightning_sparse.core.fewer_heads import FewerHeads
from lightning_sparse.core.layers import kind_of
from lightning_sparse.core.libraries import first_line
from lightning_sparse.core.networks import callee, copy_model, replace_module, shared_parameters, without_nested_tensors

__all__ = [
    "Attention",
    "FoundAttentions",
    "find_attentions",
    "places_of",
    "resize",
    "row_of",
    "why_they_stay",
    "without_heads",
]


@dataclass(frozen=True)
class Attention:
    """An attention and the positions of its heads. Heads that share a projection, as in grouped queries, count as one.

    Args:
        name: the module that holds all of its layers.
        rows: layer -> head -> its outputs in that layer (query, key, value). `nn.MultiheadAttention` is one layer; there
            they are the outputs in each projection.
        out: the layer that reads the heads.
        columns: head -> its inputs in `out`.
    """

    name: str
    rows: Mapping[str, Sequence[Sequence[int]]]
    out: str
    columns: Sequence[Sequence[int]]

    @property
    def heads(self) -> int:
        """Number of heads."""
        return len(self.columns)


@dataclass
class FoundAttentions:
    """The attentions that were found, and those whose heads cannot be removed.

    Args:
        attentions: the attentions, in the order in which they are called.
        obstacles: output layer of an attention whose heads cannot be removed -> reason.
    """

    attentions: list[Attention] = field(default_factory=list)
    obstacles: dict[str, str] = field(default_factory=dict)


def find_attentions(model: nn.Module, calls: Sequence[Call]) -> FoundAttentions:
    """Find all attentions of a model.

    A layer reads heads if its input consists of blocks: the entries of a block depend on the same outputs of earlier layers
    (the queries and keys of a head), and each entry depends on one more output that is its own (its value). This finds
    `nn.MultiheadAttention`, fused and separate projections, grouped queries and interleaved heads.

    Args:
        model: the model; its parameters may have any values, including zeros.
        calls: calls of its networks, with at least two positions.

    Raises:
        ValueError: if a network does not run while it is traced.
    """
    found = FoundAttentions()
    shared = shared_parameters(model)
    for call in calls:
        prefix, network = callee(model, call.network)
        for attention in (*_of_torch(network), *_by_trying(network, replace(call, network=""))):
            layers = [network.get_submodule(name) for name in (*attention.rows, attention.out)]
            named = _prefixed(attention, prefix)
            if any(id(p) in shared for layer in layers for p in layer.parameters()):
                found.obstacles[named.out] = "its weights are shared with another layer"
            elif attention.heads == 1:
                found.obstacles[named.out] = "all heads share a projection"
            else:
                found.attentions.append(named)
    return found


def places_of(model: nn.Module, attention: Attention) -> list[list[tuple[str, int]]]:
    """Return, for each head, its rows in the parameters: weights and biases of query, key and value."""
    places: list[list[tuple[str, int]]] = [[] for _ in range(attention.heads)]
    for path, heads in attention.rows.items():
        layer = model.get_submodule(path)
        for leaf, parameter in layer.named_parameters(recurse=False):
            kind, name = kind_of(layer, leaf), f"{path}.{leaf}".lstrip(".")
            parts = 3 if leaf.startswith("in_proj") else 1
            size = parameter.shape[0 if kind is None or parameter.ndim == 1 else kind.output_dim] // parts
            for head, rows in zip(places, heads, strict=True):
                head.extend((name, part * size + row) for part in range(parts) for row in rows)
    return places


def _prefixed(attention: Attention, prefix: str) -> Attention:
    def path(name: str) -> str:
        return f"{prefix}.{name}".strip(".")

    rows = {path(name): heads for name, heads in attention.rows.items()}
    return Attention(path(attention.name), rows, path(attention.out), attention.columns)


def _of_torch(network: nn.Module) -> Iterator[Attention]:
    """Yield every `nn.MultiheadAttention`; it uses its weights internally, so hooks cannot see the products."""
    for name, part in network.named_modules():
        if isinstance(part, nn.MultiheadAttention):
            size = part.head_dim
            heads = [range(head * size, (head + 1) * size) for head in range(part.num_heads)]
            yield Attention(name, {name: heads}, f"{name}.out_proj".lstrip("."), heads)


# ---- by tracing ---------------------------------------------------------------------------------------------------------


def _by_trying(network: nn.Module, call: Call) -> list[Attention]:
    """Find attentions made of layers: the output of every layer is replaced by random numbers that start a new graph."""
    look = _Look()
    torch_own = {id(part.out_proj) for part in network.modules() if isinstance(part, nn.MultiheadAttention)}
    handles = []
    training = [(part, part.training) for part in network.modules()]
    network.eval()
    for name, layer in network.named_modules():
        kind = kind_of(layer)
        weight = getattr(layer, "weight", None)
        is_matrix = isinstance(weight, Tensor) and weight.ndim == 2
        if kind is not None and kind.reads_input and is_matrix and id(layer) not in torch_own:
            handles.append(layer.register_forward_pre_hook(look.reading(name), with_kwargs=True))
            handles.append(layer.register_forward_hook(look.giving(name)))
    try:
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            call(network)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        said = f"{type(network).__name__} cannot be traced for attention heads ({first_line(error)})"
        raise ValueError(f"{said}; write structure='channel' or 'coupled'.") from error
    finally:
        for handle in handles:
            handle.remove()
        for part, mode in training:
            part.training = mode
    by_reader = {one.out: one for one in look.found}  # a layer that is called again reads the same heads again
    alike = [one for out, one in by_reader.items() if all(one == other for other in look.found if other.out == out)]
    return [one for one in alike if all(look.readers[name] == {one.out} for name in one.rows)]


class _Look:
    """Hooks that see which outputs of earlier layers each layer reads."""

    def __init__(self) -> None:
        self.ends: dict[str, Tensor] = {}
        self.readers: dict[str, set[str]] = {}
        self.found: list[Attention] = []
        self._dice = torch.Generator().manual_seed(0)

    def giving(self, name: str) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                return output
            drawn = torch.randn(output.shape, generator=self._dice).mul_(0.3)  # small, so that no softmax saturates
            self.ends[name] = drawn.to(output).requires_grad_()
            return self.ends[name].clone()  # later operations may work in place

        return hook

    def reading(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, named: Any) -> None:
            given: Tensor = args[0] if args else next(iter(named.values()))
            if not (self.ends and given.requires_grad):
                return
            for source in self._rows(given, range(given.shape[-1])):
                self.readers.setdefault(source, set()).add(name)
            attention = self._attention(name, given)
            if attention is not None:
                self.found.append(attention)

        return hook

    def _rows(self, given: Tensor, columns: Sequence[int]) -> dict[str, set[int]]:
        """Return, for each layer, the outputs that these columns depend on."""
        part = given[..., list(columns)]
        weights = torch.rand(part.shape, generator=self._dice).to(part)
        names, ends = list(self.ends), list(self.ends.values())
        slopes = torch.autograd.grad((part * weights).sum(), ends, retain_graph=True, allow_unused=True)
        rows = {
            name: {*slope.reshape(-1, slope.shape[-1]).any(0).nonzero().flatten().tolist()}
            for name, slope in zip(names, slopes, strict=True)
            if slope is not None
        }
        return {name: found for name, found in rows.items() if found}

    def _attention(self, name: str, given: Tensor) -> Attention | None:
        width = given.shape[-1]
        first = self._flat(given, [0])
        size = self._size_of_a_head(given, first) if len(first) > 2 else None
        if size is None:
            return None
        blocks = [range(start, start + size) for start in range(0, width, size)]
        heads: list[tuple[list[int], set[tuple[str, int]]]] = []
        for block in blocks:
            mine: tuple[list[int], set[tuple[str, int]]] = [*block], self._flat(given, block)
            for other in [one for one in heads if one[1] & mine[1]]:
                heads.remove(other)
                mine = other[0] + mine[0], other[1] | mine[1]
            heads.append(mine)
        if len(set.union(*(rows for _, rows in heads))) <= width:
            return None  # a norm over groups
        layers = sorted({layer for _, rows in heads for layer, _ in rows})
        rows = {layer: [sorted(row for one, row in mine if one == layer) for _, mine in heads] for layer in layers}
        return Attention(_holder([*layers, name]), rows, name, [columns for columns, _ in heads])

    def _size_of_a_head(self, given: Tensor, first: set[tuple[str, int]]) -> int | None:
        """Return the number of columns of a head; None if the columns do not form blocks with the same dependencies."""
        width = given.shape[-1]
        common = first & self._flat(given, [1]) if width > 2 else set()
        if not common:
            return None
        for size in (size for size in range(2, width) if width % size == 0):
            if not common <= self._flat(given, [size]):
                return size
        return None

    def _flat(self, given: Tensor, columns: Sequence[int]) -> set[tuple[str, int]]:
        return {(layer, row) for layer, rows in self._rows(given, columns).items() for row in rows}


def _holder(paths: Sequence[str]) -> str:
    """Return the path of the innermost module that holds all of these paths."""
    steps = [path.split(".") for path in paths]
    same = [names[0] for names in zip(*steps, strict=False)]
    depth = next((i for i, names in enumerate(zip(*steps, strict=False)) if len({*names}) > 1), len(same))
    return ".".join(same[:depth])


# ---- removing heads -----------------------------------------------------------------------------------------------------

_COUNTS = (
    "num_heads",
    "n_heads",
    "n_head",
    "heads",
    "num_attention_heads",
    "num_key_value_heads",
    "num_kv_heads",
    "all_head_size",
    "attn_dim",
    "inner_dim",
    "split_size",
)
"""Names that modules use for attributes that change with the number of heads."""


@torch.no_grad()
def without_heads(model: nn.Module, attention: Attention, heads: Sequence[int]) -> tuple[dict[str, Kept], dict[str, Any]]:
    """Remove heads from a model, in place.

    Args:
        model: the model that holds the attention.
        attention: the attention, as it is in the model now.
        heads: the heads to remove.

    Returns:
        What is left of each layer, and the changed attributes of modules, by their paths.

    Raises:
        ValueError: if the attention cannot have fewer heads.
    """
    stay = [head for head in range(attention.heads) if head not in set(heads)]
    kept = {
        layer: Kept(outputs=sorted(row for head in stay for row in rows[head])) for layer, rows in attention.rows.items()
    }
    kept[attention.out] = Kept(inputs=sorted(column for head in stay for column in attention.columns[head]))
    sizes: dict[str, Any] = {}
    for path in _holders(attention):
        part = model.get_submodule(path)
        for name in _COUNTS:
            value = vars(part).get(name)
            if isinstance(value, int) and value * len(stay) % attention.heads == 0:
                sizes[f"{path}.{name}".lstrip(".")] = value * len(stay) // attention.heads
    for path, part in model.named_modules():
        if isinstance(part, nn.TransformerEncoder) and getattr(part, "use_nested_tensor", False):
            sizes[f"{path}.use_nested_tensor".lstrip(".")] = False  # nested tensors need torch's own layers
    resize(model, sizes)
    for layer, part_left in kept.items():
        cut(model.get_submodule(layer), part_left)
    return kept, sizes


def why_they_stay(model: nn.Module, calls: Sequence[Call], attentions: Sequence[Attention]) -> str:
    """Return why heads cannot be removed, by trying to remove one head of each attention; empty if they can.

    The last head is tried, and then the first: without the last one, a table that is cut to the number of heads still fits.

    Args:
        model: the model that holds the attentions.
        calls: calls of its networks.
        attentions: the attentions to try.
    """
    return _why_one_stays(model, calls, attentions, -1) or _why_one_stays(model, calls, attentions, 0)


def _why_one_stays(model: nn.Module, calls: Sequence[Call], attentions: Sequence[Attention], head: int) -> str:
    zeroed, smaller = (without_nested_tensors(copy_model(model).eval()) for _ in range(2))
    with torch.no_grad():
        for attention in attentions:
            for name, row in places_of(zeroed, attention)[head]:
                row_of(zeroed, name, row).zero_()
        try:
            for attention in attentions:
                without_heads(smaller, attention, [range(attention.heads)[head]])
            both = [(_outputs(call, zeroed), _outputs(call, smaller)) for call in calls]
        except Exception as error:
            return f"with fewer heads the model does not run ({first_line(error)})"
    pairs = [pair for mine, theirs in both for pair in zip(mine, theirs, strict=True) if pair[0].shape == pair[1].shape]
    if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max())) for a, b in pairs if a.numel()):
        return "with fewer heads the model returns something else"
    return "" if pairs else "with fewer heads every output of the model has another size"


def row_of(model: nn.Module, name: str, row: int) -> Tensor:
    """Return the row of a parameter, a weight or a bias, that belongs to one output."""
    holder, _, leaf = name.rpartition(".")
    parameter, kind = model.get_parameter(name), kind_of(model.get_submodule(holder), leaf)
    return parameter.select(0 if kind is None or parameter.ndim == 1 else kind.output_dim, row)


def _outputs(call: Call, model: nn.Module) -> list[Tensor]:
    return [tensor for tensor in tensors_in(call(model)) if tensor.is_floating_point()]


def resize(model: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Set attributes of modules, by their paths; an `nn.MultiheadAttention` that loses heads becomes `FewerHeads`."""
    for path, value in sizes.items():
        holder, _, name = path.rpartition(".")
        part = model.get_submodule(holder)
        if type(part) is nn.MultiheadAttention:
            part = FewerHeads.of(part)
            replace_module(model, holder, part)
        setattr(part, name, value)


def _holders(attention: Attention) -> list[str]:
    """Return modules that may store the number of heads: from the one that holds all layers down to those that hold one."""
    paths = [attention.name]
    for layer in (*attention.rows, attention.out):
        steps = layer.split(".")
        inner = [".".join(steps[:depth]) for depth in range(len(steps))]
        paths += [path for path in inner if path.startswith(f"{attention.name}.")]
    return list(dict.fromkeys(paths))
