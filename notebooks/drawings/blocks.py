"""What the transformer repeats: `joint_block.svg`, `last_block.svg` and `adaln_zero.svg`."""

from drawings.canvas import Drawing
from drawings.sizes import MODELS
from nanosd3.config import CONFIGS


def joint_block() -> str:
    """Both streams of a block, what modulates them, and the attention that joins them."""
    d = Drawing(520, 1170)
    d.rect("frame", 14, 435, 186, 457, 10)
    d.arrow("cond", (260, 120), (260, 752))
    d.lane("cond", 260, 124, "20+42 c (D)/conditioning", "80+42 SiLU, linear/6 D a stream")
    texts, edges = ("shift, scale", "gate") * 2, (70, 10) * 2
    for y, text, edge in zip((152, 504, 634, 752), texts, edges, strict=True):
        d.arrow("cond", (260, y), (114 + edge, y))
        d.arrow("cond", (260, y), (406 - edge, y))
        d.rect("box cond", 214, y - 13, 92, 26)
        d.label(260, y + 5, text, "ink", "middle")
    for kind, x, count in (("text", 44, "M"), ("image", 260, "N")):
        d.rect(f"box {kind}", x, 336, 216, 30, 0)
        d.label(x + 108, 356, f"q, k, v of {count} {kind} tokens", "ink", "middle")
    d.box("both", 260, 366, 432, 58, "joint attention/M + N tokens see each other in d heads of 64")
    draw_stream(d, "text", 114, 26, "y (M, D)")
    draw_stream(d, "image", 406, 494, "x (N, D)")
    d.label(29, 918, "dotted: missing in the last block; its text has no queries")
    draw_dual(d)
    for x, look, (config, s) in zip((24, 270), ("small", "large"), MODELS, strict=True):
        said = f"{config.name}\nd = {config.mmdit.depth}, D = {config.mmdit.width}\n"
        d.label(x, 1114, said + f"M = {s['y'][0]}, N = {s['x'][0]}", look)
    return d.svg(
        "A joint block of the MMDiT",
        "Text and image tokens, each with weights of their own, are modulated and projected to "
        "queries, keys and values for one joint attention; gated linear layers and MLPs follow, "
        "with residuals. Dashed: dual attention. Dotted: missing in the last block.",
    )


def draw_dual(d: Drawing) -> None:
    """The image's second attention, below, and the place where it is added."""
    first, *_, last = CONFIGS["sd3.5-medium"].mmdit.dual_attention
    d.label(29, 950, "dashed: dual attention", "name")
    d.label(246, 950, f"in sd3.5-medium, blocks {first} to {last}")
    d.arrow("image dashed", (336, 535), (396, 535))
    d.sign("image dashed", 406, 535, "+")
    d.box("image dashed", 94, 964, 140, 48, "modulate/x, by c as well")
    d.box("image dashed", 260, 964, 120, 48, "linear/to q, k, v")
    d.box("image dashed", 426, 964, 140, 48, "RMSNorm/of q and k")
    d.box("image dashed", 94, 1034, 140, 48, "attention/image alone")
    d.box("image dashed", 260, 1034, 120, 48, "linear, ×/with a gate")
    d.label(376, 1063, "to the dashed +")
    d.arrow("image dashed", (164, 988), (200, 988))
    d.arrow("image dashed", (320, 988), (356, 988))
    d.arrow("image dashed", (426, 1012), (426, 1023), (94, 1023), (94, 1034))
    d.arrow("image dashed", (164, 1058), (200, 1058))
    d.arrow("image dashed", (320, 1058), (366, 1058))


def draw_stream(d: Drawing, kind: str, x: int, skip: int, shape: str) -> None:
    """One modality's half of the block, around x; what is added again goes along `skip`."""
    modulate, tokens = "modulate/after a LayerNorm", f"{kind} tokens/{shape}"
    d.lane(kind, x, 140, f"20+48 {tokens}", f"128+48 {modulate}", "196+48 linear/to q, k, v",
           "264+48 RMSNorm/q and k, not in SD3", "336+88", "446+34 linear", "494+20 ×", "558+20 +",
           f"610+48 {modulate}", "678+48 MLP/D to 4 D to D", "742+20 ×", "782+20 +",
           f"832+48 {tokens}")  # fmt: skip
    near = x + 10 if skip > x else x - 10
    for top, bottom in ((94, 568), (593, 792)):
        d.arrow(kind, (x, top), (skip, top), (skip, bottom), (near, bottom))


