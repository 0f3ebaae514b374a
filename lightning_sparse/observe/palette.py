"""Colors and marks of the page: ten series stay distinct for every kind of color vision, and without any color."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DASHES", "LEVELS", "SERIES", "SHAPES", "THEMES", "Look", "level_colors", "style_sheet"]

# Chosen by computation: any two colors of one theme differ by at least 12 in CIEDE2000, for normal vision and under
# simulated protanopia, deuteranopia and tritanopia, and each contrasts with the background by at least 3.
SERIES = {
    "light": (
        "#04479c", "#a33d06", "#689d60", "#c277c1", "#b27102", "#7c59d4", "#21757f", "#620718", "#2b213e", "#828179",
    ),
    "dark": (
        "#80a5ff", "#b16d2d", "#68e6d7", "#e96ab7", "#fbdd81", "#7e4ec2", "#298b8d", "#b78e83", "#f8fcd7", "#7a5f66",
    ),
}  # fmt: skip
"""One color per series."""

SHAPES = (
    "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z",  # circle
    "M-.88,-.88H.88V.88H-.88Z",  # square
    "M0,-1L1,.8H-1Z",  # triangle
    "M0,-1.1L1.1,0L0,1.1L-1.1,0Z",  # diamond
    "M-.35,-1H.35V-.35H1V.35H.35V1H-.35V.35H-1V-.35H-.35Z",  # plus
    "M0,1L1,-.8H-1Z",  # triangle, turned
    "M0,-1.1L.26,-.35L1.05,-.34L.42,.13L.65,.89L0,.44L-.65,.89L-.42,.13L-1.05,-.34L-.26,-.35Z",  # star
    "M-.5,-.9L0,-.4L.5,-.9L.9,-.5L.4,0L.9,.5L.5,.9L0,.4L-.5,.9L-.9,.5L-.4,0L-.9,-.5Z",  # times
    "M-1,0L.8,-1V1Z",  # triangle to the left
    "M-1.1,-.35H1.1V.35H-1.1Z",  # bar
)
"""One mark per series, as a path between -1 and 1."""

DASHES = ((1, 0), (6, 3), (2, 2), (10, 3), (6, 2, 2, 2), (12, 2, 2, 2), (4, 4), (10, 2, 2, 2, 2, 2), (1, 3), (14, 5))
"""One dash per series."""

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
"""Sparsities at which a heat map changes its shade."""

THEMES = {
    "light": {
        "ink": "#1d2430",
        "soft": "#576172",
        "rule": "#dfe4eb",
        "paper": "#ffffff",
        "card": "#f4f6f9",
        "shade": "#00000047",
    },
    "dark": {
        "ink": "#e5e9f0",
        "soft": "#a3aebd",
        "rule": "#333b47",
        "paper": "#14181e",
        "card": "#1c222b",
        "shade": "#ffffff42",
    },
}
"""Text, muted text, lines, the two backgrounds, and the shadow at the edge of scrolling areas."""

_RAMPS = {"light": ("#e9eff8", "#7fa8dc", "#0a2a5c"), "dark": ("#232b38", "#3f78c4", "#dbe9ff")}


@dataclass(frozen=True)
class Look:
    """The style that distinguishes a series.

    Args:
        color: number of its color.
        mark: number of its shape and of its dash.
    """

    color: int = 0
    mark: int = 0

    @property
    def paint(self) -> str:
        """The color, as a variable of the style sheet."""
        return f"var(--s{self.color % len(SERIES['light'])})"

    @property
    def shape(self) -> str:
        """The mark."""
        return SHAPES[self.mark % len(SHAPES)]

    @property
    def dash(self) -> tuple[int, ...]:
        """Lengths of strokes and gaps."""
        return DASHES[self.mark % len(DASHES)]


def level_colors(theme: str) -> list[str]:
    """Shades of a heat map, from dense to sparse."""
    anchors = [tuple(int(color[i : i + 2], 16) for i in (1, 3, 5)) for color in _RAMPS[theme]]
    colors = []
    for level in range(len(LEVELS) + 1):
        place = level / len(LEVELS) * (len(anchors) - 1)
        at = min(int(place), len(anchors) - 2)
        mixed = (round(a + (place - at) * (b - a)) for a, b in zip(anchors[at], anchors[at + 1], strict=True))
        colors.append("#{:02x}{:02x}{:02x}".format(*mixed))
    return colors


def style_sheet() -> str:
    """The themes as variables of a style sheet: light, also in print, and dark on screens that prefer it."""
    rules = {}
    for theme, colors in THEMES.items():
        named = colors | {f"s{i}": color for i, color in enumerate(SERIES[theme])}
        named |= {f"level{i}": color for i, color in enumerate(level_colors(theme))}
        rules[theme] = "".join(f"--{name}:{color};" for name, color in named.items())
    dark = f"@media screen and (prefers-color-scheme:dark){{:root{{{rules['dark']}}}}}"
    return f":root{{color-scheme:light dark;{rules['light']}}}{dark}"
