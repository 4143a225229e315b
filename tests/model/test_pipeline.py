"""What a pipeline can be asked: sizes, pictures to start from, repainting, guidance, memory."""

import numpy as np
import pytest
import torch
from PIL import Image

from nanosd3 import generate, weights
from nanosd3.errors import InputError
from nanosd3.flow import schedule
from nanosd3.samplers import SAMPLERS, inpainting

SMALL = {"height": 64, "width": 96, "steps": 12, "guidance": 3.0}
PHOTO = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
MASK = np.zeros((64, 96), bool)
MASK[8:40, 16:56] = True


@pytest.fixture(scope="module")
def pipeline(official_file):
    return weights.load(official_file, staged=False)


@pytest.fixture(scope="module")
def plain(pipeline):
    return pipeline("a cat", output="latent", **SMALL)


@pytest.mark.parametrize(
    "change",
    [
        {"negative": "dull"},
        {"steps": 13},
        {"guidance": 4.0},
        {"shift": 2.0},
        {"sampler": "heun"},
        {"seed": 1},
        {"t5_length": 77},
        {"drop": ["clip_l"]},
        {"drop": ["t5"]},
        {"skip_layers": [0]},
        {"skip_layers": [1]},
        {"noise": torch.zeros(1, 16, 8, 12)},
        {"image": PHOTO},
        {"image": PHOTO, "mask": MASK},
    ],
    ids=lambda change: "-".join(f"{k}" for k in change),
)
def test_every_option_changes_the_image(pipeline, plain, change):
    latents = pipeline("a cat", output="latent", **SMALL | change)
    assert (latents - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"skip_layers": [0]}, {"skip_layers": [0], "skip_scale": 5.0}),
        ({"image": PHOTO}, {"image": PHOTO, "strength": 0.9}),
        ({"image": PHOTO}, {"image": PHOTO[::-1].copy()}),
        ({"image": PHOTO, "mask": MASK}, {"image": PHOTO, "mask": ~MASK}),
        ({"image": PHOTO, "mask": MASK}, {"image": PHOTO, "mask": MASK, "strength": 0.5}),
    ],
)
def test_options_of_options_change_the_image(pipeline, first, second):
    a, b = (pipeline("a cat", output="latent", **SMALL | change) for change in (first, second))
    assert (a - b).abs().max() > 1e-3


def test_defaults_are_what_they_say(pipeline):
    """Image to image at 0.6, with a mask at 1; noise from the seed; the config's T5 length."""
    same = {
        "strength": ({"image": PHOTO}, {"image": PHOTO, "strength": 0.6}),
        "mask": ({"image": PHOTO, "mask": MASK}, {"image": PHOTO, "mask": MASK, "strength": 1.0}),
        "noise": ({}, {"noise": pipeline.noise(1, 0, (8, 12))}),
        "t5": ({}, {"t5_length": 256}),
        "seed": ({}, {"seed": 0}),
    }
    for a, b in same.values():
        latents = (pipeline("a cat", output="latent", **SMALL | change) for change in (a, b))
        assert torch.equal(*latents)


def test_sizes(pipeline):
    for height, width in ((64, 64), (16, 192), (192, 32)):
        images = pipeline("a cat", height=height, width=width, steps=1)
        assert images.shape == (1, height, width, 3) and images.dtype == np.uint8


def test_a_picture_sets_the_size(pipeline):
    assert pipeline("a cat", image=PHOTO, steps=2).shape == (1, 64, 96, 3)
    assert pipeline(["a", "b"], image=np.stack([PHOTO] * 2), steps=2).shape == (2, 64, 96, 3)
    from_pillow = pipeline("a cat", image=Image.fromarray(PHOTO), steps=2)
    assert np.array_equal(from_pillow, pipeline("a cat", image=PHOTO, steps=2))


def test_one_step_of_a_picture_keeps_it(pipeline):
    """At little strength the latents stay near those of the picture, at more they leave."""
    with torch.no_grad():
        x0 = pipeline.encode(torch.from_numpy(PHOTO)[None].permute(0, 3, 1, 2) / 127.5 - 1)
    distances = [
        (pipeline("a cat", image=PHOTO, strength=s, output="latent", steps=20) - x0).abs().mean()
        for s in (0.05, 0.3, 0.8)
    ]
    assert distances[0] < distances[1] < distances[2]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_outside_the_mask_nothing_changes(pipeline, sampler):
    """The known part ends exactly at the picture's latents, whatever the solver."""
    latents = pipeline(
        "a cat", image=PHOTO, mask=MASK, sampler=sampler, output="latent", steps=5, guidance=3.0
    )
    with torch.no_grad():
        x0 = pipeline.encode(torch.from_numpy(PHOTO)[None].permute(0, 3, 1, 2) / 127.5 - 1)
    inside = torch.from_numpy(MASK).view(8, 8, 12, 8).any(3).any(1)
    torch.testing.assert_close(latents[..., ~inside], x0[..., ~inside], atol=2e-5, rtol=0)
    assert (latents - x0)[..., inside].abs().mean() > 0.1


