"""A saved view and a report for a project on Weights & Biases, as code: `lightning-sparse dashboard --project P`.

Both show the keys that `SparsityMonitor` logs, so that a project with many runs need not be arranged by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["RUNGS", "make_report", "make_view", "save_dashboard"]

STEP = "trainer/global_step"
RUNGS = ("dense", "plain", "compact", "merged", "removed", "kernels", "csr", "2:4", "onnx")
"""Steps of the export ladder that `log_export` may have logged."""
INTRODUCTIONS = {
    "Frontier": "The metric against what is left of the chosen weights, on a logarithmic scale: a line for each method goes "
    "through the means of its runs, a band from the lowest to the highest of its seeds.",
    "Sparsity": "Target against actual sparsity. Exact zeros are a second reading: where they differ from the masks, "
    "weights are not what the method says.",
    "Layers": "How sparse each layer is, over time.",
    "Topology": "Churn is the share of connections that came or went in an epoch. Dead outputs have no weight left.",
    "Cost": "Multiply-accumulates that are left, as a share of the dense model's, and parameters of the whole model.",
    "Export ladder": "What was deployed: latency of every rung and size of its file, of runs that have called log_export.",
}


def make_view(entity: str, project: str, metric: str) -> Any:
    """Make the saved view, without sending it.

    Args:
        entity: user or team.
        project: name of the project.
        metric: the metric that runs are compared by.
    """
    from wandb_workspaces import workspaces

    sections = [
        workspaces.Section(name=title, panels=list(panels), is_open=True) for title, panels in _panels(metric).items()
    ]
    columns = [
        "run:displayName",
        "config:method",
        "summary:sparsity/actual",
        f"summary:best/{metric}",
        "summary:cost/macs_fraction",
    ]
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name="Sparse training",
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=STEP, max_runs=50),
        runset_settings=workspaces.RunsetSettings(pinned_columns=columns),
    )


def make_report(entity: str, project: str, metric: str) -> Any:
    """Make the report, without sending it.

    Args:
        entity: user or team.
        project: name of the project.
        metric: the metric that runs are compared by.
    """
    from wandb_workspaces.reports import v2 as reports

    blocks: list[Any] = [reports.TableOfContents()]
    for title, panels in _panels(metric).items():
        runs = reports.Runset(name="runs", groupby=["config.method"])  # of the project that the report is in
        blocks += [
            reports.H1(title),
            reports.P(INTRODUCTIONS[title]),
            reports.PanelGrid(runsets=[runs], panels=_placed(panels)),
        ]
    return reports.Report(
        entity=entity,
        project=project,
        title="Sparse training",
        description=f"Methods by {metric}, and what they did during training.",
        blocks=blocks,
        width="fluid",
    )


def save_dashboard(project: str, entity: str | None = None, metric: str = "val/accuracy") -> tuple[str, str]:
    """Save the view and the report in a project.

    Args:
        project: the project that runs were logged to.
        entity: user or team; None uses that of the account.
        metric: the logged metric that runs are compared by.

    Returns:
        The URLs of both.

    Raises:
        ValueError: if `wandb-workspaces` or an account is missing.
    """
    from lightning_sparse.observe.wandb import default_entity

    try:
        import wandb_workspaces  # noqa: F401
    except ImportError:
        raise ValueError(
            "a dashboard needs wandb-workspaces, which is not installed; pip install 'lightning_sparse[dashboard]'."
        ) from None
    owner = entity or default_entity()
    view, report = make_view(owner, project, metric).save(), make_report(owner, project, metric)
    report.save()
    return str(view.url), str(report.url)


def _panels(metric: str) -> dict[str, Sequence[Any]]:
    """All panels, by section."""
    from wandb_workspaces.reports import v2 as reports

    best = f"best/{metric}"
    by_method: dict[str, Any] = {
        "groupby": reports.Config("method"),
        "groupby_aggfunc": "mean",
        "groupby_rangefunc": "minmax",
    }

    def over_time(title: str, *keys: str, **more: Any) -> Any:
        return reports.LinePlot(title=title, x=STEP, y=list(keys), **more)

    return {
        "Frontier": [
            reports.LinePlot(
                title=f"{metric} against what is left, by method",
                x="frontier/density",
                y=[best],
                log_x=True,
                title_x="density of the chosen weights",
                **by_method,
            ),
            reports.ScatterPlot(
                title=f"{metric} against what is left, every run",
                x=reports.SummaryMetric("frontier/density"),
                y=reports.SummaryMetric(best),
                log_x=True,
            ),
            over_time(metric, metric, **by_method),
        ],
        "Sparsity": [
            over_time("target against actual", "sparsity/actual", "sparsity/target"),
            over_time("masks against exact zeros", "sparsity/actual", "sparsity/zeros"),
            over_time("whole model", "sparsity/model"),
        ],
        "Layers": [
            reports.LinePlot(title="sparsity of each layer", x=STEP, metric_regex="layers/.*", max_runs_to_show=1),
            reports.MediaBrowser(title="layers over time", media_keys=["charts/layers_over_time"], num_columns=1),
        ],
        "Topology": [
            over_time("churn", "sparsity/churn", **by_method),
            over_time("dead outputs", "sparsity/dead_outputs", **by_method),
        ],
        "Cost": [
            over_time("multiply-accumulates, of dense", "cost/macs_fraction", **by_method),
            over_time("parameters of the whole model", "cost/parameters", **by_method),
        ],
        "Export ladder": [
            reports.BarPlot(title="latency in ms", metrics=[f"export/{rung}/latency_ms" for rung in RUNGS], **by_method),
            reports.BarPlot(title="bytes of the file", metrics=[f"export/{rung}/bytes" for rung in RUNGS], **by_method),
        ],
    }


def _placed(panels: Sequence[Any], columns: int = 3, width: int = 8, height: int = 8) -> list[Any]:
    """Panels side by side on the grid of a report."""
    from wandb_workspaces.reports import v2 as reports

    for i, panel in enumerate(panels):
        panel.layout = reports.Layout(x=i % columns * width, y=i // columns * height, w=width, h=height)
    return list(panels)
