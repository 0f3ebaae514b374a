"""Claims: what has come so far belongs to its suite, is compared seed by seed, and says whether it is significant."""

import json

import pytest

from benchmarks import claims, tables
from benchmarks.record import RESULTS, Options
from benchmarks.suites import CLAIMS, SUITES


@pytest.mark.parametrize("suite", CLAIMS, ids=lambda s: s.name)
def test_what_the_queue_has_brought_so_far_are_parts_of_their_suite(suite):
    content = suite.content(RESULTS)
    assert content.get("command", "").removesuffix(" --data DIR") in ("", f"python -m benchmarks {suite.name}")
    parts = [key for key, _ in suite.parts(Options(out=RESULTS))]
    assert all(any(key.items() <= run.items() for key in parts) for run in content.get("runs", []))


def made_up(key):
    """A training of a claim; those of the method in question are better by 1 to 3 %, seed by seed."""
    ours = "strength" in key or any(str(value).startswith(("HyperSparse", "LpSphere", "rms")) for value in key.values())
    better = "0." in str(key.get("method", "")) or ours
    return {
        **{"test": 0.5 + key["seed"] / 10 + better * (key["seed"] + 1) / 100, "val": 0.5, "rate": key.get("rate", 0.01)},
        **{"similarity": [0.9, 0.6], "pruned": [0.1] * 5, "fine-tuned": [0.2 + better * key["seed"] / 100] * 5},
        **{"hoyer per layer": [0.5] * 6, "predicted": [0.4] * 6},
        "features": {f"{when} epoch": {"w": [float(i) for i in range(11)]} for when in ("first", "middle", "last")}
        if key.get("norm") == "none"
        else {},
    }


FITS = (
    ("plain", None, 0.5, 0.5),
    ("weight decay", 0.0, 0.4, 0.4),
    ("weight decay", 0.0, 0.3, 0.6),
    ("layer penalty", 0.3, 0.35, 0.2),
    ("refit, warm", 0.3, 0.5, 0.2),
    ("refit, fresh", 0.3, 0.6, 0.2),
)
"""Names, strengths, errors on test and on validation data."""


def fits(key):
    names = ("fit", "strength", "error", "val")
    return [dict(zip(names, fit, strict=True)) | {"depth": (8, 4) if fit[1] else None} for fit in FITS]


def come(name, folder):
    """Results of two seeds of all that the table of a claim is made from."""
    for suite in (SUITES[name] for name in {*claims.CLAIMS[name][1], *claims.BESIDE.values(), "desk-cka"}):
        content = {}
        for key, _ in suite.parts(Options()):
            if key["seed"] in (0, 1, 10):
                suite.put(content, key, fits(key) if "setting" in key else made_up(key))
        (folder / f"{suite.name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "count", "row"),
    [
        ("tamed", 28,
         "narrow ResNet-20|98%|`RigL, drop_fraction=0.1`|2|55.00 ± 7.07|55.00 ± 7.07|56.50 ± 7.78|+1.50 ± 0.71|"
         "not significant|+1.50 ± 0.71|not significant"),
        ("unfavorable", 15,
         "width 40|with `LayerSparsity`, tuned, merged|2|0.350 ± 0.000|4.0 of 8|-0.050 ± 0.000|better"),
        ("norms", 12, 'LeNet-5|98%|`norm="rms"`|2|55.00 ± 7.07|56.50 ± 7.78|0.01 and 0.01|+1.50 ± 0.71|not significant'),
        ("imbalance", 6, "ResNet-8|last epoch|10|9|1|9.1%"),
        ("forms", 14,
         "95%|all samples of every batch|0.0008|2|0.60 ± 0.00|56.50 ± 7.78|+1.50 ± 0.71|not significant|85.03"),
        ("prunable", 20, "90%|fine-tuned|0.03|2|20.00 ± 0.00|20.50 ± 0.71|+0.50 ± 0.71|not significant|-1.00 ± 0.00|worse"),
        ("phases", 6, "99.5%|`GraNet`|2|55.00 ± 7.07|56.50 ± 7.78|+1.50 ± 0.71|not significant|89.35"),
        ("hoyer", 7, "1.4|2|55.00 ± 7.07|0.500, 0.400, 0.572|0.500, 0.400, 0.524|0.500, 0.400, 0.597|0.500, 0.400, 0.347|"
         "0.500, 0.400, 0.868|0.500, 0.400, 0.721"),
        ("spheres", 7, "90%|`LpSphere`|2|56.50 ± 7.78|+1.50 ± 0.71|not significant|93.29"),
    ],
)  # fmt: skip
def test_the_table_of_a_claim_pairs_seeds(monkeypatch, tmp_path, name, count, row):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    come(name, tmp_path)
    head, *rows = claims.CLAIMS[name][0]()
    assert len(rows) == count
    assert {len(cells) for cells in rows} == {len(head)}
    assert row in ["|".join(cells) for cells in rows]


def test_only_seeds_that_both_have_are_compared():
    assert claims.beside({0: 0.9, 1: 0.5, 2: 0.25}, {1: 0.25, 2: 0.5, 3: 0.9}) == ["2", "+0.00 ± 35.36", "not significant"]
    assert claims.beside({0: 0.5}, {1: 0.5}) == ["0", "", "undecided: no seed in common"]


@pytest.mark.parametrize(
    ("differences", "lower", "expected"),
    [
        ([0.01], False, "undecided: one seed"),
        ([0.01, 0.02, 0.03], False, "not significant"),  # 0.02 ± 0.0248
        ([0.01, 0.015, 0.02], False, "better"),  # 0.015 ± 0.0124
        ([0.01, 0.015, 0.02], True, "worse"),
        ([-0.01, -0.015, -0.02], True, "better"),
        ([-0.01, -0.015, -0.02], False, "worse"),
        ([0.0, 0.0, 0.0], False, "not significant"),
    ],
)
def test_a_difference_is_significant_if_its_interval_excludes_zero(differences, lower, expected):
    assert claims.verdict(differences, lower) == expected


def test_what_has_not_come_yet_is_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert tables.block("hoyer") == "Done: 0 of 21 runs of `claim-hoyer`."
    SUITES["claim-hoyer"].write(Options(out=tmp_path), {"seed": 0, "method": "p = 2", "sparsity": 0.0}, made_up({"seed": 0}))
    assert tables.block("hoyer").endswith("\n\nDone: 1 of 21 runs of `claim-hoyer`.")
