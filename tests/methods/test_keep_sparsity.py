"""What is zero when training starts stays zero, whoever made it so; and a table says what was found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lightning_sparse import KeepSparsity, MagnitudePruning, SparsityCheckpoint
from lightning_sparse.core import align_names
from lightning_sparse.functional import find_n_m, n_m_mask
from lightning_sparse.testing import Toy, fit, loader, toy, trainer


def zeros(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() == 0 for name, weight in module.named_parameters() if weight.ndim > 1}


def sparse(share: float = 0.5, seed: int = 1) -> Toy:
    """A toy of which each matrix has lost the share of smallest weights."""
    module = toy(seed=seed)
    for weight in module.parameters():
        if weight.ndim > 1:
            boundary = weight.abs().flatten().sort().values[int(share * weight.numel())]
            weight.data[weight.abs() < boundary] = 0
    return module


def test_zeros_stay_and_all_else_moves() -> None:
    module = sparse()
    before = zeros(module)
    start = {name: value.clone() for name, value in module.state_dict().items()}
    method = KeepSparsity()
    fit(module, method)
    assert method.masks.sparsity == pytest.approx(0.5)
    for name, expected in zeros(module).items():
        assert expected.equal(before[name])
        assert (module.get_parameter(name) != start[name])[~before[name]].float().mean() > 0.9
    assert method.at_target


def test_a_fit_without_it_fills_them() -> None:
    module = sparse()
    fit(module)
    assert sum(int(found.sum()) for found in zeros(module).values()) < 0.2 * 1380  # where nothing arrives nothing moves


def test_zeros_that_a_checkpoint_brings(tmp_path: Path) -> None:
    """Of a run with another method: from the file's weights, not from those the module was made with."""
    first = toy()
    fit(first, MagnitudePruning(0.8, start=0, end=0), ModelCheckpoint(tmp_path, "last"))
    second, method = toy(seed=3), KeepSparsity()
    with pytest.warns(UserWarning, match="KeepSparsity starts in the middle of a run"):
        fit(second, method, ckpt_path=tmp_path / "last.ckpt", max_epochs=4)
    assert all(found.equal(zeros(first)[name]) for name, found in zeros(second).items())
    assert not second.net[6].weight.equal(first.net[6].weight)


def test_its_model_is_at_target_from_the_beginning(tmp_path: Path) -> None:
    best = SparsityCheckpoint(dirpath=tmp_path, monitor="val_loss")
    fit(sparse(), KeepSparsity(), best, max_epochs=1)
    assert Path(best.best_model_path).is_file()


# ---- what was found --------------------------------------------------------------------------------------------------


def test_the_table_says_what_was_found(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    module = toy()
    by_group = module.net[6].weight
    by_group.data[~n_m_mask(by_group.abs(), 2, 4)] = 0
    module.net[2].weight.data.flatten()[:2] = 0  # 2 of 576
    module.net[8].weight.data.flatten()[:30] = 0
    module.net[0].weight.data.zero_()
    method = KeepSparsity()
    fit(module, method)
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in caplog.text.splitlines() if line.startswith("net.")}
    assert lines == {
        "net.0.weight": "72 of 72 100.00% left dense: entirely zero, an initialization",
        "net.2.weight": "2 of 576 0.35% left dense: zeros by chance",
        "net.6.weight": "1,024 of 2,048 50.00% 2:4",
        "net.8.weight": "30 of 64 46.88%",
    }
    assert method.masks.counts == {"net.0.weight": 72, "net.2.weight": 576, "net.6.weight": 1024, "net.8.weight": 34}
    assert method.goal["total"] == 72 + 576 + 1024 + 34
    assert [int(zeros(module)[f"net.{layer}.weight"].sum()) for layer in (6, 8)] == [1024, 30]


@pytest.mark.parametrize(
    ("pattern", "dim", "found"), [((2, 4), 1, (2, 4)), ((1, 4), 0, (1, 4)), ((4, 8), 1, (4, 8)), ((3, 16), 1, (3, 16))]
)
def test_patterns_are_recognized(pattern: tuple[int, int], dim: int, found: tuple[int, int]) -> None:
    score = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(0))
    assert find_n_m(n_m_mask(score, *pattern, dim), dim) == found
    assert find_n_m(n_m_mask(score, *pattern, dim), 1 - dim) is None
    assert find_n_m(score > 0.5) is None


# ---- files -----------------------------------------------------------------------------------------------------------


def state_dict(module: nn.Module, path: Path) -> Path:
    torch.save(module.state_dict(), path / "w.pt")
    return path / "w.pt"


def bare_network(module: nn.Module, path: Path) -> Path:
    torch.save(module.net.state_dict(), path / "w.pt")
    return path / "w.pt"


def wrapped(module: nn.Module, path: Path) -> Path:
    torch.save({f"student.{name}": value for name, value in module.state_dict().items()}, path / "w.pt")
    return path / "w.pt"


def safetensors(module: nn.Module, path: Path) -> Path:
    save_file(module.state_dict(), path / "w.safetensors")
    return path / "w.safetensors"


def masks(module: nn.Module, path: Path) -> Path:
    torch.save({name: ~found for name, found in zeros(module).items()}, path / "m.pt")
    return path / "m.pt"


def reparametrized(module: nn.Module, path: Path) -> Path:
    dense = toy(seed=9)
    for index in (0, 2, 6, 8):
        prune.custom_from_mask(dense.net[index], "weight", (module.net[index].weight != 0).float())
    return state_dict(dense, path)


