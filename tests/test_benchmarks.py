"""The record of benchmarks: resumed, shared between processes, never mixed with other results, and shown as it is."""

import json
import re
from pathlib import Path

import lightning as L
import pytest
import torch

from benchmarks import accuracy, tables
from benchmarks.accuracy import (
    GROUPS,
    METHODS,
    OPEN_ENDED,
    SETTINGS,
    SUITES,
    Suite,
    collect,
    merge,
    prepare,
    run,
    runs,
    table,
)
from benchmarks.growth import where
from benchmarks.methods import neighbours
from benchmarks.record import growth


class Made(list):
    """Runs, and the names of the checkpoints they would write."""


@pytest.fixture
def suite(monkeypatch):
    """A suite whose runs are instant, and the list of those that were made."""
    made = Made()
    made.checkpoints = []

    def train(setting, method, sparsity, seed, *options):
        made.append((seed, method, sparsity))
        made.checkpoints.append(options[-1].name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return {"test": 0.5 + seed / 10, "seconds": 0.0, "inference": 1 - sparsity, "training": 1.0}

    published = {"gradual": (70.5, 60.5)}
    monkeypatch.setitem(SUITES, "toy", Suite("digits", ("dense", "gradual"), (0.5, 0.9), (0, 1), published=published))
    monkeypatch.setattr(accuracy, "train", train)
    return made


def test_an_interrupted_suite_goes_on_where_it_stopped(suite, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run("toy", "", (1, 1), None, tmp_path)
    assert len(collect("toy", tmp_path)["runs"]) == 2
    run("toy", "", (1, 1), None, tmp_path)
    assert suite[:2] + suite[3:] == runs(SUITES["toy"]), "the one that was interrupted is begun anew, no other is"
    run("toy", "", (1, 1), None, tmp_path)
    assert len(suite) == 7


def test_parts_share_the_work_and_become_one_file(suite, tmp_path):
    suite += [None] * 3  # no interruption
    for part in (2, 1):
        run("toy", "", (part, 2), None, tmp_path)
    again = (tmp_path / "accuracy_toy.2.json").read_text()
    merge("toy", tmp_path)
    (tmp_path / "accuracy_toy.2.json").write_text(again)
    merge("toy", tmp_path)
    (file,) = tmp_path.iterdir()
    kept = [(r["seed"], r["method"], r["sparsity"]) for r in json.loads(file.read_text())["runs"]]
    assert kept == runs(SUITES["toy"])
    assert sorted(suite[3:]) == sorted(kept)
    lines = table("toy", tmp_path).splitlines()
    assert lines[2:] == [
        "| dense | 55.00 ± 7.07 (2); 1.000, 1.000 |  |",
        "| gradual | 55.00 ± 7.07 (2); 0.500, 1.000 | 55.00 ± 7.07 (2); 0.100, 1.000 |",
        "| gradual, published | 70.50 | 60.50 |",
    ]


def test_results_of_another_version_or_recipe_are_refused(suite, tmp_path):
    suite += [None] * 3
    run("toy", "", (1, 1), None, tmp_path)
    with pytest.raises(SystemExit, match="epochs=12, the recipe now says 7; begin anew with another --out"):
        prepare("toy", "", 7, tmp_path, download=False)
    path = tmp_path / "accuracy_toy.json"
    result = json.loads(path.read_text())
    result["machine"]["lightning_sparse"] = "0.0.1"
    path.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match=r"of lightning_sparse 0\.0\.1, this is .*; begin anew with another --out"):
        prepare("toy", "", None, tmp_path, download=False)


def test_runs_of_another_suite_with_the_same_recipe_count_too(suite, monkeypatch, tmp_path):
    suite += [None] * 3
    run("toy", "", (1, 1), None, tmp_path)
    del suite[3:]
    monkeypatch.setitem(SUITES, "more", Suite("digits", ("gradual", "random"), (0.9,), (0,), shares=("toy",)))
    run("more", "", (1, 1), None, tmp_path)
    assert suite[3:] == [(0, "random", 0.9)]
    assert [r["method"] for r in collect("more", tmp_path)["runs"]] == ["random", "gradual"]
    assert [r["method"] for r in collect("more", tmp_path, shared=False)["runs"]] == ["random"]


def test_no_run_goes_on_from_the_checkpoint_of_another_recipe(suite, tmp_path):
    suite += [None] * 3
    run("toy", "", (1, 1), None, tmp_path)
    run("toy", "", (1, 1), 2, tmp_path / "shorter")
    assert len(set(suite.checkpoints)) == len(suite.checkpoints) == 12


def test_missing_data_are_a_sentence(tmp_path):
    missing = str(tmp_path / "nowhere")
    for suite in (*GROUPS["desk"], *GROUPS["paper"]):
        with pytest.raises(SystemExit, match=f"is not in root='{missing}'; give its folder with --data, or add --download"):
            prepare(suite, missing, None, tmp_path, download=False)


def test_a_method_that_ends_the_training_itself():
    setting = SETTINGS["digits"]
    numbers = accuracy.train(setting, "HyperSparse, as published", 0.9, 0, "", epochs=1)
    regularised = len(numbers["history"])
    assert regularised <= 17, "60, at most 200 and 160 epochs, a twelfth of each"
    assert numbers["epochs"] == 5 + regularised + 14
    assert numbers["kept"] == numbers["total"] // 10 - 1


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(("method", "epochs"), [("RigL", 12), ("HyperSparse, as published", 1)])
def test_a_training_that_was_killed_goes_on_from_its_checkpoint(method, epochs, monkeypatch, tmp_path):
    begun = []

    class Killer(L.Callback):
        def on_train_epoch_start(self, trainer, *_):
            begun.append(trainer.current_epoch)
            if begun == [*range(9)]:
                raise RuntimeError("killed")

    how = (SETTINGS["digits"], method, 0.9, 0, "", epochs)
    whole = accuracy.train(*how)
    table = OPEN_ENDED if method in OPEN_ENDED else METHODS
    monkeypatch.setitem(table, method, lambda *options, make=table[method]: [*make(*options), Killer()])
    with pytest.raises(RuntimeError, match="killed"):
        accuracy.train(*how, checkpoint=tmp_path / "half.ckpt")
    assert [file.name for file in tmp_path.iterdir()] == ["half.ckpt"]
    resumed = accuracy.train(*how, checkpoint=tmp_path / "half.ckpt")
    assert resumed | {"seconds": 0} == whole | {"seconds": 0}
    assert begun == [*range(9), *range(8, whole["epochs"])]
    assert not list(tmp_path.iterdir())


def test_the_page_shows_the_results():
    page = tables.PAGE.read_text()
    shown = re.findall(r"^<!-- (?!end)(\w+) -->$", page, flags=re.MULTILINE)
    assert shown == list(tables.TABLES), "every table has its place, in this order"
    assert tables.filled(page) == page, "run python -m benchmarks.tables"


def test_the_best_of_a_column_is_bold():
    rows = [["a", "1.50 ± 0.10", "3 of 4"], ["b", "12.0", ""], ["c", "12.0 (x)", "2"]]
    tables.embolden(rows, [1])
    tables.embolden(rows, [2], lowest=True)
    assert rows == [["a", "1.50 ± 0.10", "3 of 4"], ["b", "**12.0**", ""], ["c", "**12.0** (x)", "**2**"]]
    assert tables.markdown([["a", "b"], ["c", ""]]) == "| a | b |\n| --- | --- |\n| c |  |"


def test_means_have_their_spread():
    assert tables.spread([0.5, 0.6]) == "55.00 ± 7.07"
    assert tables.spread([0.25], 3, 1) == "0.250"


def test_a_step_is_compared_with_its_neighbours():
    epochs = [[9.0] * 6, [5.0, 1.0, 4.0, 3.0, 9.0, 6.0, 7.0], [5.0, 2.0, 2.0, 2.0]]
    assert neighbours(epochs) == [2.0, 2.0, 1.0], "neither those of the first epoch nor the first and last of another"


def test_where_connections_grow():
    old = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    new = torch.tensor([[0, 1, 1], [1, 1, 0], [0, 0, 1], [1, 1, 0]]).bool()
    assert where([(old, new), (old, old)]) == {
        "grown": 4,
        "into outputs without connections": 0.75,  # two into the first, which has lost its own, one into the third
        "outputs without connections": 3 / 8,
        "into one output": 0.5,
    }


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone says by how much a process has grown")
def test_memory_that_is_given_back_counts_too():
    assert 62 < growth(lambda: torch.ones(1 << 24)) < 80, "MiB"
    assert growth(lambda: None) < 4
