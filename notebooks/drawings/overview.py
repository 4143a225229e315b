"""From the caption to the pixels: `model.svg`."""

import random

from drawings.canvas import Drawing
from drawings.sizes import MODELS, SOLVERS


def model() -> str:
    """From the caption to the pixels, with the shapes of the small model and of a large one."""
    d = Drawing(750, 946)
    d.rect("panel", 12, 352, 712, 366, 10)
    for y, kind in ((22, "text"), (46, "image"), (70, "cond")):
        d.rect(f"box {kind}", 470, y, 26, 16, 3)
        d.label(506, y + 13, "conditioning" if kind == "cond" else kind, "ink")
    d.label(470, 116, "shapes at the arrows:")
    d.legend(470, 136)
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
    d.sizes(424, 862, "padded", "decoded image")
    d.rect("pixels", 562, 854, 76, 76, 4)
    d.parts.append('<path class="three" d="M583 876q30-11 30 5q0 9-19 11q21 1 20 12q-2 16-34 6"/>')
    d.sizes(646, 888, "image")
    d.label(424, 916, "mnist: border cut off")