def of_a_method(module: nn.Module, path: Path) -> Path:
    """Masks of a method, beside weights of which a kept one is zero."""
    other = Toy()
    other.load_state_dict(module.state_dict())
    trainer(KeepSparsity(), ModelCheckpoint(path, "last"), max_epochs=1).fit(other, loader(1), loader(1))
    saved = torch.load(path / "last.ckpt", weights_only=True)
    saved["state_dict"]["net.6.weight"].zero_()
    torch.save(saved, path / "last.ckpt")
    return path / "last.ckpt"


WAYS = (state_dict, bare_network, wrapped, safetensors, masks, reparametrized, of_a_method)


@pytest.mark.parametrize("save", WAYS, ids=lambda save: save.__name__)
def test_zeros_of_a_file(save: Callable[[nn.Module, Path], Path], tmp_path: Path) -> None:
    pattern, module = sparse(), toy(seed=4)
    path = save(pattern, tmp_path)
    fit(module, KeepSparsity(source=path))
    assert all(found.equal(zeros(pattern)[name]) for name, found in zeros(module).items())


def test_a_resumed_run_does_not_need_the_file(tmp_path: Path) -> None:
    path = state_dict(sparse(), tmp_path)
    fit(toy(), KeepSparsity(source=path), ModelCheckpoint(tmp_path / "run", "last"))
    path.unlink()
    module = toy(seed=5)
    fit(module, KeepSparsity(source=path), ckpt_path=tmp_path / "run" / "last.ckpt", max_epochs=4)
    assert all(found.equal(zeros(sparse())[name]) for name, found in zeros(module).items())


def test_names_are_aligned_by_one_prefix() -> None:
    assert align_names(["a.b.w", "a.c.w"], ["c.w", "b.w"]) == {"a.b.w": "b.w", "a.c.w": "c.w"}
    assert align_names(["b.w", "c.w"], ["x.b.w", "y.c.w", "x.c.w"]) == {"b.w": "x.b.w", "c.w": "x.c.w"}
    assert align_names(["b.w", "c.w"], ["b.w", "x.c.w"]) == {"b.w": "b.w"}
    assert align_names(["b.w"], []) == {}


# ---- frozen weights --------------------------------------------------------------------------------------------------


class Tuned(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
            self.head = nn.Linear(16, 4)
        for layer in (self.backbone[1], self.backbone[3]):
            layer.weight.data[torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def test_frozen_zeros_stay_when_they_are_thawed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    module, before = Tuned(), zeros(Tuned())
    tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-2, verbose=False)
    trainer(tuning, KeepSparsity()).fit(module, loader())
    assert caplog.text.count("frozen") == 2
    assert "moves pruned entries" not in caplog.text
    for name, found in zeros(module).items():
        assert found.equal(before[name])
    assert not module.backbone[1].weight.equal(Tuned().backbone[1].weight)


def test_they_would_not_without_it() -> None:
    module = Tuned()
    tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-2, verbose=False)
    trainer(tuning).fit(module, loader())
    assert not zeros(module)["backbone.1.weight"].any()


def test_a_base_that_stays_frozen_is_no_dense_model() -> None:
    module = Tuned()
    module.backbone.requires_grad_(False)
    method = KeepSparsity()
    trainer(method).fit(module, loader())
    assert zeros(module)["backbone.1.weight"].equal(zeros(Tuned())["backbone.1.weight"])
    assert 0 < method.masks.sparsity < 0.5


# ---- refusals --------------------------------------------------------------------------------------------------------


def other_shapes(tmp_path: Path) -> Path:
    state = sparse().state_dict()
    torch.save({**state, "net.6.weight": state["net.6.weight"][:, :64]}, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def other_names(tmp_path: Path) -> Path:
    torch.save({"conv.weight": torch.ones(1)}, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def no_file(tmp_path: Path) -> Path:
    return tmp_path / "missing.pt"


def no_tensors(tmp_path: Path) -> Path:
    (tmp_path / "w.pt").write_text("weights")
    return tmp_path / "w.pt"


def no_names(tmp_path: Path) -> Path:
    torch.save([torch.ones(2)], tmp_path / "w.pt")
    return tmp_path / "w.pt"


def dense(tmp_path: Path) -> Path:
    return state_dict(toy(), tmp_path)


REFUSED: list[tuple[Callable[[Path], Path] | None, str]] = [
    (None, "KeepSparsity found no sparse weight in the model: 'net.0.weight' has the most zeros, 0.00%, and min_spa"),
    (dense, "w.pt': 'net.0.weight' has the most zeros, 0.00%"),
    (other_shapes, "'net.6.weight' has shape (16, 64), but 'net.6.weight' has shape (16, 128); give a file of this model"),
    (other_names, "has nothing for 'net.0.weight'; it has ['conv.weight']. Give a file of this model, or exclude the layer"),
    (no_file, "missing.pt' is not a file; give a checkpoint, a state dict, safetensors or masks"),
    (no_tensors, "cannot be read ("),
    (no_names, "holds a list, not tensors by name; save a state dict"),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED, ids=[sentence[:30] for _, sentence in REFUSED])
def test_refusals(make: Callable[[Path], Path] | None, sentence: str, tmp_path: Path) -> None:
    source = None if make is None else make(tmp_path)
    module = toy()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=".") as error:
        fit(module, KeepSparsity(source=source))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())
