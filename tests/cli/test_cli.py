"""The command line: overlays compose, every file prints, a mistake is one sentence."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from lightning_sparse.cli import main
from lightning_sparse.export import RUNGS, RungName
from lightning_sparse.testing import method_of
from tests.helpers.overlays import NEEDS_ATTENTION, NEEDS_ZEROS, OVERLAYS, ROOT, overlay

CONFIGS = ROOT / "configs"
SMALL = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
SMALL += ["--trainer.enable_model_summary=false", "--seed_everything=0"]


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-sparse"])


def printed(capsys: pytest.CaptureFixture[str], *files: Path, more: list[str] | None = None) -> dict[str, Any]:
    arguments = [f"--config={file}" for file in files]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, *(more or []), "--print_config"])
    assert stop.value.code == 0
    loaded: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return loaded


DIGITS, MLP = CONFIGS / "data" / "digits.yaml", CONFIGS / "models" / "mlp.yaml"
# Methods are read by test_fit, and sweeps are for wandb.
ALL = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("methods", "sweeps"))


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_shipped_file_prints(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = yaml.safe_load(path.read_text())
    base = [file for key, file in (("data", DIGITS), ("model", MLP)) if key not in given]
    config = printed(capsys, *base, path)
    assert config["model"]["class_path"].startswith("lightning_sparse.")
    for entry in given.get("trainer", {}).get("callbacks+", []):
        assert any(made["class_path"].endswith(entry["class_path"]) for made in config["trainer"]["callbacks"])


def test_overlays_append_callbacks(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, DIGITS, MLP, CONFIGS / "methods" / "magnitude.yaml", CONFIGS / "methods" / "random.yaml")
    names = [callback["class_path"].rpartition(".")[2] for callback in config["trainer"]["callbacks"]]
    assert names == ["MagnitudePruning", "RandomSparsity"]


@pytest.mark.parametrize("path", sorted((CONFIGS / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_complete(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed(capsys, path)
    assert len(config["trainer"]["callbacks"]) >= 2
    assert config["model"]["class_path"]
    assert config["data"]["class_path"]


def test_values_can_be_changed_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    change = ["--trainer.callbacks.init_args.sparsity=0.7"]
    config = printed(capsys, DIGITS, MLP, CONFIGS / "methods" / "magnitude.yaml", more=change)
    assert config["trainer"]["callbacks"][-1]["init_args"]["sparsity"] == 0.7


@pytest.mark.parametrize("path", OVERLAYS, ids=lambda path: path.stem)
def test_fit(path: Path, tmp_path: Path) -> None:
    files = [f"--config={file}" for file in (DIGITS, MLP)]
    run = [*files, f"--config={path}", *SMALL, f"--trainer.default_root_dir={tmp_path}"]
    if path.stem in NEEDS_ZEROS:
        run.append("--trainer.callbacks+=tests.helpers.overlays.Sparsened")
    if path.stem in NEEDS_ATTENTION:
        run[1] = f"--config={CONFIGS / 'models' / 'transformer.yaml'}"
    main(["fit", *run, "--trainer.max_epochs=3", "--trainer.limit_train_batches=4"])
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    zeros = max(float((value == 0).float().mean()) for value in saved.values() if value.ndim > 1)
    method = method_of(overlay(path))
    promised = 0.1 if method.config().get("sparsity") else 0.0  # a price or a threshold promises no number
    assert zeros > promised or method.mask_set is None
    if path.stem == "magnitude":  # these commands read the checkpoint without the method, and all checkpoints are plain
        for command in ("validate", "test", "predict"):
            main([command, *files, *SMALL, f"--ckpt_path={checkpoint}"])


def test_the_shape_of_the_data_reaches_the_model(tmp_path: Path) -> None:
    from lightning_sparse.cli import SparseCLI

    cli = SparseCLI(["fit", f"--config={DIGITS}", f"--config={MLP}", *SMALL, "--trainer.fast_dev_run=true"])
    assert cli.model.network[1].in_features == 64
    assert cli.model.network[-1].out_features == 10


def test_the_dense_model_beside_the_sparse_one(capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--trainer.max_epochs=2", "--trainer.enable_progress_bar=false"]
    main(["fit", f"--config={CONFIGS / 'quickstart.yaml'}", *quick])
    out = capsys.readouterr().out
    assert "3,854 of 77,072" in out
    assert "by score" in out
    sparse, dense = (cell.strip() for cell in out.split("accuracy")[1].split("│")[1:3])
    assert 0 <= float(sparse) <= 1
    assert 0 <= float(dense) <= 1


class Chooser(Callback):
    """What a config can name, with choices, and with an argument that had another name once."""

    refused: ClassVar[dict[str, str]] = {"kind": "it is called penalty now"}

    def __init__(
        self, penalty: Literal["l1", "l2"] = "l1", schedule: Literal["cubic", "linear"] | Callable[[float], float] = "cubic"
    ) -> None:
        self.penalty, self.schedule = penalty, schedule


CHOOSER = "--trainer.callbacks+=tests.cli.test_cli.Chooser"
MISTAKES = [
    (["--trainer.callbacks+=MagnitudePruning", "--trainer.callbacks.sparsitty=0.5"], "did you mean 'sparsity'"),
    (["--trainer.maximum_epochs=3"], "'trainer.maximum_epochs' is not an option; did you mean 'trainer.max_epochs'?"),
    (["--data.init_args.batchsize=3"], "'batchsize' is not an option of Digits; did you mean 'batch_size'?"),
    (["--data.init_args.batch_size=many"], "batch_size='many' must be an integer."),
    (["--trainer.callbacks+=MagnitudePrunning"], "did you mean 'MagnitudePruning'"),
    (["--trainer.callbacks+=MagnitudePruning", "--trainer.callbacks.sparsity=1.5"], "sparsity=1.5 must be in [0, 1)"),
    (
        ["--trainer.callbacks+=MagnitudePruning", "--trainer.callbacks.sparsity=abc"],
        "sparsity='abc' must be a number or null.",
    ),
    (["--config=no/such/file.yaml"], "no/such/file.yaml"),
    (["--model.init_args.network.init_args.hiden=[3]"], "did you mean 'hidden'"),
    ([CHOOSER, "--trainer.callbacks.penalty=l3"], "penalty='l3' is unknown; choose from ['l1', 'l2']."),
    (
        [CHOOSER, "--trainer.callbacks.schedule=quartic"],
        "schedule='quartic' is unknown; choose from ['cubic', 'linear'], or write the import path of a function.",
    ),
    (["--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=abc"], "lr='abc' must be a number."),
    (["--trainer.precision=abc"], "'32', '16', 'bf16'], or write null."),
    (
        ["--trainer.callbacks=lightning_sparse.MagnitudePruning(0.9)"],
        "'lightning_sparse.MagnitudePruning(0.9)' in trainer.callbacks is not the import path of a class; write only",
    ),
    (["--trainer.logger=NoLogger"], "'NoLogger' in trainer.logger is not a known class; did you mean 'CometLogger'?"),
    ([CHOOSER, "--trainer.callbacks.kind=l1"], "Chooser does not take kind: it is called penalty now."),
    (
        [CHOOSER, "--trainer.callbacks.color=red"],
        "'color' is not an option of Chooser; --trainer.callbacks.NAME sets the last callback before it, and --print_config",
    ),
    (
        ["--model=tests.cli.test_cli.Chooserr"],
        "'tests.cli.test_cli.Chooserr' in model cannot be imported (module 'tests.cli.test_cli' has no attribute "
        "'Chooserr'); did you mean 'tests.cli.test_cli.Chooser'?",
    ),
    (
        ["--model=nowhere.Net"],
        "'nowhere.Net' in model cannot be imported (No module named 'nowhere'); check the path, and run the command in the "
        "folder that holds nowhere.py.",
    ),
    (["--optimizer=Adamm"], "'Adamm' in optimizer is not a known class; did you mean 'Adam'?"),
    (["--lr_scheduler=StepRL"], "'StepRL' in lr_scheduler is not a known class; did you mean 'StepLR'?"),
    (
        ["--trainer.callbacks+=SparsityCheckpoint", "--trainer.callbacks.phase=now"],
        "phase='now' is unknown; choose from ['dense', 'sparsifying', 'at target'].",
    ),
]


@pytest.mark.parametrize(("arguments", "remedy"), MISTAKES, ids=[row[0][-1] for row in MISTAKES])
def test_a_mistake_is_one_sentence(arguments: list[str], remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={DIGITS}", f"--config={MLP}", *SMALL, *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    said = [line for line in error if line.startswith("lightning-sparse: ")]
    assert len(said) == 1, error
    assert error[-1] == said[0], error
    assert remedy in said[0]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--beside_dense=true", "--seed_everything=false"], "beside_dense needs a seed"),
        (
            ["--trainer.callbacks+=MagnitudePruning", "--trainer.callbacks.sparsity=0.5"] * 2,
            "MagnitudePruning is configured twice",
        ),
        (["--trainer.accelerator=gpu"], "lightning-sparse: "),
        (
            [
                "--trainer.callbacks+=MagnitudePruning",
                "--trainer.callbacks.structure=3:5",
                "--trainer.callbacks.targets=network.1",
            ],
            "'network.1.weight' (Linear) has 64 inputs, and structure='3:5' needs groups of 5",
        ),
    ],
)
def test_refusals_are_one_sentence_too(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    if arguments[0].endswith("gpu") and torch.cuda.is_available():
        pytest.skip("there is one")
    files = [f"--config={DIGITS}", f"--config={MLP}", "--model.network.hidden=[30]", "--data.batch_size=6"]
    with pytest.raises(SystemExit):
        main(["fit", *files, *SMALL, "--trainer.max_epochs=1", *arguments])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("lightning-sparse: ")
    assert sentence in said


def test_a_module_in_the_current_folder_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("module_of_mine.py").write_text("from lightning_sparse.models import Classifier as Net\n")
    monkeypatch.setattr("sys.path", [path for path in sys.path if path])  # as from a console script
    main(
        ["fit", f"--config={DIGITS}", f"--config={MLP}", *SMALL, "--trainer.fast_dev_run=true", "--model=module_of_mine.Net"]
    )
    assert "module_of_mine" in sys.modules


def test_functions_and_plain_patterns_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    change = [
        "--trainer.callbacks.schedule=lightning_sparse.functional.schedules.cosine",
        "--trainer.callbacks.targets=!:last",
    ]
    config = printed(capsys, DIGITS, MLP, CONFIGS / "methods" / "magnitude.yaml", more=change)
    made = config["trainer"]["callbacks"][-1]["init_args"]
    assert made["schedule"].endswith("cosine")
    assert made["targets"] == "!:last"


def test_a_mistake_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("trainer:\n  callbacks+:\n  - class_path: RandomSparsity\n    init_args:\n      sparseness: 0.5\n")
    with pytest.raises(SystemExit):
        main(["fit", f"--config={DIGITS}", f"--config={MLP}", f"--config={wrong}"])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "lightning-sparse: 'sparseness' is not an option of RandomSparsity; did you mean 'sparsity'?"


def test_help_lists_choices(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--trainer.callbacks.help=tests.cli.test_cli.Chooser"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--trainer.callbacks.penalty {l1,l2}" in said
    assert "Literal['cubic', 'linear']" in said
    with pytest.raises(SystemExit):
        main(["export", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--precision {float32,bfloat16,float16}" in said
    assert all(f"'{name}'" in said for name in get_args(RungName))
    assert get_args(RungName) == tuple(RUNGS)


def test_the_command_line_is_a_module_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-sparse", "report", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("lightning_sparse.cli", run_name="__main__")
    assert stop.value.code == 0
    assert "Compare runs side by side on one page." in capsys.readouterr().out


@pytest.mark.parametrize("start", ["warm", "fresh"])
def test_refit_from_a_checkpoint(start: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"--config={CONFIGS / 'data' / 'teacher.yaml'}", f"--config={CONFIGS / 'models' / 'deep_regressor.yaml'}"]
    files += ["--trainer.callbacks+=LayerSparsity", "--trainer.callbacks.strength=0.3", "--trainer.max_epochs=1", *SMALL]
    main(["fit", *files, f"--trainer.default_root_dir={tmp_path}"])
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    again = [*files, f"--trainer.default_root_dir={tmp_path / 'again'}", f"--start={start}"]
    main(["refit", *again, f"--ckpt_path={checkpoint}", "--tolerance=0.99"])  # everything counts as linear
    out = capsys.readouterr().out
    assert "depth         8 -> 2" in out
    merged, refit = (float(cell) for cell in out.split("│ loss")[1].split("│")[1:3])
    assert merged != refit
    saved = torch.load(next((tmp_path / "again").rglob("*.ckpt")), weights_only=True)
    assert len(saved["state_dict"]) == 4, "two layers"
    with pytest.raises(SystemExit):
        main(["refit", *again, "--ckpt_path=nowhere.ckpt"])
    assert "ckpt_path='nowhere.ckpt' is not a file; give one that a run saved." in capsys.readouterr().err
    other = [*again, "--model.init_args.network.init_args.hidden=[5]", f"--ckpt_path={checkpoint}"]
    with pytest.raises(SystemExit):
        main(["refit", *other])
    assert "does not fit the configured model" in capsys.readouterr().err


def test_export_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("onnxruntime")
    run = [f"--config={DIGITS}", f"--config={MLP}", f"--config={CONFIGS / 'methods' / 'magnitude.yaml'}", *SMALL]
    main(["fit", *run, f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=2"])
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    quick = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--rungs=[plain,compact]", "--rounds=2"]
    capsys.readouterr()
    # The configuration is that of the run, found above its checkpoint.
    main(["export", *quick, f"--ckpt_path={checkpoint}", f"--to={tmp_path / 'out'}", "--batch_size=40", "--recalibrate=1"])
    said = capsys.readouterr().out
    assert "batch normalization measured again: 0 layers on up to 1 batches" in said
    assert "No rung is faster than dense at batch 40" in " ".join(said.split())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(report["rungs"]["compact"]["metrics"]) == {"test/accuracy", "test/loss"}
    int8 = [*quick[:2], "--rungs=[int8]", "--rounds=0", f"--ckpt_path={checkpoint}", f"--to={tmp_path / 'int8'}"]
    main(["export", *int8, "--calibrate=2", "--int8_tolerance=0.1"])
    report = json.loads((tmp_path / "int8" / "report.json").read_text())
    assert set(report["rungs"]["int8"]["metrics"]) == {"test/accuracy", "test/loss"}
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    plain = torch.load(tmp_path / "out" / "plain.pt", weights_only=True)
    assert all(torch.equal(plain[name], tensor) for name, tensor in saved.items())
    alone = tmp_path / "alone" / "a" / "b" / "c" / "d" / "net.ckpt"
    alone.parent.mkdir(parents=True)
    alone.write_bytes(checkpoint.read_bytes())
    broken, other = tmp_path / "broken.ckpt", tmp_path / "other.ckpt"
    broken.write_text("no checkpoint")
    torch.save({"weights": 1}, other)
    mistakes = [
        (["--ckpt_path=nowhere.ckpt"], "ckpt_path='nowhere.ckpt' is not a file; "),
        ([f"--ckpt_path={broken}"], "cannot be read as a checkpoint ("),
        ([f"--ckpt_path={other}"], "holds a dict without a state_dict, not a Lightning checkpoint; give one that a run"),
        ([f"--ckpt_path={checkpoint}", "--batch_size=0"], "batch_size=0 must be >= 1."),
        ([f"--ckpt_path={checkpoint}", "--recalibrate=-1"], "recalibrate=-1 must be a number of batches, or 0"),
        (
            [f"--ckpt_path={checkpoint}", "--calibrate=-1"],
            "calibrate=-1 must be a number of batches, or 0",
        ),
        ([f"--ckpt_path={checkpoint}", "--device=gpu"], "device='gpu' cannot be used here ("),
        (
            [f"--ckpt_path={alone}"],
            "has no config.yaml in the folder of its run; give the configuration of the run with --config",
        ),
        ([*run[:2], "--ckpt_path=nowhere.ckpt"], "ckpt_path='nowhere.ckpt' is not a file; "),
        ([f"--ckpt_path={checkpoint}", "--rungs=plain"], "rungs='plain' must be a list; write [plain]."),
        ([f"--ckpt_path={checkpoint}", "--rungs=smaller"], "rungs='smaller' must be a list; choose from ['plain'"),
        ([f"--ckpt_path={checkpoint}", "--rungs=[smaller]"], "rungs='smaller' is unknown; choose from ['plain'"),
        ([f"--ckpt_path={checkpoint}", "--rungs=[removed]", "--tolerance=0"], "tolerance=0.0 must be above 0"),
        ([f"--ckpt_path={checkpoint}", "--rungs=[merged]"], "no layer acts linearly for all inputs, so none is merged;"),
    ]
    for arguments, sentence in mistakes:
        with pytest.raises(SystemExit):
            main(["export", *arguments, f"--to={tmp_path / 'other'}"])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("lightning-sparse: ")
        assert sentence in error
    assert not (tmp_path / "other").exists()
    with pytest.raises(SystemExit):
        main(["export", f"--ckpt_path={checkpoint}"])
    assert "to='' is not a folder; write --to FOLDER." in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["export", f"--ckpt_path={checkpoint}", "--to=/dev/null/deployed"])
    assert "to='/dev/null/deployed' cannot be written (Not a directory); choose another folder." in capsys.readouterr().err
