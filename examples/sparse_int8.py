"""A sparse network for int8: trained sparse, fine-tuned with its masks frozen and its weights rounded, then exported.

    python examples/sparse_int8.py              under a minute on two cores, with the digits that come with scikit-learn
    python examples/sparse_int8.py --to FOLDER  keep the files

Four of five weights are zero after the first training. The second one needs only `KeepSparsity` and `QuantizationAware`: the
former keeps the zeros, the latter shows the network its weights and inputs as int8 will round them. The optimizer moves the
underlying dense weights, and every checkpoint is a plain state dict on the int8 grid.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sparse import KeepSparsity, MagnitudePruning, QuantizationAware
from lightning_sparse.data import Digits
from lightning_sparse.export import Quantization, export_ladder
from lightning_sparse.models import Classifier, ResNet


def trainer(folder: str, callbacks: list[L.Callback], epochs: int) -> L.Trainer:
    """A Trainer that writes only its last checkpoint."""
    last = ModelCheckpoint(folder, "last", save_top_k=1)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return L.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=[*callbacks, last], default_root_dir=folder, **quiet)


@torch.no_grad()
def accuracy(model: torch.nn.Module, data: Digits) -> float:
    """Accuracy on held-out images."""
    right = [(model(x).argmax(1) == y).float() for x, y in data.test_dataloader()]
    return float(torch.cat(right).mean())


def zeros(model: torch.nn.Module) -> int:
    """The number of zeros in all weights of convolutions and linear layers."""
    return sum(int((weight == 0).sum()) for weight in model.parameters() if weight.ndim > 1)


def network() -> Classifier:
    """A small ResNet for images of 8x8 pixels."""
    return Classifier(lambda *shape: ResNet(*shape, depth=8), num_classes=10, in_channels=1, image_size=8)


def main(to: str, epochs: int) -> None:
    """Run all three steps."""
    data = Digits()
    L.seed_everything(0, verbose=False)

    sparse = network()
    trainer(f"{to}/sparse", [MagnitudePruning(0.8)], epochs).fit(sparse, data)
    state = torch.load(f"{to}/sparse/last.ckpt", weights_only=True)["state_dict"]
    sparse.load_state_dict(state)
    print(f"trained sparse:      {accuracy(sparse.eval(), data):.4f} with {zeros(sparse):,} zeros")

    ready = network()
    ready.load_state_dict(state)
    trainer(f"{to}/ready", [KeepSparsity(), QuantizationAware()], max(1, epochs // 3)).fit(ready, data)
    ready.load_state_dict(torch.load(f"{to}/ready/last.ckpt", weights_only=True)["state_dict"])  # plain, loaded strictly
    print(f"made ready for int8: {accuracy(ready.eval(), data):.4f} with {zeros(ready):,} zeros")

    batches = [x for x, _ in data.train_dataloader()][:8]
    inputs = next(iter(data.test_dataloader()))[0]
    report = export_ladder(
        ready,
        inputs,
        f"{to}/deployed",
        rungs=["plain", "onnx", "int8"],
        evaluate=lambda model: {"accuracy": accuracy(model, data)},
        quantization=Quantization(batches, tolerance=0.005),
        compiled=False,
        overwrite=True,
    )
    print(report)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", help="a folder for checkpoints and exports, instead of one that is thrown away")
    parser.add_argument("--epochs", type=int, default=15, help="of the sparse training; fine-tuning takes a third of them")
    given = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if given.to:
        Path(given.to).mkdir(parents=True, exist_ok=True)
        main(given.to, given.epochs)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(temporary, given.epochs)
