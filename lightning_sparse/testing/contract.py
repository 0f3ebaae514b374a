"""The contract: a table of checks, and a function that runs them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

from lightning_sparse.testing import neighbors, promises, ranks, refusals
from lightning_sparse.testing.case import Case, Inapplicable, Make, quiet
from lightning_sparse.testing.toys import OPTIMIZERS, Architecture, plain_network, with_architecture

__all__ = ["CHECKS", "Check", "check_method", "run_check"]

Check: TypeAlias = Callable[[Case], None]
"""One check of the contract: it raises an `AssertionError` if the case breaks a promise."""


def _each(name: str, check: Callable[..., None], **choices: list[object]) -> dict[str, Check]:
    """Return the same check for each of several choices; each name ends with its choice."""
    ((argument, values),) = choices.items()
    return {f"{name}-{value}": partial(check, **{argument: value}) for value in values}


CHECKS: Mapping[str, Check] = {
    **_each("1-target", promises.reaches_its_target, optimizer=[*OPTIMIZERS]),
    **_each("2-zeros", promises.keeps_zeros, optimizer=[*OPTIMIZERS]),
    **_each("3-resume", promises.is_resumed_exactly, optimizer=[*promises.STOPS]),
    "3-resume-after-the-end": promises.goes_on_after_its_end,
    **_each("4-plain-files", promises.writes_plain_files, optimizer=[*OPTIMIZERS]),
    "5-ranks": ranks.agrees_on_all_ranks,
    "6-micro-batches": neighbors.adds_up_micro_batches,
    "6-layout-of-memory": neighbors.reads_any_layout_of_memory,
    "6-bf16": neighbors.trains_in_bf16,
    **_each("6-gpu-infinity-fused", neighbors.survives_an_infinity, fused=[False, True]),
    "7-copies": neighbors.is_copied_and_pickled,
    "7-compiled": neighbors.serves_compiled_modules,
    **_each("7-moving-average-first", neighbors.lives_beside_a_moving_average, first=[True, False]),
    "7-stochastic-averaging": neighbors.lives_beside_stochastic_weight_averaging,
    "7-accumulation-schedule": neighbors.follows_an_accumulation_schedule,
    "7-clipping": neighbors.clips_without_dropped_gradients,
    "7-manual-optimization": neighbors.serves_manual_optimization,
    "7-tied-weights": neighbors.serves_tied_weights_of_a_model_built_late,
    "7-two-fits": neighbors.is_trained_twice,
    "7-same-trainer": neighbors.goes_on_with_the_same_trainer,
    "7-interrupted": neighbors.is_interrupted_without_a_trace,
    "8-stored-arguments": refusals.stores_its_arguments,
    "8-impossible-target": refusals.refuses_an_impossible_target,
    "8-unknown-targets": refusals.refuses_unknown_targets,
    "8-second-owner": refusals.refuses_a_second_owner,
    "8-unfit-company": refusals.refuses_unfit_company,
    "8-other-arguments-on-resume": refusals.refuses_other_arguments_on_resume,
}
"""All checks by name; a name begins with the number of its point in the contract.

1 target, 2 zeros for every observer, 3 exact resume, 4 plain checkpoints, 5 ranks agree, 6 gradient accumulation, precision
and memory layout, 7 works beside other callbacks and in other modules, 8 refusals.
"""


def run_check(name: str, case: Case, checks: Mapping[str, Check] = CHECKS) -> None:
    """Run one check from a table.

    Raises:
        AssertionError: if the check fails; the message names the check and what went wrong.
        Inapplicable: if the check does not apply to this case, or cannot run on this machine.
    """
    with quiet(), with_architecture(case.network):
        try:
            checks[name](case)
        except Inapplicable:
            raise
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def check_method(make: Make, exempt: Mapping[str, str] | None = None, network: Architecture = plain_network) -> None:
    """Run all checks of the contract on a method, with a toy module; takes about half a minute and needs no pytest.

    Args:
        make: returns new callbacks at every call; at least one is a `Sparsifier`.
        exempt: checks to skip, each with a reason.
        network: makes the network of the toy, for methods that need another one, such as `testing.attention_network`.

    Raises:
        AssertionError: at the first check that fails; the message begins with the name of the check in `CHECKS`.

    Example:
        >>> from lightning_sparse import RandomSparsity
        >>> only = {name: "shown elsewhere" for name in CHECKS if not name.startswith("1")}
        >>> check_method(lambda: RandomSparsity(0.9), exempt=only)
    """
    exempt = exempt or {}
    unknown = sorted(exempt.keys() - CHECKS.keys())
    if unknown:
        raise ValueError(f"exempt={unknown} are no checks; choose from {list(CHECKS)}.")
    case = Case(make, network)
    for name in CHECKS:
        if name not in exempt:
            try:
                run_check(name, case)
            except Inapplicable:
                continue
            except Exception as error:
                if isinstance(error, AssertionError):
                    raise
                raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
