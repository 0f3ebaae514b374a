"""Small files give back every bit, at the size that the law says."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse.export import compact_size, fold_norms, load_compact, load_model, recalibrate, save_compact, save_model
from lightning_sparse.export.blueprint import Blueprint
from lightning_sparse.models import MLP, Classifier, ResNet
from lightning_sparse.testing import trainer
from tests.helpers.nets import unsettle

pytest.importorskip("safetensors")

TYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.uint16,
    torch.bool,
]


def sparse(shape: tuple[int, ...], density: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 100, shape, generator=generator).to(dtype)
    return values * (torch.rand(shape, generator=generator) < density).to(dtype)


def bits(tensor: Tensor) -> bytes:
    raw: bytes = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return raw


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.001, 0.1, 0.5, 1.0])
def test_every_bit_comes_back(dtype: torch.dtype, density: float, tmp_path: Path) -> None:
    tensors = {f"{n}": sparse(shape, density, dtype) for n, shape in enumerate([(70, 33), (5,), (), (2, 3, 4, 5), (0, 4)])}
    save_compact(tensors, tmp_path / "file")
    loaded = load_compact(tmp_path / "file")
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype
        assert loaded[name].shape == tensor.shape
        assert bits(loaded[name]) == bits(tensor)


def test_minus_zero_infinity_and_every_nan_are_values(tmp_path: Path) -> None:
    odd = torch.zeros(400)
    odd[::40] = torch.tensor([-0.0, math.nan, math.inf, -math.inf, 1e-45, -0.0, 2.0, -1.0, 0.0, 5.0])
    odd[7] = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)[0]  # a NaN with another payload
    save_compact({"odd": odd, "cut": odd.view(20, 20).T}, tmp_path / "file")
    loaded = load_compact(tmp_path / "file")
    assert bits(loaded["odd"]) == bits(odd)
    assert bits(loaded["cut"]) == bits(odd.view(20, 20).T)


def test_gaps_of_every_width_are_counted(tmp_path: Path) -> None:
    """Neighbors 255, 256, 257, 65,536 and 65,537 places apart, and at both ends."""
    for places in ([255, 510], [256, 512], [0, 257], [65_536], [0, 65_537], [99_999], [40_000, 99_999], []):
        tensor = torch.zeros(100_000)
        tensor[places] = 1.5
        save_compact({"w": tensor}, tmp_path / "file")
        assert torch.equal(load_compact(tmp_path / "file")["w"], tensor), places


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_the_size_is_what_the_law_says(sparsity: float, tmp_path: Path) -> None:
    weight = sparse((500, 400), 1 - sparsity)
    kept = int((weight != 0).sum())
    where = weight.flatten().nonzero().flatten()
    gap = 1 if int(torch.diff(where).max()) <= 256 else 2
    size = save_compact({"w": weight}, tmp_path / "file")
    law = compact_size(weight.numel(), kept, 4, gap)
    assert law <= size <= law + 400, "and a header"
    if sparsity == 0.9:
        assert size <= 0.18 * 4 * weight.numel()


def test_a_trained_model_in_a_small_file(tmp_path: Path) -> None:
    """A network trained on digits at 90 %: strictly loaded, equal in every output bit, within 0.18 of its dense size."""
    from lightning_sparse import MagnitudePruning
    from lightning_sparse.data import Digits

    module = Classifier(lambda *a: MLP(*a, hidden=(128, 64)), 10, 1, 8)
    runner = trainer(MagnitudePruning(0.9), max_epochs=4)
    runner.fit(module, Digits())
    size = save_model(module, tmp_path / "net.safetensors")
    assert size <= 0.18 * sum(4 * t.numel() for t in module.state_dict().values())
    again = load_model(Classifier(lambda *a: MLP(*a, hidden=(128, 64)), 10, 1, 8), tmp_path / "net.safetensors")
    for name, tensor in module.state_dict().items():
        assert bits(again.state_dict()[name]) == bits(tensor), name


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50))
    alone = save_compact(net.state_dict(), tmp_path / "two")
    net[1].weight = net[0].weight
    assert save_compact(net.state_dict(), tmp_path / "one") < alone - 9000
    loaded = load_compact(tmp_path / "one")
    assert loaded["0.weight"].data_ptr() == loaded["1.weight"].data_ptr()


def test_what_cannot_be_stored_or_read_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'w' is not a dense tensor"):
        save_compact({"w": torch.eye(3).to_sparse()}, tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="is not a file; give one that an export wrote"):
        load_compact(tmp_path / "nowhere")
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        load_compact(tmp_path / "text")
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, str(tmp_path / "other"))
    with pytest.raises(ValueError, match="not from a lightning_sparse export; load it with safetensors"):
        load_compact(tmp_path / "other")
    save_model(nn.Linear(3, 2), tmp_path / "linear")
    with pytest.raises(ValueError, match="does not fit Linear as it was built"):
        load_model(nn.Linear(3, 3), tmp_path / "linear")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(
        ValueError, match=r"this needs safetensors; install it with: pip install 'lightning_sparse\[export\]'"
    ):
        save_compact({"w": torch.ones(2)}, tmp_path / "file")


# ---- normalization ------------------------------------------------------------------------------------------------------


def test_statistics_measured_again_are_those_of_the_batches() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2), nn.BatchNorm1d(2)).double()
    net[0].weight.data[1] = 0
    momentum = net[1].momentum
    batches = [torch.randn(64, 3, dtype=torch.double) * 2 + 1 for _ in range(3)]
    assert recalibrate(net, iter(batches)) == 2
    seen = [net[0](x) for x in batches]
    torch.testing.assert_close(net[1].running_mean, torch.stack([x.mean(0) for x in seen]).mean(0))
    torch.testing.assert_close(net[1].running_var, torch.stack([x.var(0) for x in seen]).mean(0))
    inner = [net[3]((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()) for x in seen]  # dropout is off
    torch.testing.assert_close(net[4].running_mean, torch.stack([x.mean(0) for x in inner]).mean(0))
    assert net[1].momentum == momentum
    assert all(part.training for part in net.modules())
    with pytest.raises(ValueError, match="batches is empty"):
        recalibrate(net, [])
    assert recalibrate(nn.Linear(3, 2), batches) == 0


def test_folded_normalization_gives_the_same_outputs_and_keeps_zeros(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for make in (lambda: ResNet(10, 1, 8, depth=8), lambda: MLP(10, 1, 8, hidden=(16, 16), batch_norm=True)):
        net = make()
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight.data[torch.rand_like(layer.weight) < 0.9] = 0
        recalibrate(net, [torch.randn(32, 1, 8, 8)])
        for part in net.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.weight.data.normal_()
                part.bias.data.normal_()
        net.eval()
        before = copy.deepcopy(net.state_dict())
        folded, blueprint = fold_norms(net)
        x = torch.randn(5, 1, 8, 8)
        torch.testing.assert_close(folded(x), net(x), rtol=1e-5, atol=1e-5)
        assert not any(isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) for part in folded.modules())
        assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True))
        for name, layer in net.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                assert torch.equal(layer.weight == 0, folded.get_submodule(name).weight == 0)
        save_model(folded, tmp_path / "net", blueprint)
        assert torch.equal(load_model(make().eval(), tmp_path / "net")(x), folded(x))


def test_what_is_used_twice_or_elsewhere_is_not_folded() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            out: Tensor = self.norm(y) + y
            return out

    net = Twice().eval()
    folded, blueprint = fold_norms(net)
    assert blueprint == Blueprint()
    x = torch.randn(3, 4)
    assert torch.equal(folded(x), net(x))


class Named(nn.Sequential):
    """Layers, registered again in a module that is called."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.features(x)
        return out


