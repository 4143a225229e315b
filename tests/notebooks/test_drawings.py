"""The committed drawings match the script, agree with the modules, and are legible."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import matplotlib
import pytest
import torch
from PIL import ImageFont

from nanosd3.config import CONFIGS, Config
from nanosd3.layers import HEAD_DIM
from nanosd3.mmdit import MMDiT
from nanosd3.request import latent_size
from nanosd3.text import join_context, make_encoders
from nanosd3.vae import AutoencoderKL

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))

import draw

NAMES = ("model.svg", "joint_block.svg")
SIDES = {"mnist": (28, "small"), "sd3.5-large": (1024, "large")}  # pixels; how it is written
SVG = "{http://www.w3.org/2000/svg}"


def labels(name: str, look: str) -> list[str]:
    """The labels of one CSS class in a drawing."""
    return [e.text for e in ET.fromstring(draw.DRAWINGS[name]()).iter(f"{SVG}text")
            if e.get("class") == look]  # fmt: skip


def real_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """The shapes that the networks produce for one sample, on the meta device."""
    seen = {}
    with torch.device("meta"), torch.no_grad():
        mmdit, vae, text = (
            MMDiT(config.mmdit),
            AutoencoderKL(config.vae),
            make_encoders(config.text),
        )
        for key, module in {
            "x": mmdit.x_embedder, "y": mmdit.context_embedder, "c": mmdit.t_embedder,
            "patches": mmdit.final_layer,
        }.items():  # fmt: skip
            module.register_forward_hook(lambda _, __, out, key=key: seen.update({key: out}))
        ids = {name: torch.zeros(1, getattr(config.text, name).length).long() for name in text}
        (seen["clip_l"], pooled_l), (seen["clip_g"], pooled_g) = (
            text[name](ids[name]) for name in ("clip_l", "clip_g")
        )
        seen["t5"] = text["t5"](ids["t5"])
        seen["context"] = join_context(seen["clip_l"], seen["clip_g"], seen["t5"])
        seen["pooled"] = torch.cat([pooled_l, pooled_g], dim=1)
        z = torch.zeros(1, config.mmdit.latent_channels, *latent_size(config, None, None))
        every = range(config.mmdit.depth)
        seen["z"] = mmdit(z, torch.zeros(1), seen["context"], seen["pooled"], skip=every)
        seen["decoded"] = vae.decode(seen["z"])
        x, y = seen["x"], seen["y"]
        q, _, _ = mmdit.joint_blocks[0].x_block.attn.project(x)
        assert q.shape == (1, config.mmdit.depth, x.shape[1], HEAD_DIM)
        last = mmdit.joint_blocks[-1].context_block
        assert last.outputs == 2 and last.attn.project(y)[0] is None
        assert not hasattr(last, "mlp") and not hasattr(last.attn, "proj")
    return {key: tuple(tensor.shape[1:]) for key, tensor in seen.items()}


@pytest.mark.parametrize("name", NAMES)
def test_committed_drawings_are_those_of_the_script(name, tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "FOLDER", tmp_path)
    draw.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
    committed = Path(__file__).parents[2] / "nanosd3" / "assets" / "pictures" / name
    assert committed.read_bytes() == (tmp_path / name).read_bytes(), "run python notebooks/draw.py"
    assert len(committed.read_bytes()) < 40_000


@pytest.mark.parametrize("name", NAMES)
def test_title_description_and_no_link(name):
    root = ET.fromstring(draw.DRAWINGS[name]())
    named = {e.get("id"): e.text for e in root if e.get("id")}
    assert root.tag == f"{SVG}svg" and all(named[i] for i in root.get("aria-labelledby").split())
    assert "href" not in draw.DRAWINGS[name]() and "url(" not in draw.DRAWINGS[name]()
    assert "prefers-color-scheme:dark" in root.find(f"{SVG}style").text


@pytest.mark.parametrize("name", SIDES)
def test_shapes_are_those_of_the_modules(name):
    """Every label about one of the two models, in the order of the script."""
    config, (pixels, look) = CONFIGS[name], SIDES[name]
    real = real_shapes(config) | {"image": (pixels, pixels)}
    assert draw.shapes(config) == real
    assert real["z"][1:] == latent_size(config, pixels, pixels)
    size = {key: " × ".join(map(str, shape)) for key, shape in real.items()}
    M, N, d, s = real["y"][0], real["x"][0], config.mmdit.depth, config.sampling
    encoders = [(f"{real[key][0]} ids", size[key]) for key in ("t5", "clip_l", "clip_g")]
    assert labels("model.svg", look) == [
        f"{name}, {pixels} × {pixels}",
        *(line for lines in encoders for line in lines),
        *(size[key] for key in ("context", "pooled", "y", "x")),
        f"d = {d}",
        *(size[key] for key in ("c", "patches", "z", "z")),
        f"{s.steps} steps of {draw.SOLVERS[s.sampler]}, guidance {s.guidance:g}",
        *(size[key] for key in ("z", "decoded", "image")),
    ]
    assert s.guidance != 1  # "the network runs twice"
    assert labels("joint_block.svg", look) == [name, f"d = {d}, D = {64 * d}", f"M = {M}, N = {N}"]


def test_symbols_stand_in_the_same_order():
    assert labels("model.svg", "symbol") == [
        "context (M, Dc)", "pooled (Dp)", "y (M, D)", "x (N, D)", "c (D)", "(N, p·p·C)",
        "z (C, h, w)", "velocity (C, h, w)", "latents (C, h, w)", "decoded image",
    ]  # fmt: skip


def test_dual_attention_is_where_the_drawing_says():
    blocks = CONFIGS["sd3.5-medium"].mmdit.dual_attention
    assert blocks == tuple(range(len(blocks)))
    assert f"blocks 0 to {len(blocks) - 1}" in labels("joint_block.svg", "note")
    assert all(config.mmdit.qk_norm != name.startswith("sd3-") for name, config in CONFIGS.items())


@pytest.mark.parametrize("name", NAMES)
def test_labels_do_not_overlap(name):
    """In a wide font (DejaVu), labels stay inside the page and their boxes, without overlap."""
    root = ET.fromstring(draw.DRAWINGS[name]())
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    taken: list[tuple[float, float, float, float]] = []
    for e in root.iter(f"{SVG}text"):
        look, x, y = e.get("class"), float(e.get("x")), float(e.get("y"))
        size = 16 if look == "name" else 13
        file = "DejaVuSans-Bold.ttf" if look in ("name", "small") else "DejaVuSans.ttf"
        width = ImageFont.truetype(fonts / file, size).getlength(e.text)
        left = x - width * {None: 0, "middle": 0.5, "end": 1}[e.get("text-anchor")]
        box = (left, y - 0.75 * size, left + width, y + 0.1 * size)
        assert box[0] >= 6 and box[2] <= float(root.get("width")) - 6, e.text
        for other in taken:
            apart = box[2] < other[0] or other[2] < box[0] or box[3] < other[1] or other[3] < box[1]
            assert apart, e.text
        taken.append(box)
        for rect in root.iter(f"{SVG}rect"):
            rx, ry, w, h = (float(rect.get(side)) for side in ("x", "y", "width", "height"))
            if rect.get("class", "").startswith("box") and ry <= y <= ry + h and rx <= x <= rx + w:
                assert rx <= box[0] and box[2] <= rx + w, e.text
