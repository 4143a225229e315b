"""What the transformer works on: the autoencoder (`vae.svg`), patches and positions
(`patches.svg`)."""

from drawings.canvas import Drawing
from drawings.sizes import MODELS, written
from nanosd3.config import Config

LEVELS = len(MODELS[1][0].vae.channels)  # of the larger autoencoder


def autoencoder() -> str:
    """Down on the left, up on the right; between them what both sides have at each level."""
    d = Drawing(480, 866)
    d.legend(24, 32)
    d.label(456, 32, "autoencoder", "name", "end")
    for x, name, more in ((94, "encoder", 0), (386, "decoder", 1)):
        counts = [config.vae.blocks + more for config, _ in MODELS]
        d.label(x, 86, name, "name", "middle")
        for i, (look, n) in enumerate(zip(("small", "large"), counts, strict=True)):
            d.label(x, 106 + 16 * i, f"{n} block{'s' * (n > 1)} a level", look, "middle")
    top, pitch = 138, 72
    middle = top + pitch * (LEVELS + 1)
    d.rect("frame", 12, middle - pitch - 5, 456, 56, 8)
    for row in range(LEVELS + 1):
        y = top + pitch * row
        draw_level(d, row, y)
        d.arrow("image", (94, y + 46), (94, y + pitch))
        d.arrow("image", (386, y + pitch), (386, y + 46))
        if 0 < row < LEVELS:
            d.label(102, y + 63, "halve")
            d.label(378, y + 63, "double", anchor="end")
    for x in (94, 386):
        d.box("image", x, middle, 164, 48, "middle/block, attention, block")
    draw_latents(d, middle + 48)
    return d.svg(
        "The autoencoder",
        "The encoder halves the image level by level and ends in a mean and a log-variance for "
        "each latent. A latent drawn from that Gaussian is normalised for the flow; the "
        "decoder undoes that and doubles the size level by level.",
    )


def draw_level(d: Drawing, row: int, y: int) -> None:
    """The image or a level, on both sides; only the larger model has the deepest."""
    key, look = (f"level_{row - 1}", "image") if row else ("padded", "paper")
    for x in (94, 386):
        d.box(look, x, y, 140 - 12 * row, 46, f"level {row - 1}" if row else "image")
    for i, (written_as, (_, sizes)) in enumerate(zip(("small", "large"), MODELS, strict=True)):
        shape = written(sizes[key]) if key in sizes else "no such level"
        d.label(240, y + 20 + 17 * i, shape, written_as, "middle")


def draw_latents(d: Drawing, top: int) -> None:
    """The Gaussian, the draw from it, and what the flow works on."""
    d.arrow("image", (94, top), (94, top + 48))
    d.label(102, top + 20, "moments (2 C, h, w)", "symbol")
    d.sizes(250, top + 20, "moments")
    d.lane("image", 94, 164, f"{top + 48}+48 mean, logvar/of every latent",
           f"{top + 120}+48 sample/mean + std · noise",
           f"{top + 192}+48 normalise/(z − shift) · scale")  # fmt: skip
    d.box("noise", 240, top + 124, 84, 40, "noise")
    d.arrow("noise", (198, top + 144), (176, top + 144))
    d.arrow("image", (176, top + 216), (304, top + 216))
    d.label(240, top + 206, "x0 (C, h, w)", "symbol", "middle")
    for i, (look, (_, sizes)) in enumerate(zip(("small", "large"), MODELS, strict=True)):
        d.label(240, top + 236 + 16 * i, written(sizes["z"]), look, "middle")
    d.box("image", 386, top + 192, 164, 48, "denormalise/x0 / scale + shift")
    d.arrow("image", (386, top + 192), (386, top))
    d.label(378, top + 60, "the flow works\non x0", anchor="end")
    vae = MODELS[1][0].vae
    d.pair(24, top + 272, ["shift and scale measured after training",
                           f"shift {vae.shift}, scale {vae.scale}"], 17)  # fmt: skip


CELL, CHOSEN = 20, 6  # how large one latent is drawn; the patch that is opened


