"""Every label of a drawing is inside the page and its box, apart from the others, large enough."""

import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pytest
from PIL import ImageFont

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))

import draw

ALL = draw.DRAWINGS | draw.MOVING
SVG = "{http://www.w3.org/2000/svg}"
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # DejaVu, a wide one


def page(name: str) -> ET.Element:
    """A drawing; of one that moves, the last frame."""
    if name in draw.DRAWINGS:
        return ET.fromstring(draw.DRAWINGS[name]())
    root = ET.fromstring(draw.MOVING[name]())
    for parent in list(root.iter()):
        for frame in [e for e in parent if e.get("class") == "f"]:
            parent.remove(frame)
    return root


class Place(NamedTuple):
    """A rectangle of the page."""

    left: float
    top: float
    right: float
    bottom: float


def place_of(label: ET.Element) -> Place:
    look, x, y = label.get("class"), float(label.get("x")), float(label.get("y"))
    size = 16 if look == "name" else 13
    file = "DejaVuSans-Bold.ttf" if look in ("name", "small") else "DejaVuSans.ttf"
    width = ImageFont.truetype(FONTS / file, size).getlength(label.text)
    left = x - width * {None: 0, "middle": 0.5, "end": 1}[label.get("text-anchor")]
    return Place(left, y - 0.75 * size, left + width, y + 0.1 * size)


def shape_of(e: ET.Element) -> Place | None:
    """Where a box or a ring is; None for everything else."""
    if not e.get("class", "").startswith("box"):
        return None
    if e.tag == f"{SVG}circle":
        x, y, r = (float(e.get(key)) for key in ("cx", "cy", "r"))
        return Place(x - r, y - r, x + r, y + r)
    x, y, w, h = (float(e.get(key)) for key in ("x", "y", "width", "height"))
    return Place(x, y, x + w, y + h)


@pytest.mark.parametrize("name", ALL)
def test_labels_do_not_overlap(name):
    root = page(name)
    width, height = (float(root.get(side)) for side in ("width", "height"))
    taken: list[Place] = []
    for label in root.iter(f"{SVG}text"):
        a = place_of(label)
        assert a.left >= 6 and a.right <= width - 6, label.text
        assert a.top >= 6 and a.bottom <= height - 6, label.text
        for b in taken:
            apart = a.right < b.left or b.right < a.left or a.bottom < b.top or b.bottom < a.top
            assert apart, label.text
        taken.append(a)


@pytest.mark.parametrize("name", ALL)
def test_labels_stay_in_their_boxes(name):
    """No border runs through a label, but for those covered by what the label lies on."""
    elements = list(page(name).iter())
    shapes = {i: shape for i, e in enumerate(elements) if (shape := shape_of(e))}
    for at, label in enumerate(elements):
        if label.tag != f"{SVG}text":
            continue
        a, ground = place_of(label), -1
        crossed = []
        for i, b in shapes.items():
            inside = b.left <= a.left and a.right <= b.right
            inside = inside and b.top <= a.top and a.bottom <= b.bottom
            outside = a.right <= b.left or b.right <= a.left
            outside = outside or a.bottom <= b.top or b.bottom <= a.top
            if inside and i < at:
                ground, crossed = i, []
            elif not inside and not outside:
                crossed.append(i)
        assert not crossed, (label.text, ground, [shapes[i] for i in crossed])


@pytest.mark.parametrize("name", ALL)
def test_letters_are_large_enough_on_a_phone(name):
    """Ten pixels where the page is 400 pixels wide."""
    width = float(page(name).get("width"))
    assert 13 * 400 / width >= 10
