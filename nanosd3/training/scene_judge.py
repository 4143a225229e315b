"""The judge of scenes: finds the digits of a picture, reads them and names their colours.

Finding takes no training. Ink is whatever is not dark; ink that touches, or nearly does, is one
piece; a piece is a digit, and the box around it says where and how big it is. In a string, where
digits are close together, a piece is ink without an empty column. A classifier reads each piece,
cut out and scaled to one size; it is the main job's (classifier.py), trained on digits cut out in
the same way. The mean colour of a piece gets the nearest of the six names.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosd3.config_types import config_from_dict
from nanosd3.data.digit_cutouts import Handwriting, ink_boxes, transferred
from nanosd3.data.mnist import load_images
from nanosd3.data.scene_prompts import COLOURS, DIGIT_SIZES, PlacedDigit
from nanosd3.data.scenes import SCENE_CONFIGS, STRING_CELL, Scenes
from nanosd3.errors import InputError
from nanosd3.random_streams import rng
from nanosd3.storage.files import read_module
from nanosd3.storage.run import Run
from nanosd3.training.classifier import CLASSIFIER_SIZE, ConvNet
from nanosd3.training.loop import StepRNG, fit
from nanosd3.training.stages import Job, build, finish_or_load, in_chunks

DARK = 0.35  # ink is brighter than this; white is 1
SPECK = 6  # pixels; fewer are not a digit
READ_SIZE = 24  # the longer side of a digit in the classifier's input
LARGEST_READ = 16  # longest side, in pixels, of the digits that the classifier is trained on


def pieces(ink: Tensor, string: bool) -> Tensor:
    """Number the pieces of ink (B, H, W), with 0 for no ink: pixels belong to one piece if at most
    one pixel is between them; in a string, if no empty column is."""
    whole = ink.any(1, keepdim=True).expand_as(ink) if string else ink
    reach = 3 if string else 5
    number = torch.arange(1, ink[0].numel() + 1).view(1, *ink.shape[1:]) * whole
    while True:  # the largest number of a piece spreads through it
        spread = F.max_pool2d(number[:, None].float(), reach, 1, reach // 2)[:, 0].long() * whole
        if torch.equal(spread, number):
            return number * ink
        number = spread


def masks_of(ink: Tensor, string: bool) -> list[tuple[int, Tensor]]:
    """Each digit of ink (B, H, W): the index of its picture, and its mask (H, W). Pieces whose
    boxes touch, or nearly do, are strokes of one digit."""
    boxes = torch.zeros_like(ink)
    for i, mask in one_by_one(pieces(ink, string)):
        top, left, height, width = ink_boxes(mask[None])[0].tolist()
        boxes[i, top : top + height, left : left + width] = True
    whole = one_by_one(pieces(boxes, string) * ink)
    return [(i, mask) for i, mask in whole if mask.sum() >= SPECK]


def one_by_one(numbers: Tensor) -> list[tuple[int, Tensor]]:
    """The numbered pieces (B, H, W), one by one: the index of each one's picture, and its mask."""
    return [(i, row == n) for i, row in enumerate(numbers) for n in row.unique().tolist() if n]


def readable(ink: Tensor, boxes: Tensor) -> Tensor:
    """What is in the box of each image (B, H, W), as the classifier sees it: (B, 1, 32, 32) in
    [-1, 1], its longer side always the same length."""
    shape = boxes[:, 2:].float()
    shape = (shape * READ_SIZE / shape.amax(1, keepdim=True)).round().clamp(min=1)
    to_boxes = torch.cat([((CLASSIFIER_SIZE - shape) / 2).floor(), shape], 1)
    x = transferred(ink, boxes, to_boxes, (CLASSIFIER_SIZE, CLASSIFIER_SIZE))
    return (x / x.amax((1, 2), keepdim=True).clamp(min=0.1) * 2 - 1)[:, None]


def nearest_colour(rgb: Tensor) -> str:
    """The name of a mean colour (3,), regardless of its brightness."""
    names = torch.tensor(list(COLOURS.values()))
    difference = rgb / rgb.max().clamp(min=1e-3) - names / names.amax(1, keepdim=True)
    return list(COLOURS)[int(difference.square().sum(1).argmin())]


