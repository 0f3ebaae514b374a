from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lightning_sparse.core import MaskSet, Memory, Mold, Remembered, clear_moments


def mask_set() -> MaskSet:
    masks = MaskSet({"a": torch.ones(3, 5), "b": torch.ones(4)})
    masks.replace({"a": torch.arange(15).reshape(3, 5) % 3 == 0})
    return masks


FORMS = {
    "numpy, 32 bits": {"SMALL": 2**15},
    "torch, 32 bits": {"SMALL": 0},
    "bytes": {"WIDE": 0},
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_mold_in_every_form(
    form: str, dtype: torch.dtype, threads: int, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in FORMS[form].items():
        monkeypatch.setattr(Mold, name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    weight = nn.Parameter(torch.randn(4, 3, 2, 2).to(dtype))
    dense, without_gradient = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2, 2))
    if channels_last:
        weight.data = weight.data.to(memory_format=torch.channels_last)
    masks = MaskSet({"weight": weight, "dense": dense, "without_gradient": without_gradient})
    kept = torch.arange(48).view(4, 3, 2, 2) % 3 == 0
    masks.replace({"weight": kept, "without_gradient": torch.eye(2).bool()})
    mold = Mold(masks, {"weight": weight, "dense": dense, "without_gradient": without_gradient})
    gradient = torch.randn(4, 3, 2, 2).to(dtype)
    gradient[0, 0, 0, 1], gradient[0, 1, 0, 0] = torch.nan, torch.inf  # both are dropped
    weight.grad, dense.grad = gradient.clone(memory_format=torch.preserve_format), torch.ones(5)
    mold.press_gradients()
    assert weight.grad.equal(gradient.nan_to_num(0, 0).where(kept, torch.zeros((), dtype=dtype)))
    assert not weight.grad.signbit()[~kept].any()
    assert dense.grad.equal(torch.ones(5))
    assert without_gradient.grad is None
    before = weight.detach().clone()
    mold.press_weights()
    assert weight.detach().equal(before.where(kept, torch.zeros((), dtype=dtype)))


def test_counts_and_sparsity() -> None:
    masks = mask_set()
    assert masks.counts == {"a": 5, "b": 4}
    assert (masks.kept, masks.total) == (9, 19)
    assert masks.sparsity == pytest.approx(10 / 19)
    assert masks["a"].equal(~masks.dropped("a"))


def test_apply_silences_even_infinities() -> None:
    masks = mask_set()
    tensor = torch.full((3, 5), torch.inf)
    masks.apply_({"a": tensor, "b": None, "unknown": torch.ones(1)})
    assert (tensor == 0).equal(masks.dropped("a"))
    assert not tensor.isnan().any()


def test_state_is_one_bit_per_weight_and_comes_back() -> None:
    masks = mask_set()
    state = masks.state_dict()
    assert sum(entry["kept"].numel() for entry in state.values()) == 2 + 1
    back = MaskSet()
    back.load_state_dict(state)
    assert back["a"].equal(masks["a"])
    assert back.counts == masks.counts
    assert back.fingerprint().equal(masks.fingerprint())
    assert sum(bits.numel() * bits.element_size() for bits in masks._bits.values()) == masks.total  # a byte each


def test_fingerprints_notice_a_single_entry() -> None:
    masks, other = mask_set(), mask_set()
    flipped = other["a"]
    flipped[1, 1] = ~flipped[1, 1]
    other.replace({"a": flipped})
    assert (masks.fingerprint() == other.fingerprint()).tolist() == [False, True]


def test_masks_are_exchanged_one_after_the_other() -> None:
    masks, settled = mask_set(), {}

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        yield "b", torch.arange(4) > 1
        assert masks["b"].count_nonzero() == 2, "the first is in place before the second is made"
        assert settled["b"].equal(torch.arange(4) < 2), "and settled: the other two are kept before and after"
        assert masks.bits("b", torch.ones(4)) is not None, "it can be applied, though nobody has counted it yet"
        yield "a", torch.arange(15).reshape(3, 5) % 3 == 0

    masks.replace(made(), settled.__setitem__)
    assert masks.counts == {"a": 5, "b": 2}
    assert [*settled] == ["b"], "the second is what it was"


def test_masks_that_were_exchanged_before_an_error_are_counted() -> None:
    masks = mask_set()

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        yield "b", torch.tensor([True, False, False, False])
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        masks.replace(made())
    assert masks.counts == {"a": 5, "b": 1}
    tensor = torch.ones(4)
    masks.apply_({"b": tensor})
    assert tensor.tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("mask", [torch.ones(3, 5), torch.ones(5, 3, dtype=torch.bool)])
def test_wrong_masks_are_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="mask of 'a' must be boolean of shape"):
        mask_set().replace({"a": mask})


