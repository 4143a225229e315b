"""The committed drawings match the script, agree with the modules, and are legible."""

import re
import sys
import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path

import pytest
import torch

from nanosd3.config import CONFIGS, Config
from nanosd3.layers import HEAD_DIM
from nanosd3.mmdit import JointBlock, MMDiT, join_streams
from nanosd3.patchify import centre_crop, patchify, sincos_positions
from nanosd3.request import latent_size
from nanosd3.text import join_context, make_encoders
from nanosd3.vae import AutoencoderKL

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))

import draw
from drawings.sizes import SOLVERS, shapes

ALL = draw.DRAWINGS | draw.MOVING
SIDES = {"mnist": (28, "small"), "sd3.5-large": (1024, "large")}  # pixels; how it is written
SVG = "{http://www.w3.org/2000/svg}"


@cache
def drawn(name: str) -> str:
    return ALL[name]()


def labels(name: str, look: str) -> list[str]:
    """The labels of one CSS class in a drawing."""
    return [e.text for e in ET.fromstring(drawn(name)).iter(f"{SVG}text") if e.get("class") == look]


Shapes = dict[str, tuple[int, ...]]


def text_shapes(config: Config) -> Shapes:
    """What the encoders produce for one sample, on the meta device."""
    with torch.device("meta"), torch.no_grad():
        encoders = make_encoders(config.text)
        ids = {name: torch.zeros(1, getattr(config.text, name).length).long() for name in encoders}
        (states, pooled_l), (g, pooled_g) = (encoders[n](ids[n]) for n in ("clip_l", "clip_g"))
        t5 = encoders["t5"](ids["t5"])
        seen = {"clip_l": states, "clip_g": g, "t5": t5}
        seen["context"] = join_context(states, g, t5)
        seen |= {"pooled_l": pooled_l, "pooled_g": pooled_g}
        seen["pooled"] = torch.cat([pooled_l, pooled_g], dim=1)
    return {key: tuple(tensor.shape[1:]) for key, tensor in seen.items()}


def block_shapes(block: JointBlock, x: torch.Tensor, y: torch.Tensor) -> tuple[Shapes, object]:
    """Heads and attention weights of a block, and the text's queries."""
    text, image = block.context_block.attn.project(y), block.x_block.attn.project(x)
    q, k, _ = join_streams(text, image)
    return {"heads_y": tuple(text[1].shape[1:]), "heads_x": tuple(image[1].shape[1:]),
            "weights": tuple((q @ k.mT).shape[2:])}, text[0]  # fmt: skip


def transformer_shapes(config: Config, texts: Shapes) -> Shapes:
    """What the transformer produces, and what its first and its last block hold."""
    seen: dict[str, torch.Tensor] = {}
    with torch.device("meta"), torch.no_grad():
        mmdit = MMDiT(config.mmdit)
        for key, module in {
            "x": mmdit.x_embedder, "y": mmdit.context_embedder, "c": mmdit.t_embedder,
            "patches": mmdit.final_layer,
        }.items():  # fmt: skip
            module.register_forward_hook(lambda _, __, out, key=key: seen.update({key: out}))
        z = torch.zeros(1, config.mmdit.latent_channels, *latent_size(config, None, None))
        given = [torch.zeros(1, *texts[key]) for key in ("context", "pooled")]
        every = range(config.mmdit.depth)
        seen["z"] = mmdit(z, torch.zeros(1), *given, skip=every)
        x, y, c = seen["x"], seen["y"], seen["c"]
        first, last = mmdit.joint_blocks[0], mmdit.joint_blocks[-1]
        seen["modulation"] = first.x_block.adaLN_modulation(c)
        assert first.context_block.adaLN_modulation(c).shape == seen["modulation"].shape
        seen["modulation_y"] = last.context_block.adaLN_modulation(c)
        seen["modulation_final"] = mmdit.final_layer.adaLN_modulation(c)
        heads, _ = block_shapes(first, x, y)
        heads_last, queries = block_shapes(last, x, y)
        assert heads["heads_x"] == (config.mmdit.depth, x.shape[1], HEAD_DIM)
        assert queries is None and last.context_block.outputs == 2
        assert not hasattr(last.context_block, "mlp") and not hasattr(
            last.context_block.attn, "proj"
        )
    grid, rows = (round(n**0.5) for n in (mmdit.pos_embed.shape[1], x.shape[1]))
    return {key: tuple(tensor.shape[1:]) for key, tensor in seen.items()} | heads | {
        "weights_last": heads_last["weights"], "patch": tuple(seen["patches"].shape[2:]),
        "grid": (grid, grid), "crop": (rows, rows),
    }  # fmt: skip


