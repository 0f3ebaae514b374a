"""The inputs that layers multiply by their weights, as rows of a matrix, and the matching matrix form of weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from lightning_sparse.core.layers import kind_of
from lightning_sparse.core.linear import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from lightning_sparse.core.target import Target

__all__ = ["InputTap", "Reading", "as_matrix", "from_matrix", "input_rows", "shows_inputs"]


def shows_inputs(layer: nn.Module, parameter: str = "weight") -> bool:
    """Whether a call of a layer shows the input of one of its weights.

    This holds for linear layers and convolutions, `nn.MultiheadAttention`, recurrent cells, and the input weights of
    `nn.RNN`, `nn.LSTM` and `nn.GRU`. Their other weights, and fused experts, multiply internally.
    """
    kind = kind_of(layer, parameter)
    return kind is not None and (kind.reads_input or _argument(layer, parameter) is not None)


@dataclass(frozen=True)
class Reading:
    """The inputs of one of a layer's weights in one call.

    Args:
        layer: the layer that is called.
        tensors: one for all outputs, or one for each part of them that reads its own input.
    """

    layer: nn.Module
    tensors: tuple[Tensor, ...]

    @property
    def single(self) -> Tensor | None:
        """The one vector per row that all outputs read; None for patches, and if parts read different ones."""
        return self.tensors[0] if len(self.tensors) == 1 and not isinstance(self.layer, CONVOLUTIONS) else None

    def rows(self, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The groups of the weight's matrix, and their rows as `input_rows` gives them.

        Args:
            dtype: dtype of the rows; None is float32, or wider if the input is.
        """
        for index, tensor in enumerate(self.tensors):
            wide = torch.promote_types(tensor.dtype, torch.float32) if dtype is None else dtype
            yield self._part(index), input_rows(self.layer, tensor.to(wide))

    def squares(self) -> Iterator[tuple[slice, Tensor, int]]:
        """The groups, the sums of squares over their rows, (groups, columns), and the number of rows.

        Kernel positions of a convolution are separated after samples have been summed, which is cheaper by that factor.
        """
        for index, tensor in enumerate(self.tensors):
            squares = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square()
            samples = 1
            if isinstance(self.layer, CONVOLUTIONS) and squares.ndim == len(self.layer.kernel_size) + 2:
                samples, squares = len(squares), squares.sum(0, keepdim=True)
            rows = input_rows(self.layer, squares)
            yield self._part(index), rows.sum(1), rows.shape[1] * samples

    def _part(self, index: int) -> slice:
        return slice(None) if len(self.tensors) == 1 else slice(index, index + 1)


def as_matrix(target: Target, tensor: Tensor) -> Tensor:
    """A tensor of a weight's shape as (groups, outputs per group, columns); columns are kernel positions, then inputs.

    Groups are those of a convolution, or the query, key and value parts. So m consecutive columns are m inputs at one kernel
    position, as `n:m` needs.

    Example:
        >>> layer = nn.Conv2d(4, 6, 3, groups=2)
        >>> as_matrix(Target.of("weight", layer.weight, layer), layer.weight).shape
        torch.Size([2, 3, 18])
    """
    return _split(tensor, target).permute(_order(target)).flatten(2)


def from_matrix(target: Target, matrix: Tensor) -> Tensor:
    """The inverse of `as_matrix`."""
    shape = _split(target.weight, target).shape
    order = _order(target)
    back = [order.index(dim) for dim in range(len(order))]
    return matrix.reshape([shape[dim] for dim in order]).permute(back).flatten(0, 1)