@pytest.mark.parametrize(
    ("make", "keys"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer"}),
        (lambda p: torch.optim.Adam(p, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        (lambda p: torch.optim.AdamW(p), {"exp_avg", "exp_avg_sq"}),
        (lambda p: torch.optim.RMSprop(p, momentum=0.9), {"square_avg", "momentum_buffer"}),
        (lambda p: torch.optim.Adagrad(p), {"sum"}),
        (lambda p: torch.optim.RAdam(p), {"exp_avg", "exp_avg_sq"}),
        (lambda p: torch.optim.NAdam(p), {"exp_avg", "exp_avg_sq"}),
    ],
)
def test_moments_are_cleared_where_told_and_nowhere_else(make: object, keys: set[str]) -> None:
    weight, other = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 3))
    optimizer = make([weight, other])  # type: ignore[operator]
    for _ in range(2):
        weight.grad, other.grad = torch.rand(4, 3) + 1, torch.rand(4, 3) + 1
        optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[weight].items() if value.shape == weight.shape}
    untouched = {key: value.clone() for key, value in optimizer.state[other].items()}
    where = torch.rand(4, 3) > 0.5
    clear_moments(optimizer, weight, where)
    assert before.keys() == keys
    for key, value in before.items():
        assert (optimizer.state[weight][key][where] == 0).all()
        assert optimizer.state[weight][key][~where].equal(value[~where])
    assert all(optimizer.state[other][key].equal(value) for key, value in untouched.items())


def test_moments_before_the_first_step() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    clear_moments(optimizer, weight, torch.ones(2, dtype=torch.bool))
    assert not optimizer.state[weight]


class Base(Memory):
    masks = Remembered(MaskSet)
    phase = Remembered(lambda: "dense")


class Derived(Base):
    queue = Remembered[list[object]](list)
    variables = Remembered[dict[str, torch.Tensor]](dict)


def test_memory_survives_a_file(tmp_path: object) -> None:
    method = Derived()
    method.masks = mask_set()
    method.phase = "fine-tuning"
    method.queue = [1, {"score": 0.5, "mask": torch.tensor([True, False])}]
    method.variables = {"a": torch.rand(3, 5)}
    assert Derived.remembered() == ["masks", "phase", "queue", "variables"]
    torch.save(method.memorize(), f"{tmp_path}/state")
    back = Derived()
    back.recall(torch.load(f"{tmp_path}/state", weights_only=True))
    assert back.phase == "fine-tuning"
    assert back.masks["a"].equal(method.masks["a"])
    assert back.queue[1]["mask"].tolist() == [True, False]  # type: ignore[index]
    assert back.variables["a"].equal(method.variables["a"])
    back.variables["a"].zero_()
    assert method.variables["a"].any()


def test_what_is_memorized_is_a_copy() -> None:
    method = Derived()
    method.variables = {"a": torch.ones(2)}
    saved = method.memorize()
    method.variables["a"].zero_()
    assert saved["variables"]["a"].tolist() == [1, 1]


def test_memory_follows_the_weights_to_their_device() -> None:
    method = Derived()
    method.masks = mask_set()
    method.variables = {"a": torch.rand(3, 5), "other": torch.rand(1)}
    meta = {name: torch.empty(shape, device="meta") for name, shape in {"a": (3, 5), "b": (4,)}.items()}
    method.place(meta, torch.device("cpu"))
    assert method.masks["a"].is_meta
    assert method.variables["a"].is_meta
    assert method.variables["other"].is_cpu


def test_memory_of_instances_is_their_own() -> None:
    first, second = Derived(), Derived()
    first.queue.append(1)
    assert second.queue == []
    first.forget()
    assert first.queue == []


def test_memory_with_something_missing() -> None:
    with pytest.raises(ValueError, match=r"state of Derived lacks \['variables'\]"):
        Derived().recall({"masks": {}, "phase": "", "queue": []})
