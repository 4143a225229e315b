"""Prompts for scenes of coloured digits, and whether an image satisfies them.

A caption says some of what is in a scene: "a small blue seven left of a big green four". A `Prompt`
keeps both its words and what they ask for, so the same object is the caption of a training image
and a question for a judge. Its kinds are GenEval's six (arXiv 2310.11513) and two of our own:

    single object        "a seven"
    two objects          "a seven and a 4"
    counting             "three 7s", "two red threes"
    colours              "a red seven"
    position             "a seven left of a 4", "a 2 in the upper right"
    colour attribution   "a red seven and a blue four"
    all at once          "a small blue seven left of a big green four"
    typography           "the number 4071 in red": digits to be written in this order

GenEval counts an object as present if a detector finds it, whatever else it finds. Here a picture
is right only if it contains nothing else.
"""

from dataclasses import dataclass
from itertools import permutations

from nanosd3.data.class_names import DIGITS
from nanosd3.data.mnist import with_article

GENEVAL = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
ALL_AT_ONCE, TYPOGRAPHY = "all at once", "typography"
QUESTION_KINDS = (*GENEVAL, ALL_AT_ONCE, TYPOGRAPHY)

COLOURS = {  # red, green, blue from 0 to 1
    "red": (1.0, 0.2, 0.2),
    "green": (0.2, 0.85, 0.2),
    "blue": (0.25, 0.45, 1.0),
    "yellow": (1.0, 0.85, 0.0),
    "purple": (0.8, 0.2, 1.0),
    "white": (1.0, 1.0, 1.0),
}
DIGIT_SIZES = {"small": 10, "big": 14}  # the longer side in pixels
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
PLACES = (  # by thirds of the height and of the width
    ("in the upper left", "at the top", "in the upper right"),
    ("on the left", "in the middle", "on the right"),
    ("in the lower left", "at the bottom", "in the lower right"),
)
NUMBERS = {2: "two", 3: "three"}
CanvasSize = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class PlacedDigit:
    """A digit in a picture, as it was drawn or as it is seen, and the box of its ink."""

    label: int
    colour: str
    top: int
    left: int
    height: int
    width: int

    @property
    def centre(self) -> tuple[float, float]:
        """Row and column."""
        return self.top + self.height / 2, self.left + self.width / 2

    @property
    def size(self) -> str:
        middle = sum(DIGIT_SIZES.values()) / 2
        return "big" if max(self.height, self.width) >= middle else "small"


def place_of(centre: tuple[float, float], canvas: CanvasSize, margin: float = 0) -> str:
    """Which ninth of the canvas a centre is in; "" if nearer than `margin` to another ninth."""
    thirds = []
    for x, side in zip(centre, canvas, strict=True):
        if any(abs(x - side * k / 3) < margin for k in (1, 2)):
            return ""
        thirds.append(min(2, max(0, int(3 * x / side))))
    return PLACES[thirds[0]][thirds[1]]


def related(a: tuple[float, float], b: tuple[float, float], relation: str, share: float) -> bool:
    """Whether a is left of b (or right of it, ...): more than `share` of the way from a to b goes
    in that direction (half in GenEval)."""
    way = (b[0] - a[0], b[1] - a[1])
    along = sum(x * y for x, y in zip(way, RELATIONS[relation], strict=True))
    return along > share * (way[0] ** 2 + way[1] ** 2) ** 0.5


@dataclass(frozen=True)
class Asked:
    """What a prompt says about one digit; "" for what it leaves open."""

    label: int
    colour: str = ""
    size: str = ""
    place: str = ""

    def fits(self, digit: PlacedDigit, canvas: CanvasSize) -> bool:
        return (
            digit.label == self.label
            and self.colour in ("", digit.colour)
            and self.size in ("", digit.size)
            and self.place in ("", place_of(digit.centre, canvas))
        )

    def in_words(self, name: str) -> str:
        """'a small blue seven', 'an 8 in the middle', using one of the digit's names."""
        words = with_article(" ".join(word for word in (self.size, self.colour, name) if word))
        return f"{words} {self.place}".strip()


@dataclass(frozen=True)
class Prompt:
    """A caption, and what it asks for."""

    kind: str
    text: str
    asked: tuple[Asked, ...]
    relation: str = ""  # of the first digit to the second

    def followed_by(self, seen: tuple[PlacedDigit, ...], canvas: CanvasSize) -> bool:
        """Whether the digits seen in a picture are the ones asked for, and no others."""
        if self.kind == TYPOGRAPHY:
            return written(seen) == [digit.label for digit in self.asked]
        return len(seen) == len(self.asked) and any(
            all(a.fits(digit, canvas) for a, digit in zip(self.asked, order, strict=True))
            and (not self.relation or related(order[0].centre, order[1].centre, self.relation, 0.5))
            for order in permutations(seen)
        )

    def characters_right(self, seen: tuple[PlacedDigit, ...]) -> float:
        """The share of the characters asked for that are written: 1 less the edit distance over
        their number, and at least 0."""
        asked = [digit.label for digit in self.asked]
        return max(0.0, 1 - edit_distance(asked, written(seen)) / len(asked))


def written(seen: tuple[PlacedDigit, ...]) -> list[int]:
    """What digits say, read from left to right."""
    return [digit.label for digit in sorted(seen, key=lambda digit: digit.left)]


def edit_distance(a: list[int], b: list[int]) -> int:
    """How many items to insert, delete or replace to turn a into b (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def plural(name: str) -> str:
    """'sixes', 'threes', '7s'."""
    return f"{name}es" if name == "six" else f"{name}s"


def make_prompt(
    kind: str, asked: tuple[Asked, ...], names: tuple[int, ...], relation: str = ""
) -> Prompt:
    """A prompt in words; `names` says for each digit which of its names is used, 0 ('seven') or 1
    ('7')."""
    called = [DIGITS[a.label][name] for a, name in zip(asked, names, strict=True)]
    if kind == TYPOGRAPHY:
        colour = f" in {asked[0].colour}" if asked[0].colour else ""
        text = f"the number {''.join(str(a.label) for a in asked)}{colour}"
    elif kind == "counting":
        text = " ".join(w for w in (NUMBERS[len(asked)], asked[0].colour, plural(called[0])) if w)
    else:
        link = f" {relation or 'and'} "
        text = link.join(a.in_words(name) for a, name in zip(asked, called, strict=True))
    return Prompt(kind, text, asked, relation)
