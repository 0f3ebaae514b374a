"""Prune a trained timm image classifier, and fine-tune it with its dense self as a teacher.

    python examples/finetune_timm.py            a few minutes on two cores, with the digits that come with scikit-learn
    python examples/finetune_timm.py --quick    a tenth of all epochs, to check that it works

Convolutions and linear layers alike lose three fifths of their weights in one shot, by magnitude, by Wanda and by SparseGPT,
and are then fine-tuned for a few epochs.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import lightning as L
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse import Distillation, MagnitudePruning, SparseGPT, Wanda
from lightning_sparse.data import Digits

SPARSITY = 0.6
METHODS: dict[str, Callable[[], list[L.Callback]]] = {
    "magnitude": lambda: [MagnitudePruning(SPARSITY, start=0, end=0, allocation="uniform")],
    "Wanda": lambda: [Wanda(SPARSITY, batches=8)],
    "SparseGPT": lambda: [SparseGPT(SPARSITY, batches=8)],
    "SparseGPT, with its dense self as a teacher": lambda: [SparseGPT(SPARSITY, batches=8), Distillation()],
}


class Classifier(L.LightningModule):
    """A timm model, unchanged."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.model: nn.Module = timm.create_model("test_resnet", num_classes=10, in_chans=1)
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(_enlarged(batch[0])), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.01)


def _enlarged(images: Tensor) -> Tensor:
    """Enlarge the digits: they are eight pixels wide, and the model halves its input five times."""
    return F.interpolate(images, scale_factor=4)


@torch.no_grad()
def accuracy(model: Classifier, data: Digits) -> float:
    """Accuracy on held-out images."""
    was_training = model.training
    model.eval()
    right = [(model.model(_enlarged(x)).argmax(1) == y).float() for x, y in data.val_dataloader()]
    model.train(was_training)
    return float(torch.cat(right).mean())


class BeforeTheFirstStep(L.Callback):
    """Measures once, when all methods have started."""

    def __init__(self, data: Digits) -> None:
        self.data, self.accuracy = data, 0.0

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Classifier, *args: object) -> None:  # type: ignore[override]
        if trainer.global_step == 0:
            self.accuracy = accuracy(pl_module, self.data)


def train(model: Classifier, data: Digits, epochs: int, *callbacks: L.Callback) -> None:
    """Train on the CPU without output."""
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=epochs, callbacks=[*callbacks], accelerator="cpu", **quiet)  # type: ignore[arg-type]
    trainer.fit(model, data.train_dataloader())


def main() -> None:
    """Train, prune in each way, fine-tune, and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of all epochs")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore", ".*does not have many workers")
    L.seed_everything(0, verbose=False)
    data, dense = Digits(batch_size=64), Classifier(lr=2e-3)
    data.prepare_data()
    data.setup("fit")
    train(dense, data, 3 if quick else 30)
    print(f"\n| {SPARSITY:.0%} of all weights removed | pruned | trained on |\n| --- | --- | --- |")
    print(f"| nothing | {accuracy(dense, data):.4f} | |")
    for name, method in METHODS.items():
        L.seed_everything(0, verbose=False)
        model, before = Classifier(lr=5e-4), BeforeTheFirstStep(data)
        model.load_state_dict(dense.state_dict())
        train(model, data, 1 if quick else 10, *method(), before)
        print(f"| {name} | {before.accuracy:.4f} | {accuracy(model, data):.4f} |", flush=True)


if __name__ == "__main__":
    main()
