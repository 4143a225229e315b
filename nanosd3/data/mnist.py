"""MNIST with captions: the copy in the package, or any folder of IDX files like it.

Captions are made from templates, so that both words and numerals work as prompts. Half of them
add attributes that are measured from the image's moments: stroke weight (thin, bold) and slant
(leaning left, upright, leaning right). So a caption says more than the class, and whether the
model follows it can be measured on samples in the same way.

The thresholds are per class, the terciles of its training images: a one has less ink than an
eight, and a seven leans by nature.
"""

import gzip
import hashlib
import itertools
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from nanosd3.data.class_names import DIGITS, Names, class_names
from nanosd3.errors import InputError, shown
from nanosd3.storage.files import unreadable

MNIST_FOLDER = Path(__file__).parent.parent / "assets" / "mnist"
SIDE = 28
IDX_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
MD5 = {  # of the canonical files, which are in the package
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}

STROKE_WEIGHTS = ("thin", "", "bold")
SLANTS = ("leaning left", "upright", "leaning right")


@dataclass(frozen=True)
class ImageSet:
    """28x28 images, uint8 (n, 28, 28), with class labels (n,) and class names."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    names: Names
    found: int  # training images in the folder
    source: str  # the folder
    why: str  # where the class names come from
    fingerprint: str  # of all images, labels and names

    def first(self, train: int, test: int) -> "ImageSet":
        """The first `train` training and `test` test images.

        Raises InputError if those training images do not include every class.
        """
        missing = sorted(set(range(len(self.names))) - set(self.train_labels[:train].tolist()))
        if missing:
            name, count = self.names[missing[0]][0], min(train, len(self.train_labels))
            raise InputError(
                f"{self.source}: no image of class {shown(name)} (label {missing[0]}) among the "
                f"first {count} training images, expected at least one of each class"
            )
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
        )


# --- IDX files ----------------------------------------------------------------------------------


def find_idx(folder: Path, stem: str) -> Path:
    """Find an IDX file under any of its usual names, gzipped or raw, else raise InputError."""
    for name in (f"{stem}-ubyte.gz", f"{stem}-ubyte", f"{stem}-ubyte.idx"):
        for candidate in (folder / name, folder / name.replace("-idx", ".idx")):
            if candidate.is_file():
                return candidate
    raise InputError(f"{folder}: no {stem}-ubyte or {stem}-ubyte.gz in this folder")


def read_idx(path: Path, dims: int) -> Tensor:
    """Read an IDX file of unsigned bytes in `dims` dimensions, gzipped or raw.

    Raises InputError if it is truncated, damaged or of another kind.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); copy it again") from None
    except OSError as error:
        raise unreadable(path, error) from None
    magic = bytes([0, 0, 8, dims])
    if content[:4] != magic:
        start = content[:4].hex() or "an empty file"
        raise InputError(
            f"{path}: not an IDX file of bytes in {dims} dimensions (starts with {start}, "
            f"expected {magic.hex()})"
        )
    header = 4 + 4 * dims
    if len(content) < header:
        raise InputError(f"{path}: truncated inside its header; copy it again")
    shape = struct.unpack(f">{dims}I", content[4:header])
    size = torch.Size(shape).numel()
    if len(content) - header != size:
        raise InputError(
            f"{path}: has {len(content) - header} bytes of data, but its header says {size}; "
            "copy it again"
        )
    if size == 0:
        raise InputError(f"{path}: holds no items")
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).view(shape)


def load_images(folder: str | Path | None = None) -> ImageSet:
    """Load the MNIST in the package (verifying checksums), or the four IDX files of `folder`.

    Raises InputError for files that are missing, damaged, or do not match in size, for a single
    image, and for labels without a class name.
    """
    root = MNIST_FOLDER if folder is None else Path(folder)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    paths = [find_idx(root, stem) for stem in IDX_FILES]
    if folder is None:
        for path in paths:
            if hashlib.md5(path.read_bytes()).hexdigest() != MD5[path.name]:
                raise InputError(
                    f"{path}: checksum differs from the canonical MNIST file's; reinstall nanosd3"
                )
    parts = [read_idx(path, dims) for path, dims in zip(paths, (3, 1, 3, 1), strict=True)]
    for images, labels, path in ((parts[0], parts[1], paths[0]), (parts[2], parts[3], paths[2])):
        if images.shape[1:] != (SIDE, SIDE):
            height, width = images.shape[1:]
            raise InputError(f"{path}: images are {height}x{width}, expected {SIDE}x{SIDE}")
        if len(images) != len(labels):
            raise InputError(f"{path}: {len(images)} images but {len(labels)} labels")
        if len(images) < 2:
            raise InputError(
                f"{path}: holds one image, expected at least two: the metrics are about how "
                "images differ"
            )
    labels = parts[1].long()
    names, why = class_names(root, labels, packaged=folder is None)
    for part, path in ((labels, paths[1]), (parts[3].long(), paths[3])):
        if int(part.max()) >= len(names):
            raise InputError(
                f"{path}: label {int(part.max())}, but only {len(names)} class names; put one "
                f"name a line into {root / 'classes.txt'}"
            )
    content = b"".join(part.numpy().tobytes() for part in parts) + repr(names).encode()
    return ImageSet(
        train_images=parts[0],
        train_labels=labels,
        test_images=parts[2],
        test_labels=parts[3].long(),
        names=names,
        found=len(labels),
        source=str(folder or "the package"),
        why=why,
        fingerprint=hashlib.md5(content).hexdigest(),
    )


