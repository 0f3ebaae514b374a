"""All suites, most important first. `python -m benchmarks` lists how many parts of each are done."""

from __future__ import annotations

from torch import channels_last, nn

from benchmarks import (
    cka_regularization,
    export,
    hypersparse,
    lp_sphere,
    masking,
    methods,
    monitor,
    overhead,
    peers,
    rewiring,
    robustness,
    sharded,
    sparsegpt,
    structures,
    updates,
    writes,
)
from benchmarks import sparse_connectivity_learning as scl
from benchmarks.accuracy import Comparison, Setting
from benchmarks.channels import WAYS, Slimmed, Slimming, SmallImages, mobilenet
from benchmarks.cka_regularization import FORMS, STRENGTHS, Dissimilar, Prunable, with_and_without
from benchmarks.growth import Watched
from benchmarks.layer_sparsity import CONV, FASHION, SIGNED, SIMULATION, Layers
from benchmarks.record import Measurements, Suite, Trainings, whole
from lightning_sparse.data import CIFAR10, CIFAR100, FashionMNIST
from lightning_sparse.models import VGG, LeNet5, LeNet300, ResNet


def resnet20_half(*shape: int) -> nn.Module:
    return ResNet(*shape, width=0.5)


def resnet8(*shape: int) -> nn.Module:
    return ResNet(*shape, depth=8)


def resnet32x2(*shape: int) -> nn.Module:
    """The ResNet-32 of the pruning literature, with double width."""
    return ResNet(*shape, depth=32, width=2)


FAST = {"precision": "bf16-mixed", "memory_format": channels_last}
"""Options that are faster on a CPU."""
CIFAR = Setting(CIFAR10, resnet20_half, 6, **FAST)
HALVED = {"data": SmallImages, "network": resnet20_half, "memory_format": channels_last}
SMALL = Setting(epochs=6, **HALVED)
"""The same recipe with a quarter of the work, in float32, for processors without fast bf16."""
FEW = (0.9, 0.98, 0.995)
MANY = (0.8, 0.9, 0.95, 0.98, 0.99, 0.995)

CKA = ("random + CKA-SR", "random + CKA-SR, all samples", "random + AugCKA-SR")
WITH_TARGET = (
    *("dense", "random", "SNIP", "GraSP", "SynFlow", "L1, then one-shot", "lottery ticket"),
    *("one-shot + fine-tuning", "gradual", "SET", "RigL", "GraNet", "L1-ART", "HyperSparse", "SCL"),
)

STRUCTURED = (
    *("dense", "gradual", "RigL", "AC/DC", "RigL, fan-in", "gradual, blocks of 4"),
    *("gradual 2:4", "AC/DC 2:4", "SR-STE", "S-STE", "SR-STE, transposable"),  # at 50%, regardless of the sparsity
)

DESK = (
    Comparison("desk-lenet300", Setting(FashionMNIST, LeNet300, 15, 128, 0.05), WITH_TARGET, MANY),
    Comparison("desk-lenet5", Setting(FashionMNIST, LeNet5, 5, 128, 0.05, **FAST), WITH_TARGET, MANY),
    Comparison(
        "desk-resnet20",
        CIFAR,
        ("dense", "gradual", "RigL", "HyperSparse", "SET", "GraNet", "SCL"),  # random masks are in desk-cka
        (0.9, 0.98),
    ),
    Comparison("desk-cka", CIFAR, ("random", "random + CKA-SR"), (0.9, 0.95, 0.98), similarity=True),
    Comparison(
        "desk-hypersparse",
        Setting(FashionMNIST, LeNet300, 30, 128, 0.05),
        ("dense", "one-shot + fine-tuning", "gradual", "L1-ART", "HyperSparse"),
        FEW,
    ),
    Comparison("desk-structures-lenet300", Setting(FashionMNIST, LeNet300, 15, 128, 0.05), STRUCTURED, (0.9,)),
    scl.Prices("desk-prices", scl.PRICED),
    Comparison("desk-lp-sphere", lp_sphere.HALF, ("dense", "static", "LpSphere"), (0.5, 0.8, 0.9)),
    Comparison("desk-growth", Watched(CIFAR10, resnet20_half, 2, **FAST), ("RigL", "RigL, eps=0.1", "SET"), (0.98,)),
    Layers("desk-layers-simulation", SIMULATION, 5),
    Layers("desk-layers-fashion", FASHION, 3),
    Layers("desk-layers-conv", CONV, 1),
    Comparison("desk-structures-resnet20", SMALL, STRUCTURED, (0.9,)),
    Slimming(
        "desk-channels-resnet20",
        Slimmed(epochs=6, **HALVED),
        tuple(WAYS),
        (0.5,),
    ),
    Slimming(
        "desk-channels-mobilenet",
        Slimmed(CIFAR10, mobilenet, 4, 128, 0.05, memory_format=channels_last),
        tuple(WAYS)[:5],
        (0.5,),
    ),
)

