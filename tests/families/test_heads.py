"""Heads of attention: whole ones go, exactly as many as were asked for, and what is left is a smaller, plain network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_sparse import SNIP, LotteryTicket, MagnitudePruning, MovementPruning, RandomSparsity, RigL
from lightning_sparse.core import count_macs
from lightning_sparse.export import carry_optimizer, count_parameters, load_model, remove_dead, save_model
from lightning_sparse.models import VisionTransformer
from lightning_sparse.observe import SparsityTable
from lightning_sparse.testing import Toy, fit, loader, toy, trainer
from tests.helpers.attention import Fused, Separate, attend

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def transformer(depth: int = 2, **kwargs: Any) -> VisionTransformer:
    return VisionTransformer(4, 1, 8, patch_size=2, width=16, depth=depth, **kwargs)


def module(optimizer: str = "adamw", net: nn.Module | None = None) -> Toy:
    torch.manual_seed(3)
    return toy(optimizer, net=net or transformer())


def heads_of(attention: Any) -> Tensor:
    """Which heads have weights in all three projections and in the output."""
    size, inputs = attention.head_dim, attention.embed_dim
    rows = attention.in_proj_weight.view(3, -1, size, inputs).flatten(2).any(2)
    bias = attention.in_proj_bias.view(3, -1, size).any(2)
    columns = attention.out_proj.weight.view(inputs, -1, size).any(2).any(0)
    assert rows.eq(columns).all(), "queries, keys, values and columns go together"
    assert not (bias & ~rows).any(), "a bias goes with its head"
    return columns


class Language(nn.Module):
    """Grouped queries over tokens made of an image, then fused projections."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.first, self.second, self.out = nn.Linear(8, 12), Separate(2), Fused(), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.second(self.first(self.into(x.squeeze(1)))).mean(1))
        return out


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_half_of_the_heads_go(allocation: str) -> None:
    made, method = module(), MagnitudePruning(0.5, structure="heads", allocation=allocation)
    fit(made, method)
    kept = [heads_of(layer.self_attn) for layer in made.net.blocks.layers]
    assert int(torch.cat(kept).sum()) == 4
    assert all(one.any() for one in kept)
    if allocation == "uniform":
        assert [int(one.sum()) for one in kept] == [2, 2]
        assert method.goal["total"] == method.masks.kept
    names = {f"net.blocks.layers.{i}.self_attn.{leaf}" for i in (0, 1) for leaf in ("in_proj_weight", "out_proj.weight")}
    assert set(method.masks.counts) == names, "other weights are none of its business"
    assert method.left["attention heads"] == [4, 8]


@pytest.mark.parametrize("make", [transformer, Language])
def test_they_leave_the_network_with_equal_outputs(make: Any, tmp_path: Path) -> None:
    made = module(net=make())
    fit(made, MagnitudePruning(0.5, structure="heads", allocation="uniform"))
    net = made.net.eval()
    smaller, removal = remove_dead(net, IMAGES)
    torch.testing.assert_close(smaller(IMAGES), net(IMAGES))
    assert not removal.refused
    assert list(removal.heads.values()) == ([2, 2] if make is transformer else [1, 2])
    assert count_parameters(smaller) < count_parameters(net)
    assert smaller.state_dict().keys() == net.state_dict().keys()
    save_model(smaller, tmp_path / "small.safetensors", removal.blueprint)
    loaded = load_model(make(), tmp_path / "small.safetensors").eval()
    assert torch.equal(loaded(IMAGES), smaller(IMAGES))
    macs = [sum(count_macs(one, lambda one=one: one(IMAGES), 4).values()) for one in (net, smaller)]
    assert macs[1] < macs[0]


def test_training_goes_on_with_fewer_heads_and_twice_pruned_is_cut_twice() -> None:
    made = module(net=transformer(depth=1))
    fit(made, MagnitudePruning(0.25, structure="heads"))
    smaller, removal = remove_dead(made.net, IMAGES)
    assert removal.heads == {"blocks.layers.0.self_attn": 1}
    again = module(net=smaller.train())
    method = MagnitudePruning(2 / 3, structure="heads")
    fit(again, method)
    assert method.left["attention heads"] == [1, 3]
    last, removal = remove_dead(again.net, IMAGES)
    assert removal.heads == {"blocks.layers.0.self_attn": 2}
    torch.testing.assert_close(last(IMAGES), again.net.eval()(IMAGES))


def test_an_optimizer_goes_on_too() -> None:
    made = module(net=transformer(depth=1))
    fit(made, MagnitudePruning(0.5, structure="heads"))
    optimizer = torch.optim.AdamW(made.net.parameters(), lr=1e-3)
    made.net(IMAGES).sum().backward()
    optimizer.step()
    made.net.zero_grad()
    with torch.no_grad():  # the step above has moved what was zero
        for layer in made.net.blocks.layers:
            layer.self_attn.in_proj_weight.view(3, 4, 4, 16)[:, 1] = 0
            layer.self_attn.in_proj_bias.view(3, 4, 4)[:, 1] = 0
    smaller, removal = remove_dead(made.net, IMAGES)
    before = optimizer.state[made.net.blocks.layers[0].self_attn.in_proj_weight]["exp_avg"].clone()
    carry_optimizer(optimizer, made.net, smaller, removal.blueprint)
    after = optimizer.state[smaller.blocks.layers[0].self_attn.in_proj_weight]["exp_avg"]
    kept = removal.blueprint.kept["blocks.layers.0.self_attn"].outputs
    assert kept is not None
    assert torch.equal(after, before.view(3, 16, 16)[:, kept].flatten(0, 1))
    smaller.train()(IMAGES).sum().backward()
    optimizer.step()


