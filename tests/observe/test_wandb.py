"""What Weights & Biases gets, read back from the file of an offline run by its own reader."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger

import lightning_sparse
import lightning_sparse.observe.wandb as board
from lightning_sparse import SET, MagnitudePruning, RandomSparsity
from lightning_sparse.cli import main
from lightning_sparse.loop import Sparsifier
from lightning_sparse.observe import PatientWandbLogger, SparsityCheckpoint, SparsityMonitor
from lightning_sparse.testing import BATCHES, fit, toy
from tests.helpers.overlays import ROOT

wandb = pytest.importorskip("wandb")
STEP = "trainer/global_step"
EPOCHS = 3


@pytest.fixture(autouse=True)
def _all_of_it_stays_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    wandb.finish()


def records(folder: Path) -> list[list[dict[str, Any]]]:
    """Of each run file in a folder, oldest first."""
    wandb.finish()
    found = []
    for file in sorted(folder.rglob("*.wandb"), key=lambda file: file.stat().st_mtime):
        command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"this wandb has no reader: {done.stderr.splitlines()[-1:]}")
        found.append([json.loads(line) for line in done.stdout.splitlines() if line])
    return found


def history(run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for record in run if record["type"] == "history"]


def curve(run: list[dict[str, Any]], key: str) -> dict[int, float]:
    return {row[STEP]: row[key] for row in history(run) if key in row}


def train(folder: Path, *methods: Any, logger: Any = None, **options: Any) -> SparsityMonitor:
    torch.manual_seed(1)
    monitor, best = SparsityMonitor(table=False), SparsityCheckpoint(dirpath=folder / "best", monitor="val_loss")
    logger = logger or WandbLogger(save_dir=folder, project="toy", group="seeds")
    settings = {"log_every_n_steps": 1, "max_epochs": EPOCHS, **options}
    fit(toy(), *(methods or [MagnitudePruning(0.75)]), monitor, best, logger=logger, **settings)
    return monitor


def test_the_dashboard_is_in_the_file_of_the_run(tmp_path: Path) -> None:
    monitor = train(
        tmp_path, MagnitudePruning(0.75, targets=["!net.8"]), RandomSparsity(0.5, targets=["net.8"], name="head")
    )
    [run] = records(tmp_path)
    assert sorted(curve(run, "sparsity/target")) == list(range(EPOCHS * BATCHES))
    ends = [BATCHES * (epoch + 1) - 1 for epoch in range(EPOCHS)]
    assert {step: value for step, value in curve(run, "sparsity/actual").items() if step in ends} == pytest.approx(
        dict(zip(ends, monitor.history.column("sparsity"), strict=True))
    )
    for name in ("net.0.weight", "net.8.weight"):
        assert sorted(curve(run, f"layers/{name}")) == ends
    steps = [row[STEP] for row in history(run)]
    assert steps == sorted(steps)
    shown = {key: row[key] for row in history(run) for key in row}
    assert (
        shown["survivors/net.6.weight"]["_type"] == "histogram"
        if "survivors/net.6.weight" in shown
        else (shown["survivors/net.6.weight._type"] == "histogram")
    )
    media = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("media/**/*") if path.is_file()}
    for part in (
        "masks/net.0.weight",
        "charts/layers_over_time",
        "charts/layers",
        "charts/loss_against_sparsity",
        "charts/report",
    ):
        assert any(part in name for name in media), (part, media)


def definitions(run: list[dict[str, Any]]) -> dict[str, str]:
    found = [record["metric"] for record in run if record["type"] == "metric"]
    return {metric.get("glob_name") or metric["name"]: metric.get("step_metric", "") for metric in found}


def test_every_section_goes_by_the_step_also_in_a_run_that_somebody_else_opened(tmp_path: Path) -> None:
    opened = wandb.init(dir=tmp_path, project="sweep")
    train(tmp_path, logger=WandbLogger(experiment=opened))
    [run] = records(tmp_path)
    assert definitions(run) == {STEP: "", **dict.fromkeys(board.SECTIONS, STEP)}
    logged = {key for row in history(run) for key in row if "/" in key and key != STEP}
    assert not {key for key in logged if not any(key.startswith(section[:-1]) for section in board.SECTIONS)}


def test_artifacts_know_their_sparsity_and_their_score(tmp_path: Path) -> None:
    train(tmp_path)
    [run] = records(tmp_path)
    artifacts = {record["artifact"]["type"]: record["artifact"] for record in run if record["type"] == "artifact"}
    facts = json.loads(artifacts["model"]["metadata"])
    [file] = (tmp_path / "best").iterdir()
    saved = torch.load(file, weights_only=True)
    weights = [value for value in saved["state_dict"].values() if value.ndim > 1]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert facts["sparsity"] == pytest.approx(zeros)
    assert zeros == pytest.approx(0.75)
    assert facts["global_step"] == saved["global_step"]
    [score] = [callback["best_model_score"] for key, callback in saved["callbacks"].items() if "Checkpoint" in key]
    assert facts["val_loss"] == pytest.approx(float(score))
    assert json.loads(artifacts["sparsity"]["metadata"])["method"] == "MagnitudePruning"


def test_a_dense_checkpoint_is_no_sparse_artifact(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "first", monitor="epoch", mode="min")
    logger = WandbLogger(save_dir=tmp_path)
    with pytest.warns(
        UserWarning,
        match=r"the best checkpoint, has sparsity 0.0000, not 0.7500, and is not uploaded as an artifact; add Spars",
    ):
        fit(
            toy(), MagnitudePruning(0.75, start=0.5), SparsityMonitor(table=False), first, logger=logger, log_every_n_steps=1
        )
    [run] = records(tmp_path)
    assert "model" not in {record["artifact"]["type"] for record in run if record["type"] == "artifact"}


def config_of(run: list[dict[str, Any]]) -> dict[str, Any]:
    """The configuration that a run ends with."""
    return dict(opened_as(run)["config"]["update"])


def opened_as(run: list[dict[str, Any]]) -> dict[str, Any]:
    return [record["run"] for record in run if record["type"] == "run"][-1]


def test_a_run_is_named_by_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    train(tmp_path, logger=WandbLogger(save_dir=tmp_path, project="toy"))
    [run] = records(tmp_path)
    opened = opened_as(run)
    assert opened["display_name"] == "MagnitudePruning 75% seed 3"
    assert opened["tags"] == ["MagnitudePruning", "sparsity 75%"]


def test_what_the_user_has_named_keeps_its_name(tmp_path: Path) -> None:
    train(tmp_path, logger=WandbLogger(save_dir=tmp_path, name="mine", group="seeds", tags=["paper"]))
    [run] = records(tmp_path)
    opened = opened_as(run)
    assert (opened["display_name"], opened["run_group"]) == ("mine", "seeds")
    assert opened["tags"] == ["paper", "MagnitudePruning", "sparsity 75%"]


def test_the_configuration_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    train(tmp_path, accumulate_grad_batches=2)
    [run] = records(tmp_path)
    config = config_of(run)
    assert config["method"] == "MagnitudePruning"
    assert config["seed"] == 3
    assert config["model"]["class"] == "Toy"
    assert config["data"] == {"batch_size": 8}
    assert config["trainer"]["accumulate_grad_batches"] == 2
    [optimizer] = config["optimizer"]
    assert (optimizer["class"], optimizer["lr"], optimizer["momentum"]) == ("SGD", 0.05, 0.9)
    assert config["methods"]["MagnitudePruning"]["sparsity"] == 0.75
    assert config["methods"]["MagnitudePruning"]["allocation"]


def test_the_summary_has_the_best_and_no_number_twice(tmp_path: Path) -> None:
    monitor = train(tmp_path)
    [run] = records(tmp_path)
    logged = {key for row in history(run) for key in row}
    assert {"sparsity/actual", "sparsity/target", "best/val_loss", "best/epoch", "frontier/density"} <= logged
    assert not {"sparsity", "final/actual"} & logged
    assert "charts/accuracy_against_sparsity_table" not in logged
    assert list(curve(run, "frontier/density").values()) == pytest.approx([0.25])
    assert next(iter(curve(run, "best/val_loss").values())) in monitor.history.rows[-1]["metrics"].values()


def test_whoever_wants_to_know_is_told(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"has removed all of 'net\.6\.weight'"):
        train(tmp_path / "dead", MagnitudePruning(0.99, targets=["net.6", "net.8"]))
    wandb.finish()
    with pytest.warns(UserWarning, match="ends at sparsity|has saved nothing"):  # of the method, and of SparsityCheckpoint
        train(tmp_path / "missed", MagnitudePruning(0.75, end=1.0), Stop())
    told = [
        [record["alert"]["title"] for record in run if record["type"] == "alert"]
        for folder in ("dead", "missed")
        for run in records(tmp_path / folder)
    ]
    assert told == [["A layer is dead"], ["The target was missed"]]


class Stop(L.Callback):
    """Interrupts a run, which does not know that it is short."""

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == 1


def test_a_resumed_run_goes_on_where_it_was(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path / "all", "{step}", save_top_k=-1, every_n_epochs=1)
    train(tmp_path / "whole", SET(0.5, every="1 steps"))
    [whole] = records(tmp_path / "whole")
    logger = WandbLogger(save_dir=tmp_path / "run", id="abc")
    train(tmp_path / "run", SET(0.5, every="1 steps"), saved, Stop(), logger=logger)
    wandb.finish()
    again = WandbLogger(save_dir=tmp_path / "run", id="abc", resume="allow")
    with pytest.warns(UserWarning, match="is not empty"):
        train(
            tmp_path / "run",
            SET(0.5, every="1 steps"),
            logger=again,
            ckpt_path=tmp_path / "all" / f"step={2 * BATCHES}.ckpt",
        )
    first, second = records(tmp_path / "run")
    for key in ("sparsity/actual", "sparsity/churn", "layers/net.6.weight", "cost/macs", "val_loss"):
        assert len(curve(whole, key)) >= EPOCHS
        assert {**curve(first, key), **curve(second, key)} == pytest.approx(curve(whole, key)), key
    steps = [row[STEP] for row in (*history(first), *history(second)) if STEP in row]
    assert all(a <= b for a, b in itertools.pairwise(steps))
    assert definitions(first) == definitions(second)


def test_pictures_only_where_somebody_can_show_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        train(tmp_path, logger=CSVLogger(tmp_path))
        train(tmp_path / "two", logger=[CSVLogger(tmp_path), CSVLogger(tmp_path)])
    assert "CSVLogger receives numbers only; pictures are in report.html" in caplog.text
    assert "CSVLogger and CSVLogger receive numbers only" in caplog.text


# ---- no account, no network --------------------------------------------------------------------------------------------


def test_without_a_key_runs_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(board, "_has_key", lambda wandb: False)
    said = board.stay_offline()
    missing = "there is no API key (`wandb login` stores one)"
    assert said == f"Weights & Biases stays offline, because {missing}; `wandb sync DIR` sends the run later."
    assert os.environ["WANDB_MODE"] == "offline"
    assert board.stay_offline() is None, "chosen now"


def test_without_a_network_runs_stay_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(board, "_has_key", lambda wandb: True)

    def unreachable(address: Any, timeout: float) -> Any:
        raise OSError

    monkeypatch.setattr(board.socket, "create_connection", unreachable)
    assert "cannot be reached" in str(board.stay_offline())


def test_the_command_line_stays_offline_by_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(board, "_has_key", lambda wandb: False)
    monkeypatch.setattr("sys.argv", ["lightning-sparse"])
    files = ["data/digits", "models/mlp", "loggers/wandb", "loggers/monitor", "methods/magnitude"]
    configs = [f"--config={ROOT / 'configs' / file}.yaml" for file in files]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    quiet += [f"--trainer.logger.save_dir={tmp_path}"]  # the service of wandb has another working folder
    main(["fit", *configs, *quiet, "--trainer.max_epochs=2", "--trainer.limit_train_batches=10", "--seed_everything=0"])
    assert "Weights & Biases stays offline, because there is no API key" in capsys.readouterr().err
    [run] = records(tmp_path)
    assert "best/val/accuracy" in {key for row in history(run) for key in row}
    opened = opened_as(run)
    assert (opened["display_name"], opened["run_group"]) == ("MagnitudePruning 90% seed 0", "MagnitudePruning 90%")
    assert opened["config"]["update"]["data"]["class"] == "Digits"
    asked = opened["config"]["update"]["command_line"]
    assert asked["data"]["class_path"].endswith("Digits")
    assert asked["trainer"]["max_epochs"] == 2
    [page] = tmp_path.rglob("report.html")
    assert "class_path: lightning_sparse.MagnitudePruning" in page.read_text(), "the resolved configuration"


def test_in_a_script_a_patient_logger_stays_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(board, "_has_key", lambda wandb: False)
    with pytest.warns(UserWarning, match="stays offline, because there is no API key"):
        train(tmp_path, logger=PatientWandbLogger(project="patience", save_dir=tmp_path))
    [run] = records(tmp_path)
    assert "sparsity/actual" in {key for row in history(run) for key in row}


def test_a_patient_logger_asks_nobody_who_has_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(board, "_has_key", lambda wandb: pytest.fail("chosen already"))
    train(tmp_path / "by mode", logger=PatientWandbLogger(project="patience", save_dir=tmp_path))
    wandb.finish()
    monkeypatch.delenv("WANDB_MODE")
    train(tmp_path / "by argument", logger=PatientWandbLogger(project="patience", save_dir=tmp_path, offline=True))


def test_a_process_that_knows_no_account_goes_on(tmp_path: Path) -> None:
    # wandb reads its settings once per process, so only a process of its own shows what a user meets
    script = """
