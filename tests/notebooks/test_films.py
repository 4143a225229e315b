"""Moving pictures: frames that differ and loop, a still, few bytes; and the attention in one of
them is the model's own."""

import base64
import io
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image, ImageColor

from nanosd3 import mmdit
from nanosd3.config import CONFIGS
from nanosd3.mmdit import JointBlock, MMDiT
from nanosd3.training.plot_style import MEANINGS

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))

import build
import execute
import films
import pages

FOLDER = Path(films.__file__).parent
FILMS = {"04_attention": 24, "05_training": 21}  # and how many frames they have


@pytest.fixture
def network() -> MMDiT:
    """Small, and with gates that are open."""
    torch.manual_seed(0)
    model = MMDiT(CONFIGS["mnist"].mmdit)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.requires_grad_(False)


def inputs(network: MMDiT) -> tuple[torch.Tensor, ...]:
    config = network.config
    z, context = torch.randn(2, 4, 8, 8), torch.randn(2, 17, config.context_dim)
    return z[:, : config.latent_channels], torch.rand(2), context, torch.randn(2, config.pooled_dim)


def test_the_attention_is_the_models_own(network, monkeypatch):
    """Weights times values are what each block attends to, and the velocity is the same."""
    given = inputs(network)
    attended, values = [], []
    attend, join = JointBlock.attend, mmdit.join_streams

    def attend_and_keep(block, *call):
        attended.append(attend(block, *call))
        return attended[-1]

    def join_and_keep(*streams):
        values.append(join(*streams)[2])
        return join(*streams)

    expected = network(*given)
    monkeypatch.setattr(JointBlock, "attend", attend_and_keep)
    monkeypatch.setattr(mmdit, "join_streams", join_and_keep)
    with films.attention_seen() as seen:
        assert torch.equal(network(*given), expected)
    network(*given)
    assert [w.shape for w in seen] == [(2, 2, 33, 33), (2, 2, 16, 33)]
    for w, v, (image, text) in zip(seen, values, attended, strict=False):
        out = (w @ v).transpose(1, 2).flatten(2)
        torch.testing.assert_close(out, torch.cat([text, image], dim=1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))


def test_other_weights_are_noticed(network, monkeypatch):
    scaled = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda q, k, v: scaled(2 * q, k, v),
    )
    with films.attention_seen(), pytest.raises(AssertionError, match="not close"):
        network(*inputs(network))


def shown(**changes) -> films.Film:
    """Two pictures, 8 x 8, at three moments."""
    frames = np.zeros((3, 2, 8, 8), np.uint8)
    frames[0, 0, 1, 2], frames[2, 1, 6, 6] = 255, 255
    film = films.Film(frames, ["left", "right"], ["t = 1", "t = 0.5", "t = 0"], None)
    return replace(film, **changes)


def opened(content: bytes) -> list[np.ndarray]:
    """The still, then the frames."""
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.format == "PNG" and picture.default_image and picture.info["loop"] == 0
        found = []
        for i in range(picture.n_frames):
            picture.seek(i)
            found.append(np.asarray(picture.convert("RGB")))
    return found


def test_a_film_has_all_frames_and_a_still():
    still, *frames = opened(films.animated_png(shown(), "caption"))
    assert len(frames) == 3
    for a, b in [(still, frames[0]), *pairwise(frames)]:
        assert (a != b).any()


def test_a_still_of_many_pictures_fills_the_page_with_later_moments():
    """Ten in a row, in pixels of no whole size; the first of six moments is left out."""
    frames = np.zeros((6, 10, 28, 28), np.uint8)
    frames[0] = 255
    film = films.Film(frames, list("0123456789"), [f"step {i}" for i in range(6)], None)
    page = films.draw_still(film, "caption")
    dark = (np.asarray(page.image)[:, films.LABEL :] == 0).all(-1)
    assert dark.mean(0)[-3 * films.GAP :].any()  # up to the right
    picture = (films.WIDTH - films.LABEL) // 10 - films.GAP
    assert dark.sum() == pytest.approx(5 * 10 * picture**2, rel=0.02)  # and letters


