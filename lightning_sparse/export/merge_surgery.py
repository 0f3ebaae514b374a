"""The graph of a traced network, rewritten one merge at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from lightning_sparse.core import BATCH_NORMS, Link, Network, analyze, convolution_of, is_linear, padding_of
from lightning_sparse.export.merge_judge import Judge
from lightning_sparse.export.merge_report import LayerVerdict, count_parameters
from lightning_sparse.functional import (
    Convolution,
    add_convolutions,
    fold_batch_norm,
    merge_convolutions,
    merge_linear,
    regroup,
)

__all__ = ["Surgery"]


class Surgery:
    """Rewrites the graph of one network, one merge at a time."""

    def __init__(self, network: Network, judge: Judge) -> None:
        self.path, self.original, self.judge = network.path, network.module, judge
        self.graph_module = fx.GraphModule(network.module, network.graph, type(network.module).__name__)
        self.dtypes: dict[nn.Module, torch.dtype] = {}

    def operate(self) -> nn.Module:
        """Merge until nothing changes."""
        changed = False
        while self._merge_one() or self._fold_one_shortcut():
            changed = True
        self._explain()
        if not changed:
            return self.original
        for layer, dtype in self.dtypes.items():
            layer.to(dtype)
        for node in self.graph_module.graph.nodes:
            node.type = None  # annotations may be strings, which some torch versions cannot pickle
        self.graph_module.graph.lint()
        self.graph_module.recompile()
        self.graph_module.delete_all_unused_submodules()
        return (_as_sequential(self.graph_module) or self.graph_module).eval()

    def _links(self) -> tuple[list[Link], dict[str, str]]:
        # The layers' full names, with parameters found by their names in the graph.
        network = Network("", self.graph_module, self.graph_module.graph)
        found = analyze(network, self.judge.input_range, self.judge.shared)
        return found.links, found.obstacles

    def _full(self, name: str) -> str:
        return f"{self.path}.{name}".lstrip(".")

    def _merge_one(self) -> bool:
        for link in self._links()[0]:
            verdict = self._verdict(link)
            if verdict.level not in ("certified", "near"):
                continue
            node = link.nodes[-1]
            successor = self.graph_module.get_submodule(str(node.target))
            merged = self._product(link, successor)
            if self._grows(link, successor, merged):
                continue
            target = self._put(node, merged, successor)
            node.args = (link.nodes[0].args[0],)
            node.kwargs = {}
            for between in reversed(link.nodes[:-1]):
                self.graph_module.graph.erase_node(between)
            into = f"merged into '{self._full(target)}'"
            note = f"{verdict.note}: {into}" if verdict.note else into
            self.judge.verdicts.append(replace(verdict, merged=True, note=note))
            return True
        return False

    def _verdict(self, link: Link) -> LayerVerdict:
        verdict = self.judge.verdict(link)
        name = self._full(link.name)
        return replace(verdict, layer=name, positive=self.judge.positive.get(name))

    def _product(self, link: Link, successor: nn.Module) -> nn.Module:
        first = _folded(link.layer, link.norm)
        second = convolution_of(successor)
        if isinstance(successor, nn.Linear):
            weight, bias = merge_linear((second.weight, second.bias), (first.weight, first.bias))
            return self._make(replace(second, weight=weight, bias=bias), successor)
        padded = link.layer if any(first.padding) else successor
        return self._make(merge_convolutions(second, first), successor, padded.padding_mode)  # type: ignore[arg-type]

    def _grows(self, link: Link, successor: nn.Module, merged: nn.Module) -> bool:
        gone = self.judge.size(link.layer, link.norm, successor)
        return not self.judge.allow_growth and count_parameters(merged) > gone

    def _make(self, what: Convolution, like: nn.Module, padding_mode: str = "zeros") -> nn.Module:
        """A layer in float64; it is rounded once, at the end."""
        made: Any
        options: dict[str, Any] = {"bias": what.bias is not None, "device": "meta"}
        if isinstance(like, nn.Linear):
            made = nn.Linear(what.weight.shape[1], what.weight.shape[0], **options)
        else:
            options |= {"stride": what.stride, "padding": what.padding, "dilation": what.dilation, "groups": what.groups}
            inputs, outputs = what.weight.shape[1] * what.groups, what.weight.shape[0]
            options["padding_mode"] = padding_mode
            made = type(like)(inputs, outputs, what.kernel, **options)
        made.weight = nn.Parameter(what.weight)
        made.bias = None if what.bias is None else nn.Parameter(what.bias)
        self.dtypes[made] = self.dtypes.get(like, like.weight.dtype)  # type: ignore[arg-type]
        return made  # type: ignore[no-any-return]

    def _put(self, node: fx.Node, layer: nn.Module, old: nn.Module) -> str:
        """Let a node call another layer: under the old name, unless other nodes need the old layer under it."""
        target = str(node.target)
        modules = dict(self.graph_module.named_modules(remove_duplicate=False))
        callers = [n for n in self.graph_module.graph.nodes if n.op == "call_module" and modules[str(n.target)] is old]
        if len(callers) > 1:
            stem, number = target, 1
            while f"{target}_merged" in modules:
                target, number = f"{stem}_{number}", number + 1
            target = f"{target}_merged"
        self.graph_module.add_submodule(target, layer)
        node.target = target
        return target

    # ---- shortcuts ---------------------------------------------------------------------------------------------------

    def _fold_one_shortcut(self) -> bool:
        """Replace a layer and a shortcut with the same input, added together, by one layer."""
        for node in self.graph_module.graph.nodes:
            operands = [arg for arg in node.args if isinstance(arg, fx.Node)]
            name = getattr(node.target, "__name__", str(node.target)).strip("_")
            if name not in ("add", "iadd") or len(operands) != 2 or len(node.args) != 2 or node.kwargs:
                continue
            for one, other in (operands, operands[::-1]):
                if self._fold_shortcut(node, one, other):
                    return True
        return False

    def _fold_shortcut(self, node: fx.Node, one: fx.Node, other: fx.Node) -> bool:
        branch = self._branch(one, node)
        if branch is None:
            return False
        nodes, layer, large = branch
        source = nodes[0].args[0]
        second = self._branch(other, node)
        if other is source:
            small = _identity(large)
        elif second is not None and second[0][0].args[0] is source:
            small = second[2]
            if getattr(second[1], "padding_mode", "zeros") != getattr(layer, "padding_mode", "zeros") and any(small.padding):
                return False
        else:
            return False
        whole = None if small is None else add_convolutions(large, small)
        if whole is None:
            return False
        target = self._put(nodes[0], self._make(whole, layer, getattr(layer, "padding_mode", "zeros")), layer)
        node.replace_all_uses_with(nodes[0])
        for gone in [
            node,
            *reversed(nodes[1:]),
            *(reversed(second[0]) if second is not None and other is not source else ()),
        ]:
            self.graph_module.graph.erase_node(gone)
        self.judge.verdicts.append(
            LayerVerdict(self._full(target), "certified", False, note="became one layer with the shortcut beside it")
        )
        return True

    def _branch(self, node: fx.Node, end: fx.Node) -> tuple[list[fx.Node], nn.Module, Convolution] | None:
        """A layer, possibly followed by batch normalization, that only `end` uses."""
        modules = dict(self.graph_module.named_modules(remove_duplicate=False))

        def module_of(candidate: Any) -> nn.Module | None:
            ours = isinstance(candidate, fx.Node) and candidate.op == "call_module" and len(candidate.users) == 1
            return modules[str(candidate.target)] if ours else None

        part, norm, nodes = module_of(node), None, [node]
        if isinstance(part, BATCH_NORMS) and part.running_mean is not None:
            norm, part = part, module_of(node.args[0])
            nodes.insert(0, node.args[0])  # type: ignore[arg-type]
        if part is None or not is_linear(part) or any(id(p) in self.judge.shared for p in part.parameters()):
            return None
        callers = [n for n in self.graph_module.graph.nodes if n.op == "call_module" and modules[str(n.target)] is part]
        padding = (0,) if isinstance(part, nn.Linear) else padding_of(part)
        return None if len(callers) > 1 or padding is None else (nodes, part, _folded(part, norm))

    def _explain(self) -> None:
        """Record for every remaining layer why it was not merged."""
        links, obstacles = self._links()
        for link in links:
            verdict = self._verdict(link)
            if verdict.level in ("certified", "near"):
                successor = self.graph_module.get_submodule(link.successor)
                product = self._product(link, successor)
                sizes = f"{self.judge.size(link.layer, link.norm, successor):,} -> {count_parameters(product):,} parameters"
                verdict = replace(verdict, note=f"kept apart: the product is larger ({sizes}); allow_growth=True merges it")
            self.judge.verdicts.append(verdict)
        for name, reason in obstacles.items():
            self.judge.verdicts.append(
                LayerVerdict(
                    self._full(name), "active", False, positive=self.judge.positive.get(self._full(name)), note=reason
                )
            )


def _folded(layer: nn.Module, norm: Any) -> Convolution:
    plain = convolution_of(layer)
    if norm is None:
        return plain
    numbers = [None if t is None else t.detach().double() for t in (norm.weight, norm.bias)]
    weight, bias = fold_batch_norm(
        plain.weight, plain.bias, norm.running_mean.double(), norm.running_var.double(), norm.eps, *numbers
    )
    return replace(plain, weight=weight, bias=bias)


def _identity(like: Convolution) -> Convolution | None:
    """The kernel that returns its input, with the groups of another."""
    outputs, inputs = like.weight.shape[0], like.weight.shape[1] * like.groups
    if outputs != inputs:
        return None
    dims = len(like.stride)
    single = like.weight.new_ones(outputs, 1, *[1] * dims)
    one, zero = (1,) * dims, (0,) * dims
    return Convolution(regroup(single, outputs, like.groups), None, one, zero, one, like.groups)


def _as_sequential(module: fx.GraphModule) -> nn.Sequential | None:
    """The same as a Sequential, if modules simply follow each other."""
    nodes = list(module.graph.nodes)
    inner = nodes[1:-1]
    straight = all(n.op == "call_module" and n.args == (p,) and not n.kwargs for p, n in zip(nodes, inner, strict=False))
    if not straight or nodes[0].op != "placeholder" or nodes[-1].args != (nodes[-2],):
        return None
    return nn.Sequential(*(module.get_submodule(str(n.target)) for n in inner))