def last_block() -> str:
    """What the text lacks in the last block, and what the attention is then."""
    d = Drawing(480, 846)
    d.legend(24, 32)
    d.label(456, 32, "the last block", "name", "end")
    d.lane("cond", 224, 80, "68+44 c (D)")
    d.arrow("cond", (224, 112), (224, 196), (178, 196))
    d.arrow("cond", (224, 112), (224, 196), (270, 196))
    for kind, x, made, normed in (("text", 103, "k, v", "k"), ("image", 345, "q, k, v", "q and k")):
        symbol, count = ("y", "M") if kind == "text" else ("x", "N")
        heard = "shift, scale" if kind == "text" else "shift, scale, gate"
        d.lane(kind, x, 150, f"66+48 {kind} tokens/{symbol} ({count}, D)",
               f"172+48 modulate/{heard}", f"244+48 linear/to {made}",
               f"316+48 RMSNorm/{normed}, not in SD3", "424")  # fmt: skip
        d.sizes(x + 8, 135, symbol)
        d.label(x + 8, 383, f"{made} (d, {count}, 64)", "symbol")
        d.sizes(x + 8, 400, f"heads_{symbol}")
    d.box("both", 224, 424, 392, 48, "attention/queries of image tokens only")
    d.lane("image", 345, 150, "424+48", "496+34 linear, ×, +", "554+48 MLP/as in every block",
           "626+48 image tokens/to the final layer")  # fmt: skip
    d.rect("frame", 28, 496, 150, 178, 8)
    d.label(103, 580, "nothing: no layer\nwould read it", "note", "middle")
    d.label(24, 706, "attention weights: queries down, keys across", "ink")
    draw_weights(d, 44, "other blocks", "weights", last=False)
    draw_weights(d, 272, "the last block", "weights_last", last=True)
    return d.svg(
        "The last joint block",
        "In the last block the text tokens give keys and values only: they have shift and scale, "
        "no queries, and after the attention nothing. The image tokens go on as in every block.",
    )


def draw_weights(d: Drawing, x: int, name: str, key: str, last: bool) -> None:
    """The four quadrants of the attention weights; the text's queries are missing in the last."""
    for row, queries in enumerate("MN"):
        d.label(x - 8, 763 + 50 * row, queries, "symbol", "end")
        d.label(x + 25 + 50 * row, 728, queries, "symbol", "middle")
        for column, kind in enumerate(("text", "image")):
            look = "frame" if last and row == 0 else f"box {kind}"
            d.rect(look, x + 50 * column, 734 + 50 * row, 50, 50, 0)
    d.label(x + 110, 752, name, "ink")
    d.sizes(x + 110, 774, key)


def adaln_zero() -> str:
    """One branch of a block and the final layer; the layers that start at zero are marked."""
    d = Drawing(480, 950)
    d.legend(24, 32)
    d.label(456, 32, "adaLN-Zero", "name", "end")
    d.rect("panel", 12, 704, 456, 234, 10)
    d.lane("cond", 104, 150, "66+48 c (D)/time + pooled text", "162+34 SiLU",
           "216+48 linear/D to 6 D", "336")  # fmt: skip
    d.sizes(112, 134, "c")
    d.label(112, 284, "modulation (6 D)", "symbol")
    d.sizes(112, 301, "modulation")
    d.arrow("cond", (104, 336), (104, 560))
    for y, name, start in ((352, "1 + scale", 1), (404, "shift", 0), (544, "gate", 0)):
        d.arrow("cond", (104, y), (335, y))
        d.box("cond", 104, y - 17, 110, 34, name)
        d.label(325, y - 8, f"starts at {start}", "note", "end")
    d.label(29, 584, "and three more for the\nother branch of the block")
    d.lane("image", 345, 150, "66+48 tokens/x (N, D) or y (M, D)", "216+48 LayerNorm/no weights",
           "342+20 ×", "394+20 +", "446+48 branch/attention or MLP", "534+20 ×", "586+20 +",
           "636+48 tokens/as they came, at first", "742+48 modulate/LayerNorm, ×, +",
           "814+48 linear/D to p·p·C", "924")  # fmt: skip
    d.arrow("image", (345, 182), (448, 182), (448, 596), (355, 596))
    d.label(353, 131, "x (N, D)", "symbol")
    d.sizes(353, 148, "x")
    d.label(29, 732, "final layer", "name")
    d.arrow("cond", (179, 766), (270, 766))
    d.box("cond", 104, 742, 150, 48, "SiLU, linear/D to 2 D")
    d.label(29, 814, "shift, scale (2 D)", "symbol")
    d.sizes(29, 831, "modulation_final")
    d.label(353, 884, "(N, p·p·C)", "symbol")
    d.sizes(353, 901, "patches")
    for x, y in ((179, 216), (179, 742), (420, 814), (39, 891)):
        d.ring("noise", x, y, 10)
        d.label(x, y + 6, "0", "name", "middle")
    d.label(56, 896, "weights zero at the start:\nthe first velocity is 0")
    return d.svg(
        "adaLN-Zero",
        "From time and pooled text a linear layer makes a shift, a scale and a gate for each "
        "branch of a block. It starts at zero, so the gates are closed and tokens pass "
        "unchanged; the final layer, which has shift and scale only, starts at zero as well.",
    )
