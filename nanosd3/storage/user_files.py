"""Read files that users wrote, such as images, captions and answers to exercises.

Text is UTF-8, with or without a byte order mark. Anything else would be read as other words, or not
at all, so it is refused by name.
"""

import codecs
from pathlib import Path

from nanosd3.errors import InputError

WIDE_MARKS = {  # byte order marks; UTF-32 first, as its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises InputError if it cannot be read."""
    try:
        if path.is_file() or not path.exists():  # reading a pipe or device might never end
            return path.read_bytes()
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None
    raise InputError(f"{path}: is not a file")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises InputError as `read_bytes` and `decode_text` do."""
    return decode_text(read_bytes(path), path)


def decode_text(content: bytes, name: object, encoding: str = "utf-8") -> str:
    """The text of a file's content, without a byte order mark.

    `encoding` may be another one that the content itself declares, as Python files can. Raises
    InputError for invalid bytes, UTF-16, UTF-32 and NULs, naming the file as `name`.
    """
    for mark, wide in WIDE_MARKS.items():
        if content.startswith(mark):
            raise InputError(f"{name}: is {wide} text; save it as UTF-8")
    if (at := content.find(0)) >= 0:
        raise InputError(f"{name}: holds a NUL (byte {at}), as UTF-16 does; save it as UTF-8")
    start = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        return content[start:].decode(encoding)
    except UnicodeDecodeError as error:
        at = start + error.start
        line = content.count(b"\n", 0, at) + 1
        problem = f"is not valid {error.encoding.upper()} (byte {at}); save it as UTF-8"
        raise InputError(f"{name}, line {line}: {problem}") from None