def test_the_score_of_a_head_is_the_mean_over_its_rows_and_columns() -> None:
    made, method = module(net=transformer(depth=1)), MagnitudePruning(0.5, structure="heads", start=0, end=0)
    attention = made.net.blocks.layers[0].self_attn
    with torch.no_grad():
        for part, sizes in enumerate(([4, 1, 1, 2], [1, 1, 1, 1], [1, 1, 1, 1])):
            attention.in_proj_weight[16 * part : 16 * (part + 1)] = torch.tensor(sizes).repeat_interleave(4)[:, None].float()
        attention.out_proj.weight.copy_(torch.tensor([1.0, 3.0, 1.0, 1.0]).repeat_interleave(4).expand(16, 16))
    # divided by their means, 1.33 and 1.5: (4 + 1 + 1) / 1.33 + 1 / 1.5 = 5.2, then 4.25, 2.9, 3.7, each over four
    fit(made, method, max_epochs=1, limit_train_batches=1)
    assert heads_of(attention).tolist() == [True, True, False, False]


@pytest.mark.parametrize("budget", ["parameters", "macs"])
def test_sparsity_of_the_whole_network(budget: str) -> None:
    made = module(net=transformer(depth=3))
    method = MagnitudePruning(0.1, structure="heads", budget=budget)  # type: ignore[arg-type]
    fit(made, method)
    smaller, _ = remove_dead(made.net, IMAGES)

    def cost(net: nn.Module) -> int:
        return count_parameters(net) if budget == "parameters" else sum(count_macs(net, lambda: net(IMAGES), 4).values())

    kept, total = method.left[budget]
    assert total == cost(made.net)
    assert kept == pytest.approx(cost(smaller), abs=2)
    one_head = (total - kept) / (12 - method.left["attention heads"][0])
    assert 0.9 * total - one_head < kept <= 0.9 * total


def test_what_is_left_in_place_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Two(nn.Module):
        """One attention whose heads share a key, and another."""

        def __init__(self) -> None:
            super().__init__()
            self.into, self.one, self.other, self.out = nn.Linear(8, 12), Separate(4), Separate(), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.other(self.one(self.into(x.squeeze(1)))).mean(1))
            return out

    with caplog.at_level("INFO"):
        fit(module(net=Two()), MagnitudePruning(0.5, structure="heads"))
    assert "MagnitudePruning: heads stay in 'net.one.out.weight' (all heads share a projection)." in caplog.text


class Sized(Separate):
    """Knows its width by heart."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.ask(x).view(-1, 8, 12), self.match(x), self.carry(x)
        out: Tensor = x + self.out(attend(q, k, v, 3))
        return out


class Around(nn.Module):
    """An attention between two layers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.into, self.inner, self.out = nn.Linear(8, 12), inner, nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.inner(self.into(x.squeeze(1))).mean(1))
        return out


REFUSED: list[tuple[Any, MagnitudePruning, str]] = [
    (
        None,
        MagnitudePruning(0.5, structure="heads"),
        r"finds no attention in Toy whose heads can leave \(looked for nn.Multi",
    ),
    (
        Around(Sized()),
        MagnitudePruning(0.5, structure="heads"),
        "'net.inner.out.weight': with fewer heads the model does not",
    ),
    (
        Around(Separate()),
        MagnitudePruning(0.5, structure="heads", targets=["*", "!*match*"]),
        "'net.inner.match.weight' is not among the targets",
    ),
    (transformer(), MagnitudePruning(0.9, structure="heads"), "keeps 1 units, fewer than there are attentions"),
]


@pytest.mark.parametrize(("net", "method", "said"), REFUSED)
def test_refused_before_the_first_batch(net: nn.Module | None, method: MagnitudePruning, said: str) -> None:
    made = toy() if net is None else module(net=net)
    before = [p.clone() for p in made.parameters()]
    with pytest.raises(ValueError, match=said):
        fit(made, method)
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))


def test_other_methods() -> None:
    for method in (
        RandomSparsity(0.5, structure="heads", seed=1),
        SNIP(0.5, structure="heads"),
        LotteryTicket(0.5, rounds=2, structure="heads"),
    ):
        made = module()
        fit(made, method, SparsityTable())
        kept = [heads_of(layer.self_attn) for layer in made.net.blocks.layers]
        assert int(torch.cat(kept).sum()) == 4
    with pytest.raises(ValueError, match="structure='heads' is not rewired"):
        RigL(0.5, structure="heads")
    with pytest.raises(ValueError, match="structure='heads' removes heads for good"):
        MovementPruning(0.5, structure="heads")


def test_a_resumed_run_needs_no_batch_to_know_its_heads(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    saved = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_epochs=1)
    fit(module(), MagnitudePruning(0.5, structure="heads"), saved)
    last = max(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.removeprefix("step=")))
    again, method = module(), MagnitudePruning(0.5, structure="heads")
    runner = trainer(method, max_epochs=3)
    runner.fit(again, loader(), loader(1), ckpt_path=last)
    kept = [heads_of(layer.self_attn) for layer in again.net.blocks.layers]
    assert int(torch.cat(kept).sum()) == 4
