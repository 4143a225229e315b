"""A folder of images with captions, in one of two layouts.

    x.png and x.txt beside it      a caption a line; a picture may have several
    metadata.jsonl in the folder   lines such as {"file_name": "x.png", "text": "a cat"}

Where there is a metadata.jsonl, it decides. Its names are relative to the folder, its texts one
string or a list of them, and further lines of the same name add captions. Folders within the
folder are read too. Names that begin with a dot belong to the system and are left out.

Every large collection has a few bad files in it, and none of them may stop a training run after
a day. So each picture is decoded once before anything else happens, and what cannot be used is
left out, but never silently: `skipped` names each file and says why.
"""

import hashlib
import io
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from nanosd3.images import is_deep
from nanosd3.runtime import InputError

METADATA = "metadata.jsonl"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no EPS: it would be run, not read
MANY = 300  # pictures, from which on progress is shown to whoever watches (disable=None)
LAYOUTS = (f'put an x.txt beside x.png, a caption a line, or a {METADATA} into the folder with '
           'lines such as {"file_name": "x.png", "text": "a cat"}')  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """A file that was decoded without fault, and what it shows in words."""

    path: Path
    digest: str  # sha256 of the file's bytes
    size: tuple[int, int]  # height and width, upright
    captions: tuple[str, ...]


@dataclass(frozen=True)
class ImageFolder:
    """The pictures that can be used, by name, and a line for each that cannot."""

    root: Path
    pictures: tuple[Picture, ...]
    skipped: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """A sha256 of all names, contents and captions: the same wherever the folder lies."""
        rows = [(p.path.relative_to(self.root).as_posix(), p.digest, p.captions)
                for p in self.pictures]  # fmt: skip
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_folder(root: Path) -> ImageFolder:
    """Find, decode and caption the pictures of a folder.

    Raises InputError if there is no such folder, metadata.jsonl is damaged, or no picture is left:
    none in it, none with a caption, none that is sound.
    """
    if not root.is_dir():
        wrong = "is a file, expected a folder of images" if root.exists() else "no such folder"
        raise InputError(f"{root}: {wrong}")
    listed = read_metadata(root) if (root / METADATA).exists() else None
    paths = sorted({*find_pictures(root), *(listed or ())}, key=Path.as_posix)
    if not paths:
        raise InputError(f"{root}: no images in it ({', '.join(SUFFIXES)})")
    skipped: list[str] = []
    captions = sift(paths, lambda path: captions_of(path, listed), skipped)
    if not captions:
        raise InputError(f"{root}: no captions for any of {len(paths)} images; {LAYOUTS} "
                         f"(first: {skipped[0]})")  # fmt: skip
    bar = tqdm(captions, "images", leave=False, disable=len(captions) < MANY or None)
    pictures = sift(bar, lambda path: read_picture(path, captions[path]), skipped)
    if not pictures:
        raise InputError(f"{root}: none of {len(paths)} images can be used (first: {skipped[0]})")
    return ImageFolder(root, tuple(pictures.values()), tuple(skipped))


def sift(paths: Iterable[Path], read: Callable[[Path], T], skipped: list[str]) -> dict[Path, T]:
    """What `read` makes of each path. The error lines of those it refuses go to `skipped`."""
    kept = {}
    for path in paths:
        try:
            kept[path] = read(path)
        except InputError as error:
            skipped.append(str(error).encode(errors="backslashreplace").decode())  # odd file names
    return kept


def find_pictures(root: Path) -> list[Path]:
    """The files below `root` named like pictures. Raises InputError for folders it cannot read."""
    found, seen, failed = [], set(), []
    for here, folders, files in os.walk(root, onerror=failed.append, followlinks=True):
        if os.path.realpath(here) in seen:  # a link led back
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = (name for name in files if Path(name).suffix.lower() in SUFFIXES)
        found += [Path(here, name) for name in pictures if not name.startswith(".")]
    for error in failed:
        raise InputError(f"{error.filename}: cannot be read ({error.strerror})")
    return found


