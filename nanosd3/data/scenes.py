"""Scenes: handwritten digits in colour, composed by caption, made on the fly.

A `Scene` says which digits are where, and holds the prompt that asks for some of it. The caption,
the picture and the answer to every question follow from it (scene_prompts.py). It is drawn from a
random stream of its own, so scene 17 is the same in every run, and nothing is stored.

Digits are cut out of their images, scaled to one of two sizes and put into slots that are a little
larger, on a grid of 8 pixels. So they never touch, and a small network, whose patches are on that
grid too, need not learn a digit once for every shift. Training scenes are made of MNIST's training
digits, all others of its test digits. Many training scenes of one digit are close-ups: there the
text encoders first learn which word means which digit. Questions for a judge have none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, permutations, product
from typing import TypeVar

import torch
from torch import Tensor

from nanosd3.config_types import Config
from nanosd3.data.class_names import DIGITS
from nanosd3.data.digit_cutouts import Handwriting
from nanosd3.data.mnist import ImageSet
from nanosd3.data.scene_prompts import (
    ALL_AT_ONCE,
    COLOURS,
    DIGIT_SIZES,
    NUMBERS,
    PLACES,
    QUESTION_KINDS,
    RELATIONS,
    TYPOGRAPHY,
    Asked,
    CanvasSize,
    PlacedDigit,
    Prompt,
    make_prompt,
    place_of,
    related,
)
from nanosd3.data.sources import HELD_OUT, contents_of
from nanosd3.random_streams import rng

SCENE_CONFIGS = ("scenes", "tiny-scenes")
CANVASES: tuple[CanvasSize, ...] = ((32, 32), (32, 48))
SLOT, STEP = 16, 8  # side of a digit's slot; slot corners are at multiples of STEP
STRING_CELL = (12, 8)  # height and width of the cell of a digit in a string; two columns stay empty
CLOSE_UP = 28  # pixels, of a digit that fills the picture
CLOSE_UPS = 0.7  # share of the training scenes of one digit, in no particular place
STRING_LENGTHS = (2, 3, 4, 5)  # of strings
KINDS_OF_WIDE = (
    *QUESTION_KINDS,
    TYPOGRAPHY,
    TYPOGRAPHY,
)  # strings are harder: three tenths of wide scenes
CLEAR = 1.5  # pixels from the border of a third, for a place named in a caption
CLEARLY = 0.72  # share of the way along a relation named in a caption: within 44 degrees of it
Corner = tuple[int, int]
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Scene:
    """What is where, and what is asked."""

    canvas: CanvasSize
    digits: tuple[PlacedDigit, ...]
    images: tuple[int, ...]  # whose handwriting: indices of MNIST images
    prompt: Prompt


# --- where ----------------------------------------------------------------------------------------


@cache
def arrangements(
    count: int, canvas: CanvasSize, relation: str = "", place: str = ""
) -> tuple[tuple[Corner, ...], ...]:
    """All ways to put slots on a canvas without overlaps: two of them in `relation`, or a single
    one in `place`, if given."""
    rows, columns = (range(0, side - SLOT + 1, STEP) for side in canvas)
    corners = list(product(rows, columns))
    return tuple(c for c in permutations(corners, count) if suits(c, canvas, relation, place))


def suits(corners: tuple[Corner, ...], canvas: CanvasSize, relation: str, place: str) -> bool:
    """Whether slots at these corners are apart, and clearly where they should be."""
    for a, b in combinations(corners, 2):
        if max(abs(a[0] - b[0]), abs(a[1] - b[1])) < SLOT:
            return False
    centres = [(top + SLOT / 2, left + SLOT / 2) for top, left in corners]
    if relation:
        return related(centres[0], centres[1], relation, CLEARLY)
    return not place or place_of(centres[0], canvas, CLEAR) == place


def slots_of(
    kind: str, count: int, canvas: CanvasSize, relation: str, place: str, u: float
) -> list[tuple[int, int, int, int]]:
    """Slots (top, left, height, width) for digits, picked by u in [0, 1); or a string's cells."""
    if kind == TYPOGRAPHY:
        height, width = STRING_CELL
        top, first = (canvas[0] - height) // 2, (canvas[1] // width - count) // 2
        return [(top, width * (first + k), height, width) for k in range(count)]
    choices = arrangements(count, canvas, relation, place)
    return [(*corner, SLOT, SLOT) for corner in choices[int(u * len(choices))]]


def box_in(slot: tuple[int, int, int, int], ink: Sequence[int], longest: int) -> tuple:
    """The box in the middle of a slot (top, left, height, width) for a digit whose `ink` has this
    height and width: its longer side scaled to `longest`, and narrowed if too wide."""
    top, left, rows, columns = slot
    height, width = (max(1, round(x * longest / max(ink))) for x in ink)
    width = min(width, columns - 2)
    return top + (rows - height) // 2, left + (columns - width) // 2, height, width


# --- what -----------------------------------------------------------------------------------------


