"""What moves: two moons flowing out of noise (`moons.svg`), and one point on its way with its
velocity and the x0 that it points to (`following.svg`); and a still of each for print.

A moving drawing holds all its frames, each visible in its turn, by the style sheet alone. Readers
who asked their system for less motion see the still instead, and so does paper.
"""

import torch
from torch import Tensor

from drawings.canvas import KINDS, Drawing
from drawings.plane import MOONS, Plane, noise, trails

STEPS, SECONDS, HOLD = 48, 0.07, 1.6  # frames but one, how long each is shown, and the last
WIDTH, HEIGHT = 480, 420


def motion_style(frames: int) -> str:
    """Rules that show one frame after another, and the still to those who want no motion."""
    whole = (frames - 1) * SECONDS + HOLD
    share, end = 100 * SECONDS / whole, 100 * (frames - 1) * SECONDS / whole
    rules = (
        f".f,.l{{visibility:hidden;animation:f {whole:.2f}s step-end infinite}}"
        f".l{{animation-name:l}}.cloud{{animation:c {whole:.2f}s linear infinite}}\n"
        f"@keyframes f{{0%{{visibility:visible}}{share:.3f}%{{visibility:hidden}}}}"
        f"@keyframes l{{0%{{visibility:hidden}}{end:.3f}%{{visibility:visible}}}}\n"
    )
    for dark, query in ((0, ""), (2, "@media(prefers-color-scheme:dark)")):
        start, stop = KINDS["noise"][1 + dark], KINDS["image"][1 + dark]
        tint = f"@keyframes c{{0%{{stroke:{start}}}{end:.3f}%,100%{{stroke:{stop}}}}}"
        rules += f"{query}{{{tint}}}\n" if query else f"{tint}\n"
    calm = ".f,.l,.cloud{animation:none}.clock{visibility:hidden}.still{visibility:visible}"
    return (
        rules + ".still{visibility:hidden}\n"
        f"@media(prefers-reduced-motion:reduce){{{calm}}}\n@media print{{{calm}}}\n"
    )


def begin(d: Drawing, frame: int, count: int) -> None:
    """Open a frame: shown from its moment on, the last one to the end."""
    if frame == count - 1:
        d.parts.append('<g class="l">')
        return
    late = frame * SECONDS - ((count - 1) * SECONDS + HOLD)
    d.parts.append(f'<g class="f" style="animation-delay:{late:.2f}s">')


def close(d: Drawing) -> None:
    d.parts.append("</g>")


def clock(d: Drawing, t: float) -> None:
    """The time as a number and on its line, noise on the left as sampling begins there."""
    d.label(240, HEIGHT - 44, f"t = {t:.2f}", "name", "middle")
    d.dots("guess", [(60 + 360 * (1 - t), HEIGHT - 26)], 11)


def stage(d: Drawing, name: str, plane: Plane) -> None:
    """What does not move."""
    d.label(24, 34, name, "name")
    d.dots("image pale", plane.place(MOONS), 4)


def time_line(d: Drawing) -> None:
    """What the clock's dot runs along."""
    d.parts.append('<g class="clock">')
    d.curve("noise thin", [(60, HEIGHT - 26), (420, HEIGHT - 26)])
    d.label(50, HEIGHT - 21, "noise", "note", "end")
    d.label(430, HEIGHT - 21, "data")
    close(d)


def moons_moving() -> str:
    """A cloud of noise that becomes the data."""
    d, plane = Drawing(WIDTH, HEIGHT), Plane(240, 192, 52)
    times, zs, _ = trails(noise(140, seed=5), STEPS)
    stage(d, "two moons out of noise", plane)
    time_line(d)
    d.parts.append('<g class="cloud">')
    for i, z in enumerate(zs):
        begin(d, i, len(zs))
        d.dots("", plane.place(z), 5)
        close(d)
    close(d)
    for i, t in enumerate(times.tolist()):
        begin(d, i, len(times))
        clock(d, t)
        close(d)
    d.parts.append('<g class="still">')
    for i in range(zs.shape[1]):
        d.curve("noise thin", plane.place(zs[::2, i]))
    d.dots("noise", plane.place(zs[0]), 4)
    d.dots("image", plane.place(zs[-1]), 5)
    close(d)
    return d.svg(
        "Two moons out of noise",
        "A cloud of normally distributed points follows the velocity from t = 1 to t = 0 and "
        "becomes two interleaved half circles.",
        motion_style(len(zs)),
    )


