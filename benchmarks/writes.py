"""Checkpoints of a training run after SIGKILL in the middle of a write, and after a full disk.

    python -m benchmarks robustness-writes                   100 kills each, of our writer and of Lightning's
    python -m benchmarks robustness-writes --rounds 5        five kills each

A run that keeps only `last.ckpt` is killed while it writes that file, at a random moment each time, and resumes from the
file. The run is lost if the file is unreadable. The folder of the run and the folder for temporary files are on one file
system, or on two (`/dev/shm`). In the test of a full disk, the run keeps every checkpoint until no space is left, and
resumes from the newest readable one when there is space again. Data: scikit-learn's digits, a perceptron of 1.2 M weights,
on the CPU. Each process is a fork of this one, so a run takes only half a second from its start to the kill.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import CheckpointIO, TorchCheckpointIO

from benchmarks.record import LeftOut, Options, Parts
from benchmarks.robustness import SPARSITY, bits
from benchmarks.trainers import quiet
from lightning_sparse import AtomicCheckpointIO, MagnitudePruning
from lightning_sparse.data import Digits
from lightning_sparse.models import MLP, Classifier
from lightning_sparse.observe import checkpoint_io
from lightning_sparse.observe.checkpoint_io import newest_readable, why_unreadable

KILLS, EPOCHS, EVERY = 100, 3, 2
WRITERS: dict[str, Callable[[], CheckpointIO]] = {
    "AtomicCheckpointIO": AtomicCheckpointIO,
    "AtomicCheckpointIO(background=True)": partial(AtomicCheckpointIO, background=True),
    "Lightning's": TorchCheckpointIO,
}
SHARED_MEMORY = Path("/dev/shm")
FORK = multiprocessing.get_context("fork")


def train(
    writer: str, folder: Path, temporary: Path, tell: Connection, keep_all: bool = False, room: int | None = None
) -> None:
    """Start or resume the run in the child process, and report every write and the end.

    Args:
        writer: name of the writer.
        folder: folder for the checkpoints.
        temporary: folder for temporary files.
        tell: connection to the parent process.
        keep_all: whether to keep every checkpoint, not only the last one.
        room: largest file size in bytes after two files are written, to simulate a full disk.
    """
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    tempfile.tempdir = str(temporary)
    written = 0

    def marked(write: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            nonlocal written
            tell.send("begin")
            write(*args)
            tell.send("end")
            written += 1
            if room is not None and written == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

        return run

    checkpoint_io.write_whole = marked(checkpoint_io.write_whole)
    io = WRITERS[writer]()
    if isinstance(io, TorchCheckpointIO) and not isinstance(io, AtomicCheckpointIO):
        io.save_checkpoint = lambda checkpoint, path, storage_options=None: theirs(checkpoint, path)  # type: ignore[method-assign]
        theirs = marked(partial(TorchCheckpointIO.save_checkpoint, io))
    L.seed_everything(0, verbose=False)
    data = Digits(batch_size=64, seed=0)
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    module = Classifier(partial(MLP, hidden=[1024, 1024]), 10, 1, data.image_size, sgd)
    top, last = (-1, False) if keep_all else (0, True)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=EVERY, save_top_k=top, save_last=last)
    method = MagnitudePruning(SPARSITY)
    trainer = quiet([method, saving], "cpu", max_epochs=EPOCHS, enable_checkpointing=True, plugins=[io])
    trainer.fit(module, data, ckpt_path=newest_readable(folder))
    tell.send(bits(trainer))


def live(*args: Any, kill_after: Callable[[], float] | None = None, spare: int = 0, **options: Any) -> dict[str, Any]:
    """Train in a child process until the run ends or is killed.

    Args:
        args: arguments of `train`, without `tell`.
        kill_after: function that returns the seconds between the start of a write and the kill; None does not kill.
        spare: number of writes that complete before the kill.
        options: options of `train`.
    """
    hear, tell = FORK.Pipe(duplex=False)
    child = FORK.Process(target=train, args=(*args, tell), kwargs=options)
    child.start()
    tell.close()
    lengths, begun, killed, inside, end = [], 0.0, False, False, None
    while True:
        try:
            said = hear.recv()
        except EOFError:
            break
        if said == "begin":
            begun, inside = time.monotonic(), True
            if kill_after is not None and len(lengths) >= spare and not killed:
                time.sleep(kill_after())
                child.kill()
                killed = True
        elif said == "end":
            lengths.append(time.monotonic() - begun)
            inside = False
        else:
            end = said
    child.join()
    return {"inside": killed and inside, "lengths": lengths, "end": end}


def kills(writer: str, two: bool, count: int, dice: random.Random) -> dict[str, Any]:
    """Kill `count` times in the middle of a write. A new run starts whenever one has finished."""
    with places(two) as (folder, temporary):
        whole = live(writer, folder / "whole", temporary)
        longest = 1.2 * statistics.median(whole["lengths"])
        inside = outside = lost = runs = same = 0
        while inside < count:
            runs += 1
            run, spare, end = folder / str(runs), 0, None
            while end is None:
                wanted = None if inside >= count else lambda: dice.uniform(0, longest)
                life = live(writer, run, temporary, kill_after=wanted, spare=spare)
                inside, outside = inside + life["inside"], outside + (life["end"] is None and not life["inside"])
                end, spare = life["end"], 1  # the interrupted write is repeated, and completes
                last = run / "last.ckpt"
                if end is None and last.exists() and why_unreadable(last):
                    lost += 1
                    shutil.rmtree(run)
            same += end == whole["end"]
            shutil.rmtree(run, ignore_errors=True)
    return {
        "kills in a write": inside,
        "kills right after one": outside,
        "runs lost": lost,
        "trainings": runs,
        "the same end": same,
    }


def full(writer: str) -> dict[str, Any]:
    """Write until no space is left, check the files, and resume when there is space again."""
    with places(True) as (folder, temporary):
        whole = live(writer, folder / "whole", temporary)
        size = (folder / "whole" / "last.ckpt").stat().st_size
        disk = folder / "disk"
        disk.mkdir()
        mounted = mount(disk, int(3.5 * size))
        try:
            stopped = live(writer, disk, temporary, keep_all=True, room=None if mounted else size // 2)
            files = sorted(disk.glob("*.ckpt"))
            broken = [path.name for path in files if why_unreadable(path)]
            if mounted:
                mount(disk, 100 * size, "remount,")
            end = live(writer, disk, temporary, keep_all=True)["end"]
        finally:
            if mounted:
                subprocess.run(["umount", str(disk)], check=True)
    return {
        "the disk": "a tmpfs of three and a half checkpoints" if mounted else "files of half a checkpoint, after two",
        "stopped": stopped["end"] is None,
        "files under a final name": len(files),
        "of these broken": len(broken),
        "the same end": end == whole["end"],
    }


def mount(folder: Path, size: int, remount: str = "") -> bool:
    """Try to mount a small disk, which needs privileges, and return whether it worked."""
    command = ["mount", "-t", "tmpfs", "-o", f"{remount}size={size}", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@contextmanager
def places(two: bool) -> Iterator[tuple[Path, Path]]:
    """A folder for runs, and one for temporary files on the same or on another file system."""
    with tempfile.TemporaryDirectory() as folder:
        if not two:
            (Path(folder) / "temporary").mkdir()
            yield Path(folder), Path(folder) / "temporary"
            return
        if not SHARED_MEMORY.is_dir() or SHARED_MEMORY.stat().st_dev == os.stat(folder).st_dev:
            raise LeftOut("/dev/shm is not on a second file system; set TMPDIR to a folder on another one.")
        with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as temporary:
            yield Path(folder), Path(temporary)


def parts(options: Options) -> Parts:
    dice = random.Random(0)
    count = options.times(KILLS, quick=2)
    for writer in WRITERS:
        for two in (False, True):
            where = "two file systems" if two else "one file system"
            yield (writer, where), partial(kills, writer, two, count, dice)
        yield (writer, "full disk"), partial(full, writer)
