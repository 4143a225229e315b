"""MNIST: IDX files, pixels, measurements, captions."""

import gzip
import math

import pytest
import torch
from support.idx import idx, write_set

from nanosd3.data.class_names import DIGITS, FASHION, FASHION_FIRST_LABELS
from nanosd3.data.mnist import (
    MNIST_FOLDER,
    bins,
    describe,
    load_images,
    make_captions,
    measure_strokes,
    thirds,
    to_model,
    to_uint8,
)
from nanosd3.errors import InputError


def test_mnist_in_the_package():
    images = load_images()
    assert images.train_images.shape == (60000, 28, 28) and images.test_images.shape == (
        10000,
        28,
        28,
    )
    assert images.train_labels.bincount().tolist() == [
        5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949,
    ]  # fmt: skip
    assert images.test_labels.bincount().sum() == 10000 and images.names is DIGITS
    assert images.train_labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert images.train_images.float().mean().item() == pytest.approx(33.318, abs=1e-3)
    small = images.first(50, 7)
    assert len(small.train_images) == len(small.train_labels) == 50 and len(small.test_labels) == 7


@pytest.mark.parametrize("compress", [False, True])
def test_other_folders(tmp_path, compress):
    images = load_images(write_set(tmp_path / "set", compress=compress))
    assert images.train_images.shape == (30, 28, 28) and images.names is DIGITS
    assert load_images(write_set(tmp_path / "fashion-mnist")).names is FASHION
    real = [*FASHION_FIRST_LABELS, 1, 4, 6, 8]
    assert load_images(write_set(tmp_path / "other", train=14, labels=real)).names is FASHION
    (tmp_path / "set" / "classes.txt").write_text("\n".join(f"Thing{i}" for i in range(10)))
    assert load_images(tmp_path / "set").names[3] == ("thing3",)


def break_file(folder, name, change):
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:-5], "says 23520; copy it again"),
        (lambda b: b[:9], "truncated inside its header"),
        (lambda b: b"\0\0\x0d\3" + b[4:], "not an IDX file"),
        (lambda b: b"", "an empty file"),
        (lambda b: b"\x1f\x8b" + b[2:], "cannot be read"),
        (lambda b: gzip.compress(b)[:-20], "cannot be read"),
        (lambda b: idx(torch.zeros(29, 28, 28)), "29 images but 30 labels"),
        (lambda b: idx(torch.zeros(30, 28, 27)), "images are 28x27, expected 28x28"),
        (lambda b: idx(torch.zeros(0, 28, 28)), "holds no items"),
    ],
)
def test_bad_files(tmp_path, change, message):
    folder = write_set(tmp_path)
    break_file(folder, "train-images-idx3-ubyte", change)
    with pytest.raises(InputError, match=message) as error:
        load_images(folder)
    assert "train-images-idx3-ubyte" in str(error.value) and "\n" not in str(error.value)


def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_images(tmp_path / "nowhere")
    folder = write_set(tmp_path / "set")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match="no t10k-labels-idx1-ubyte"):
        load_images(folder)
    with pytest.raises(InputError, match="label 26, but only 10 class names"):
        load_images(write_set(tmp_path / "letters", labels=[1, 26, *range(10)]))
    for part in ("train", "test"):
        with pytest.raises(InputError, match="ubyte: holds one image, expected at least two"):
            load_images(write_set(tmp_path / part, **{part: 1}))
    with pytest.raises(InputError, match="no image of class 'zero'"):
        load_images(write_set(tmp_path / "few", labels=[1, 2, 3])).first(30, 20)
    with pytest.raises(InputError, match=r"no image of class 'three' .* among the first 6 "):
        load_images().first(6, 20)


