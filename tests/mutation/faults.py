"""Mistakes that real programmers make, for tests/mutation/run.py: here in time, solvers and
patches; those of the network and of related systems are in files of their own.

Each entry is the text of one place, what a tired hand might have written there, and what is
wrong with that. The old text stands exactly once in its file. Changes that cannot change an
answer (which library multiplies, which of two equal formulas) are left out: nobody could fail
to see them.
"""

from typing import NamedTuple

from mutation.faults_backbones import FAULTS_BACKBONES
from mutation.faults_channels import FAULTS_CHANNELS
from mutation.faults_claims_consistency import FAULTS_CLAIMS_CONSISTENCY
from mutation.faults_claims_pixels import FAULTS_CLAIMS_PIXELS
from mutation.faults_claims_sd3 import FAULTS_CLAIMS_SD3
from mutation.faults_claims_sd3_data import FAULTS_CLAIMS_SD3_DATA
from mutation.faults_dpo import FAULTS_DPO
from mutation.faults_given import FAULTS_GIVEN
from mutation.faults_network import ACCELERATE, CHANNELS_LAST, EMBEDDINGS, LAYERS, MATMUL, MMDIT
from mutation.faults_one_process import FAULTS_ONE_PROCESS
from mutation.faults_related_consistency import FAULTS_CONSISTENCY
from mutation.faults_related_dit import FAULTS_DIT
from mutation.faults_related_fm import FAULTS_FM
from mutation.faults_related_formulations import FAULTS_FORMULATIONS
from mutation.faults_related_hdit import FAULTS_HDIT
from mutation.faults_related_muse import FAULTS_MUSE
from mutation.faults_related_video import FAULTS_VIDEO
from mutation.faults_training import FAULTS_TRAINING


class Fault(NamedTuple):
    """In `file` of nanosd3, `old` becomes `new`; `what` says what that means."""

    file: str
    old: str
    new: str
    what: str


FLOW = [
    # interpolate, velocity_target, flow_loss
    ("(1 - t) * x0 + t * noise\n\n", "t * x0 + (1 - t) * noise\n\n", "time runs backwards"),
    ("[1] * (x0.ndim - 1)) if", "[1] * 3) if", "only images have a batch of times"),
    ("t.view(-1, *[1] * (x0.ndim - 1))", "t.view(*[1] * (x0.ndim - 1), -1)", "t along columns"),
    ("return noise - x0", "return x0 - noise", "direction of the velocity"),
    ("return noise - x0", "return noise", "predicts the noise, as DDPM does"),
    (".square().flatten(1)", ".abs().flatten(1)", "absolute, not squared error"),
    (".flatten(1).mean(1)", ".flatten(1).sum(1)", "sum of squares, not the mean"),
    (".flatten(1).mean(1)", ".mean()", "one number, not one for each sample"),
    ("velocity_target(x0, noise)).square", "velocity_target(noise, x0)).square", "target's sign"),
    # densities
    ("    return u\n", "    return 1 - u\n", "uniform time runs backwards"),
    ("mean: float = 0.0", "mean: float = 0.5", "default mean"),
    ("std: float = 1.0", "std: float = 0.5", "default deviation"),
    ("torch.special.ndtri(u)", "torch.logit(u)", "logistic, not normal, so that t = u"),
    ("sigmoid(mean + std", "sigmoid(std", "no mean"),
    ("sigmoid(mean + std", "sigmoid(-mean + std", "sign of the mean"),
    ("sigmoid(mean + std * torch.special.ndtri(u))",
     "sigmoid((mean + torch.special.ndtri(u)) * std)", "the mean is scaled too"),
    ("scale: float = 1.29", "scale: float = 1.0", "default scale of the mode density"),
    ("if not -1 <= scale", "if not -2 <= scale", "scales just below -1 pass"),
    ("if not -1 <= scale", "if not -1 < scale", "-1 itself is refused"),
    ("if not -1 <= scale <= 2 / (math.pi - 2):", "if not -1 <= scale:", "large scales pass"),
    ("1 - u - scale *", "1 - u + scale *", "sign of the mode's scale"),
    ("torch.cos(math.pi / 2 * u) ** 2 - 1", "torch.cos(math.pi / 2 * u) - 1", "no square"),
    ("torch.cos(math.pi / 2 * u) ** 2", "torch.sin(math.pi / 2 * u) ** 2", "sine for cosine"),
    ("return 1 - 1 / (torch.tan", "return 1 / (torch.tan", "cosmap's time runs backwards"),
    ("torch.tan(math.pi / 2 * u)", "torch.tan(math.pi * u)", "a factor of two in cosmap"),
    ("torch.rand(count, generator=generator)) / count", "0.5) / count", "middles of intervals"),
    ("torch.rand(count, generator=generator)", "torch.rand(count)", "global random numbers"),
    ("torch.randperm(count, generator=generator)", "torch.randperm(count)", "global random order"),
    ("u[torch.randperm(count, generator=generator)].clamp", "u.clamp", "times in order"),
    (".clamp(1e-6, 1 - 1e-6)", ".clamp(1e-2, 1 - 1e-2)", "time kept far from the ends"),
    (".clamp(1e-6, 1 - 1e-6)", "", "0 and 1 can be drawn"),
    (".clamp(1e-6, 1 - 1e-6)", ".clamp(min=1e-6)", "1 can be drawn"),
    # shift, schedule
    ("(1 + (alpha - 1) * t)", "(1 + (alpha + 1) * t)", "shift's denominator"),
    ("alpha * t / (1 + (alpha - 1) * t)\n\n", "t / (alpha - (alpha - 1) * t)\n\n", "towards data"),
    ("steps: int, alpha: float = 1.0", "steps: int, alpha: float = 3.0", "default shift"),
    ("if steps < 1:", "if steps < 0:", "no steps at all pass"),
    ("if not alpha > 0:", "if not alpha >= 0:", "shift 0 passes"),
    ("if not alpha > 0:", "if alpha <= 0:", "not-a-number passes"),
    ("torch.tensor(0.001,", "torch.tensor(0.01,", "the last time is ten times too large"),
    ("torch.linspace(1, smallest,", "torch.linspace(1, 0.001,", "last time shifted only once"),
    ("linspace(1, smallest, steps, dtype=torch.float64)",
     "linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]", "evenly down to 0"),
    ("torch.linspace(1, smallest, steps,", "torch.linspace(1, smallest, steps + 1,", "a step more"),
    ("cat([shift(u, alpha), ", "cat([u, ", "times are not shifted"),
    ("(1, dtype=torch.float64)]).float()", "(1, dtype=torch.float64)])", "times in float64"),
]  # fmt: skip

