"""Comparing what was found in a file with what the model needs.

Loading is strict: every tensor must be there, in the right shape, in floating point. Tensors that
the model has not are reported and left alone; a few that official files are known to hold for
other programs are not mentioned. Nothing is read for it: what the model needs is known from
modules on the meta device, which have shapes and no memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from nanosd3.clip import CLIPText
from nanosd3.config import Config
from nanosd3.found import Found, is_known_extra
from nanosd3.layouts import COMPONENTS
from nanosd3.mmdit import MMDiT
from nanosd3.parts import State
from nanosd3.runtime import InputError
from nanosd3.t5 import T5Encoder
from nanosd3.vae import AutoencoderKL


def makers(config: Config) -> dict[str, Callable[[], nn.Module]]:
    """How each part is built."""
    return {
        "mmdit": lambda: MMDiT(config.mmdit),
        "vae": lambda: AutoencoderKL(config.vae),
        "clip_l": lambda: CLIPText(config.text.clip_l),
        "clip_g": lambda: CLIPText(config.text.clip_g),
        "t5": lambda: T5Encoder(config.text.t5),
    }


def on_meta(config: Config, name: str) -> nn.Module:
    """A part without memory: names and shapes only."""
    with torch.device("meta"):
        return makers(config)[name]()


@cache
def shapes(config: Config, name: str) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a part's tensors."""
    return {key: tuple(t.shape) for key, t in on_meta(config, name).state_dict().items()}


@dataclass(frozen=True)
class Checked:
    """One part, compared with what the model needs."""

    loaded: int
    bytes: int
    dtypes: list[str]
    missing: list[str]
    misshapen: list[str]
    unexpected: list[str]


def check_part(config: Config, name: str, state: State) -> Checked:
    needed = shapes(config, name)
    shared = [key for key in needed if key in state]
    projection = "text_projection.weight" if name == "clip_l" else ""
    return Checked(
        loaded=sum(state[key].shape == needed[key] for key in shared),
        bytes=sum(state[key].size for key in shared),
        dtypes=sorted({str(state[key].dtype).removeprefix("torch.") for key in shared}),
        missing=[key for key in needed if key not in state],
        misshapen=[
            f"{state[key].name}: has {state[key].shape}, expected {needed[key]}"
            for key in shared
            if state[key].shape != needed[key]
        ]
        + [
            f"{state[key].name}: is of type {state[key].dtype}, expected floating point"
            for key in shared
            if not state[key].dtype.is_floating_point
        ],
        unexpected=[
            tensor.name
            for key, tensor in state.items()
            if key not in needed and key != projection
            and not is_known_extra(key)
        ],
    )  # fmt: skip


def report(found: Found) -> str:
    """What is there and what is not, part by part, as text."""
    how, text = found.config.sampling, found.config.text
    lines = [
        f"{found.path}: {found.config.name} ({found.told})",
        f"sampled with {how.steps} steps of {how.sampler}, guidance {how.guidance:g}, shift "
        f"{how.shift:g}; T5 reads {text.t5.length} tokens",
        f"{'part':8}{'tensors':>9}{'MB':>10}  {'type':18}{'missing':>8}{'misshapen':>11}"
        f"{'unexpected':>12}",
    ]
    details = []
    for name in COMPONENTS:
        if name not in found.parts:
            lines.append(f"{name:8}{'absent':>9}")
            continue
        c = check_part(found.config, name, found.parts[name])
        lines.append(
            f"{name:8}{c.loaded:9}{c.bytes / 1e6:10,.0f}  {', '.join(c.dtypes):18}"
            f"{len(c.missing):8}{len(c.misshapen):11}{len(c.unexpected):12}"
        )
        for what in ("missing", "misshapen", "unexpected"):
            details += [f"  {name}, {what}: {entry}" for entry in getattr(c, what)]
    details += [f"  of no part: {name}" for name in found.outside]
    return "\n".join(lines + details)


def check(found: Found) -> None:
    """Raises InputError with the list of what is missing or misshapen."""
    wrong = []
    for name, state in found.parts.items():
        checked = check_part(found.config, name, state)
        wrong += [f"{name} lacks {key}" for key in checked.missing]
        wrong += [f"{name} {entry}" for entry in checked.misshapen]
    if wrong:
        more = f" ... and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise InputError(f"{found.path}: {len(wrong)} tensors missing or of wrong shape: "
                         f"{'; '.join(wrong[:20])}{more}")  # fmt: skip
