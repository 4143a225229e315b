"""The judge of scenes, nano GenEval and typography, on scenes with known answers, wrong ones too.

The classifier is replaced by one that has seen the very digits of the test, so that nothing depends
on how well it was trained; the slow test trains the real one.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nanosd3.config import CONFIGS
from nanosd3.data.digit_cutouts import Handwriting
from nanosd3.data.mnist import load_images, to_uint8
from nanosd3.data.scene_prompts import (
    ALL_AT_ONCE,
    COLOURS,
    DIGIT_SIZES,
    GENEVAL,
    QUESTION_KINDS,
    TYPOGRAPHY,
    PlacedDigit,
)
from nanosd3.data.scenes import CANVASES, Scenes, box_in, draw_pictures, draw_scene
from nanosd3.random_streams import rng
from nanosd3.storage.run import Run
from nanosd3.training.geneval import (
    answers,
    draw_questions,
    geneval_scores,
    in_a_table,
    real,
)
from nanosd3.training.scene_judge import (
    SceneJudge,
    masks_of,
    nearest_colour,
    pieces,
    practice,
    readable,
    train_scene_judge,
)
from nanosd3.training.stages import Job

CPU = torch.device("cpu")
PICKED = 50  # digits of the test, of which none falls into pieces


class Templates(nn.Module):
    """Reads digits by the nearest of those that it knows."""

    def __init__(self, hand: Handwriting):
        super().__init__()
        boxes, labels, images = [], [], []
        for i, label in enumerate(hand.labels.tolist()):
            ink = hand.boxes[i, 2:].tolist()
            for slot, longest in (((0, 0, 16, 16), 10), ((0, 0, 16, 16), 14), ((0, 0, 12, 8), 12)):
                boxes.append(box_in(slot, ink, longest))
                labels.append(label)
                images.append(i)
        drawn = hand.drawn(torch.tensor(images), torch.tensor(boxes), (16, 16))
        drawn = drawn * (drawn > 0.35)
        self.known = readable(drawn, torch.tensor(boxes)).flatten(1)
        self.labels = torch.tensor(labels)

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.flatten(1), self.known).argmin(1)
        return nn.functional.one_hot(self.labels[nearest], 10).float()


def whole_digits(hand: Handwriting) -> Handwriting:
    """The first digits of each class whose ink is in one piece."""
    chosen = []
    for numbers in hand.of_label:
        first = torch.tensor(numbers[:20])
        whole = [
            n for n, x in zip(first, hand.images[first], strict=True)
            if len(pieces(x[None] > 80, string=False).unique()) == 2
        ]  # fmt: skip
        chosen += whole[: PICKED // 10]
    numbers = torch.stack(chosen)
    return Handwriting(hand.images[numbers], hand.labels[numbers])


@pytest.fixture(scope="module")
def source() -> Scenes:
    scenes = Scenes(load_images(), CONFIGS["tiny-scenes"])
    scenes.hands = scenes.hands | {"test": whole_digits(scenes.hands["test"])}
    return scenes


@pytest.fixture(scope="module")
def judge(source) -> SceneJudge:
    return SceneJudge(Templates(source.hands["test"]), CPU)


@pytest.fixture(scope="module")
def questions(source) -> dict:
    return draw_questions(source, 8 * 40, 0)


# --- finding --------------------------------------------------------------------------------------


def test_pieces_reach_over_one_pixel():
    ink = torch.zeros(1, 8, 12, dtype=torch.bool)
    ink[0, 1, [1, 3, 6]] = True  # one pixel between the first two, two before the third
    ink[0, 6, [1, 2]] = True
    numbers = pieces(ink, string=False)[0]
    assert numbers[1, 1] == numbers[1, 3] != numbers[1, 6] and numbers[6, 1] == numbers[6, 2]
    assert len(numbers.unique()) == 4 and not (numbers[~ink[0]]).any()


def test_pieces_of_a_string_are_columns():
    ink = torch.zeros(1, 8, 12, dtype=torch.bool)
    ink[0, 1, [1, 2]] = ink[0, 7, [2, 3]] = ink[0, 4, 5] = True  # column 4 is empty
    numbers = pieces(ink, string=True)[0]
    assert numbers[1, 1] == numbers[7, 3] != numbers[4, 5]


def test_pieces_wind():
    """However long the way from one end of a piece to the other is."""
    ink = torch.zeros(1, 16, 16, dtype=torch.bool)
    ink[0, ::4] = True
    for k in range(3):
        ink[0, 4 * k : 4 * k + 4, -1 if k % 2 == 0 else 0] = True
    assert len(pieces(ink, string=False).unique()) == 2


def test_strokes_are_of_one_digit_if_their_boxes_touch():
    ink = torch.zeros(1, 20, 20, dtype=torch.bool)
    ink[0, 2:12, 4] = ink[0, 2, 4:6] = ink[0, 11, 4:12] = True  # an L
    ink[0, 3:9, 8] = True  # inside its box, three pixels away
    ink[0, 14:19, 14:16] = True
    ink[0, 0, 19] = True  # a speck
    found = masks_of(ink, string=False)
    assert sorted(int(mask.sum()) for _, mask in found) == [10, 24]
    assert masks_of(torch.zeros_like(ink), string=False) == []


def test_colours_by_their_names():
    for name, rgb in COLOURS.items():
        for brightness in (0.2, 1.0, 30.0):
            assert nearest_colour(torch.tensor(rgb) * brightness) == name
    assert nearest_colour(torch.zeros(3)) in COLOURS
    assert nearest_colour(torch.tensor([0.61, 1.0, 0.1])) == "green"  # though not as bright as it


def test_haze_is_not_read(source, judge, questions, monkeypatch):
    """Only ink goes to the classifier."""
    inks = []
    read = judge.read
    monkeypatch.setattr(judge, "read", lambda ink, boxes: inks.append(ink) or read(ink, boxes))
    scene = questions["single object"][0]
    picture = to_uint8(draw_pictures([scene], source.hands["test"])).clamp(min=80)
    judge.see(picture)
    assert not ((inks[0] > 0) & (inks[0] < 0.35)).any() and inks[0].any()


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_what_is_drawn_is_seen(source, judge, questions, kind):
    """Labels, colours and boxes, of at least 97 of 100 digits."""
    hits = total = 0
    for canvas in CANVASES:
        scenes = [scene for scene in questions[kind] if scene.canvas == canvas]
        if not scenes:
            continue
        pictures = to_uint8(draw_pictures(scenes, source.hands["test"]))
        for scene, seen in zip(scenes, judge.see(pictures, kind == TYPOGRAPHY), strict=True):
            total += len(scene.digits)
            for digit in scene.digits:
                hits += any(
                    (digit.label, digit.colour, digit.size)
                    == (other.label, other.colour, other.size)
                    and abs(digit.top - other.top) + abs(digit.left - other.left) <= 2
                    for other in seen
                )
    assert hits >= 0.97 * total


def test_nothing_is_seen_in_the_dark(judge):
    assert judge.see(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)) == [(), ()]
    grey = torch.full((1, 32, 48, 3), 60, dtype=torch.uint8)
    assert judge.see(grey) == [()]


# --- answers --------------------------------------------------------------------------------------


def test_real_scenes_are_right(source, judge, questions):
    scores = geneval_scores(judge, questions, real(source.hands["test"]))
    for kind in (*GENEVAL, ALL_AT_ONCE):
        assert scores[kind] >= 0.97, kind
    assert scores["nano_geneval"] == pytest.approx(sum(scores[k] for k in GENEVAL) / 6)
    assert scores[TYPOGRAPHY]["exact"] >= 0.97 and scores[TYPOGRAPHY]["characters"] >= 0.99
    assert set(scores[TYPOGRAPHY]["exact_by_length"]) <= {2, 3, 4, 5}


def test_the_score_is_of_genevals_six(source, judge, questions, monkeypatch):
    """Everything at once does not count; and only strings are looked at as strings."""
    hand, see, looked = source.hands["test"], judge.see, []
    monkeypatch.setattr(judge, "see", lambda x, string: looked.append(string) or see(x, string))

    def drawn(scenes):
        pictures = real(hand)(scenes)
        return 0 * pictures if scenes[0].prompt.kind in (ALL_AT_ONCE, "counting") else pictures

    scores = geneval_scores(judge, questions, drawn)
    assert scores[ALL_AT_ONCE] == scores["counting"] == 0
    assert scores["nano_geneval"] == pytest.approx(5 / 6, abs=0.03)
    assert looked == [False] * 2 * 7 + [True]


def other_colour(digit: PlacedDigit) -> PlacedDigit:
    names = list(COLOURS)
    return replace(digit, colour=names[names.index(digit.colour) - 1])


def right_if(change, source, judge, scenes) -> float:
    """The share of scenes that are right after a change of what is drawn."""
    changed = [change(scene) for scene in scenes]

    def drawn(same_size: list) -> Tensor:
        these = [c for c in changed if c.canvas == same_size[0].canvas]
        return to_uint8(draw_pictures(these, source.hands["test"]))

    found = answers(judge, scenes, drawn)
    return sum(right for right, _ in found) / len(found)


def without_one(scene):
    return replace(scene, digits=scene.digits[1:], images=scene.images[1:])


def mirrored(scene):
    digits = tuple(
        replace(d, left=scene.canvas[1] - d.left - d.width, top=scene.canvas[0] - d.top - d.height)
        for d in scene.digits
    )
    return replace(scene, digits=digits)


def colours_swapped(scene):
    a, b = scene.digits
    return replace(scene, digits=(replace(a, colour=b.colour), replace(b, colour=a.colour)))


def digits_swapped(scene):
    """The first two digits in each other's cells."""
    a, b, *rest = scene.images
    return replace(scene, images=(b, a, *rest))


