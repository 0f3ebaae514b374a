"""Dead channels leave networks of every shape, and no output changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse.export import count_parameters, coupled_outputs, load_model, remove_dead, save_model
from lightning_sparse.export.blueprint import carry_optimizer
from lightning_sparse.export.dead import constants_of
from lightning_sparse.models import ResNet

tp = pytest.importorskip("torch_pruning")


def kill(layer: nn.Module, outputs: list[int], dim: int = 0) -> None:
    """What a mask of channels does: weights are zero, biases and normalisation stay."""
    assert isinstance(layer.weight, nn.Parameter)
    layer.weight.data.index_fill_(dim, torch.tensor(outputs), 0.0)


def unsettle(net: nn.Module, seed: int = 0) -> nn.Module:
    """Normalisations and biases that emit something, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            for tensor in (part.weight.data, part.bias.data, part.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            part.running_var.copy_(torch.rand(part.running_var.shape, generator=generator) + 0.5)
    return net.eval()


class Block(nn.Module):
    """Two convolutions with normalisation around a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.two, self.norm2 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm2(self.two(F.relu(self.norm1(self.one(x))))))


class Residual(nn.Module):
    """A stream of channels that a stem and two blocks write to."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.fc = nn.Conv2d(2, 8, 3, padding=1), nn.Sequential(Block(8), Block(8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.blocks(F.relu(self.stem(x))).mean((2, 3)))
        return out


class Concatenated(nn.Module):
    """Two branches side by side, read by a convolution that pads and by one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(2, 4, 1)
        self.padded, self.bare = nn.Conv2d(10, 5, 3, padding=1), nn.Conv2d(10, 5, 3)
        self.fc = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([torch.sigmoid(self.left(x)), F.gelu(self.right(x))], 1)
        out: Tensor = self.fc(torch.cat([F.relu(self.padded(both)).mean((2, 3)), F.relu(self.bare(both)).mean((2, 3))], 1))
        return out


class Dense(nn.Module):
    """Every layer reads all layers before it, side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1)
        self.layers = nn.ModuleList(nn.Conv2d(4 + 4 * n, 4, 3, padding=1) for n in range(4))
        self.fc = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class Grouped(nn.Module):
    """Convolutions in groups: two, and one per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 1)
        self.halves = nn.Conv2d(8, 12, 3, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.norm = nn.BatchNorm2d(12)
        self.last = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.halves(F.relu(self.stem(x))))
        out: Tensor = self.last(F.relu(self.norm(self.depthwise(x)))).mean((2, 3))
        return out


def residual() -> tuple[nn.Module, dict[str, int]]:
    net = Residual()
    for layer in (net.stem, net.blocks[0].two, net.blocks[1].two):
        kill(layer, [1, 4, 6])
    kill(net.blocks[0].one, [0, 2, 4, 5])
    kill(net.blocks[1].one, [3])  # dead alone: it would have to be its own carrier
    return net, {"stem": 2, "blocks.0.two": 2, "blocks.1.two": 2, "blocks.0.one": 3}  # one of each stays as a carrier


def concatenated() -> tuple[nn.Module, dict[str, int]]:
    net = Concatenated()
    kill(net.left, [0, 1, 5])
    kill(net.right, [2, 3])
    return net, {"left": 2, "right": 1}  # a carrier in each branch, for the convolution that pads


def dense() -> tuple[nn.Module, dict[str, int]]:
    net = Dense()
    for number, layer in enumerate(net.layers):
        kill(layer, [number % 4, (number + 2) % 4])
        layer.bias.data[number % 4] = -1.0  # the other emits something
        layer.bias.data[(number + 2) % 4] = 0.5 * number
    return net, {"layers.0": 2, "layers.1": 1, "layers.2": 1, "layers.3": 2}  # the last is read by no convolution


def split() -> tuple[nn.Module, dict[str, int]]:
    """Groups of which one has a constant that none can carry for the others."""
    net = nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    kill(net[0], [0, 1, 4, 5, 6])
    net[0].bias.data[:] = -1.0
    net[0].bias.data[0] = 1.0
    return net, {"0": 2}


def grouped() -> tuple[nn.Module, dict[str, int]]:
    net = Grouped()
    net.stem.bias.data.clamp_(max=-0.1)  # dead channels emit nothing
    kill(net.stem, [0, 1, 6])  # two of one half and one of the other: halves must stay equal
    kill(net.depthwise, [1, 2, 7])
    net.last.weight.data[:, [3, 8]] = 0  # nobody reads them: 1, 2, 3 of one half, 7, 8 of the other
    return net, {"stem": 2, "halves": 4, "depthwise": 4}


def transposed() -> tuple[nn.Module, dict[str, int]]:
    net = nn.Sequential(
        nn.ConvTranspose2d(2, 6, 2), nn.ReLU(), nn.ConvTranspose2d(6, 3, 3), nn.Sigmoid(), nn.Conv2d(3, 2, 1)
    )
    kill(net[0], [0, 3, 4], dim=1)
    net[0].bias.data.fill_(0.5)
    return net, {"0": 2}  # places at the border get less of a constant


def flattened() -> tuple[nn.Module, dict[str, int]]:
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(54, 9),
        nn.ReLU(),
        nn.Linear(9, 4),
    )
    kill(net[0], [1, 2, 5])
    net[7].weight.data[:, 3] = 0  # a neuron that nobody reads
    return net, {"0": 3, "5": 1}


NETS = [residual, concatenated, dense, grouped, split, transposed, flattened]


@pytest.mark.parametrize("make", NETS)
def test_outputs_are_equal_and_dead_channels_gone(make: Callable[[], tuple[nn.Module, dict[str, int]]]) -> None:
    torch.manual_seed(0)
    net, dead = make()
    unsettle(net)
    x = torch.randn(7, 2, 8, 8)
    before = net(x)
    smaller, removal = remove_dead(net, x)
    torch.testing.assert_close(smaller(x), before, rtol=1e-5, atol=1e-5)
    other = torch.randn(3, 2, 8, 8) * 5
    torch.testing.assert_close(smaller(other), net(other), rtol=1e-5, atol=1e-5)
    assert type(smaller) is type(net)
    assert torch.equal(net(x), before), "the model given stays as it is"
    assert {name: gone for name, gone in removal.removed.items() if name in dead} == dead, removal.carriers
    assert count_parameters(smaller) < count_parameters(net)


@pytest.mark.parametrize("make", NETS)
def test_a_new_model_becomes_the_smaller_one_from_its_file(
    make: Callable[[], tuple[nn.Module, dict[str, int]]], tmp_path: object
) -> None:
    torch.manual_seed(0)
    net = unsettle(make()[0])
    x = torch.randn(4, 2, 8, 8)
    smaller, removal = remove_dead(net, x)
    save_model(smaller, f"{tmp_path}/net.safetensors", removal.blueprint)
    again = load_model(make()[0].eval(), f"{tmp_path}/net.safetensors")
    assert torch.equal(again(x), smaller(x))
    for (name, a), (other, b) in zip(smaller.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"has not; build it as it was trained|holds another model"):
        load_model(nn.Sequential(nn.Linear(2, 2)), f"{tmp_path}/net.safetensors")


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


def test_what_is_not_dead_stays_with_the_reason() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    normed = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    kill(normed[0], [1])
    kill(normed[3], [2])
    smaller, removal = remove_dead(normed, x)
    assert removal.removed == {"3": 1}
    assert removal.refused["0"] == "LayerNorm '1' takes them all together"
    torch.testing.assert_close(smaller(x), normed(x))
    softmax = nn.Sequential(nn.Linear(8, 6), nn.Softmax(1), nn.Linear(6, 2))
    kill(softmax[0], [1])
    with pytest.raises(ValueError, match=r"'0': Softmax may mix its channels. Train with structure"):
        remove_dead(softmax, x)
    tied = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    tied[2].weight = tied[0].weight
    kill(tied[0], [1])
    with pytest.raises(ValueError, match="'0' shares its weight with another layer"):
        remove_dead(tied, x)
    outputs = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    kill(outputs[2], [1])
    with pytest.raises(ValueError, match="the model puts it out"):
        remove_dead(outputs, x)


def test_a_position_that_is_added_to_a_dead_channel_keeps_it() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 2)
            self.register_buffer("where", torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(self.one(x) + self.where)
            return out

    torch.manual_seed(0)
    net = Positions()
    kill(net.one, [0, 1])
    with pytest.raises(ValueError, match="nothing in Positions can be removed"):
        remove_dead(net, torch.randn(3, 5, 4))


def test_layers_that_write_to_one_stream_are_coupled() -> None:
    x = torch.randn(2, 2, 8, 8)
    assert coupled_outputs(Residual(), x) == [["blocks.0.one"], ["blocks.0.two", "blocks.1.two", "stem"], ["blocks.1.one"]]
    assert coupled_outputs(Grouped(), x) == [["depthwise", "halves"], ["stem"]]


def test_a_number_is_constant_only_if_every_place_and_every_input_has_it() -> None:
    net = nn.Conv2d(4, 1, 1)
    x = torch.randn(2, 4, 3, 3)
    x[:, 0], x[:, 1], x[0, 2], x[1, 2] = 1.5, 0.0, 1.0, 1.01
    assert constants_of(net, [x]) == {net: {0: 1.5, 1: 0.0}}
    assert constants_of(net, [x, x * (1 + 2e-7)])[net].keys() == {0, 1}
    assert constants_of(net, [x, x + 1]) == {net: {}}
    linear = nn.Linear(3, 1)
    assert constants_of(linear, [torch.tensor([[[1.0, 2.0, 3.0], [1.0, 2.0, 4.0]]])]) == {linear: {0: 1.0, 1: 2.0}}


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
    with pytest.raises(ValueError, match="no neuron, filter or channel of it is dead. Train with structure="):
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


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_optimizer_goes_on_with_its_moments(kind: type[torch.optim.Optimizer]) -> None:
    """Trained on with the smaller model, weights are what they would have been in the whole one under its mask."""
    torch.manual_seed(0)
    net = ResNet(4, 1, 8, depth=8).double()
    dead = {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            dead[name] = list(range(0, layer.out_channels, 2))
            kill(layer, dead[name])
        if isinstance(layer, nn.BatchNorm2d):  # dead channels emit nothing, and learn nothing that is read
            layer.bias.data[::2] = -9.0
    for part in net.modules():  # in training mode the two would differ by what the normalisation of dead channels learns
        if isinstance(part, nn.BatchNorm2d):
            part.requires_grad_(False)
    options = {"lr": 0.01} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    optimizer = kind(net.parameters(), **options)
    x, y = torch.randn(16, 1, 8, 8, dtype=torch.double), torch.randint(0, 4, (16,))

    def step(module: nn.Module) -> None:
        optimizer.zero_grad()
        F.cross_entropy(module.eval()(x), y).backward()
        optimizer.step()

    def mask() -> None:
        for name, outputs in dead.items():
            kill(net.get_submodule(name), outputs)

    for _ in range(3):
        step(net)
        mask()
    smaller, removal = remove_dead(net, x)
    twin_optimizer = kind(net.parameters(), **options)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    carry_optimizer(optimizer, net, smaller, removal.blueprint)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in smaller.parameters()}
    for _ in range(3):
        step(smaller)
    optimizer = twin_optimizer
    for _ in range(3):
        step(net)
        mask()
    expected, _ = remove_dead(net, x)
    for (name, a), (_, b) in zip(smaller.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_a_memory_that_cannot_be_cut_is_refused() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    kill(net[0], [0])
    optimizer = torch.optim.Adafactor(net.parameters())
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    kill(net[0], [0])
    smaller, removal = remove_dead(net, torch.randn(3, 4))
    with pytest.raises(ValueError, match="of Adafactor has the shape"):
        carry_optimizer(optimizer, net, smaller, removal.blueprint)
    with pytest.raises(ValueError, match="give the model it was made for"):
        carry_optimizer(optimizer, nn.Linear(1, 1), smaller, removal.blueprint)
