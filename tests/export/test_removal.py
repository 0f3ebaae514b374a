"""Dead channels leave networks of every shape, and no output changes."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse.core import Call, Dependencies, Member, coupled_outputs
from lightning_sparse.export import (
    count_parameters,
    export_ladder,
    load_model,
    merge_layers,
    remove_dead,
    save_model,
    use_kernels,
)
from lightning_sparse.export.compare_models import difference
from tests.helpers.nets import NETS, kill, sample, unsettle

tp = pytest.importorskip("torch_pruning")


@pytest.mark.parametrize("make", NETS)
def test_outputs_are_equal_and_dead_channels_gone(make: Callable[[], tuple[nn.Module, dict[str, int]]]) -> None:
    torch.manual_seed(0)
    net, dead = make()
    unsettle(net)
    x = sample(make, 7)
    before = net(x)
    smaller, removal = remove_dead(net, x)
    torch.testing.assert_close(smaller(x), before, rtol=1e-5, atol=1e-5)
    other = sample(make, 3) * 5
    torch.testing.assert_close(smaller(other), net(other), rtol=1e-5, atol=1e-5)
    assert type(smaller) is type(net)
    assert torch.equal(net(x), before), "the model given stays as it is"
    assert {name: gone for name, gone in removal.removed.items() if name in dead} == dead, removal.carriers
    assert not any(isinstance(net.get_submodule(name), nn.BatchNorm2d) for name in removal.removed), "layers are counted"
    assert count_parameters(smaller) < count_parameters(net)


def test_what_dies_with_a_dead_neuron_goes_in_later_rounds(tmp_path: object) -> None:
    def make() -> nn.Sequential:
        four = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)]
        return nn.Sequential(*four)

    torch.manual_seed(0)
    net = make()
    net[4].weight.data[:, 0] = 0  # nobody reads it: gone in the first round, so that positions in the second are others
    net[6].weight.data[:, 0] = 0
    net[4].weight.data[1:, 1] = 0  # read only by neuron 0 of the next layer, which nobody reads
    net[2].weight.data[0, 2], net[2].weight.data[2:, 2] = 0, 0  # read only by neuron 1
    x = torch.randn(9, 4)
    smaller, removal = remove_dead(net, x)
    assert removal.removed == {"0": 1, "2": 2, "4": 1}
    assert removal.blueprint.kept["2"].outputs == [2, 3, 4, 5]
    torch.testing.assert_close(smaller(x), net(x))
    save_model(smaller, f"{tmp_path}/net", removal.blueprint)
    assert torch.equal(load_model(make(), f"{tmp_path}/net")(x), smaller(x))
    cut = removal.blueprint.apply(copy.deepcopy(net))
    torch.testing.assert_close(cut[2].weight, net[2].weight[2:][:, [0, 1, 3, 4, 5]])


def test_a_constant_is_folded_into_a_bias_only_where_no_zeros_are_padded() -> None:
    torch.manual_seed(0)
    for padding, mode, carriers in ((0, "zeros", {}), (1, "zeros", {"0": 1}), (1, "reflect", {})):
        net = nn.Sequential(nn.Conv2d(1, 5, 1), nn.Conv2d(5, 2, 3, padding=padding, padding_mode=mode), nn.Flatten())
        kill(net[0], [0, 2, 3])
        x = torch.randn(3, 1, 6, 6)
        smaller, removal = remove_dead(net, x)
        assert removal.carriers == carriers
        assert removal.removed == {"0": 3 - len(carriers)}
        torch.testing.assert_close(smaller(x), net(x))


def test_without_a_bias_a_linear_layer_has_a_carrier() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Sigmoid(), nn.Linear(8, 2, bias=False))
    kill(net[0], [0, 1, 2, 7])
    x = torch.randn(5, 3)
    smaller, removal = remove_dead(net, x)
    assert (removal.removed, removal.carriers) == ({"0": 3}, {"0": 1})
    torch.testing.assert_close(smaller(x), net(x))


class Denoiser(nn.Module):
    """The step is added to every channel of a convolution, or scales them."""

    def __init__(self, scales: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.scales = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 2, 1), scales

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        x, step = self.one(x), step.to(x)[:, None, None, None]
        out: Tensor = self.two(torch.relu(x * step if self.scales else x + step))
        return out


@pytest.mark.parametrize("step", [torch.full((4,), 0.5), torch.full((4,), -20.0), torch.full((4,), 3)])
def test_an_input_that_is_the_same_for_all_samples_is_no_constant(step: Tensor) -> None:
    torch.manual_seed(0)
    net = Denoiser().eval()
    kill(net.one, [0, 1, 2])
    x = torch.randn(4, 1, 6, 6)
    with pytest.raises(ValueError, match="no neuron, filter or channel in it is dead"):
        remove_dead(net, (x, step))
    scaled = Denoiser(scales=True).eval()
    kill(scaled.one, [0, 1, 2])
    scaled.one.bias.data[:3] = 0  # nothing is left to scale
    smaller, removal = remove_dead(scaled, (x, step))
    assert removal.removed == {"one": 3}
    other = torch.tensor([0.1, 2.0, -3.0, 40.0])
    torch.testing.assert_close(smaller(x, other), scaled(x, other))


def test_the_mlp_of_a_vision_transformer() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(8, 4, 2, 2, 16, 32, num_classes=3).eval()
    nn.init.normal_(net.heads.head.weight)
    for block in net.encoder.layers:
        kill(block.mlp[0], list(range(0, 32, 2)))
    x = torch.randn(3, 3, 8, 8)
    smaller, removal = remove_dead(net, x)
    assert removal.removed == {f"encoder.layers.encoder_layer_{i}.mlp.0": 16 for i in range(2)}
    assert smaller.encoder.layers[0].mlp[3].in_features == 16
    torch.testing.assert_close(smaller(x), net(x), rtol=1e-5, atol=1e-5)


def test_a_carrier_that_nobody_reads_any_more_goes_too() -> None:
    torch.manual_seed(0)
    four = [nn.Conv2d(2, 4, 1), nn.Sigmoid(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()]
    net = nn.Sequential(*four, nn.Conv2d(4, 2, 1))
    kill(net[0], [0, 1])
    net[2].weight.data[1:, :2] = 0  # read by channel 0 alone,
    net[4].weight.data[1:, 0] = 0  # which is read by channel 0 alone,
    net[6].weight.data[:, 0] = 0  # which nobody reads
    x = torch.randn(3, 2, 5, 5)
    smaller, removal = remove_dead(net, x)
    assert (removal.removed, removal.carriers) == ({"0": 2, "2": 1, "4": 1}, {})
    torch.testing.assert_close(smaller(x), net(x))


def test_a_model_with_masks_of_torch_must_make_them_permanent() -> None:
    from torch.nn.utils import prune

    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    prune.ln_structured(net[0], "weight", 0.5, n=2, dim=0)
    with pytest.raises(ValueError, match=r"Sequential cannot be copied \(.*make masks of torch.nn.utils.prune permanent"):
        remove_dead(net, torch.randn(3, 4))
    prune.remove(net[0], "weight")
    assert remove_dead(net, torch.randn(3, 4))[1].removed == {"0": 3}
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(net[0])
    with pytest.raises(ValueError, match=r"cannot be copied \(.*remove_weight_norm or remove_parametrizations"):
        remove_dead(net, torch.randn(3, 4))
    nn.utils.remove_weight_norm(net[0])


class Returning(nn.Module):
    """A dead neuron, and outputs of any kind."""

    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(4, 6), nn.Linear(6, 3), last
        kill(self.one, [1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.two(torch.relu(self.one(x)))
        return x, self.last(x)


def test_infinite_and_empty_outputs_can_be_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 4)
    for last in (lambda y: y.masked_fill(y > 0, -torch.inf), lambda y: y[y[:, 0] > 1e6]):
        net = Returning(last).eval()
        assert remove_dead(net, x)[1].removed == {"one": 1}
        report = export_ladder(net, x, tmp_path / "out", rounds=0, rungs=["plain"], overwrite=True)
        assert report.rungs["plain"].file == "plain.pt"
    assert difference(torch.tensor([torch.inf, 2.0]), torch.tensor([torch.inf, 1.0])) == (1.0, 2.0)
    assert difference(torch.tensor([torch.inf, 2.0]), torch.tensor([9.0, 2.0])) == (math.inf, 2.0)


def test_a_model_that_returns_something_else_each_time_is_refused(tmp_path: Path) -> None:
    net = Returning(lambda y: y + torch.randn_like(y)).eval()
    x = torch.randn(5, 4)
    for export in (remove_dead, partial(export_ladder, to=tmp_path / "out", rounds=0)):
        with pytest.raises(ValueError, match="Returning returns something else at each call in evaluation mode"):
            export(net, x)


class Padded(nn.Module):
    """torch's encoder, which packs padded samples into nested tensors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.out = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor, padded: Tensor) -> Tensor:
        out: Tensor = self.out(self.encoder(x, src_key_padding_mask=padded)[:, 0])
        return out


