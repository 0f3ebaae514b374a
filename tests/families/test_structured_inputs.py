"""Networks that take more than one tensor, under methods that must call them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_sparse import GraSP, MagnitudePruning, SparsityMonitor, SynFlow
from lightning_sparse.testing import Toy, loader, network, toy, trainer
from tests.helpers.structured import MODULES, Diffusion, Tokens, data_for

pytest.importorskip("torch_pruning")
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Trying to infer the `batch_size`")

HIDDEN = {
    "diffusion": ("net.wide",),
    "tokens": ("net.wide",),
    "dictionary": ("net.layers.1", "net.layers.3"),
    "hugging face": ("net.encoder.wide",),
}


def built(name: str) -> Any:
    torch.manual_seed(0)
    return MODULES[name]()


def alive(module: nn.Module, name: str) -> Tensor:
    return module.get_submodule(name).weight.flatten(1).any(1)


@pytest.mark.parametrize("name", MODULES)
def test_channels_are_coupled_whatever_the_network_takes(name: str) -> None:
    module = built(name)
    method = MagnitudePruning(0.5, structure="coupled", allocation="uniform", start=0, end=0)
    trainer(method, max_epochs=1).fit(module, data_for(module))
    for layer in HIDDEN[name]:
        channels = alive(module, layer)
        assert int(channels.sum()) == len(channels) // 2
        assert module.get_submodule(layer).bias.ne(0).equal(channels)


@pytest.mark.parametrize("name", MODULES)
def test_flow_goes_through_whatever_the_network_takes(name: str) -> None:
    module, method = built(name), SynFlow(0.5, iterations=5)
    trainer(method, max_epochs=1).fit(module, data_for(module))
    assert method.masks.kept == method.masks.total // 2


def test_a_loss_beside_outputs_does_not_flow() -> None:
    found = []
    for labeled in (True, False):
        module, method = built("hugging face"), SynFlow(0.5, iterations=5, network="net" if labeled else "net.encoder")
        trainer(method, max_epochs=1).fit(module, data_for(module))
        found.append({name: method.masks[name] for name in method.masks})
    assert all(mask.equal(found[1][name]) for name, mask in found[0].items())


def test_ones_replace_floating_numbers_and_integers_stay() -> None:
    module, seen = Diffusion(), []

    class Seeing(type(module.net)):  # type: ignore[misc]
        def forward(self, x: Tensor, t: Tensor, *, scale: float = 1.0) -> Tensor:
            seen.append((x.clone(), t.clone(), scale))
            return super().forward(x, t, scale=scale)

    module.net.__class__ = Seeing
    trainer(SynFlow(0.5, iterations=1), max_epochs=1).fit(module, data_for(module))
    (_, first, _), (x, t, scale) = seen[:2]
    assert x.equal(torch.ones(1, 1, 8, 8, dtype=torch.float64))
    assert t.dtype == torch.int64
    assert t.equal(first[:1])
    assert scale == 0.5


@pytest.mark.parametrize("name", MODULES)
def test_gradients_at_initialization_and_the_monitor(name: str) -> None:
    module, monitor = built(name), SparsityMonitor(table=False, report=False)
    trainer(GraSP(0.5), monitor, max_epochs=1).fit(module, data_for(module))
    assert monitor.macs


@pytest.mark.parametrize("name", MODULES)
def test_a_resumed_run_needs_no_batch_to_couple_channels(name: str, tmp_path: Path) -> None:
    def pruning() -> MagnitudePruning:
        return MagnitudePruning(0.5, structure="coupled", allocation="uniform", start=0, end=0)

    module, method = built(name), pruning()
    saver = ModelCheckpoint(tmp_path, save_last=True)
    trainer(method, saver, max_epochs=1).fit(module, data_for(module))
    state = torch.load(saver.last_model_path, weights_only=True)["callbacks"]
    assert any("traced" in value.get("memory", {}) for value in state.values() if isinstance(value, dict))
    again, resumed = built(name), pruning()

    class Again(type(again)):  # type: ignore[misc]
        def training_step(self, *args: Any) -> Any:
            assert self is again, "no copy is called"
            return super().training_step(*args)

    again.__class__ = Again
    trainer(resumed, max_epochs=2).fit(again, data_for(again), ckpt_path=saver.last_model_path)
    assert method.vectors is None
    assert all(resumed.masks[layer].equal(method.masks[layer]) for layer in method.masks)
    assert {n: v.tolist() for n, v in resumed.traced["units"].items()} == {
        n: v.tolist() for n, v in method.traced["units"].items()
    }


class Pair(Toy):
    """Two networks of which training calls one after the other, and a third that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 8))
        self.decoder = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 4))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.decoder(self.encoder(batch[0])), batch[1])


