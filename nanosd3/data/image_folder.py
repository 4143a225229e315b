"""A folder of images with captions, in one of two layouts.

    x.png and x.txt beside it      one caption a line; an image may have several
    metadata.jsonl in the folder   lines such as {"file_name": "x.png", "text": "a cat"}

If there is a metadata.jsonl, it takes precedence. Its names are relative to the folder, each text
is a string or a list of strings, and repeated names add captions. Subfolders are read too. Names
that begin with a dot are ignored.

Every large collection has a few bad files, and none of them may stop a training run after a day.
So each image is decoded once up front. Files that cannot be used are left out, but not silently:
`skipped` names each of them with the reason, including captions without an image, and `others`
counts the files that are neither.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from nanosd3.data.caption_files import METADATA, CaptionFiles, Metadata, TextFiles
from nanosd3.data.formats import SUFFIXES, UNREAD_SUFFIXES
from nanosd3.data.pictures import decode, to_channels
from nanosd3.errors import InputError
from nanosd3.storage.files import read_regular
from nanosd3.storage.run import Contents

TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")  # of captions
PROGRESS_FROM = 300  # images; with this many or more, a terminal shows a progress bar
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
    notes: tuple[str, ...] = ()  # conversions made in decoding it


@dataclass(frozen=True)
class ImageFolder:
    """The usable images of a folder, sorted by name, and one line for each skipped file."""

    root: Path
    pictures: tuple[Picture, ...]
    skipped: tuple[str, ...]
    others: Counter[str]  # files that are neither images nor captions, by suffix

    @property
    def contents(self) -> Contents:
        """What the fingerprint covers, item by item."""
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
    files = find_files(root)
    metadata = Metadata(root, files) if (root / METADATA).exists() else None
    captioned: CaptionFiles = metadata or TextFiles(root, files)
    images = {path for path in files if path.suffix.lower() in SUFFIXES}
    paths = sorted({*images, *(metadata.captions if metadata else ())}, key=Path.as_posix)
    unread = [path for path in files if path.suffix.lower() in UNREAD_SUFFIXES]
    if not paths:
        first = f"; {len(unread)} of other formats, such as {unread[0].name}" if unread else ""
        raise InputError(f"{root}: no images in it ({', '.join(SUFFIXES)}){first}")
    skipped: list[str] = []
    captions = read_each(paths, captioned.of, skipped)
    if not captions:
        raise InputError(
            f"{root}: no captions for any of {len(paths)} images; {ACCEPTED_LAYOUTS} "
            f"(first: {skipped[0]})"
        )
    hide = True if len(captions) < PROGRESS_FROM else None  # None: hidden unless in a terminal
    with tqdm(captions, "images", leave=False, disable=hide) as bar:
        pictures = read_each(bar, lambda path: read_picture(path, captions[path]), skipped)
    if not pictures:
        raise InputError(f"{root}: none of {len(paths)} images can be used (first: {skipped[0]})")
    known = {*paths, *captioned.named}
    rest = [path for path in files if path not in known]
    others = Counter(
        read_each(rest, lambda path: kind_of_other(path, not metadata), skipped).values()
    )
    return ImageFolder(root, tuple(pictures.values()), tuple(skipped), others)


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


def find_files(root: Path) -> list[Path]:
    """The files below `root`, sorted. Raises InputError for folders that cannot be read."""
    paths: list[Path] = []
    visited: set[str] = set()
    errors: list[OSError] = []
    for folder, subfolders, files in os.walk(root, onerror=errors.append, followlinks=True):
        if os.path.realpath(folder) in visited:  # through a symbolic link
            subfolders.clear()
            continue
        visited.add(os.path.realpath(folder))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths += [Path(folder, name) for name in files if not name.startswith(".")]
    for error in errors:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})")
    return sorted(paths, key=Path.as_posix)


def kind_of_other(path: Path, in_texts: bool) -> str:
    """The suffix of a file that is neither an image nor a caption. Raises InputError if it may have
    been meant to be one; `in_texts` says that .txt files hold the captions."""
    suffix = path.suffix.lower()
    if suffix in UNREAD_SUFFIXES:
        raise InputError(f"{path}: {suffix} images are not read; save it as PNG or JPEG")
    if path.stem.lower() == Path(METADATA).stem and suffix in TABLE_SUFFIXES:
        raise InputError(f"{path}: is not read; only a {METADATA} in the folder itself is")
    if in_texts and suffix == ".txt":
        raise InputError(f"{path}: is the caption of no image")
    return suffix or "no suffix"


# --- images -------------------------------------------------------------------------------------


def read_picture(path: Path, captions: tuple[str, ...]) -> Picture:
    """Decode an image file once. Raises InputError if it cannot be used."""
    content = read_regular(path)
    image, notes = decode(content, path)
    digest = hashlib.sha256(content).hexdigest()
    return Picture(path, digest, (image.height, image.width), captions, tuple(notes))


def load_picture(picture: Picture, size: tuple[int, int], channels: int) -> np.ndarray:
    """Load an image, resized to `size` (H, W), as uint8 (H, W, 3), or (H, W) for one channel.

    It is scaled (Lanczos) to just cover that size and then center-cropped. Raises InputError if
    the file has changed since the folder was read.
    """
    content = read_regular(picture.path)
    if hashlib.sha256(content).hexdigest() != picture.digest:
        raise InputError(
            f"{picture.path}: has changed since its folder was read; rerun the command"
        )
    image, _ = decode(content, picture.path)
    image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)  # Pillow takes (W, H)
    return to_channels(image, channels)[0]
