"""What TensorBoard and MLflow get, read back with their own readers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger

from lightning_sparse import MagnitudePruning
from lightning_sparse.observe import SparsityMonitor, log_export
from lightning_sparse.observe.facts import flat
from lightning_sparse.testing import fit, toy
from tests.helpers.loggers import Written


def train(logger: Any, **options: Any) -> SparsityMonitor:
    torch.manual_seed(1)
    monitor = SparsityMonitor(table=False, report=False)
    fit(toy(), MagnitudePruning(0.75), monitor, logger=logger, log_every_n_steps=1, **options)
    return monitor


def test_tensorboard_has_curves_a_page_of_charts_and_results_beside_the_configuration(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    layouts = pytest.importorskip("tensorboard.plugins.custom_scalar.layout_pb2")
    hparams = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    monitor = train(logger)
    read = accumulator.EventAccumulator(str(tmp_path / "run")).Reload()
    scalars = read.Tags()["scalars"]
    assert {"sparsity/actual", "sparsity/target", "sparsity/churn", "layers/net.6.weight", "cost/macs", "val_loss"} <= set(
        scalars
    )
    sparsity = {event.step: event.value for event in read.Scalars("sparsity/actual")}
    assert sparsity[11] == pytest.approx(0.75)

    layout = layouts.Layout()
    layout.ParseFromString(read.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert next(iter(charts)) == "target against actual"
    for title, patterns in charts.items():
        matching = [tag for tag in scalars for pattern in patterns if re.search(pattern, tag)]
        assert matching, f"{title} would be empty"

    results = accumulator.EventAccumulator(str(tmp_path / "run" / "results")).Reload()
    content = results.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    asked = hparams.HParamsPluginData.FromString(content).session_start_info.hparams
    assert asked["methods/MagnitudePruning/sparsity"].number_value == 0.75
    assert asked["model/class"].string_value == "Toy"
    best = min(row["metrics"]["val_loss"] for row in monitor.history.rows if row["phase"] == "at target")
    assert results.Scalars("best/val_loss")[0].value == pytest.approx(best)
    assert results.Scalars("frontier/density")[0].value == pytest.approx(0.25)


def test_mlflow_has_curves_and_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a database would be the larger dependency
    mlflow = pytest.importorskip("mlflow")
    where = (tmp_path / "mlruns").as_uri()
    logger = MLFlowLogger("sparse", tracking_uri=where)
    monitor = train(logger)
    client = mlflow.tracking.MlflowClient(where)
    run = client.get_run(logger.run_id)
    assert run.data.params["methods/MagnitudePruning/sparsity"] == "0.75"
    assert run.data.params["optimizer/class"] == "SGD"
    assert run.data.params["trainer/max_epochs"] == "3"
    assert run.data.metrics["sparsity/actual"] == pytest.approx(0.75)
    assert run.data.metrics["best/val_loss"] in [
        pytest.approx(row["metrics"]["val_loss"]) for row in monitor.history.rows if row["phase"] == "at target"
    ]
    curve = client.get_metric_history(logger.run_id, "layers/net.6.weight")
    assert [point.step for point in curve] == [3, 7, 11]


def test_a_csv_logger_keeps_the_configuration(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    train(logger)
    assert "MagnitudePruning" in next(tmp_path.rglob("hparams.yaml")).read_text()


def test_any_logger_has_every_number_once_per_step() -> None:
    written = Written()
    train(written)
    assert {"sparsity/actual", "best/epoch", "frontier/density"} <= set(written.keys)
    assert not [key for key in written.keys if key.startswith("final/") or key == "sparsity"]
    assert written.configuration["methods"]["MagnitudePruning"]["sparsity"] == 0.75
    assert written.configuration["data"]["batch_size"] > 0


def test_nested_values_become_flat() -> None:
    assert flat({"optimizer": [{"lr": 1}], "a": {"b": {"c": None}}}) == {"optimizer/lr": 1, "a/b/c": None}
    assert flat({"optimizer": [{"lr": 1}, {"lr": 2}]}) == {"optimizer/0/lr": 1, "optimizer/1/lr": 2}


def test_an_export_is_logged_rung_by_rung() -> None:
    def rung(size: int | None, *median: float) -> dict[str, Any]:
        return {"bytes": size, "latency": {"64": {"median": median[0]}} if median else {}}

    written = Written()
    log_export(written, {"batch_size": 64, "rungs": {"dense": rung(100, 8.0), "compact": rung(10), "csr": rung(None, 2.0)}})
    [(_, numbers)] = written.numbers
    assert numbers == {
        "export/dense/bytes": 100,
        "export/dense/latency_ms": 8.0,
        "export/dense/speed": 1.0,
        "export/compact/bytes": 10,
        "export/csr/latency_ms": 2.0,
        "export/csr/speed": 4.0,
    }