def from_uint8(pixels: Tensor) -> Tensor:
    """Pixels 0 to 255, of any shape, as float in [-1, 1], as networks take them."""
    return pixels.float() / 127.5 - 1


def to_model(images: Tensor, size: int) -> Tensor:
    """Convert uint8 (B, 28, 28) to float (B, 1, size, size) in [-1, 1], padded with black."""
    pad = (size - SIDE) // 2
    x = from_uint8(images)
    return torch.nn.functional.pad(x[:, None], (pad, pad, pad, pad), value=-1.0)


def to_uint8(x: Tensor) -> Tensor:
    """Convert float (B, C, H, W) in [-1, 1] to uint8 (B, H, W, C), or (B, H, W) for C = 1."""
    x = ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    return x[..., 0] if x.shape[-1] == 1 else x


# --- measuring images ---------------------------------------------------------------------------


def measure_strokes(images: Tensor) -> tuple[Tensor, Tensor]:
    """Measure stroke weight and slant, each (B,), of uint8 images (B, H, W) from their moments.

    Weight is ink (the zeroth moment) divided by spread (the root of the sum of the second central
    moments): about proportional to the stroke width, whatever the digit's size. Slant is the shift
    to the right per row upwards, -mu11 / mu02: 0 is upright, 1 leans right by 45 degrees.
    """
    ink = images.float() / 255
    y, x = torch.arange(ink.shape[1]).double(), torch.arange(ink.shape[2]).double()
    rows, columns = ink.sum(2).double(), ink.sum(1).double()  # (B, H), (B, W)
    mass = rows.sum(1).clamp(min=1e-6)
    my, mx = rows @ y / mass, columns @ x / mass
    yy = rows @ y**2 / mass - my**2
    xx = columns @ x**2 / mass - mx**2
    xy = (ink @ x.float()).double() @ y / mass - mx * my
    weight = mass / (xx + yy).clamp(min=1e-6).sqrt()
    return weight.float(), (-xy / yy.clamp(min=1e-6)).float()


def thirds(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The two terciles of each class: (classes, 2)."""
    q = torch.tensor([1 / 3, 2 / 3])
    return torch.stack([values[labels == c].quantile(q) for c in range(classes)])


def bins(values: Tensor, labels: Tensor, limits: Tensor) -> Tensor:
    """The third of its class, 0, 1 or 2, that each value falls into."""
    return (values[:, None] > limits[labels]).sum(1)


# --- captions -----------------------------------------------------------------------------------


def with_article(phrase: str) -> str:
    """'a seven', 'a one', 'an eight', 'an 8', 'an upright four'."""
    an = phrase[0] in "aeiou8" and phrase.split()[0] != "one"
    return ("an " if an else "a ") + phrase


def plain_captions(names: Names, label: int) -> list[str]:
    """Captions that only name the class."""
    captions = []
    for name in names[label]:
        captions += [name, with_article(name)]
        if names is DIGITS:
            captions += [f"the digit {name}", f"the number {name}", f"a handwritten {name}"]
        else:
            captions += [f"the {name}", f"a photo of {with_article(name)}"]
    return captions


def describe(name: str, weight: str, slant: str, kind: str = "") -> str:
    """'a bold handwritten seven leaning right', 'a thin upright 4', ..."""
    upright, leaning = (slant, "") if slant == "upright" else ("", slant)
    words = " ".join(word for word in (weight, upright, kind, name) if word)
    return f"{with_article(words)} {leaning}".strip()


def measured_captions(names: Names, label: int, weight: str, slant: str) -> list[str]:
    """Captions that add weight, slant or both; a medium weight (an empty word) is left out."""
    kinds = ("", "handwritten", "digit") if names is DIGITS else ("",)
    pairs = ((weight, ""), ("", slant), (weight, slant)) if weight else (("", slant),)
    return [
        describe(name, *pair, kind)
        for pair in pairs
        for name, kind in itertools.product(names[label], kinds)
    ]


@dataclass(frozen=True)
class Captions:
    """All distinct captions of an image set, and which of them fit which image."""

    texts: list[str]
    choices: Tensor  # (classes, 3 weights, 3 slants, k): indices into texts, half of them plain

    def draw(self, labels: Tensor, weight: Tensor, slant: Tensor, u: Tensor) -> Tensor:
        """Draw the index of a caption for each image (B,), using u (B,), uniform in [0, 1)."""
        k = (u * self.choices.shape[3]).long()
        return self.choices[labels, weight, slant, k]


def make_captions(names: Names) -> Captions:
    """All captions for images of these classes."""
    texts: dict[str, int] = {}
    rows = []
    for label, weight, slant in itertools.product(range(len(names)), STROKE_WEIGHTS, SLANTS):
        plain = plain_captions(names, label)
        measured = measured_captions(names, label, weight, slant)
        equal_shares = plain * len(measured) + measured * len(plain)
        rows.append([texts.setdefault(text, len(texts)) for text in equal_shares])
    longest = max(len(row) for row in rows)  # a multiple of every other row's length
    rows = [row * (longest // len(row)) for row in rows]
    return Captions(list(texts), torch.tensor(rows).view(len(names), 3, 3, -1))
