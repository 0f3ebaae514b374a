"""Layouts as pure functions: blocks of a weight, counted once, chosen among as one process chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_sparse.core import Layout, MaskSet, Plan, Target, find_targets, part_of, spread_over, total_over_ranks
from lightning_sparse.core.budget import Budget, drawn
from lightning_sparse.functional import hashed_score, kth_smallest, random_generator, random_score, regrow, top_k_masks
from lightning_sparse.testing import run_on_ranks

SHAPES = {"0": (7, 6), "1": (3, 7), "2": (1, 3)}


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Linear(shape[1], shape[0]) for shape in SHAPES.values()])
    for layer in net:  # few values: most of them are ties
        layer.weight.data = layer.weight.data.mul(8).round().div(8)
    return net


def by_rows(ranks: int) -> nn.Module:
    net = layers()
    mesh = init_device_mesh("cpu", (ranks,))
    fully_shard(net[0], mesh=mesh)
    return fully_shard(net, mesh=mesh)


def by_tensors(ranks: int) -> nn.Module:
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    return parallelize_module(layers(), init_device_mesh("cpu", (ranks,)), plan)


def with_copies(ranks: int) -> nn.Module:
    return fully_shard(layers(), mesh=init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("copies", "shards")))


def both(ranks: int) -> nn.Module:
    """FSDP2 over tensor parallelism: one dimension of the first layer is cut twice, the last layer lies on a slice."""
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("data", "tensor"))
    net = parallelize_module(layers(), mesh["tensor"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    return fully_shard(net, mesh=mesh["data"])


def columns_twice(ranks: int) -> nn.Module:
    """The same dimension over two axes of a mesh, and copies over none."""
    net, mesh = layers(), DeviceMesh("cpu", torch.arange(ranks).view(2, ranks // 2))
    for layer in net:
        weight = distribute_tensor(layer.weight.data, mesh, [Shard(1), Shard(1)])
        layer.weight = nn.Parameter(weight)
        layer.bias = nn.Parameter(distribute_tensor(layer.bias.data, mesh, [Replicate(), Replicate()]))
    return net


WAYS: dict[str, tuple[int, Callable[[int], nn.Module]]] = {
    "rows-2": (2, by_rows),
    "rows-4": (4, by_rows),
    "tensors-2": (2, by_tensors),
    "copies-4": (4, with_copies),
    "both-4": (4, both),
    "columns-4": (4, columns_twice),
}


def seen_on(rank: int, ranks: int, make: Callable[[int], nn.Module]) -> dict[str, Any]:
    """All that is compared with one process, gathered."""
    targets = find_targets(make(ranks))
    layouts = [target.layout for target in targets]
    spread, weights = spread_over(layouts), [target.weight.detach() for target in targets]
    assert spread is not None
    assert not any(isinstance(weight, Target) for weight in weights)

    def gather(parts: list[Tensor]) -> list[Tensor]:
        return [layout.gather(part) for layout, part in zip(layouts, parts, strict=True) if layout is not None]

    sizes = [weight.abs() for weight in weights]
    found: dict[str, Any] = {
        "weights": gather(weights),
        "numbers": spread.sums([torch.tensor(weight.numel()) for weight in weights]),
        "shapes": [list(target.shape) for target in targets],
        "kept": [gather(top_k_masks(sizes, keep, spread)) for keep in KEPT],
        "ranks": [float(kth_smallest(weights, k, spread=spread)) for k in KEPT[:-1]],
        "sizes": [float(kth_smallest(weights, k, magnitudes=True, spread=spread)) for k in KEPT[:-1]],
        "random": gather([drawn(target, random_generator(1, 0, target.name)) for target in targets]),
        "hashed": gather([hashed_score(t.weight, random_generator(1, 2, t.name), t.layout.places()) for t in targets]),
    }
    masks, moved = top_k_masks(sizes, 30, spread), []
    for target, mask, size in zip(targets, masks, sizes, strict=True):
        moved.append(regrow(mask, size, -size, 2, spread=spread_over([target.layout])))
    found["moved"] = gather(moved)
    plan = Plan(Budget(0.5, "erk"), targets, Budget(0.5).structure)
    found["plan"] = gather(plan.masks(sizes))
    mask_set = MaskSet({target.name: target.weight for target in targets})
    mask_set.replace({target.name: mask for target, mask in zip(targets, masks, strict=True)})
    found["counts"], found["total"], state = mask_set.counts, mask_set.total, mask_set.state_dict()
    found["state"] = {name: saved["kept"] for name, saved in state.items()}
    again = MaskSet()
    again.load_state_dict(mask_set.pieces())
    again.to({target.name: target.weight for target in targets})
    assert all(again[name].equal(mask_set[name]) for name in mask_set)
    assert again.counts == mask_set.counts
    found["prints"] = torch.stack([mask_set.whereabouts(), mask_set.fingerprint()])
    assert part_of(targets[0].weight.owner) is targets[0].weight  # type: ignore[attr-defined]
    return found


KEPT = [0, 1, 13, 30, 45, 65, 66]


@pytest.mark.parametrize("way", WAYS)
def test_choices_are_those_of_one_process(way: str) -> None:
    ranks, make = WAYS[way]
    seen = run_on_ranks(seen_on, ranks, make, ranks=ranks, timeout=300)
    targets = find_targets(layers())
    weights = [target.weight.detach() for target in targets]
    sizes = [weight.abs() for weight in weights]
    first = seen[0]
    for name, alone in {
        "weights": weights,
        "random": [random_score(t.weight, random_generator(1, 0, t.name)) for t in targets],
        "hashed": [hashed_score(t.weight, random_generator(1, 2, t.name)) for t in targets],
        "plan": Plan(Budget(0.5, "erk"), targets, Budget(0.5).structure).masks(sizes),
        "moved": [regrow(m, size, -size, 2) for m, size in zip(top_k_masks(sizes, 30), sizes, strict=True)],
    }.items():
        assert all(a.equal(b) for a, b in zip(first[name], alone, strict=True)), name
    for keep, found in zip(KEPT, first["kept"], strict=True):
        assert all(a.equal(b) for a, b in zip(found, top_k_masks(sizes, keep), strict=True)), keep
    masks = MaskSet({target.name: target.weight for target in targets})
    masks.replace({t.name: mask for t, mask in zip(targets, top_k_masks(sizes, 30), strict=True)})
    for found in seen:
        assert found["numbers"] == [42, 21, 3], "an entry is counted twice, or not at all"
        assert found["shapes"] == [list(shape) for shape in SHAPES.values()]
        assert found["ranks"] == [float(kth_smallest(weights, k)) for k in KEPT[:-1]]
        assert found["sizes"] == [float(kth_smallest(weights, k, magnitudes=True)) for k in KEPT[:-1]]
        assert found["counts"] == masks.counts
        assert found["total"] == masks.total
    assert all(first["state"][name].equal(saved["kept"]) for name, saved in masks.state_dict().items())
    if make is with_copies:  # ranks 0 and 2 hold copies, and so do 1 and 3
        assert seen[0]["prints"].equal(seen[2]["prints"])
        assert seen[1]["prints"].equal(seen[3]["prints"])


def test_bits_come_home_as_they_were() -> None:
    """What is gathered is added up as integers: -0.0 and NaN stay."""

    def gathered(rank: int) -> list[Tensor]:
        special = torch.tensor([[-0.0, torch.nan], [torch.inf, 1e-45]])
        found = []
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            weight = distribute_tensor(special.to(dtype), init_device_mesh("cpu", (2,)), [Shard(0)])
            part = part_of(nn.Parameter(weight))
            found.append(part.block.gather(part.detach()).double())
        return found

    for found in run_on_ranks(gathered)[0]:
        assert found[0, 0] == 0
        assert found.signbit()[0, 0]
        assert found[0, 1].isnan()
        assert found[1, 0].isinf()


def test_a_score_that_is_nan_on_one_rank_stops_all() -> None:
    def refused(rank: int) -> list[str]:
        said = []
        layout = Layout((2,), (rank,), (1,), (0,), True)
        spread = spread_over([layout])
        score = torch.tensor([torch.nan if rank else 1.0])
        for attempt in (
            lambda: top_k_masks([score], 1, spread),
            lambda: regrow(torch.tensor([True]), torch.ones(1), score, 1, spread=spread),
        ):
            try:
                attempt()
            except ValueError as error:
                said.append(str(error))
        return said

    for said in run_on_ranks(refused):
        assert len(said) == 2
        assert "A score is NaN" in said[0]
        assert "growth score is NaN or infinite" in said[1]


def test_replicas_that_differ_are_named() -> None:
    """A fingerprint that is reduced over ranks would agree with itself."""

    def prints(rank: int) -> Tensor:
        weight = distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (2,)), [Replicate()])
        part = part_of(nn.Parameter(weight))
        masks = MaskSet({"w": part})
        mask = torch.ones(4, 2, dtype=torch.bool)
        mask[rank, 0] = False
        masks.replace({"w": mask})
        return torch.stack([masks.whereabouts(), masks.fingerprint(), total_over_ranks(torch.ones(1).long())])

    first, second = run_on_ranks(prints)
    assert first[0].equal(second[0])
    assert not first[1].equal(second[1])
