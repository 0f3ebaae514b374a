"""The description on a package index: the README, with links that also work without its files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE = re.compile(r"(!?)\[((?:[^\[\]])*)\]\((?!https?://|#|mailto:)([^)\s]+)\)")
"""A link or an image that points to a file of the repository."""


class CustomMetadataHook(MetadataHookInterface):
    """Called by hatchling for every wheel and source archive."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the description.

        Args:
            metadata: the table `project`; its URL `Repository`, if any, makes links absolute.
        """
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        repository = metadata.get("urls", {}).get("Repository")
        metadata["readme"] = {"content-type": "text/markdown", "text": described(text, repository)}


def described(text: str, repository: str | None = None) -> str:
    """A README for readers who do not have its files.

    Args:
        text: of the README.
        repository: its address, to which links point; without one, links become plain text, and images are left out together
            with the paragraph below, which explains them.
    """
    if repository is None:
        text = re.sub(r"^!\[[^\[\]]*\]\((?!https?://)[^)\s]+\)\n\n(?:.+\n)+\n", "", text, flags=re.MULTILINE)

    def absolute(found: re.Match[str]) -> str:
        image, shown, path = found.groups()
        if repository is None:
            return "" if image else shown
        return f"{image}[{shown}]({repository.rstrip('/')}/{'raw' if image else 'blob'}/main/{path})"

    return RELATIVE.sub(absolute, text)
