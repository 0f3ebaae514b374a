"""The condensed form of layers with constant fan-in, beside the dense layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_sparse.export import CondensedLinear, choose_kernels, export_ladder, load_model, use_kernels
from lightning_sparse.functional import fan_in_mask


def layer(inputs: int, outputs: int, fan_in: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    made = nn.Linear(inputs, outputs, bias)
    made.weight.data.mul_(fan_in_mask(torch.rand(outputs, inputs), fan_in))
    return made


@pytest.mark.parametrize("shape", [(5, 12), (1, 12), (2, 3, 12), (12,)])
@pytest.mark.parametrize("bias", [True, False])
def test_computes_what_the_dense_layer_does(shape: tuple[int, ...], bias: bool) -> None:
    dense = layer(12, 7, 4, bias)
    dense.weight.data[2] = 0  # an output that was ablated
    x = torch.randn(shape)
    torch.testing.assert_close(CondensedLinear(dense)(x), dense(x))
    torch.testing.assert_close(CondensedLinear(dense.double())(x.double()), dense(x.double()))


def test_a_row_holds_its_inputs_in_order() -> None:
    dense = layer(12, 7, 4)
    condensed = CondensedLinear(dense)
    for row in range(7):
        places = dense.weight[row].nonzero().flatten()
        assert condensed.indices[row].tolist() == places.tolist()
        assert condensed.values[row].equal(dense.weight[row, places])
    assert {name: tuple(value.shape) for name, value in condensed.state_dict().items()} == {
        "indices": (7, 4),
        "values": (7, 4),
        "bias": (7,),
    }


def test_what_has_no_constant_fan_in_is_refused() -> None:
    dense = layer(12, 7, 4)
    dense.weight.data[3] *= torch.arange(12) > 6
    with pytest.raises(ValueError, match=r"the same number of weights in every output, but one has 4, another \d; train"):
        CondensedLinear(dense)
    with pytest.raises(ValueError, match="in every output, but there is none"):
        use_kernels(nn.Sequential(nn.Linear(2, 2, bias=False).requires_grad_(False).apply(empty)), {"0": "condensed"})


def empty(module: nn.Module) -> None:
    nn.init.zeros_(module.weight)  # type: ignore[arg-type]


def test_the_ladder_stores_and_loads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(layer(256, 128, 12), nn.ReLU(), nn.Linear(128, 4)).eval()
    x = torch.randn(16, 256)
    (first, _) = choose_kernels(net, x, rounds=1)
    assert "condensed" in first.milliseconds

    class Timing:
        def __init__(self, name: str) -> None:
            self.median = 1.0 if name == "condensed" else 2.0

    monkeypatch.setattr(
        "lightning_sparse.export.kernels.interleaved", lambda calls, rounds: {name: Timing(name) for name in calls}
    )
    export_ladder(net, x, tmp_path / "out", rungs=["kernels"], rounds=1)
    bare = nn.Sequential(nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 4))
    again = load_model(bare, tmp_path / "out/kernels.safetensors")
    assert isinstance(again[0], CondensedLinear)
    torch.testing.assert_close(again(x), net(x))


def test_a_transformer_calls_it_instead_of_reading_its_weight() -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True).eval()
    net.linear1.weight.data.mul_(fan_in_mask(torch.rand(64, 16), 3))
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(use_kernels(net, {"linear1": "condensed"})(x), expected)
