"""A folder of images with captions: both layouts, and all that can be wrong with a file."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanosd3.data.image_folder import SUFFIXES, ImageFolder, load_picture, read_folder
from nanosd3.errors import InputError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def noise(height: int = 12, width: int = 20, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def put(path: Path, image: Image.Image | None = None, caption: str | None = "a cat", **options):
    """Save an image, and its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise()).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def put_lines(folder: Path, *lines: object) -> None:
    """Write metadata.jsonl: objects as JSON, bytes verbatim."""
    folder.mkdir(parents=True, exist_ok=True)
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (folder / "metadata.jsonl").write_bytes(b"\n".join(encoded) + b"\n")


def line_of(file_name: object, text: object = "a cat") -> dict:
    return {"file_name": file_name, "text": text}


def captions(folder: ImageFolder) -> dict[str, tuple[str, ...]]:
    return {p.path.relative_to(folder.root).as_posix(): p.captions for p in folder.pictures}


def refused(folder: Path) -> str:
    with pytest.raises(InputError) as refusal:
        read_folder(folder)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


# --- layouts --------------------------------------------------------------------------------------


def test_text_files_beside_images(tmp_path):
    put(tmp_path / "b.png", caption="a cat\n\n  a tabby cat \r\n\n")
    put(
        tmp_path / "a.b.JPG", caption="\ufeffein Kätzchen, 猫"
    )  # a byte order mark, as from Windows
    put(tmp_path / "deep" / "er" / "c.webp")
    (tmp_path / "README.txt").write_text("not a caption")
    folder = read_folder(tmp_path)
    assert captions(folder) == {
        "a.b.JPG": ("ein Kätzchen, 猫",),
        "b.png": ("a cat", "a tabby cat"),
        "deep/er/c.webp": ("a cat",),
    }
    assert list(captions(folder)) == sorted(captions(folder))
    assert folder.root == tmp_path
    assert folder.skipped == (f"{tmp_path / 'README.txt'}: is the caption of no image",)
    for picture in folder.pictures:
        assert picture.size == (12, 20)
        assert picture.digest == hashlib.sha256(picture.path.read_bytes()).hexdigest()
    with pytest.raises(dataclasses.FrozenInstanceError):
        folder.pictures[0].digest = ""


def test_every_suffix(tmp_path):
    for suffix in SUFFIXES:
        put(tmp_path / f"{suffix[1:]}{suffix}")
        put(tmp_path / f"{suffix[1:]}2{suffix.upper()}")
    folder = read_folder(tmp_path)
    assert len(folder.pictures) == 2 * len(SUFFIXES) and not folder.skipped


def test_metadata(tmp_path):
    put(tmp_path / "b.png", caption="not this one")
    for name in ("a.png", "deep/c.jpg", "plain"):
        put(tmp_path / name, caption=None, format="PNG")
    put_lines(
        tmp_path,
        line_of("b.png", ["a cat", "", " a tabby cat "]) | {"more": 1},
        line_of("./deep//c.jpg"),
        b"",
        line_of("b.png", "a cat, asleep"),
        '{"file_name": "a.png", "text": "eine Katze, \u2028 猫"}\r'.encode(),
        line_of("plain"),  # needs no suffix, as it is named
    )
    folder = read_folder(tmp_path)
    assert captions(folder) == {
        "a.png": ("eine Katze, \u2028 猫",),
        "b.png": ("a cat", "a tabby cat", "a cat, asleep"),
        "deep/c.jpg": ("a cat",),
        "plain": ("a cat",),
    }
    assert not folder.skipped


def test_metadata_takes_precedence_over_text_files(tmp_path):
    put(tmp_path / "a.png"), put(tmp_path / "b.png")
    put_lines(tmp_path, line_of("a.png", "listed"))
    folder = read_folder(tmp_path)
    assert captions(folder) == {"a.png": ("listed",)}
    assert folder.skipped == (
        f"{tmp_path / 'b.png'}: no caption (no line of metadata.jsonl names it)",
    )