def recoloured(scene):
    return replace(scene, digits=tuple(other_colour(d) for d in scene.digits))


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (without_one, ("two objects", "counting", "colour attribution", TYPOGRAPHY)),
        (colours_swapped, ("colour attribution",)),
        (recoloured, ("colours", "colour attribution", ALL_AT_ONCE)),
    ],
)
def test_wrong_scenes_are_wrong(source, judge, questions, change, kinds):
    for kind in kinds:
        assert right_if(change, source, judge, questions[kind]) == 0, kind


def test_mirrored_positions_are_wrong(source, judge, questions):
    for kind in ("position", ALL_AT_ONCE):
        off_centre = [s for s in questions[kind] if s.prompt.asked[0].place != "in the middle"]
        assert right_if(mirrored, source, judge, off_centre) == 0, kind
        assert right_if(lambda scene: scene, source, judge, off_centre) >= 0.95


def test_strings_in_another_order_are_wrong(source, judge, questions):
    strings = [s for s in questions[TYPOGRAPHY] if s.digits[0].label != s.digits[1].label]
    assert right_if(digits_swapped, source, judge, strings) == 0
    shares = [share for _, share in answers(judge, strings, real(source.hands["test"]))]
    assert min(shares) > 0.5


def test_one_too_many_is_wrong(source, judge, questions):
    """A scene of two in answer to a prompt for one of them."""
    for scene in questions["two objects"]:
        one = replace(scene.prompt, kind="single object", asked=scene.prompt.asked[:1])
        picture = to_uint8(draw_pictures([scene], source.hands["test"]))
        assert not one.followed_by(judge.see(picture)[0], scene.canvas)


