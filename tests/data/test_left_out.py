"""Folders of images: names in any form, and every file is used, named or counted."""

import json
import unicodedata
from pathlib import Path

import pytest
from PIL import Image
from support.idx import write_set

from nanosd3.data.image_folder import ImageFolder, read_folder
from nanosd3.data.mnist import load_images
from nanosd3.errors import InputError

NFC = unicodedata.normalize("NFC", "Kätzchen é 각")
NFD = unicodedata.normalize("NFD", NFC)


def image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path, "PNG")
    return path


def captioned(path: Path, text: str = "a cat") -> Path:
    image(path).with_suffix(".txt").write_text(text, encoding="utf-8")
    return path


def lines(root: Path, **captions: str) -> None:
    """Write metadata.jsonl, of names and captions."""
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (root / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")


def skipped(folder: ImageFolder) -> list[str]:
    return [line.removeprefix(f"{folder.root}/") for line in folder.skipped]


def captions(folder: ImageFolder) -> dict[str, tuple[str, ...]]:
    return {p.path.relative_to(folder.root).as_posix(): p.captions for p in folder.pictures}


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "text"), [(NFC, NFD), (NFD, NFC), (NFD, NFD), (NFC, NFC)])
def test_names_in_any_unicode_form(tmp_path, name, text):
    """As macOS, Linux and archives between them write the same name."""
    beside, listed = tmp_path / "beside", tmp_path / "listed"
    image(beside / name / f"{name}.png")
    (beside / name / f"{text}.txt").write_text("a cat")
    image(listed / name / f"{name}.png")
    lines(listed, **{f"{text}/{text}.png": "a cat"})
    for root in (beside, listed):
        folder = read_folder(root)
        assert captions(folder) == {f"{name}/{name}.png": ("a cat",)}
        assert not folder.skipped and not folder.others


def test_two_files_whose_names_differ_in_form_alone(tmp_path):
    """On systems that allow it, each name means its own file."""
    captioned(tmp_path / f"{NFC}.png", "composed")
    captioned(tmp_path / f"{NFD}.png", "decomposed")
    if len(list(tmp_path.iterdir())) < 4:
        pytest.skip("this file system takes them for the same")
    expected = {f"{NFC}.png": ("composed",), f"{NFD}.png": ("decomposed",)}
    assert captions(read_folder(tmp_path)) == expected
    lines(tmp_path, **{f"{NFC}.png": "composed", f"{NFD}.png": "decomposed"})
    assert captions(read_folder(tmp_path)) == expected


@pytest.mark.parametrize(
    ("image_name", "text_name", "hint"),
    [
        ("a.png", "A.txt", "A.txt differs in upper and lower case"),
        ("a.png", "a.TXT", "a.TXT differs in upper and lower case"),
        ("deep/a.png", "Deep/a.txt", "Deep/a.txt differs in upper and lower case"),
        ("straße.png", "STRASSE.txt", "STRASSE.txt differs in upper and lower case"),
        ("deep/a.png", "deep\\a.txt", "deep\\a.txt has \\ for /"),
        ("a.png", "a.caption", "a.caption is not read"),
        ("a.png", "A.json", "A.json is not read"),
    ],
)
def test_texts_of_similar_names(tmp_path, image_name, text_name, hint):
    captioned(tmp_path / "good.png")
    image(tmp_path / image_name)
    (tmp_path / text_name).parent.mkdir(exist_ok=True)
    (tmp_path / text_name).write_text("a cat")
    assert skipped(read_folder(tmp_path)) == [
        f"{image_name}: no caption (no .txt beside it; {hint})"
    ]


@pytest.mark.parametrize(
    ("image_name", "listed", "difference"),
    [
        ("a.png", "A.png", "differs in upper and lower case"),
        ("a.PNG", "a.png", "differs in upper and lower case"),
        ("Deep/a.png", "deep/a.png", "differs in upper and lower case"),
        (f"{NFD}.png", f"{NFC.upper()}.png", "differs in upper and lower case"),
        ("deep/a.png", "deep\\a.png", "has \\ for /"),
        ("deep/a.png", ".\\deep\\a.png", ""),
    ],
)
def test_lines_of_similar_names(tmp_path, image_name, listed, difference):
    image(tmp_path / "good.png")
    image(tmp_path / image_name)
    lines(tmp_path, **{"good.png": "a dog", listed: "a cat"})
    if not difference:
        found = sorted(skipped(read_folder(tmp_path)))
        assert found[0].startswith(f"{listed}: no such file") and len(found) == 2
        return
    assert sorted(skipped(read_folder(tmp_path))) == sorted([
        f"{listed}: no such file; {image_name} {difference}",
        f"{image_name}: no caption (no line of metadata.jsonl names it; {listed} {difference})",
    ])  # fmt: skip


# --- what is left out -----------------------------------------------------------------------------


