"""The record of benchmarks: resumed, shared between processes, never mixed with other results, and shown as it is."""

import json
import re
import subprocess
from pathlib import Path

import lightning as L
import pytest
import torch

from benchmarks import accuracy, gpu, lpss, methods, overhead, record, tables
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
from benchmarks.competitors import PEERS, Net, layers
from benchmarks.growth import where
from benchmarks.methods import Step, Turns, compared, train
from benchmarks.record import growth, peaks, resumed
from lightning_sparse import SET, LpSphere
from lightning_sparse.functional import magnitude


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
    found = json.loads(file.read_text())["runs"]
    kept = [(r["seed"], r["method"], r["sparsity"]) for r in found]
    assert {r["torch"] for r in found} == {torch.__version__}
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
    regularized = len(numbers["history"])
    assert regularized <= 17, "60, at most 200 and 160 epochs, a twelfth of each"
    assert numbers["epochs"] == 5 + regularized + 14
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


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty", "ignore:The total number of param")
def test_a_training_on_spheres_that_was_killed_goes_on_from_its_checkpoint(monkeypatch, tmp_path):
    begun = []

    class Killed(LpSphere):
        def on_train_epoch_start(self, trainer, *_):
            begun.append(trainer.current_epoch)
            if begun == [0, 1]:
                raise RuntimeError("killed")
            super().on_train_epoch_start(trainer, *_)

    how = (lpss.RECIPES["quick"], "LpSphere", 0.8, 0, "", 2)
    whole = accuracy.train(*how)
    monkeypatch.setattr(lpss, "LpSphere", Killed)
    with pytest.raises(RuntimeError, match="killed"):
        accuracy.train(*how, checkpoint=tmp_path / "half.ckpt")
    resumed = accuracy.train(*how, checkpoint=tmp_path / "half.ckpt")
    assert resumed | {"seconds": 0} == whole | {"seconds": 0}
    assert begun == [0, 1, 1]
    assert not list(tmp_path.iterdir())


def test_on_a_gpu_what_is_missing_runs_short_ones_of_first_seeds_first(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "GROUPS", {"paper": ("long", "toy", "elsewhere")})
    for name, suite in {
        "long": Suite("lenet300-fashion", ("dense",), (), (0, 1)),
        "toy": Suite("digits", ("dense", "gradual"), (0.5,), (0, 1)),
        "elsewhere": Suite("resnet20-cifar10", ("dense",), (), (0,)),
    }.items():
        monkeypatch.setitem(SUITES, name, suite)
    monkeypatch.setattr(accuracy.FashionMNIST, "load", lambda self, train: None)
    done = {"runs": [{"seed": 0, "method": "dense", "sparsity": 0.0}]}
    (tmp_path / "accuracy_toy.1.json").write_text(json.dumps(done))
    assert list(gpu.trainings(tmp_path, str(tmp_path))) == [("toy", 1), ("long", 0), ("toy", 2), ("toy", 3), ("long", 1)]


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


def test_a_step_is_compared_with_its_dense_neighbors():
    dense = iter([9.0, 9.0, 1.0, 3.0, 5.0, 4.0, 3.0])
    own = iter([(8.0, False), (8.0, True), (3.0, False), (8.0, False), (6.0, True), (4.0, None), (7.0, False)])
    steps = []
    for seconds, changed in own:
        steps += [Step(seconds, 0.5, bool(changed), counts=changed is not None), Step(next(dense), 0.0, None, True)]
    steps.pop()
    ratios = {changed: [ratio for _, ratio in compared(steps, changed)] for changed in (False, True)}
    message = "not the first two, nor one that does not count, nor one without a next, nor beside dense steps after a change"
    assert ratios == {False: [3.0, 4.0], True: [2.0]}, message


