"""The README as a package index shows it, which has none of its files."""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest

from tests.helpers.overlays import ROOT

pytest.importorskip("hatchling")
HOOK: dict[str, Any] = runpy.run_path(str(ROOT / "hatch_build.py"))


def test_without_an_address_links_are_text_and_a_picture_goes_with_its_caption() -> None:
    lines = ["# Title", "", "![A picture](docs/a.svg)", "", "What it shows ([more](docs/b.md)),", "in two lines.", ""]
    shown = HOOK["described"]("\n".join([*lines, "See [c](docs/c.md)."]))
    assert shown == "# Title\n\nSee c."


def test_with_an_address_links_are_absolute() -> None:
    home = "https://example.org/me/it"
    text = "![A picture](docs/a.svg) [a page](docs/b.md#part), [two\nlines](c.md), [elsewhere](https://e.org), [here](#part)"
    assert HOOK["described"](text, f"{home}/") == (
        f"![A picture]({home}/raw/main/docs/a.svg) [a page]({home}/blob/main/docs/b.md#part), "
        f"[two\nlines]({home}/blob/main/c.md), [elsewhere](https://e.org), [here](#part)"
    )


@pytest.mark.parametrize("urls", [{}, {"urls": {"Repository": "https://example.org/me/it"}}])
def test_the_package_has_it(urls: dict[str, Any]) -> None:
    metadata: dict[str, Any] = dict(urls)
    HOOK["CustomMetadataHook"](str(ROOT), {}).update(metadata)
    text = metadata["readme"]["text"]
    assert metadata["readme"]["content-type"] == "text/markdown"
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert all(target.startswith(("https://", "#")) for target in targets)
    assert ("front.svg" in text) == bool(urls)
    assert "MagnitudePruning(sparsity=0.95)" in text
