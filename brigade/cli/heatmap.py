"""A heat map of ranks' loads, layer by rank: its colours, and the picture of it. Knows no server and no terminal.

What is drawn is a rank's load over the mean rank's of its layer: white is the mean, red is more, blue is less.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Colour = tuple[int, int, int]

SPANS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_LOW, _MEAN, _HIGH = (33, 102, 172), (247, 247, 247), (178, 24, 43)
_INK, _FAINT, _PAPER = (34, 34, 34), (110, 110, 110), (255, 255, 255)
_MARGIN, _GAP, _BAR, _NOTES = 28, 34, 14, 60


@dataclass(frozen=True)
class Panel:
    """One map."""

    title: str
    loads: Sequence[Sequence[float]]
    """[layer][rank] -> load over the mean rank's of that layer."""

    @property
    def busiest(self) -> list[float]:
        """Of each layer."""
        return [max(row) for row in self.loads]


def over_mean(loads: Sequence[Sequence[float]]) -> list[list[float]]:
    """Loads over the mean of their layer; all 1 in a layer without load."""
    return [[x * len(row) / total if (total := sum(row)) else 1.0 for x in row] for row in loads]


def span(panels: Sequence[Panel]) -> float:
    """How far from 1 the colours of these panels must reach: one scale for all."""
    furthest = max(abs(x - 1) for panel in panels for row in panel.loads for x in row)
    return next((s for s in SPANS if furthest <= s), SPANS[-1])


def colour(value: float, reach: float) -> Colour:
    """Of a load over the mean; what is beyond 1 +- reach has the colour of the end. Nothing is less than 0."""
    part = max(-1.0, min(1.0, (value - 1) / (reach if value > 1 else min(reach, 1.0))))
    end = _HIGH if part > 0 else _LOW
    r, g, b = (round(m + (e - m) * abs(part) ** 0.8) for m, e in zip(_MEAN, end, strict=True))
    return r, g, b


def ink_on(paper: Colour) -> Colour:
    """Black or white, whichever can be read on it."""
    return _INK if 0.299 * paper[0] + 0.587 * paper[1] + 0.114 * paper[2] > 140 else _PAPER


