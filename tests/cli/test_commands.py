"""Commands that train nothing: what there is, what to begin with, and where configurations are found."""

from __future__ import annotations

import re
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

import lightning_sparse
from lightning_sparse import KeepSparsity
from lightning_sparse.cli import main
from lightning_sparse.cli.configs import config_names, find_config
from lightning_sparse.cli.entry import OTHERS, RUN
from lightning_sparse.cli.methods import METHODS
from lightning_sparse.cli.refusals import sentence_of
from lightning_sparse.cli.run import options


@pytest.fixture(autouse=True)
def _no_arguments_of_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-sparse"])


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(list(arguments))
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("lightning-sparse: ")


def test_the_first_page_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    page = said(capsys, "--help")
    assert page == said(capsys)
    assert [line.split()[0] for line in page.splitlines() if re.match("  [a-z]", line)] == [*RUN, *OTHERS]
    assert max(map(len, page.splitlines())) <= 80
    assert said(capsys, "--version").strip() == f"lightning-sparse {lightning_sparse.__version__}"
    assert refusal(capsys, "reprot") == "'reprot' is not a command; did you mean 'report'?"
    assert refusal(capsys, "--config", "quickstart", "fit") == (
        "'--config' comes before the command; put the command first: fit --config quickstart."
    )
    assert refusal(capsys, "xyz") == "'xyz' is not a command; `lightning-sparse --help` lists them."


def test_methods_are_listed_in_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "methods").splitlines()
    assert [line.split()[0] for line in lines[: len(METHODS)]] == [method.__name__ for method in METHODS]
    assert max(map(len, lines)) <= 80
    assert refusal(capsys, "methods", "rigle") == "'rigle' is not a method; did you mean 'RigL'?"
    assert refusal(capsys, "methods", "xyz") == "'xyz' is not a method; `lightning-sparse methods` lists them."


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_method_tells_its_arguments_its_source_and_its_configurations(
    method: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    page = said(capsys, "methods", method.__name__.lower())
    assert page.startswith(f"{method.__name__}: ")
    assert "Configuration: --config methods/" in page
    if method is not KeepSparsity:  # which nobody has published
        assert re.search(r"^Source", page, flags=re.M)
        assert "http" in page
    for name in method(**{"sparsity": 0.5} if method.__name__ == "HyperSparse" else _needed(method)).config():
        assert re.search(rf"^  {name}( \(required\)|=)", page, flags=re.M)


def _needed(method: Any) -> dict[str, Any]:
    needed = {"LpSphere": {"p": 1.1}, "SparseConnectivityLearning": {"price": 0.1}, "WeightPenalty": {"strength": 1e-4}}
    by_default = {"SET", "RigL", "GraNet", "SNIP", "GraSP", "SynFlow", "LotteryTicket", "MagnitudePruning", "RandomSparsity"}
    by_default |= {"ACDC", "MovementPruning", "SparseGPT", "Wanda"}
    return needed.get(method.__name__, {"sparsity": 0.5} if method.__name__ in by_default else {})


def test_configurations_are_found_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"quickstart", "methods/rigl", "data/digits", "models/mlp", "loggers/wandb"} <= set(config_names())
    assert not any(name.startswith("sweeps/") for name in config_names())
    same = {find_config(name) for name in ("methods/rigl", "methods/rigl.yaml", "configs/methods/rigl.yaml")}
    assert len(same) == 1
    Path("quickstart").write_text("seed_everything: 3\n")
    assert find_config("quickstart") == "quickstart", "a file of the user's comes first"
    assert "did you mean 'methods/rigl'?" in refusal(capsys, "fit", "--config", "rigl")
    assert "give a file, or one of ['data/cifar10'" in refusal(capsys, "fit", "--config=zzz")
    Path("wrong.yaml").write_text("trainer: {a\n")
    assert refusal(capsys, "fit", "-c", "wrong.yaml").startswith("--config 'wrong.yaml' is not YAML (line ")


def test_what_init_writes_can_be_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "experiment.yaml, method.yaml, train.py" in said(capsys, "init", "mine")
    assert refusal(capsys, "init", "mine") == "'mine' already holds experiment.yaml; give a new folder."
    assert "cannot be written" in refusal(capsys, "init", "mine/train.py/deeper")
    monkeypatch.chdir("mine")
    quick = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    main(["fit", "--config", "experiment.yaml", "--config", "method.yaml", *quick])
    assert "Net" in runpy.run_path("train.py")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_options_configurations_and_methods(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    script = said(capsys, "completion", shell)
    words = ["report", "methods/rigl", "RigL", "trainer.max_epochs", "to" if shell == "fish" else "--to"]
    assert all(word in script for word in words)
    if shell == "bash":
        for line, expected in (
            ("fit --config methods/rig", ["methods/rigl", "methods/rigl_2_4", "methods/rigl_fan_in"]),
            ("completion ba", ["bash"]),
            ("report --o", ["--output"]),
            ("dashboard --", ["--help", "--project", "--entity", "--metric"]),
        ):
            code = f"{script}\nCOMP_WORDS=(lightning-sparse {line}); COMP_CWORD={len(line.split())}; _lightning_sparse"
            found = subprocess.run(
                ["bash", "-c", f'{code}; echo "${{COMPREPLY[@]}}"'], capture_output=True, text=True, check=True
            )
            assert sorted(found.stdout.split()) == sorted(expected)


def test_every_command_has_its_options() -> None:
    found = options()
    assert list(found) == list(RUN)
    assert "--trainer.max_epochs" in found["fit"]
    assert "--ckpt_path" in found["test"]
    assert {"--to", "--rungs"} <= set(found["export"])


def test_only_who_can_mend_it_without_the_code_is_spared_the_traceback() -> None:
    def caught(code: str, file: str) -> BaseException:
        try:
            exec(compile(code, file, "exec"), {"__name__": "elsewhere"})
        except Exception as error:
            return error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
        raise AssertionError

    library = "/x/site-packages/torch/nn/layer.py"
    assert sentence_of(caught("raise RuntimeError('sizes\\n do not `match`')", library)) == "sizes do not match."
    assert sentence_of(caught("raise RuntimeError('in my code')", "/home/me/train.py")) is None
    assert sentence_of(caught("{}['a mistake in code']", library)) is None
    own_kind = "class Own(Exception): pass\nraise Own('use a database')"
    assert sentence_of(caught(own_kind, library)) is None
    for file, expected in ((library, "use a database."), ("/home/me/model.py", None)):
        made = caught("raise ValueError('does not validate')", "/x/site-packages/jsonargparse/_typehints.py")
        made.__cause__ = caught(own_kind, file)
        assert sentence_of(made) == expected
    assert len(sentence_of(caught("raise ValueError('a b ' * 1000)", library)) or "") < 310
