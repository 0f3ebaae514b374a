"""Charts hold what they show, on scales that spread what matters, and Vega draws them."""

from __future__ import annotations

import json
import xml.etree.ElementTree
from typing import Any

import pytest

from lightning_sparse.observe.charts import CELLS, CONFIG, Axis, Curve, End, frontier, heat_map, lines, shades
from lightning_sparse.observe.palette import LEVELS, Look

vl_convert = pytest.importorskip("vl_convert")
EPOCH, SPARSITY, ACCURACY = Axis("epoch"), Axis("sparsity", "sparsity"), Axis("accuracy", "share")


def values(spec: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The data of all layers, in order."""
    assert spec is not None
    names = dict.fromkeys(layer["data"]["name"] for layer in [spec, *spec.get("layer", [])] if "data" in layer)
    return [row for name in names for row in spec["datasets"][name]]


def drawn(spec: dict[str, Any] | None) -> xml.etree.ElementTree.Element:
    """What Vega makes of it, without a browser."""
    assert spec is not None
    fixed = {**spec, "width": 500, "config": CONFIG, "padding": 0}
    return xml.etree.ElementTree.fromstring(vl_convert.vegalite_to_svg(fixed))


def texts(picture: xml.etree.ElementTree.Element) -> list[str]:
    return [str(one.text) for one in picture.iter("{http://www.w3.org/2000/svg}text")]


def places(picture: xml.etree.ElementTree.Element) -> dict[str, tuple[float, float]]:
    """Where each mark lies, by the text that a screen reader has for it."""
    found = {}
    for one in picture.iter("{http://www.w3.org/2000/svg}path"):
        label, at = one.get("aria-label"), one.get("transform", "")
        if label and at.startswith("translate("):
            x, y = at.removeprefix("translate(").partition(")")[0].split(",")
            found[label] = float(x), float(y)
    return found


def test_ninety_to_ninety_nine_is_most_of_the_axis() -> None:
    ends = [End(f"{s}", "RigL", s, 0.9) for s in (0.8, 0.9, 0.95, 0.99)]
    picture = drawn(frontier(ends, ACCURACY, "frontier"))
    at = {float(label.partition("series: ")[2].partition(";")[0]): x for label, (x, _) in places(picture).items()}
    assert at[0.8] < at[0.9] < at[0.95] < at[0.99]
    assert at[0.9] - at[0.8] == pytest.approx(at[0.95] - at[0.9], abs=0.5), "what is left is halved"
    assert (at[0.99] - at[0.9]) / (at[0.99] - at[0.8]) > 0.7
    assert {"80%", "90%", "95%", "98%", "99%"} <= set(texts(picture))


def test_points_lie_where_their_values_are() -> None:
    curve = Curve("a", [0, 1, 2], [0.0, 0.25, 1.0])
    spec = lines([curve], EPOCH, ACCURACY, "accuracy")
    assert [(row["x"], row["y"]) for row in values(spec)] == [(0, 0.0), (1, 0.25), (2, 1.0)]
    at = list(places(drawn(spec)).values())
    assert (at[1][0] - at[0][0]) / (at[2][0] - at[0][0]) == pytest.approx(0.5, abs=0.01)
    assert (at[0][1] - at[1][1]) / (at[0][1] - at[2][1]) == pytest.approx(0.25, abs=0.01)
    assert at[0][1] > at[2][1], "up is more"


def test_values_are_there_on_hover() -> None:
    spec = lines([Curve("masks", [1, 2], [0.5, 0.95])], EPOCH, SPARSITY, "sparsity")
    label = " ".join(places(drawn(spec)))
    assert "curve: masks; epoch: 2; sparsity: 95.00%" in label
    ends = [End("RigL 95%, seed 1", "RigL", 0.95, 0.9321, facts={"exact zeros": "95.00%"})]
    label = " ".join(places(drawn(frontier(ends, ACCURACY, "frontier"))))
    assert "run: RigL 95%, seed 1; sparsity: 95.00%; accuracy: 93.21%; exact zeros: 95.00%" in label


def test_what_is_no_number_is_left_out() -> None:
    assert lines([Curve("nothing", [None], [1.0])], EPOCH, ACCURACY, "") is None
    assert frontier([], ACCURACY, "") is None
    spec = lines([Curve("some", [1, 2, 3], [float("nan"), 0.5, float("inf")])], EPOCH, ACCURACY, "")
    assert len(values(spec)) == 1
    assert values(spec)[0]["mark"], "a single reading would be an invisible line"


def test_long_curves_are_thinned_and_keep_their_ends() -> None:
    spec = lines([Curve("long", list(range(5000)), [i % 7 for i in range(5000)])], EPOCH, Axis("x"), "")
    assert len(values(spec)) == 300
    assert [values(spec)[i]["x"] for i in (0, -1)] == [0, 4999]


def test_curves_differ_in_color_dash_and_mark() -> None:
    curves = [Curve(f"run {i}", [1, 2], [0.1, 0.2], Look(i, i)) for i in range(10)]
    spec = lines(curves, EPOCH, ACCURACY, "", marks=True)
    assert spec is not None
    encodings = [layer["encoding"] for layer in spec["layer"]]
    for channel in ("color", "shape", "strokeDash"):
        scales = [encoding[channel]["scale"] for encoding in encodings if "scale" in encoding.get(channel, {})]
        assert scales
        assert all(len({json.dumps(style) for style in scale["range"]}) == 10 for scale in scales)


def test_bands_span_the_seeds_and_lines_go_through_means() -> None:
    ends = [End("RigL", "RigL", s, s / 2 + seed / 100) for s in (0.8, 0.9) for seed in (0, 1, 2)]
    spec = frontier([*ends, End("SET", "SET", 0.9, 0.1)], ACCURACY, "", {"dense": 0.99})
    assert spec is not None
    means = {(row["group"], round(1 - row["x"], 6)): row for row in values(spec) if "group" in row}
    assert set(means) == {("RigL", 0.8), ("RigL", 0.9), ("SET", 0.9)}
    row = means["RigL", 0.9]
    assert (row["low"], row["y"], row["high"]) == pytest.approx((0.45, 0.46, 0.47))
    assert not means["SET", 0.9]["joined"]
    bands = [layer for layer in spec["layer"] if layer["mark"]["type"] == "area"]
    assert {row["group"] for row in spec["datasets"][bands[0]["data"]["name"]]} == {"RigL"}, "one seed has no band"
    assert {"series": "dense", "y": 0.99} in values(spec)


def test_a_heat_map_has_a_scale_and_every_value() -> None:
    spec = heat_map(["net.a.weight", "net.b.weight"], [[100, 100], [50, 1]], [100, 100], "epoch", ["1", "2"])
    found = [one for one in drawn(spec).iter("{http://www.w3.org/2000/svg}path") if "layer: " in one.get("aria-label", "")]
    assert ["layer: " + one.get("aria-label", "").partition("layer: ")[2] for one in found] == [
        "layer: net.a.weight; epoch: 1; sparsity: 0.00%; kept: 100; of: 100",
        "layer: net.b.weight; epoch: 1; sparsity: 0.00%; kept: 100; of: 100",
        "layer: net.a.weight; epoch: 2; sparsity: 50.00%; kept: 50; of: 100",
        "layer: net.b.weight; epoch: 2; sparsity: 99.00%; kept: 1; of: 100",
    ]
    fills = [one.get("fill") for one in found]
    assert fills == ["var(--level0)", "var(--level0)", "var(--level3)", "var(--level9)"], "a level begins at its number"
    assert {"a", "b"} <= set(texts(drawn(spec)))
    assert len(shades()) == len(LEVELS) + 1
    assert list(shades())[-4:] == ["90 to 95%", "95 to 98%", "98 to 99%", "99% or more"]


def test_a_heat_map_of_many_layers_and_epochs_stays_drawable() -> None:
    spec = heat_map([f"{i}" for i in range(200)], [[1] * 200] * 300, [10] * 200, "epoch", [f"{i}" for i in range(300)])
    assert len(values(spec)) * 200 <= CELLS
    assert [values(spec)[i]["head"] for i in (0, -1)] == ["0", "299"]