def test_the_known_part_is_right_at_every_step():
    """Not only at the end: what the network sees around the mask is the noised picture at t."""
    x0, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 2:] = 1

    def model(z, t):
        torch.testing.assert_close(z[..., :2], ((1 - t) * x0 + t * noise)[..., :2])
        return torch.full_like(z, 7.0)

    for sampler in SAMPLERS.values():
        z = sampler(inpainting(model, mask, x0, noise), noise, schedule(6, 3.0))
        torch.testing.assert_close(z[..., 2:], noise[..., 2:] - 7.0, atol=1e-4, rtol=0)


def test_without_guidance_the_negative_prompt_is_not_encoded(pipeline, monkeypatch):
    asked = []
    original = type(pipeline.text).encode
    monkeypatch.setattr(
        type(pipeline.text), "encode", lambda self, p, *a: asked.append(p) or original(self, p, *a)
    )
    pipeline(["a cat", "a dog", "a cat"], **SMALL | {"steps": 1, "guidance": 1.0})
    pipeline(["a cat", "a dog", "a cat"], **SMALL | {"steps": 1})
    assert asked == [["a cat", "a dog"], ["a cat", "a dog", ""]]


def test_mnist_sizes_and_pictures(tiny_run):
    """The border that is added and cut off again stays out of the picture."""
    pipeline = weights.load(tiny_run)
    assert pipeline("7", height=28, width=36).shape == (1, 28, 36)
    digit = np.zeros((28, 28), np.uint8)
    digit[5:20, 12:16] = 255
    assert pipeline("7", image=digit, strength=0.5).shape == (1, 28, 28)
    mask = np.zeros((28, 28), bool)
    mask[:, 14:] = True
    latents = pipeline("7", image=digit, mask=mask, output="latent")
    whole = pipeline("7", image=digit, mask=~mask, output="latent")
    assert torch.allclose(latents[..., :3], pipeline_latents(pipeline, digit)[..., :3], atol=1e-5)
    assert torch.allclose(whole[..., 5:], pipeline_latents(pipeline, digit)[..., 5:], atol=1e-5)


def pipeline_latents(pipeline, digit: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return pipeline.encode(torch.from_numpy(digit)[None, None] / 127.5 - 1)


def test_generate_from_weights(official_file, tmp_path, capsys):
    """One prompt: the picture itself, of the size asked for; the report comes first."""
    common = ["--weights", str(official_file), "--height", "64", "--width", "96", "--steps", "12"]
    out = tmp_path / "cat.png"
    assert generate.main(["a cat", *common, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "unreleased size" in said and "sampled with 50 steps of dpmpp_2m" in said
    with Image.open(out) as image:
        assert image.size == (96, 64) and image.mode == "RGB"
        pixels = np.asarray(image)
    pipeline = weights.load(official_file)
    assert np.array_equal(pixels, pipeline("a cat", height=64, width=96, steps=12)[0])

    options = ["--negative", "dull", "--skip-layers", "0", "--skip-scale", "3", "--drop", "t5",
               "--t5-length", "77", "--dtype", "bfloat16", "--count", "2"]  # fmt: skip
    assert generate.main(["a cat", *common, *options, "--out", str(tmp_path / "two.png")]) == 0
    with Image.open(tmp_path / "two.png") as image:
        assert image.size[0] > 2 * 96


def test_generate_repaints(official_file, tmp_path):
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    Image.fromarray(MASK).save(tmp_path / "mask.png")
    out = tmp_path / "new.npy"
    assert generate.main(["a cat", "--weights", str(official_file), "--steps", "4", "--out",
                          str(out), "--init-image", str(tmp_path / "photo.png"), "--mask",
                          str(tmp_path / "mask.png"), "--strength", "0.75"]) == 0  # fmt: skip
    pipeline = weights.load(official_file)
    expected = pipeline("a cat", image=PHOTO, mask=MASK, strength=0.75, steps=4)
    assert np.array_equal(np.load(out), expected)


def test_report_alone(official_file, capsys, monkeypatch):
    monkeypatch.setattr("nanosd3.generate.open_pipeline", None)
    assert generate.main(["--weights", str(official_file), "--report"]) == 0
    assert "mmdit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (["a cat"], "PROMPT"),
        (["--steps", "4"], "--steps"),
        (["--skip-layers", "1"], "--skip-layers"),
        (["--out", "a.png"], "--out"),
        (["--drop", "t5"], "--drop"),
        (["--decoder", "d"], "--decoder"),
    ],
    ids=str,
)
def test_what_has_no_effect_on_a_report(official_file, option, name):
    with pytest.raises(InputError, match=f"^{name} has no effect with --report"):
        generate.main(["--model", str(official_file), "--report", *option])


def test_the_progress_bar_counts_steps(official_file, capsys):
    pipeline = weights.load(official_file)
    pipeline("a cat", height=64, width=96, steps=7, progress=True)
    assert "7/7" in capsys.readouterr().err