def test_every_file_is_used_named_or_counted(tmp_path):
    captioned(tmp_path / "good.png")
    captioned(tmp_path / "photo.heic")  # an image, if not one that is read
    (tmp_path / "gone.txt").write_text("a caption without its image")
    (tmp_path / "deep").mkdir()
    for name in ("metadata.csv", "Metadata.jsonl", "deep/metadata.jsonl", "metadata.parquet"):
        (tmp_path / name).write_bytes(b"?")
    for name in ("data.zip", "movie.mp4", "more.zip", "LICENSE", "Thumbs.DB", "photo.json"):
        (tmp_path / name).write_bytes(b"?")
    folder = read_folder(tmp_path)
    elsewhere = "is not read; only a metadata.jsonl in the folder itself is"
    assert sorted(skipped(folder)) == sorted([
        "photo.heic: .heic images are not read; save it as PNG or JPEG",
        "gone.txt: is the caption of no image",
        f"metadata.csv: {elsewhere}",
        f"metadata.parquet: {elsewhere}",
        f"Metadata.jsonl: {elsewhere}",
        f"deep/metadata.jsonl: {elsewhere}",
    ])  # fmt: skip
    assert folder.others == {".zip": 2, ".mp4": 1, "no suffix": 1, ".db": 1, ".json": 1}


def test_with_metadata_text_files_are_others(tmp_path):
    captioned(tmp_path / "a.png", "not this one")
    (tmp_path / "b.txt").write_text("nor this")
    lines(tmp_path, **{"a.png": "a cat"})
    folder = read_folder(tmp_path)
    assert captions(folder) == {"a.png": ("a cat",)}
    assert not folder.skipped and folder.others == {".txt": 2}


# --- encodings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a cat".encode("utf-16"), "x.txt: is UTF-16 text; save it as UTF-8"),
        ("a cat".encode("utf-16-le"), "x.txt: holds a NUL (byte 1), as UTF-16 does; save"),
        (b"a cat\0", "x.txt: holds a NUL (byte 5), as UTF-16 does; save it as UTF-8"),
        ("a cat\nein Kätzchen".encode("cp1252"), "x.txt, line 2: is not valid UTF-8 (byte 11)"),
    ],
)
def test_captions_in_another_encoding(tmp_path, content, message):
    captioned(tmp_path / "good.png")
    captioned(tmp_path / "x.png").with_suffix(".txt").write_bytes(content)
    (line,) = skipped(read_folder(tmp_path))
    assert line.startswith(message)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32", "cp1252"])
def test_metadata_in_another_encoding(tmp_path, encoding):
    image(tmp_path / "a.png")
    text = '{"file_name": "a.png", "text": "ein Kätzchen"}'
    (tmp_path / "metadata.jsonl").write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match=r"metadata\.jsonl.*; save it as UTF-8$"):
        read_folder(tmp_path)


def class_names(folder: Path, content: bytes) -> list[str]:
    (folder / "classes.txt").write_bytes(content)
    return [name for (name,) in load_images(folder).names]


def test_only_line_breaks_end_a_line(tmp_path):
    """Not what Unicode calls a line separator, next line, form feed or file separator."""
    text = "a red\u2028square\x85 here\x0c\x1c\nand\rtwo\r\n"
    captioned(tmp_path / "x.png").with_suffix(".txt").write_text(text, "utf-8", newline="")
    expected = ("a red\u2028square\x85 here", "and", "two")
    assert read_folder(tmp_path).pictures[0].captions == expected
    folder = write_set(tmp_path / "set", labels=[0, 1, 2])
    assert class_names(folder, text.encode()) == list(expected)


def test_class_names(tmp_path):
    folder, names = write_set(tmp_path, labels=[0, 1, 2]), ["kätzchen", "猫", "a dog"]
    text = "Kätzchen\r\n猫\r\n\r\n a dog \n"
    assert class_names(folder, text.encode()) == names
    assert class_names(folder, text.encode("utf-8-sig")) == names
    for content, message in (
        (text.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("Kätzchen".encode("latin-1"), r"line 1: is not valid UTF-8 \(byte 1\)"),
        (b"a cat\0\nb", r"holds a NUL \(byte 5\)"),
        (b"cat\ndog\n\nCat\n", "'cat' is in lines 1 and 4; give each class a name of its own"),
        (b"a  cat\ndog\na cat", "'a cat' is in lines 1 and 3"),
        (f"{NFC}\n{NFD}".encode(), "is in lines 1 and 2"),
    ):
        with pytest.raises(InputError, match=message) as refusal:
            class_names(folder, content)
        assert str(refusal.value).startswith(str(folder / "classes.txt"))
        assert "\n" not in str(refusal.value)
    (folder / "classes.txt").unlink()
    (folder / "classes.txt").mkdir()
    with pytest.raises(InputError, match=r"classes\.txt: is not a file"):
        load_images(folder)