def autoencoder_shapes(config: Config) -> Shapes:
    """What each level of the encoder and of the decoder makes: the same on both sides."""
    sides: tuple[Shapes, Shapes] = ({}, {})
    with torch.device("meta"), torch.no_grad():
        vae = AutoencoderKL(config.vae)
        for seen, levels in zip(sides, (vae.encoder.down, vae.decoder.up), strict=True):
            for i, level in enumerate(levels):
                level.block[-1].register_forward_hook(
                    lambda _, __, out, i=i, seen=seen: seen.update({f"level_{i}": out.shape[1:]})
                )
        side = config.image_size
        moments = vae.encoder(torch.zeros(1, config.vae.image_channels, side, side))
        image = vae.decode(moments.chunk(2, dim=1)[0])
    assert sides[0] == sides[1]
    return {key: tuple(shape) for key, shape in sides[0].items()} | {
        "moments": tuple(moments.shape[1:]), "padded": tuple(image.shape[1:]),
    }  # fmt: skip


@pytest.fixture(scope="module", params=SIDES)
def real(request) -> tuple[Config, str, Shapes]:
    """A config, how it is written, and the shapes that its networks produce."""
    config, (pixels, look) = CONFIGS[request.param], SIDES[request.param]
    texts = text_shapes(config)
    networks = texts | transformer_shapes(config, texts) | autoencoder_shapes(config)
    assert networks["z"][1:] == latent_size(config, pixels, pixels)
    return config, look, networks | {"image": (pixels, pixels)}


@pytest.mark.parametrize("name", ALL)
def test_committed_drawings_are_those_of_the_script(name):
    again = ALL[name]()
    assert again == drawn(name)
    committed = draw.FOLDER / name
    assert committed.read_bytes() == again.encode(), "run python notebooks/draw.py"
    assert len(again) < (200_000 if name in draw.MOVING else 40_000)


def test_the_script_writes_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "FOLDER", tmp_path)
    for some in ("DRAWINGS", "MOVING"):
        made = {name: lambda name=name: name for name in getattr(draw, some)}
        monkeypatch.setattr(draw, some, made)
    draw.main()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {n: n for n in ALL}


@pytest.mark.parametrize("name", ALL)
def test_title_description_and_no_link(name):
    root = ET.fromstring(drawn(name))
    named = {e.get("id"): e.text for e in root if e.get("id")}
    assert root.tag == f"{SVG}svg" and all(named[i] for i in root.get("aria-labelledby").split())
    assert re.findall(r"https?:|href|url\(|@import", drawn(name)) == ["http:"]  # the name space
    assert "prefers-color-scheme:dark" in root.find(f"{SVG}style").text


def test_shapes_are_those_of_the_modules(real):
    config, _, networks = real
    assert shapes(config) == networks


def test_labels_are_those_of_the_modules(real):
    """Every label about one of the two models, in the order of the script."""
    config, look, networks = real
    size = {key: " × ".join(map(str, shape)) for key, shape in networks.items()}
    M, N, d, s = networks["y"][0], networks["x"][0], config.mmdit.depth, config.sampling
    name, title = config.name, f"{config.name}, {size['image']}"
    encoders = [(f"{networks[key][0]} ids", size[key]) for key in ("t5", "clip_l", "clip_g")]
    assert labels("model.svg", look) == [
        title, *(line for lines in encoders for line in lines),
        *(size[key] for key in ("context", "pooled", "y", "x")), f"d = {d}",
        *(size[key] for key in ("c", "patches", "z", "z")),
        f"{s.steps} steps of {SOLVERS[s.sampler]}, guidance {s.guidance:g}",
        *(size[key] for key in ("z", "padded", "image")),
    ]  # fmt: skip
    assert s.guidance != 1  # "the network runs twice"
    assert labels("joint_block.svg", look) == [name, f"d = {d}, D = {64 * d}", f"M = {M}, N = {N}"]
    assert labels("last_block.svg", look) == [
        title, *(size[k] for k in ("y", "heads_y", "x", "heads_x", "weights", "weights_last"))
    ]  # fmt: skip
    assert labels("adaln_zero.svg", look) == [
        title, *(size[k] for k in ("c", "modulation", "x", "modulation_final", "patches"))
    ]  # fmt: skip
    assert labels("guidance.svg", look) == [title, size["z"], f"scale {s.guidance:g}"]


def test_autoencoder(real):
    config, look, networks = real
    vae = AutoencoderKL(config.vae)
    counts = [{len(level.block) for level in side} for side in (vae.encoder.down, vae.decoder.up)]
    said = [f"{n} block{'s' if n > 1 else ''} a level" for (n,) in counts]
    keys = ("padded", *(f"level_{i}" for i in range(4)), "moments", "z")
    sizes = [networks.get(key) for key in keys]
    *lines, note = labels("vae.svg", look)[1:]
    shown = [" × ".join(map(str, shape)) if shape else "no such level" for shape in sizes]
    assert lines == said + shown
    assert note == ("shift and scale measured after training" if config.training else
                    f"shift {config.vae.shift}, scale {config.vae.scale}")  # fmt: skip