def test_metadata_with_a_byte_order_mark(tmp_path):
    put(tmp_path / "a.png", caption=None)
    put_lines(tmp_path, b"\xef\xbb\xbf" + json.dumps(line_of("a.png")).encode())
    assert captions(read_folder(tmp_path)) == {"a.png": ("a cat",)}


@pytest.mark.parametrize("metadata", [False, True])
def test_relative_roots(tmp_path, monkeypatch, metadata):
    """The fingerprint does not depend on the path that leads to the folder."""
    put(tmp_path / "set" / "a.png"), put(tmp_path / "set" / "deep" / "b.png")
    if metadata:
        put_lines(tmp_path / "set", line_of("a.png"), line_of("deep/b.png"))
    monkeypatch.chdir(tmp_path / "set")
    roots = (tmp_path / "set", Path("."), Path("../set"), Path("deep/.."))
    folders = [read_folder(root) for root in roots]
    assert all(captions(folder).keys() == {"a.png", "deep/b.png"} for folder in folders)
    assert len({folder.fingerprint for folder in folders}) == 1


def test_hidden_files_and_links(tmp_path):
    put(tmp_path / "set" / "a.png")
    put(tmp_path / "set" / ".b.png"), put(tmp_path / "set" / ".trash" / "c.png")
    put(tmp_path / "elsewhere" / "d.png")
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "link" / "back").symlink_to(tmp_path / "set")  # a cycle
    folder = read_folder(tmp_path / "set")
    assert captions(folder).keys() == {"a.png", "link/d.png"} and not folder.skipped


def test_fingerprint(tmp_path):
    def fingerprint_after(change) -> str:
        other = tmp_path / "other"
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(tmp_path / "set", other)
        change(other)
        return read_folder(other).fingerprint

    put(tmp_path / "set" / "a.png", noise(seed=1), "a cat\na tabby")
    put(tmp_path / "set" / "b.png", noise(seed=2), "a dog")
    same = read_folder(tmp_path / "set").fingerprint
    assert len(bytes.fromhex(same)) == 32
    assert fingerprint_after(lambda folder: None) == same
    assert fingerprint_after(lambda folder: (folder / "notes.txt").write_text("x")) == same
    changes = [
        lambda folder: (folder / "a.txt").write_text("a cat"),
        lambda folder: (folder / "a.txt").write_text("a cata tabby"),
        lambda folder: (folder / "a.txt").write_text("a tabby\na cat"),
        lambda folder: put(folder / "a.png", noise(seed=3), "a cat\na tabby"),
        lambda folder: put(folder / "c.png", noise(seed=3)),
        lambda folder: [(folder / f"b{s}").rename(folder / f"c{s}") for s in (".png", ".txt")],
        lambda folder: (folder / "b.png").unlink(),
        lambda folder: [put(folder / "a.png", noise(seed=2), "a cat\na tabby"),
                        put(folder / "b.png", noise(seed=1), "a dog")],
    ]  # fmt: skip
    assert len({same, *map(fingerprint_after, changes)}) == len(changes) + 1


# --- bad folders ----------------------------------------------------------------------------------


def test_no_folder_no_images_no_captions(tmp_path):
    assert refused(tmp_path / "none") == f"{tmp_path / 'none'}: no such folder"
    (tmp_path / "file").write_text("x")
    assert refused(tmp_path / "file").startswith(f"{tmp_path / 'file'}: is a file, expected a fol")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(empty).startswith(f"{empty}: no images in it (.png, .jpg")
    (empty / "thesis.txt").write_text("x")
    (empty / "table.csv").write_text("x")
    assert "no images in it" in refused(empty)
    put(empty / "a.png", caption=None), put(empty / "b.png", caption=None)
    line = refused(empty)
    assert line.startswith(f"{empty}: no captions for any of 2 images; ")
    assert "put an x.txt beside x.png" in line and '{"file_name": "x.png", "text":' in line
    put_lines(empty)
    assert "no captions for any of 2 images" in refused(empty)


