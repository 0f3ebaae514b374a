import os

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def _one_thread_and_a_seed(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """Small tensors are faster on one thread; nothing is written into the checkout."""
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
