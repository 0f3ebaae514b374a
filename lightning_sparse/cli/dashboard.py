"""`lightning-sparse dashboard`: a saved view and a report on Weights & Biases."""

from __future__ import annotations

import argparse

from lightning_sparse.observe.views import save_dashboard

__all__ = ["dashboard"]


def dashboard(args: list[str]) -> None:
    """`lightning-sparse dashboard --project P`: a saved view and a report on Weights & Biases."""
    parser = argparse.ArgumentParser("lightning-sparse dashboard", description="Arrange a project on Weights & Biases.")
    parser.add_argument("--project", required=True, help="the project that the runs were logged to")
    parser.add_argument("--entity", help="user or team (default: that of the account)")
    parser.add_argument(
        "--metric", default="val/accuracy", help="the metric that runs are compared by (default: val/accuracy)"
    )
    asked = parser.parse_args(args)
    print(*save_dashboard(asked.project, asked.entity, asked.metric), sep="\n")
