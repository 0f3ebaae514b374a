"""What every method promises, for every overlay in `configs/methods/`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from lightning_sparse.families import Rewiring
from lightning_sparse.loop.phase import phase_of
from lightning_sparse.testing import (
    CHECKS,
    Architecture,
    Case,
    Check,
    Make,
    MethodContract,
    attention_network,
    masks_of,
    recorded,
)
from tests.helpers.overlays import NEEDS_ATTENTION, OVERLAYS, overlay


def shows_what_it_counts(case: Case) -> None:
    """No entry that counts as kept is zero."""
    run = recorded(case, "sgd")
    weights = dict(run.module.named_parameters())
    for method in run.methods:
        for name, mask in masks_of(method).items():
            # A connection grown at a dead unit has no gradient, and stays at the zero it started from.
            assert bool((weights[name][mask] != 0).all()) or isinstance(method, Rewiring), name


def ends_in_the_phase_it_promises(case: Case) -> None:
    """At target, where a number was promised; else in none."""
    run = recorded(case, "sgd")
    promised = [
        (config.get("sparsity") or ":" in str(config.get("structure")) or "min_sparsity" in config)
        and config.get("mode") != "official"
        for config in (method.config() for method in run.methods)
    ]
    assert phase_of(run.methods) == ("at target" if any(promised) else None)


class TestOverlays(MethodContract):
    def cases(self) -> Mapping[str, Make]:
        return {path.stem: partial(overlay, path) for path in OVERLAYS}

    def networks(self) -> Mapping[str, Architecture]:
        return dict.fromkeys(NEEDS_ATTENTION, attention_network)

    def checks(self) -> Mapping[str, Check]:
        return {"1-kept-is-shown": shows_what_it_counts, "1-phase": ends_in_the_phase_it_promises, **CHECKS}

    def exempt(self) -> Mapping[str, str]:
        why = "similarity is not additive: there is a term per micro-batch"
        return {f"{path.stem}-6-micro-batches": why for path in OVERLAYS if path.stem.split("_")[0] == "cka"}
