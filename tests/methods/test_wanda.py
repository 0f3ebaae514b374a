"""Wanda on a whole model: masks are those of a loop over its outputs, with the inputs that really reach each layer."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_sparse import GraNet, MagnitudePruning, RandomSparsity, RigL, SparseGPT, Wanda
from lightning_sparse.testing import Toy, fit, fit_on_ranks, loader, network, run_on_ranks, toy
from tests.helpers.data import DATA, Talkative, run
from tests.helpers.inputs import LAYERS, batches, inputs, solved


def slow_masks(net: nn.Sequential, x: Tensor, kept: dict[str, int], relative: bool = False) -> dict[str, Tensor]:
    """Output by output, entry by entry; what divides badly goes to the first outputs."""
    masks = {}
    for name, rows in inputs(net, x).items():
        weight = net[LAYERS[name]].weight.detach().flatten(1)
        columns = weight.abs().sum(0)
        norms = [float(column.square().sum().sqrt()) for column in rows.T]
        left = kept[name]
        mask = torch.zeros_like(weight, dtype=torch.bool)
        for i, row in enumerate(weight):
            keep = left // len(weight) + (i < left % len(weight))
            if relative:
                parts = [float(w.abs() / columns[j] + w.abs() / row.abs().sum()) for j, w in enumerate(row)]
                score = [part * norms[j] ** 0.5 for j, part in enumerate(parts)]
            else:
                score = [abs(float(w)) * norms[j] for j, w in enumerate(row)]
            for j in sorted(range(len(score)), key=lambda j: -score[j])[:keep]:
                mask[i, j] = True
        masks[name] = mask.view_as(net[LAYERS[name]].weight)
    return masks


def found(method: Wanda, module: L.LightningModule, **options: Any) -> dict[str, Tensor]:
    fit(module, method, max_epochs=1, **options)
    return {name: method.masks[name] for name in method.masks}


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(("count", "sparsity"), [(1, 0.5), (3, 0.71)])
def test_masks_are_those_of_a_loop_over_outputs(count: int, sparsity: float, relative: bool) -> None:
    module = toy()
    before = copy.deepcopy(module.net)
    masks = found(Wanda(sparsity, batches=count, relative=relative), module)
    kept = {name: int(mask.count_nonzero()) for name, mask in masks.items()}
    assert all(abs(number - (1 - sparsity) * masks[name].numel()) < 1 for name, number in kept.items())
    expected = slow_masks(before, batches(count), kept, relative)
    assert all(masks[name].equal(expected[name]) for name in LAYERS)


def test_two_of_four_within_each_group() -> None:
    module = toy()
    rows = inputs(module.net, batches(2))
    masks = found(Wanda(structure="2:4", batches=2), module)
    assert [*masks] == ["net.2.weight", "net.6.weight", "net.8.weight"]
    for name, mask in masks.items():
        size = toy().net[LAYERS[name]].weight.detach().abs()
        norms = rows[name].square().sum(0).sqrt().view(size.shape[1:])
        score = (size * norms).movedim(1, -1).reshape(-1, 4)
        best = score.sort(1, descending=True).indices[:, :2]
        assert torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, True).equal(mask.movedim(1, -1).reshape(-1, 4))


def test_compared_within_a_layer_and_among_all_layers() -> None:
    module = toy()
    rows = inputs(module.net, batches(8))
    scores = {
        name: (toy().net[LAYERS[name]].weight.detach().flatten(1).abs() * rows[name].square().mean(0).sqrt()).flatten()
        for name in LAYERS
    }
    masks = found(Wanda(0.5, compare="layer"), module)
    for name, score in scores.items():
        assert masks[name].flatten().equal(score >= score.sort().values[len(score) // 2])
    masks = found(Wanda(0.5, compare="layer", allocation="global"), toy())
    together = torch.cat([*scores.values()])
    assert torch.cat([mask.flatten() for mask in masks.values()]).equal(together >= together.sort().values[1380])


def test_channels_are_compared_by_their_scores() -> None:
    module = toy()
    rows = inputs(module.net, batches(8))["net.6.weight"]
    score = (module.net[6].weight.detach().abs() * rows.square().sum(0).sqrt()).mean(1)
    masks = found(Wanda(0.5, structure="channel", targets=["net.6"]), module)
    assert masks["net.6.weight"][:, 0].equal(score >= score.sort().values[8])


def test_tokens_in_leading_dimensions_and_shared_layers() -> None:
    class Twice(Toy):
        def __init__(self) -> None:
            super().__init__(net=nn.Linear(8, 8, bias=False))

        def loss(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.net(self.net(batch[0].squeeze(1)).relu()).mean(1), batch[1])

    torch.manual_seed(0)
    module = Twice()
    weight, x = module.net.weight.detach().clone(), batches(2).flatten(0, 2)
    rows = torch.cat([x, (x @ weight.T).relu()])
    score = weight.abs() * rows.square().sum(0).sqrt()
    masks = found(Wanda(0.5, batches=2), module)
    assert masks["net.weight"].equal(score >= score.sort(1).values[:, 4:5])


# ---- along a schedule ------------------------------------------------------------------------------------------------


class Still(Toy):
    """Whose weights do not move."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_norms_follow_the_training() -> None:
    """At the second update: half of the calibration, and all that training has seen since."""
    torch.manual_seed(0)
    module = Still(net=network(dropout=0))
    seen: list[Tensor] = []

    class Note(L.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch[0])

    weight = module.net[6].weight.detach().clone()
    method = Wanda(0.6, batches=1, end="3 steps", every="3 steps", targets=["net.6"])
    fit(module, Note(), method, max_epochs=1)
    parts = [inputs(module.net, x)["net.6.weight"].square().sum(0) for x in (batches(1), *seen[:3])]
    assert len(seen) == 4
    score = weight.abs() * (parts[0] / 2 + parts[1] + parts[2] + parts[3]).sqrt()
    kept = score.sort(1, descending=True).values
    mask = method.masks["net.6.weight"]
    assert mask.count_nonzero() == 819
    for row, values, got in zip(score, kept, mask, strict=True):
        assert got.equal(row >= values[int(got.count_nonzero()) - 1])
    calibrated = weight.abs() * parts[0].sqrt()
    assert not mask[0].equal(calibrated[0] >= calibrated[0].sort(descending=True).values[int(mask[0].count_nonzero()) - 1])