def test_every_network_that_is_called_is_coupled_in_itself(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    module, method = Pair(), MagnitudePruning(0.5, structure="coupled", allocation="uniform", start=0, end=0)
    with caplog.at_level("INFO"):
        trainer(method, max_epochs=1).fit(module, loader(), loader(1))
    assert int(alive(module, "encoder.1").sum()) == int(alive(module, "decoder.0").sum()) == 6
    assert "'encoder.3.weight' (it is an output of the model)" in caplog.text
    assert "'net.0.weight' (the outputs do not depend on it)" in caplog.text


@pytest.mark.parametrize("example", [torch.zeros(3, 6, dtype=torch.long), (torch.zeros(3, 6, dtype=torch.long),), "named"])
def test_an_example_is_read_as_lightning_reads_it(example: Any) -> None:
    module = Tokens()
    module.example_input_array = {"tokens": torch.zeros(3, 6, dtype=torch.long)} if example == "named" else example
    data = DataLoader([object()], batch_size=None)
    method = MagnitudePruning(0.5, structure="coupled", allocation="uniform", start=0, end=0)
    module.training_step = lambda batch, batch_idx: torch.zeros((), requires_grad=True)  # type: ignore[method-assign]
    trainer(method, max_epochs=1).fit(module, data)
    assert method.masks["net.wide.weight"].flatten(1).any(1).sum() == 16


class Failing(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise KeyError("image")


class Aside(Toy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.linear(batch[0].flatten(1), self.net[6].weight[:, :64]).sum()


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (
            Failing,
            "MagnitudePruning must record how training_step of Failing calls its network, but it fails on a copy",
        ),
        (
            Aside,
            "training_step calls no module that holds 'net.0.weight' on the first batch; set example_input_array in Aside",
        ),
    ],
)
def test_what_is_not_called_is_refused(module: type[Toy], sentence: str) -> None:
    with pytest.raises(ValueError, match="set example_input_array in") as error:
        trainer(MagnitudePruning(0.5, structure="coupled")).fit(module(), loader(), loader(1))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_plain_images_are_coupled_as_by_an_example() -> None:
    found = []
    for example in (None, torch.zeros(2, 1, 8, 8)):
        torch.manual_seed(0)
        module = toy(net=network(dropout=0))
        module.example_input_array = example
        method = MagnitudePruning(0.5, structure="coupled", start=0, end=0)
        trainer(method, max_epochs=1).fit(module, loader(), loader(1))
        found.append({name: value.clone() for name, value in module.state_dict().items()})
    assert all(value.equal(found[1][name]) for name, value in found[0].items())


def test_bert() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8,
        num_labels=4,
    )

    class Bert(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.BertForSequenceClassification(config)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    batch = {"input_ids": torch.randint(0, 20, (4, 6)), "labels": torch.randint(0, 4, (4,))}
    for method in (
        MagnitudePruning(0.5, structure="coupled", allocation="uniform", start=0, end=0),
        SynFlow(0.5, iterations=5, allocation="uniform"),
    ):
        trainer(method, max_epochs=1).fit(Bert(), DataLoader([batch], batch_size=None))
        assert method.masks.kept < method.masks.total
