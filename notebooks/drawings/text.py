"""Three encoders, one context: `encoders.svg`."""

from drawings.canvas import Drawing
from drawings.sizes import MODELS
from nanosd3.config import Config

Shapes = dict[str, tuple[int, ...]]


def encoders() -> str:
    """The context of both models to scale, tokens down and features across, and the pooled text."""
    d = Drawing(480, 756)
    d.label(24, 34, "three encoders, one context", "name")
    d.label(24, 56, "tokens down, features across, both to scale")
    for (config, sizes), top, look in zip(MODELS, (72, 392), ("small", "large"), strict=True):
        draw_context(d, top, look, config, sizes)
    d.label(24, 718, "context: by a linear layer to the text tokens y (M, D)\n"
            "pooled: by an MLP, added to that of the time, to c (D)")  # fmt: skip
    return d.svg(
        "Three text encoders joined to one context",
        "CLIP-L's and CLIP-G's states lie side by side, filled up with zeros to T5's width; T5's "
        "tokens follow behind them. The pooled vectors of the two CLIPs are put side by side.",
    )


def draw_context(d: Drawing, top: int, look: str, config: Config, sizes: Shapes) -> None:
    """Rectangles in the proportions of the config."""
    (M, Dc), (clip, dl), (_, dg) = sizes["context"], sizes["clip_l"], sizes["clip_g"]
    left, width, height = 92, 364, 170
    edges = [left + round(width * x / Dc) for x in (0, dl, dl + dg, Dc)]
    middle = top + 54 + round(height * clip / M)
    bottom = top + 54 + height
    d.label(left, top + 20, config.name, "name")
    d.label(left, top + 42, "context (M, Dc)", "symbol")
    d.label(left + 112, top + 42, f"{M} × {Dc}", look)
    cells = (
        (0, "text", "CLIP-L", dl),
        (1, "text", "CLIP-G", dg),
        (2, "frame", "zeros", Dc - dl - dg),
    )
    for i, kind, name, features in cells:
        a, b = edges[i], edges[i + 1]
        d.rect(f"box {kind}", a, top + 54, b - a, middle - top - 54, 0)
        d.label((a + b) // 2, (top + 54 + middle) // 2 - 4, name, "ink", "middle")
        d.label((a + b) // 2, (top + 54 + middle) // 2 + 13, str(features), look, "middle")
    d.rect("box text", left, middle, width, bottom - middle, 0)
    d.label(left + width // 2, (middle + bottom) // 2 - 4, "T5", "ink", "middle")
    d.label(left + width // 2, (middle + bottom) // 2 + 13, str(Dc), look, "middle")
    for y, tokens in (((top + 54 + middle) // 2, clip), ((middle + bottom) // 2, M - clip)):
        d.label(left - 8, y - 4, "tokens", "note", "end")
        d.label(left - 8, y + 13, str(tokens), look, "end")
    pooled = bottom + 34
    d.rect("box cond", left, pooled, edges[1] - left, 30, 0)
    d.rect("box cond", edges[1], pooled, edges[2] - edges[1], 30, 0)
    d.label((left + edges[1]) // 2, pooled + 20, str(dl), look, "middle")
    d.label((edges[1] + edges[2]) // 2, pooled + 20, str(dg), look, "middle")
    d.label(edges[2] + 10, pooled + 13, "pooled (Dp)", "symbol")
    d.label(edges[2] + 10, pooled + 30, str(*sizes["pooled"]), look)
    d.label(left - 8, pooled + 20, "1 vector", "note", "end")
