"""The moving drawings: frame after frame from noise to data, or a still where less is asked."""

import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))

import draw
from drawings import motion, plane

SVG = "{http://www.w3.org/2000/svg}"


def frames_of(root: ET.Element) -> list[list[ET.Element]]:
    """What is shown at each moment."""
    shown: dict[str, list[ET.Element]] = {}
    for group in root.iter(f"{SVG}g"):
        if group.get("class") in ("f", "l"):
            shown.setdefault(group.get("style", "last"), []).append(group)
    return list(shown.values())


def spots(path: str) -> torch.Tensor:
    numbers = re.findall(r"M(-?[\d.]+) (-?[\d.]+)h0", path)
    return torch.tensor([[float(x), float(y)] for x, y in numbers]).double()


@pytest.mark.parametrize("name", draw.MOVING)
def test_frames_take_turns(name):
    """Each starts when the one before it ends; the last stays until the first comes again."""
    root = ET.fromstring(draw.MOVING[name]())
    style = root.find(f"{SVG}style").text
    whole = float(re.search(r"animation:f ([\d.]+)s", style)[1])
    frames = frames_of(root)
    assert len(frames) == motion.STEPS + 1
    delays = [re.search(r"delay:(-?[\d.]+)s", frame[0].get("style"))[1] for frame in frames[:-1]]
    starts = torch.tensor([float(delay) + whole for delay in delays])
    expected = motion.SECONDS * torch.arange(motion.STEPS)
    torch.testing.assert_close(starts, expected, atol=0.006, rtol=0)
    share = float(re.search(r"visible}([\d.]+)%{visibility:hidden", style)[1]) / 100
    assert share * whole == pytest.approx(motion.SECONDS, abs=1e-3)
    last = float(re.search(r"hidden}([\d.]+)%{visibility:visible", style)[1]) / 100
    assert last * whole == pytest.approx(motion.STEPS * motion.SECONDS, abs=2e-3)
    assert whole - last * whole == pytest.approx(motion.HOLD, abs=1e-2)
    times = [float(e.text[4:]) for f in frames for g in f for e in g.iter(f"{SVG}text")]
    assert times[0] == 1 and times[-1] == 0 and times == sorted(times, reverse=True)


@pytest.mark.parametrize("name", draw.MOVING)
def test_less_motion_shows_the_still(name):
    """Everything that moves stops and is hidden, and the still appears; on paper too."""
    text = draw.MOVING[name]()
    for query in ("@media(prefers-reduced-motion:reduce)", "@media print"):
        rules = re.search(re.escape(query) + r"{(.*)}\n", text)[1]
        assert rules == (
            ".f,.l,.cloud{animation:none}.clock{visibility:hidden}.still{visibility:visible}"
        )
        assert text.index(query) > text.index(".still{visibility:hidden}")  # the later rule counts
    assert ".f,.l{visibility:hidden;" in text
    moved = set(re.findall(r"([.\w,]+){[^}]*animation:\w", text.split("@media(prefers-reduced")[0]))
    assert moved == {".f,.l", ".cloud"}


@pytest.mark.parametrize("name", [f"{Path(name).stem}_still.svg" for name in draw.MOVING])
def test_stills_do_not_move(name):
    assert not re.search("animat|keyframes", draw.DRAWINGS[name]())


def test_the_cloud_becomes_the_data():
    root = ET.fromstring(draw.MOVING["moons.svg"]())
    cloud = next(g for g in root.iter(f"{SVG}g") if g.get("class") == "cloud")
    clouds = [spots(g[0].get("d")) for g in cloud]
    (data,) = (spots(e.get("d")) for e in root if e.get("class") == "dots image pale")
    unit = (data[:, 0].max() - data[:, 0].min()) / (
        plane.MOONS[:, 0].max() - plane.MOONS[:, 0].min()
    )
    centre = data.mean(0)
    start = (clouds[0] - centre) * torch.tensor([1, -1]) / unit
    torch.testing.assert_close(start, plane.noise(len(start), seed=5), atol=0.02, rtol=0)
    assert torch.cdist(clouds[-1], data).min(1).values.max() < 0.6 < 30 < len(start)
    far = [float(torch.cdist(c, data).min(1).values.mean()) for c in clouds]
    assert far[0] > 15 > 1 > far[-1]


def test_what_is_followed_points_at_its_guess():
    """In each frame the arrow, on a line with z and x0, is a quarter of (z - x0) / t."""
    root = ET.fromstring(draw.MOVING["following.svg"]())
    for (frame,) in frames_of(root)[:-4]:
        parts = list(frame)
        t = next(float(e.text[4:]) for e in parts if e.tag == f"{SVG}text")
        ring = next(e for e in parts if e.tag == f"{SVG}circle")
        x0 = torch.tensor([float(ring.get("cx")), float(ring.get("cy"))]).double()
        z = spots(next(e.get("d") for e in parts if e.get("class") == "dots noise"))[0]
        head = next(e.get("d") for e in parts if e.get("class") == "guess solid")
        tip = torch.tensor([float(x) for x in head[1:].split("L")[0].split()]).double()
        torch.testing.assert_close(4 * t * (tip - z), z - x0, atol=1.5, rtol=0)
