"""`lightning-sparse report RUN...`: compare runs side by side on one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_sparse.observe.report import find_reports, read_report, write_report

__all__ = ["report"]


def report(args: list[str]) -> None:
    """Compare runs side by side on one page."""
    parser = argparse.ArgumentParser("lightning-sparse report", description="Compare runs side by side on one page.")
    parser.add_argument("runs", nargs="+", help="folders of runs, or their report.html")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="the page (default: comparison.html)")
    asked = parser.parse_args(args)
    if not asked.output.resolve().parent.is_dir():
        raise FileNotFoundError(f"--output '{asked.output}': there is no folder '{asked.output.parent}'; create it first.")
    runs = [run for file in find_reports(asked.runs) for run in read_report(file)]
    try:
        write_report(asked.output, *runs)
    except OSError as error:
        raise ValueError(
            f"--output '{asked.output}' cannot be written ({error.strerror or error}); choose another folder."
        ) from error
    print(asked.output)
