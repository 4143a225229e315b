"""Stable Diffusion 3 on one page: `python -m nanosd3.minimal` learns to draw prompted digits.

MNIST, tokens, MMDiT, rectified flow, classifier-free guidance, Euler: one loop, no options, two
minutes on a CPU core. It ends by writing minimal.png, a row of digits for each prompt.

The transformer is the real one (mmdit.py). The rest is simpler here than in the full project:

    here                        there
    digits of 16x16 pixels      the latents of an autoencoder              vae.py
    a table of words            two CLIPs and a T5, with their tokenizers  text.py
    logit-normal timesteps      other densities, shifted time              flow.py
    Euler, equal steps          Heun, DPM++ 2M, repainting                 samplers.py
    one loop                    averaged weights, runs that resume         training/
    weights learned and lost    the official 2B and 8B models              weights.py, config.py

Time: t = 0 is data, t = 1 is noise. Sizes: B batch, C channels, H W height and width, N image
tokens, M text tokens, D width.
"""

import random
import sys
from itertools import pairwise

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from nanosd3.cli import Parser, run_main
from nanosd3.config_types import MMDiTConfig
from nanosd3.data.mnist import load_images
from nanosd3.mmdit import MMDiT

SIDE, PATCH, WIDTH = 16, 4, 128  # few, easy tokens (N = 16), so that two minutes are enough
BATCH, RATE = 64, 6e-3
DIGITS = "zero one two three four five six seven eight nine".split()
TEMPLATES = ("{}", "the digit {}", "the number {}", "a handwritten {}")
WORDS = ["", *"a the digit number handwritten 0 1 2 3 4 5 6 7 8 9".split(), *DIGITS]
LENGTH = 3  # M, the words of the longest caption


def caption(label: int) -> str:
    """One of the ways to ask for a digit, in words or as a numeral."""
    return random.choice(TEMPLATES).format(random.choice((DIGITS[label], str(label))))


class TextEncoder(nn.Module):
    """Captions to what the MMDiT reads: a context of tokens, and one pooled vector."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(len(WORDS), WIDTH)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH))

    def forward(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        padded = [(text.split() + [""] * LENGTH)[:LENGTH] for text in captions]
        ids = torch.tensor([[WORDS.index(word) for word in words] for words in padded])  # (B, M)
        context = self.words(ids.to(self.positions.device)) + self.positions  # (B, M, D)
        return context, context.mean(1)  # (B, D)


def flow_loss(mmdit: nn.Module, x0: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """Rectified flow: somewhere on the line from data to noise, predict its direction."""
    noise = torch.randn_like(x0)  # (B, C, H, W)
    # Logit-normal timesteps: rarely near the ends, where there is little to learn. SD3's mean is
    # 0; 0.8 is nearer to noise, where the digit is decided. A short run needs that.
    t = torch.sigmoid(0.8 + torch.randn(len(x0), device=x0.device))  # (B,)
    z = x0 + t.view(-1, 1, 1, 1) * (noise - x0)  # (1 - t) x0 + t noise
    velocity = mmdit(z, t, context, pooled)
    return F.mse_loss(velocity, noise - x0)


@torch.no_grad()
def sample(
    mmdit: nn.Module, text: nn.Module, prompts: list[str], noise: Tensor, steps: int, scale: float
) -> Tensor:
    """From noise (B, C, H, W) to images: follow the velocity from t = 1 to t = 0."""
    context, pooled = text(prompts + [""] * len(prompts))  # with prompt, then without
    z, times = noise, torch.linspace(1, 0, steps + 1, device=noise.device)
    for t, t_next in pairwise(times):
        # Classifier-free guidance: exaggerate the change that the prompt makes to the velocity.
        prompted, unprompted = mmdit(torch.cat([z, z]), t, context, pooled).chunk(2)
        velocity = unprompted + scale * (prompted - unprompted)
        z = z + (t_next - t) * velocity  # Euler: a straight step; backwards in time, to data
    return z


def train(steps: int, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The transformer and the text encoder, trained together."""
    images = load_images()
    pixels = F.pad(images.train_images[:, None] / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    pixels = F.avg_pool2d(pixels, 2).to(device)  # (60000, 1, 16, 16) in [-1, 1]
    grid = SIDE // PATCH
    config = MMDiTConfig(
        depth=2,  # sets the width, 64 a layer
        latent_channels=1,
        patch_size=PATCH,
        context_dim=WIDTH,
        pooled_dim=WIDTH,
        grid=grid,
        grid_sample=grid,
        grid_span=grid,
        qk_norm=True,
        dual_attention=(),
    )
    model = nn.ModuleDict({"mmdit": MMDiT(config), "text": TextEncoder()}).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RATE, steps, pct_start=0.1, cycle_momentum=False
    )

    for step in (bar := tqdm(range(steps), disable=None)):
        index = torch.randint(len(pixels), (BATCH,))
        captions = [caption(label) for label in images.train_labels[index].tolist()]
        # A tenth is learned without text, so that guidance has something to move away from.
        captions = ["" if random.random() < 0.1 else text for text in captions]
        loss = flow_loss(model["mmdit"], pixels[index.to(device)], *model["text"](captions))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            bar.write(f"step {step:5d}   loss {loss.item():.3f}")  # starts at 1 + E[x0^2]
    return model["mmdit"], model["text"]


def main(steps: int = 1700) -> None:
    """Train, then draw ten digits for each of ten prompts."""
    random.seed(0)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mmdit, text = train(steps, device)

    prompts = [caption(label) for label in range(10)]
    noise = torch.randn(100, 1, SIDE, SIDE).to(device)
    each = [prompt for prompt in prompts for _ in range(10)]
    digits = sample(mmdit, text, each, noise, steps=25, scale=2.0)  # (100, 1, H, W)
    grid = digits.view(10, 10, SIDE, SIDE).transpose(1, 2).reshape(10 * SIDE, 10 * SIDE)
    grey = ((grid.clamp(-1, 1) + 1) * 127.5).byte().cpu().numpy()
    Image.fromarray(grey).resize((640, 640), Image.Resampling.BICUBIC).save("minimal.png")
    print("minimal.png has a row for each prompt:", *prompts, sep="\n    ")


if __name__ == "__main__":
    parser = Parser("python -m nanosd3.minimal", "Learn to draw digits in two minutes.")
    sys.exit(run_main(lambda: main(**vars(parser.parse_args()))))
