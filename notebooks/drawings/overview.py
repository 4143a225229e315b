"""From the caption to the pixels: `model.svg`."""

import random

from drawings.canvas import Drawing
from drawings.sizes import MODELS, SOLVERS


def model() -> str:
    """From the caption to the pixels, with the shapes of the small model and of a large one."""
    d = Drawing(520, 1186)
    d.rect("panel", 12, 520, 472, 372, 10)
    for x, kind in ((24, "text"), (110, "image"), (210, "cond")):
        d.rect(f"box {kind}", x, 20, 26, 16, 3)
        d.label(x + 34, 33, "conditioning" if kind == "cond" else kind, "ink")
    d.label(24, 62, "shapes at the arrows:")
    d.legend(190, 62)
    d.box("paper", 205, 98, 362, 36, "caption: “a bold 3”")
    d.lane("text", 268, 236, "98+36", "156+34 byte-pair tokenizer")
    d.lane(
        "text", 79, 110, "98+36", "156+34 unigram", "234+34 T5", "312+48", "532+34 linear", "632"
    )
    d.lane("text", 205, 110, "156+34", "234+34 CLIP-L", "312+48")
    d.lane("text", 331, 110, "156+34", "234+34 CLIP-G", "312+48")
    for x, key in ((87, "t5"), (213, "clip_l"), (339, "clip_g")):
        d.pair(x, 208, [f"{sizes[key][0]} ids" for _, sizes in MODELS])
        d.sizes(x, 286, key)
    d.box("text", 205, 312, 362, 48, "join/CLIPs side by side, T5 behind them")
    d.sizes(87, 440, "context", "context (M, Dc)")
    d.sizes(213, 440, "pooled", "pooled (Dp)")
    d.box("paper", 455, 156, 96, 48, "time t/from 1 to 0")
    d.lane("cond", 455, 96, "156+48", "234+48 MLP/of cos, sin")
    d.lane("cond", 205, 96, "312+48", "532+34 MLP")
    draw_network(d)
    draw_sampling(d)
    return d.svg(
        "Stable Diffusion 3, from caption to pixels",
        "Three text encoders turn the caption into a context and a pooled vector. Noise, cut into "
        "patches, goes with them through the MMDiT, whose velocity a sampler follows to latents; a "
        "decoder makes the image of them.",
    )


def draw_network(d: Drawing) -> None:
    """The joint blocks, what goes into them, and what is made of their image tokens."""
    d.lane("image", 380, 150, "390+64", "532+34 patchify, linear", "632+68", "732+34 final layer",
           "826+34 unpatchify", "946")  # fmt: skip
    d.sizes(87, 601, "y", "y (M, D)")
    d.sizes(388, 601, "x", "x (N, D)")
    for behind in (12, 6, 0):
        d.rect("box both", 24 + behind, 632 + behind, 436, 56)
    d.label(36, 656, "d joint blocks", "name")
    d.label(36, 676, "D = 64 d wide, d heads")
    d.pair(388, 656, [f"d = {config.mmdit.depth}" for config, _ in MODELS], 18)
    d.arrow("cond", (205, 566), (205, 576))
    d.arrow("cond", (455, 282), (455, 376), (296, 376), (296, 586), (215, 586))
    d.arrow("cond", (205, 596), (205, 749), (305, 749))
    d.sign("cond", 205, 586, "+")
    d.label(250, 609, "c (D)", "symbol")
    d.sizes(213, 609, "c")
    d.sizes(388, 800, "patches", "(N, p·p·C)")
    d.label(26, 784, "MMDiT", "name")
    d.label(26, 806, "M text tokens\nN image tokens, p × p latents each\nc modulates every block")


def draw_sampling(d: Drawing) -> None:
    """Noise, the loop through the network, and the way from latents to pixels."""
    (_, rows, columns), generator = MODELS[0][1]["z"], random.Random(0)
    for i in range(rows * columns):
        grey = f"{round(85 * sum(generator.random() for _ in range(3))):02x}" * 3
        place = f'x="{348 + i % columns * 8}" y="{390 + i // columns * 8}"'
        d.parts.append(f'<rect {place} width="8" height="8" fill="#{grey}"/>')
    d.label(420, 416, "noise", "name")
    d.sizes(388, 500, "z", "z (C, h, w)")
    d.sizes(388, 912, "z", "velocity (C, h, w)")
    d.rect("box image", 12, 946, 472, 88)
    d.label(32, 973, "sampler", "name")
    d.pair(140, 972, [f"{s.steps} steps of {SOLVERS[s.sampler]}, guidance {s.guidance:g}"
                      for s in (config.sampling for config, _ in MODELS)], 18)  # fmt: skip
    d.label(32, 1018, "the network runs twice a step: with the prompt and without it")
    d.arrow("image", (484, 990), (506, 990), (506, 466), (382, 466))
    d.label(424, 460, "each step")
    d.arrow("image", (79, 1034), (79, 1104))
    d.sizes(87, 1070, "z", "latents (C, h, w)")
    d.box("image", 94, 1104, 140, 48, "VAE decoder")
    d.arrow("image", (164, 1128), (330, 1128))
    d.sizes(204, 1102, "padded", "decoded image")
    d.label(172, 1150, "mnist: border\nis cut off")
    d.rect("pixels", 330, 1090, 76, 76, 4)
    d.parts.append('<path class="three" d="M351 1112q30-11 30 5q0 9-19 11q21 1 20 12q-2 16-34 6"/>')
    d.sizes(414, 1124, "image")
