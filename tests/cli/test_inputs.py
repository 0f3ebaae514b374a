"""What an export from the command line is verified on, where a batch is more than a tensor and its label."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_sparse.cli.export import inputs_of
from lightning_sparse.core import join
from lightning_sparse.export import export_ladder
from tests.helpers.structured import Dictionary, Diffusion, HuggingFace, Tokens, data_for


class Data(L.LightningDataModule):
    def __init__(self, module: L.LightningModule) -> None:
        super().__init__()
        self.module = module

    def train_dataloader(self) -> DataLoader[Any]:
        return data_for(self.module)

    test_dataloader = train_dataloader


def test_the_first_tensor_or_what_the_network_is_called_with() -> None:
    module: Any = Diffusion()
    plain = next(inputs_of(module, Data(module), "test"))
    assert plain.network is None
    assert [tensor.shape for tensor in plain.tensors] == [(4, 1, 8, 8)]
    call = next(inputs_of(module, Data(module), "test", "net"))
    assert call.network == "net"
    assert [tensor.dtype for tensor in call.tensors] == [torch.float32, torch.int64]
    assert call.kwargs == {"scale": 0.5}
    module = HuggingFace()
    call = next(inputs_of(module, Data(module), "train"))
    assert call.network == "net"
    assert list(call.kwargs) == ["input_ids", "attention_mask", "labels"]
    whole = join(list(inputs_of(module, Data(module), "test")))
    assert whole.samples == 8
    assert whole.first(5).kwargs["labels"].equal(torch.cat([call.kwargs["labels"]] * 2)[:5])
    module = Tokens()
    assert next(inputs_of(module, Data(module), "test", "net.wide")).tensors[0].shape == (4, 6, 8)


class Both(HuggingFace):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 4)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.other(self.net(**batch).logits).sum()


class Broken(HuggingFace):
    def training_step(self, batch: Any) -> Any:
        return self.net(**batch).loss + self.trainer.current_epoch


@pytest.mark.parametrize(
    ("module", "network", "sentence"),
    [
        (Both, None, r"training_step of Both calls \['net', 'other'\], so it is unclear .*; set --network=NAME"),
        (HuggingFace, "encoder", r"network='encoder' is not a submodule of HuggingFace; it has \['net'\]"),
        (Broken, None, "training_step of Broken fails outside of a run, .*; call export_ladder from Python"),
    ],
)
def test_what_is_unclear_is_refused(module: Any, network: str | None, sentence: str) -> None:
    made = module()
    with pytest.raises(ValueError, match=sentence):
        next(inputs_of(made, Data(made), "test", network))


def test_inputs_that_do_not_fit_are_refused(tmp_path: Any) -> None:
    with pytest.raises(
        ValueError, match="Dictionary cannot be called with these inputs .*; give its arguments as a tuple or"
    ):
        export_ladder(Dictionary(), {"image": torch.ones(2, 1, 8, 8)}, tmp_path / "out")