TAMED = ("RigL, drop_fraction=0.1", "RigL, growth_per_output=True")
CLAIMS = (
    # RigL where it loses to static masks, and whether what helps there helps everywhere. For LeNet, static masks and RigL
    # with its defaults are in the `desk-...` suites of the same settings.
    Comparison("claim-rigl-resnet20", SMALL, ("random", "RigL", *TAMED), (0.9, 0.98)),
    Comparison("claim-rigl-lenet5", Setting(FashionMNIST, LeNet5, 5, 128, 0.05, **FAST), TAMED, MANY),
    Comparison("claim-rigl-lenet300", Setting(FashionMNIST, LeNet300, 15, 128, 0.05), TAMED, MANY),
    # Layer sparsity without a teacher that favors it.
    Layers("claim-layers", SIGNED, 10),
    # Whether the normalization of SCL helps.
    scl.Norms("claim-norms-lenet5", Setting(FashionMNIST, LeNet5, 10, 128, 0.05, memory_format=channels_last)),
    scl.Norms("claim-norms-resnet8", Setting(SmallImages, resnet8, 10, memory_format=channels_last)),
    # CKA-SR by form and strength, and whether networks with less similar layers can be pruned further.
    Comparison(
        "claim-cka",
        Dissimilar(epochs=10, **HALVED),
        with_and_without("random", list(FORMS), STRENGTHS),
        (0.95, 0.98),
        similarity=True,
    ),
    Comparison(
        "claim-prunable",
        Prunable(epochs=10, **HALVED),
        with_and_without("dense", ["all samples of every batch"], (0.01, 0.03)),
        (0.0,),
        similarity=True,
    ),
    # HyperSparse with enough epochs for its phases: 8, at most 16, and the rest of 36 epochs.
    Comparison(
        "claim-hypersparse",
        Setting(epochs=36, **HALVED),
        ("HyperSparse, 2 : 4 : 3", "L1-ART, 2 : 4 : 3", "gradual", "GraNet"),
        (0.99, 0.995),
    ),
    # LpSS: the sparsity of vectors on spheres. The published recipe is the suite `paper-lp-sphere-fashion`.
    Comparison("claim-hoyer", lp_sphere.OnSpheres(), lp_sphere.BY_EXPONENT, (0.0,)),
)
"""Tests of the central claim of each paper, as far as a CPU can test it, most important first."""

