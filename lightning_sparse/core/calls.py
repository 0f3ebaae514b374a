"""Calls of a network: arguments of any structure, and the tensors in them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_sparse.core.networks import callee

__all__ = ["Call", "exchange", "fit_to", "join", "leaves"]


@dataclass(frozen=True)
class Call:
    """A call of a network.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        network: name of the submodule that is called; None is the model itself, or the only network of a LightningModule
            without its own forward pass.

    Example:
        >>> call = Call.of({"x": torch.ones(4, 2), "t": 3})
        >>> call.samples, call.first(2).kwargs["x"].shape
        (4, torch.Size([2, 2]))
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    network: str | None = None

    @classmethod
    def of(cls, inputs: Any, network: str | None = None) -> Call:
        """Inputs as in Lightning's `example_input_array`: a tuple holds positional, a dict holds keyword arguments."""
        if isinstance(inputs, cls):
            return inputs if network is None else replace(inputs, network=network)
        if isinstance(inputs, tuple):
            return cls(inputs, {}, network)
        if isinstance(inputs, Mapping):
            return cls((), dict(inputs), network)
        return cls((inputs,), {}, network)

    def map(self, apply: Callable[[Tensor], Any], other: Callable[[Any], Any] = lambda value: value) -> Call:
        """The same call with a function applied to every tensor, and another to everything else that is no container."""
        args, kwargs = (exchange(part, apply, other) for part in (self.args, dict(self.kwargs)))
        return replace(self, args=args, kwargs=kwargs)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors in the call."""
        return list(leaves((self.args, self.kwargs)))

    @property
    def samples(self) -> int:
        """The length of the first tensor; 1 if there is none."""
        return next((len(tensor) for tensor in self.tensors if tensor.ndim), 1)

    def is_batch(self, tensor: Tensor) -> bool:
        """Whether a tensor of this call has one row per sample."""
        return bool(tensor.ndim) and len(tensor) == self.samples

    def first(self, samples: int) -> Call:
        """The first samples; all of them if samples are not rows of tensors but items of a list."""
        if _holds_lists((self.args, self.kwargs)):
            return self
        return self.map(lambda tensor: tensor[:samples] if self.is_batch(tensor) else tensor)

    def at_least_two(self) -> Call:
        """The same, doubled if there is only one sample: tracers treat size one as a constant."""
        if self.samples > 1:
            return self
        return self.map(lambda tensor: torch.cat([tensor, tensor]) if self.is_batch(tensor) else tensor)

    def fit(self, model: nn.Module) -> Call:
        """The same on the device of a model, and in its dtype unless tensors are integers."""
        return self.map(lambda tensor: fit_to(model, tensor))

    def bind(self, called: nn.Module) -> dict[str, Any]:
        """The arguments by their names in the signature of the called module."""
        return inspect.signature(called.forward).bind(*self.args, **self.kwargs).arguments

    def __call__(self, model: nn.Module) -> Any:
        """Call the network of a model."""
        called = callee(model, self.network)[1]
        fitted = self.fit(called)
        return called(*fitted.args, **fitted.kwargs)


def join(calls: Sequence[Call]) -> Call:
    """Join several calls of the same structure into one with all their samples."""
    columns = iter(list(zip(*(call.tensors for call in calls), strict=True)))

    def all_of(tensor: Tensor) -> Tensor:
        column = next(columns)
        return torch.cat(column) if calls[0].is_batch(tensor) else tensor

    return calls[0].map(all_of)


def exchange(value: Any, apply: Callable[[Tensor], Any], other: Callable[[Any], Any] = lambda value: value) -> Any:
    """Apply a function to every tensor of a structure: lists, tuples, mappings and dataclasses of any kind.

    Example:
        >>> exchange({"x": (torch.ones(2), "text")}, lambda tensor: tensor + 1)
        {'x': (tensor([2., 2.]), 'text')}
    """
    if isinstance(value, Tensor):
        return apply(value)
    if isinstance(value, Mapping):
        items = {key: exchange(item, apply, other) for key, item in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return items
        made: Any = copy.copy(value)  # custom classes may have further attributes
        for key, item in items.items():
            made[key] = item
        return made
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(exchange(item, apply, other) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(exchange(item, apply, other) for item in value)
    if _is_record(value):
        made = copy.copy(value)
        for part in dataclasses.fields(value):
            object.__setattr__(made, part.name, exchange(getattr(value, part.name), apply, other))
        return made
    return other(value)


def leaves(value: Any) -> Iterator[Tensor]:
    """All tensors in a structure that `exchange` handles, in order.

    Example:
        >>> [tensor.item() for tensor in leaves({"a": torch.tensor(1), "b": [None, (torch.tensor(2),)]})]
        [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    elif _is_record(value):
        for part in dataclasses.fields(value):
            yield from leaves(getattr(value, part.name))


def fit_to(model: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs on the device of a model, and in its dtype unless they are integers."""
    parameter = next(model.parameters(), None)
    if parameter is None:
        return inputs
    return inputs.to(parameter.device, parameter.dtype if inputs.is_floating_point() else None)


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _holds_lists(value: Any) -> bool:
    """Whether samples are listed one by one, as for detectors."""
    if isinstance(value, Mapping):
        return any(map(_holds_lists, value.values()))
    if isinstance(value, list):
        return any(isinstance(item, Tensor | Mapping) for item in value) or any(map(_holds_lists, value))
    return isinstance(value, tuple) and any(map(_holds_lists, value))
