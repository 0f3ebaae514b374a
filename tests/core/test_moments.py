"""Memories of optimizers that are not plain floats: zero is written as it reads, or the optimizer is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_sparse import CKARegularization, MagnitudePruning, RandomSparsity, RigL
from lightning_sparse.core import check_moments, clear_moments
from lightning_sparse.testing import Toy, fit, loader, toy, trainer

SIGNED = torch.cat([-torch.arange(127, 0, -1) / 127, torch.arange(129) / 128])
"""Values of codes, of which the 127th is zero."""
UNSIGNED = torch.arange(256) / 255


class Stored(Optimizer):
    """Does not move; keeps one memory as it is given."""

    def __init__(self, parameters: Any, **memory: Any) -> None:
        super().__init__(parameters, {})
        self.memory = memory

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {name: make(parameter) if callable(make) else make for name, make in self.memory.items()}


def codes(parameter: Tensor) -> Tensor:
    return torch.full_like(parameter, 200, dtype=torch.uint8)


def stored(weight: nn.Parameter, **memory: Any) -> Stored:
    optimizer = Stored([weight], **memory)
    optimizer.step()
    return optimizer


WHERE = torch.tensor([[True, False, True], [False, False, True]])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_codes_that_stand_for_zero_are_written(device: str) -> None:
    """As bitsandbytes keeps them: signed, unsigned, and two averages in one."""
    weight, where = nn.Parameter(torch.ones(2, 3, device=device)), WHERE.to(device)
    twice = {"state1": lambda p: torch.stack([codes(p), codes(p)])}
    for first in ({"state1": codes}, twice):
        optimizer = stored(weight, **first, state2=codes, qmap1=SIGNED, qmap2=UNSIGNED, absmax1=torch.ones(1), step=3)
        clear_moments(optimizer, weight, where)
        state = optimizer.state[weight]
        for memory, qmap, kept in ((state["state1"], SIGNED, 73 / 128), (state["state2"], UNSIGNED, 200 / 255)):
            for values in qmap[memory.cpu().long()].reshape(-1, 2, 3):
                assert values[WHERE].tolist() == [0, 0, 0]
                assert values[~WHERE].tolist() == pytest.approx([kept] * 3)
        assert state["step"] == 3
        assert state["absmax1"] == 1


def test_its_small_parameters_are_plain_floats() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = stored(weight, state1=lambda p: torch.ones(2, 2, 3), state2=torch.ones_like)
    clear_moments(optimizer, weight, WHERE)
    assert (optimizer.state[weight]["state1"] == 0).equal(torch.stack([WHERE, WHERE]))
    assert (optimizer.state[weight]["state2"] == 0).equal(WHERE)


class Packed(Tensor):
    """Looks like a float, and holds a code per entry, as the 8-bit states of torchao do."""

    codes: Tensor
    qmap: Tensor

    @staticmethod
    def of(codes: Tensor, qmap: Tensor | None) -> Packed:
        made = torch.zeros(2, 3).as_subclass(Packed)
        made.codes = codes
        if qmap is not None:
            made.qmap = qmap
        return made


def test_codes_inside_a_tensor() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    memory = Packed.of(torch.full((2, 3), 200, dtype=torch.uint8), SIGNED)
    clear_moments(stored(weight, exp_avg=memory), weight, WHERE)
    assert memory.codes.tolist() == [[127, 200, 127], [200, 200, 127]]


FLOAT8 = torch.full((2, 3), 0.5).to(torch.float8_e4m3fn)
UNKNOWN: list[tuple[dict[str, Any], str]] = [
    ({"exp_avg": codes}, "'exp_avg' as torch.uint8"),
    ({"state1": codes}, "'state1' as torch.uint8"),
    ({"state1": codes, "qmap1": UNSIGNED[1:]}, "'state1' as torch.uint8"),
    ({"state1": codes, "qmap1": UNSIGNED + 1e-9}, "'state1' as torch.uint8"),  # nearly zero is not zero
    ({"state1": lambda p: codes(p).char(), "qmap1": SIGNED}, "'state1' as torch.int8"),
    ({"seen": lambda p: p > 0}, "'seen' as torch.bool"),
    ({"exp_avg": FLOAT8}, "'exp_avg' as torch.float8_e4m3fn"),
    ({"exp_avg": Packed.of(FLOAT8, None)}, "'exp_avg' as Packed of torch.float32"),
    ({"exp_avg": Packed.of(torch.zeros(3, dtype=torch.uint8), SIGNED[:16])}, "'exp_avg' as Packed of torch.float32"),
]


@pytest.mark.parametrize(("memory", "named"), UNKNOWN, ids=range(len(UNKNOWN)))
def test_where_zero_is_not_known_nothing_is_cleared(memory: dict[str, Any], named: str) -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = stored(weight, momentum=torch.ones_like, **memory)
    for refuse in (lambda: check_moments(optimizer, [weight]), lambda: clear_moments(optimizer, weight, WHERE)):
        with pytest.raises(ValueError, match=rf"^Stored keeps {named}, in which .*; use a 32-bit optimizer such as"):
            refuse()
    assert optimizer.state[weight]["momentum"].all()


def test_codes_in_another_order_than_the_weight_are_refused() -> None:
    weight = nn.Parameter(torch.ones(4, 3, 2, 2).to(memory_format=torch.channels_last))
    optimizer = stored(weight, state1=codes, qmap1=SIGNED)
    check_moments(optimizer, [weight])
    weight.data = weight.data.contiguous()
    with pytest.raises(ValueError, match=r"Stored keeps 'state1' in a memory layout other than its weight's"):
        check_moments(optimizer, [weight])


def test_what_is_shared_by_a_tensor_is_nobodys() -> None:
    """Counters and factored moments are neither cleared nor refused."""
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = stored(weight, step=torch.tensor(3), rows=torch.ones(2, 1), columns=torch.ones(1, 3), note="text")
    check_moments(optimizer, [weight, nn.Parameter(torch.ones(1))])
    clear_moments(optimizer, weight, WHERE)
    assert optimizer.state[weight]["rows"].all()
    assert optimizer.state[weight]["step"] == 3


# ---- in a fit --------------------------------------------------------------------------------------------------------


class Coded(Toy):
    """Trained by an optimizer with codes of its own."""

    def configure_optimizers(self) -> Optimizer:
        return Stored(self.parameters(), seen=lambda p: p > 0)


@pytest.mark.parametrize("make", [lambda: MagnitudePruning(0.5, start=0.5), lambda: RandomSparsity(0.5)])
def test_a_fit_ends_after_the_first_step(make: Any) -> None:
    """Even where nothing is pruned before the second half."""
    method, module = make(), Coded()
    runner = trainer(method)
    with pytest.raises(ValueError, match="Stored keeps 'seen' as torch.bool"):
        runner.fit(module, loader(), loader(1))
    assert runner.global_step == 0
    assert not method.running


class Begun(Coded):
    """Its optimizer has a memory before the fit, as one that is resumed."""

    def configure_optimizers(self) -> Optimizer:
        optimizer = super().configure_optimizers()
        optimizer.step()
        return optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise AssertionError("training has begun")


def test_a_fit_that_goes_on_ends_before_it() -> None:
    with pytest.raises(ValueError, match="Stored keeps 'seen' as torch.bool"):
        trainer(MagnitudePruning(0.5, start=0.5)).fit(Begun(), loader(), loader(1))


def test_methods_without_masks_take_any_optimizer() -> None:
    method = CKARegularization(strength=0.1)
    fit(Coded(), method, max_epochs=1)
    assert method.steps > 0


# ---- the real ones ---------------------------------------------------------------------------------------------------


class Wide(Toy):
    """One layer is large enough to be kept in 8 bits."""

    def __init__(self, make: Any) -> None:
        super().__init__(net=nn.Sequential(nn.Flatten(), nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 4)))
        self.make = make

    def configure_optimizers(self) -> Optimizer:
        return self.make(self.parameters())


class Watch(L.Callback):
    """Whatever is pruned or grown has no moments then, and where they hold, pruned entries never have.

    Args:
        method: whose masks are followed.
        read: makes values of an optimizer's memory, and says whether their zeros hold.
    """

    def __init__(self, method: RigL, read: Callable[[dict[str, Any]], list[tuple[Tensor, bool]]]) -> None:
        self.method, self.read = method, read
        self.masks: dict[str, Tensor] = {}
        self.changed = 0
        self.largest = 0.0

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        for name, weight in self.method.weights.items():
            mask = self.method.masks[name]
            changed = mask ^ self.masks.get(name, mask)
            self.masks[name] = mask
            for memory, holds in self.read(trainer.optimizers[0].state[weight]):
                self.changed += int(changed.sum())
                assert not memory[..., changed].any()
                dropped = memory[..., ~mask]
                assert not (holds and dropped.any())
                self.largest = max([self.largest, *dropped.flatten().tolist()])


def decoded(state: dict[str, Any]) -> list[tuple[Tensor, bool]]:
    """The quantizer of bitsandbytes for the CPU rounds zero to a code beside it, in every step."""
    coded = [(state[f"state{i}"], state[f"qmap{i}"]) for i in (1, 2) if f"qmap{i}" in state]
    plain = [(state[f"state{i}"], True) for i in (1, 2) if f"state{i}" in state and f"qmap{i}" not in state]
    return [(qmap[codes.long()], False) for codes, qmap in coded] + plain


@pytest.mark.parametrize("name", ["Adam8bit", "AdamW8bit", "Lion8bit", "AdEMAMix8bit", "RMSprop8bit"])
def test_bitsandbytes(name: str) -> None:
    optimizers = pytest.importorskip("bitsandbytes").optim
    method = RigL(0.8, every="3 steps")
    watch = Watch(method, decoded)
    module = Wide(lambda parameters: getattr(optimizers, name)(parameters, lr=1e-3))
    runner = fit(module, method, watch)
    assert runner.optimizers[0].state[module.net[1].weight]["state1"].dtype == torch.uint8
    assert runner.optimizers[0].state[module.net[3].weight]["state1"].dtype == torch.float32
    assert watch.changed > 0
    assert all((module.get_parameter(name)[~mask] == 0).all() for name, mask in watch.masks.items())


def test_torchao() -> None:
    optimizers = pytest.importorskip("torchao.optim")
    weight = nn.Parameter(torch.randn(64, 128))
    where = torch.rand(64, 128) > 0.5
    for name, refused in (("AdamW8bit", ""), ("AdamW4bit", "OptimState4bit"), ("AdamWFp8", "OptimStateFp8")):
        optimizer = getattr(optimizers, name)([weight])
        weight.grad = torch.randn(64, 128)
        with torch.compiler.set_stance("force_eager"):
            optimizer.step()
        if refused:
            with pytest.raises(ValueError, match=f"{name} keeps 'exp_avg' as {refused} of torch.float32"):
                check_moments(optimizer, [weight])
            continue
        state = optimizer.state[weight]
        before = {key: state[key].dequantize() for key in ("exp_avg", "exp_avg_sq")}
        clear_moments(optimizer, weight, where)
        for key, values in before.items():
            assert state[key].dequantize().equal(values.masked_fill(where, 0))


class WithEps(Optimizer):
    """Adafactor where it does not factor, as timm has it: eps is added to every squared gradient."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            with torch.enable_grad():
                closure()
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state.update(step=0, exp_avg_sq=torch.zeros_like(parameter))
            state["step"] += 1
            state["exp_avg_sq"].lerp_(parameter.grad**2 + 1e-30, state["step"] ** -0.8)
            parameter.sub_(0.01 * parameter.grad * state["exp_avg_sq"].rsqrt())