def test_checksums(tmp_path, monkeypatch):
    for path in MNIST_FOLDER.glob("*.gz"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    break_file(tmp_path, "t10k-labels-idx1-ubyte.gz", lambda b: b[:9] + bytes([b[9] ^ 1]) + b[10:])
    monkeypatch.setattr("nanosd3.data.mnist.MNIST_FOLDER", tmp_path)
    with pytest.raises(InputError, match=r"t10k-labels-idx1-ubyte\.gz: checksum differs"):
        load_images()


# --- pixels and measurements ---------------------------------------------------------------------


def test_pixels_round_trip():
    images = load_images().train_images[:20]
    x = to_model(images, 32)
    assert x.shape == (20, 1, 32, 32) and x.min() == -1 and x.max() == 1
    assert (x[:, :, :2] == -1).all() and (x[:, :, :, 30:] == -1).all()
    assert torch.equal(to_uint8(x)[:, 2:-2, 2:-2], images)
    assert to_uint8(torch.full((1, 3, 2, 2), 7.0)).shape == (1, 2, 2, 3)


def bar(width: int, slope: float) -> torch.Tensor:
    """A stroke of the given width, leaning right by `slope` columns a row."""
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    distance = (columns - 13.5 + slope * (rows - 13.5)).abs()
    inside = (distance <= width / 2) & (rows > 4) & (rows < 23)
    return (inside * 255).to(torch.uint8)


def test_measures():
    strokes = torch.stack([bar(w, s) for w, s in ((2, 0), (4, 0), (2, 0.5), (2, -0.5))])
    weight, slant = measure_strokes(strokes)
    assert weight[1] / weight[0] == pytest.approx(2, rel=0.1)
    for got, expected in zip(slant.tolist(), (0, 0, 0.5, -0.5), strict=True):
        assert got == pytest.approx(expected, abs=0.03)
    assert all(
        math.isfinite(v) for m in measure_strokes(torch.zeros(1, 28, 28)) for v in m.tolist()
    )


def test_thirds():
    values = torch.cat([torch.arange(30.0), torch.arange(300.0, 330.0)])
    labels = torch.tensor([0] * 30 + [1] * 30)
    which = bins(values, labels, thirds(values, labels, 2))
    assert which.tolist() == ([0] * 10 + [1] * 10 + [2] * 10) * 2


# --- captions ------------------------------------------------------------------------------------


def test_pixels_are_rounded_once():
    """Of bfloat16 too, in which 127.5 times a number has too few digits for a pixel."""
    x = torch.linspace(-1, 1, 4096).view(1, 1, 64, 64).bfloat16()
    assert torch.equal(to_uint8(x), to_uint8(x.double()))


def test_captions():
    captions = make_captions(DIGITS)
    assert len(set(captions.texts)) == len(captions.texts)
    assert "an one" not in captions.texts
    for text in (
        "a one",
        "a handwritten seven",
        "the digit 7",
        "7",
        "an eight",
        "an 8",
        "a seven",
        "a bold seven leaning right",
        "an upright 4",
        "a thin upright handwritten nine",
    ):
        assert text in captions.texts
    assert describe("eight", "thin", "leaning left") == "a thin eight leaning left"


@pytest.mark.parametrize("names", [DIGITS, FASHION])
def test_captions_fit_their_image(names):
    captions = make_captions(names)
    n = 4000
    g = torch.Generator().manual_seed(0)
    labels, weight, slant = (torch.randint(k, (n,), generator=g) for k in (10, 3, 3))
    index = captions.draw(labels, weight, slant, torch.rand(n, generator=g))
    measured = 0
    for label, w, s, i in zip(*(x.tolist() for x in (labels, weight, slant, index)), strict=True):
        text = captions.texts[i]
        assert any(
            text.replace(" leaning", "|").split("|")[0].endswith(name) for name in names[label]
        )
        weights = [
            k for k, word in enumerate(("thin", "", "bold")) if word and word in text.split()
        ]
        slants = [k for k, word in enumerate(("left", "upright", "right")) if word in text.split()]
        assert weights in ([], [w]) and slants in ([], [s])
        measured += bool(weights or slants)
    assert measured / n == pytest.approx(0.5, abs=0.03)