class SceneJudge:
    """A classifier that looks at whole scenes."""

    def __init__(self, classifier: ConvNet, device: torch.device):
        self.classifier, self.device = classifier, device

    @torch.no_grad()
    def see(self, images: Tensor, string: bool = False) -> list[tuple[PlacedDigit, ...]]:
        """The digits in each picture, uint8 (B, H, W, 3), from left to right."""
        rgb = images.float().cpu() / 255
        grey = rgb.amax(3)  # (B, H, W)
        found = masks_of(grey > DARK, string)
        if not found:
            return [()] * len(images)
        of = torch.tensor([i for i, _ in found])
        mask = torch.stack([mask for _, mask in found])  # (n, H, W)
        boxes = ink_boxes(mask)
        labels = self.read(grey[of] * mask, boxes)
        colours = (rgb[of] * mask[..., None]).sum((1, 2))  # (n, 3)
        seen: list[list[PlacedDigit]] = [[] for _ in images]
        for k, i in enumerate(of.tolist()):
            box = boxes[k].tolist()
            seen[i].append(PlacedDigit(int(labels[k]), nearest_colour(colours[k]), *box))
        return [tuple(sorted(digits, key=lambda digit: digit.left)) for digits in seen]

    def read(self, ink: Tensor, boxes: Tensor) -> Tensor:
        """The labels (B,) of digits in boxes of images (B, H, W)."""
        x = readable(ink, boxes).to(self.device)
        return in_chunks(self.classifier, x).argmax(1).cpu()


def practice(hand: Handwriting, numbers: Tensor, u: Tensor) -> Tensor:
    """Digits (B, 1, 32, 32) as the classifier will see them: drawn small, some of them narrow, and
    cut out again. `u` (B, 2) in [0, 1) picks their longer side and their maximum width."""
    ink = hand.boxes[numbers, 2:].float()
    low = min(DIGIT_SIZES.values())
    longest = low + (u[:, :1] * (LARGEST_READ - low + 1)).floor()
    shape = (ink * longest / ink.amax(1, keepdim=True)).round().clamp(min=1)
    narrow = torch.where(u[:, 1] < 0.5, STRING_CELL[1] - 2, LARGEST_READ)
    shape[:, 1] = shape[:, 1].minimum(narrow)
    boxes = torch.cat([torch.zeros_like(shape), shape], 1)
    drawn = hand.drawn(numbers, boxes, (LARGEST_READ, LARGEST_READ))
    drawn = drawn * (drawn > DARK)
    return readable(drawn, ink_boxes(drawn > 0))


def train_scene_judge(job: Job, source: Scenes) -> SceneJudge:
    """Train the classifier of the judge on the training digits, or load it."""
    recipe, hand = job.training.judge, source.hands["training"]
    net = build(job, "judge", lambda: ConvNet(10)).to(job.device)

    def loss_of(step_rng: StepRNG) -> tuple[Tensor, dict]:
        generator = step_rng.generator()
        numbers = torch.randint(len(hand.images), (recipe.batch,), generator=generator)
        x = practice(hand, numbers, torch.rand(recipe.batch, 2, generator=generator))
        return F.cross_entropy(net(x.to(job.device)), hand.labels[numbers].to(job.device)), {}

    def train() -> dict:
        fit(job.run, "judge", net, loss_of, recipe, job.seed)
        test = source.hands["test"]
        numbers = torch.arange(min(len(test.images), job.training.test_images))
        x = practice(
            test, numbers, torch.rand(len(numbers), 2, generator=rng(job.seed, "judge", "test"))
        )
        right = in_chunks(net, x.to(job.device)).argmax(1).cpu() == test.labels[numbers]
        return {"accuracy": right.float().mean().item()}

    results = finish_or_load(job, "judge", net, train)
    print(f"judge: reads {results['accuracy']:.2%} of digits of 10 to 16 pixels (test images)")
    return SceneJudge(net, job.device)


def open_scene_judge(run: Run, device: torch.device) -> tuple[Scenes, SceneJudge]:
    """The scenes and the judge of a finished run on scenes. Raises InputError if it is not one."""
    config = config_from_dict(run.identity["config"], run.folder / "run.json")
    if config.name not in SCENE_CONFIGS or "samples" not in run.stages:
        raise InputError(f"{run.folder}: expected a finished run of train_mnist.py --config scenes")
    source = Scenes(load_images(), config)
    if source.fingerprint != run.identity["data"]:
        raise InputError(f"{run.folder}: trained on other digits than the packaged ones")
    classifier = read_module(lambda: ConvNet(10), run.folder / "judge.safetensors")
    return source, SceneJudge(classifier.to(device), device)