def test_nobody_notices() -> None:
    plain, watched = Talkative(), Talkative()
    watched.load_state_dict(plain.state_dict())
    data = next(iter(DATA.values()))
    expected, got = run(plain, data), run(watched, data, Wanda(0.0))
    assert {got["logged"].pop(name) for name in ("sparsity", "sparsity/actual", "sparsity/model")} == {0.0}
    assert expected["logged"] == got["logged"]
    assert expected["random"] == got["random"]
    assert all(expected["weights"][name].equal(value) for name, value in got["weights"].items())


def scored(rank: int) -> dict[str, Tensor]:
    module, method = toy(net=network(dropout=0)), Wanda(0.5, batches=1)
    module.load_state_dict(toy().state_dict())
    fit_on_ranks(rank, module.double(), method, max_steps=1)
    return {name: method.masks[name] for name in method.masks}


def test_norms_are_those_of_all_ranks() -> None:
    first, second = run_on_ranks(scored)
    both = torch.cat([next(iter(loader(rank=rank, world_size=2)))[0] for rank in (0, 1)])
    expected = slow_masks(toy().double().net, both.double(), {name: mask.numel() // 2 for name, mask in first.items()})
    for name in LAYERS:
        assert first[name].equal(expected[name])
        assert second[name].equal(expected[name])


# ---- what cannot be judged -------------------------------------------------------------------------------------------


class Experts(Toy):
    """Four linear layers, of which a router calls the first two."""

    def __init__(self) -> None:
        super().__init__(net=nn.ModuleList([nn.Linear(64, 4) for _ in range(4)]))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net[0](batch[0].flatten(1)) + self.net[1](batch[0].flatten(1)), batch[1])


def test_an_expert_without_tokens_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"no input has reached 'net.2.weight' in batches=8; take more .*'!net.2'"):
        fit(Experts(), Wanda(0.5))
    method = Wanda(0.5, targets=["net.0", "net.1"])
    fit(Experts(), method)
    assert method.masks.sparsity == 0.5


class Recurrent(Toy):
    def __init__(self) -> None:
        super().__init__(net=nn.LSTM(8, 8, batch_first=True))
        self.head = nn.Linear(8, 4)

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.head(self.net(batch[0].squeeze(1))[0][:, -1]), batch[1])


