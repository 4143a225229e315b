"""Read files that users wrote, such as images, captions and answers to exercises.

Text is UTF-8, with or without a byte order mark. Any other encoding would be misread or
fail, so it is rejected.
"""

import codecs
import io
from pathlib import Path

from nanosd3.errors import InputError
from nanosd3.storage.files import read_regular

WIDE_MARKS = {  # byte order marks; UTF-32 first, since its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises InputError as `read_regular` and `decode_text` do."""
    return decode_text(read_regular(path), path)


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, with their ends. Form feeds, U+2028 and others, at which
    str.splitlines splits too, do not end a line. Raises InputError as `read_text` does."""
    return list(io.StringIO(read_text(path), newline=None))


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