def with_eps(name: str) -> Callable[[Any], Optimizer]:
    if name == "stand-in":
        return WithEps
    optimizers = pytest.importorskip("timm.optim")
    if name == "Adafactor":  # it factors weights of more than 16 rows and columns
        return lambda parameters: optimizers.Adafactor(parameters, lr=0.01, betas=(0.9, 0.999))
    return lambda parameters: optimizers.AdafactorBigVision(parameters, lr=0.01, min_dim_size_to_factor=128)


def second_moment(state: dict[str, Any]) -> list[tuple[Tensor, bool]]:
    return [(state["exp_avg_sq"], False)] if "exp_avg_sq" in state else []  # else it is factored


def first_moment(state: dict[str, Any]) -> list[tuple[Tensor, bool]]:
    return [(state["exp_avg"], True)] if "exp_avg" in state else []


@pytest.mark.parametrize("name", ["stand-in", "Adafactor", "AdafactorBigVision"])
def test_an_eps_in_the_second_moment(name: str) -> None:
    """It comes back where the gradient is zero, but never as more than itself; what grows starts without it."""
    make = with_eps(name)

    class Trained(Toy):
        def configure_optimizers(self) -> Optimizer:
            return make(self.parameters())

    method = RigL(0.8, every="3 steps")
    first, second = Watch(method, first_moment), Watch(method, second_moment)
    module = Trained()
    module.load_state_dict(toy().state_dict())
    fit(module, method, first, second)
    assert second.changed > 0
    assert 0 < second.largest <= 1.0001e-30
    assert first.largest == 0