def test_an_encoder_for_padded_inputs_loses_neurons_and_gets_kernels() -> None:
    torch.manual_seed(0)
    net = Padded().eval()
    for layer in net.encoder.layers:
        kill(layer.linear1, list(range(8)))
        layer.linear1.bias.data[:8] = 0
    padded = torch.arange(5) >= torch.tensor([[5], [3], [2]])
    inputs = torch.randn(3, 5, 8), padded
    before = net(*inputs)
    smaller, removal = remove_dead(net, inputs)
    assert removal.removed == {f"encoder.layers.{i}.linear1": 8 for i in range(2)}
    torch.testing.assert_close(smaller(*inputs), before, rtol=1e-5, atol=1e-5)
    assert net.encoder.use_nested_tensor, "the model given stays as it is"
    assert merge_layers(net, inputs, rounds=0)[1].merged == []
    fast = use_kernels(copy.deepcopy(net), {f"encoder.layers.{i}.linear1": "csr" for i in range(2)})
    torch.testing.assert_close(fast(*inputs), before, rtol=1e-5, atol=1e-5)


def test_a_group_that_changes_outputs_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    kill(net[0], [1])
    monkeypatch.setattr("lightning_sparse.export.removal._fold", lambda *_: None)
    net[0].bias.data[1] = 3.0
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="'0': without it outputs change by"):
        remove_dead(net, x)
    deeper = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), net[0], nn.ReLU(), net[2])
    deeper[2].weight.data[:, 3] = 0  # nobody reads it, so nothing has to be folded
    smaller, removal = remove_dead(deeper, x)
    assert removal.removed == {"0": 1}
    assert "outputs change" in removal.refused["4"]
    torch.testing.assert_close(smaller(x), deeper(x))


