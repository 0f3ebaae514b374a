"""What becomes of the zeros: the same training, masked by this package and in the ways people use now.

    python -m benchmarks.peers                 the table of the README
    python -m benchmarks.peers "fasterai"      one of them

A perceptron on scikit-learn's digits, Adam with weight decay, pruned once to 90 % by magnitude in the middle of training.
`prune` and `parametrize` are what a careful user writes with them in an hour: a callback of a few lines. Of fasterai
(`pip install --no-deps fasterai fastcore einops`) its `Sparsifier` takes part, called after every batch by a few lines of
ours, since its own callback is for fastai. Asked of each:

    seen          sparsity in the eyes of a callback listed before it, of the validation after it, and of the last checkpoint
    loads         whether that checkpoint loads strictly into the plain network
    resumed       sparsity in the end, stopped two epochs after pruning and resumed from that checkpoint with new objects;
                  and whether all weights have the bits of the training that was not stopped
    moments       share of the pruned entries of which Adam remembers something in the end
    averaged      sparsity of the model that EMAWeightAveraging leaves behind
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, ModelPruning
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from benchmarks.competitors import Masking
from benchmarks.record import save
from lightning_sparse import MagnitudePruning
from lightning_sparse.data import Digits
from lightning_sparse.models import Classifier, LeNet300

EPOCHS, AT, STOP, SPARSITY = 8, 4, 6, 0.9


def layers(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


class OnceInTheMiddle(L.Callback):
    """Base of those that are written by hand: prunes at the start of an epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == AT:
            self.prune(pl_module)

    def prune(self, module: L.LightningModule) -> None:
        raise NotImplementedError


class ByPrune(OnceInTheMiddle):
    """`torch.nn.utils.prune`."""

    def prune(self, module: L.LightningModule) -> None:
        prune.global_unstructured([(layer, "weight") for layer in layers(module)], prune.L1Unstructured, amount=SPARSITY)


class ByParametrize(OnceInTheMiddle):
    """`torch.nn.utils.parametrize`."""

    def prune(self, module: L.LightningModule) -> None:
        scores = torch.cat([layer.weight.detach().abs().flatten() for layer in layers(module)])
        threshold = scores.kthvalue(round(SPARSITY * len(scores))).values
        for layer in layers(module):
            parametrize.register_parametrization(layer, "weight", Masking((layer.weight.detach().abs() > threshold).float()))


class ByFasterai(OnceInTheMiddle):
    """fasterai's `Sparsifier`."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        from fasterai.core.criteria import large_final
        from fasterai.sparse.sparsifier import Sparsifier

        self.theirs = Sparsifier(pl_module.network, "weight", "global", large_final, layer_type=nn.Linear)

    def prune(self, module: L.LightningModule) -> None:
        self.theirs.sparsify_model(SPARSITY)

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
    "torch.nn.utils.prune": lambda module: ByPrune(),
    "parametrize": lambda module: ByParametrize(),
    "fasterai": lambda module: ByFasterai(),
}


class Interrupt(L.Callback):
    """Stops the training early, as a time limit would."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop |= trainer.current_epoch == STOP - 1


class Look(L.Callback):
    """Listed first: what a neighbor sees once pruning is over."""

    def __init__(self) -> None:
        self.seen = {"batch end": 1.0, "validation": 1.0}

    def _look(self, where: str, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch > AT and not trainer.sanity_checking:
            self.seen[where] = min(self.seen[where], zeros([layer.weight for layer in layers(module)]))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self._look("batch end", trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look("validation", trainer, pl_module)


def zeros(weights: list[Tensor]) -> float:
    return round(sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights), 4)


def fit(
    way: str, folder: Path, resume: Path | None = None, beside: Sequence[L.Callback] = ()
) -> tuple[Classifier, L.Trainer, Look]:
    """One training, of a fresh network."""
    L.seed_everything(0, verbose=False)
    data = Digits(batch_size=64, seed=0)
    module = Classifier(LeNet300, 10, 1, data.image_size, lambda p: torch.optim.Adam(p, lr=2e-3, weight_decay=1e-4))
    look, saving = Look(), ModelCheckpoint(folder, "{epoch}", save_top_k=-1)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[look, WAYS[way](module), *beside, saving],
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=False)
    return module, trainer, look


def moments(module: Classifier, trainer: L.Trainer) -> float:
    """Share of the zeros of which Adam remembers something."""
    known, of = 0, 0
    for layer in layers(module):
        weight = layer.weight.detach()
        raw = getattr(layer, "weight_orig", None)
        if parametrize.is_parametrized(layer):
            raw = layer.parametrizations.weight.original
        state = trainer.optimizers[0].state[layer.weight if raw is None else raw]
        known += int((state["exp_avg"][weight == 0] != 0).sum())
        of += int((weight == 0).sum())
    return round(known / max(of, 1), 4)


def attempt(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def ask(way: str) -> dict[str, Any]:
    """All questions."""
    with tempfile.TemporaryDirectory() as folder:
        module, trainer, look = fit(way, Path(folder))
        saved = torch.load(Path(folder) / f"epoch={EPOCHS - 1}.ckpt", weights_only=False)["state_dict"]
        of_weights = [value for name, value in saved.items() if name.endswith("weight") and value.ndim == 2]
        plain = Classifier(LeNet300, 10, 1, 8)
        whole = {name: value.clone() for name, value in module.state_dict().items()}

        def resumed() -> dict[str, Any]:
            fit(way, Path(folder) / "first", beside=[Interrupt()])
            again, _, _ = fit(way, Path(folder) / "second", Path(folder) / "first" / f"epoch={STOP - 1}.ckpt")
            state = again.state_dict()
            same = state.keys() == whole.keys() and all(state[name].equal(whole[name]) for name in whole)
            return {"sparsity": zeros([layer.weight.detach() for layer in layers(again)]), "same bits": same}

        def averaged() -> float:
            module, _, _ = fit(way, Path(folder) / "averaged", beside=[EMAWeightAveraging(decay=0.9)])
            return zeros([layer.weight.detach() for layer in layers(module)])

        return {
            "seen": {**look.seen, "checkpoint": zeros(of_weights) if of_weights else 0.0},
            "loads": attempt(lambda: bool(plain.load_state_dict(saved))),
            "resumed": attempt(resumed),
            "moments": moments(module, trainer),
            "averaged": attempt(averaged),
        }


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    numbers = {}
    for way in sys.argv[1:] or WAYS:
        numbers[way] = attempt(lambda way=way: ask(way))
        answers = numbers[way] if isinstance(numbers[way], dict) else {"": numbers[way]}
        print(way, *(f"  {key}: {answer}" for key, answer in answers.items()), sep="\n")
    if not sys.argv[1:]:
        save("peers", numbers)


if __name__ == "__main__":
    main()
