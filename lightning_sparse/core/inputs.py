"""What layers multiply their weights with: inputs as rows of a matrix, and weights as matrices that fit them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse.core.layers import kind_of
from lightning_sparse.core.linear import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS
from lightning_sparse.core.target import Target

__all__ = ["InputTap", "as_matrix", "from_matrix", "input_rows", "shows_inputs"]


def shows_inputs(layer: nn.Module, parameter: str = "weight") -> bool:
    """Whether a call of a layer shows what one of its weights is multiplied with: of linear layers and convolutions.

    Not of attention, recurrent layers and fused experts, which multiply several matrices out of sight.
    """
    kind = kind_of(layer, parameter)
    return kind is not None and kind.reads_input and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)


def as_matrix(target: Target, tensor: Tensor) -> Tensor:
    """A tensor of a weight's shape as (groups, outputs of a group, columns); columns count kernel positions, then inputs.

    So m consecutive columns are m inputs at one kernel position, as `n:m` has them.

    Example:
        >>> layer = nn.Conv2d(4, 6, 3, groups=2)
        >>> as_matrix(Target.of("weight", layer.weight, layer), layer.weight).shape
        torch.Size([2, 3, 18])
    """
    return _split(tensor, target).permute(_order(target)).flatten(2)


def from_matrix(target: Target, matrix: Tensor) -> Tensor:
    """What `as_matrix` was given."""
    shape = _split(target.weight, target).shape
    order = _order(target)
    back = [order.index(dim) for dim in range(len(order))]
    return matrix.reshape([shape[dim] for dim in order]).permute(back).flatten(0, 1)


def _split(tensor: Tensor, target: Target) -> Tensor:
    return tensor.reshape(target.groups, -1, *tensor.shape[1:])


def _order(target: Target) -> list[int]:
    """Groups, outputs, kernel, inputs; where dimension 0 has been split into groups and the rest."""
    kernel = [dim for dim in range(target.weight.ndim) if dim not in (target.output_dim, target.input_dim)]
    return [0, *(dim + 1 for dim in (target.output_dim, *kernel, target.input_dim))]


def input_rows(layer: Any, inputs: Tensor) -> Tensor:
    """The inputs of a layer as (groups, rows, columns), so that rows times the transposed matrix are its outputs.

    A linear layer has a row for each vector, whatever the leading dimensions; a convolution has one for each place of its
    output, unfolded.

    Args:
        layer: of which `shows_inputs` is true.
        inputs: of one call.

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
    """Zeros before and behind, from the last dimension to the first."""
    amounts: list[int] = []
    for dim in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[dim] * (layer.kernel_size[dim] - 1)
            amounts += [total // 2, total - total // 2]
        else:
            amounts += [layer.padding[dim]] * 2
    return amounts


def _spaced(layer: Any, x: Tensor) -> Tensor:
    """The input of the convolution that a transposed one is: with zeros in between and around."""
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
    """Shows the inputs of the layers that hold some weights, as rows, while it is open.

    Looks at the modules it was made for alone: copies of the model carry its hooks along, and are not seen.

    Args:
        module: that holds the weights.
        names: of the weights; a weight that several layers share is seen in each of them.
        see: is told the name of a weight, the layer, and its input.
        training: whether only calls in training mode and with gradients count.

    Example:
        >>> net, seen = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), []
        >>> tap = InputTap(net, ["1.weight"], lambda name, layer, x: seen.append((name, tuple(x.shape))))
        >>> _ = net(torch.ones(5, 2))
        >>> seen
        [('1.weight', (5, 3))]
        >>> tap.remove()
    """

    def __init__(
        self,
        module: nn.Module,
        names: Sequence[str],
        see: Callable[[str, nn.Module, Tensor], None],
        training: bool = False,
    ) -> None:
        self.open, self.training = True, training
        self._see = see
        parameters = dict(module.named_parameters())
        wanted = {id(parameters[name]): name for name in names}
        self._layers = [
            (layer, wanted[id(parameter)])
            for layer in module.modules()
            for leaf, parameter in layer.named_parameters(recurse=False)
            if id(parameter) in wanted and shows_inputs(layer, leaf)
        ]
        self._handles = [
            layer.register_forward_pre_hook(self._hook(index), with_kwargs=True)
            for index, (layer, _) in enumerate(self._layers)
        ]

    def remove(self) -> None:
        """Take the hooks off the model; safe to call again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._layers = []

    def _hook(self, index: int) -> Callable[[nn.Module, Sequence[Any], Mapping[str, Any]], None]:
        # A function, not a method: a copy of the model then shares it, and does not copy the tap.
        def look(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
            if not self.open or self._layers[index][0] is not module:
                return
            if self.training and not (module.training and torch.is_grad_enabled()):
                return
            inputs = args[0] if args else next(iter(kwargs.values()))
            self._see(self._layers[index][1], module, inputs.detach())

        return look
