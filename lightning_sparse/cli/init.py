"""`lightning-sparse init DIR`: configurations and a training script to edit."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_sparse.cli.configs import find_config

__all__ = ["init"]

SCRIPT = '''"""The same training as `lightning-sparse fit`, in Python: `python train.py`."""

import lightning as L
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from lightning_sparse import AtomicCheckpointIO, MagnitudePruning, SparsityMonitor
from lightning_sparse.data import Digits


class Net(L.LightningModule):
    """Put your own module here: nothing in it is specific to sparsity."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.layers(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/accuracy", (self.layers(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.1, momentum=0.9)


if __name__ == "__main__":
    L.seed_everything(1)
    trainer = L.Trainer(
        max_epochs=10,
        default_root_dir="runs",
        callbacks=[MagnitudePruning(sparsity=0.9), SparsityMonitor()],
        plugins=[AtomicCheckpointIO()],  # a kill or a full disk leaves the previous checkpoint intact
    )
    trainer.fit(Net(), Digits(batch_size=64))
'''
EXPERIMENT = """# An experiment to edit. Run it from this folder:
#     lightning-sparse fit --config experiment.yaml --config method.yaml
# With another method (`lightning-sparse methods` lists them):
#     lightning-sparse fit --config experiment.yaml --config methods/rigl --trainer.callbacks.sparsity=0.95
# All that can be set:
#     lightning-sparse fit --config experiment.yaml --print_config
seed_everything: 1
trainer:
  max_epochs: 10
  accelerator: auto
  default_root_dir: runs
  callbacks+:
    - class_path: SparsityMonitor # the table, and report.html in the folder of the run
model:
  class_path: Classifier # or your own LightningModule: package.module.Class
  init_args:
    network:
      class_path: lightning_sparse.models.ResNet
      init_args:
        depth: 8
data:
  class_path: Digits # or your own LightningDataModule
  init_args:
    batch_size: 64
"""


def init(args: list[str]) -> None:
    """Write `experiment.yaml`, `method.yaml` and `train.py` into a folder."""
    parser = argparse.ArgumentParser("lightning-sparse init", description="Write configurations and a script to edit.")
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write; existing files are left alone")
    folder: Path = parser.parse_args(args).folder
    files = {
        "experiment.yaml": EXPERIMENT,
        "method.yaml": Path(find_config("methods/magnitude")).read_text(),
        "train.py": SCRIPT,
    }
    if there := [name for name in files if (folder / name).exists()]:
        raise ValueError(f"'{folder}' already holds {there[0]}; give a new folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise ValueError(f"'{folder}' cannot be written ({error.strerror}); give another folder.") from error
    print(f"{folder}: {', '.join(files)}")
    print(f"Next: cd {folder} && lightning-sparse fit --config experiment.yaml --config method.yaml")
