"""Plots as inline SVG: axes with lines, and a bar in pieces. Knows no planner."""

from collections.abc import Sequence
from html import escape
from math import floor, log10

COLOURS = ("#2f6f9f", "#c8553d", "#5b8e3e", "#8a5aa8", "#d19a2a", "#4aa3a3", "#a33d6b", "#777777", "#3d5aa3", "#b08968")


def round_up(most: float) -> float:
    """The end of an axis whose quarters are round numbers."""
    if most <= 0:
        return 1.0
    unit = 10.0 ** floor(log10(most / 4))
    return next(4 * unit * x for x in (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 7.5, 10) if 4 * unit * x >= most)


def tick(value: float) -> str:
    """A number of an axis: thousands in full, never with an exponent."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


class Plot:
    """Axes and marks of one SVG, 720 x 320."""

    WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 320, 70, 45, 15, 20

    def __init__(self, x_most: float, y_most: float, x_name: str, y_name: str) -> None:
        self.x_most, self.y_most = round_up(x_most), round_up(y_most)
        self.out: list[str] = []
        for i in range(5):
            x, y = self.x_most * i / 4, self.y_most * i / 4
            self.out.append(f'<path d="M{self.x(0):.1f} {self.y(y):.1f}H{self.x(self.x_most):.1f}" stroke="#e4e4e4"/>')
            self.text(self.LEFT - 6, self.y(y) + 4, tick(y), "end")
            self.text(self.x(x), self.HEIGHT - self.BOTTOM + 16, tick(x), "middle")
        self.text((self.WIDTH + self.LEFT) / 2, self.HEIGHT - 8, x_name, "middle")
        self.out.append(
            f'<text transform="translate(14 {self.HEIGHT / 2}) rotate(-90)" text-anchor="middle">'
            f"{escape(y_name)}</text>"
        )

    def x(self, value: float) -> float:
        return self.LEFT + value / self.x_most * (self.WIDTH - self.LEFT - self.RIGHT)

    def y(self, value: float) -> float:
        return self.HEIGHT - self.BOTTOM - value / self.y_most * (self.HEIGHT - self.BOTTOM - self.TOP)

    def text(self, x: float, y: float, text: str, anchor: str = "start") -> None:
        self.out.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, points: Sequence[tuple[float, float]], colour: str, dots: bool = True) -> None:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        self.out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if dots:
            self.out += [
                f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3.5" fill="{colour}"/>' for x, y in points
            ]

    def legend(self, names: Sequence[tuple[str, str]], left: int) -> None:
        """Names with their colours from `left` on, at the top."""
        for i, (name, colour) in enumerate(names):
            y = self.TOP + 14 + 18 * i
            self.out.append(f'<rect x="{left}" y="{y - 10}" width="12" height="12" fill="{colour}"/>')
            self.text(left + 18, y, name)

    def svg(self) -> str:
        return f'<svg viewBox="0 0 {self.WIDTH} {self.HEIGHT}" role="img">{"".join(self.out)}</svg>'


def bar(parts: Sequence[tuple[str, float]], unit: str) -> str:
    """A horizontal bar in pieces, with a legend below."""
    total = sum(v for _, v in parts) or 1.0
    out, x = [], 0.0
    for i, (name, v) in enumerate(parts):
        width = 700 * v / total
        colour = COLOURS[i % len(COLOURS)]
        out.append(
            f'<rect x="{10 + x:.1f}" y="8" width="{width:.1f}" height="34" fill="{colour}">'
            f"<title>{escape(name)}</title></rect>"
        )
        column, row = i % 3, i // 3
        out.append(f'<rect x="{10 + 235 * column}" y="{54 + 20 * row}" width="12" height="12" fill="{colour}"/>')
        out.append(f'<text x="{28 + 235 * column}" y="{64 + 20 * row}">{escape(name)}: {v:,.3g} {unit}</text>')
        x += width
    height = 62 + 20 * -(-len(parts) // 3)
    return f'<svg viewBox="0 0 720 {height}" role="img">{"".join(out)}</svg>'
