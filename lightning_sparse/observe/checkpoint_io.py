"""Checkpoints that a kill or a full disk cannot corrupt: written to a temporary file, then renamed when complete."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_sparse.core import first_line

__all__ = ["SHARDED", "AtomicCheckpointIO", "newest_readable", "why_unreadable"]

PART = ".part"
"""Suffix of a file that is being written; the next write of that name replaces what a kill leaves of it."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error codes of the system for a full disk."""

SHARDED = "meta.pt"
"""The last file that Lightning writes into a folder of shards."""


@final
class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint to a temporary file, flush it to disk, and only then rename it.

    A file with the name of a checkpoint is always complete, whenever the process is killed or the disk is full, and the
    previous one stays until then. Remote paths (`s3://...`) are left to Lightning. Works with all strategies that write a
    single file: a single device, DDP, FSDP with `state_dict_type="full"`. Folders of shards (other FSDP,
    `ModelParallelStrategy`, DeepSpeed) are written in place by the strategies themselves; for those, keep at least the
    latest two.

    Args:
        background: write in a thread while training continues. Files are also removed in order. Lightning's
            `AsyncCheckpointIO` instead removes the old file before the new one is written.

    Raises:
        OSError: if a file cannot be written; the previous one is kept. With `background`, raised at the next write, or when
            the run ends.

    Example:
        >>> AtomicCheckpointIO().save_checkpoint({"step": 1}, "last.ckpt")
        >>> AtomicCheckpointIO().load_checkpoint("last.ckpt")
        {'step': 1}
    """

    def __init__(self, background: bool = False) -> None:
        super().__init__()
        self.background = background
        self._thread: ThreadPoolExecutor | None = None
        self._error: BaseException | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        system, local = url_to_fs(str(path))
        if not isinstance(system, LocalFileSystem) or storage_options is not None:
            self._do(lambda: super(AtomicCheckpointIO, self).save_checkpoint(checkpoint, path, storage_options))
            return
        if self.background:  # training continues and changes the tensors
            checkpoint = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().clone())
        self._do(lambda: write_whole(checkpoint, Path(local)))

    def load_checkpoint(self, path: str | Path, *args: Any, **options: Any) -> dict[str, Any]:
        self.teardown()
        system, local = url_to_fs(str(path))
        if isinstance(system, LocalFileSystem) and Path(local).is_file() and (reason := why_unreadable(local)):
            before = newest_readable(Path(local).parent)
            remedy = f"the newest beside it that can is '{before}'" if before else "there is none beside it that can"
            raise ValueError(f"ckpt_path='{path}' cannot be read as a checkpoint ({reason}); {remedy}.")
        loaded: dict[str, Any] = super().load_checkpoint(path, *args, **options)
        return loaded

    def remove_checkpoint(self, path: str | Path) -> None:
        self._do(lambda: super(AtomicCheckpointIO, self).remove_checkpoint(path))

    def teardown(self) -> None:
        """Wait for pending writes.

        Raises:
            OSError: if a write failed.
        """
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
        self._raise()

    def _do(self, work: Callable[[], None]) -> None:
        """Run now, or in the thread after all pending work."""
        if not self.background:
            work()
            return
        self._raise()
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._thread.submit(self._try, work)

    def _try(self, work: Callable[[], None]) -> None:
        """Run in the thread; after an error nothing more is done, and in particular nothing is removed."""
        if self._error is None:
            try:
                work()
            except BaseException as error:
                self._error = error

    def _raise(self) -> None:
        """Raise the error of the thread, if any."""
        error, self._error = self._error, None
        if error is not None:
            raise error


def write_whole(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint in place of the previous one, completely or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    part = path.with_name(path.name + PART)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        flush_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if (cause := _system_error(error)) is None:
            raise
        kept = "the previous one is untouched" if path.exists() else "earlier files are untouched"
        remedy = "free some space and resume" if cause.errno in FULL else "choose a folder that can be written, and resume"
        refusal = OSError(f"checkpoint '{path}' cannot be written ({cause.strerror or cause}); {kept}: {remedy}.")
        refusal.errno = cause.errno
        raise refusal from error


def flush_folder(folder: Path) -> None:
    """Make a rename durable, which is a property of the folder; folders that cannot be flushed are left alone."""
    with suppress(OSError):
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def _system_error(error: BaseException | None) -> OSError | None:
    """The system error behind an error that torch raised over it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def why_unreadable(path: str | Path) -> str | None:
    """Why a local file, or folder of shards, cannot be read as a torch checkpoint; None if it can.

    Args:
        path: path of the file.

    Example:
        >>> why_unreadable("nowhere.ckpt")
        'no such file'
    """
    path = Path(path)
    if path.is_dir():
        return None if (path / SHARDED).is_file() else f"a folder without {SHARDED}"
    if not path.is_file():
        return "no such file"
    whole = zipfile.is_zipfile(path)  # its table of contents is the last thing in it
    try:
        torch.load(path, map_location="cpu", weights_only=True, mmap=whole)
    except pickle.UnpicklingError:
        return None if whole else "it is not a file of torch"  # objects that are not weights are judged elsewhere
    except Exception as error:
        with path.open("rb") as file:
            begin = file.read(2)
        return {b"": "it is empty", b"PK": "it is cut off"}.get(begin) or f"{type(error).__name__}: {first_line(error)}"
    return None


def newest_readable(folder: str | Path, leave_out: Iterable[str | Path] = ()) -> Path | None:
    """The newest readable checkpoint in a folder.

    Args:
        folder: the folder to search.
        leave_out: files to exclude.
    """
    left = {Path(path).resolve() for path in leave_out}
    files = [path for path in Path(folder).glob("*.ckpt") if path.resolve() not in left and path.exists()]
    files.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next((path for path in files if why_unreadable(path) is None), None)
