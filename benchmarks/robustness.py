"""Training runs that are killed by SIGKILL at random moments, resumed, and compared with an uninterrupted run.

    python -m benchmarks robustness                              all methods below, and Lightning's ModelPruning
    python -m benchmarks robustness --only gradual --rounds 10   one method, killed ten times

Each run is a process that saves a checkpoint every few steps and, when started, resumes from the newest readable checkpoint.
The results are the same if every weight, every buffer and every moment of the optimizer is bit-identical at the end. All
methods prune to 90%, ModelPruning with three removals of the same fraction. Data: scikit-learn's digits, on the CPU. Kills
in the middle of a write, and full disks, are in `writes.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from torch import Tensor

from benchmarks.accuracy import METHODS
from benchmarks.record import Options, Parts
from benchmarks.trainers import quiet
from lightning_sparse import LpSphere
from lightning_sparse.core import find_targets
from lightning_sparse.data import Digits
from lightning_sparse.models import Classifier, LeNet300

EPOCHS, EVERY = 20, 9
SPARSITY = 0.9


def lightnings() -> list[L.Callback]:
    """Lightning's own callback. Three removals of the same fraction leave a tenth of the weights."""
    share = 1 - (1 - SPARSITY) ** (1 / 3)
    return [ModelPruning("l1_unstructured", amount=lambda epoch: share if epoch in (4, 8, 12) else 0)]


OURS = ("gradual", "lottery ticket", "RigL", "GraNet", "HyperSparse", "SCL")
RUNS: dict[str, Callable[[], list[L.Callback]]] = {
    **{name: partial(METHODS[name], SPARSITY) for name in OURS},
    "LpSphere": lambda: [LpSphere(p=1.1, sparsity=SPARSITY, mode="feedback")],
    "ModelPruning": lightnings,
}


class Beat(L.Callback):
    """Report the progress of training to the parent process."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "step"

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.file.write_text(str(trainer.global_step))


def newest(folder: Path) -> Path | None:
    """The latest readable checkpoint. Newer ones, which were being written when the process died, are deleted."""
    for path in sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.rpartition("=")[2]), reverse=True):
        try:
            torch.load(path, weights_only=False)
            return path
        except (RuntimeError, EOFError, OSError):
            path.unlink()
    return None


def bits(trainer: L.Trainer) -> str:
    """A hash of every weight, every buffer and every moment of the optimizer."""
    moments = (state for optimizer in trainer.optimizers for state in optimizer.state_dict()["state"].values())
    states = [trainer.lightning_module.state_dict(), *moments]
    tensors = [tensor for state in states for _, tensor in sorted(state.items()) if isinstance(tensor, Tensor)]
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).hexdigest()


def train(name: str, folder: Path) -> None:
    """Start or resume the run in the child process, and record its final state."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    data = Digits(batch_size=64, seed=0)
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
    module = Classifier(LeNet300, 10, 1, data.image_size, sgd)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=EVERY, save_top_k=-1)
    trainer = quiet([*RUNS[name](), Beat(folder), saving], "cpu", max_epochs=EPOCHS, enable_checkpointing=True)
    trainer.fit(module, data, ckpt_path=newest(folder), weights_only=False)
    weights = [target.weight for target in find_targets(module)]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    end = {
        "bits": bits(trainer),
        "zeros": round(zeros, 5),
        "accuracy": round(trainer.test(module, data, verbose=False)[0]["test/accuracy"], 4),
        "steps": trainer.global_step,
    }
    (folder / "end.json").write_text(json.dumps(end))


def run(name: str, folder: Path, deaths: Sequence[int] = ()) -> dict[str, Any]:
    """Supervise one run from the parent process, killing it at these steps, which are counted over the whole run."""
    folder.mkdir()
    died: list[int] = []
    command = [sys.executable, "-m", "benchmarks.robustness", name, str(folder)]
    while not (folder / "end.json").exists():
        child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
        while child.poll() is None:
            beat = folder / "step"
            step = int(beat.read_text() or 0) if beat.exists() else 0
            if len(died) < len(deaths) and step >= deaths[len(died)]:
                child.send_signal(signal.SIGKILL)
                child.wait()
                beat.unlink()
                died.append(step)
            time.sleep(0.002)
        if child.returncode not in (0, -signal.SIGKILL):
            return {"error": child.stderr.read().strip().splitlines()[-1], "killed at": died}
    return {**json.loads((folder / "end.json").read_text()), "killed at": died}


def compare(name: str, kills: int, dice: random.Random) -> dict[str, Any]:
    """Compare an uninterrupted run with one that is killed."""
    with tempfile.TemporaryDirectory() as folder:
        whole = run(name, Path(folder) / "whole")
        deaths = sorted(dice.sample(range(2, whole["steps"] - 2), kills))
        killed = run(name, Path(folder) / "killed", deaths)
    return {"same end": killed.get("bits") == whole["bits"], "whole": whole, "killed": killed}


def parts(options: Options) -> Parts:
    dice = random.Random(0)
    for name in RUNS:
        yield (name,), partial(compare, name, options.times(4, quick=1), dice)


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