def draw_scene(
    kind: str, canvas: CanvasSize, hand: Handwriting, g: torch.Generator, close_up: bool = False
) -> Scene:
    """A random scene for a kind of prompt; with one digit, it may be a close-up."""

    def pick(options: Sequence[Choice]) -> Choice:
        return options[int(torch.randint(len(options), (1,), generator=g))]

    counting, string, everything = (kind == k for k in ("counting", TYPOGRAPHY, ALL_AT_ONCE))
    located = everything or kind == "position"
    counts = {"counting": tuple(NUMBERS), TYPOGRAPHY: STRING_LENGTHS, "two objects": (2,)}
    counts |= {"colour attribution": (2,), "position": (1, 2), ALL_AT_ONCE: (1, 2)}
    count = pick(counts.get(kind, (1,)))
    relation = pick(tuple(RELATIONS)) if located and count == 2 else ""
    place = pick([place for row in PLACES for place in row]) if located and count == 1 else ""

    labels: list[int] = []
    colours: list[str] = []
    for _ in range(count):  # labels may repeat in a string
        labels.append(pick([n for n in range(len(DIGITS)) if string or n not in labels]))
        colours.append(pick([c for c in COLOURS if c not in colours]))
    sizes = [pick(tuple(DIGIT_SIZES)) for _ in range(count)]
    names = [pick((0, 1)) for _ in range(count)]
    if counting or string:
        colours, sizes, names = colours[:1] * count, sizes[:1] * count, names[:1] * count
    if counting:
        labels = labels[:1] * count

    slots = slots_of(kind, count, canvas, relation, place, float(torch.rand(1, generator=g)))
    if close_up:
        slots = [(0, (canvas[1] - canvas[0]) // 2, canvas[0], canvas[0])]
    images = tuple(pick(hand.of_label[label]) for label in labels)
    digits, asked = [], []
    named = everything or "colour" in kind or ((counting or string) and pick((True, False)))
    for label, colour, size, slot, image in zip(labels, colours, sizes, slots, images, strict=True):
        longest = STRING_CELL[0] if string else CLOSE_UP if close_up else DIGIT_SIZES[size]
        box = box_in(slot, hand.boxes[image, 2:].tolist(), longest)
        digits.append(PlacedDigit(label, colour, *box))
        asked.append(Asked(label, colour * named, size * everything, place))
    prompt = make_prompt(kind, tuple(asked), tuple(names), relation)
    return Scene(canvas, tuple(digits), images, prompt)


def draw_pictures(scenes: Sequence[Scene], hand: Handwriting) -> Tensor:
    """Scenes of one size as images (B, 3, H, W) in [-1, 1]."""
    canvas = scenes[0].canvas
    digits = [digit for scene in scenes for digit in scene.digits]
    images = torch.tensor([image for scene in scenes for image in scene.images])
    boxes = torch.tensor([[d.top, d.left, d.height, d.width] for d in digits])
    colours = torch.tensor([COLOURS[d.colour] for d in digits])  # (n, 3)
    scene_of = torch.tensor([i for i, scene in enumerate(scenes) for _ in scene.digits])
    ink = hand.drawn(images, boxes, canvas)  # (n, H, W)
    x = torch.zeros(len(scenes), 3, *canvas)
    x.index_add_(0, scene_of, ink[:, None] * colours[:, :, None, None])
    return x * 2 - 1


# --- the source -----------------------------------------------------------------------------------


class Scenes:
    """Scenes as a `Source`: every second one is wide, and only wide ones have strings.

    There are as many for training as the config has training images, made of all training digits.
    """

    def __init__(self, images: ImageSet, config: Config):
        assert config.training is not None
        self.images, self.config = images, config
        self.hands = {
            "training": Handwriting(images.train_images, images.train_labels),
            "test": Handwriting(images.test_images, images.test_labels),
        }
        self.name = f"scenes of digits from {images.source}"
        self.trained = config.training.train_images
        self.count = self.trained + HELD_OUT
        self.fingerprint = f"scenes-{images.fingerprint}"
        self.contents = contents_of(images)
        self.scenes = [self.scene(i) for i in range(self.count)]
        index: dict[str, int] = {}
        numbers = [index.setdefault(s.prompt.text, len(index)) for s in self.scenes]
        self.texts, self.text_numbers = list(index), torch.tensor(numbers)

    def part(self, number: int) -> str:
        """Whose handwriting a scene has."""
        return "training" if number < self.trained else "test"

    def scene(self, number: int) -> Scene:
        """The scene with this number."""
        generator, wide = rng("scenes", number), number % 2
        kinds = (
            KINDS_OF_WIDE if wide else tuple(kind for kind in QUESTION_KINDS if kind != TYPOGRAPHY)
        )
        kind = kinds[int(torch.randint(len(kinds), (1,), generator=generator))]
        single = kind in ("single object", "colours")
        close_up = single and float(torch.rand(1, generator=generator)) < CLOSE_UPS
        hand = self.hands[self.part(number)]
        return draw_scene(kind, CANVASES[wide], hand, generator, close_up)

    def questions(self, kind: str, count: int, seed: int) -> list[Scene]:
        """Fresh scenes of one kind, with test digits: half of each size, except for strings."""
        canvases = CANVASES[1:] if kind == TYPOGRAPHY else CANVASES
        hand = self.hands["test"]
        return [
            draw_scene(kind, canvases[i * len(canvases) // count], hand, rng(seed, kind, i))
            for i in range(count)
        ]

    def draw(self, batch: int, generator: torch.Generator) -> Tensor:
        wide = torch.randint(2, (1,), generator=generator)
        half = torch.randint(self.trained // 2, (batch,), generator=generator)
        return 2 * half + wide

    def pixels(self, index: Tensor) -> Tensor:
        numbers = index.tolist()
        hand = self.hands[self.part(numbers[0])]  # no batch mixes the parts
        return draw_pictures([self.scenes[i] for i in numbers], hand)

    def captions(self, index: Tensor, u: Tensor) -> Tensor:
        return self.text_numbers[index]

    def key(self, number: int) -> str:
        return f"{self.fingerprint}-{self.trained}-{number}"

    def groups(self, numbers: range) -> list[Tensor]:
        whole = torch.tensor(numbers)
        held = whole >= self.trained
        parts = [whole[(whole % 2 == wide) & (held == h)] for wide in (0, 1) for h in (False, True)]
        return [part for part in parts if len(part)]
