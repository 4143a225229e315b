"""Nano GenEval and typography: do pictures of scenes follow their prompts?

GenEval (arXiv 2310.11513) asks six kinds of questions of text-to-image models and lets detectors
answer them; its score is the mean over the six. Here the questions are those of scene_prompts.py
and the answers a judge's (scene_judge.py). *All at once* asks for everything in one caption, and
*typography* for digits in order: the share of strings that are right, and of their characters.

No model can score higher than the judge's own accuracy, so real scenes with the same prompts are
scored too, as the ceiling. Scenes encoded and decoded again show what the autoencoder loses.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from nanosd3.data.digit_cutouts import Handwriting
from nanosd3.data.mnist import to_uint8
from nanosd3.data.scene_prompts import ALL_AT_ONCE, GENEVAL, QUESTION_KINDS, TYPOGRAPHY, CanvasSize
from nanosd3.data.scenes import STRING_LENGTHS, Scene, Scenes, draw_pictures
from nanosd3.pipeline import Pipeline
from nanosd3.training.scene_judge import SceneJudge

Questions = dict[str, list[Scene]]  # by kind
Drawn = Callable[[list[Scene]], Tensor]  # pictures uint8 (B, H, W, 3) for scenes of one size
RECONSTRUCTED_AT_ONCE = 50


def draw_questions(source: Scenes, count: int, seed: int) -> Questions:
    """About `count` questions, the same number of each kind."""
    return {
        kind: source.questions(kind, max(2, count // len(QUESTION_KINDS)), seed)
        for kind in QUESTION_KINDS
    }


def answers(judge: SceneJudge, scenes: list[Scene], drawn: Drawn) -> list[tuple[bool, float]]:
    """For each scene of one kind, whether its picture follows the prompt, and the share of its
    digits that are right when they are read as a string."""
    found = []
    for canvas in dict.fromkeys(scene.canvas for scene in scenes):
        same_size = [scene for scene in scenes if scene.canvas == canvas]
        seen = judge.see(drawn(same_size), string=scenes[0].prompt.kind == TYPOGRAPHY)
        for scene, digits in zip(same_size, seen, strict=True):
            prompt = scene.prompt
            found.append((prompt.followed_by(digits, canvas), prompt.characters_right(digits)))
    return found


def geneval_scores(judge: SceneJudge, questions: Questions, drawn: Drawn) -> dict:
    """The shares of right answers: GenEval's six and their mean, all at once, typography."""
    scores: dict = {}
    for kind in (*GENEVAL, ALL_AT_ONCE):
        found = answers(judge, questions[kind], drawn)
        scores[kind] = sum(right for right, _ in found) / len(found)
    strings = questions[TYPOGRAPHY]
    found = answers(judge, strings, drawn)
    by_length: dict[int, list[bool]] = {n: [] for n in STRING_LENGTHS}
    for scene, (right, _) in zip(strings, found, strict=True):
        by_length[len(scene.prompt.asked)].append(right)
    scores[TYPOGRAPHY] = {
        "exact": sum(right for right, _ in found) / len(found),
        "characters": sum(share for _, share in found) / len(found),
        "exact_by_length": {n: sum(ok) / len(ok) for n, ok in by_length.items() if ok},
    }
    return {"nano_geneval": sum(scores[kind] for kind in GENEVAL) / len(GENEVAL), **scores}


def real(hand: Handwriting) -> Drawn:
    """The scenes themselves."""
    return lambda scenes: to_uint8(draw_pictures(scenes, hand))


def reconstructed(hand: Handwriting, pipeline: Pipeline) -> Drawn:
    """The scenes encoded and decoded again."""

    def drawn(scenes: list[Scene]) -> Tensor:
        parts = draw_pictures(scenes, hand).split(RECONSTRUCTED_AT_ONCE)
        return torch.cat([torch.from_numpy(pipeline.decode(pipeline.encode(x))) for x in parts])

    return drawn


def drawn_by(pipeline: Pipeline, seed: int, guidance: float | None = None) -> Drawn:
    """What a model draws for the scenes' prompts."""

    def drawn(scenes: list[Scene]) -> Tensor:
        prompts = [scene.prompt.text for scene in scenes]
        return sample_scenes(pipeline, prompts, scenes[0].canvas, seed, guidance)

    return drawn


def sample_scenes(
    pipeline: Pipeline,
    prompts: list[str],
    canvas: CanvasSize,
    seed: int,
    guidance: float | None = None,
) -> Tensor:
    """Samples uint8 (B, H, W, 3)."""
    height, width = canvas
    images = pipeline(prompts, seed=seed, guidance=guidance, height=height, width=width)
    return torch.as_tensor(images)


def in_a_table(scores: dict[str, dict]) -> str:
    """Scores by name, such as "samples", as lines of text: one row per kind, in percent."""
    rows = [("", *scores)]
    rows += [(kind, *(s[kind] for s in scores.values())) for kind in (*GENEVAL, "nano_geneval")]
    rows.append((ALL_AT_ONCE, *(s[ALL_AT_ONCE] for s in scores.values())))
    for part in ("exact", "characters"):
        rows.append((f"{TYPOGRAPHY}, {part}", *(s[TYPOGRAPHY][part] for s in scores.values())))
    return "\n".join(
        f"  {name.replace('_', ' '):<24}"
        + "".join(f"{x if isinstance(x, str) else f'{x:.1%}':>17}" for x in row)
        for name, *row in rows
    )
