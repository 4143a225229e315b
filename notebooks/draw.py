"""The two drawings of the model: `python notebooks/draw.py`.

`model.svg` goes from the caption to the pixels, `joint_block.svg` opens one block. They are
written as text, without a library; sizes come from the configs, and tests compare them with the
modules. Two runs are the same byte for byte. Colours follow the reader's light or dark theme.
"""

import random
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from nanosd3.config import CONFIGS, Config  # noqa: E402

FOLDER = ROOT / "nanosd3" / "assets" / "pictures"
SOLVERS = {"euler": "Euler", "heun": "Heun", "dpmpp_2m": "DPM++ 2M"}
KINDS = {  # fill and stroke on a light page, then on a dark one
    "text": ("#fdf0d5", "#b45f06", "#3d2a0c", "#f0a441"),
    "image": ("#dfebfb", "#1f5fbf", "#12294a", "#6fa8f5"),
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
"""
Point = tuple[int, int]


def colours(dark: bool) -> str:
    """The part of the style sheet that differs between light and dark pages."""
    ink, faint, paper, panel = PAGES[dark]
    rules = f"text{{fill:{ink}}}.large,.note{{fill:{faint}}}.paper,.frame{{stroke:{faint}}}"
    rules += f".paper{{fill:{paper}}}.panel{{fill:{panel}}}\n"
    for kind, (*light, dark_fill, dark_stroke) in KINDS.items():
        fill, stroke = (dark_fill, dark_stroke) if dark else light
        rules += f".{kind}{{fill:{fill};stroke:{stroke}}}.{kind}.solid{{fill:{stroke}}}\n"
    return rules


def shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes, without the batch, of what a caption passes on its way to an image."""
    m, text, vae = config.mmdit, config.text, config.vae
    D, C, p = m.width, m.latent_channels, m.patch_size
    clip, M = text.clip_l.length, text.clip_l.length + text.t5.length
    side, pixels = config.image_size // vae.factor, config.image_size - 2 * config.padding
    N = (side // p) ** 2
    return {
        "clip_l": (clip, text.clip_l.width), "clip_g": (clip, text.clip_g.width),
        "t5": (text.t5.length, text.t5.width), "context": (M, m.context_dim), "y": (M, D),
        "pooled": (m.pooled_dim,), "c": (D,), "z": (C, side, side), "x": (N, D),
        "patches": (N, p * p * C), "image": (pixels, pixels),
        "decoded": (vae.image_channels, config.image_size, config.image_size),
    }  # fmt: skip


MODELS = [(config, shapes(config)) for config in (CONFIGS["mnist"], CONFIGS["sd3.5-large"])]


def towards(a: Point, b: Point, distance: int) -> Point:
    """The point at a distance from a on the level or upright way to b."""
    x, y = (p + distance * ((q > p) - (q < p)) for p, q in zip(a, b, strict=True))
    return x, y


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
        """A line along the points, level or upright everywhere, with round corners."""
        path, end = "M{} {}".format(*points[0]), points[-1]
        for before, corner, after in zip(points, points[1:], points[2:], strict=False):
            bend = *towards(corner, before, 7), *corner, *towards(corner, after, 7)
            path += "L{} {}Q{} {} {} {}".format(*bend)
        (x, y), (back_x, back_y) = end, towards(end, points[-2], 9)
        path += "L{} {}".format(*towards(end, points[-2], 7))
        self.parts.append(f'<path class="line {kind}" d="{path}"/>')
        dx, dy = (back_y - y) // 2, (back_x - x) // 2
        tip = f"M{x} {y}L{back_x + dx} {back_y + dy}L{back_x - dx} {back_y - dy}Z"
        self.parts.append(f'<path class="{kind.split()[0]} solid" d="{tip}"/>')

    def sign(self, kind: str, x: int, y: int, sign: str) -> None:
        """A circle with a plus, or turned by 45 degrees a times sign."""
        turned = f' transform="rotate(45 {x} {y})"' if sign == "×" else ""
        self.parts.append(
            f'<circle class="box {kind}" cx="{x}" cy="{y}" r="10"/>'
            f'<path class="line {kind.split()[0]}"{turned} d="M{x - 6} {y}h12M{x} {y - 6}v12"/>'
        )

    def lane(self, kind: str, x: int, width: int, *steps: str) -> None:
        """Boxes below each other with arrows between them. A step is "top+height text"; a sign for
        a text makes a circle, no text leaves the place to something else."""
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
        self.pair(x, y, [" × ".join(map(str, sizes[key])) for _, sizes in MODELS])

    def svg(self, title: str, description: str) -> str:
        w, h = self.width, self.height
        head = f'xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" viewBox="0 0 {w} {h}"'
        return (
            f'<svg {head} role="img" aria-labelledby="title desc">\n'
            f'<title id="title">{title}</title>\n<desc id="desc">{description}</desc>\n'
            f"<style>\n{LINES}{colours(dark=False)}"
            f"@media(prefers-color-scheme:dark){{\n{colours(dark=True)}}}\n</style>\n"
            f'<rect class="paper" x=".5" y=".5" width="{w - 1}" height="{h - 1}" rx="10"/>\n'
            + "\n".join([*self.parts, "</svg>\n"])
        )


def model() -> str:
    """From the caption to the pixels, with the shapes of the small model and of a large one."""
    d = Drawing(750, 946)
    d.rect("panel", 12, 352, 712, 366, 10)
    for y, kind in ((22, "text"), (46, "image"), (70, "cond")):
        d.rect(f"box {kind}", 470, y, 26, 16, 3)
        d.label(506, y + 13, "conditioning" if kind == "cond" else kind, "ink")
    d.label(470, 116, "shapes at the arrows:")
    d.pair(
        470, 136, [f"{config.name}, {s['image'][0]} × {s['image'][1]}" for config, s in MODELS], 18
    )
    d.box("paper", 205, 20, 362, 36, "caption: “a bold 3”")
    d.lane("text", 268, 236, "20+36", "78+34 byte-pair tokenizer")
    d.lane("text", 79, 110, "20+36", "78+34 unigram", "156+34 T5", "234+48", "374+34 linear", "474")
    d.lane("text", 205, 110, "78+34", "156+34 CLIP-L", "234+48")
    d.lane("text", 331, 110, "78+34", "156+34 CLIP-G", "234+48")
    for x, key in ((87, "t5"), (213, "clip_l"), (339, "clip_g")):
        d.pair(x, 130, [f"{sizes[key][0]} ids" for _, sizes in MODELS])
        d.sizes(x, 208, key)
    d.box("text", 205, 234, 362, 48, "join/CLIPs side by side, T5 behind them")
    d.sizes(87, 322, "context", "context (M, Dc)")
    d.sizes(276, 322, "pooled", "pooled (Dp)")
    d.box("paper", 440, 288, 110, 48, "time t/from 1 to 0")
    d.lane("cond", 268, 110, "234+48", "374+34 MLP")
    d.lane("cond", 440, 136, "288+48", "374+34 cos, sin, MLP")
    d.lane("image", 604, 160, "206+64", "374+34 patchify, linear", "474+68", "574+34 final layer",
           "668+34 unpatchify", "776")  # fmt: skip
    d.sizes(87, 443, "y", "y (M, D)")
    d.sizes(612, 443, "x", "x (N, D)")
    for behind in (12, 6, 0):
        d.rect("box both", 24 + behind, 474 + behind, 670, 56)
    d.label(184, 498, "d joint blocks", "name", "middle")
    d.label(184, 518, "of width D = 64 d, with d heads", anchor="middle")
    d.pair(504, 498, [f"d = {config.mmdit.depth}" for config, _ in MODELS], 18)
    for x, side in ((268, 344), (440, 364)):
        d.arrow("cond", (x, 408), (x, 428), (side, 428))
    d.arrow("cond", (354, 438), (354, 591), (524, 591))
    d.sign("cond", 354, 428, "+")
    d.label(346, 461, "c (D)", "symbol", "end")
    d.sizes(362, 453, "c")
    d.sizes(612, 642, "patches", "(N, p·p·C)")
    d.label(26, 584, "MMDiT", "name")
    d.label(26, 612, "M text tokens\nN image tokens, p × p latents each\nc modulates every block")
    draw_sampling(d)
    return d.svg(
        "Stable Diffusion 3, from caption to pixels",
        "Three text encoders turn the caption into a context and a pooled vector. Noise, cut into "
        "patches, goes with them through the MMDiT, whose velocity a sampler follows to latents; a "
        "decoder makes the image of them.",
    )


def draw_sampling(d: Drawing) -> None:
    """Noise, the loop through the network, and the way from latents to pixels."""
    (_, rows, columns), generator = MODELS[0][1]["z"], random.Random(0)
    for i in range(rows * columns):
        grey = f"{round(85 * sum(generator.random() for _ in range(3))):02x}" * 3
        place = f'x="{572 + i % columns * 8}" y="{206 + i // columns * 8}"'
        d.parts.append(f'<rect {place} width="8" height="8" fill="#{grey}"/>')
    d.label(560, 243, "noise", "name", "end")
    d.sizes(612, 330, "z", "z (C, h, w)")
    d.sizes(612, 749, "z", "velocity (C, h, w)")
    d.rect("box image", 12, 776, 708, 50)
    d.label(32, 807, "sampler", "name")
    d.pair(140, 796, [f"{s.steps} steps of {SOLVERS[s.sampler]}, guidance {s.guidance:g}"
                      for s in (config.sampling for config, _ in MODELS)], 18)  # fmt: skip
    d.label(708, 796, "the network runs twice, with\nthe prompt and without it", anchor="end")
    d.arrow("image", (720, 801), (736, 801), (736, 290), (606, 290))
    d.label(614, 283, "after each step")
    d.arrow("image", (79, 826), (79, 892), (250, 892))
    d.sizes(87, 862, "z", "latents (C, h, w)")
    d.box("image", 330, 870, 160, 44, "VAE decoder")
    d.arrow("image", (410, 892), (562, 892))
    d.sizes(424, 862, "decoded", "decoded image")
    d.rect("pixels", 562, 854, 76, 76, 4)
    d.parts.append('<path class="three" d="M583 876q30-11 30 5q0 9-19 11q21 1 20 12q-2 16-34 6"/>')
    d.sizes(646, 888, "image")
    d.label(424, 916, "mnist: border cut off")


def joint_block() -> str:
    """Both streams of a block, what modulates them, and the attention that joins them."""
    d = Drawing(730, 908)
    d.rect("frame", 20, 435, 216, 457, 10)
    d.arrow("cond", (300, 120), (300, 752))
    d.lane("cond", 300, 124, "20+42 c (D)/conditioning", "80+42 SiLU, linear/6 D a stream")
    texts, edges = ("shift, scale", "gate") * 2, (80, 10) * 2
    for y, text, edge in zip((152, 504, 634, 752), texts, edges, strict=True):
        d.arrow("cond", (300, y), (140 + edge, y))
        d.arrow("cond", (300, y), (460 - edge, y))
        d.rect("box cond", 254, y - 13, 92, 26)
        d.label(300, y + 5, text, "ink", "middle")
    for kind, x, count in (("text", 60, "M"), ("image", 300, "N")):
        d.rect(f"box {kind}", x, 336, 240, 30, 0)
        d.label(x + 120, 356, f"q, k, v of {count} {kind} tokens", "ink", "middle")
    d.box("both", 300, 366, 480, 58, "joint attention/M + N tokens see each other in d heads of 64")
    draw_stream(d, "text", 140, 36, "y (M, D)")
    draw_stream(d, "image", 460, 564, "x (N, D)")
    d.arrow("image dashed", (557, 94), (650, 94), (650, 128))
    d.lane("image dashed", 650, 124, "128+48 modulate/by c as well", "196+48 linear/to q, k, v",
           "264+48 RMSNorm/of q and k", "366+58 attention/image alone", "446+34 linear",
           "494+20 ×")  # fmt: skip
    d.arrow("image dashed", (650, 514), (650, 535), (470, 535))
    d.sign("image dashed", 460, 535, "+")
    first, *_, last = CONFIGS["sd3.5-medium"].mmdit.dual_attention
    d.label(650, 36, "dual attention", "name", "middle")
    d.label(650, 55, f"in sd3.5-medium,\nblocks {first} to {last}", anchor="middle")
    for top, look, (config, s) in zip((612, 682), ("small", "large"), MODELS, strict=True):
        said = f"{config.name}\nd = {config.mmdit.depth}, D = {config.mmdit.width}\n"
        d.label(582, top, said + f"M = {s['y'][0]}, N = {s['x'][0]}", look)
    d.label(582, 766, "dotted: missing in\nthe last block; text\nhas no queries there")
    return d.svg(
        "A joint block of the MMDiT",
        "Text and image tokens, each with weights of their own, are modulated and projected to "
        "queries, keys and values for one joint attention; gated linear layers and MLPs follow, "
        "with residuals. Dashed: dual attention. Dotted: missing in the last block.",
    )


def draw_stream(d: Drawing, kind: str, x: int, skip: int, shape: str) -> None:
    """One modality's half of the block, around x; what is added again goes along `skip`."""
    modulate, tokens = "modulate/after a LayerNorm", f"{kind} tokens/{shape}"
    d.lane(kind, x, 160, f"20+48 {tokens}", f"128+48 {modulate}", "196+48 linear/to q, k, v",
           "264+48 RMSNorm/q and k, not in SD3", "336+88", "446+34 linear", "494+20 ×", "558+20 +",
           f"610+48 {modulate}", "678+48 MLP/D to 4 D to D", "742+20 ×", "782+20 +",
           f"832+48 {tokens}")  # fmt: skip
    near = x + 10 if skip > x else x - 10
    for top, bottom in ((94, 568), (593, 792)):
        d.arrow(kind, (x, top), (skip, top), (skip, bottom), (near, bottom))


DRAWINGS = {"model.svg": model, "joint_block.svg": joint_block}


def main() -> None:
    for name, draw in DRAWINGS.items():
        (FOLDER / name).write_bytes(draw().encode())


if __name__ == "__main__":
    main()