@pytest.mark.parametrize("name", PEERS)
def test_a_way_leaves_the_model_as_it_found_it(name):
    module = Net("quick")
    masks = {layer: magnitude(layer.weight) >= layer.weight.abs().quantile(0.5) for layer in list(layers(module))[1:]}
    for layer, mask in masks.items():
        layer.weight.data.mul_(mask)  # so that those which choose by themselves choose the same
    try:
        way = PEERS[name](module, masks)
    except ImportError:
        pytest.skip("not installed")
    owned = {id(parameter) for parameter in module.parameters()}
    before = {key: value.clone() for key, value in module.net.state_dict().items()}
    way.enter()
    masking = any(hasattr(layer, "weight_mask") or hasattr(layer, "parametrizations") for layer in masks)
    assert masking == (name in ("ModelPruning", "torch.nn.utils.prune", "parametrize"))
    assert (module.term is not None) == ("L1" in name)
    way.before_step()
    way.after_step()
    way.leave()
    after = module.net.state_dict()
    if name == "ModelPruning":  # keeps a tenth
        before = {key: value * (after[key] != 0) for key, value in before.items()}
    assert set(after) == set(before)
    assert {id(parameter) for parameter in module.parameters()} == owned, "the optimizer still has them all"
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert [type(m).__name__ for m in module.net] == ["Flatten", "Linear", "ReLU", "Linear"]
    assert module.term is None


def test_every_other_step_is_dense():
    turns = Turns(SET(0.5, start=0.0, end=1.0, every="2 steps"), "cpu")
    kept = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            turns.end()
            kept.append(int(pl_module.net[1].weight.count_nonzero()))

    with turns.watching():
        train("quick", 4, 16, [turns, turns.method, Look()], "cpu")
    assert max(kept[::2]) < min(kept[1::2]), "dense steps wake what is pruned"
    assert [step.changed for step in turns.steps] == [False, None, True, None] * 4
    assert all((step.inside > 0) == (step.changed is not None) for step in turns.steps)
    assert all(step.inside < step.seconds for step in turns.steps)


def test_time_in_a_station_that_another_visits_counts_once(monkeypatch):
    clock = iter([1.0, 2.0, 5.0, 8.0])  # the outer one begins, the inner one begins, the outer one ends
    monkeypatch.setattr(methods, "perf_counter", lambda: next(clock))
    turns = Turns(SET(0.5), "cpu")
    inner = turns.timing(lambda: None)
    turns.timing(inner)()
    assert turns.inside == 4.0


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


def test_peaks_are_of_all_ways_in_turns_and_go_on_where_they_stopped(monkeypatch, tmp_path, capsys):
    measured = []

    def alone(module, flag, name, *place):
        measured.append((module, name, *place))
        if name == "absent":
            raise subprocess.CalledProcessError(1, name)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return float(len(measured))

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(record, "alone", alone)
    places = {("mlp", 32): ["dense", "absent", "masks"]}
    with pytest.raises(KeyboardInterrupt):
        peaks("toy", places, 2, keep=True)
    peaks("toy", places, 2, keep=True)
    assert [name for _, name, *_ in measured] == ["dense", "absent", "masks", "dense", "absent", "dense", "absent", "masks"]
    assert measured[0] == ("benchmarks.toy", "dense", "--models", "mlp", "--batches", "32")
    assert resumed("toy_memory") == {"mlp, batch 32": {"dense": [1.0, 6.0], "masks": [3.0, 8.0]}}
    assert "masks" in capsys.readouterr().out
    path = tmp_path / "toy_memory.json"
    text = path.read_text()
    for key, value in {"torch": "1.0", "cpu": "an abacus"}.items():
        result = json.loads(text)
        result["machine"][key] = value
        path.write_text(json.dumps(result))
        with pytest.raises(SystemExit, match=f"toy_memory.json is of {key} {value}, this is .*; remove it to begin anew"):
            peaks("toy", places, 2, keep=True)


def test_overhead_goes_on_where_it_stopped(monkeypatch, tmp_path):
    asked = []

    def steps(*how):
        asked.append(how)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return {"dense": {"ratio": 1.0, "low": 1.0, "high": 1.0, "seconds": 0.1}}

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(overhead, "steps", steps)
    monkeypatch.setattr("sys.argv", ["overhead", "--models", "mlp", "--save"])
    with pytest.raises(KeyboardInterrupt):
        overhead.main()
    overhead.main()
    assert [how[:2] for how in asked] == [("mlp", 32), ("mlp", 128), ("mlp", 128)]


def test_peak_memory_is_shown_as_a_ratio_of_its_turn():
    rows = tables._memory({"mlp, batch 32": {"dense": [10.0, 20.0], "a": [11.0, 24.0], "b": [15.0]}}, {"a": "A", "b": "B"})
    assert rows[1:] == [["plain, MiB", "15"], ["A", "1.150 (1.10 to 1.20)"], ["B", "1.500"]]
