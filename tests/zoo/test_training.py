"""Every model of the zoo: what is chosen, exact sparsity, exact resume, checkpoints that load into the plain model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_sparse import (
    STR,
    HyperSparse,
    LpSphere,
    MagnitudePruning,
    RigL,
    SparseConnectivityLearning,
    WeightPenalty,
)
from lightning_sparse.core import find_targets
from lightning_sparse.core.coverage import coverage
from lightning_sparse.loop import Sparsifier
from lightning_sparse.testing import differences, masks_of, off_target, state_of, trainer, zeros_hold
from tests.helpers.zoo import ZOO, Batches, Guest

METHODS: dict[str, Callable[..., Sparsifier]] = {"magnitude": MagnitudePruning, "rigl": RigL}
WEIGHTS_ALONE = (
    "mixtral",
    "qwen3-moe",
    "gpt-oss",
    "gpt2",
    "lstm",
    "gru",
    "gcn",
    "gin",
    "vit",
    "whisper",
    "resnet",
    "convnext",
)
"""Models of which everything that is no embedding can become sparse."""


def fit(name: str, *callbacks: L.Callback, ckpt_path: Any = None, epochs: int = 3) -> tuple[Guest, L.Trainer]:
    """Three epochs of two batches."""
    guest = Guest(ZOO[name])
    runner = trainer(*callbacks, max_epochs=epochs)
    runner.fit(guest, Batches(ZOO[name], 2), ckpt_path=ckpt_path)
    return guest, runner


def plain_state(guest: Guest, runner: L.Trainer, path: Path) -> dict[str, torch.Tensor]:
    """What a weights-only checkpoint holds, by the names of the foreign model, into which it is loaded strictly."""
    runner.save_checkpoint(path, weights_only=True)
    saved = torch.load(path, weights_only=True)["state_dict"]
    state = {name.removeprefix("model."): value for name, value in saved.items()}
    model = guest.foreign.model()
    model.load_state_dict(state, strict=True)
    return dict(model.state_dict())


def matrices(model: nn.Module) -> dict[str, nn.Parameter]:
    """Counted without our help: trainable, two sizes beyond one, held by no embedding, and not one by its name."""
    embedded = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    return {
        name: p
        for name, p in model.named_parameters()
        if p.requires_grad
        and id(p) not in embedded
        and len([size for size in p.shape if size > 1]) >= 2
        and not name.endswith(("bias", "token", "embeddings"))
    }


@pytest.mark.parametrize("name", WEIGHTS_ALONE)
def test_the_default_choice_covers_the_model(name: str) -> None:
    guest = Guest(ZOO[name])
    chosen = {target.name for target in find_targets(guest)}
    there = matrices(guest)
    total = sum(p.numel() for p in there.values())
    assert chosen <= {*there}
    assert sum(there[name].numel() for name in chosen) >= 0.95 * total
    found = coverage(guest, ["*"], chosen)
    assert (found.matrices, found.warning) == (total, None)
    assert found.missed == total - sum(there[name].numel() for name in chosen)


@pytest.mark.parametrize("name", [name for name, foreign in ZOO.items() if foreign.refused])
def test_computed_weights_are_refused_by_one_sentence(name: str) -> None:
    with pytest.raises(ValueError, match=f"{ZOO[name].refused}.* exclude the layer with targets="):
        find_targets(Guest(ZOO[name]))


@pytest.mark.filterwarnings("ignore:.* has removed all of")  # tiny layers whose weights are smaller than others
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("kind", METHODS)
def test_nine_of_ten_are_zero_and_resume_is_exact(name: str, kind: str, tmp_path: Path) -> None:
    method = METHODS[kind](0.9, targets=ZOO[name].targets)
    guest, runner = fit(name, method, ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1))
    expected = state_of(guest, runner, method)
    chosen = {target.name.removeprefix("model."): target.weight for target in find_targets(guest, ZOO[name].targets)}
    state = plain_state(guest, runner, tmp_path / "plain.ckpt")
    total = sum(weight.numel() for weight in chosen.values())
    zeros = sum(int((state[name] == 0).count_nonzero()) for name in chosen)
    unlearned = sum(int((mask & (chosen[name[6:]] == 0)).count_nonzero()) for name, mask in masks_of(method).items())
    assert off_target(method) == []
    assert zeros - unlearned == round(0.9 * total)
    assert kind == "rigl" or unlearned == 0  # what grows begins at zero, and some of it gets no gradient

    again = METHODS[kind](0.9, targets=ZOO[name].targets)
    torch.manual_seed(7)
    resumed, other = fit(name, again, ckpt_path=tmp_path / "step=3.ckpt")
    assert other.global_step == runner.global_step == 6
    assert differences(expected, state_of(resumed, other, again)) == []


@pytest.mark.filterwarnings("ignore:.* has removed all of")
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("mixtral", lambda: SparseConnectivityLearning(0.8)),
        ("gpt-oss", lambda: WeightPenalty(0.5, strength=1e-3, penalty="group_lasso", structure="channel")),
        ("gpt2", lambda: SparseConnectivityLearning(0.8)),
        ("lstm", lambda: LpSphere(0.8, p=1.2)),
        ("qwen3-moe", lambda: LpSphere(0.8, p=1.2)),
        ("gru", lambda: HyperSparse(0.9)),
        ("gcn", lambda: STR(strength=1e-3)),
        ("vit", lambda: WeightPenalty(0.9, strength=1e-3)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value()).__name__,
)
def test_other_methods(name: str, make: Callable[[], Sparsifier], tmp_path: Path) -> None:
    method = make()
    guest, runner = fit(name, method)
    assert method.mask_set is not None
    assert off_target(method) == []
    assert zeros_hold(method, guest)
    assert all(value.isfinite().all() for value in plain_state(guest, runner, tmp_path / "plain.ckpt").values())


def test_a_frozen_base_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    guest, _ = fit("lora", MagnitudePruning(0.5), epochs=1)
    assert "leaves out frozen weights (4 tensors, 3,072 entries)" in caplog.text
    assert "% of the trainable weights" not in caplog.text
    fresh = Guest(ZOO["lora"]).state_dict()
    changed = {name for name, value in guest.state_dict().items() if not value.equal(fresh[name])}
    assert changed
    assert all("lora_" in name for name in changed)