class Branching(nn.Module):
    """A network that cannot be traced around one that can."""

    def __init__(self, inner: nn.Sequential, again: nn.ModuleList, outside: bool = False) -> None:
        super().__init__()
        self.inner, self.again, self.outside = inner, again, outside

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner[0](x) if self.outside else x
        out: Tensor = self.inner(x if x.sum() > 1e9 else -x)
        return out


def test_a_normalization_with_two_names_is_folded_under_both(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = unsettle(Named(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))
    x = torch.randn(3, 1, 6, 6)
    folded, blueprint = fold_norms(net)
    assert blueprint.folded == ("1",)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    torch.testing.assert_close(folded(x), net(x))
    save_model(folded, tmp_path / "net", blueprint)
    new = Named(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()
    assert torch.equal(load_model(new, tmp_path / "net")(x), folded(x))


def test_a_network_held_twice_is_folded_once() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    net = unsettle(Branching(inner, nn.ModuleList([inner])))
    x = torch.randn(3, 1, 6, 6)
    folded, blueprint = fold_norms(net)
    assert len(blueprint.folded) == 1
    torch.testing.assert_close(folded(x), net(x))


def test_behind_a_linear_layer_only_a_matrix_is_folded() -> None:
    torch.manual_seed(0)
    net = unsettle(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))
    rows, tokens = torch.randn(3, 5), torch.randn(3, 4, 5)
    for given, folds in ((None, False), (tokens, False), (rows, True)):
        folded, blueprint = fold_norms(net, given)
        assert blueprint.folded == (("1",) if folds else ())
        for x in (tokens,) if not folds else (rows,):
            torch.testing.assert_close(folded(x), net(x))
    flat = unsettle(
        nn.Sequential(nn.Flatten(), nn.Linear(20, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4))
    )
    assert fold_norms(flat)[1].folded == ("2", "5")


def test_a_layer_that_is_also_called_from_outside_is_not_folded() -> None:
    torch.manual_seed(0)
    net = unsettle(Branching(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)), nn.ModuleList(), outside=True))
    x = torch.randn(3, 1, 6, 6)
    folded, blueprint = fold_norms(net, x)
    assert blueprint == Blueprint()
    assert torch.equal(folded(x), net(x))
