"""A run's folder holds its configuration, a checkpoint is judged before the data are read, and broken ones are skipped."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import wandb
import yaml
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import Tensor, nn
from torch.distributed.checkpoint import save

from lightning_sparse import AtomicCheckpointIO
from lightning_sparse.cli import SparseCLI, main
from lightning_sparse.cli.configs import with_named_configs
from lightning_sparse.models import MLP, Classifier

QUIET = ["--seed_everything=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
QUIET += ["--trainer.enable_model_summary=false"]
RUN = ["--config=data/digits", "--config=models/mlp", "--config=methods/magnitude", *QUIET]
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"]
LOGGERS = {
    "none": ["--trainer.logger=false"],
    "csv": ["--config=loggers/csv", "--trainer.logger.save_dir=runs"],
    "wandb": ["--config=loggers/wandb", "--trainer.logger.save_dir=runs", "--trainer.logger.offline=true"],
}


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("sys.argv", ["lightning-sparse"])
    yield
    wandb.finish()  # else the next logger of another test goes on with its run


def fit(*more: str) -> Path:
    """The checkpoint of a short training."""
    before = set(Path.cwd().rglob("*.ckpt"))
    main(["fit", *RUN, *SHORT, *more])
    (made,) = set(Path.cwd().rglob("*.ckpt")) - before
    return made


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("lightning-sparse: ")
    return said


@pytest.mark.parametrize("logger", LOGGERS)
def test_every_run_keeps_its_own_configuration(logger: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--trainer.default_root_dir=one"] if logger == "none" else []
    first = fit(*LOGGERS[logger], "--data.batch_size=70", *root)
    wandb.finish()
    root = ["--trainer.default_root_dir=two"] if logger == "none" else []
    second = fit(*LOGGERS[logger], "--data.batch_size=50", "--model.network.hidden=[20]", *root)
    for checkpoint, size in ((first, 70), (second, 50)):
        saved = yaml.safe_load((checkpoint.parent.parent / "config.yaml").read_text())
        assert saved["data"]["init_args"]["batch_size"] == size
    assert len(list(Path.cwd().rglob("config.yaml"))) == 2
    capsys.readouterr()
    for checkpoint in (first, second):
        main(["test", f"--ckpt_path={checkpoint}", *QUIET])
        assert "test/accuracy" in capsys.readouterr().out
    assert len(list(Path.cwd().rglob("config.yaml"))) == 2, "a test is not a run"


def test_a_folder_of_two_runs_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    first = fit(*LOGGERS["none"], "--trainer.default_root_dir=runs", "--data.batch_size=70")
    kept = first.rename(first.with_name("kept.ckpt"))
    with pytest.warns(UserWarning, match="exists and is not empty"):
        second = fit(*LOGGERS["none"], "--trainer.default_root_dir=runs", "--trainer.callbacks.sparsity=0.7")
    said = refusal(capsys, "test", f"--ckpt_path={kept}", *QUIET)
    assert "belongs to another run than" in said
    assert "give the configuration of the checkpoint's own run with --config" in said
    main(["test", f"--ckpt_path={second}", *QUIET])
    main(["test", *RUN, *LOGGERS["none"], "--trainer.enable_checkpointing=false", f"--ckpt_path={kept}"])


def test_checkpoints_elsewhere_have_a_copy_beside_them(capsys: pytest.CaptureFixture[str]) -> None:
    kept = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.dirpath=best", "--trainer.callbacks.save_last=link"]
    main(["fit", *RUN, *SHORT, *LOGGERS["csv"], *kept])
    main(["test", "--ckpt_path=best/last.ckpt", *QUIET])
    (Path("best") / "config.yaml").unlink()
    assert "has no config.yaml in the folder of its run" in refusal(capsys, "test", "--ckpt_path=best/last.ckpt")


def test_refit_finds_the_configuration_too(capsys: pytest.CaptureFixture[str]) -> None:
    layers = ["--config=data/teacher", "--config=models/deep_regressor", "--trainer.callbacks+=LayerSparsity"]
    options = ["--trainer.callbacks.strength=0.3", "--trainer.max_epochs=1", "--trainer.default_root_dir=runs"]
    main(["fit", *layers, *options, *LOGGERS["none"], *QUIET])
    (checkpoint,) = Path("runs").rglob("*.ckpt")
    before = (Path("runs") / "config.yaml").read_text()
    main(["refit", f"--ckpt_path={checkpoint}", "--tolerance=0.99"])
    assert "depth         8 -> 2" in capsys.readouterr().out
    assert (Path("runs") / "config.yaml").read_text() == before
    assert list(Path("runs/refit").rglob("*.ckpt"))


def test_the_folder_of_a_sharded_run_is_a_checkpoint_too(capsys: pytest.CaptureFixture[str]) -> None:
    """As Lightning lays it down: weights in shards, and all else beside them."""
    file = fit(*LOGGERS["none"], "--trainer.default_root_dir=runs")
    content = torch.load(file, weights_only=True)
    folder = file.with_name("sharded.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is only one process
        save({"state_dict": content.pop("state_dict")}, checkpoint_id=folder)
    files = ["export", f"--ckpt_path={folder}", "--rungs=[plain]", "--rounds=0", "--calibrate=0", "--compiled=false"]
    assert f"'{folder}' is a folder; give a file in it, one that a run saved." in refusal(capsys, *files, "--to=too_early")
    torch.save(content, folder / "meta.pt")
    main([*files, "--to=sharded"])
    main([*files, f"--ckpt_path={file}", "--to=whole"])
    exported, whole = (torch.load(Path(name) / "plain.pt", weights_only=True) for name in ("sharded", "whole"))
    assert exported.keys() == whole.keys()
    assert all(torch.equal(exported[name], whole[name]) for name in whole)
    content["callbacks"]["SaveRunConfig"]["fingerprint"] = "belongs to another run"
    torch.save(content, folder / "meta.pt")
    assert "belongs to another run" in refusal(capsys, *files, "--to=third")


def test_a_broken_checkpoint_is_skipped_when_a_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    def start(*more: str) -> None:
        kept = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
        kept += ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.filename={epoch}"]
        main(["fit", *RUN, *SHORT, *LOGGERS["none"], *kept, "--trainer.max_epochs=4", *more])

    start()
    folder = Path("checkpoints")
    for name in ("last.ckpt", "epoch=3.ckpt"):
        (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    with (
        pytest.warns(UserWarning, match=r"last.ckpt' cannot be read .* resumes from 'checkpoints/epoch=2.ckpt', the newest"),
        pytest.warns(UserWarning, match="exists and is not empty"),
    ):
        start("--ckpt_path=checkpoints/last.ckpt")
    again = torch.load(folder / "epoch=3-v1.ckpt", weights_only=True)
    assert again["global_step"] == 12
    said = refusal(capsys, "test", "--ckpt_path=checkpoints/epoch=3.ckpt", *RUN)
    assert "cannot be read as a checkpoint (it is cut off); the newest beside it that can is 'checkpoints/" in said


def test_what_is_no_checkpoint_of_this_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    good = fit(*LOGGERS["none"])
    content = torch.load(good, weights_only=True)
    folder = Path("files")
    folder.mkdir()
    torch.save(content["state_dict"], folder / "bare.ckpt")
    torch.save({"mask": {"a": [True]}}, folder / "mask.ckpt")
    torch.save({**content, "path": Path()}, folder / "objects.ckpt")
    torch.save({key: content[key] for key in ("state_dict", "pytorch-lightning_version")}, folder / "weights.ckpt")
    (folder / "text.ckpt").write_text("no checkpoint")
    start = ["fit", *RUN, *SHORT, *LOGGERS["none"]]
    cases = {
        "nowhere.ckpt": "ckpt_path='nowhere.ckpt' is not a file; give one that a run saved.",
        "checkpoints": f"ckpt_path='checkpoints' is a folder; give a file in it, such as '{good.relative_to(Path.cwd())}'.",
        "checkpoints/lost.ckpt": f"is not a file; the newest beside it is '{good.relative_to(Path.cwd())}'.",
        "files/bare.ckpt": "holds a bare state dict, not a Lightning checkpoint; give one that a run saved.",
        "files/mask.ckpt": "holds a dict without a state_dict, not a Lightning checkpoint; give one that a run saved.",
        "files/weights.ckpt": "holds only weights, so training cannot resume from it; give one that was saved without "
        "save_w",
        "files/objects.ckpt": "holds objects beside weights and plain values, which the command line does not load; load it",
    }
    for name, sentence in cases.items():
        assert sentence in refusal(capsys, *start, f"--ckpt_path={name}")
    assert f"such as '{good}'." in refusal(capsys, "test", f"--ckpt_path={good.parent}"), "also without --config"
    assert f"the newest beside it is '{good}'." in refusal(capsys, "test", f"--ckpt_path={good}2")
    for words in (["refit"], ["export", "--to=out"], ["test", "--ckpt_path"], ["refit", *RUN, *LOGGERS["none"]]):
        assert "ckpt_path is missing; write --ckpt_path FILE." in refusal(capsys, *words)
    other = refusal(capsys, *start, "--model.network.hidden=[7,100]", f"--ckpt_path={good}")
    assert "'network.1.weight' is [256, 64] in the file and [7, 64] in the model (and 4 more); configure" in other
    main(["test", *RUN, *LOGGERS["none"], "--trainer.enable_checkpointing=false", "--ckpt_path=files/weights.ckpt"])


class Remembers(Classifier):
    """A module whose checkpoints hold a hyperparameter, which Lightning prefers to the configuration."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1, image_size: int = 8, factor: float = 1.0) -> None:
        super().__init__(MLP, num_classes, in_channels, image_size)
        self.save_hyperparameters()