def test_all_images_bad(tmp_path):
    for name in ("a.png", "b.png"):
        put(tmp_path / name).write_bytes(b"not a picture")
    line = refused(tmp_path)
    assert line.startswith(f"{tmp_path}: none of 2 images can be used (first: ")
    assert f"{tmp_path / 'a.png'}: is not an image of a known format" in line


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b"a.png,a cat", "not valid JSON"),
        (
            b'{"file_name": "a.png", "text": "\xff"}',
            "is not valid UTF-8 (byte 73); save it as UTF-8",
        ),
        (rb'{"file_name": "a.png", "text": "\ud800"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"1" * 10_000, "not valid JSON"),
        (b'["a.png"]', "expected an object, got a list"),
        (b"null", "expected an object, got a NoneType"),
        ({"text": "a cat"}, "no file_name"),
        (line_of(3), "no file_name, or it is not a string"),
        (line_of(""), "no file_name"),
        ({"file_name": "a.png"}, "no text"),
        (line_of("a.png", None), "no text"),
        (line_of("a.png", 3), "no text, or it is neither a string nor a list of strings"),
        (line_of("a.png", ["a cat", None]), "no text, or it is neither a string nor a list"),
        (line_of("a.png", {"en": "a cat"}), "no text, or it is neither a string nor a list"),
        (line_of("../out.png"), "file_name '../out.png' is outside the folder"),
        (line_of("deep/../../out.png"), "file_name 'deep/../../out.png' is outside the folder"),
        (line_of("/etc/passwd"), "file_name '/etc/passwd' is outside the folder"),
    ],
)
def test_damaged_metadata(tmp_path, line, message):
    put(tmp_path / "set" / "a.png")
    put(tmp_path / "out.png")
    put_lines(tmp_path / "set", line_of("a.png"), b"", line)
    error = refused(tmp_path / "set")
    assert error.startswith(f"{tmp_path / 'set' / 'metadata.jsonl'}, line 3: {message}"), error


def test_metadata_that_cannot_be_read(tmp_path):
    put(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").mkdir()
    assert refused(tmp_path) == f"{tmp_path / 'metadata.jsonl'}: is not a file"


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    put(tmp_path / "a.png"), put(tmp_path / "locked" / "b.png")
    scandir = os.scandir

    def locked(path):  # permissions would not stop tests that run as root
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)
    assert refused(tmp_path) == f"{tmp_path / 'locked'}: cannot be read (Permission denied)"


# --- bad files ------------------------------------------------------------------------------------