def test_answers_are_of_their_own_scenes(source, judge, questions):
    """Scenes of two sizes are drawn in two calls; only the first of each size is dark."""
    scenes = questions["colours"]

    def drawn(same_size):
        pictures = to_uint8(draw_pictures(same_size, source.hands["test"]))
        pictures[0] = 0
        return pictures

    found = [right for right, _ in answers(judge, scenes, drawn)]
    assert [i for i, right in enumerate(found) if not right][:2] == [0, len(scenes) // 2]


def test_questions_are_fresh_for_every_seed(source):
    first, again, other = (draw_questions(source, 80, seed) for seed in (0, 0, 1))
    assert first == again and first != other
    assert {kind: len(scenes) for kind, scenes in first.items()} == dict.fromkeys(
        QUESTION_KINDS, 10
    )
    training = {scene.images for scene in source.scenes if len(scene.images) > 1}
    assert not any(s.images in training and s in source.scenes for s in first["two objects"])


def test_the_table(source, judge, questions):
    few = {kind: scenes[:4] for kind, scenes in questions.items()}
    scores = geneval_scores(judge, few, real(source.hands["test"]))
    scores["counting"] = 0.125
    lines = in_a_table({"samples": scores, "real": scores}).splitlines()
    assert len(lines) == 1 + 6 + 1 + 1 + 2
    assert lines[0].split() == ["samples", "real"]
    assert next(line for line in lines if "counting" in line).split() == [
        "counting",
        "12.5%",
        "12.5%",
    ]


# --- the classifier -------------------------------------------------------------------------------


def test_practice_looks_like_what_is_cut_out_of_scenes(source, judge):
    """The templates, cut from slots and cells, read most of it."""
    hand = source.hands["test"]
    numbers = torch.arange(len(hand.images)).repeat(4)
    u = torch.rand(len(numbers), 2, generator=torch.Generator().manual_seed(0))
    x = practice(hand, numbers, u)
    assert x.shape == (len(numbers), 1, 32, 32) and x.min() == -1 and x.max() == 1
    heights, widths = ((x > -0.9).any(axis).sum(2).amax(1) for axis in (3, 2))
    assert torch.maximum(heights, widths).min() >= 22
    read = judge.classifier(x).argmax(1)
    assert (read == hand.labels[numbers]).float().mean() > 0.95


@pytest.fixture
def job(source, tmp_path) -> Job:
    run = Run.open(tmp_path / "run", {"config": {"name": "tiny-scenes"}})
    return Job(run, CONFIGS["tiny-scenes"], source, CPU, 0)


def test_training_the_judge(job, source, capsys):
    recipe = replace(job.training.judge, steps=60, batch=64, lr=4e-3)
    job = replace(job, config=replace(job.config, training=replace(job.training, judge=recipe)))
    judge = train_scene_judge(job, source)
    assert job.run.stages["judge"]["accuracy"] > 0.7
    assert "judge: reads" in capsys.readouterr().out
    again = train_scene_judge(job, source)  # loaded
    x = torch.rand(5, 1, 32, 32)
    assert torch.equal(judge.classifier(x), again.classifier(x))


@pytest.mark.slow
def test_the_judge_reads_real_scenes(tmp_path, job):
    """The recipe of `scenes`: at least 97% of every kind, at both sizes."""
    config = CONFIGS["scenes"]
    config = replace(config, training=replace(config.training, train_images=2))
    source = Scenes(load_images(), config)
    judge = train_scene_judge(replace(job, config=config, source=source), source)
    hand = source.hands["test"]
    for kind in (*GENEVAL, ALL_AT_ONCE):
        for canvas in CANVASES:
            scenes = [
                draw_scene(kind, canvas, hand, rng("slow", kind, canvas[1], i)) for i in range(1000)
            ]
            found = answers(judge, scenes, real(hand))
            assert sum(right for right, _ in found) >= 970, (kind, canvas)
    assert set(DIGIT_SIZES) == {"small", "big"}