def _split(tensor: Tensor, target: Target) -> Tensor:
    groups = target.groups * target.parts
    return tensor.reshape(groups, tensor.shape[0] // groups, *tensor.shape[1:])


def _order(target: Target) -> list[int]:
    """Groups, outputs, kernel, inputs; where dimension 0 has been split into groups and the rest."""
    kernel = [dim for dim in range(target.weight.ndim) if dim not in (target.output_dim, target.input_dim)]
    return [0, *(dim + 1 for dim in (target.output_dim, *kernel, target.input_dim))]


def input_rows(layer: Any, inputs: Tensor) -> Tensor:
    """The inputs of a layer as (groups, rows, columns), so that rows times the transposed matrix are its outputs.

    A linear layer has one row per vector, whatever the leading dimensions; a convolution has one per output position,
    unfolded.

    Args:
        layer: a layer for which `shows_inputs` is true.
        inputs: inputs of one call.

    Example:
        >>> layer, x = nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), torch.randn(5, 4, 8, 8)
        >>> matrix = as_matrix(Target.of("weight", layer.weight, layer), layer.weight)
        >>> outputs = input_rows(layer, x) @ matrix.transpose(1, 2)
        >>> torch.allclose(outputs.permute(1, 0, 2).reshape(5, 8, 8, 6).movedim(3, 1), layer(x), atol=1e-5)
        True
    """
    if not isinstance(layer, CONVOLUTIONS):
        return inputs.reshape(1, -1, inputs.shape[-1])
    dims = len(layer.kernel_size)
    x = inputs if inputs.ndim == dims + 2 else inputs.unsqueeze(0)
    steps: Sequence[int] = layer.stride
    if isinstance(layer, TRANSPOSED_CONVOLUTIONS):
        x, steps = _spaced(layer, x), (1,) * dims
    elif layer.padding != "valid":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, _padding(layer), mode)
    for dim in range(dims):
        reach = layer.dilation[dim] * (layer.kernel_size[dim] - 1) + 1
        x = x.unfold(2 + dim, reach, steps[dim])[..., :: layer.dilation[dim]]
    if isinstance(layer, TRANSPOSED_CONVOLUTIONS):
        x = x.flip([*range(2 + dims, 2 + 2 * dims)])
    x = x.reshape(len(x), layer.groups, -1, *x.shape[2:])
    order = [1, 0, *range(3, 3 + 2 * dims), 2]  # groups, samples, places, kernel, inputs
    return x.permute(order).flatten(1 + dims + 1).flatten(1, 1 + dims)


def _padding(layer: Any) -> list[int]:
    """Zeros before and after, from the last dimension to the first."""
    amounts: list[int] = []
    for dim in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[dim] * (layer.kernel_size[dim] - 1)
            amounts += [total // 2, total - total // 2]
        else:
            amounts += [layer.padding[dim]] * 2
    return amounts


def _spaced(layer: Any, x: Tensor) -> Tensor:
    """The input of the convolution that a transposed one amounts to: with zeros in between and around."""
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], layer.stride, strict=True)]
    spaced = x.new_zeros(*x.shape[:2], *sizes)
    places: tuple[Any, ...] = (..., *(slice(None, None, step) for step in layer.stride))
    spaced[places] = x
    amounts: list[int] = []
    for dim in reversed(range(len(layer.kernel_size))):
        around = layer.dilation[dim] * (layer.kernel_size[dim] - 1) - layer.padding[dim]
        amounts += [around, around + layer.output_padding[dim]]
    return F.pad(spaced, amounts)