def png(width: int, height: int, bits: int, data: bytes) -> bytes:
    """An RGB file, chunk by chunk: Pillow does not write the kinds needed here."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(data)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def colour_tiff_of_16_bits() -> bytes:
    """A single pixel; only a tag says that it has 16 bits a channel."""
    short, long = 3, 4
    fields = [
        *((256, short, 1, 1), (257, short, 1, 1)),  # 1x1
        (258, short, 3, 122),  # bits per sample: three numbers, at offset 122
        *((259, short, 1, 1), (262, short, 1, 2)),  # not compressed, RGB
        *((273, long, 1, 128), (277, short, 1, 3), (278, short, 1, 1), (279, long, 1, 6)),
    ]
    table = b"".join(struct.pack("<HHII", *field) for field in fields)
    start = b"II*\0" + struct.pack("<IH", 8, len(fields)) + table + bytes(4)
    return start + struct.pack("<3H", 16, 16, 16) + bytes(6)


def truncate(path: Path, share: float = 0.9) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def save_frames(path: Path) -> None:
    noise(seed=1).save(path, save_all=True, append_images=[noise(seed=2), noise(seed=3)])


BAD = {
    "empty.png": (lambda p: p.write_bytes(b""), "is not an image of a known format"),
    "text.jpg": (lambda p: p.write_text("hello"), "is not an image of a known format"),
    "ppm.png": (lambda p: p.write_bytes(b"P6 1 1 255 abc"), "is not an image of a known format"),
    "cut.png": (truncate, "damaged"),
    "cut.jpg": (truncate, "damaged"),
    "cut.webp": (truncate, "damaged"),
    "cut.bmp": (truncate, "damaged"),
    "cut.gif": (truncate, "damaged"),
    "cut.tif": (truncate, "damaged"),
    "bomb.png": (
        lambda p: p.write_bytes(png(50_000, 50_000, 8, b"")),
        "damaged or too large (Image size",
    ),
    "grey16.png": (
        lambda p: Image.fromarray(np.zeros((9, 9), np.uint16)).save(p),
        "has more than 8 bits a channel",
    ),
    "grey16.tif": (
        lambda p: Image.fromarray(np.zeros((9, 9), np.uint16)).save(p),
        "has more than 8 bits a channel",
    ),
    "float.tif": (
        lambda p: Image.fromarray(np.zeros((9, 9), np.float32)).save(p),
        "has more than 8 bits a channel",
    ),
    "rgb16.png": (lambda p: p.write_bytes(png(9, 9, 16, bytes(9 * 55))), "has more than 8 bits"),
    "rgb16.tif": (lambda p: p.write_bytes(colour_tiff_of_16_bits()), "has more than 8 bits"),
    "moving.gif": (save_frames, "has 3 frames, expected a still"),
    "moving.webp": (save_frames, "has 3 frames, expected a still"),
    "moving.png": (save_frames, "has 3 frames, expected a still"),
    "pages.tif": (save_frames, "has 3 frames, expected a still"),
    "gone.png": (
        lambda p: [p.unlink(), p.symlink_to("nowhere")],
        "no such file",
    ),
    "pipe.png": (lambda p: [p.unlink(), os.mkfifo(p)], "is not a file"),
}
UNCAPTIONED = {
    "none.png": (lambda p: p.with_suffix(".txt").unlink(), "none.png: no caption (no .txt beside"),
    "blank.png": (
        lambda p: p.with_suffix(".txt").write_text(" \n\n"),
        "blank.png: its caption is empty",
    ),
    "void.png": (lambda p: p.with_suffix(".txt").write_text(""), "void.png: its caption is empty"),
    "latin.png": (
        lambda p: p.with_suffix(".txt").write_bytes("zwei Bären".encode("latin-1")),
        "latin.txt, line 1: is not valid UTF-8 (byte 6)",
    ),
    "folder.png": (
        lambda p: [p.with_suffix(".txt").unlink(), p.with_suffix(".txt").mkdir()],
        "folder.txt: is not a file",
    ),
}


@pytest.mark.parametrize("name", [*BAD, *UNCAPTIONED])
def test_one_bad_file_is_skipped_and_named(tmp_path, name, recwarn):
    put(tmp_path / "good.png")
    spoil, message = {**BAD, **UNCAPTIONED}[name]
    spoil(put(tmp_path / name))
    folder = read_folder(tmp_path)
    assert [picture.path.name for picture in folder.pictures] == ["good.png"]
    (line,) = folder.skipped
    expected = f"{tmp_path / name}: {message}" if name in BAD else f"{tmp_path}/{message}"
    assert line.startswith(expected) and "\n" not in line
    assert not recwarn.list


def test_all_bad_files_together(tmp_path):
    put(tmp_path / "good.png")
    for name, (spoil, _) in {**BAD, **UNCAPTIONED}.items():
        spoil(put(tmp_path / name))
    folder = read_folder(tmp_path)
    assert len(folder.pictures) == 1 and len(set(folder.skipped)) == len(BAD) + len(UNCAPTIONED)


def test_metadata_of_bad_files(tmp_path):
    """Every file is used or skipped by name, whether or not a line names it."""
    for name in ("good.png", "unnamed.png", "silent.png", "deep/unnamed.jpg", "bad.png"):
        put(tmp_path / name)
    truncate(tmp_path / "bad.png")
    names = ("good.png", "gone.png", "bad.png", "deep", ".", "x" * 300, "a\0b")
    put_lines(tmp_path, line_of("silent.png", ["", " "]), *map(line_of, names))
    folder = read_folder(tmp_path)
    assert captions(folder) == {"good.png": ("a cat",)}
    lines = dict(line.removeprefix(f"{tmp_path}").split(": ", 1) for line in folder.skipped)
    assert lines.pop("/bad.png").startswith("damaged")
    assert lines == {
        "": "is not a file",
        "/a\0b": "cannot be read (embedded null byte)",
        "/deep": "is not a file",
        "/deep/unnamed.jpg": "no caption (no line of metadata.jsonl names it)",
        "/gone.png": "no such file",
        "/silent.png": "its caption is empty",
        "/unnamed.png": "no caption (no line of metadata.jsonl names it)",
        "/" + "x" * 300: "cannot be read (File name too long)",
    }


def test_file_names_that_are_not_unicode(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xe4r.png"))
    try:
        put(path, caption=None)
    except OSError:
        pytest.skip("this file system only allows UTF-8")
    put(tmp_path / "good.png")
    (line,) = read_folder(tmp_path).skipped
    assert line.encode().endswith(b"r.png: no caption (no .txt beside it)")
    path.with_suffix(".txt").write_text("a bear")
    assert len(read_folder(tmp_path).fingerprint) == 64


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".gif", ".webp", ".tif", ".bmp"])
def test_random_damage(tmp_path, suffix):
    """Whatever a file contains, it is either read or skipped; nothing crashes."""
    draw = random.Random(0)
    content = put(tmp_path / f"0{suffix}").read_bytes()
    for i in range(1, 80):
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 8)):
            damaged[draw.randrange(min(len(damaged), 300))] = draw.randrange(256)
        put(tmp_path / f"{i}{suffix}").write_bytes(damaged)
    folder = read_folder(tmp_path)
    assert len(folder.pictures) + len(folder.skipped) == 80
    for picture in folder.pictures:
        assert load_picture(picture, (8, 8), 3).shape == (8, 8, 3)


# --- pixels ---------------------------------------------------------------------------------------


def load(path: Path, size: tuple[int, int] | None = None, channels: int = 3) -> np.ndarray:
    """Load the only image of a folder."""
    folder = read_folder(path.parent)
    assert folder.skipped == ()
    (picture,) = folder.pictures
    return load_picture(picture, size or picture.size, channels)


def test_pixels_are_unchanged(tmp_path):
    pixels = load(put(tmp_path / "a.png", noise(7, 11)))
    assert pixels.dtype == np.uint8 and (pixels == np.array(noise(7, 11))).all()
    pixels[:] = 0  # writable
    grey = load(tmp_path / "a.png", channels=1)
    assert grey.shape == (7, 11) and (grey == np.array(noise(7, 11).convert("L"))).all()


@pytest.mark.parametrize("mode", ["1", "L"])
def test_greys(tmp_path, mode):
    image = noise().convert(mode)
    expected = np.array(image.convert("L"))
    assert (load(put(tmp_path / "a.png", image), channels=1) == expected).all()
    assert (load(tmp_path / "a.png") == expected[..., None]).all()


def test_a_size_of_16_is_not_16_bits(tmp_path):
    for suffix in (".png", ".tif", ".bmp"):
        assert load(put(tmp_path / suffix[1:] / f"a{suffix}", noise(16, 160))).shape == (16, 160, 3)


def rgba() -> Image.Image:
    """Red in columns that are opaque, half transparent, transparent."""
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[..., 3] = np.repeat([255, 128, 0], 2)
    return Image.fromarray(pixels)


def test_transparency_is_placed_on_white(tmp_path):
    for suffix in (".png", ".webp"):
        pixels = load(put(tmp_path / suffix[1:] / f"a{suffix}", rgba(), lossless=True, exact=True))
        assert (pixels[:, :2] == RED).all() and (pixels[:, 4:] == WHITE).all()
        assert (np.abs(pixels[:, 2:4].astype(int) - (255, 127, 127)) <= 1).all()
    grey = Image.fromarray(np.array([[[0, 255], [0, 0]]], np.uint8), "LA")
    assert load(put(tmp_path / "la" / "a.png", grey), channels=1).tolist() == [[0, 255]]


def test_hidden_colours_do_not_bleed(tmp_path):
    """Resizing comes after compositing: invisible colours must not tint their neighbours."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[::2] = (255, 255, 255, 255)
    pixels[1::2] = (0, 0, 0, 0)  # black, but transparent
    assert (load(put(tmp_path / "a.png", Image.fromarray(pixels)), (4, 4)) == 255).all()


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_palettes(tmp_path, suffix):
    image = Image.new("P", (4, 2))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2, 2] * 2)
    plain, clear = tmp_path / "plain" / f"a{suffix}", tmp_path / "clear" / f"a{suffix}"
    assert load(put(plain, image)).tolist() == [[[*RED], [*GREEN], [*BLUE], [*BLUE]]] * 2
    row = load(put(clear, image, transparency=1))[0].tolist()
    assert row == [[*RED], [*WHITE], [*BLUE], [*BLUE]]


