"""A folder of images with captions, in one of two layouts.

    x.png and x.txt beside it      one caption a line; an image may have several
    metadata.jsonl in the folder   lines such as {"file_name": "x.png", "text": "a cat"}

If there is a metadata.jsonl, it takes precedence. Its names are relative to the folder, each text
is a string or a list of strings, and repeated names add captions. Subfolders are read too. Names
that begin with a dot are ignored.

Every large collection has a few bad files, and none of them may stop a training run after a day.
So each image is decoded once up front. Files that cannot be used are left out, but not silently:
`skipped` names each of them with the reason.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from nanosd3.data.pictures import decode, read_bytes, to_channels
from nanosd3.errors import InputError, shown
from nanosd3.storage.run import Contents

METADATA = "metadata.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
PROGRESS_FROM = 300  # images; a progress bar is shown for at least so many, in a terminal
ACCEPTED_LAYOUTS = (
    f"put an x.txt beside x.png, one caption a line, or a {METADATA} into the folder with "
    'lines such as {"file_name": "x.png", "text": "a cat"}'
)

Item = TypeVar("Item")


@dataclass(frozen=True)
class Picture:
    """An image file that can be decoded, and its captions."""

    path: Path
    digest: str  # sha256 of the file's bytes
    size: tuple[int, int]  # height and width, upright
    captions: tuple[str, ...]


@dataclass(frozen=True)
class ImageFolder:
    """The usable images of a folder, sorted by name, and one line for each skipped file."""

    root: Path
    pictures: tuple[Picture, ...]
    skipped: tuple[str, ...]

    @property
    def contents(self) -> Contents:
        """What the fingerprint covers, one by one."""
        rows = {
            p.path.relative_to(self.root).as_posix(): [
                p.digest[:16],
                hashlib.sha256(json.dumps(p.captions).encode()).hexdigest()[:16],
            ]
            for p in self.pictures
        }
        return {"columns": ["pixels", "captions"], "rows": rows}

    @property
    def fingerprint(self) -> str:
        """A sha256 of all names, contents and captions, independent of the folder's location."""
        rows = [
            (p.path.relative_to(self.root).as_posix(), p.digest, p.captions) for p in self.pictures
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_folder(root: Path) -> ImageFolder:
    """Find the images of a folder and their captions, and decode each image once.

    Raises InputError if there is no such folder, metadata.jsonl is damaged, or there is no image,
    none with a caption, or none that can be decoded.
    """
    if not root.is_dir():
        problem = "is a file, expected a folder of images" if root.exists() else "no such folder"
        raise InputError(f"{root}: {problem}")
    metadata = read_metadata(root) if (root / METADATA).exists() else None
    paths = sorted({*find_pictures(root), *(metadata or ())}, key=Path.as_posix)
    if not paths:
        raise InputError(f"{root}: no images in it ({', '.join(SUFFIXES)})")
    skipped: list[str] = []
    captions = read_each(paths, lambda path: captions_of(path, metadata), skipped)
    if not captions:
        raise InputError(
            f"{root}: no captions for any of {len(paths)} images; {ACCEPTED_LAYOUTS} "
            f"(first: {skipped[0]})"
        )
    hide = True if len(captions) < PROGRESS_FROM else None  # None: unless it is a terminal
    bar = tqdm(captions, "images", leave=False, disable=hide)
    pictures = read_each(bar, lambda path: read_picture(path, captions[path]), skipped)
    if not pictures:
        raise InputError(f"{root}: none of {len(paths)} images can be used (first: {skipped[0]})")
    return ImageFolder(root, tuple(pictures.values()), tuple(skipped))


def read_each(
    paths: Iterable[Path], read: Callable[[Path], Item], skipped: list[str]
) -> dict[Path, Item]:
    """Call `read` on each path. If it raises InputError, add the message to `skipped` instead."""
    results = {}
    for path in paths:
        try:
            results[path] = read(path)
        except InputError as error:  # whose file name may not be valid Unicode
            skipped.append(str(error).encode(errors="backslashreplace").decode())
    return results


def find_pictures(root: Path) -> list[Path]:
    """The files below `root` with an image's suffix. Raises InputError for unreadable folders."""
    paths: list[Path] = []
    visited: set[str] = set()
    errors: list[OSError] = []
    for folder, subfolders, files in os.walk(root, onerror=errors.append, followlinks=True):
        if os.path.realpath(folder) in visited:  # through a symbolic link
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        images = (name for name in files if Path(name).suffix.lower() in SUFFIXES)
        paths += [Path(folder, name) for name in images if not name.startswith(".")]
    for error in errors:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})")
    return paths


# --- captions -----------------------------------------------------------------------------------


def captions_of(path: Path, metadata: dict[Path, list[str]] | None) -> tuple[str, ...]:
    """The captions of an image: from `read_metadata`, or without it from the .txt beside it."""
    if metadata is None:
        texts, reason = read_lines(path.with_suffix(".txt")), "no .txt beside it"
    else:
        texts, reason = metadata.get(path), f"no line of {METADATA} names it"
    if texts is None:
        raise InputError(f"{path}: no caption ({reason})")
    captions = tuple(text.strip() for text in texts if text.strip())
    if not captions:
        raise InputError(f"{path}: its caption is empty")
    return captions


def read_lines(path: Path) -> list[str] | None:
    """The lines of a text file, or None if there is no such file."""
    try:
        return read_bytes(path).decode("utf-8-sig").splitlines() if path.exists() else None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not valid UTF-8 (byte {error.start})") from None


def read_metadata(root: Path) -> dict[Path, list[str]]:
    """The captions of each file named in metadata.jsonl. Raises InputError for a bad line."""
    path = root / METADATA
    metadata: dict[Path, list[str]] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if line.strip():
            name, texts = read_line(line, f"{path}, line {number}")
            metadata.setdefault(root / name, []).extend(texts)
    return metadata


def read_line(line: bytes, place: str) -> tuple[str, list[str]]:
    """The file name and the captions in one line of metadata.jsonl."""
    try:
        entry = json.loads(line)
        json.dumps(entry, ensure_ascii=False).encode()  # fails for lone surrogates, "\ud800"
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(entry, dict):
        raise InputError(f"{place}: expected an object, got a {type(entry).__name__}")
    name, text = entry.get("file_name"), entry.get("text")
    if not isinstance(name, str) or not name:
        raise InputError(f"{place}: no file_name, or it is not a string")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{place}: file_name {shown(name)} is outside the folder")
    texts = text if isinstance(text, list) else [text]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{place}: no text, or it is neither a string nor a list of strings")
    return name, texts


# --- images -------------------------------------------------------------------------------------


def read_picture(path: Path, captions: tuple[str, ...]) -> Picture:
    """Decode an image file once. Raises InputError if it cannot be used."""
    content = read_bytes(path)
    width, height = decode(content, path)[0].size
    return Picture(path, hashlib.sha256(content).hexdigest(), (height, width), captions)


def load_picture(picture: Picture, size: tuple[int, int], channels: int) -> np.ndarray:
    """Load an image, resized to `size` (H, W), as uint8 (H, W, 3), or (H, W) for one channel.

    It is scaled (Lanczos) to just cover that size and then center-cropped. Raises InputError if
    the file has changed since the folder was read.
    """
    content = read_bytes(picture.path)
    if hashlib.sha256(content).hexdigest() != picture.digest:
        raise InputError(
            f"{picture.path}: has changed since its folder was read; rerun the command"
        )
    image, _ = decode(content, picture.path)
    image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)  # Pillow takes (W, H)
    return to_channels(image, channels)[0]
