"""Exercises on spacetime patches: clips to tokens, and the time and place of each token."""

import math

import torch
from torch import Tensor

from nanosd3.exercises.grader.exercise import Case, Exercise, Mutant, large, normal
from nanosd3.patchify import centre_crop, patchify
from nanosd3.related import video


def clip_cases(generator: torch.Generator) -> list[Case]:
    return [
        Case("4 frames of 4x6, by 2 frames of 2x2", (normal(generator, 2, 3, 4, 4, 6), 2, 2)),
        Case("6 frames of 6x3, by 3 frames of 3x3", (normal(generator, 1, 2, 6, 6, 3), 3, 3)),
        Case("images: one frame at a time", (normal(generator, 2, 4, 3, 4, 2), 1, 2)),
        Case("5 frames, which 2 do not divide", (normal(generator, 1, 2, 5, 4, 6), 2, 2)),
        Case("5 rows, which 2 do not divide", (normal(generator, 1, 3, 4, 5, 4), 2, 2)),
        large("8 frames of 16x12", normal(generator, 2, 4, 8, 16, 12), 2, 2),
    ]


def patchify_video_spec(z: Tensor, frames: int, patch: int) -> Tensor:
    B, C, T, H, W = z.shape
    if T % frames or H % patch or W % patch:
        raise ValueError("patches do not cover the clip")
    slots, rows, columns = T // frames, H // patch, W // patch
    tokens = torch.empty(B, slots * rows * columns, patch * patch * frames * C, dtype=z.dtype)
    for b in range(B):
        for n in range(slots * rows * columns):  # the column changes fastest, time most slowly
            when, row, column = n // (rows * columns), n // columns % rows, n % columns
            values = []
            for i in range(patch):
                for j in range(patch):
                    for f in range(frames):  # in a token: row, column, frame, channel
                        time, y, x = when * frames + f, row * patch + i, column * patch + j
                        values += [z[b, c, time, y, x] for c in range(C)]
            tokens[b, n] = torch.stack(values)
    return tokens


