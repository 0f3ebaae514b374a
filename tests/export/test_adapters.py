"""A sparse base stays sparse while adapters train beside it, and when they are merged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse import KeepSparsity
from lightning_sparse.export import merge_adapters
from lightning_sparse.testing import Toy, fit

peft = pytest.importorskip("peft")


def net(seed: int = 0) -> nn.Sequential:
    """Half of every matrix is zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))
        for layer in (layers[1], layers[3]):
            layer.weight.data[torch.rand(layer.weight.shape) < 0.5] = 0
        return layers


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=2, lora_alpha=8, target_modules=["1", "3"], **options)


class Adapted(Toy):
    """Adapters on a frozen base."""

    def __init__(self, config: Any = None) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            super().__init__(net=peft.get_peft_model(net(), config or lora()))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


def zeros(module: nn.Module) -> list[Tensor]:
    return [p.detach() == 0 for name, p in module.named_parameters() if p.ndim > 1 and "lora" not in name]


CONFIGS: dict[str, Callable[[], Any]] = {
    "LoRA": lora,
    "DoRA": lambda: lora(use_dora=True),
    "rsLoRA with biases": lambda: lora(use_rslora=True, bias="lora_only"),
    "SHiRA": lambda: peft.ShiraConfig(r=2, target_modules=["1", "3"]),
    "all of the head": lambda: peft.LoraConfig(r=2, target_modules=["1"], modules_to_save=["3"]),
}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_base_stays_sparse_through_training_and_merge(name: str) -> None:
    module, method = Adapted(CONFIGS[name]()), KeepSparsity()
    fit(module, method)
    merged, rows = merge_adapters(module)
    assert isinstance(merged, Adapted)
    assert [*dict(merged.net.named_parameters())] == ["1.weight", "1.bias", "3.weight", "3.bias"]
    for found, expected in zip(zeros(merged), zeros(net()), strict=True):
        assert found.equal(expected)
    assert not merged.net[1].weight.equal(net()[1].weight)
    assert [(row.name, row.zeros) for row in rows][:1] == [("net.1.weight", int(zeros(net())[0].sum()))]


def test_a_plain_merge_fills_the_zeros() -> None:
    module = Adapted()
    fit(module)
    merged = copy.deepcopy(module).net.merge_and_unload()
    assert not merged[1].weight.eq(0).any()


def test_the_merged_weight_is_the_base_and_the_masked_product() -> None:
    module = Adapted()
    fit(module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    layer = module.net.base_model.model[1]
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (8 / 2)
    product = product.detach()
    merged, rows = merge_adapters(module)
    mask = net()[1].weight != 0
    torch.testing.assert_close(merged.net[1].weight, net()[1].weight + product * mask)
    assert rows[0].lost == pytest.approx(float(product[~mask].norm() / product.norm()), rel=1e-4)
    assert str(merge_adapters(module)).splitlines()[1].startswith("net.1.weight  ")
    assert all(value.equal(before[name]) for name, value in module.state_dict().items()), "the model stays as it is"


def test_adapters_learn_beside_a_kept_base() -> None:
    """Their second matrix is zero at the start, which is no sparsity to keep."""
    module = Adapted()
    fit(module, KeepSparsity())
    assert module.net.base_model.model[1].lora_B["default"].weight.ne(0).float().mean() > 0.9


def test_masks_that_are_given_count() -> None:
    module, method = Adapted(), KeepSparsity()
    fit(module, method)
    masks = {name: method.masks[name] for name in method.masks}
    name = "net.base_model.model.1.base_layer.weight"
    assert name in masks
    masks[name] = masks[name] & (torch.arange(64) < 32)
    merged, _ = merge_adapters(module, masks)
    assert merged.net[1].weight[:, 32:].eq(0).all()
    assert merge_adapters(module, method.masks).model.net[1].weight.eq(0).equal(net()[1].weight.eq(0))


def test_one_of_several_adapters() -> None:
    model = peft.get_peft_model(net(), lora(init_lora_weights=False))
    model.add_adapter("other", lora(init_lora_weights=False))
    first, second = merge_adapters(model).model, merge_adapters(model, adapters=["other"]).model
    assert isinstance(first, nn.Sequential)
    assert not first[1].weight.equal(second[1].weight)
    assert first[1].weight.eq(0).equal(second[1].weight.eq(0))


def test_a_merge_inside_the_training_is_undone_and_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    class Merging(Adapted):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 2:
                self.net.merge_adapter()
                self.net.unmerge_adapter()  # which leaves rounding where there were zeros
                self.net.base_model.model[1].base_layer.weight.data[0] += 1
            return F.cross_entropy(self.net(batch[0]), batch[1])

    module = Merging()
    fit(module, KeepSparsity())
    assert "Something outside the optimizer's step moves pruned entries of 'net.base_model.model.1.base_layer" in caplog.text
    assert all(found.equal(expected) for found, expected in zip(zeros(module), zeros(net()), strict=True))


def test_entries_that_somebody_has_written_to_are_counted() -> None:
    module, method = Adapted(), KeepSparsity()
    fit(module, method)
    mask = method.masks["net.base_model.model.1.base_layer.weight"]
    module.net.base_model.model[1].base_layer.weight.data[~mask] = torch.tensor([1.0, 0.0]).repeat(1024)[
        : int((~mask).sum())
    ]
    report = merge_adapters(module, method.masks)
    assert [row.stray for row in report.rows] == [-(-int((~mask).sum()) // 2), 0]
    assert f"{report.rows[0].stray:,} of them were not zero before" in str(report).splitlines()[1]
    assert report.model.net[1].weight.eq(0).equal(net()[1].weight.eq(0))


def test_not_while_a_trainer_trains_it() -> None:
    said: list[str] = []

    class Impatient(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            with pytest.raises(ValueError, match=".") as error:
                merge_adapters(pl_module)
            said.append(str(error.value))

    module = Adapted()
    fit(module, KeepSparsity(), Impatient(), max_epochs=1)
    assert said[0].startswith("A Trainer is training this Adapted, and what methods have attached to it would be copied too")
    assert merge_adapters(module).rows


def merged_already() -> nn.Module:
    model = peft.get_peft_model(net(), lora())
    model.merge_adapter()
    return model  # type: ignore[no-any-return]


def on_a_dense_base() -> nn.Module:
    return peft.get_peft_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4)), lora())  # type: ignore[no-any-return]


REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (net, {}, "Sequential contains no PEFT adapters; give the model that get_peft_model returned"),
    (
        merged_already,
        {},
        "is already merged, so the zeros of its base are unknown; call unmerge_adapter() first",
    ),
    (on_a_dense_base, {}, "The base of these adapters has no zeros, so there is nothing to keep; merge them with merge_and"),
    (
        lambda: peft.get_peft_model(net(), lora()),
        {"masks": {"base_model.model.1.base_layer.weight": torch.ones(2)}},
        "must be boolean of shape (16, 64), not torch.float32 of (2,)",
    ),
]


@pytest.mark.parametrize(("make", "options", "sentence"), REFUSED, ids=[row[-1][:20] for row in REFUSED])
def test_refusals(make: Callable[[], nn.Module], options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        merge_adapters(make(), **options)
    assert sentence in str(error.value)