ART = {"epochs": 220, "batch_size": 64, "weight_decay": 1e-4, "milestones": (140, 180), "val_fraction": 1e-5}
"""The published recipe of HyperSparse.

60 epochs, regularization until the pruned copy is as good, and 160 epochs of fine-tuning (other methods: 60 + 160). All
training images are used, except the one that the loader needs for validation.
"""
LONG = {"epochs": 160, "milestones": (80, 120)}
PHASED = "HyperSparse, as published"
PAPER = (
    # Published numbers: README of the LpSS repository.
    Comparison(
        "paper-lp-sphere-fashion",
        lp_sphere.PUBLISHED,
        ("dense", "static", "LpSphere"),
        (0.5, 0.8, 0.9),
        published={"LpSphere": (94.43, 93.91, 93.29)},
    ),
    # Published numbers: appendix of CKA-SR, table 2 (the entries at these strengths), and table 5, which does not state the
    # number of samples. The recipe is that of random static masks and CKA-SR. The published one reports test accuracy at the
    # best validation epoch.
    Comparison(
        "paper-cka-cifar10",
        Setting(CIFAR10, ResNet, nesterov=True, **LONG),
        ("random", *CKA),
        (0.95,),
        seeds=(0, 1, 2, 3, 4),
        similarity=True,
        published={"random": (84.16,), "random + CKA-SR": (84.97,), "random + CKA-SR, all samples": (85.03,)},
    ),
    Comparison(
        "paper-cka-cifar100",
        Setting(CIFAR100, ResNet, nesterov=True, **LONG),
        ("random", *CKA),
        (0.7, 0.85, 0.9, 0.95, 0.98, 0.998),
        similarity=True,
        published={
            "random": (65.42, 60.37, 56.96, 47.27, 33.74, 2.95),
            "random + CKA-SR, all samples": (65.60, 60.86, 57.25, 48.26, 34.44, 3.32),
            "random + AugCKA-SR": (65.85, 60.89, 57.02, 48.39, 34.60, 3.04),
        },
    ),
    # Networks, numbers of epochs and sparsities of the papers; the published results were not available. First the recipe of
    # GraSP as reported by other papers, then that of GraNet's script, whose code selects the epoch on the test set.
    Comparison(
        "paper-initial-cifar10",
        Setting(CIFAR10, resnet32x2, weight_decay=1e-4, **LONG),
        ("dense", "random", "SNIP", "GraSP", "SynFlow"),
        (0.9, 0.95, 0.98),
    ),
    Comparison(
        "paper-dynamic-cifar10",
        Setting(CIFAR10, VGG, **LONG),
        ("dense", "random", "gradual", "SET", "RigL", "GraNet"),
        (0.9, 0.95, 0.98),
    ),
    # Published numbers: README of the HyperSparse repository, best test epoch of phase 3. Here the last epoch counts.
    *(
        Comparison(
            f"paper-hypersparse-{name}",
            Setting(data, network, **ART),
            ("dense", "gradual", PHASED),
            FEW,
            published={"dense": rows[:1], PHASED: rows[1:]},
        )
        for name, data, network, rows in (
            ("resnet32x2-cifar10", CIFAR10, resnet32x2, (94.70, 94.22, 92.69, 89.35)),
            ("vgg19-cifar10", CIFAR10, VGG, (93.84, 93.93, 93.75, 92.91)),
            ("resnet32x2-cifar100", CIFAR100, resnet32x2, (74.60, 74.08, 70.08, 59.58)),
            ("vgg19-cifar100", CIFAR100, VGG, (72.88, 73.23, 71.83, 69.02)),
        )
    ),
)

COST = (
    Measurements("cost-overhead", overhead.parts),
    Measurements("cost-methods", methods.parts),
    Measurements("cost-finetuning", methods.finetuning),
    Measurements("cost-updates", updates.parts),
    Measurements("cost-sharded", sharded.parts),
    Measurements("cost-rewiring", rewiring.parts),
    Measurements("cost-sparsegpt", sparsegpt.parts),
    Measurements("cost-hypersparse", hypersparse.parts),
    Measurements("cost-sparse-connectivity-learning", scl.costs),
    Measurements("cost-masking", masking.parts),
    Measurements("cost-lp-sphere", lp_sphere.parts),
    Measurements("cost-cka-regularization", cka_regularization.parts),
    Measurements("cost-monitor", monitor.parts),
    Measurements("memory-overhead", overhead.memory_parts),
    Measurements("memory-methods", methods.peaks),
    Measurements("export-resnet", export.resnet),
    Measurements("export-mlp", whole(export.mlp)),
    Measurements("export-carriers", whole(export.carriers)),
    Measurements("kernels-fan-in", structures.fan_in),
    Measurements("kernels-blocks", structures.blocks),
    Measurements("ladders-structures", structures.ladders),
    Measurements("export-structures", export.structures),
    Measurements("export-heads", whole(export.heads)),
    Measurements("peers", peers.parts, same=("lightning_sparse", "torch")),
    Measurements("robustness", robustness.parts, same=("lightning_sparse", "torch")),
    Measurements("robustness-writes", writes.parts, same=("lightning_sparse", "torch")),
    Measurements("cost-structures", methods.structured),
)

COMING: tuple[Suite, ...] = ()
"""Suites that have not been measured completely on a quiet machine yet."""

SUITES: dict[str, Suite] = {suite.name: suite for suite in (*DESK, *CLAIMS, *PAPER, *COST, *COMING)}
QUEUE = (*DESK, *CLAIMS, *(suite for suite in COMING if isinstance(suite, Trainings)), *PAPER)
GROUPS = {
    name: tuple(suite.name for suite in suites)
    for name, suites in (("desk", DESK), ("claims", CLAIMS), ("paper", PAPER), ("cost", COST))
}
