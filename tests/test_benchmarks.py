"""The record of benchmarks: resumed, shared between processes, never mixed with other results, and shown as it is."""

import json
import re
from dataclasses import replace
from pathlib import Path
from time import monotonic

import lightning as L
import pytest
import torch

from benchmarks import accuracy, cells, cost_tables, gpu, lp_sphere, record, tables
from benchmarks.__main__ import main
from benchmarks.accuracy import METHODS, OPEN_ENDED, Comparison, Setting
from benchmarks.competitors import PEERS, layers
from benchmarks.growth import where
from benchmarks.methods import EveryOther, compared
from benchmarks.record import RESULTS, LeftOut, Measurements, Options, at_once
from benchmarks.suites import CLAIMS, COMING, DESK, PAPER, SUITES
from benchmarks.trainers import Net
from benchmarks.turns import Step, Turns, Way, growth, held, in_turns, ratios
from lightning_sparse import SET, LpSphere, MagnitudePruning
from lightning_sparse.data import Digits, FashionMNIST
from lightning_sparse.functional import magnitude
from lightning_sparse.models import LeNet300

DIGITS = Setting(Digits, LeNet300, 12, 64, 0.05)
TOY = Comparison("toy", DIGITS, ("dense", "gradual"), (0.5, 0.9), (0, 1), published={"gradual": (70.5, 60.5)})


NO_DATA = ("desk-layers-simulation", "claim-layers")


class Made(list):
    """Runs, and the names of the checkpoints they would write."""


