"""What the classes of an image set are called: digits, clothes, or the lines of a classes.txt."""

import unicodedata
from pathlib import Path

from torch import Tensor

from nanosd3.errors import InputError, shown
from nanosd3.storage.user_files import read_lines

Names = tuple[tuple[str, ...], ...]  # for each class, its synonyms

DIGITS: Names = tuple(
    (word, str(i))
    for i, word in enumerate("zero one two three four five six seven eight nine".split())
)
FASHION: Names = tuple(
    (name,)
    for name in "t-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(",")
)
FASHION_FIRST_LABELS = [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]  # of its training set


def class_names(folder: Path, labels: Tensor, packaged: bool) -> tuple[Names, str]:
    """The names of each class, and where they come from."""
    path = folder / "classes.txt"
    if path.exists():
        return tuple((name,) for name in read_classes(path)), "classes.txt"
    if packaged:
        return DIGITS, "digits"
    if labels[:10].tolist() == FASHION_FIRST_LABELS or "fashion" in folder.resolve().name.lower():
        return FASHION, "Fashion-MNIST's, recognised by its first labels or the folder's name"
    return DIGITS, "digits; put a classes.txt into the folder for other names"


def read_classes(path: Path) -> list[str]:
    """The names in a classes.txt, one a line. Raises InputError if two classes have the same."""
    numbers: dict[str, int] = {}  # of the lines
    names = []
    for number, line in enumerate(read_lines(path), 1):
        if name := line.lower().strip():
            first = numbers.setdefault(" ".join(unicodedata.normalize("NFC", name).split()), number)
            if first != number:
                raise InputError(
                    f"{path}: {shown(name)} is in lines {first} and {number}; give each class a "
                    "name of its own"
                )
            names.append(name)
    return names