def test_a_transparent_colour(tmp_path):
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((0, 0), GREEN)
    row = load(put(tmp_path / "a.png", image, transparency=GREEN))[0].tolist()
    assert row == [[*WHITE], [*RED]]


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    for name, options in (("a.jpg", {"quality": 100}), ("a.tif", {})):
        pixels = load(put(tmp_path / name[2:] / name, image, **options)).astype(int)
        assert (np.abs(pixels - RED) <= 2).all()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, suffix, orientation):
    """The same image, stored in each of the eight orientations."""
    upright = Image.new("RGB", (32, 16), WHITE)
    upright.paste(RED, (0, 0, 8, 8))  # top left
    upright.paste(BLUE, (24, 0, 32, 8))  # top right
    flip = Image.Transpose
    stored = {1: None, 2: flip.FLIP_LEFT_RIGHT, 3: flip.ROTATE_180, 4: flip.FLIP_TOP_BOTTOM,
              5: flip.TRANSPOSE, 6: flip.ROTATE_90, 7: flip.TRANSVERSE,
              8: flip.ROTATE_270}  # fmt: skip
    image = upright if orientation == 1 else upright.transpose(stored[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact = {"quality": 100, "subsampling": 0, "lossless": True} if suffix != ".tif" else {}
    path = put(tmp_path / f"a{suffix}", image, exif=exif, **exact)
    (picture,) = read_folder(tmp_path).pictures
    assert picture.size == (16, 32)
    assert (np.abs(load(path).astype(int) - np.array(upright)) <= 3).all()


def test_16_bits_a_pixel_are_not_16_bits_a_channel(tmp_path):
    """A BMP file may use 16 bits for three channels: 5, 6 and 5."""
    info = struct.pack("<IiiHHIIiiII", 40, 2, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    masks = struct.pack("<3I", 0xF800, 0x07E0, 0x001F)
    file = b"BM" + struct.pack("<IHHI", 70, 0, 0, 66) + info + masks
    put(tmp_path / "a.bmp").write_bytes(file + struct.pack("<2H", 0xF800, 0x001F))
    with Image.open(tmp_path / "a.bmp") as image:
        assert "BGR;16" in str(image.tile)
    assert load(tmp_path / "a.bmp").tolist() == [[[*RED], [*BLUE]]]


def test_large_images(tmp_path, monkeypatch, recwarn):
    """Pillow warns of large images and refuses those twice as large. The former are accepted."""
    put(tmp_path / "good" / "a.png", noise(12, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 239)
    assert load(tmp_path / "good" / "a.png").shape == (12, 20, 3)
    assert not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 119)
    assert "a.png: damaged or too large (Image size (240 pixels)" in refused(tmp_path / "good")


def test_photograph_with_a_preview(tmp_path):
    """Phones append previews to JPEG files (MPO), which does not make them animations."""
    path = tmp_path / "a.jpg"
    put(path, noise(16, 16, 1), format="MPO", save_all=True, append_images=[noise(4, 4, 2)])
    with Image.open(path) as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert load(path).shape == (16, 16, 3)


# --- sizes ----------------------------------------------------------------------------------------


def striped(height: int, width: int, border: int, across: bool) -> Image.Image:
    """Green, with a red border at one end and a blue border at the other."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = GREEN
    along = pixels.transpose(1, 0, 2) if across else pixels
    along[:border], along[-border:] = RED, BLUE
    return Image.fromarray(pixels)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("scale", [1, 3, 0.5])
def test_center_crop(tmp_path, across, scale):
    """Of 48 pixels the middle 32 are kept: of borders of 12, 4 remain."""
    shape = (32, 48) if across else (48, 32)
    side = int(32 * scale)
    for border in (8, 10, 12):
        path = put(tmp_path / str(border) / "a.png", striped(*shape, border, across))
        pixels = load(path, (side, side))
        along = pixels.transpose(1, 0, 2) if across else pixels
        kept = int((border - 8) * scale)
        colours = along.argmax(-1)  # Lanczos blurs edges and rings a little
        expected = [0] * kept + [1] * (side - 2 * kept) + [2] * kept
        assert (colours == np.array(expected)[:, None]).all()
        assert scale != 1 or set(map(tuple, along.reshape(-1, 3))) <= {RED, GREEN, BLUE}


def test_odd_crops_are_centered(tmp_path):
    """5 to 4 pixels: half a pixel goes at each end, so a symmetric image stays symmetric."""
    pixels = load(put(tmp_path / "a.png", striped(4, 5, 1, True)), (4, 4)).astype(int)
    assert (np.abs(pixels[:, ::-1, ::-1] - pixels) <= 1).all() and pixels[0, 0, 0] > 50


def test_equal_aspect_ratios_are_not_cropped(tmp_path):
    """At the same size, twice and half the size, all four corners stay in place."""
    image = Image.new("RGB", (40, 20), GREEN)
    corners = {(0, 0): RED, (0, -1): BLUE, (-1, 0): WHITE, (-1, -1): (0, 0, 0)}
    for (y, x), colour in corners.items():
        image.paste(colour, (32 * -x, 12 * -y, 32 * -x + 8, 12 * -y + 8))
    path = put(tmp_path / "a.png", image)
    for size in ((20, 40), (40, 80), (10, 20)):
        pixels = load(path, size).astype(int)
        assert pixels.shape == (*size, 3)
        for corner, colour in corners.items():
            assert (np.abs(pixels[corner] - colour) <= 25).all()


@pytest.mark.parametrize("size", [(64, 64), (32, 96), (96, 32), (1, 1), (500, 7)])
@pytest.mark.parametrize("shape", [(1, 1), (1, 100), (300, 2), (17, 31)])
def test_loaded_size(tmp_path, size, shape):
    path = put(tmp_path / "a.png", noise(*shape))
    assert load(path, size).shape == (*size, 3)
    assert load(path, size, channels=1).shape == size


def test_shrinking_averages(tmp_path):
    """Pixels are averaged, not sampled: a fine checkerboard becomes grey."""
    check = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    pixels = load(put(tmp_path / "a.png", Image.fromarray(check)), (8, 8), channels=1)
    assert (np.abs(pixels.astype(int) - 127) <= 3).all()


# --- changes --------------------------------------------------------------------------------------


def test_changed_files(tmp_path):
    path = put(tmp_path / "a.png")
    (picture,) = read_folder(tmp_path).pictures
    put(path, noise(seed=9))
    with pytest.raises(InputError, match=r"a\.png: has changed since its folder was read"):
        load_picture(picture, (8, 8), 3)
    path.unlink()
    with pytest.raises(InputError, match=r"a\.png: no such file"):
        load_picture(picture, (8, 8), 3)


def test_progress_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nanosd3.data.image_folder.PROGRESS_FROM", 3)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    for i in range(2):
        put(tmp_path / f"{i}.png")
    read_folder(tmp_path)
    assert capsys.readouterr().err == ""
    put(tmp_path / "2.png")
    read_folder(tmp_path)
    assert "images: " in capsys.readouterr().err
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    read_folder(tmp_path)
    assert capsys.readouterr().err == ""