@pytest.fixture
def made(monkeypatch):
    """Runs of a toy are instant; the list of those that were made, of which the third is interrupted."""
    made = Made()
    made.checkpoints = []

    def train(setting, seed, method, sparsity, checkpoint, **how):
        made.append((seed, method, sparsity))
        made.checkpoints.append(checkpoint.name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return {"test": 0.5 + seed / 10, "seconds": 0.0, "inference": 1 - sparsity, "training": 1.0}

    monkeypatch.setattr(accuracy, "train", train)
    return made


def keys(suite, options):
    return [tuple(key.values()) for key, _ in suite.parts(options)]


def test_an_interrupted_suite_goes_on_where_it_stopped(made, tmp_path):
    options = Options(out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        TOY.run(options)
    assert len(TOY.content(tmp_path)["runs"]) == 2
    assert TOY.missing(options) == [2, 3, 4, 5]
    TOY.run(options)
    assert made[:2] + made[3:] == keys(TOY, options), "the one that was interrupted is begun anew, no other is"
    TOY.run(options)
    assert len(made) == 7


def test_processes_share_the_work_and_one_file(made, tmp_path):
    made += [None] * 3  # no interruption
    for part in (2, 1):
        TOY.run(Options(out=tmp_path, part=(part, 2)))
    assert made[3:] == keys(TOY, Options())[1::2] + keys(TOY, Options())[::2]
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert {run["torch"] for run in found["runs"]} == {torch.__version__}
    assert found["command"] == "python -m benchmarks toy"
    head, _, *rows = TOY.table(tmp_path).splitlines()
    assert head == "| method | sparsity | test | inference | training | seeds | published |"
    assert sorted(rows) == [
        "| dense | 0.0 | 0.5500 ± 0.0707 | 1.0000 ± 0.0000 | 1.0000 ± 0.0000 | 2 |  |",
        "| gradual | 0.5 | 0.5500 ± 0.0707 | 0.5000 ± 0.0000 | 1.0000 ± 0.0000 | 2 | 0.7050 |",
        "| gradual | 0.9 | 0.5500 ± 0.0707 | 0.1000 ± 0.0000 | 1.0000 ± 0.0000 | 2 | 0.6050 |",
    ]


def test_only_the_parts_that_are_asked_for_are_done(made, tmp_path):
    made += [None] * 3
    TOY.run(Options(out=tmp_path, only=["method grad*"]))
    assert made[3:] == [(seed, "gradual", sparsity) for seed in (0, 1) for sparsity in (0.5, 0.9)]


def test_results_of_another_version_or_recipe_are_refused(made, tmp_path):
    made += [None] * 3
    TOY.run(Options(out=tmp_path))
    with pytest.raises(SystemExit, match=r"toy\.json is of epochs 12, this is 7; begin anew with another --out"):
        TOY.prepare(Options(out=tmp_path, epochs=7))
    path = tmp_path / "toy.json"
    result = json.loads(path.read_text())
    result["machine"]["lightning_sparse"] = "0.0.1"
    path.write_text(json.dumps(result))
    with pytest.raises(SystemExit, match=r"of lightning_sparse '0\.0\.1', this is .*; begin anew with another --out"):
        TOY.run(Options(out=tmp_path))


def test_no_run_goes_on_from_the_checkpoint_of_another_recipe(made, tmp_path):
    made += [None] * 3
    TOY.run(Options(out=tmp_path))
    TOY.run(Options(out=tmp_path / "shorter", epochs=2))
    assert len(set(made.checkpoints)) == len(made.checkpoints) == 12


@pytest.mark.parametrize("suite", [s for s in (*DESK, *CLAIMS, *PAPER) if s.name not in NO_DATA], ids=lambda s: s.name)
def test_missing_data_are_a_sentence(suite, tmp_path):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(SystemExit, match=f"is not in root='{missing}'; give its folder with --data, or add --download"):
        suite.run(Options(data=missing, out=tmp_path))


@pytest.mark.parametrize(
    "suite",
    [*DESK, *[s for s in SUITES.values() if isinstance(s, Measurements) and s not in COMING]],
    ids=lambda s: s.name,
)
def test_every_number_that_is_published_is_a_part_of_its_suite(suite):
    content, options = suite.content(RESULTS), Options(out=RESULTS)
    assert content["command"].removesuffix(" --data DIR") == f"python -m benchmarks {suite.name}"
    assert suite.missing(options) == []
    if isinstance(suite, Measurements):
        found = {key[:1] for key, _ in suite.parts(options)}
        assert found == {()} or found == {(name,) for name in content["numbers"]}
    else:
        rows = {
            json.dumps({name: run.get(name) for name in key}) for key, _ in suite.parts(options) for run in content["runs"]
        }
        assert {json.dumps(key) for key, _ in suite.parts(options)} <= rows


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize(("method", "epochs"), [("RigL", 12), ("HyperSparse, as published", 1)])
def test_a_training_that_was_killed_goes_on_from_its_checkpoint(method, epochs, monkeypatch, tmp_path):
    begun = []

    class Killer(L.Callback):
        def on_train_epoch_start(self, trainer, *_):
            begun.append(trainer.current_epoch)
            if begun == [*range(9)]:
                raise RuntimeError("killed")

    how = (DIGITS, method, 0.9, 0, "", epochs)
    whole = accuracy.train(*how)
    if method in OPEN_ENDED:  # the method ends the training itself
        regularized = len(whole["history"])
        assert regularized <= 17, "60, at most 200 and 160 epochs, a twelfth of each"
        assert whole["epochs"] == 5 + regularized + 14
        assert whole["kept"] == whole["total"] // 10 - 1
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

    how = (replace(lp_sphere.PUBLISHED, data=Digits), "LpSphere", 0.8, 0, "", 2)
    whole = accuracy.train(*how)
    monkeypatch.setattr(lp_sphere, "LpSphere", Killed)
    with pytest.raises(RuntimeError, match="killed"):
        accuracy.train(*how, checkpoint=tmp_path / "half.ckpt")
    resumed = accuracy.train(*how, checkpoint=tmp_path / "half.ckpt")
    assert resumed | {"seconds": 0} == whole | {"seconds": 0}
    assert begun == [0, 1, 1]
    assert not list(tmp_path.iterdir())


def test_on_a_gpu_what_is_missing_runs_short_ones_of_first_seeds_first(monkeypatch, tmp_path, capsys):
    toy = replace(TOY, sparsities=(0.5,))
    long = Comparison("long", Setting(FashionMNIST, LeNet300, 30), ("dense",), (), (0, 1))
    monkeypatch.setattr(FashionMNIST, "load", lambda self, train: None)
    toy.write(Options(out=tmp_path), {"seed": 0, "method": "dense", "sparsity": 0.0}, {})
    work = gpu.trainings(Options(data=str(tmp_path), out=tmp_path), [long, toy, SUITES["paper-cka-cifar10"]])
    assert [(suite.name, place) for suite, place in work] == [("toy", 1), ("long", 0), ("toy", 2), ("toy", 3), ("long", 1)]
    assert "paper-cka-cifar10 is left out. CIFAR10 is not in root=" in capsys.readouterr().out


def test_the_pages_show_the_results():
    pages = [path.read_text() for path in tables.PAGES]
    shown = re.findall(rf"^<!-- ({'|'.join(tables.TABLES)}) -->$", "".join(pages), flags=re.MULTILINE)
    assert shown == list(tables.TABLES), "every table has its place, in this order"
    for path, page in zip(tables.PAGES, pages, strict=True):
        assert tables.filled(page) == page, f"{path.name}: run python -m benchmarks.tables"


def test_a_table_without_results_says_so(monkeypatch):
    monkeypatch.setitem(tables.TABLES, "exports", lambda: [["structure", "`plain`"]])
    assert tables.block("exports") == tables.NOT_MEASURED


def test_a_gain_within_the_noise_is_called_level():
    dense = {"low": 9.0, "median": 10.0, "high": 11.0}
    assert cost_tables.gain(dense, {"low": 4.0, "median": 5.0, "high": 8.9}) == "2.00"
    assert cost_tables.gain(dense, {"low": 4.0, "median": 5.0, "high": 9.0}) == "2.00 (level)"
    assert cost_tables.gain(dense, {"low": 11.1, "median": 12.5, "high": 20.0}) == "0.80"


def test_the_best_of_a_column_is_bold():
    rows = [["a", "1.50 ± 0.10", "3 of 4"], ["b", "12.0", ""], ["c", "12.0 (x)", "2"]]
    cells.embolden(rows, [1])
    cells.embolden(rows, [2], lowest=True)
    assert rows == [["a", "1.50 ± 0.10", "3 of 4"], ["b", "**12.0**", ""], ["c", "**12.0** (x)", "**2**"]]
    assert record.markdown([["a", "b"], ["c", ""]]) == "| a | b |\n| --- | --- |\n| c |  |"


def test_means_have_their_spread():
    assert record.spread([0.5, 0.6]) == "55.00 ± 7.07"
    assert record.spread([0.25], 3, 1) == "0.250"


def test_a_step_is_compared_with_its_dense_neighbors():
    dense = iter([9.0, 9.0, 1.0, 3.0, 5.0, 4.0, 3.0])
    own = iter([(8.0, False), (8.0, True), (3.0, False), (8.0, False), (6.0, True), (4.0, None), (7.0, False)])
    steps = []
    for seconds, changed in own:
        steps += [Step("own", seconds, 0.5, bool(changed), counts=changed is not None), Step("dense", next(dense))]
    steps.pop()
    found = {changed: [ratio for _, ratio in compared(steps, changed)] for changed in (False, True)}
    message = "not the first two, nor one that does not count, nor one without a next, nor beside dense steps after a change"
    assert found == {False: [3.0, 4.0], True: [2.0]}, message


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
    method = SET(0.5, start=0.0, end=1.0, every="2 steps")
    turns = EveryOther(method, "cpu")
    kept = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            kept.append(int(pl_module.net[1].weight.count_nonzero()))

    turns.fit(Net("quick"), 4, 4, 4, callbacks=[Look()])
    assert max(kept[::2]) < min(kept[1::2]), "dense steps wake what is pruned"
    assert [step.changed for step in turns.steps] == [False, False, True, False] * 4
    assert [step.way for step in turns.steps[1:]] == ["dense", "own"] * 7 + ["dense"]
    inside = {step.way: step.inside for step in turns.steps[-2:]}
    assert 0 < 5 * inside["dense"] < inside["own"]
    assert all(step.inside < step.seconds for step in turns.steps)
    assert turns.bytes == 1


def test_ways_take_turns_every_other_round_in_the_other_order():
    log = []

    def logged(name):
        return Way(*([], *(lambda what=what: log.append(name + what) for what in (" enters", " steps", "", " leaves"))))

    turns = Turns([], lambda module: {name: logged(name) for name in "ab"})
    turns.fit(Net("quick"), 4, 10)
    order = [line[0] for line in log if line.endswith("steps")]
    assert order == list("aabbaabba"), "b would have been first, in a step in which all begin"
    assert log[:6] == ["a enters", "a steps", "a", "a steps", "a", "a leaves"]
    assert log[-1] == "a leaves", "the model is left as it was"
    table = turns.table("a")
    assert list(table) == ["a", "b"]
    assert table["a"]["ratio"] == 1


def test_only_the_last_of_several_steps_in_a_row_is_timed(monkeypatch):
    log = []
    ways = {name: Way(after_step=lambda name=name: log.append(name)) for name in "ab"}
    turns = Turns([], lambda module: ways, in_a_row=2)
    clock = iter(range(100))
    monkeypatch.setattr("benchmarks.turns.now", lambda device: log.append("clock") or float(next(clock)))
    turns.fit(Net("quick"), 4, 5)
    assert "".join(what for what in log if what != "clock") == "aaaabbbb"
    assert [step.way for step in turns.steps] == ["", "a", "a", "b", "b"]
    seen = "".join(what[0] for what in log)
    assert seen.endswith("cacac" + "cbcbc" * 2), "read at the start of both steps, and at the end of the second"


def test_functions_take_turns_and_some_take_their_own_time(monkeypatch):
    log = []
    seen = in_turns({"a": lambda: log.append("a"), "b": lambda: log.append("b") or 3.0}, 2, warm_up=1)
    assert log == list("baabba")
    assert [times["b"] for times in seen] == [3.0, 3.0]
    rounds = [{"a": 2.0, "b": 3.0}, {"a": 1.0, "b": 4.0}, {"a": 1.0, "b": 2.0}]
    assert ratios(rounds, "a")["b"] == {"ratio": 2.0, "low": 1.5, "high": 4.0, "seconds": 3.0}


def test_time_in_a_station_that_another_visits_counts_once(monkeypatch):
    clock = iter([1.0, 2.0, 5.0])  # the outer one begins, the inner one begins, the outer one ends
    monkeypatch.setattr("benchmarks.turns.perf_counter", lambda: next(clock))
    turns = EveryOther(SET(0.5), "cpu")
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


def test_what_is_held_counts_once_and_without_the_model():
    method, net = MagnitudePruning(0.5), torch.nn.Linear(10, 10)
    method.extra = {"weight": net.weight, "rows": [torch.ones(6), torch.ones(4)]}
    method.extra["view"] = method.extra["rows"][0][:2]
    assert held(method, net) == 40
    assert held(method) == 40 + 400


def test_peaks_are_of_all_ways_in_turns_and_go_on_where_they_stopped(monkeypatch, tmp_path, capsys):
    measured = []

    def alone(name):
        measured.append(name)
        if name == "absent":
            raise LeftOut("it is not installed")
        if len(measured) == 4:
            raise KeyboardInterrupt
        return float(len(measured))

    names = ("dense", "absent", "masks")
    suite = Measurements(
        "toy", lambda options: ((("mlp", n, turn), lambda n=n: alone(n)) for turn in range(2) for n in names)
    )
    options = Options(out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        suite.run(options)
    suite.run(options)
    assert measured == ["dense", "absent", "masks", "dense", "absent", "dense", "absent", "masks"]
    assert suite.content(tmp_path)["numbers"] == {"mlp": {"dense": [1.0, 6.0], "masks": [3.0, 8.0]}}
    assert "mlp, absent, 0 is left out: it is not installed" in capsys.readouterr().out
    path = tmp_path / "toy.json"
    text = path.read_text()
    for key, value in {"torch": "1.0", "cpu": "an abacus"}.items():
        result = json.loads(text)
        result["machine"][key] = value
        path.write_text(json.dumps(result))
        with pytest.raises(SystemExit, match=f"toy.json is of {key} '{value}', this is .*; begin anew with another --out"):
            suite.run(options)


def test_a_suite_of_one_part_is_done_once(tmp_path):
    done = []
    suite = Measurements("toy", lambda options: iter([((), lambda: done.append(1) or {"speed": 2.0})]))
    for _ in range(2):
        suite.run(Options(out=tmp_path))
    assert done == [1]
    assert suite.content(tmp_path)["numbers"] == {"speed": 2.0}


def test_peak_memory_is_shown_as_a_ratio_of_its_turn():
    rows = cost_tables.peaks(
        {"mlp, batch 32": {"dense": [10.0, 20.0], "a": [11.0, 24.0], "b": [15.0]}}, {"a": "A", "b": "B"}
    )
    assert rows[1:] == [["plain, MiB", "15"], ["A", "1.150 (1.10 to 1.20)"], ["B", "1.500"]]


def test_the_command_line_names_what_is_missing_and_what_it_does_not_know(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["desk-lenet500"])
    assert "no suite 'desk-lenet500'; choose from desk-lenet300, " in capsys.readouterr().err
    for command in (["cost-updates"], ["desk-cka", "--quick"], ["desk-cka", "--only", "seed 0"]):
        with pytest.raises(SystemExit):
            main([*command, "--at-once", "2"])
        assert "--at-once is for whole suites of trainings" in capsys.readouterr().err
    main(["--out", str(tmp_path)])
    assert re.search(r"desk-cka +0 of +18 parts are there", capsys.readouterr().out)


def test_processes_of_their_own_do_one_part_each(monkeypatch, tmp_path):
    begun = []

    class Process:
        def __init__(self, command, **_):
            begun.append(self)
            self.command, self.killed = command, False

        def poll(self):
            return {0: 0, 1: 1}.get(begun.index(self))  # the first ends well, the second fails, others never end

        def kill(self):
            self.killed = True

    monkeypatch.setattr("benchmarks.record.subprocess.Popen", Process)
    suite, options = SUITES["desk-cka"], Options(data=str(tmp_path / "nowhere"), out=tmp_path)
    failed = at_once([(suite, place) for place in range(9)], 2, options, until=monotonic() + 1)
    assert failed == 1
    assert [process.command[-1] for process in begun] == [f"--part={part}/18" for part in (1, 2, 3, 4)]
    assert [process.killed for process in begun] == [False, False, True, True]
    with pytest.raises(SystemExit, match=f"CIFAR10 is not in root='{options.data}'"):
        main(begun[0].command[3:])
