"""Pruned weights in the same training run, with this package and with common implementations of masks.

    python -m benchmarks peers                        the table of the README
    python -m benchmarks peers --only fasterai        one implementation

A perceptron is trained on scikit-learn's digits with Adam and weight decay, and pruned once to 90% by magnitude in the
middle of training. `prune` and `parametrize` stand for what a careful user writes with them in an hour: a callback of a few
lines. Of fasterai (`pip install --no-deps fasterai fastcore einops`), the `Sparsifier` is used. A few lines of ours call it
after every batch, since its own callback is for fastai. Results for each implementation:

    seen          sparsity seen by a callback listed before it, in the validation after it, and in the last checkpoint
    loads         whether that checkpoint loads strictly into the plain network
    resumed       final sparsity of a run that is stopped two epochs after pruning and resumed from that checkpoint with new
                  objects; and whether all weights are bit-identical to those of the uninterrupted run
    moments       fraction of the pruned entries that have nonzero Adam state at the end
    averaged      sparsity of the final model of EMAWeightAveraging
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning
from torch import Tensor, nn
from torch.nn.utils import parametrize

from benchmarks.competitors import SPARSITY, Masks, layers, parametrized, torch_prune
from benchmarks.record import Options, Parts
from benchmarks.trainers import quiet
from benchmarks.turns import Way
from lightning_sparse import MagnitudePruning
from lightning_sparse.data import Digits
from lightning_sparse.models import Classifier, LeNet300

EPOCHS, AT, STOP = 8, 4, 6


class InTheMiddle(L.Callback):
    """A handwritten callback that prunes at the start of an epoch."""

    def __init__(self, way: Callable[[Any, Masks], Way]) -> None:
        self.way = way

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == AT:
            weights = {layer: layer.weight.detach().abs() for layer in layers(pl_module)}
            scores = torch.cat([weight.flatten() for weight in weights.values()])
            threshold = scores.kthvalue(round(SPARSITY * len(scores))).values
            self.way(pl_module, {layer: weight > threshold for layer, weight in weights.items()}).enter()


class ByFasterai(InTheMiddle):
    """fasterai's `Sparsifier`, which selects the weights itself."""

    def __init__(self) -> None:
        super().__init__(lambda module, masks: Way(enter=lambda: self.theirs.sparsify_model(SPARSITY)))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        from fasterai.core.criteria import large_final
        from fasterai.sparse.sparsifier import Sparsifier

        self.theirs = Sparsifier(pl_module.network, "weight", "global", large_final, layer_type=nn.Linear)

    def on_train_batch_end(self, *args: Any) -> None:
        self.theirs._apply_masks()


def lightnings(module: Classifier) -> L.Callback:
    return ModelPruning(
        "l1_unstructured",
        parameters_to_prune=[(layer, "weight") for layer in layers(module)],
        amount=lambda epoch: SPARSITY if epoch == AT else 0,
        use_global_unstructured=True,
    )


WAYS: dict[str, Callable[[Classifier], L.Callback]] = {
    "lightning_sparse": lambda module: MagnitudePruning(SPARSITY, start="4 epochs", end="4 epochs"),
    "ModelPruning": lightnings,
    "torch.nn.utils.prune": lambda module: InTheMiddle(torch_prune),
    "parametrize": lambda module: InTheMiddle(parametrized),
    "fasterai": lambda module: ByFasterai(),
}


class Look(L.Callback):
    """Record the sparsity that another callback sees after pruning; listed first.

    It can also stop training early, as a time limit would.
    """

    def __init__(self, stop: int | None) -> None:
        self.stop, self.seen = stop, {"batch end": 1.0, "validation": 1.0}

    def _look(self, where: str, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch > AT and not trainer.sanity_checking:
            self.seen[where] = min(self.seen[where], zeros(module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._look("batch end", trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look("validation", trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop |= trainer.current_epoch + 1 == self.stop


def zeros(module: nn.Module) -> float:
    return share([layer.weight.detach() == 0 for layer in layers(module)])


def share(masks: Sequence[Tensor]) -> float:
    """The fraction of mask entries that are set."""
    return round(sum(int(mask.sum()) for mask in masks) / max(1, sum(mask.numel() for mask in masks)), 4)


def fit(
    way: str, folder: Path, resume: Path | None = None, stop: int | None = None, beside: Sequence[L.Callback] = ()
) -> tuple[Classifier, L.Trainer, Look]:
    """Train a fresh network once."""
    torch.set_num_threads(1)  # for bit-identical results
    L.seed_everything(0, verbose=False)
    data = Digits(batch_size=64, seed=0)
    module = Classifier(LeNet300, 10, 1, data.image_size, partial(torch.optim.Adam, lr=2e-3, weight_decay=1e-4))
    look, saving = Look(stop), ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    callbacks = [look, WAYS[way](module), *beside, saving]
    trainer = quiet(callbacks, "cpu", max_epochs=EPOCHS, enable_checkpointing=True)
    trainer.fit(module, data, ckpt_path=resume, weights_only=False)
    return module, trainer, look


def moments(module: Classifier, trainer: L.Trainer) -> float:
    """Fraction of the zeros with nonzero Adam state."""
    known = []
    for layer in layers(module):
        raw = getattr(layer, "weight_orig", layer.weight)
        if parametrize.is_parametrized(layer):
            raw = layer.parametrizations.weight.original
        known.append((trainer.optimizers[0].state[raw]["exp_avg"] != 0)[layer.weight == 0])
    return share(known)


def attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def ask(way: str) -> dict[str, Any]:
    """Run all checks on one implementation."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        module, trainer, look = fit(way, folder)
        saved = torch.load(folder / f"epoch={EPOCHS - 1}.ckpt", weights_only=False)["state_dict"]
        of_weights = [value == 0 for name, value in saved.items() if name.endswith("weight") and value.ndim == 2]
        plain = Classifier(LeNet300, 10, 1, 8)
        whole = {name: value.clone() for name, value in module.state_dict().items()}

        def resumed() -> dict[str, Any]:
            fit(way, folder / "first", stop=STOP)
            again, _, _ = fit(way, folder / "second", folder / "first" / f"epoch={STOP - 1}.ckpt")
            state = again.state_dict()
            same = state.keys() == whole.keys() and all(state[name].equal(whole[name]) for name in whole)
            return {"sparsity": zeros(again), "same bits": same}

        return {
            "seen": {**look.seen, "checkpoint": share(of_weights)},
            "loads": attempt(lambda: bool(plain.load_state_dict(saved))),
            "resumed": attempt(resumed),
            "moments": moments(module, trainer),
            "averaged": attempt(lambda: zeros(fit(way, folder / "averaged", beside=[EMAWeightAveraging(decay=0.9)])[0])),
        }


def parts(options: Options) -> Parts:
    for way in WAYS:
        yield (way,), lambda way=way: attempt(lambda: ask(way))