def test_an_argument_that_a_checkpoint_overrides_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--config=data/digits", "--config=methods/magnitude", "--model=tests.cli.test_runs.Remembers"]
    start = ["fit", *model, *QUIET, *SHORT, *LOGGERS["none"]]
    main([*start, "--model.factor=2"])
    (made,) = Path.cwd().rglob("*.ckpt")
    start += ["--trainer.max_epochs=2", f"--ckpt_path={made}"]
    said = refusal(capsys, *start, "--model.factor=3")
    assert f"model.factor=3.0 would be ignored, because ckpt_path='{made}' holds factor=2.0; omit it, or" in said
    assert "model.factor=3.0 would be ignored" in refusal(capsys, "test", f"--ckpt_path={made}", "--model.factor=3")
    with (
        pytest.warns(UserWarning, match=r"holds factor=2.0, which is used instead of the default, 1.0"),
        pytest.warns(UserWarning, match="exists and is not empty"),
    ):
        main(start)


class Shapeless(L.LightningModule):
    """A module with hyperparameters that takes nothing from its data."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_module_that_takes_nothing_from_its_data_can_be_resumed() -> None:
    model = ["--config=data/digits", "--config=methods/magnitude", "--model=tests.cli.test_runs.Shapeless"]
    start = ["fit", *model, *QUIET, *SHORT, *LOGGERS["none"]]
    main([*start, "--model.width=12"])
    (made,) = Path.cwd().rglob("*.ckpt")
    assert torch.load(made)["hyper_parameters"]["num_classes"] == 10, "what this test is about"
    main([*start, "--model.width=12", "--trainer.max_epochs=2", f"--ckpt_path={made}"])
    (last,) = Path.cwd().rglob("epoch=1*.ckpt")
    assert torch.load(last)["epoch"] == 1


def test_checkpoints_are_written_whole_by_default() -> None:
    def writer(*more: str) -> Any:
        run = with_named_configs(["fit", *RUN, "--trainer.fast_dev_run=true", *more])
        return SparseCLI(run).trainer.strategy.checkpoint_io

    assert type(writer()) is AtomicCheckpointIO
    chosen = writer("--trainer.plugins=AtomicCheckpointIO", "--trainer.plugins.background=true")
    assert chosen.background
    assert type(writer("--trainer.plugins=AsyncCheckpointIO")) is AsyncCheckpointIO
