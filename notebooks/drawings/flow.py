"""Time and velocity: `rectified_flow.svg`, `timesteps.svg` and `guidance.svg`.

Every curve and every vector comes from the package's own functions.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from drawings.canvas import Drawing
from drawings.plane import MOONS, Plane, noise, trails
from drawings.sizes import MODELS
from nanosd3 import flow
from nanosd3.samplers import guided

Map = Callable[[Tensor], Tensor]
MAPS: dict[str, tuple[str, Map]] = {  # how each density of t is drawn
    "uniform": ("noise", flow.uniform),
    "logit-normal(0, 1)": ("cond thick", flow.logit_normal),
    "mode(1.29)": ("both dashed", flow.mode),
    "cosmap": ("text dotted thick", flow.cosmap),
}


def inputs(count: int) -> Tensor:
    """u between 0 and 1, closer to each other near the ends, where the maps are steep."""
    k = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return (1 - torch.cos(torch.pi * k)) / 2


def map_points(transform: Map) -> tuple[list[float], list[float]]:
    """u and t(u)."""
    u = inputs(100)
    return u.tolist(), transform(u).tolist()


def density_points(transform: Map) -> tuple[list[float], list[float]]:
    """t in rising order and the density there, which is 1 / |dt/du|."""
    u = inputs(200).requires_grad_()
    t = transform(u)
    (slope,) = torch.autograd.grad(t.sum(), u)
    order = t.argsort()
    return t[order].tolist(), (1 / slope.abs())[order].tolist()


def timesteps() -> str:
    """The maps and the densities that they give, and what the two models do."""
    d = Drawing(480, 724)
    d.label(24, 34, "which times are trained and visited", "name")
    for i, (name, (look, _)) in enumerate(MAPS.items()):
        x, y = 24 + 230 * (i % 2), 62 + 22 * (i // 2)
        d.curve(look, [(x, y - 4), (x + 34, y - 4)])
        d.label(x + 44, y, name, "ink")
    maps = d.axes(40, 280, (180, 150), ("u", "map t(u)"))
    densities = d.axes(272, 280, (180, 150), ("t", "density of t, up to 4"))
    for look, transform in MAPS.values():
        d.curve(look, maps.place(*map_points(transform)))
        d.curve(look, densities.place(*density_points(transform), top=4))
    draw_models(d, 322)
    return d.svg(
        "Densities of the timestep and their maps",
        "Four maps from a uniform u to t, and the density of t that each gives: uniform, "
        "logit-normal, mode and cosmap. Below, the densities that the two models train with, how "
        "the shift moves times towards noise, and the times that each visits when sampling.",
    )


def draw_models(d: Drawing, top: int) -> None:
    """Density, shift and visited times of the two models."""
    (small, _), (large, _) = MODELS
    assert small.training is not None
    mean, std = small.training.time_mean, small.training.time_std
    trained = d.axes(40, top + 212, (180, 130), ("t", "density trained with"))
    shifted = d.axes(272, top + 212, (180, 130), ("t", "t after the shift"))
    d.curve("cond thick", [(24, top + 18), (58, top + 18)])
    d.curve("noise thick", [(24, top + 40), (58, top + 40)])
    alphas = [config.sampling.shift for config in (small, large)]
    d.pair(68, top + 22, [f"mnist: logit-normal({mean}, {std:g}), shift {alphas[0]:g}",
                          f"sd3.5-large: logit-normal(0, 1), shift {alphas[1]:g}"], 22)  # fmt: skip
    for look, alpha, transform in (
        ("noise thick", alphas[1], flow.logit_normal),
        ("cond thick", alphas[0], partial(flow.logit_normal, mean=mean, std=std)),
    ):
        d.curve(look, trained.place(*density_points(transform), top=2.4))
        d.curve(look, shifted.place(*map_points(partial(flow.shift, alpha=alpha))))
    for i, (kind, look, config) in enumerate((("cond", "small", small), ("noise", "large", large))):
        y, sampling = top + 284 + 60 * i, config.sampling
        d.label(40, y - 14, f"the {sampling.steps} steps of {config.name}", look)
        d.curve(f"{kind} thin", [(40, y), (452, y)])
        times = flow.schedule(sampling.steps, sampling.shift).tolist()
        d.dots(kind, [(40 + 412 * t, y) for t in times], 6)
        d.label(40, y + 20, "0, data", "note")
        d.label(452, y + 20, "1, noise", "note", "end")


def rectified_flow() -> str:
    """One pair on its line; many pairs that cross; the paths of their mean velocity."""
    d = Drawing(480, 692)
    d.label(24, 34, "rectified flow", "name")
    x0, end, t = MOONS[44:45], torch.tensor([[2.4, 2.0]]).double(), torch.tensor(0.6).double()
    plane = Plane(210, 256, 62)
    z, v = flow.interpolate(x0, end, t), flow.velocity_target(x0, end)
    d.dots("image pale", plane.place(MOONS), 5)
    d.curve("noise dashed", plane.place(torch.cat([x0, end])))
    (start,), (stop,), (here,) = plane.place(x0), plane.place(end), plane.place(z)
    (tip,) = plane.place(z + 0.25 * v)
    for s in (0.2, 0.4, 0.8):
        (spot,) = plane.place(flow.interpolate(x0, end, torch.tensor(s).double()))
        d.dots("noise", [spot], 5)
    d.ring("image", *start)
    d.ring("noise", *stop)
    d.vector("guess thick", here, tip)
    d.ring("guess", *here)
    d.label(round(start[0]) - 12, round(start[1]) + 6, "x0, t = 0", "ink", "end")
    d.label(round(stop[0]) + 14, round(stop[1]) + 2, "noise,\nt = 1", "ink")
    d.label(round(here[0]) + 14, round(here[1]) + 12, "z at t = 0.6", "ink")
    d.label(round(tip[0]) - 12, round(tip[1]) - 4, "a quarter of v", "ink", "end")
    d.label(24, 66, "z = (1 − t) x0 + t noise\nv = noise − x0\nx0 = z − t v", "symbol")
    draw_crossing(d, 350)
    return d.svg(
        "Rectified flow",
        "A straight line joins a data point at t = 0 to noise at t = 1; its direction is the "
        "velocity. Lines of random pairs cross, the paths of their mean velocity bend instead.",
    )


def draw_crossing(d: Drawing, top: int) -> None:
    """Random pairs on the left, and where the mean of their velocities leads on the right."""
    start = noise(36, seed=3)
    _, zs, _ = trails(start, 30)
    order = torch.randperm(len(MOONS), generator=torch.Generator().manual_seed(1))[: len(start)]
    for x, name, ends in ((125, "lines of random pairs", None), (355, "paths of their mean", zs)):
        plane = Plane(x, top + 170, 44)
        d.label(x, top + 14, name, "ink", "middle")
        d.dots("image pale", plane.place(MOONS), 4)
        for i in range(len(start)):
            line = torch.stack([MOONS[order[i]], start[i]]) if ends is None else ends[:, i]
            d.curve("noise thin" if ends is None else "guess thin", plane.place(line))
        d.dots("noise", plane.place(start), 5)
        d.dots("image", plane.place(MOONS if ends is None else ends[-1]), 5)
    d.label(24, top + 322, "grey dots: noise; blue dots: data")


AWAY, TOWARDS = torch.tensor([1.0, 0.1]), torch.tensor([1.2, 0.4])  # velocities to draw


def guided_velocity(scale: float) -> Tensor:
    """What samplers.guided makes of the two velocities."""

    def model(z: Tensor, t: Tensor, with_prompt: Tensor) -> Tensor:
        return torch.where(with_prompt, TOWARDS, AWAY)

    prompt, negative = torch.tensor([[True]]), torch.tensor([[False]])
    velocity = guided(model, (prompt,), (negative,), scale)
    return velocity(torch.zeros(1, 2), torch.tensor(0.5))[0]


def guidance() -> str:
    """Two velocities from one network, and the line through both."""
    d = Drawing(480, 712)
    d.legend(24, 32)
    d.label(456, 32, "guidance", "name", "end")
    d.box("image", 240, 66, 190, 48, "z, twice/at the same t")
    d.box("text", 94, 166, 140, 48, "prompt/“a bold 3”")
    d.box("text", 386, 166, 140, 48, "negative/empty, or a text")
    d.sizes(248, 134, "z")
    d.arrow("image", (240, 114), (240, 252))
    d.arrow("text", (94, 214), (94, 252))
    d.arrow("text", (386, 214), (386, 252))
    d.box("both", 240, 252, 432, 48, "MMDiT/one call for both")
    d.lane("guess", 94, 140, "252+48", "342+34 v prompt")
    d.lane("guess", 386, 140, "252+48", "342+34 v negative")
    d.arrow("guess", (164, 359), (184, 359))
    d.arrow("guess", (316, 359), (296, 359))
    d.box("guess", 240, 338, 108, 42, "v")
    d.label(240, 408, "v = v negative + scale · (v prompt − v negative)", "symbol", "middle")
    draw_scales(d, 422)
    return d.svg(
        "Classifier-free guidance",
        "The network runs on the prompt and on the negative prompt in one call. The guided "
        "velocity lies on the line through both: scale 0 is the negative's, 1 the prompt's, "
        "larger scales go beyond it.",
    )


def draw_scales(d: Drawing, top: int) -> None:
    """The velocities as arrows from z, to scale."""
    plane = Plane(40, top + 264, 158)
    (origin,) = plane.place(torch.zeros(1, 2))
    scales = [config.sampling.guidance for config, _ in MODELS]
    tips = [plane.place(guided_velocity(s)[None])[0] for s in (0.0, 1.0, *scales)]
    d.curve("guess dashed", [tips[0], tips[-1]])
    for look, tip in zip(("noise", "text thick", "guess thick", "guess"), tips, strict=True):
        d.vector(look, origin, tip)
    d.ring("image", *origin)
    names = ("scale 0: the negative’s", "scale 1: the prompt’s", *(f"scale {s:g}" for s in scales))
    for look, name, (x, y) in zip(("ink", "ink", "small", "large"), names, tips, strict=True):
        d.label(round(x) + 12, round(y) + 5, name, look)
