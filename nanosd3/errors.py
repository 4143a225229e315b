"""User-facing errors, and values in their messages."""

from collections.abc import Iterable

SHOWN = 80  # characters of a value in a message


class InputError(ValueError):
    """Invalid user input. The message is one line that says which file, key or option is wrong,
    what was expected, and what to do."""


def shortened(text: str, limit: int = SHOWN) -> str:
    """A text for display: on one line, cut to `limit` characters, without unprintable ones."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return text if len(text) <= limit else f"{text[: limit - 3].rstrip()}..."


def elided(text: str, ends: int = 1000) -> str:
    """A text for display, without its middle if it is longer than both ends: a long path does not
    crowd out what is wrong with it."""
    return text if len(text) <= 2 * ends else f"{text[:ends]} ... {text[-ends:]}"


def shown(value: object) -> str:
    """`repr` for a message: on one line, and cut if it is long, a string with its length."""
    try:
        text = repr(value)
    except ValueError:  # an integer beyond LARGEST
        text = f"{type(value).__name__} of thousands of digits"
    if len(text) <= SHOWN and "\n" not in text:
        return text
    if isinstance(value, str):
        return f"{value[:SHOWN]!r}... ({len(value):,} characters)"
    return shortened(text)


def options_of(names: Iterable[str]) -> str:
    """The command-line options of arguments: "--clip-l, --t5" of clip_l and t5."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def listed(items: list[str], limit: int = 3) -> str:
    """The first of some items, and how many more there are."""
    more = f" and {len(items) - limit:,} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