SAMPLERS = [
    # euler
    ('evaluations."""\n    for i, (t, t_next) in enumerate(pairwise(ts)):',
     'evaluations."""\n    for i, (t, t_next) in enumerate(pairwise(ts[:-1])):',
     "Euler without its last step"),
    ('evaluations."""\n    for i, (t, t_next) in enumerate(pairwise(ts)):',
     'evaluations."""\n    for i, (t_next, t) in enumerate(pairwise(ts)):',
     "Euler asks at the end of the step and walks back"),
    ("        z = z + (t_next - t) * v\n    return", "        z = z + (t - t_next) * v\n    return",
     "Euler walks the wrong way"),
    ("        z = z + (t_next - t) * v\n    return", "        z = z + t_next * v\n    return",
     "Euler's step is a time, not a difference of times"),
    ("            callback(i, t, z, z - t * v)\n        z =",
     "            callback(i, t, z, z + (1 - t) * v)\n        z =", "Euler shows the noise"),
    ("            callback(i, t, z, z - t * v)\n        z =",
     "            callback(i + 1, t, z, z - t * v)\n        z =", "Euler counts steps from 1"),
    ("            callback(i, t, z, z - t * v)\n        z =",
     "            callback(i, t_next, z, z - t * v)\n        z =", "Euler shows the next time"),
    ("            callback(i, t, z, z - t * v)\n        z =",
     "            callback(i, t, z + (t_next - t) * v, z - t * v)\n        z =",
     "Euler shows z after the step"),
    # heun
    ("last = len(ts) - 2", "last = len(ts) - 1", "Heun asks at t = 0"),
    ("last = len(ts) - 2", "last = len(ts) - 3", "Heun's Euler step is one too early"),
    ("callback(i, t, z, z - t * v)\n        ahead", "callback(i, t, z, z - v)\n        ahead",
     "Heun's clean image is that of t = 1"),
    ("callback(i, t, z, z - t * v)\n        ahead",
     "callback(i, t_next, z, z - t * v)\n        ahead", "Heun shows the next time"),
    ("ahead = z + (t_next - t) * v", "ahead = z + (t_next - t) * v / 2", "half a step ahead"),
    ("velocity(ahead, t_next)) / 2", "velocity(ahead, t_next))", "sum of two velocities"),
    ("velocity(ahead, t_next)", "velocity(z, t_next)", "second question asked at the start"),
    ("velocity(ahead, t_next)", "velocity(ahead, t)", "second question asked of the same time"),
    ("(v + velocity(ahead, t_next)) / 2", "velocity(ahead, t_next)", "the first answer is dropped"),
    ("if i == last else z + (t_next", "if i == last else ahead + (t_next", "two steps for one"),
    # dpmpp_2m
    ("x0 = z - t * velocity(z, t)", "x0 = z + (1 - t) * velocity(z, t)", "noise for data"),
    ("x0 = z - t * velocity(z, t)", "x0 = z - velocity(z, t)", "clean image without t"),
    ("callback(i, t, z, x0)\n        estimate", "callback(i, t, x0, z)\n        estimate",
     "DPM++ swaps what it shows"),
    ("callback(i, t, z, x0)\n        estimate", "callback(i, t_next, z, x0)\n        estimate",
     "DPM++ shows the next time"),
    ("h = torch.log(t / t_next) if t_next > 0 else None", "h = torch.log(t / t_next)",
     "the step into 0 is infinite"),
    ("h = torch.log(t / t_next)", "h = t - t_next", "distances in t"),
    ("h = torch.log(t / t_next)", "h = torch.log(t * (1 - t_next) / (t_next * (1 - t)))",
     "distances in the flow's own log-SNR"),
    ("k = h / (2 * h_last)", "k = h / h_last", "extrapolates twice as far"),
    ("k = h / (2 * h_last)", "k = h_last / (2 * h)", "ratio of steps upside down"),
    ("(1 + k) * x0 - k * previous", "(1 - k) * x0 + k * previous", "interpolates backwards"),
    ("(1 + k) * x0 - k * previous", "x0 - k * previous", "weights do not add up to one"),
    ("z = ratio * z + (1 - ratio) * estimate", "z = (1 - ratio) * z + ratio * estimate",
     "weights of z and the estimate"),
    ("(1 - ratio) * estimate", "(1 - ratio) * x0", "first order only"),
    ("previous, h_last = x0, h\n", "previous, h_last = estimate, h\n",
     "remembers what it extrapolated"),
    ("previous, h_last = x0, h\n", "previous, h_last = x0, h if h_last is None else h_last\n",
     "remembers the first step for ever"),
    ('"heun": heun', '"heun": euler', "a name leads to another solver"),
    # guided
    ("zip(prompt, negative, strict=True)", "zip(negative, prompt, strict=True)", "texts swapped"),
    ("with_prompt, without = model(", "without, with_prompt = model(", "halves swapped"),
    ("if scale != 1:", "if scale > 1:", "no second text below 1"),
    ("        if scale == 1:", "        if scale <= 1:", "guidance below 1 is dropped"),
    ("if scale == 1:\n            v = with_prompt = model(z, t, *prompt)",
     "if scale == 1:\n            v = with_prompt = model(z, t, *negative)",
     "at guidance 1 the negative text rules"),
    ("v = without + scale", "v = with_prompt + scale", "the scale counts from 0"),
    ("v = without + scale * (with_prompt - without)", "v = without + scale * with_prompt",
     "no difference is taken"),
    ("skip.first >= t >= skip.last", "skip.first > t >= skip.last", "first time left out"),
    ("skip.first >= t >= skip.last", "skip.first >= t > skip.last", "last time left out"),
    ("skip.first >= t >= skip.last", "t >= skip.last", "skips from the start"),
    ("skip.first >= t >= skip.last", "skip.first >= t", "skips to the end"),
    ("v = v + skip.scale *", "v = v - skip.scale *", "towards the crippled model"),
    ("v = v + skip.scale *", "v = v + scale *", "the other scale"),
    ("(with_prompt - model(z, t, *prompt, skip", "(v - model(z, t, *prompt, skip",
     "away from the crippled model, from what is guided already"),
    ("model(z, t, *prompt, skip=skip.layers)", "model(z, t, *negative, skip=skip.layers)",
     "layers are left out with the negative text"),
    # inpainting
    ("lerp(noise - x0, velocity(z, t), mask)", "lerp(x0 - noise, velocity(z, t), mask)",
     "known velocity's direction"),
    ("lerp(noise - x0, velocity(z, t), mask)", "lerp(velocity(z, t), noise - x0, mask)",
     "repaints what is known"),
    ("lerp(noise - x0, velocity(z, t), mask)", "lerp(noise - x0, velocity(z, t), mask.round())",
     "soft masks become hard"),
]  # fmt: skip