def moons_still() -> str:
    """The cloud at four times."""
    d = Drawing(WIDTH, 452)
    times, zs, _ = trails(noise(140, seed=5), STEPS)
    d.label(24, 34, "two moons out of noise", "name")
    for k, at in enumerate((1.0, 0.6, 0.3, 0.0)):
        i = int((times - at).abs().argmin())
        plane = Plane(130 + 225 * (k % 2), 146 + 208 * (k // 2), 34)
        d.label(round(plane.x) - 100, round(plane.y) - 66, f"t = {float(times[i]):.1f}", "ink")
        d.dots("image pale", plane.place(MOONS), 3)
        d.dots("image" if at == 0 else "noise", plane.place(zs[i]), 4)
    return d.svg(
        "Two moons out of noise, at four times",
        "A cloud of normally distributed points at t = 1, 0.6, 0.3 and 0, where it has become two "
        "interleaved half circles.",
    )


START = torch.tensor([[1.9, 1.5]], dtype=torch.float64)  # of the point that is followed


def draw_point(d: Drawing, plane: Plane, t: float, z: Tensor, x0: Tensor) -> None:
    """A point z (1, 2), a quarter of its velocity, and the x0 that it points to."""
    (here,), (guess,) = plane.place(z), plane.place(x0)
    d.curve("guess dashed thin", [here, guess])
    d.ring("guess", *guess)
    if t > 0.02:  # v = (z - x0) / t
        (tip,) = plane.place(z + (z - x0) / t / 4)
        d.vector("guess thick", here, tip)
    d.dots("noise", [here], 11)


def following() -> str:
    """One point on its way."""
    d, plane = Drawing(WIDTH, HEIGHT), Plane(215, 218, 66)
    times, zs, x0s = trails(START, STEPS)
    stage(d, "where the velocity points", plane)
    time_line(d)
    d.label(24, 56, "arrow: a quarter of v; ring: x0 = z − t v")
    for i, t in enumerate(times.tolist()):
        begin(d, i, len(times))
        if i:
            d.curve("noise", plane.place(zs[: i + 1, 0]))
        draw_point(d, plane, t, zs[i], x0s[i])
        clock(d, t)
        close(d)
    d.parts.append('<g class="still">')
    draw_way(d, plane, times, zs, x0s)
    close(d)
    return d.svg(
        "Where the velocity points",
        "A point moves from noise to one of two moons. Its velocity points away from a guess of "
        "the clean x0, which starts at the mean of the data and moves onto the moon.",
        motion_style(len(times)),
    )


def draw_way(d: Drawing, plane: Plane, times: Tensor, zs: Tensor, x0s: Tensor) -> None:
    """The whole way, every guess of x0 on it, and the velocity at three times."""
    d.curve("noise", plane.place(zs[:, 0]))
    d.dots("guess", plane.place(x0s[:, 0]), 4)
    for at in (1.0, 0.6, 0.25):
        i = int((times - at).abs().argmin())
        draw_point(d, plane, float(times[i]), zs[i], x0s[i])
    d.dots("image", plane.place(zs[-1]), 9)


def following_still() -> str:
    """The same without motion."""
    d, plane = Drawing(WIDTH, 360), Plane(215, 218, 66)
    stage(d, "where the velocity points", plane)
    d.label(24, 56, "arrows: a quarter of v; rings: x0 = z − t v at t = 1, 0.6, 0.25")
    draw_way(d, plane, *trails(START, STEPS))
    return d.svg(
        "Where the velocity points, at three times",
        "The path of a point from noise to one of two moons, with its velocity and its guess of "
        "the clean x0 at three times; the guesses move from the mean of the data onto the moon.",
    )