def test_encoders(real):
    _, look, networks = real
    (clip, left), (_, g), (t5, width) = (networks[key] for key in ("clip_l", "clip_g", "t5"))
    states, pooled = torch.ones(1, clip, left), networks["pooled_l"] + networks["pooled_g"]
    context = join_context(states, torch.ones(1, clip, g), torch.ones(1, t5, width))
    zeros = int((context[0, 0] == 0).sum())
    M, Dc = networks["context"]
    assert labels("encoders.svg", look) == [
        f"{M} × {Dc}", *map(str, (left, g, zeros, width, clip, t5, *pooled, sum(pooled)))
    ]  # fmt: skip
    rects = list(ET.fromstring(drawn("encoders.svg")).iter(f"{SVG}rect"))[1:]
    cells = rects[:6] if look == "small" else rects[6:]
    full = float(cells[3].get("width"))
    for cell, features in zip(cells, (left, g, zeros, width, *pooled), strict=True):
        assert float(cell.get("width")) / full == pytest.approx(features / width, abs=0.005)
    heights = [float(cell.get("height")) for cell in cells]
    assert heights[0] / (heights[0] + heights[3]) == pytest.approx(clip / M, abs=0.005)


def test_patches_and_positions(real):
    """The coordinates are read off the model's own buffer, by its slowest hand."""
    config, look, networks = real
    m, size = config.mmdit, {key: " × ".join(map(str, s)) for key, s in networks.items()}
    buffer = sincos_positions(m.width, m.grid, m.grid_sample, m.grid_span)
    ends, quarter = [], m.width // 4
    for side, codes in (
        (m.grid, buffer),
        (networks["crop"][0], centre_crop(buffer, *networks["crop"])),
    ):
        rows = codes.view(side, side, 2, 2, quarter)[:, 0, 1, :, -1]  # (side, 2) of sine and cosine
        angles = torch.atan2(*rows.T) * 10000 ** ((quarter - 1) / quarter)
        ends.append(
            [f"{x:.2f}".rstrip("0").rstrip(".").replace("-", "−") for x in angles[[0, -1]].tolist()]
        )
    assert labels("patches.svg", look)[1:] == [
        size["patch"], *(size[key] for key in ("z", "patches") * 2), size["x"],
        f"grid {size['grid']}", " to ".join(ends[0]), f"image {size['crop']}", " to ".join(ends[1]),
    ]  # fmt: skip


def test_patch_six_is_where_the_drawing_says():
    """Its number, and the order of the numbers in its token, are patchify's."""
    z = torch.arange(64.0).view(1, 1, 8, 8)
    token = patchify(z, 2)[0, 6]
    assert token.tolist() == [20, 21, 28, 29]  # rows 2 and 3, columns 4 and 5
    places = [text for text in labels("patches.svg", "ink") if "," in text]
    assert places[::2] == places[1::2] == ["0, 0", "0, 1", "1, 0", "1, 1"]
    marked = re.search(r'thickest" d="M([\d.]+) ([\d.]+)', drawn("patches.svg"))
    assert [float(x) for x in marked.groups()] == [24 + 20 * 4, 88 + 20 * 2]


def test_what_starts_at_zero():
    mmdit = MMDiT(CONFIGS["tiny"].mmdit)
    zero = {name for name, p in mmdit.named_parameters() if p.ndim > 1 and not p.any()}
    made = {n for n, _ in mmdit.named_parameters() if n.endswith("adaLN_modulation.1.weight")}
    assert zero == made | {"final_layer.linear.weight"}
    marks = [text for text in labels("adaln_zero.svg", "name") if text == "0"]
    assert len(marks) == 3 + 1  # linear, SiLU and linear, linear; and what the mark means


def test_symbols_stand_in_the_same_order():
    assert labels("model.svg", "symbol") == [
        "context (M, Dc)", "pooled (Dp)", "y (M, D)", "x (N, D)", "c (D)", "(N, p·p·C)",
        "z (C, h, w)", "velocity (C, h, w)", "latents (C, h, w)", "decoded image",
    ]  # fmt: skip


def test_dual_attention_is_where_the_drawing_says():
    blocks = CONFIGS["sd3.5-medium"].mmdit.dual_attention
    assert blocks == tuple(range(len(blocks)))
    assert f"in sd3.5-medium, blocks 0 to {len(blocks) - 1}" in labels("joint_block.svg", "note")
    assert all(config.mmdit.qk_norm != name.startswith("sd3-") for name, config in CONFIGS.items())
