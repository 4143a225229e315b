"""Things to turn: `turn(draw, images, "Six samples.", [{"t": 0.5}], t=(0.0, 1.0, 0.05, 0.0))`.

`draw` is the notebook's own mathematics. It takes a value from each control and returns what the
function after it shows, a mapping as `lab.images`, `lines`, `maps` and `densities` take it. A
control is a slider (low, high, step, start), a choice [first, second, ...] or a text to edit.

In a running notebook, the picture is drawn again whenever a control changes. On a page, and where
ipywidgets is not installed, the settings of the list are drawn in one picture instead, each given
as what differs from the start. The same happens with NANOSD3_STATIC=1, which is set while notebooks
are executed for the repository (execute.py), so that no widget state gets into a file.
"""

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import torch

Control = tuple[float, float, float, float] | list[str] | str
Controls = Mapping[str, Control]
Draw = Callable[..., Mapping[str, Any]]
Plot = Callable[..., None]
Stills = Sequence[Mapping[str, float | str]]


def turn(draw: Draw, plot: Plot, caption: str, stills: Stills, **controls: Control) -> None:
    """Show what `draw` gives: with controls, or without them for the settings `stills`."""
    if interactive():
        show_controls(draw, plot, caption, controls)
    else:
        show_stills(draw, plot, caption, stills, controls)


def interactive() -> bool:
    """Whether this is a notebook with ipywidgets, unless NANOSD3_STATIC is set."""
    ipython = sys.modules.get("IPython")
    if ipython is None or not hasattr(ipython.get_ipython(), "kernel"):
        return False
    if os.environ.get("NANOSD3_STATIC", "") not in ("", "0"):
        return False
    if find_spec("ipywidgets") is None:
        print("For sliders: pip install ipywidgets, then restart the kernel.")
        return False
    return True


def show_stills(draw: Draw, plot: Plot, caption: str, stills: Stills, controls: Controls) -> None:
    """Draw all settings in one picture, whose caption says what they have in common."""
    start = {name: start_of(control) for name, control in controls.items()}
    parts = {}
    for still in stills:
        setting = ", ".join(f"{name} = {value}" for name, value in still.items())
        for label, part in draw(**start | dict(still)).items():
            parts[": ".join(filter(None, (setting, label)))] = part
    kept = [name for name in start if not all(name in still for still in stills)]
    words = ", ".join(f"{name}\N{NO-BREAK SPACE}{start[name]}" for name in kept)
    plot(parts, caption=f"{caption} Otherwise: {words}." if kept else caption)


def start_of(control: Control) -> float | str:
    if isinstance(control, str):
        return control
    return control[0] if isinstance(control, list) else control[3]


def show_controls(draw: Draw, plot: Plot, caption: str, controls: Controls) -> None:
    """Show the controls, a line that says what is going on, and the picture. Warnings (of a
    truncated prompt, say) and errors go to that line, too."""
    import ipywidgets
    from IPython.display import clear_output, display

    widgets = {name: widget(name, control) for name, control in controls.items()}
    status, output = ipywidgets.Label(), ipywidgets.Output()
    gradients = torch.is_grad_enabled()  # set per thread, and a change may come from another

    def redraw(*_: object) -> None:
        status.value = "Drawing ..."
        with output, warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always", UserWarning)
            try:
                with torch.set_grad_enabled(gradients):
                    parts = draw(**{name: w.value for name, w in widgets.items()})
                clear_output(wait=True)
                plot(parts, caption=caption)
                said = [str(remark.message) for remark in remarks]
            except (Exception, KeyboardInterrupt) as error:
                said = [f"{type(error).__name__}: {error}"]
        status.value = "; ".join(said).split("\n")[0]

    for w in widgets.values():
        w.observe(redraw, "value")
    display(ipywidgets.VBox([*widgets.values(), status, output]))
    redraw()


def widget(name: str, control: Control) -> Any:
    """The control as a widget that reports a change when it is complete."""
    import ipywidgets

    look: dict[str, Any] = {"description": name, "layout": {"width": "30em"}}
    look["style"] = {"description_width": "6em"}
    if isinstance(control, list):
        return ipywidgets.Dropdown(options=control, **look)
    look["continuous_update"] = False
    if isinstance(control, str):
        return ipywidgets.Text(control, **look)
    low, high, step, start = control
    whole = all(isinstance(number, int) for number in control)
    kind = ipywidgets.IntSlider if whole else ipywidgets.FloatSlider
    return kind(start, min=low, max=high, step=step, **look)