def test_pictures_are_as_bright_as_their_numbers():
    pixels = np.asarray(shown().picture(0, 0, 24))
    assert pixels.shape == (24, 24, 3)
    assert (pixels[3:6, 6:9] == 255).all() and pixels.sum() == 9 * 3 * 255


def test_a_patch_is_tinted_where_its_weight_is():
    """In the prompt's colour, by its share of the picture's largest weight."""
    weights = torch.zeros(3, 4)
    weights[1] = torch.tensor([0.0, 0.1, 0.2, 0.4])
    tint = films.stacked({"left": weights, "right": weights / 2})
    assert tint.shape == (3, 2, 2, 2) and np.allclose(tint[1, 0], [[0, 0.25], [0.5, 1]])
    assert np.allclose(tint[:, 0], tint[:, 1])  # each its own scale
    pixels = np.asarray(shown(tint=tint).picture(1, 0, 8)).astype(int)
    full = films.STRONGEST * np.array(ImageColor.getrgb(MEANINGS["prompt"]))
    for (row, column), share in {(0, 0): 0, (0, 4): 0.25, (4, 0): 0.5, (7, 7): 1}.items():
        assert np.abs(pixels[row, column] - share * full).max() <= 1


def test_every_moment_has_its_weights():
    """Two evaluations a step, say, give too many."""
    with pytest.raises(ValueError, match=r"\(6, 2\) moments and pictures, \(3, 2\) titles"):
        shown(tint=np.zeros((6, 2, 2, 2)))


def test_the_last_frame_is_held():
    with Image.open(io.BytesIO(films.animated_png(shown(), "caption"))) as picture:
        durations = []
        for i in range(1, 4):
            picture.seek(i)
            durations.append(picture.info["duration"])
    assert durations == [films.MILLISECONDS, films.MILLISECONDS, films.HOLD]


def test_tidying_leaves_it_moving():
    content = films.animated_png(shown(), "caption")
    assert execute.small_png(content) == content


@pytest.fixture
def page(tmp_path) -> str:
    """A page of the site with a film."""
    data = {"image/png": base64.b64encode(films.animated_png(shown(), "caption")).decode()}
    cell = new_code_cell("1")
    cell.outputs = [new_output("display_data", data, metadata={"image/png": {"alt": "Two & more"}})]
    path = tmp_path / "01_one.ipynb"
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 01 · One"), cell]), path)
    return pages.notebook_page(path).body


def test_the_site_has_the_still_beside_the_film(page):
    soup = BeautifulSoup(page, "html.parser")
    film, still = soup.select(".film img")
    assert film["class"] == ["moving"] and still["class"] == ["still"]
    assert [film["alt"], still["alt"]] == ["Two & more", "Still: Two & more"]
    contents = [base64.b64decode(image["src"].split(",")[1]) for image in (film, still)]
    with Image.open(io.BytesIO(contents[1])) as picture:
        assert not getattr(picture, "is_animated", False)
        seen, whole = np.asarray(picture.convert("RGB")), opened(contents[0])[0]
        assert (seen == whole[: len(seen)]).all() and (whole[len(seen) :] == 255).all()
    assert soup.select_one(".film input[type=checkbox]")
    css = pages.style()
    for query in ("@media (prefers-reduced-motion: reduce)", "@media print"):
        rules = css[css.index(query) :].split("\n}")[0]
        assert ".film .moving, .film label { display: none; }" in rules
        assert ".film .still { display: block; }" in rules


@pytest.mark.parametrize("name", FILMS)
def test_committed_films(name):
    """Each notebook has one, its frames differ, and it is small."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    if why := build.state(notebook):
        pytest.skip(why)
    found = []
    for content in execute.pictures(notebook).values():
        with Image.open(io.BytesIO(content)) as picture:
            if getattr(picture, "is_animated", False):
                found.append(content)
    (film,) = found
    assert len(film) < execute.PICTURE_LIMIT
    still, *frames = opened(film)
    assert len(frames) == FILMS[name]
    assert all((a != b).mean() > 0.001 for a, b in pairwise(frames))
    assert all((still != frame).mean() > 0.01 for frame in frames)
