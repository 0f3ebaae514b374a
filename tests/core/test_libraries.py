"""What other libraries do on the way."""

from __future__ import annotations

import copy

import pytest

from lightning_sparse.core import without_origins

traceback = pytest.importorskip("torch.fx.traceback")


@pytest.mark.skipif(not hasattr(traceback, "NodeSource"), reason="an older torch copies no origins")
def test_origins_are_not_copied_for_a_while() -> None:
    source = traceback.NodeSource(None, "a pass")
    with without_origins():
        assert copy.deepcopy([source])[0] is source
        with without_origins():
            assert copy.deepcopy(source) is source
        assert copy.deepcopy(source) is source, "the outer one still holds"
    assert copy.deepcopy(source) is not source


def test_origins_are_copied_again_after_an_error() -> None:
    with pytest.raises(KeyError), without_origins():
        raise KeyError
    source = traceback.NodeSource(None, "a pass")
    assert copy.deepcopy(source) is not source