from lightning_sparse.loop import Sparsifier
from lightning_sparse.observe import PatientWandbLogger
logger = PatientWandbLogger(project="patience", save_dir=".")
logger.log_metrics({"sparsity/actual": 0.5}, 1)
print(logger.experiment.settings.mode)
"""
    known = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_MODE") and key != "WANDB_API_KEY"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**known, "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split()[-1:] == ["offline"], done.stderr
    assert "stays offline, because there is no API key" in done.stderr


SWEEPS = {path: yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))}
OF_SWEEPS = [
    pytest.param(path, overlay, id=f"{path.stem}-{Path(str(overlay)).stem}")
    for path, sweep in SWEEPS.items()
    for overlay in sweep["parameters"].get("config", {}).get("values", [None])
]


@pytest.mark.parametrize(("path", "overlay"), OF_SWEEPS)
def test_sweeps_make_commands_that_run(
    path: Path, overlay: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    sweep = SWEEPS[path]
    chosen = {
        name: {"value": spec.get("values", [spec.get("min")])[-1]} for name, spec in sorted(sweep["parameters"].items())
    }
    if overlay is not None:
        chosen["config"] = {"value": overlay}
    flags = utils.create_sweep_command_args({"args": chosen})["args"]
    command = [
        part for piece in utils.create_sweep_command(sweep["command"]) for part in (flags if piece == "${args}" else [piece])
    ]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", command[:1])
    with pytest.raises(SystemExit) as stop:
        main([*command[1:], "--print_config"])
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    last = config["trainer"]["callbacks"][-1]
    source = ROOT / (overlay or next(part.partition("=")[2] for part in command if "configs/methods/" in part))
    asked = yaml.safe_load(source.read_text())["trainer"]["callbacks+"][-1]["class_path"]
    assert last["class_path"].rpartition(".")[2] == asked
    for name, value in chosen.items():
        if name.startswith("trainer.callbacks.init_args."):
            assert last["init_args"][name.rpartition(".")[2]] == value["value"]
    assert last["init_args"]["sparsity"] >= 0.95
    assert config["seed_everything"] == 2


def test_the_sweep_of_methods_has_all_that_promise_a_sparsity() -> None:
    swept = SWEEPS[ROOT / "configs" / "sweeps" / "sparsity_by_method.yaml"]["parameters"]["config"]["values"]
    found = {yaml.safe_load((ROOT / path).read_text())["trainer"]["callbacks+"][-1]["class_path"] for path in swept}
    promising = {
        cls.__name__
        for cls in vars(lightning_sparse).values()
        if inspect.isclass(cls) and issubclass(cls, Sparsifier) and "sparsity" not in cls.refused
    }
    assert found == promising
