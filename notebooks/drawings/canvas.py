"""The parts of all drawings: boxes, arrows, labels, curves and dots, as SVG text.

No library, no font file and no link; colours follow the reader's light or dark theme. A kind is a
meaning: its colour is the same in every drawing.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from drawings.sizes import MODELS, written
from nanosd3.training.plot_style import MEANINGS

KINDS = {  # fill and stroke on a light page, then on a dark one
    "text": ("#fdf0d5", MEANINGS["prompt"], "#3d2a0c", "#f0a441"),  # and the prompt
    "image": ("#dfebfb", MEANINGS["data"], "#12294a", "#6fa8f5"),  # and the data
    "noise": ("#eceff2", MEANINGS["noise"], "#262d35", "#9aa4af"),
    "guess": ("#fbe3ef", MEANINGS["prediction"], "#431329", "#f58fc0"),  # what a network predicts
    "cond": ("#ddf3e4", "#1a7f4b", "#10331f", "#5ccb8b"),
    "both": ("#ece6f6", "#6b4fa0", "#2a2140", "#b39ae0"),
}
PAGES = (("#1b2129", "#57606a", "#ffffff", "#f5f7f9"), ("#e8edf2", "#a3adb8", "#0f141a", "#171d25"))
LINES = """\
text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif}
.name{font-size:16px;font-weight:600}.small{font-weight:700}.symbol{font-style:italic}
.line,.box{stroke-width:1.6}path.line{fill:none}.paper{stroke-opacity:.35}
.pixels{fill:#000}.three{fill:none;stroke:#fff;stroke-width:8;stroke-linecap:round}
.frame{fill:none;stroke-dasharray:1 5;stroke-linecap:round}.dashed{stroke-dasharray:5 4}
.dotted{stroke-dasharray:1 4}.dots{fill:none;stroke-linecap:round}.thin{stroke-width:1}
.thick{stroke-width:2.6}.thickest{stroke-width:4}.pale{opacity:.45}
"""
Point = tuple[int, int]
Spot = tuple[float, float]


def colours(dark: bool) -> str:
    """The part of the style sheet that differs between light and dark pages."""
    ink, faint, paper, panel = PAGES[dark]
    rules = f"text{{fill:{ink}}}.large,.note{{fill:{faint}}}.paper,.frame{{stroke:{faint}}}"
    rules += f".paper{{fill:{paper}}}.panel{{fill:{panel}}}\n"
    for kind, (*light, dark_fill, dark_stroke) in KINDS.items():
        fill, stroke = (dark_fill, dark_stroke) if dark else light
        rules += f".{kind}{{fill:{fill};stroke:{stroke}}}.{kind}.solid{{fill:{stroke}}}\n"
    return rules


def towards(a: Point, b: Point, distance: int) -> Point:
    """The point at a distance from a on the horizontal or vertical way to b."""
    x, y = (p + distance * ((q > p) - (q < p)) for p, q in zip(a, b, strict=True))
    return x, y


@dataclass(frozen=True)
class Axes:
    """A plot's place on the page."""

    x: int
    y: int
    width: int
    height: int

    def place(self, x: Sequence[float], y: Sequence[float], top: float = 1.0) -> list[Spot]:
        """Where values lie on the page; `top` is the largest y that fits."""
        return [
            (self.x + a * self.width, self.y - b / top * self.height)
            for a, b in zip(x, y, strict=True)
        ]


@dataclass
class Drawing:
    """Boxes, arrows and labels, later ones above earlier ones."""

    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def rect(self, look: str, x: int, y: int, w: int, h: int, corner: int = 6) -> None:
        place = f'x="{x}" y="{y}" width="{w}" height="{h}" rx="{corner}"'
        self.parts.append(f'<rect class="{look}" {place}/>')

    def label(self, x: int, y: int, text: str, look: str = "note", anchor: str = "start") -> None:
        """One or more lines of text."""
        place = f'x="{x}"' if anchor == "start" else f'x="{x}" text-anchor="{anchor}"'
        for i, line in enumerate(text.split("\n")):
            self.parts.append(f'<text class="{look}" {place} y="{y + 18 * i}">{line}</text>')

    def box(self, kind: str, x: int, y: int, w: int, h: int, text: str) -> None:
        """A box with its middle at x and its top at y; in it a name and, after `/`, a note."""
        self.rect(f"box {kind}", x - w // 2, y, w, h)
        name, _, note = text.partition("/")
        self.label(x, y + h // 2 + (-2 if note else 6), name, "name", "middle")
        if note:
            self.label(x, y + h // 2 + 15, note, anchor="middle")

    def arrow(self, kind: str, *points: Point) -> None:
        """A line along the points, horizontal or vertical everywhere, with round corners."""
        path, end = "M{} {}".format(*points[0]), points[-1]
        for before, corner, after in zip(points, points[1:], points[2:], strict=False):
            bend = *towards(corner, before, 7), *corner, *towards(corner, after, 7)
            path += "L{} {}Q{} {} {} {}".format(*bend)
        (x, y), (back_x, back_y) = end, towards(end, points[-2], 10)
        path += "L{} {}".format(*towards(end, points[-2], 8))
        self.parts.append(f'<path class="line {kind}" d="{path}"/>')
        dx, dy = (back_y - y) // 2, (back_x - x) // 2
        tip = f"M{x} {y}L{back_x + dx} {back_y + dy}L{back_x - dx} {back_y - dy}Z"
        self.parts.append(f'<path class="{kind.split()[0]} solid" d="{tip}"/>')

    def sign(self, kind: str, x: int, y: int, sign: str) -> None:
        """A circle with a plus or, turned by 45 degrees, a times sign."""
        turned = f' transform="rotate(45 {x} {y})"' if sign == "×" else ""
        self.parts.append(
            f'<circle class="box {kind}" cx="{x}" cy="{y}" r="10"/>'
            f'<path class="line {kind.split()[0]}"{turned} d="M{x - 6} {y}h12M{x} {y - 6}v12"/>'
        )

    def lane(self, kind: str, x: int, width: int, *steps: str) -> None:
        """Boxes below each other with arrows between them. A step is "top+height text"; a sign in
        place of a text makes a circle; no text leaves room for something else."""
        bottom = 0
        for step in steps:
            place, _, text = step.partition(" ")
            top, height = map(int, f"{place}+0".split("+")[:2])
            if bottom:
                self.arrow(kind, (x, bottom), (x, top))
            if text in ("+", "×"):
                self.sign(kind, x, top + height // 2, text)
            elif text:
                self.box(kind, x, top, width, height, text)
            bottom = top + height

    def pair(self, x: int, y: int, lines: list[str], gap: int = 15) -> None:
        """Something of the small and of the large model."""
        for i, (look, line) in enumerate(zip(("small", "large"), lines, strict=True)):
            self.label(x, y + gap * i, line, look)

    def sizes(self, x: int, y: int, key: str, symbol: str = "") -> None:
        """What goes along an arrow: its name, and its shape in both models."""
        if symbol:
            self.label(x, y - 16, symbol, "symbol")
        self.pair(x, y, [written(sizes[key]) for _, sizes in MODELS])

    def legend(self, x: int, y: int) -> None:
        """How the two models are written."""
        names = [f"{config.name}, {written(sizes['image'])}" for config, sizes in MODELS]
        self.pair(x, y, names, 18)

    def curve(self, look: str, points: Iterable[Spot]) -> None:
        """A line through points that were computed."""
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path class="line {look}" d="M{path}"/>')

    def dots(self, look: str, points: Iterable[Spot], size: float = 4) -> None:
        """Round dots, all in one path."""
        path = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
        self.parts.append(f'<path class="dots {look}" stroke-width="{size:g}" d="{path}"/>')

    def ring(self, kind: str, x: float, y: float, radius: float = 5) -> None:
        self.parts.append(f'<circle class="box {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}"/>')

    def vector(self, look: str, start: Spot, end: Spot) -> None:
        """An arrow in any direction."""
        length = math.dist(start, end)
        along = [(b - a) / length for a, b in zip(start, end, strict=True)]
        back = [b - 10 * u for b, u in zip(end, along, strict=True)]
        side = (-4.5 * along[1], 4.5 * along[0])
        self.curve(look, [start, (back[0] + 2 * along[0], back[1] + 2 * along[1])])
        tip = [end, (back[0] + side[0], back[1] + side[1]), (back[0] - side[0], back[1] - side[1])]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in tip)
        self.parts.append(f'<path class="{look.split()[0]} solid" d="M{path}Z"/>')

    def axes(self, x: int, y: int, side: Point, names: tuple[str, str]) -> "Axes":
        """A frame from 0 to 1 along the bottom, its lower left corner at x, y."""
        width, height = side
        self.parts.append(f'<path class="line noise thin" d="M{x} {y - height}V{y}H{x + width}"/>')
        for value in (0, 1):
            self.label(x + value * width, y + 16, str(value), "note", "middle")
        self.label(x + width // 2, y + 16, names[0], "symbol", "middle")
        self.label(x, y - height - 8, names[1], "symbol", "start")
        return Axes(x, y, width, height)

    def svg(self, title: str, description: str, style: str = "") -> str:
        w, h = self.width, self.height
        head = f'xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}"'
        return (
            f'<svg {head} role="img" aria-labelledby="title desc">\n'
            f'<title id="title">{title}</title>\n<desc id="desc">{description}</desc>\n'
            f"<style>\n{LINES}{colours(dark=False)}"
            f"@media(prefers-color-scheme:dark){{\n{colours(dark=True)}}}\n{style}</style>\n"
            f'<rect class="paper" x=".5" y=".5" width="{w - 1}" height="{h - 1}" rx="10"/>\n'
            + "\n".join([*self.parts, "</svg>\n"])
        )
