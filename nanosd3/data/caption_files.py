"""The captions in a folder: an x.txt beside x.png, or one metadata.jsonl.

Names are compared in Unicode form NFC, since macOS may write the same name in another form. Names
that differ in case or by a backslash do not match; the error message points them out.
"""

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from nanosd3.data.formats import UNREAD_SUFFIXES
from nanosd3.errors import InputError, shown
from nanosd3.storage.files import parse_json
from nanosd3.storage.user_files import read_lines

METADATA = "metadata.jsonl"
OTHER_SUFFIXES = (".caption", ".cap", ".json", ".yaml", ".xmp")  # used for captions elsewhere


class PathIndex:
    """Some paths below `root`, found by a name that is the same or similar."""

    def __init__(self, root: Path, paths: Iterable[Path]):
        self.root, self.paths = root, set(paths)
        self.same = {composed(path): path for path in self.paths}
        self.similar = {folded(path): path for path in self.paths}

    def find(self, path: Path) -> Path | None:
        """The path with this name, in whatever Unicode form."""
        return path if path in self.paths else self.same.get(composed(path))

    def hint(self, path: Path) -> str:
        """A few words about a path with a similar name, if there is one."""
        near = self.similar.get(folded(path))
        if near is None:
            return ""
        name = near.relative_to(self.root).as_posix()
        backslash = "\\" in name + path.relative_to(self.root).as_posix()
        return f"; {name} " + ("has \\ for /" if backslash else "differs in upper and lower case")


def composed(path: Path) -> str:
    """The normalised name, equal for equivalent names."""
    return unicodedata.normalize("NFC", path.as_posix())


def folded(path: Path) -> str:
    """A key that is equal for names that may have been meant to be the same."""
    return composed(path).replace("\\", "/").casefold()


class CaptionFiles(Protocol):
    """The captions of a folder's images."""

    named: set[Path]  # files that were read or reported

    def of(self, path: Path) -> tuple[str, ...]:
        """The captions of an image. Raises InputError if there is none."""


class TextFiles:
    """An x.txt beside each x.png, one caption a line; `files` are all those in the folder."""

    def __init__(self, root: Path, files: Iterable[Path]):
        self.texts = PathIndex(root, (path for path in files if path.suffix.lower() == ".txt"))
        foreign = (path for path in files if path.suffix.lower() in OTHER_SUFFIXES)
        self.foreign = {folded(path.with_suffix("")): path.name for path in foreign}
        self.named = set[Path]()
        for path in files:
            if path.suffix.lower() in UNREAD_SUFFIXES:  # of an image that is itself reported
                text = path.with_suffix(".txt")
                self.named.add(self.texts.find(text) or text)

    def of(self, path: Path) -> tuple[str, ...]:
        wanted = path.with_suffix(".txt")
        text = self.texts.find(wanted)
        self.named.add(text or self.texts.similar.get(folded(wanted), wanted))
        if text or wanted.exists():
            return stripped(read_lines(text or wanted), path)
        hint = self.texts.hint(wanted)
        if not hint and (name := self.foreign.get(folded(path.with_suffix("")))):
            hint = f"; {name} is not read"
        raise InputError(f"{path}: no caption (no .txt beside it{hint})")


class Metadata:
    """Lines of metadata.jsonl such as {"file_name": "x.png", "text": "a cat"}.

    Raises InputError for a bad line.
    """

    def __init__(self, root: Path, files: Iterable[Path]):
        self.named = {root / METADATA}
        self.files, self.captions = PathIndex(root, files), dict[Path, list[str]]()
        for number, line in enumerate(read_lines(root / METADATA), 1):
            if line.strip():
                name, texts = parse_line(line, f"{root / METADATA}, line {number}")
                path = self.files.find(root / name) or root / name
                self.captions.setdefault(path, []).extend(texts)
        self.names = PathIndex(root, self.captions)

    def of(self, path: Path) -> tuple[str, ...]:
        if path not in self.captions:
            hint = self.names.hint(path)
            raise InputError(f"{path}: no caption (no line of {METADATA} names it{hint})")
        hint = "" if path in self.files.paths else self.files.hint(path)
        if hint:
            raise InputError(f"{path}: no such file{hint}")
        return stripped(self.captions[path], path)


def parse_line(line: str, place: str) -> tuple[str, list[str]]:
    """The file name and the captions in one line of metadata.jsonl."""
    entry = parse_json(line, place)
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


def stripped(texts: Iterable[str], path: Path) -> tuple[str, ...]:
    """The captions of an image, without blank ones. Raises InputError if none is left."""
    captions = tuple(text.strip() for text in texts if text.strip())
    if not captions:
        raise InputError(f"{path}: its caption is empty")
    return captions