# --- captions -----------------------------------------------------------------------------------


def captions_of(path: Path, listed: dict[Path, list[str]] | None) -> tuple[str, ...]:
    """What `read_metadata` listed for a picture, or if it is None the lines beside the picture."""
    if listed is None:
        texts, lack = read_lines(path.with_suffix(".txt")), "no .txt beside it"
    else:
        texts, lack = listed.get(path), f"no line of {METADATA} names it"
    if texts is None:
        raise InputError(f"{path}: no caption ({lack})")
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
    """The texts of each file that metadata.jsonl names. Raises InputError naming the line."""
    path = root / METADATA
    listed: dict[Path, list[str]] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), 1):
        if line.strip():
            name, texts = read_line(line, f"{path}, line {number}")
            listed.setdefault(root / name, []).extend(texts)
    return listed


def read_line(line: bytes, place: str) -> tuple[str, list[str]]:
    """The file name and the texts in one line of metadata.jsonl."""
    try:
        entry = json.loads(line)
        json.dumps(entry, ensure_ascii=False).encode()  # fails for half a character, "\ud800"
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: not valid JSON ({error})") from None
    if not isinstance(entry, dict):
        raise InputError(f"{place}: expected an object, got a {type(entry).__name__}")
    name, text = entry.get("file_name"), entry.get("text")
    if not isinstance(name, str) or not name:
        raise InputError(f"{place}: no file_name, or it is not a string")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{place}: file_name {name!r} leads out of the folder")
    texts = text if isinstance(text, list) else [text]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"{place}: no text, or it is neither a string nor a list of strings")
    return name, texts


# --- pictures -----------------------------------------------------------------------------------


def read_bytes(path: Path) -> bytes:
    try:
        if path.is_file() or not path.exists():  # reading a pipe or device might never end
            return path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None
    raise InputError(f"{path}: is not a file")


def read_picture(path: Path, captions: tuple[str, ...]) -> Picture:
    content = read_bytes(path)
    width, height = decode(content, path).size
    return Picture(path, hashlib.sha256(content).hexdigest(), (height, width), captions)


def load_picture(picture: Picture, size: tuple[int, int], channels: int) -> np.ndarray:
    """A picture as uint8 (H, W, 3), or (H, W) for one channel, of exactly the size (H, W).

    It is enlarged or shrunk (Lanczos) until it just covers that size; what sticks out is cut off,
    as much on one side as on the other. Raises InputError if the file is no longer what it was.
    """
    content = read_bytes(picture.path)
    if hashlib.sha256(content).hexdigest() != picture.digest:
        raise InputError(f"{picture.path}: has changed since its folder was read; start again")
    image = decode(content, picture.path)
    image = ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS)  # Pillow says (W, H)
    return np.array(image.convert("RGB" if channels == 3 else "L"))


def decode(content: bytes, path: Path) -> Image.Image:
    """The picture in the bytes of a file: upright, RGB, on white where it is transparent.

    For a single picture of a user nothing should be guessed: images.plain refuses what is
    ambiguous. For a training set the usual conventions hold: EXIF says which way is up, palettes
    and greys become colours, colour profiles are left alone. Raises InputError for several
    frames, for more than 8 bits a channel and for damaged files.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is an error, too
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # a photo with its preview, from a phone
                raise InputError(f"{path}: has {frames} frames, expected a still")
            if is_deep(image):
                raise InputError(f"{path}: has more than 8 bits a channel")
            return on_white(ImageOps.exif_transpose(image))
    except InputError:
        raise
    except UnidentifiedImageError:
        raise InputError(f"{path}: is not a picture of a known format") from None
    except Exception as error:  # whatever a damaged file makes of the parser
        raise InputError(f"{path}: damaged or too large ({error})") from None


def on_white(image: Image.Image) -> Image.Image:
    """RGB; what lies behind a transparent pixel is white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return white.convert("RGB")
