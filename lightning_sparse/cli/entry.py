"""The entry point: `main` runs a subcommand, and what this package refuses ends in one sentence."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_sparse.cli.checkpoints import with_saved_config
from lightning_sparse.cli.sparse_cli import SparseCLI
from lightning_sparse.observe.report import find_reports, read_report, write_report
from lightning_sparse.observe.views import save_dashboard

__all__ = ["main"]


def report(args: list[str]) -> None:
    """`lightning-sparse report RUN...`: one page about several runs."""
    parser = argparse.ArgumentParser("lightning-sparse report", description="Lay runs side by side in one page.")
    parser.add_argument("runs", nargs="+", help="folders of runs, or their report.html")
    parser.add_argument("--output", type=Path, default=Path("comparison.html"), help="the page (default: comparison.html)")
    asked = parser.parse_args(args)
    write_report(asked.output, *(run for file in find_reports(asked.runs) for run in read_report(file)))
    print(asked.output)


def dashboard(args: list[str]) -> None:
    """`lightning-sparse dashboard --project P`: a saved view and a report on Weights & Biases."""
    parser = argparse.ArgumentParser("lightning-sparse dashboard", description="Arrange a project on Weights & Biases.")
    parser.add_argument("--project", required=True, help="that the runs were logged to")
    parser.add_argument("--entity", help="user or team (default: that of the account)")
    parser.add_argument("--metric", default="val/accuracy", help="that runs are compared by (default: val/accuracy)")
    asked = parser.parse_args(args)
    print(*save_dashboard(asked.project, asked.entity, asked.metric), sep="\n")


def main(args: list[str] | None = None) -> None:
    """Entry point of `lightning-sparse`; what this package refuses ends in one sentence, not in a traceback."""
    given = sys.argv[1:] if args is None else args
    try:
        if given[:1] == ["report"]:
            report(given[1:])
            return
        if given[:1] == ["dashboard"]:
            dashboard(given[1:])
            return
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python")
            SparseCLI(with_saved_config(given, folder))
    except Exception as error:
        refusal = _our_refusal(error)
        if refusal is None:
            raise
        print(f"lightning-sparse: {refusal}", file=sys.stderr)
        sys.exit(2)


def _our_refusal(error: BaseException | None) -> str | None:
    """What this package has refused, if that is what an error comes from."""
    if isinstance(error, MisconfigurationException):
        return " ".join(str(error).split())
    while error is not None:
        *_, (last, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ValueError | FileNotFoundError) and str(last.f_globals.get("__package__")).startswith(
            "lightning_sparse"
        ):
            return str(error)
        if (
            isinstance(error, ValueError)
            and error.__context__ is None
            and last.f_globals["__name__"].startswith("jsonargparse")
        ):
            causes = re.findall(r"^\s*- (\w+=.+)$", str(error), flags=re.M)  # older versions keep only the text of a refusal
            return causes[0] if causes else None
        error = error.__cause__ or error.__context__
    return None