class InputTap:
    """Reports the inputs of some weights whenever their layers are called while it is open.

    It watches only the modules it was made for: copies of the model carry its hooks along but are ignored.

    Args:
        module: the module that holds the weights.
        names: names of the weights; a weight that several layers share is reported for each of them.
        see: called with the name of a weight and its input.
        training: whether only calls in training mode with gradients count.

    Example:
        >>> net, seen = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), []
        >>> tap = InputTap(net, ["1.weight"], lambda name, reading: seen.append((name, tuple(reading.single.shape))))
        >>> _ = net(torch.ones(5, 2))
        >>> seen
        [('1.weight', (5, 3))]
        >>> tap.remove()
    """

    def __init__(
        self, module: nn.Module, names: Sequence[str], see: Callable[[str, Reading], None], training: bool = False
    ) -> None:
        self.open, self.training = True, training
        self._see = see
        self._layers: list[nn.Module] = []
        self._handles: list[Any] = []
        self._inside = ExitStack()
        parameters = dict(module.named_parameters())
        wanted = {id(parameters[name]): name for name in names}
        for layer in module.modules():
            for leaf, parameter in layer.named_parameters(recurse=False):
                if id(parameter) in wanted and shows_inputs(layer, leaf):
                    self._attach(layer, self._look(wanted[id(parameter)], leaf))
            if isinstance(layer, nn.MultiheadAttention) and (name := wanted.get(id(layer.out_proj.weight))) is not None:
                self._attach(layer, self._look_inside(name))
                leave = layer.register_forward_hook(lambda *_: self._inside.close(), always_call=True)
                self._handles.append(leave)

    def remove(self) -> None:
        """Remove the hooks from the model; safe to call again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._layers = []

    def _attach(self, layer: nn.Module, look: Callable[[nn.Module, Sequence[Any], Mapping[str, Any]], None]) -> None:
        index = len(self._layers)
        self._layers.append(layer)

        # A function, not a method, so that a copy of the model shares it and does not copy the tap.
        def hook(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            counts = not self.training or (module.training and torch.is_grad_enabled())
            if self.open and counts and index < len(self._layers) and self._layers[index] is module:
                look(module, args, kwargs)

        self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))

    def _look(self, name: str, leaf: str) -> Callable[[nn.Module, Sequence[Any], Mapping[str, Any]], None]:
        """Read the arguments of a call."""

        def look(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            if tensors := _read(module, leaf, args, kwargs):
                self._see(name, Reading(module, tuple(tensor.detach() for tensor in tensors)))

        return look

    def _look_inside(self, name: str) -> Callable[[nn.Module, Sequence[Any], Mapping[str, Any]], None]:
        """Read what attention passes to its last layer, which it does not call."""

        def look(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            self._inside.enter_context(_Attended(lambda x: self._see(name, Reading(module, (x.detach(),)))))

        return look


class _Attended(TorchFunctionMode):
    """Reports the input of the last projection in `F.multi_head_attention_forward`.

    It is called with the identity in place of that projection, which changes no number, and the projection is applied to the
    result.
    """

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.multi_head_attention_forward:
            return func(*args, **(kwargs or {}))
        given = inspect.signature(func).bind(*args, **(kwargs or {})).arguments
        weight, bias = given["out_proj_weight"], given["out_proj_bias"]
        unit = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        attended, shares = func(**{**given, "out_proj_weight": unit, "out_proj_bias": None})
        self._see(attended)
        return F.linear(attended, weight, bias), shares


def _argument(layer: nn.Module, parameter: str) -> tuple[str, ...] | None:
    """The names of the arguments of a call that a weight multiplies internally; None if they do not show it."""
    if isinstance(layer, nn.MultiheadAttention):
        known = type(layer).forward is nn.MultiheadAttention.forward
        return _OF_ATTENTION.get(parameter) if known else None
    if isinstance(layer, nn.RNNCellBase):
        return {"weight_ih": ("input",), "weight_hh": ("hx",)}.get(parameter)
    if isinstance(layer, nn.RNNBase):
        return ("input",) if parameter in ("weight_ih_l0", "weight_ih_l0_reverse") else None
    return None


_OF_ATTENTION = {
    "in_proj_weight": ("query", "key", "value"),
    "q_proj_weight": ("query",),
    "k_proj_weight": ("key",),
    "v_proj_weight": ("value",),
}


def _read(layer: nn.Module, parameter: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The inputs of a weight in a call; one tensor if all parts of the weight read the same, none if there is no input."""
    names = _argument(layer, parameter)
    if names is None:
        return (args[0] if args else next(iter(kwargs.values())),)
    given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    tensors = [_vectors(given[name]) for name in names if given.get(name) is not None]
    return tuple(tensors) if any(tensor is not tensors[0] for tensor in tensors) else tuple(tensors[:1])


def _vectors(given: Any) -> Tensor:
    """An input, or a hidden state without its cell state."""
    found: Tensor = given.data if isinstance(given, PackedSequence) else given[0] if isinstance(given, tuple) else given
    return found