@pytest.mark.parametrize("method", [Wanda, SparseGPT])
def test_what_multiplies_out_of_sight_stays_dense(method: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    module, made = Recurrent(), method(0.5)
    fit(module, made)
    assert [*made.masks] == ["net.weight_ih_l0", "head.weight"]
    assert "keeps 'net.weight_hh_l0' dense: it is in a layer (LSTM) whose calls do not show what it is mul" in caplog.text
    assert module.net.weight_hh_l0.ne(0).all()


# ---- attention of torch ----------------------------------------------------------------------------------------------


class Attending(Toy):
    """Attention of one sequence to itself or to another, in one module or written out; some tokens are padding."""

    def __init__(self, fused: bool, cross: bool = False) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(net=nn.TransformerEncoderLayer(8, 2, 16, 0.2, batch_first=True))
        self.fused, self.cross = fused, cross
        attention = self.net.self_attn
        if not fused:
            self.parts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
            for index, part in enumerate(self.parts[:3]):
                part.weight.data.copy_(attention.in_proj_weight[8 * index :][:8])
                part.bias.data.zero_()
            self.parts[3].load_state_dict(attention.out_proj.state_dict())
            self.net.self_attn = nn.Identity()

    def attend(self, x: Tensor, y: Tensor, padding: Tensor) -> Tensor:
        if self.fused:
            attended: Tensor = self.net.self_attn(x, y, y, key_padding_mask=padding)[0]
            return attended
        q, k, v = (part(z).unflatten(-1, (2, 4)).transpose(1, 2) for part, z in zip(self.parts, (x, y, y), strict=False))
        attended = F.scaled_dot_product_attention(q, k, v, ~padding[:, None, None])
        out: Tensor = self.parts[3](attended.transpose(1, 2).flatten(2))
        return out

    def loss(self, batch: Any) -> Tensor:
        x = batch[0].squeeze(1)
        y = x[:, :5].flip(2) if self.cross else x
        padding = (torch.arange(y.shape[1]) > 3).expand(len(x), -1)
        x = self.net.norm1(x + self.attend(x, y, padding))
        return self.net.linear2(self.net.linear1(x).relu()).square().mean()


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("method", [Wanda, SparseGPT])
def test_attention_is_pruned_as_if_it_were_written_out(method: Any, cross: bool) -> None:
    """In 2:4 the outputs of query, key and value do not compete, so nothing else tells the two apart."""
    ends = {}
    for fused in (True, False):
        module, made = Attending(fused, cross), method(structure="2:4", batches=2)
        ends[fused] = (made, solved(made, module))
    names = [f"parts.{index}.weight" for index in range(4)]
    split = [*(f"net.self_attn.in_proj_weight[{index}]" for index in range(3)), "net.self_attn.out_proj.weight"]
    weights = ends[True][1]
    weights |= dict(zip(split, weights["net.self_attn.in_proj_weight"].chunk(3), strict=False))
    for name, other in [*zip(names, split, strict=True), *2 * [("net.linear1.weight", "net.linear1.weight")]]:
        torch.testing.assert_close(ends[False][1][name], weights[other], rtol=1e-4, atol=1e-5)
        assert (ends[False][1][name] == 0).equal(weights[other] == 0)
        assert (weights[other] == 0).float().mean() == 0.5


def test_encoders_of_torch_with_padding() -> None:
    """Without gradients, they would take a path on which nothing is seen."""

    class Padded(Toy):
        def __init__(self) -> None:
            super().__init__(net=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2))

        def loss(self, batch: Any) -> Tensor:
            x = batch[0].squeeze(1)
            return self.net(x, src_key_padding_mask=(torch.arange(8) > 5).expand(len(x), -1))[:, :6].square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            """Torch warns there of its nested tensors."""

    fast = torch.backends.mha.get_fastpath_enabled()
    for method in (Wanda(0.5), Wanda(0.5, end=0.5), SparseGPT(0.5)):
        fit(Padded(), method)
        assert len(method.masks) == 8
        assert method.masks.sparsity == 0.5
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_bad_inputs_are_a_sentence() -> None:
    class Bad(Toy):
        def loss(self, batch: Any) -> Tensor:
            return super().loss((batch[0] * torch.nan, batch[1]))

    with pytest.raises(ValueError, match=r"the inputs of 'net.0.weight' are not finite"):
        fit(Bad(), Wanda(0.5))

    class Graph(Toy):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.loss(batch)
            torch.autograd.grad(loss, [*self.parameters()], retain_graph=True)
            return loss

    with pytest.raises(ValueError, match=r"copy of Graph without gradients, and its training_step fails there \(.*grad"):
        fit(Graph(), Wanda(0.5))


@pytest.mark.parametrize("options", [{}, {"relative": True}, {"compare": "layer"}, {"start": 0.1, "end": 0.6}])
def test_layers_with_outliers_keep_more_in_every_output(options: Any) -> None:
    module, method = toy(), Wanda(0.7, allocation="owl", **options)
    module.net[6].weight.data[:, :2] *= 30
    masks = found(method, module)
    density = {name: float(mask.double().mean()) for name, mask in masks.items()}
    assert density["net.6.weight"] > 0.32
    assert density["net.2.weight"] < 0.2
    assert method.masks.kept == round(0.3 * method.masks.total)
    if method.compare == "output":
        for mask in masks.values():
            counts = mask.flatten(1).sum(1)
            assert counts.max() - counts.min() <= 1


def test_outliers_weigh_layers_of_any_method_that_scores() -> None:
    for method in (MagnitudePruning(0.5, allocation="owl", start=0, end=0), GraNet(0.8, allocation="owl")):
        module = toy()
        module.net[6].weight.data[0] *= 20
        fit(module, method)
        assert method.masks.kept == round((1 - method.sparsity) * 2760)
    for cls in (RandomSparsity, RigL):
        with pytest.raises(ValueError, match="allocation='owl' is unknown"):
            cls(0.5, allocation="owl")
