"""Make the tables of docs/evidence/ and of some other pages from the results, and two figures.

    python -m benchmarks.tables                            write the tables into the pages
    python -m benchmarks.tables cka                        print one table
    python -m benchmarks.tables --draw docs/accuracy.png   draw the figure of `desk-lenet300`
    python -m benchmarks.tables --draw docs/imbalance.png  draw the gradients of `claim-norms-lenet5`

A table is placed between `<!-- its name -->` and `<!-- end -->`; everything in between is replaced. A test fails if a page
and the results differ. The best value of a column is bold.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks import accuracy_tables, cost_tables
from benchmarks.cells import runs
from benchmarks.claims import CLAIMS, progress
from benchmarks.export import structure_rows
from benchmarks.figures import FIGURES
from benchmarks.record import RESULTS, Row, markdown, pick
from benchmarks.suites import SUITES

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [
    *(DOCS / "evidence" / f"{name}.md" for name in ("accuracy", "claims", "fine-tuning", "cost")),
    DOCS / "large-models.md",
    DOCS / "guides" / "export.md",
]
"""The pages with tables, in the order of `TABLES`."""
NOT_MEASURED = "Not measured yet."

TABLES: dict[str, Callable[[], list[Row]]] = {
    "lenet300": lambda: accuracy_tables.accuracy("desk-lenet300"),
    "hypersparse": lambda: accuracy_tables.accuracy("desk-hypersparse", work=False),
    "structured": lambda: accuracy_tables.structured("desk-structures-lenet300"),
    "structured20": lambda: accuracy_tables.structured("desk-structures-resnet20"),
    "channels20": lambda: accuracy_tables.channels("desk-channels-resnet20"),
    "channels-mobilenet": lambda: accuracy_tables.channels("desk-channels-mobilenet"),
    "lenet5": lambda: accuracy_tables.accuracy("desk-lenet5"),
    "resnet20": lambda: accuracy_tables.accuracy("desk-resnet20", beside=pick(runs("desk-cka"), method="random")),
    "growth": accuracy_tables.growth,
    "cka": accuracy_tables.cka,
    "scl": accuracy_tables.scl,
    "lpss": accuracy_tables.lpss,
    "simulation": accuracy_tables.simulation,
    **{name: make for name, (make, _) in CLAIMS.items()},
    "perplexity": cost_tables.perplexity,
    "overhead": cost_tables.overhead,
    "peaks": lambda: cost_tables.memory("memory-overhead"),
    "updates": cost_tables.updates,
    "sparsegpt": cost_tables.sparsegpt,
    "finetuning": cost_tables.finetuning,
    "methods": lambda: cost_tables.methods("cost-methods"),
    "inside": lambda: cost_tables.inside("cost-methods"),
    "structure-steps": lambda: cost_tables.methods("cost-structures"),
    "structure-inside": lambda: cost_tables.inside("cost-structures"),
    "memory": lambda: cost_tables.memory("memory-methods"),
    "sharded": cost_tables.sharded,
    "exported": cost_tables.exported,
    "perceptron": cost_tables.perceptron,
    "exports": lambda: structure_rows(SUITES["export-structures"].content(RESULTS).get("numbers", {})),
}


def block(name: str) -> str:
    """A table, or a line that says there are no results yet. For a claim, also how many of its runs are done."""
    rows = TABLES[name]()
    table = [markdown(rows)] if len(rows) > 1 else []
    said = [progress(CLAIMS[name][1])] if name in CLAIMS else [] if table else [NOT_MEASURED]
    return "\n\n".join([*table, *said])


def filled(page: str) -> str:
    """The page with all its tables made from the current results."""

    def fresh(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n\n{block(match[1])}\n\n<!-- end -->"

    return re.sub(rf"<!-- ({'|'.join(TABLES)}) -->.*?<!-- end -->", fresh, page, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=TABLES)
    parser.add_argument("--draw", type=Path, metavar="FILE", help=f"draw a figure instead: {' or '.join(FIGURES)}")
    options = parser.parse_args()
    if options.draw:
        if options.draw.name not in FIGURES:
            parser.error(f"no figure {options.draw.name!r}; choose from {', '.join(FIGURES)}")
        from matplotlib import pyplot

        pyplot.style.use("lightning_sparse.observe.figures")
        FIGURES[options.draw.name](options.draw)
    elif options.table:
        print(block(options.table))
    else:
        for page in PAGES:
            page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
