"""Scenes: what is asked, what is where, how it is drawn, and the source of training data."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from nanosd3.config import CONFIGS
from nanosd3.data.digit_cutouts import Handwriting, ink_boxes, scaling, transferred
from nanosd3.data.mnist import load_images, to_uint8
from nanosd3.data.scene_prompts import (
    ALL_AT_ONCE,
    COLOURS,
    QUESTION_KINDS,
    TYPOGRAPHY,
    Asked,
    PlacedDigit,
    edit_distance,
    make_prompt,
    place_of,
    related,
)
from nanosd3.data.scenes import CANVASES, SLOT, Scenes, arrangements, draw_pictures
from nanosd3.text import TextEncoders, Tokenizers

CANVAS = (32, 48)


@pytest.fixture(scope="module")
def source() -> Scenes:
    return Scenes(load_images(), CONFIGS["tiny-scenes"])


@pytest.fixture(scope="module")
def questions(source) -> dict:
    return {kind: source.questions(kind, 60, 0) for kind in QUESTION_KINDS}


# --- what is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "asked", "names", "relation", "text"),
    [
        ("single object", (Asked(8),), (0,), "", "an eight"),
        ("two objects", (Asked(7), Asked(4)), (0, 1), "", "a seven and a 4"),
        ("counting", (Asked(6), Asked(6)), (0, 0), "", "two sixes"),
        ("counting", (Asked(3, "red"),) * 3, (1, 1, 1), "", "three red 3s"),
        ("colours", (Asked(8, "red"),), (1,), "", "a red 8"),
        ("position", (Asked(7), Asked(4)), (0, 1), "left of", "a seven left of a 4"),
        ("position", (Asked(2, place="in the upper right"),), (1,), "", "a 2 in the upper right"),
        (
            ALL_AT_ONCE,
            (Asked(7, "blue", "small"), Asked(4, "green", "big")),
            (0, 0),
            "above",
            "a small blue seven above a big green four",
        ),
        (TYPOGRAPHY, tuple(Asked(n) for n in (4, 0, 7, 1)), (0,) * 4, "", "the number 4071"),
        (TYPOGRAPHY, (Asked(1, "red"), Asked(2, "red")), (1, 1), "", "the number 12 in red"),
    ],
)
def test_words(kind, asked, names, relation, text):
    assert make_prompt(kind, asked, names, relation).text == text


def test_places_are_ninths():
    assert place_of((3, 40), (32, 48)) == "in the upper right"
    assert place_of((16, 24), (32, 48)) == "in the middle"
    assert place_of((31.9, 15.9), (32, 48)) == "in the lower left"
    assert place_of((16, 47), (32, 48)) == "on the right"
    assert place_of((16, 17), (32, 48), margin=2) == ""  # the border is at 16
    assert place_of((16, 18), (32, 48), margin=2) == "in the middle"


def test_relations_are_within_sixty_degrees():
    assert related((10, 5), (10, 20), "left of", 0.5)
    assert not related((10, 20), (10, 5), "left of", 0.5)
    assert related((10, 20), (10, 5), "right of", 0.5)
    assert related((5, 10), (20, 10), "above", 0.5) and related((20, 10), (5, 10), "below", 0.5)
    assert related((0, 0), (17, 10), "left of", 0.5)  # 59.5 degrees
    assert not related((0, 0), (18, 10), "left of", 0.5)  # 60.9


def seven(**changes) -> PlacedDigit:
    return replace(PlacedDigit(7, "blue", top=3, left=2, height=10, width=7), **changes)


FOUR = PlacedDigit(4, "green", top=9, left=30, height=14, width=11)
EVERYTHING = make_prompt(
    ALL_AT_ONCE, (Asked(7, "blue", "small"), Asked(4, "green", "big")), (0, 0), "left of"
)


@pytest.mark.parametrize(
    ("seen", "right"),
    [
        ((seven(), FOUR), True),
        ((FOUR, seven()), True),  # in whatever order they are found
        ((seven(),), False),
        ((), False),
        ((seven(), FOUR, seven(top=20)), False),
        ((seven(colour="green"), FOUR), False),
        ((seven(colour="green"), replace(FOUR, colour="blue")), False),  # swapped
        ((seven(left=41), FOUR), False),  # mirrored
        ((seven(height=14), FOUR), False),
        ((seven(label=1), FOUR), False),
        ((seven(label=4), replace(FOUR, label=7)), False),
    ],
)
def test_everything_must_be_right(seen, right):
    assert EVERYTHING.followed_by(seen, CANVAS) is right


def test_what_is_not_asked_may_be_anything():
    two = make_prompt("two objects", (Asked(7), Asked(4)), (0, 0))
    assert two.followed_by((seven(colour="white", left=40), FOUR), CANVAS)
    corner = make_prompt("position", (Asked(7, place="in the upper left"),), (0,))
    assert corner.followed_by((seven(),), CANVAS)
    assert not corner.followed_by((seven(left=38),), CANVAS)
    count = make_prompt("counting", (Asked(7),) * 2, (0, 0))
    assert count.followed_by((seven(), seven(left=20, colour="red")), CANVAS)
    assert not count.followed_by((seven(), FOUR), CANVAS)


def test_strings_are_read_from_left_to_right():
    number = make_prompt(TYPOGRAPHY, tuple(Asked(n, "red") for n in (4, 0, 7)), (0, 0, 0))

    def row(*labels):
        return tuple(seven(label=n, left=8 * k) for k, n in enumerate(labels))

    assert number.followed_by(row(4, 0, 7)[::-1], CANVAS)
    assert not number.followed_by(row(4, 7, 0), CANVAS)
    assert not number.followed_by(row(4, 0), CANVAS)
    assert not number.followed_by(row(4, 0, 7, 7), CANVAS)
    shares = {(4, 0, 7): 1, (4, 0): 2 / 3, (4, 1, 7): 2 / 3, (4, 0, 7, 7): 2 / 3, (): 0}
    for labels, share in shares.items():
        assert number.characters_right(row(*labels)) == pytest.approx(share)
    assert number.characters_right(row(1, 1, 1, 1, 1, 1, 1)) == 0  # not below


def test_edit_distance():
    cases = (("kitten", "sitting", 3), ("flaw", "lawn", 2), ("", "abc", 3), ("abc", "abc", 0))
    for a, b, distance in cases:
        a, b = [[ord(c) for c in word] for word in (a, b)]
        assert edit_distance(a, b) == edit_distance(b, a) == distance


# --- what is where --------------------------------------------------------------------------------


@pytest.mark.parametrize("canvas", CANVASES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_slots_are_apart_and_inside(count, canvas):
    found = arrangements(count, canvas)
    assert len(set(found)) == len(found) > 0
    for corners in found:
        taken = torch.zeros(canvas)
        for top, left in corners:
            assert 0 <= top <= canvas[0] - SLOT and 0 <= left <= canvas[1] - SLOT
            taken[top : top + SLOT, left : left + SLOT] += 1
        assert taken.max() == 1


@pytest.mark.parametrize("canvas", CANVASES)
def test_every_place_and_relation_can_be_had(canvas):
    for row in range(3):
        for column in range(3):
            middle = (canvas[0] * (row + 0.5) / 3, canvas[1] * (column + 0.5) / 3)
            assert arrangements(1, canvas, place=place_of(middle, canvas))
    counts = [len(arrangements(2, canvas, r)) for r in ("left of", "right of", "above", "below")]
    assert counts[0] == counts[1] > 0 and counts[2] == counts[3] > 0


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_scenes_follow_their_own_prompts(questions, kind):
    assert len({scene.prompt.text for scene in questions[kind]}) > 10
    for scene in questions[kind]:
        assert scene.prompt.kind == kind
        assert scene.prompt.followed_by(scene.digits, scene.canvas), scene
        assert [d.label for d in scene.digits] == [a.label for a in scene.prompt.asked]


def test_digits_never_touch_and_stay_inside(questions):
    """Two empty pixels between any two, in one direction at least."""
    for scene in (scene for scenes in questions.values() for scene in scenes):
        for d in scene.digits:
            assert d.top >= 0 and d.top + d.height <= scene.canvas[0]
            assert d.left >= 0 and d.left + d.width <= scene.canvas[1]
        for a, b in combinations(scene.digits, 2):
            rows = max(a.top - b.top - b.height, b.top - a.top - a.height)
            columns = max(a.left - b.left - b.width, b.left - a.left - a.width)
            assert max(rows, columns) >= 2


def test_kinds_have_what_they_are_about(questions):
    for scene in questions["colour attribution"] + questions[ALL_AT_ONCE]:
        assert len({d.colour for d in scene.digits}) == len(scene.digits)
    for scene in questions["counting"]:
        assert len({(d.label, d.colour) for d in scene.digits}) == 1 and len(scene.digits) in (2, 3)
    for scene in questions["position"]:
        assert scene.prompt.relation or scene.prompt.asked[0].place
    strings = questions[TYPOGRAPHY]
    assert {len(scene.digits) for scene in strings} == {2, 3, 4, 5}
    assert all(scene.canvas == (32, 48) for scene in strings)
    halves = Counter(scene.canvas for scene in questions["colours"])
    assert halves == {(32, 32): 30, (32, 48): 30}


# --- the picture ----------------------------------------------------------------------------------


def test_boxes_of_ink():
    ink = torch.zeros(2, 6, 8, dtype=torch.bool)
    ink[0, 2:5, 1:3] = True
    ink[1, 5, 7] = True
    assert ink_boxes(ink).tolist() == [[2, 1, 3, 2], [5, 7, 1, 1]]


def test_scaling_keeps_what_it_should():
    """To the same length: a copy. To half of it: means of neighbours. And only in its part."""
    part, line = torch.tensor([[2, 4]]), torch.arange(8.0)
    assert (scaling(part, torch.tensor([[1, 4]]), 8, 6)[0] @ line).tolist() == [0, 2, 3, 4, 5, 0]
    half = scaling(torch.tensor([[0, 8]]), torch.tensor([[0, 4]]), 8, 4)[0]
    torch.testing.assert_close(half.sum(1), torch.ones(4))
    torch.testing.assert_close((half @ line)[1:3], torch.tensor([2.5, 4.5]))  # (2 + 3) / 2, ...
    double = scaling(part, torch.tensor([[0, 8]]), 8, 8)[0] @ line
    torch.testing.assert_close(double[1:-1], torch.arange(2.25, 5, 0.5))


def test_transferred_fills_its_box():
    image = torch.zeros(1, 28, 28)
    image[0, 4:24, 8:18] = 1.0
    box, to_box = torch.tensor([[4, 8, 20, 10]]), torch.tensor([[3, 5, 10, 5]])
    x = transferred(image, box, to_box, CANVAS)
    assert x.shape == (1, *CANVAS)
    assert ink_boxes(x > 0.5).tolist() == to_box.tolist() and x.sum() == pytest.approx(50)


def test_pictures_show_what_the_scenes_say(source, questions):
    """Each digit fills its box in its colour, is the handwriting it is said to be, and nothing is
    anywhere else."""
    hand = source.hands["test"]
    for canvas in CANVASES:
        scenes = [s for kind in QUESTION_KINDS for s in questions[kind] if s.canvas == canvas][::7]
        pictures = draw_pictures(scenes, hand)
        assert pictures.shape == (len(scenes), 3, *canvas)
        assert pictures.min() == -1 and pictures.max() <= 1
        for scene, x in zip(scenes, (pictures + 1) / 2, strict=True):
            rest = x.clone()
            for d, image in zip(scene.digits, scene.images, strict=True):
                assert hand.labels[image] == d.label
                inside = x[:, d.top : d.top + d.height, d.left : d.left + d.width]
                colour = torch.tensor(COLOURS[d.colour])
                bright = inside.amax(0)
                torch.testing.assert_close(inside, bright * (colour / colour.max())[:, None, None])
                box = ink_boxes(bright[None] > 0.05)[0]
                assert (box - torch.tensor([0, 0, d.height, d.width])).abs().max() <= 1
                rest[:, d.top : d.top + d.height, d.left : d.left + d.width] = 0
            assert not rest.any()


# --- the source -----------------------------------------------------------------------------------


def test_the_same_scenes_every_time(source):
    again = Scenes(load_images(), CONFIGS["tiny-scenes"])
    assert again.scenes == source.scenes and again.texts == source.texts
    more = replace(source.config, training=replace(source.config.training, train_images=600))
    assert Scenes(load_images(), more).scenes[:512] == source.scenes[:512]


def test_training_scenes_are_of_training_digits(source):
    for number in (0, 1, source.trained, source.count - 1):
        scene = source.scenes[number]
        hand = source.hands["training" if number < source.trained else "test"]
        labels = [int(hand.labels[image]) for image in scene.images]
        assert labels == [d.label for d in scene.digits]
        expected = draw_pictures([scene], hand)
        assert torch.equal(source.pixels(torch.tensor([number])), expected)


def test_close_ups_are_in_training_only(source, questions):
    """One digit as high as the picture allows, in the middle, for about 70% of single ones."""
    single = [s for s in source.scenes if s.prompt.kind in ("single object", "colours")]
    near = [s for s in single if max(s.digits[0].height, s.digits[0].width) == 28]
    assert 0.6 < len(near) / len(single) < 0.8
    for scene in near:
        digit = scene.digits[0]
        assert abs(digit.centre[0] - 16) <= 1 and abs(digit.centre[1] - scene.canvas[1] / 2) <= 1
        assert scene.prompt.followed_by(scene.digits, scene.canvas) and digit.size == "big"
    others = [s for s in source.scenes if s not in near]
    for scene in others + [s for scenes in questions.values() for s in scenes]:
        assert all(max(d.height, d.width) <= 14 for d in scene.digits)


def test_batches_have_one_size(source):
    sizes = set()
    for seed in range(8):
        index = source.draw(6, torch.Generator().manual_seed(seed))
        assert index.max() < source.trained
        sizes.add(source.pixels(index).shape[2:])
    assert sizes == {(32, 32), (32, 48)}
    groups = source.groups(range(source.count))
    assert sorted(torch.cat(groups).tolist()) == list(range(source.count))
    for group in groups:
        assert len({source.scenes[i].canvas for i in group.tolist()}) == 1
        assert len({source.part(i) for i in group.tolist()}) == 1


def test_captions_and_keys(source):
    index = torch.tensor([0, 5, 9])
    texts = [source.texts[i] for i in source.captions(index, torch.rand(3)).tolist()]
    assert texts == [source.scenes[i].prompt.text for i in index.tolist()]
    assert len({source.key(i) for i in range(source.count)}) == source.count


@pytest.mark.parametrize("name", ["scenes", "tiny-scenes"])
def test_captions_fit_the_text_encoders(source, name):
    """The longest there can be: everything at once, and five digits in a colour."""
    config = CONFIGS[name]
    tokenizers = Tokenizers.train(source.texts, config.text)
    text = TextEncoders(config.text, tokenizers, None, 128, 96)
    long = ["a small yellow seven right of a small purple three", "the number 90817 in yellow"]
    text.parts = dict.fromkeys(("clip_l", "clip_g", "t5"))
    assert not text.truncated([*source.texts, *long])


def test_drawing_needs_no_special_images():
    """One digit of each class, of one pixel at the least."""
    images = torch.zeros(10, 28, 28, dtype=torch.uint8)
    images[:, 13, 13] = 255
    hand = Handwriting(images, torch.arange(10))
    scene = Scenes.questions(type("S", (), {"hands": {"test": hand}})(), "single object", 2, 0)[0]
    assert to_uint8(draw_pictures([scene], hand)).max() == 255
