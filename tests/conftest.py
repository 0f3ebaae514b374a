import functools
import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; also for the processes that tests start
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch
from lightning.fabric.utilities import registry

# Every Trainer asks for callbacks of other packages, and each time the metadata of all that is installed is read.
registry.entry_points = functools.cache(registry.entry_points)


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """Small tensors are faster on one thread; nothing is written into the checkout."""
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.setattr("sys.path", [*sys.path])  # which the command line extends
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "-6-gpu-" in item.name:  # of the contract
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
