"""Every image format: read as Pillow reads it, or refused by name."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanosd3.data.formats import SUFFIXES, UNREAD_SUFFIXES
from nanosd3.data.image_folder import read_folder
from nanosd3.data.pictures import read_image
from nanosd3.errors import InputError

NOISE = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
LOSSLESS = {
    "jp2": ("JPEG2000", {}),
    "j2k": ("JPEG2000", {"no_jp2": True}),
    "tga": ("TGA", {}),
    "ppm": ("PPM", {}),
    "pnm": ("PPM", {}),
    "dib": ("DIB", {}),
    "apng": ("PNG", {}),
    "ico": ("ICO", {"sizes": [(40, 24)]}),
}
LOSSY = {"jfif": "JPEG", "jpe": "JPEG", "avif": "AVIF"}


def encoded(kind: str, image: Image.Image | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(NOISE)).save(buffer, kind, **options)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    path.with_suffix(".txt").write_text("noise")
    return path


def refused(path: Path) -> str:
    with pytest.raises(InputError) as refusal:
        read_image(path, 3)
    return str(refusal.value)


@pytest.mark.parametrize("suffix", LOSSLESS)
def test_lossless_formats(tmp_path, suffix):
    kind, options = LOSSLESS[suffix]
    for name in (f"a.{suffix}", f"a.{suffix.upper()}"):
        pixels, notes = read_image(put(tmp_path / name, encoded(kind, **options)), 3)
        assert np.array_equal(pixels, NOISE) and not notes


@pytest.mark.parametrize("suffix", LOSSY)
def test_lossy_formats(tmp_path, suffix):
    content = encoded(LOSSY[suffix], quality=90)
    pixels, _ = read_image(put(tmp_path / f"a.{suffix}", content), 3)
    assert np.array_equal(pixels, np.array(Image.open(io.BytesIO(content)).convert("RGB")))


def test_greys(tmp_path):
    for suffix, kind in (("pgm", "PPM"), ("tga", "TGA"), ("jp2", "JPEG2000")):
        path = put(tmp_path / f"a.{suffix}", encoded(kind, Image.fromarray(NOISE[..., 0])))
        assert np.array_equal(read_image(path, 1)[0], NOISE[..., 0])
    bits = Image.fromarray(NOISE[..., 0]).convert("1")
    path = put(tmp_path / "a.pbm", encoded("PPM", bits))
    assert np.array_equal(read_image(path, 1)[0], np.array(bits.convert("L")))


def test_an_icon_is_its_largest_size(tmp_path):
    square = Image.fromarray(NOISE).resize((32, 32))
    path = put(tmp_path / "a.ico", encoded("ICO", square, sizes=[(16, 16), (32, 32)]))
    pixels, notes = read_image(path, 3)
    assert np.array_equal(pixels, np.array(square))
    assert notes == [f"{path}: the largest of 2 sizes taken"]


def deep_jpeg_2000() -> bytes:
    """A colour image whose header says 16 bits a channel: Pillow does not write such files."""
    content = bytearray(encoded("JPEG2000"))
    bits = content.index(b"\xff\x4f\xff\x51") + 42
    assert content[bits : bits + 9 : 3] == b"\x07\x07\x07"
    content[bits : bits + 9 : 3] = b"\x0f\x0f\x0f"
    return bytes(content)


def deep_avif() -> bytes:
    """An image whose header says 10 bits a channel."""
    content = bytearray(encoded("AVIF"))
    content[content.index(b"av1C") + 6] |= 0x40
    bits = content.index(b"pixi") + 9
    assert content[bits : bits + 3] == b"\x08\x08\x08"
    content[bits : bits + 3] = b"\x0a\x0a\x0a"
    return bytes(content)


DEEP = {
    "rgb.jp2": deep_jpeg_2000(),
    "grey.jp2": encoded("JPEG2000", Image.fromarray(NOISE[..., 0].astype(np.uint16))),
    "a.avif": deep_avif(),
    "a.ppm": b"P6 2 1 65535\n" + bytes(12),
    "ten.ppm": b"P6 2 1 1023\n" + bytes(12),
    "plain.ppm": b"P3 2 1 1023\n1 2 3 4 5 6",
    "grey.pgm": b"P5 2 1 65535\n" + bytes(4),
    "float.ppm": b"Pf 2 1 -1.0\n" + bytes(8),
}


@pytest.mark.parametrize("name", DEEP)
def test_more_than_8_bits_are_refused(tmp_path, name):
    path = put(tmp_path / name, DEEP[name])
    assert refused(path).startswith(f"{path}: has more than 8 bits a channel")


def test_fewer_than_8_bits_are_read(tmp_path):
    path = put(tmp_path / "a.ppm", b"P6 2 1 15\n" + bytes([0, 15, 5, 15, 0, 10]))
    assert read_image(path, 3)[0].tolist() == [[[0, 255, 85], [255, 0, 170]]]


@pytest.mark.parametrize(("name", "kind"), [("a.avif", "AVIF"), ("a.apng", "PNG")])
def test_moving_images_are_refused(tmp_path, name, kind):
    more = [Image.fromarray(NOISE[::-1].copy())]
    path = put(tmp_path / name, encoded(kind, save_all=True, append_images=more))
    assert "has 2 frames, expected a still" in refused(path)


@pytest.mark.parametrize("suffix", ["avif", "jp2", "tga", "ppm", "ico", "dib", "jpe"])
def test_damage(tmp_path, suffix):
    kind, options = LOSSLESS.get(suffix) or (LOSSY[suffix], {})
    content = encoded(kind, **options)
    for damaged in (content[: len(content) // 2], content[:20], b"x" * 300, b""):
        line = refused(put(tmp_path / f"a.{suffix}", damaged))
        assert "damaged" in line or "not an image of a known format" in line
        assert "\n" not in line


def test_formats_without_a_signature_need_their_suffix(tmp_path):
    """Anything might be one of them: a text that begins with P3, a file of zeros."""
    for kind in ("TGA", "DIB", "PPM"):
        assert "not an image of a known format" in refused(put(tmp_path / "a.png", encoded(kind)))


def test_an_older_pillow_reads_fewer_formats(tmp_path, monkeypatch):
    path = put(tmp_path / "a.avif", encoded("AVIF"))
    Image.init()
    monkeypatch.delitem(Image.OPEN, "AVIF")
    line = refused(path)
    assert "not an image of a known format (PNG, JPEG, WEBP" in line and "AVIF" not in line


def test_every_suffix_is_read_or_named(tmp_path):
    """The twelve that were once overlooked among them."""
    known = {f".{name}" for name in "jfif jpe avif heic heif jp2 tga ppm ico dib jxl apng".split()}
    assert known <= {*SUFFIXES, *UNREAD_SUFFIXES} and not {*SUFFIXES} & {*UNREAD_SUFFIXES}
    put(tmp_path / "good.png", encoded("PNG"))
    for suffix in UNREAD_SUFFIXES:
        put(tmp_path / f"{suffix[1:]}{suffix.upper()}", b"?")
    folder = read_folder(tmp_path)
    assert len(folder.pictures) == 1
    assert set(folder.skipped) == {
        f"{tmp_path / (s[1:] + s.upper())}: {s} images are not read; save it as PNG or JPEG"
        for s in UNREAD_SUFFIXES
    }
    (tmp_path / "good.png").unlink()
    with pytest.raises(InputError, match=rf"no images in it .*; {len(UNREAD_SUFFIXES)} of other"):
        read_folder(tmp_path)
