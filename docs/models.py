"""The table of `models.md`, from the zoo of the tests: `python docs/models.py`."""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from lightning_sparse.core import describe, find_targets  # noqa: E402
from lightning_sparse.core.coverage import coverage  # noqa: E402
from tests.helpers.zoo import ZOO, Foreign  # noqa: E402

PAGE = Path(__file__).parent / "models.md"
PLACE = re.compile(r"(?<=<!-- models -->\n).*(?=\n<!-- end of models -->)", flags=re.DOTALL)


def row(foreign: Foreign) -> str:
    """What is chosen of a model, and how much of it that is."""
    model = foreign.model()
    targets = find_targets(model, foreign.targets)
    chosen = {target.name for target in targets}
    found = [candidate.kind for candidate in describe(model, foreign.targets) if candidate.name in chosen]
    kinds = Counter(kind.replace("NonDynamicallyQuantizable", "") for kind in found)  # the Linear in nn.MultiheadAttention
    layers = ", ".join(f"{count} of `{kind}`" for kind, count in kinds.items())
    share = sum(target.weight.numel() for target in targets) / coverage(model, foreign.targets, chosen).matrices
    notes = [f"`targets={[*foreign.targets]}`".replace("'", '"')] if foreign.refused else []
    notes += [foreign.note] if foreign.note else []
    return f"| {foreign.family} | {layers} | {share:.0%} | {': '.join(notes)} |"


def table() -> str:
    """All models of the zoo."""
    head = "| model | weights that are chosen | share | what to know |\n| --- | --- | --- | --- |"
    return "\n".join([head, *(row(foreign) for foreign in ZOO.values())])


def filled(page: str) -> str:
    """The page with the table as the zoo has it."""
    return PLACE.sub(lambda _: f"\n{table()}\n", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