PATCHIFY = [
    # patchify
    ("if H % patch or W % patch:", "if H % patch:", "any width passes"),
    ("if H % patch or W % patch:", "if W % patch:", "any height passes"),
    ("if H % patch or W % patch:", "if H % patch and W % patch:", "one side may be wrong"),
    ("permute(0, 2, 4, 3, 5, 1)", "permute(0, 4, 2, 3, 5, 1)", "column by column"),
    ("permute(0, 2, 4, 3, 5, 1)", "permute(0, 2, 4, 5, 3, 1)", "patches transposed"),
    ("permute(0, 2, 4, 3, 5, 1)", "permute(0, 2, 4, 1, 3, 5)", "channels first"),
    ("x.reshape(B, C, H // patch, patch, W // patch, patch)",
     "x.reshape(B, C, patch, H // patch, patch, W // patch)", "every p-th pixel is a patch"),
    # unpatchify
    ("height % patch or width % patch or rows", "rows", "sizes between patches pass"),
    ("height % patch or width % patch or rows", "height % patch or rows", "any width passes"),
    (" or rows * columns != N:", ":", "any number of tokens passes"),
    ("height // patch, width // patch", "width // patch, height // patch", "rows and columns"),
    ("permute(0, 5, 1, 3, 2, 4)", "permute(0, 5, 1, 4, 2, 3)", "patches transposed"),
    ("permute(0, 5, 1, 3, 2, 4)", "permute(0, 5, 3, 1, 4, 2)", "pixels of patches interleaved"),
    ("columns, patch, patch, features // patch**2)\n    x = x.permute(0, 5, 1, 3, 2, 4)",
     "columns, features // patch**2, patch, patch)\n    x = x.permute(0, 3, 1, 4, 2, 5)",
     "channels first, as DiT's tokens are not"),
    ("reshape(B, -1, height, width)", "reshape(B, -1, width, height)", "sides of the image"),
    # sincos_positions
    ("- (grid - sample) / 2)", "- grid / 2)", "0 in the middle"),
    ("- (grid - sample) / 2)", "- (grid - sample) // 2)", "a grid of other parity is off by half"),
    (" - (grid - sample) / 2)", ")", "0 at the edge of the buffer"),
    ("(span / sample)", "(span / grid)", "the whole buffer is stretched to the span"),
    ("(span / sample)", "(sample / span)", "span upside down"),
    (" * (span / sample)", "", "no span"),
    ("10000 ** (-k", "1000 ** (-k", "base of the frequencies"),
    ("10000 ** (-k", "10000 ** (k", "frequencies rise"),
    ("(-k / (width // 4))", "(-k / (width // 4 - 1))", "the slowest is 1/10000"),
    ("(-k / (width // 4))", "(-k / (width // 2))", "frequencies only fall to 1/100"),
    ("[angles.sin(), angles.cos()], dim=1", "[angles.cos(), angles.sin()], dim=1", "cosines first"),
    ("torch.cat([angles.sin(), angles.cos()], dim=1)",
     "torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)", "sines and cosines in turn"),
    ("torch.cat([columns, rows], dim=2)", "torch.cat([rows, columns], dim=2)", "rows first"),
    ("k = torch.arange(width // 4, dtype=torch.float64)", "k = torch.arange(width // 4)",
     "frequencies in float32"),
    ("grid * grid, width).float()", "grid * grid, width)", "buffer in float64"),
    # centre_crop
    ("if rows > grid or columns > grid:", "if rows > grid:", "any number of columns passes"),
    ("if rows > grid or columns > grid:", "if rows * columns > area:", "only the area is checked"),
    ("if rows > grid or columns > grid:", "if rows >= grid or columns >= grid:", "the whole grid"),
    ("top, left = (grid - rows) // 2, (grid - columns) // 2", "top, left = 0, 0", "a corner"),
    ("(grid - rows) // 2, (grid - columns) // 2", "(grid - columns) // 2, (grid - rows) // 2",
     "top and left"),
    ("(grid - rows) // 2,", "(grid - rows + 1) // 2,", "odd rests are rounded up"),
    ("top : top + rows, left : left + columns", "left : left + columns, top : top + rows",
     "rows and columns of the buffer"),
]  # fmt: skip

