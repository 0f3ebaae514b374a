"""State that a method declares in one line; saving, loading and device placement follow from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, Protocol, TypeVar, overload, runtime_checkable

import torch
from torch import Tensor, distributed

from lightning_sparse.core.layout import Layout, total_over_ranks
from lightning_sparse.functional import pack, unpack

__all__ = ["Layouts", "Memory", "Remembered"]

T = TypeVar("T")
Layouts = Mapping[str, Mapping[str, Layout]]
"""By the kind of content (see `Remembered`), then by name of the weight."""


@runtime_checkable
class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Remembered(Generic[T]):
    """An attribute that is saved in every checkpoint and is on the right device after loading.

    Holds numbers, strings, tensors, lists and dictionaries of them, or anything with `state_dict`,
    `load_state_dict` and `to`. Tensors in a dictionary keyed by weight names follow their weights.

    Args:
        create: returns the initial value. Without it, the constructor of the class sets the value, and `reset` must restore
            it for a fresh start.
        averaged: for tensors that differ between ranks; a checkpoint holds their mean.
        over: with sharded weights, what tensors keyed by weight names hold: `entries` (a number per entry), `outputs` (a
            number per output, and size 1 in all other dimensions), or `sums` (added up over ranks). Checkpoints hold whole
            tensors. None: every rank holds the same values.

    Example:
        >>> class Counter(Memory):
        ...     steps = Remembered(int)
        >>> counter, other = Counter(), Counter()
        >>> counter.steps += 2
        >>> other.recall(counter.memorize())
        >>> other.steps
        2
    """

    def __init__(
        self,
        create: Callable[[], T] | None = None,
        *,
        averaged: bool = False,
        over: Literal["entries", "outputs", "sums"] | None = None,
    ) -> None:
        self.create, self.averaged, self.over = create, averaged, over

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Remembered[T]: ...

    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> T | Remembered[T]:
        if instance is None:
            return self
        try:  # several times per step
            return instance.__dict__["_remembered"][self.name]  # type: ignore[no-any-return]
        except KeyError:
            pass
        if self.create is None:
            raise AttributeError(f"{type(instance).__name__} has not set '{self.name}' in its constructor.")
        value = instance.__dict__.setdefault("_remembered", {})[self.name] = self.create()
        return value

    def __set__(self, instance: object, value: T) -> None:
        instance.__dict__.setdefault("_remembered", {})[self.name] = value


class Memory:
    """A class with `Remembered` attributes."""

    @classmethod
    def remembered(cls) -> list[str]:
        """The names of all declared attributes, base classes first."""
        names: dict[str, None] = {}
        for base in reversed(cls.__mro__):
            names.update({name: None for name, value in vars(base).items() if isinstance(value, Remembered)})
        return list(names)

    def forget(self) -> None:
        """Reset to the values of a fresh start."""
        values = self.__dict__.setdefault("_remembered", {})
        for name in self.remembered():
            if getattr(type(self), name).create is None:
                values[name].reset()
            else:
                values.pop(name, None)

    @classmethod
    def averaged(cls) -> list[str]:
        """The names of attributes whose values differ between ranks."""
        return [name for name in cls.remembered() if getattr(cls, name).averaged]

    def memorize(self, layouts: Layouts | None = None) -> dict[str, Any]:
        """Everything as numbers, strings, lists, dictionaries and CPU tensors; boolean tensors at one bit each.

        Args:
            layouts: for sharded weights; then all ranks must call it, and the first one gets whole tensors.
        """
        return {name: _encode(_gather(getattr(self, name), layouts, self._over(name))) for name in self.remembered()}

    @classmethod
    def _over(cls, name: str) -> str | None:
        over: str | None = getattr(cls, name).over
        return over

    def recall(self, saved: Mapping[str, Any]) -> None:
        """Restore what `memorize` returned, completely or not at all.

        Raises:
            ValueError: if something declared is missing.
        """
        missing = [name for name in self.remembered() if name not in saved]
        if missing:
            raise ValueError(f"The saved state of {type(self).__name__} lacks {missing}; it was written by another version.")
        self.forget()
        for name in self.remembered():
            current = getattr(self, name)
            if isinstance(current, _Stateful):
                current.load_state_dict(saved[name])
            else:
                setattr(self, name, _decode(saved[name]))

    def place(self, weights: Mapping[str, Tensor], device: torch.device, layouts: Layouts | None = None) -> None:
        """Move tensors to the device of the weight they are named after, or to `device`.

        Args:
            weights: by name.
            device: device of everything else.
            layouts: for sharded weights; whole tensors are reduced to shards.
        """
        for name in self.remembered():
            value = getattr(self, name)
            if isinstance(value, _Stateful):
                value.to(weights)  # type: ignore[attr-defined]
            else:
                setattr(self, name, _place(_cut(value, layouts, self._over(name)), weights, device))


def _gather(value: Any, layouts: Layouts | None, over: str | None) -> Any:
    """Whole tensors from the shards of all ranks."""
    if not layouts or over is None:
        return value
    if over == "sums":
        return {name: total_over_ranks(tensor) for name, tensor in value.items()}
    return {
        name: tensor if tensor is None or tensor.ndim == 0 else layouts[over][name].gather(tensor)
        for name, tensor in value.items()
    }


def _cut(value: Any, layouts: Layouts | None, over: str | None) -> Any:
    """This rank's shards of whole tensors."""
    if not layouts or over is None:
        return value
    if over == "sums":  # one rank continues with the sum, and the others start with zero
        first = distributed.get_rank() == 0
        return {name: tensor if first else torch.zeros_like(tensor) for name, tensor in value.items()}
    return {
        name: tensor if tensor is None or tensor.ndim == 0 else layouts[over][name].local(tensor).clone()
        for name, tensor in value.items()
    }


def _encode(value: Any) -> Any:
    if isinstance(value, _Stateful):
        return value.state_dict()
    if isinstance(value, Tensor):
        if value.dtype == torch.bool:
            return {"packed": pack(value).cpu(), "shape": list(value.shape)}
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(item) for item in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"packed", "shape"}:
            return unpack(value["packed"], tuple(value["shape"]))
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value


def _place(value: Any, weights: Mapping[str, Tensor], device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _place(item, weights, weights[key].device if key in weights else device) for key, item in value.items()}
    if isinstance(value, list):
        return [_place(item, weights, device) for item in value]
    return value
