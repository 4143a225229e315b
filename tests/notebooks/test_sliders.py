"""Things to turn: every control draws, what goes wrong is one line, and without controls there is a
picture of some settings."""

import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "notebooks"))

import sliders

CONTROLS = {"t": (0.0, 1.0, 0.05, 0.5), "steps": (1, 40, 1, 20), "prompt": "a bold 3",
            "sampler": ["euler", "heun"]}  # fmt: skip
START = {"t": 0.5, "steps": 20, "prompt": "a bold 3", "sampler": "euler"}


@pytest.fixture
def drawn() -> list[dict]:
    """The values that were drawn."""
    return []


@pytest.fixture
def draw(drawn):
    def draw(**values):
        drawn.append(values)
        if values["steps"] == 13:
            raise ValueError("not thirteen\nand more")
        if values["prompt"] == "a purple 3":
            warnings.warn("no caption had 'purple'", stacklevel=2)
        return {"z": 1, "": torch.is_grad_enabled()}

    return draw


@pytest.fixture
def plotted() -> list[tuple]:
    """What was shown, with its caption."""
    return []


@pytest.fixture
def plot(plotted):
    return lambda parts, caption: plotted.append((parts, caption))


def test_stills(draw, plot, drawn, plotted):
    """Without a notebook: what differs is said at each part, what does not in the caption."""
    stills = [{"t": 1.0}, {"t": 0.0, "steps": 2}]
    sliders.turn(draw, plot, "Samples.", stills, **CONTROLS)
    assert drawn == [START | {"t": 1.0}, START | {"t": 0.0, "steps": 2}]
    ((parts, caption),) = plotted
    assert [*parts] == ["t = 1.0: z", "t = 1.0", "t = 0.0, steps = 2: z", "t = 0.0, steps = 2"]
    words = caption.replace("\N{NO-BREAK SPACE}", " ")
    assert words == "Samples. Otherwise: steps 20, prompt a bold 3, sampler euler."


def test_stills_that_set_everything(draw, plot, plotted):
    sliders.turn(draw, plot, "Samples.", [START], **CONTROLS)
    assert plotted[0][1] == "Samples."


def test_an_error_in_a_still_is_not_hidden(draw, plot):
    with pytest.raises(ValueError, match="not thirteen"):
        sliders.turn(draw, plot, "Samples.", [{"steps": 13}], **CONTROLS)


@pytest.mark.parametrize(
    ("shell", "static", "installed", "answer"),
    [
        (None, "", True, False),  # a program
        (SimpleNamespace(), "", True, False),  # IPython in a terminal
        (SimpleNamespace(kernel=1), "", True, True),
        (SimpleNamespace(kernel=1), "0", True, True),
        (SimpleNamespace(kernel=1), "1", True, False),
        (SimpleNamespace(kernel=1), "", False, False),
    ],
)
def test_where_there_are_controls(monkeypatch, capsys, shell, static, installed, answer):
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setenv("NANOSD3_STATIC", static)
    monkeypatch.setattr(sliders, "find_spec", lambda name: name if installed else None)
    assert sliders.interactive() is answer
    assert ("pip install ipywidgets" in capsys.readouterr().out) is not installed


@pytest.fixture
def shown(monkeypatch, draw, plot):
    """The widgets by their names, and what the line below them said, one after the other."""
    pytest.importorskip("ipywidgets")
    import IPython.display

    said: list[str] = []

    def display(box):
        box.children[-2].observe(lambda change: said.append(change["new"]), "value")
        boxes.append(box)

    boxes: list = []
    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(sliders, "interactive", lambda: True)
    with torch.no_grad():
        sliders.turn(draw, plot, "Samples.", [{"t": 1.0}], **CONTROLS)
    return {w.description: w for w in boxes[0].children[:-2]}, said


def test_controls_draw(shown, drawn, plotted):
    """Once at the start, then for each change; the line says so while it lasts."""
    widgets, said = shown
    assert drawn == [START] and plotted == [({"z": 1, "": False}, "Samples.")]
    assert said == ["Drawing ...", ""]
    changes = {"t": 0.25, "steps": 7, "prompt": "8", "sampler": "heun"}
    for name, value in changes.items():
        widgets[name].value = value
    assert drawn[-1] == changes and len(drawn) == len(plotted) == 5
    assert said == ["Drawing ...", ""] * 5


def test_controls_are_as_asked(shown):
    """Whole numbers stay whole; nothing is drawn before a slider is let go, or Enter pressed."""
    widgets, _ = shown
    t, steps = widgets["t"], widgets["steps"]
    assert (t.min, t.max, t.step, t.value) == (0.0, 1.0, 0.05, 0.5)
    assert (steps.min, steps.max, steps.value) == (1, 40, 20) and type(steps.value) is int
    assert not any(widgets[name].continuous_update for name in ("t", "steps", "prompt"))
    assert widgets["sampler"].options == ("euler", "heun")


def test_what_goes_wrong_is_one_line(shown, plotted):
    widgets, said = shown
    widgets["steps"].value = 13
    assert said[-2:] == ["Drawing ...", "ValueError: not thirteen"] and len(plotted) == 1
    widgets["steps"].value = 14
    assert said[-2:] == ["Drawing ...", ""] and len(plotted) == 2
    widgets["prompt"].value = "a purple 3"
    assert said[-1] == "no caption had 'purple'" and len(plotted) == 3


def test_gradients_are_as_in_the_cell(shown, plotted):
    """A front end may report changes in another thread, which has settings of its own."""
    widgets, _ = shown
    thread = threading.Thread(target=lambda: setattr(widgets["t"], "value", 0.1))
    thread.start()
    thread.join()
    assert [parts[""] for parts, _ in plotted] == [False, False]