RELATED = (
    *(FAULTS_DIT, FAULTS_FM, FAULTS_CONSISTENCY, FAULTS_HDIT, FAULTS_MUSE, FAULTS_VIDEO),
    *(FAULTS_FORMULATIONS, FAULTS_BACKBONES, FAULTS_DPO),
)
CLAIMS = (
    *(FAULTS_CLAIMS_SD3, FAULTS_CLAIMS_SD3_DATA, FAULTS_CHANNELS, FAULTS_CLAIMS_CONSISTENCY),
    FAULTS_CLAIMS_PIXELS,
)
FAULTS = [
    Fault(file, *entry)
    for file, entries in (
        ("flow.py", FLOW),
        ("samplers.py", SAMPLERS),
        ("patchify.py", PATCHIFY),
        ("machine/matmul.py", MATMUL),
        ("embeddings.py", EMBEDDINGS),
        ("layers.py", LAYERS),
        ("mmdit.py", MMDIT),
        ("machine/accelerate.py", ACCELERATE),
        ("machine/channels_last.py", CHANNELS_LAST),
    )
    for entry in entries
] + [
    Fault(*entry)
    for family in (*RELATED, *CLAIMS, FAULTS_GIVEN, FAULTS_ONE_PROCESS, FAULTS_TRAINING)
    for entry in family
]
