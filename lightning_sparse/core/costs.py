"""The cost of a forward pass, by the weight that takes part in each product.

This is the only file of `core` that imports private modules of torch: the mode that sees every operation, and the traversal
of nested outputs, have no public names in the supported versions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

from lightning_sparse.core.calls import leaves
from lightning_sparse.functional import layer_density

__all__ = ["BETWEEN_ACTIVATIONS", "between_activations_of", "count_macs", "effective_macs", "tensors_in"]

BETWEEN_ACTIVATIONS = "(between activations)"
"""The name for products without a weight, such as attention scores."""

COPIES = ("aten::_to_copy", "aten::clone")


def count_macs(
    module: nn.Module,
    run: Callable[[], Any],
    samples: int = 1,
    set_mode: Callable[[nn.Module], Any] = nn.Module.eval,
    parts: Collection[str] = (),
) -> dict[str, int]:
    """Count the multiply-accumulates of a forward pass per sample, by the name of the weight that takes part in them.

    Every matrix product and convolution counts, wherever it is in the code, at the size of its operands: zeros count as
    numbers, and padding as input. Norms, activations, poolings and embeddings do not count. A weight that is used twice
    counts twice.

    Args:
        module: the module that holds the weights.
        run: makes one forward pass of it, without gradients.
        samples: number of samples in that pass.
        set_mode: puts the module into evaluation mode, or into another.
        parts: modules whose products between activations are counted separately, see `between_activations_of`.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
        >>> count_macs(net, lambda: net(torch.ones(5, 1, 4, 4)), samples=5)
        {'0.weight': 144, '2.weight': 32}
    """
    counter = _Counter(module)
    handles = [handle for part in parts for handle in counter.attend(part, module.get_submodule(part))]
    try:
        with _plainly(module, set_mode), counter:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: round(macs / samples) for name, macs in counter.macs.items()}


def between_activations_of(part: str) -> str:
    """Return the name for the products between activations of a module."""
    return f"{BETWEEN_ACTIVATIONS} of {part}"


def effective_macs(macs: Mapping[str, int], weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Return what is left of `count_macs` if multiplications by zero are skipped.

    Args:
        macs: multiply-accumulates of the dense model.
        weights: masks, or weights whose exact zeros count as removed; those not given are dense.

    Example:
        >>> effective_macs({"fc": 100, "head": 10}, {"fc": torch.tensor([True, False, False, False])})
        {'fc': 25, 'head': 10}
    """
    density = layer_density({name: weights[name] for name in macs if name in weights})
    return {name: round(count * density.get(name, 1.0)) for name, count in macs.items()}


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested lists, tuples, mappings, dataclasses and any other type that torch can traverse.

    Example:
        >>> tensors_in({"logits": torch.ones(2), "cache": [None, (torch.zeros(1),)]})
        [tensor([1., 1.]), tensor([0.])]
    """
    return [tensor for leaf in tree_leaves(value) for tensor in leaves(leaf)]


class _Counter(TorchDispatchMode):
    """Counts products, and finds the weight among their operands by its storage."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs: dict[str, int] = {}
        self.names = {_address(weight): name for name, weight in module.named_parameters() if weight.ndim >= 2}
        self.copies: list[Tensor] = []  # kept alive, so that no other tensor gets their memory
        self.between = BETWEEN_ACTIVATIONS

    def attend(self, name: str, part: nn.Module) -> list[RemovableHandle]:
        """Count the products without a weight in a module separately."""

        def within(*_: Any) -> None:
            self.between = between_activations_of(name)

        def outside(*_: Any) -> None:
            self.between = BETWEEN_ACTIVATIONS

        return [part.register_forward_pre_hook(within), part.register_forward_hook(outside)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if func.name() in COPIES and (name := self.names.get(_address(args[0]))):
            self.names[_address(result)] = name
            self.copies.append(result)
        elif packet in flop_registry:
            operands = [tensor for tensor in tensors_in((args, kwargs)) if tensor.ndim >= 2]
            found = [name for operand in operands if (name := self.names.get(_address(operand)))]
            name = found[0] if found else self.between
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=result)
            self.macs[name] = self.macs.get(name, 0) + flops // 2
        return result


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _plainly(module: nn.Module, set_mode: Callable[[nn.Module], Any]) -> Iterator[None]:
    """Set the mode, and run only operations that can be counted, neither compiled nor fused; restore both afterwards."""
    training = [(part, part.training) for part in module.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    set_mode(module)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "TF32 acceleration")  # oneDNN warns when its flags are restored
            for backend in (torch.backends.mkldnn, torch.backends.cudnn):  # they run a recurrent layer as one kernel
                stack.enter_context(backend.flags(enabled=False))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for part, was_training in training:
            part.training = was_training