def draw(path: Path, title: str, subtitle: str, layers: Sequence[int], panels: Sequence[Panel]) -> None:
    """Write the panels side by side as a PNG. `layers`: the number of each row. Raises OSError."""
    from PIL import Image
    from PIL import ImageDraw as Draw

    n_layers, n_ranks = len(layers), len(panels[0].loads[0])
    cell = max(3, min(64, 560 // n_ranks)), max(5, min(34, 620 // n_layers))
    width, height = n_ranks * cell[0], n_layers * cell[1]
    left, top = _MARGIN + 44, _MARGIN + 106
    panel_width = max(width, 150) + _NOTES
    wide = max(
        left + len(panels) * (panel_width + _GAP) + 70, _MARGIN + _width(title, 20), _MARGIN + _width(subtitle, 13)
    )
    image = Image.new("RGB", (wide + _MARGIN, top + height + 64), _PAPER)
    page = _Page(Draw.Draw(image))
    page.text((_MARGIN, _MARGIN - 6), title, 20)
    page.text((_MARGIN, _MARGIN + 24), subtitle, 13, _FAINT)
    reach = span(panels)
    for i, panel in enumerate(panels):
        x = left + i * (panel_width + _GAP)
        page.panel((x, top), cell, panel, reach)
        for row in _ticks(n_layers, 14, cell[1]):
            page.text((x - 8, top + (row + 0.5) * cell[1]), str(layers[row]), 12, _FAINT, "rm")
    page.sideways(image, "layer", _MARGIN - 8, top + height // 2)
    page.scale((left + len(panels) * (panel_width + _GAP), top), height, reach)
    image.save(path, "PNG")


class _Page:
    def __init__(self, draw: "ImageDraw") -> None:
        self._draw = draw
        self._fonts: dict[int, Any] = {}

    def text(self, at: tuple[float, float], text: str, size: int, ink: Colour = _INK, anchor: str = "la") -> None:
        self._draw.text(at, text, ink, self._font(size), anchor)

    def panel(self, at: tuple[int, int], cell: tuple[int, int], panel: Panel, reach: float) -> None:
        (x0, y0), (w, h) = at, cell
        n_layers, n_ranks = len(panel.loads), len(panel.loads[0])
        gap = 1 if min(w, h) > 6 else 0
        self.text((x0, y0 - 44), panel.title, 15)
        self.text((x0 + n_ranks * w + 8, y0 - 8), "busiest", 11, _FAINT, "lb")
        for i, row in enumerate(panel.loads):
            y = y0 + i * h
            for rank, value in enumerate(row):
                x, fill = x0 + rank * w, colour(value, reach)
                self._draw.rectangle((x, y, x + w - 1 - gap, y + h - 1 - gap), fill)
                if w >= 36 and h >= 14:
                    self.text((x + (w - gap) / 2, y + (h - gap) / 2), f"{value:.2f}", 12, ink_on(fill), "mm")
            if h >= 12 or i in _ticks(n_layers, 14, h):
                self.text((x0 + n_ranks * w + 8, y + h / 2), f"{max(row):.2f}", 12, _INK, "lm")
        self._draw.rectangle((x0 - 1, y0 - 1, x0 + n_ranks * w - gap, y0 + n_layers * h - gap), outline=_FAINT)
        for rank in _ticks(n_ranks, 26, w):
            self.text((x0 + (rank + 0.5) * w, y0 + n_layers * h + 5), str(rank), 12, _FAINT, "ma")
        self.text((x0 + n_ranks * w / 2, y0 + n_layers * h + 24), "rank", 13, _INK, "ma")

    def scale(self, at: tuple[int, int], height: int, reach: float) -> None:
        """The bar that says what a colour means."""
        (x, y), height = at, max(height, 80)
        low = max(0.0, 1 - reach)
        for i in range(height):
            value = 1 + reach - (1 + reach - low) * i / (height - 1)
            self._draw.line((x, y + i, x + _BAR, y + i), colour(value, reach))
        self._draw.rectangle((x - 1, y - 1, x + _BAR + 1, y + height), outline=_FAINT)
        self.text((x - 1, y - 8), "load / mean", 11, _FAINT, "lb")
        for value in (1 + reach, 1 + reach / 2, 1.0, (1 + low) / 2, low):
            at_y = y + (1 + reach - value) / (1 + reach - low) * (height - 1)
            self._draw.line((x + _BAR, at_y, x + _BAR + 4, at_y), _FAINT)
            self.text((x + _BAR + 8, at_y), f"{value:.3g}", 12, _FAINT, "lm")

    def sideways(self, image: Any, text: str, x: int, y: int) -> None:
        """Text that reads upwards, its middle at y."""
        from PIL import Image
        from PIL import ImageDraw as Draw

        label = Image.new("RGB", (80, 18), _PAPER)
        Draw.Draw(label).text((40, 9), text, _INK, self._font(13), "mm")
        turned = label.rotate(90, expand=True)
        image.paste(turned, (x, y - turned.height // 2))

    def _font(self, size: int) -> Any:
        from PIL import ImageFont

        if size not in self._fonts:
            self._fonts[size] = ImageFont.load_default(size)
        return self._fonts[size]


def _width(text: str, size: int) -> int:
    from PIL import ImageFont

    return round(ImageFont.load_default(size).getlength(text))


def _ticks(n: int, room: int, step: int) -> range:
    """Which of n places get a number, so that each has `room` pixels."""
    every = next((e for e in (1, 2, 5, 10, 20, 50, 100) if e * step >= room), 200)
    return range(0, n, every)
