"""A file with the name of a checkpoint is whole, whatever happened while it was written."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_sparse import AtomicCheckpointIO, MagnitudePruning, RandomSparsity, SparsityCheckpoint
from lightning_sparse.observe.checkpoint_io import newest_readable, why_unreadable
from lightning_sparse.testing import Toy, fit
from tests.helpers.scripted import Scripted

OLD, NEW = {"weight": torch.zeros(1000)}, {"weight": torch.ones(100_000)}


def written(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """A disk on which no file can be larger; to a writer it looks like a full one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_file_before(tmp_path: Path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "runs" / "last.ckpt"
    io.save_checkpoint(OLD, path)
    with (
        files_up_to(50_000),
        pytest.raises(OSError, match="the previous one is untouched: free some space and resume") as stop,
    ):
        io.save_checkpoint(NEW, path)
    assert stop.value.errno == errno.EFBIG
    assert written(path.parent) == ["last.ckpt"]
    assert io.load_checkpoint(path)["weight"].equal(OLD["weight"])
    io.save_checkpoint(NEW, path)
    assert io.load_checkpoint(path)["weight"].equal(NEW["weight"])
    with pytest.raises(OSError, match=r"inside.ckpt' cannot be written \(.*\); .*: choose a folder that can"):
        io.save_checkpoint(NEW, path / "inside.ckpt")


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_the_file_before(stop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(checkpoint: Any, file: Any) -> None:
        file.write(b"PK half")
        raise stop

    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint(OLD, path)
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(stop):
        io.save_checkpoint(NEW, path)
    assert written(tmp_path) == ["last.ckpt"]
    assert why_unreadable(path) is None


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, path = [], tmp_path / "last.ckpt"
    flush, rename = os.fsync, Path.replace

    def flushed(number: int) -> None:
        order.append(("flush", Path(f"/proc/self/fd/{number}").resolve().name, why_unreadable(tmp_path / "last.ckpt.part")))
        flush(number)

    def renamed(source: Path, target: Path) -> Path:
        order.append(("rename", source.name, target.name))
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", renamed)
    AtomicCheckpointIO().save_checkpoint(NEW, path)
    assert order == [
        ("flush", "last.ckpt.part", None),
        ("rename", "last.ckpt.part", "last.ckpt"),
        ("flush", tmp_path.name, "no such file"),
    ]


def test_what_a_kill_has_left_is_replaced_and_a_link_is_not_followed(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    io.save_checkpoint(OLD, tmp_path / "epoch=1.ckpt")
    (tmp_path / "last.ckpt").symlink_to("epoch=1.ckpt")
    (tmp_path / "last.ckpt.part").write_bytes(b"PK half")
    io.save_checkpoint(NEW, tmp_path / "last.ckpt")
    assert written(tmp_path) == ["epoch=1.ckpt", "last.ckpt"]
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert io.load_checkpoint(tmp_path / "epoch=1.ckpt")["weight"].equal(OLD["weight"])


def test_in_the_background_all_happens_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io, gate, save = AtomicCheckpointIO(background=True), threading.Event(), torch.save
    state = {"weight": torch.zeros(10)}
    monkeypatch.setattr(torch, "save", lambda *args: gate.wait() and save(*args))
    io.save_checkpoint(state, tmp_path / "1.ckpt")
    state["weight"] += 1  # training goes on
    io.save_checkpoint(state, tmp_path / "2.ckpt")
    io.remove_checkpoint(tmp_path / "1.ckpt")
    assert not list(tmp_path.glob("*.ckpt"))
    gate.set()
    assert io.load_checkpoint(tmp_path / "2.ckpt")["weight"].equal(torch.ones(10)), "it waits for what is under way"
    assert written(tmp_path) == ["2.ckpt"]
    io.save_checkpoint({"weight": torch.zeros(10)}, tmp_path / "3.ckpt")
    io.teardown()
    assert io.load_checkpoint(tmp_path / "3.ckpt")["weight"].equal(torch.zeros(10))


def test_in_the_background_nothing_is_removed_for_what_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    io, gate, save = AtomicCheckpointIO(background=True), threading.Event(), torch.save
    io.save_checkpoint(OLD, tmp_path / "1.ckpt")
    io.load_checkpoint(tmp_path / "1.ckpt")
    monkeypatch.setattr(torch, "save", lambda *args: gate.wait() and save(*args))
    with files_up_to(50_000):
        io.save_checkpoint(NEW, tmp_path / "2.ckpt")
        io.remove_checkpoint(tmp_path / "1.ckpt")
        gate.set()
        with pytest.raises(OSError, match="earlier files are untouched"):
            io.teardown()
    assert written(tmp_path) == ["1.ckpt"]
    io.teardown()  # said once


@pytest.mark.parametrize("make", [lambda: AtomicCheckpointIO(True), lambda: AsyncCheckpointIO(AtomicCheckpointIO())])
def test_with_a_trainer(make: Any, tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_last=True)
    io = make()
    fit(Toy(), MagnitudePruning(0.5), keep, plugins=[io])
    expected, found = ["last.ckpt", Path(keep.best_model_path).name], written(tmp_path)
    if isinstance(io, AsyncCheckpointIO):  # it may remove a file before it has written it, which then stays
        assert {*expected} <= {*found}
    else:
        assert found == expected
    assert all(why_unreadable(path) is None for path in tmp_path.iterdir())


def cut(path: str | Path) -> str:
    Path(path).write_bytes(Path(path).read_bytes()[:3000])
    return str(path)


def test_a_broken_file_is_named_with_the_one_to_take(tmp_path: Path) -> None:
    io = AtomicCheckpointIO()
    for name in ("1", "2", "last"):
        io.save_checkpoint(NEW, tmp_path / f"{name}.ckpt")
    os.utime(tmp_path / "1.ckpt", (1, 1))
    cut(tmp_path / "last.ckpt")
    with pytest.raises(
        ValueError, match=r"last.ckpt' cannot be read .*\(it is cut off\); the newest beside it .* '.*/2.ckpt'"
    ):
        io.load_checkpoint(tmp_path / "last.ckpt")
    assert newest_readable(tmp_path, leave_out=[tmp_path / "2.ckpt"]) == tmp_path / "1.ckpt"
    for path in tmp_path.iterdir():
        cut(path)
    with pytest.raises(ValueError, match="there is none beside it that can"):
        io.load_checkpoint(tmp_path / "last.ckpt")


def test_why_a_file_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no checkpoint")
    (tmp_path / "folder").mkdir()
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "meta.pt").touch()
    torch.save({"path": tmp_path}, tmp_path / "objects")  # for whom weights_only=False is
    torch.save(OLD, tmp_path / "old", _use_new_zipfile_serialization=False)
    reasons = {path.name: why_unreadable(path) for path in tmp_path.iterdir()}
    assert reasons == {
        "empty": "it is empty",
        "text": "it is not a file of torch",
        "folder": "a folder without meta.pt",
        "shards": None,
        "objects": None,
        "old": None,
    }


# ---- SparsityCheckpoint ----------------------------------------------------------------------------------------------


def best(folder: Path) -> SparsityCheckpoint:
    options: dict[str, Any] = {"filename": "{epoch}", "monitor": "score", "mode": "max", "save_top_k": 3}
    return SparsityCheckpoint(dirpath=folder, save_last=True, **options)


def test_a_resumed_run_skips_broken_files(tmp_path: Path) -> None:
    fit(Scripted(), RandomSparsity(0.5), best(tmp_path), max_epochs=4)
    names = ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]
    assert written(tmp_path) == names
    cut(tmp_path / "epoch=0.ckpt")
    cut(tmp_path / "last.ckpt")
    again, resumed = best(tmp_path), Scripted()
    with (
        pytest.warns(UserWarning, match=r"'.*epoch=0.ckpt' cannot be read as a checkpoint \(it is cut off\) and is skipped"),
        pytest.warns(UserWarning, match=r"'.*last.ckpt' cannot be read as a checkpoint \(it is cut off\) and is skipped"),
        pytest.warns(UserWarning, match="exists and is not empty"),
    ):
        fit(resumed, RandomSparsity(0.5), again, max_epochs=4, ckpt_path="last")
    assert resumed.validations == 1, "from the end of epoch 2, the newest that can be read"
    assert {Path(path).name for path in again.best_k_models} == {"epoch=1.ckpt", "epoch=2.ckpt", "epoch=3.ckpt"}
    assert Path(again.best_model_path).name == "epoch=3.ckpt", "in a new process the script begins with its best score"