def boxes(z: Tensor, frames: int, patch: int, order: str) -> Tensor:
    """Tokens by an order of the axes B, C, T (slot), f, R (row), i, K (column), j: the clip's, then
    those of the tokens, then those within a token. Raises RuntimeError where patches do not fit."""
    B, C, T, H, W = z.shape
    z = z.reshape(B, C, T // frames, frames, H // patch, patch, W // patch, patch)
    z = z.permute(*("BCTfRiKj".index(axis) for axis in order))
    return z.reshape(B, -1, patch * patch * frames * C)


def time_fastest(z: Tensor, frames: int, patch: int) -> Tensor:
    return boxes(z, frames, patch, "BRKTijfC")


def columns_before_rows(z: Tensor, frames: int, patch: int) -> Tensor:
    return boxes(z, frames, patch, "BTKRijfC")


def frame_before_place(z: Tensor, frames: int, patch: int) -> Tensor:
    return boxes(z, frames, patch, "BTRKfijC")


def frame_after_channel(z: Tensor, frames: int, patch: int) -> Tensor:
    return boxes(z, frames, patch, "BTRKijCf")


def frames_far_apart(z: Tensor, frames: int, patch: int) -> Tensor:
    B, C, T, H, W = z.shape
    strided = z.reshape(B, C, frames, T // frames, H, W).transpose(2, 3)
    return boxes(strided.reshape(B, C, T, H, W), frames, patch, "BTRKijfC")


def a_frame_a_token(z: Tensor, frames: int, patch: int) -> Tensor:
    return video.patchify_video(z, 1, patch)


def one_after_the_other(z: Tensor, frames: int, patch: int) -> Tensor:
    images = z.flatten(0, 1)[:, None].flatten(1, 2)  # (B * C, T, H, W), channels as clips
    return patchify(images, patch).reshape(len(z), -1, patch * patch * frames * z.shape[1])


def clip_reshaped(z: Tensor, frames: int, patch: int) -> Tensor:
    return z.reshape(len(z), -1, patch * patch * frames * z.shape[1])


def last_frames_lost(z: Tensor, frames: int, patch: int) -> Tensor:
    return video.patchify_video(z[:, :, : z.shape[2] // frames * frames], frames, patch)


PATCHIFY_VIDEO = Exercise(
    name="patchify_video",
    topic="video",
    points=3,
    difficulty=2,
    signature="def patchify_video(z: Tensor, frames: int, patch: int) -> Tensor:",
    task="Cut clips (B, C, T, H, W) into tokens (B, N, p*p*f*C), boxes of f = `frames` frames and\n"
    "p x p places, N = (T/f)(H/p)(W/p). Time changes most slowly from token to token, columns\n"
    "fastest; within a token the order is (row, column, frame, channel). Raise an error if boxes\n"
    "do not cover the clip.",
    specification=patchify_video_spec,
    reference=video.patchify_video,
    cases=clip_cases,
    mutants=(
        Mutant(time_fastest, "All tokens of a time come before those of the next."),
        Mutant(columns_before_rows, "Within a time tokens go row by row."),
        Mutant(frame_before_place, "In a token the frame comes after row and column."),
        Mutant(frame_after_channel, "In a token the channel varies fastest, then the frame."),
        Mutant(frames_far_apart, "A box holds consecutive frames of the clip."),
        Mutant(a_frame_a_token, "A token is a box: it holds several frames."),
        Mutant(one_after_the_other, "A box holds all channels of a place."),
        Mutant(clip_reshaped, "A reshape alone keeps the order in memory: split the axes first."),
        Mutant(last_frames_lost, "Frames are lost where boxes do not cover the clip."),
    ),
    why="The transformer treats tokens of images and of clips alike.",
    where="nanosd3/related/video.py, patchify_video",
    names=("z", "frames", "patch"),
)


def grid_cases(generator: torch.Generator) -> list[Case]:
    def case(label: str, grid: int, width: int, *sizes: int) -> Case:
        return Case(label, (normal(generator, 1, grid * grid, width), *sizes))

    cases = [
        case("3 slots of 2x4, of a grid of 6", 6, 8, 3, 2, 4),
        case("4 slots of 3x2, of a grid of 5", 5, 12, 4, 3, 2),
        case("one slot: an image", 4, 8, 1, 4, 3),
    ]
    return [*cases, large("8 slots of 6x10", *case("", 12, 64, 8, 6, 10).arguments)]


def spacetime_spec(pos_embed: Tensor, slots: int, rows: int, columns: int) -> Tensor:
    _, area, D = pos_embed.shape
    grid = round(area**0.5)
    top, left = (grid - rows) // 2, (grid - columns) // 2
    out = torch.empty(1, slots * rows * columns, D, dtype=pos_embed.dtype)
    for when in range(slots):
        distance = when - (slots - 1) / 2  # from the middle of the clip
        angles = [distance * 10000 ** (-k / (D // 2)) for k in range(D // 2)]
        code = [math.sin(a) for a in angles] + [math.cos(a) - 1 for a in angles]
        for row in range(rows):
            for column in range(columns):
                place = pos_embed[0, (top + row) * grid + left + column]
                n = (when * rows + row) * columns + column
                for d in range(D):
                    out[0, n, d] = place[d] + code[d]
    return out


def laid_out(pos_embed: Tensor, rows: int, columns: int, code: Tensor) -> Tensor:
    """Positions with codes of time (slots, D)."""
    place = centre_crop(pos_embed, rows, columns)
    return (place + code.to(place)[:, None]).reshape(1, -1, place.shape[2])


def time_from_zero(pos_embed: Tensor, slots: int, rows: int, columns: int) -> Tensor:
    code = video.time_code(pos_embed.shape[2], 2 * slots - 1)[slots - 1 :]
    return laid_out(pos_embed, rows, columns, code)


def cosine_of_zero(pos_embed: Tensor, slots: int, rows: int, columns: int) -> Tensor:
    code = video.time_code(pos_embed.shape[2], slots)
    code[:, code.shape[1] // 2 :] += 1
    return laid_out(pos_embed, rows, columns, code)


def clock_stands_still(pos_embed: Tensor, slots: int, rows: int, columns: int) -> Tensor:
    return centre_crop(pos_embed, rows, columns).repeat(1, slots, 1)


def place_by_place(pos_embed: Tensor, slots: int, rows: int, columns: int) -> Tensor:
    table = video.spacetime_positions(pos_embed, slots, rows, columns)
    return table.view(slots, -1, table.shape[2]).transpose(0, 1).reshape(table.shape)


def from_the_corner(pos_embed: Tensor, slots: int, rows: int, columns: int) -> Tensor:
    grid = round(pos_embed.shape[1] ** 0.5)
    corner = pos_embed.view(grid, grid, -1)[:rows, :columns].flatten(0, 1)
    code = video.time_code(corner.shape[1], slots).to(corner)
    return (corner + code[:, None]).reshape(1, -1, corner.shape[1])


def sides_turned(pos_embed: Tensor, slots: int, rows: int, columns: int) -> Tensor:
    return video.spacetime_positions(pos_embed, slots, columns, rows)


def time_stretched(pos_embed: Tensor, slots: int, rows: int, columns: int) -> Tensor:
    D = pos_embed.shape[2]
    distance = (torch.arange(slots, dtype=torch.float64) - (slots - 1) / 2) / slots
    angles = distance[:, None] * 10000 ** (-torch.arange(D // 2) / (D // 2))
    return laid_out(pos_embed, rows, columns, torch.cat([angles.sin(), angles.cos() - 1], 1))


def cosines_before_sines(pos_embed: Tensor, slots: int, rows: int, columns: int) -> Tensor:
    sines, cosines = video.time_code(pos_embed.shape[2], slots).chunk(2, dim=1)
    return laid_out(pos_embed, rows, columns, torch.cat([cosines, sines], dim=1))


def as_for_two_axes(pos_embed: Tensor, slots: int, rows: int, columns: int) -> Tensor:
    code = video.time_code(pos_embed.shape[2] // 2, slots)
    return laid_out(pos_embed, rows, columns, torch.cat([code, code], dim=1))


SPACETIME_POSITIONS = Exercise(
    name="spacetime_positions",
    topic="video",
    points=4,
    difficulty=3,
    signature="def spacetime_positions(pos_embed: Tensor, slots: int, rows: int, columns: int) "
    "-> Tensor:",
    task="Positions (1, slots*rows*columns, D) of spacetime patches, time most slowly: the middle\n"
    "rows x columns of the buffer of an image (1, grid*grid, D), as `centre_crop` cuts them, plus\n"
    "a code of time. With a = s 10000^(-k / (D/2)), k = 0 .. D/2 - 1, where s is the distance in\n"
    "slots from the middle of the clip, the code is sin(a) for all k, then cos(a) - 1 for all k.",
    specification=spacetime_spec,
    reference=video.spacetime_positions,
    cases=grid_cases,
    mutants=(
        Mutant(time_from_zero, "Time counts from the middle of the clip, in both directions."),
        Mutant(cosine_of_zero, "In the middle the code is zero, so that an image stays as it was."),
        Mutant(clock_stands_still, "All times look alike: add the code of time."),
        Mutant(place_by_place, "All places of a time come before those of the next."),
        Mutant(from_the_corner, "The frame is cut from the middle of the buffer."),
        Mutant(sides_turned, "Rows and columns of the frame are swapped."),
        Mutant(time_stretched, "A slot is a step of 1, however long the clip is."),
        Mutant(cosines_before_sines, "Sines come first, then cosines."),
        Mutant(as_for_two_axes, "Time has the whole width to itself: D/2 frequencies."),
    ),
    why="Positions are functions of coordinates: any size and length can be laid out.",
    where="nanosd3/related/video.py, spacetime_positions",
    names=("pos_embed", "slots", "rows", "columns"),
)

EXERCISES = (PATCHIFY_VIDEO, SPACETIME_POSITIONS)
