"""Text can be read, and series be told apart, with every kind of color vision: computed."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import lightning_sparse.observe.palette as palette
from lightning_sparse.observe.palette import DASHES, SERIES, SHAPES, THEMES, level_colors, style_sheet

Array = npt.NDArray[np.float64]

# Machado, Oliveira and Fernandes (2009), table 1, severity 1.0; on linear RGB.
VISIONS = {
    "normal": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
WHITE = np.array([0.95047, 1.0, 1.08883])


def linear(color: str) -> Array:
    channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb: Array) -> Array:
    ratio = XYZ @ np.clip(rgb, 0, 1) / WHITE
    x, y, z = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def difference(one: Array, other: Array) -> float:
    """CIEDE2000, as Sharma, Wu and Dalal (2005) write it."""
    (l1, a1, b1), (l2, a2, b2) = one, other
    mean = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    g = 0.5 * (1 - np.sqrt(mean**7 / (mean**7 + 25.0**7)))
    a1, a2 = (1 + g) * a1, (1 + g) * a2
    c1, c2 = np.hypot(a1, b1), np.hypot(a2, b2)
    h1, h2 = np.degrees(np.arctan2(b1, a1)) % 360, np.degrees(np.arctan2(b2, a2)) % 360
    turn = 0.0 if c1 * c2 == 0 else (h2 - h1 + 180) % 360 - 180
    dl, dc, dh = l2 - l1, c2 - c1, 2 * np.sqrt(c1 * c2) * np.sin(np.radians(turn / 2))
    light, chroma, hue = (l1 + l2) / 2, (c1 + c2) / 2, (h1 + turn / 2) % 360
    t = 1 - 0.17 * np.cos(np.radians(hue - 30)) + 0.24 * np.cos(np.radians(2 * hue))
    t += 0.32 * np.cos(np.radians(3 * hue + 6)) - 0.20 * np.cos(np.radians(4 * hue - 63))
    sl = 1 + 0.015 * (light - 50) ** 2 / np.sqrt(20 + (light - 50) ** 2)
    sc, sh = 1 + 0.045 * chroma, 1 + 0.015 * chroma * t
    swing = 60 * np.exp(-(((hue - 275) / 25) ** 2))
    rt = -2 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7)) * np.sin(np.radians(swing))
    return float(np.sqrt((dl / sl) ** 2 + (dc / sc) ** 2 + (dh / sh) ** 2 + rt * dc / sc * dh / sh))


def contrast(one: str, other: str) -> float:
    """Of two colors, as WCAG 2 defines it."""
    dark, light = sorted(XYZ[1] @ linear(color) for color in (one, other))
    return float((light + 0.05) / (dark + 0.05))


@pytest.mark.parametrize(  # of the table of Sharma, Wu and Dalal (2005)
    ("one", "other", "expected"),
    [
        ((50.0, 2.6772, -79.7751), (50.0, 0.0, -82.7485), 2.0425),
        ((50.0, 2.5, 0.0), (73.0, 25.0, -18.0), 27.1492),
        ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
        ((90.8027, -2.0831, 1.4410), (91.1528, -1.6435, 0.0447), 1.4441),
        ((2.0776, 0.0795, -1.1350), (0.9033, -0.0636, -0.5514), 0.9082),
    ],
)
def test_differences_are_those_of_the_standard(one: tuple[float, ...], other: tuple[float, ...], expected: float) -> None:
    assert difference(np.array(one), np.array(other)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("theme", THEMES)
def test_ten_series_are_apart_for_every_color_vision(theme: str, vision: str) -> None:
    seen = [lab(VISIONS[vision] @ linear(color)) for color in SERIES[theme]]
    assert len(seen) == 10
    assert min(difference(a, b) for a, b in itertools.combinations(seen, 2)) >= 12


def test_ten_series_are_apart_without_a_color() -> None:
    assert len(set(SHAPES)) == len(set(DASHES)) == 10


@pytest.mark.parametrize("theme", THEMES)
def test_all_text_can_be_read(theme: str) -> None:
    colors = THEMES[theme]
    for text, behind in itertools.product(("ink", "soft"), ("paper", "card")):
        assert contrast(colors[text], colors[behind]) >= 4.5, (text, behind)
    for color in SERIES[theme]:
        assert contrast(color, colors["paper"]) >= 3, "a line or a mark"


@pytest.mark.parametrize("theme", THEMES)
def test_shades_of_a_heat_map_go_one_way(theme: str) -> None:
    light = [float(lab(linear(color))[0]) for color in level_colors(theme)]
    steps = [b - a for a, b in itertools.pairwise(light)]
    assert all(step < -4 for step in steps) or all(step > 4 for step in steps)


def test_colors_of_the_page_are_those_that_were_checked() -> None:
    css = (Path(palette.__file__).parent / "report.css").read_text()
    assert not re.findall(r"#[0-9a-f]{3,8}\b(?!\w)", re.sub(r"#0003|#vg-tooltip-element", "", css))
    defined = set(re.findall(r"--(\w+):", style_sheet()))
    assert set(re.findall(r"var\(--(\w+)\)", css)) <= defined
    assert set(re.findall(r"[^-]color: var\(--(\w+)\)", css)) == {"ink", "soft"}


def test_figures_have_the_colors_of_the_page() -> None:
    style = pytest.importorskip("matplotlib.style")
    with style.context("lightning_sparse.observe.figures"):
        import matplotlib

        assert (
            tuple(f"#{color.lstrip('#')}" for color in matplotlib.rcParams["axes.prop_cycle"].by_key()["color"])
            == SERIES["light"]
        )
        assert f"#{matplotlib.rcParams['text.color'].lstrip('#')}" == THEMES["light"]["ink"]
        assert f"#{matplotlib.rcParams['grid.color'].lstrip('#')}" == THEMES["light"]["rule"]