def patches() -> str:
    """Latents to tokens and back, and where the tokens stand."""
    d = Drawing(480, 806)
    d.legend(24, 32)
    d.label(456, 32, "patches and positions", "name", "end")
    draw_cut(d, 24, 88)
    draw_token(d, 226, 88)
    d.lane("image", 104, 160, "286+48 latents/z (C, h, w)", "384+34 patchify", "468+34 linear",
           "526+20 +", "570+48 tokens/x (N, D)")  # fmt: skip
    d.lane("image", 346, 160, "286+48 velocity/(C, h, w)")
    d.arrow("image", (346, 384), (346, 334))
    d.arrow("image", (346, 468), (346, 418))
    d.arrow("image", (346, 570), (346, 502))
    d.box("image", 346, 384, 160, 34, "unpatchify")
    d.box("image", 346, 468, 160, 34, "final layer")
    d.box("image", 346, 570, 160, 48, "tokens/after d blocks")
    d.box("paper", 222, 519, 96, 34, "positions")
    d.arrow("image", (174, 536), (114, 536))
    d.arrow("image", (184, 594), (266, 594))
    for x in (112, 354):
        d.sizes(x, 352, "z")
        d.sizes(x, 436, "patches")
    d.sizes(24, 636, "x")
    draw_positions(d, 656)
    return d.svg(
        "Patches and positions",
        "Latents are cut into patches of 2 × 2, numbered row by row; each becomes a token of its "
        "numbers in the order row, column, channel. Fixed positions are added; at the end tokens "
        "are put back together. The positions are the middle of a larger grid.",
    )


def draw_cut(d: Drawing, x: int, y: int) -> None:
    """The latents with their patches numbered."""
    config, sizes = MODELS[0]
    p, (channels, side, _) = config.mmdit.patch_size, sizes["z"]
    end, step = side * CELL, p * CELL
    for behind in range(channels - 1, -1, -1):
        d.rect("box image", x + 5 * behind, y - 5 * behind, end, end, 0)
    for i in range(1, side):
        look = "image" if i % p == 0 else "image thin pale"
        d.curve(look, [(x + i * CELL, y), (x + i * CELL, y + end)])
        d.curve(look, [(x, y + i * CELL), (x + end, y + i * CELL)])
    for n in range(sizes["x"][0]):
        row, column = divmod(n, side // p)
        if n == CHOSEN:
            square = [(0, 0), (step, 0), (step, step), (0, step), (0, -1.3)]
            corner = x + column * step, y + row * step
            d.curve("image thickest", [(corner[0] + a, corner[1] + b) for a, b in square])
        d.label(x + column * step + CELL // 2, y + row * step + 15, str(n), "ink", "middle")
    d.label(x, y + end + 22, "N patches, row by row")


def draw_token(d: Drawing, x: int, y: int) -> None:
    """One patch, opened, and the token that is made of it."""
    config, big = MODELS[0][0], 44
    p, channels = config.mmdit.patch_size, config.mmdit.latent_channels
    d.label(x, y - 6, f"patch {CHOSEN}, C numbers in each place", "note")
    narrow = 232 // (p * p * channels)
    for n in range(p * p):
        row, column = divmod(n, p)
        left = x + n * (narrow * channels + 2)
        for place, top, width, height in (
            ((x + 64 + column * big), y + 8 + row * big, big, big),
            (left, y + 132, narrow * channels, 28),
        ):
            d.rect("box image", place, top, width, height, 0)
            d.label(place + width // 2, top + height // 2 + 5, f"{row}, {column}", "ink", "middle")
        for i in range(1, channels):
            d.curve("image thin pale", [(left + i * narrow, y + 132), (left + i * narrow, y + 160)])
    d.label(x, y + 122, "its token: row, column, then channel")
    d.label(x, y + 182, "p·p·C", "symbol")
    for i, (look, (_, s)) in enumerate(zip(("small", "large"), MODELS, strict=True)):
        d.label(x + 52 + 40 * i, y + 182, str(*s["patch"]), look)


def coordinate(config: Config, index: int) -> float:
    """Where a row or column of the position grid stands (patchify.sincos_positions)."""
    m = config.mmdit
    return (index - (m.grid - m.grid_sample) / 2) * m.grid_span / m.grid_sample


def draw_positions(d: Drawing, top: int) -> None:
    """The grid of each model and the middle that its images take, to scale."""
    side = 96
    for x, look, (config, sizes) in zip((24, 246), ("small", "large"), MODELS, strict=True):
        (grid, _), (crop, _) = sizes["grid"], sizes["crop"]
        inner = round(side * crop / grid)
        edge = (side - inner) // 2
        d.rect("box paper", x, top + 10, side, side, 0)
        d.rect("box image", x + edge, top + 10 + edge, inner, inner, 0)
        first = (grid - crop) // 2
        ends = [
            f"{coordinate(config, i):g}".replace("-", "−")
            for i in (0, grid - 1, first, first + crop - 1)
        ]
        d.label(x + side + 8, top + 24, f"grid {grid} × {grid}", look)
        d.label(x + side + 8, top + 41, f"{ends[0]} to {ends[1]}", look)
        d.label(x + side + 8, top + 70, f"image {crop} × {crop}", look)
        d.label(x + side + 8, top + 87, f"{ends[2]} to {ends[3]}", look)
    d.label(24, top + 132, "fixed grid and the middle of it that an image takes; coordinates")