def test_nothing_to_remove_and_nothing_to_trace() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="no neuron, filter or channel in it is dead. Train with structure="):
        remove_dead(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), x)

    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.one(x).detach()
            return out

    with pytest.raises(ValueError, match="Detached cannot be traced by Torch-Pruning"):
        remove_dead(Detached(), x)


def test_all_dead_leaves_one() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    kill(net[0], list(range(6)))
    smaller, _ = remove_dead(net, torch.randn(3, 4))
    assert smaller[0].out_features == 1
    torch.testing.assert_close(smaller(torch.ones(2, 4)), net(torch.ones(2, 4)))


def test_another_engine_may_answer_which_channels_are_coupled(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def by_hand(network: nn.Module, call: Call) -> Mapping[str, Sequence[Member]]:
        """Of two linear layers, and an output that this engine does not follow."""
        asked.append((network.training, call.network, call.samples))
        both = {channel: [channel] for channel in range(network.get_submodule("0").out_features)}
        out = [Member("2", True, {0: [0], 1: [1]}), Member(None, False, {0: [0], 1: [1]}, "it is what comes out")]
        return {"0": [Member("0", True, both), Member("2", False, both)], "2": out}

    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    kill(net[0], [1, 4])
    kill(net[2], [0])
    x = torch.randn(3, 4)
    smaller, removal = remove_dead(net, x, engine=by_hand)
    torch.testing.assert_close(smaller(x), net(x))
    assert removal.removed == {"0": 2}
    assert removal.refused == {"2": "it is what comes out"}
    assert set(asked) == {(False, "", 3)}
    assert coupled_outputs(net, x, engine=by_hand) == [["0"]]


def test_a_layer_is_fed_by_those_before_it_alone() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
            self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = x.relu_() + self.second(x)
            return self.last(self.depthwise(x + self.third(x)))  # type: ignore[no-any-return]

    graph = Dependencies(Stream(), torch.randn(2, 4, 8, 8))
    assert graph.sources("second", through=True) == {"first"}
    assert graph.sources("third", through=True) == {"first", "second"}
    assert graph.sources("last", through=True) == {"first", "second", "third"}
    assert graph.sources("last", through=False) == {"depthwise"}
    assert graph.sources("first", through=True) == set()
