"""Heads of models that somebody else has written: half of them leave, and the outputs are those of the masked model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_sparse import MagnitudePruning
from lightning_sparse.core import Call, tensors_in
from lightning_sparse.export import remove_dead
from lightning_sparse.testing import trainer
from tests.helpers.zoo import ZOO, Batches, Guest

LEAVE = ("mixtral", "qwen3-moe", "gpt2", "bert", "vit", "whisper", "wav2vec2", "encoder", "unet")
"""Models whose attention has two heads; grouped, fused, separate and convolution-like projections are among them."""

STAY = {
    "gpt-oss": "with fewer heads the model does not run",  # a number for each head that no projection makes
    "lora": "is not among the targets",  # what is adapted is frozen
    "resnet": "looked for nn.MultiheadAttention",
}


def fit(name: str) -> tuple[Guest, MagnitudePruning]:
    guest, method = Guest(ZOO[name]), MagnitudePruning(0.5, structure="heads", targets=ZOO[name].targets, start=0, end=0)
    trainer(method, max_epochs=1).fit(guest, Batches(ZOO[name], 1))
    return guest, method


def call_of(guest: Guest) -> Call:
    """What the model is called with in a training step; without a cache, which has as many heads."""
    seen: list[Call] = []

    def hook(model: Any, args: Any, kwargs: Any) -> None:
        given = {name: value for name, value in kwargs.items() if not isinstance(model, torch.nn.TransformerEncoder)}
        if hasattr(getattr(model, "config", None), "use_cache"):
            given["use_cache"] = False
        seen.append(Call(args, given, ""))

    handle = guest.model.register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        guest.eval().training_step(guest.foreign.batch(), 0)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", LEAVE)
def test_half_of_the_heads_leave(name: str) -> None:
    guest, method = fit(name)
    kept, total = method.left["attention heads"]
    assert kept == total // 2
    call = call_of(guest)
    smaller, removal = remove_dead(guest.model, call)
    assert sum(removal.heads.values()) == total - kept
    with torch.no_grad():
        both = zip(tensors_in(call(guest.model)), tensors_in(call(smaller)), strict=True)
        for expected, found in both:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in guest.model.parameters())


@pytest.mark.parametrize("name", STAY)
def test_where_they_cannot_it_is_said(name: str) -> None:
    with pytest.raises(ValueError, match="finds no attention in Guest whose heads can leave .*" + STAY[name]):
        fit(name)


def test_some_attentions_of_a_model_may_keep_theirs(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        _, method = fit("t5")
    assert method.left["attention heads"] == [1, 2]
    assert "heads stay in 'model.encoder.block.0.layer.0.SelfAttention.o.weight' (with fewer heads the model" in caplog.text
