"""Text files as editors on any system save them."""

import codecs

import pytest

from nanosd3.errors import InputError
from nanosd3.storage.user_files import decode_text, read_text

TEXT = "ein Kätzchen\r\n猫\n"


@pytest.mark.parametrize("content", [TEXT.encode(), TEXT.encode("utf-8-sig")])
def test_utf_8_with_and_without_a_mark(tmp_path, content):
    (tmp_path / "a.txt").write_bytes(content)
    assert read_text(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("zwei\nBären".encode("latin-1"), ", line 2: is not valid UTF-8 (byte 6)"),
        (codecs.BOM_UTF8 + b"a\n\xff", ", line 2: is not valid UTF-8 (byte 5)"),
        ("a cat\n猫".encode()[:-1], ", line 2: is not valid UTF-8 (byte 6)"),  # cut short
        ("猫".encode("shift-jis"), ", line 1: is not valid UTF-8 (byte 0)"),
        ("中国".encode("gb18030"), ", line 1: is not valid UTF-8 (byte 0)"),
        (b"\xed\xa0\x80", ", line 1: is not valid UTF-8 (byte 0)"),  # a lone surrogate
        (b"\xc0\x80", ", line 1: is not valid UTF-8 (byte 0)"),  # a NUL as Java writes it
        (TEXT.encode("utf-16"), ": is UTF-16 text"),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), ": is UTF-16 text"),
        (TEXT.encode("utf-32"), ": is UTF-32 text"),
        ("a cat".encode("utf-16-le"), ": holds a NUL (byte 1), as UTF-16 does"),
        ("a cat".encode("utf-16-be"), ": holds a NUL (byte 0), as UTF-16 does"),
        (b"a cat\0", ": holds a NUL (byte 5), as UTF-16 does"),
        (b"a" + bytes(9), ": holds a NUL (byte 1), as UTF-16 does"),  # of a computer that crashed
    ],
)
def test_what_is_not_utf_8_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as refusal:
        read_text(path)
    assert str(refusal.value) == f"{path}{message}; save it as UTF-8"


def test_files_that_declare_their_encoding():
    assert decode_text("# coding: latin-1\n'ä'".encode("latin-1"), "a.py", "latin-1").endswith(
        "'ä'"
    )
    with pytest.raises(InputError, match=r"a\.py, line 1: is not valid ASCII \(byte 0\)"):
        decode_text("ä".encode(), "a.py", "ascii")
