"""The stages of training from scratch: what each one learns, and from what loss.

    judge         a classifier of real images, for the metrics only
    autoencoder   images to latents and back
    clip          two text encoders, against a small image tower
    t5            the third, by filling in removed words
    flow          the velocity of latents, given the frozen encoders' outputs

Each takes a `Job` and returns its trained module; a stage that is finished is loaded instead.
The loop itself is loop.py.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanosd3.checkpoint import Run, load_weights, save_weights, write_json
from nanosd3.config import Config, Recipe
from nanosd3.data import Captions, ImageSet, bins, make_captions, measure, plain_captions, thirds, to_model
from nanosd3.flow import flow_loss, interpolate, logit_normal, stratified
from nanosd3.loop import fit, make_ema
from nanosd3.metrics import ConvNet
from nanosd3.mmdit import MMDiT
from nanosd3.runtime import rng
from nanosd3.text import TextEncoders, Tokenizers, drop_encoders
from nanosd3.tokenizers import END, PAD
from nanosd3.vae import AutoencoderKL, kl_divergence, sample_posterior

CHUNK = 500  # images at once where nothing is trained
BINS = 8  # of the timestep, for the logged loss


@dataclass(frozen=True)
class Job:
    """Everything a stage needs to know."""

    run: Run
    config: Config
    images: ImageSet
    device: torch.device
    seed: int


@dataclass(frozen=True)
class Described:
    """The captions that fit each training image, and the ruler that measured it."""

    captions: Captions
    weight_limits: Tensor  # (classes, 2)
    slant_limits: Tensor  # (classes, 2)
    weight: Tensor  # third of each training image, (n,)
    slant: Tensor


def describe_images(images: ImageSet) -> Described:
    """Measure the training images and find the captions that fit them."""
    labels, classes = images.train_labels, len(images.names)
    weight, slant = measure(images.train_images)
    weight_limits, slant_limits = thirds(weight, labels, classes), thirds(slant, labels, classes)
    return Described(
        make_captions(images.names),
        weight_limits,
        slant_limits,
        bins(weight, labels, weight_limits),
        bins(slant, labels, slant_limits),
    )


def build(job: Job, name: str, make: Callable[[], nn.Module]) -> nn.Module:
    """A module whose initial weights depend on the seed and its name alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng(job.seed, name, "init").initial_seed())
        return make().to(job.device)


def finish_or_load(job: Job, stage: str, module: nn.Module, train: Callable[[], dict]) -> dict:
    """Run a stage and keep its weights, or load them if it is finished; what it measured."""
    path = job.run.folder / f"{stage}.safetensors"
    if stage in job.run.stages:
        load_weights(module, path)
    else:
        begin = time.perf_counter()
        results = train()
        save_weights(module, path)
        job.run.finish(stage, results | {"seconds": round(time.perf_counter() - begin, 1)})
    module.requires_grad_(False).eval()
    return job.run.stages[stage]


def draw_batch(count: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Indices of one batch among `count` items."""
    return torch.randint(count, (recipe.batch,), generator=generator)


# --- judge --------------------------------------------------------------------------------------


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.cat([function(chunk) for chunk in x.split(CHUNK)])


def judge(job: Job) -> ConvNet:
    """Learn to read real images."""
    images, size, recipe = job.images, job.config.image_size, job.config.training.judge
    net = build(job, "judge", lambda: ConvNet(len(images.names)))

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        i = draw_batch(len(images.train_images), recipe, generator)
        x = to_model(images.train_images[i], size).to(job.device)
        return F.cross_entropy(net(x), images.train_labels[i].to(job.device)), {}

    def train() -> dict:
        fit(job.run, "judge", net, loss_of, recipe, job.seed)
        test = to_model(images.test_images, size).to(job.device)
        right = in_chunks(net, test).argmax(1).cpu() == images.test_labels
        return {"accuracy": right.float().mean().item()}

    results = finish_or_load(job, "judge", net, train)
    print(f"judge: reads {results['accuracy']:.2%} of the test images as labelled")
    return net


# --- autoencoder --------------------------------------------------------------------------------


def autoencoder(job: Job) -> AutoencoderKL:
    """Learn latents; measure their mean and deviation, which the config returned applies."""
    images, config, training = job.images, job.config, job.config.training
    make = lambda: AutoencoderKL(config.vae).to(memory_format=torch.channels_last)  # noqa: E731
    vae = build(job, "autoencoder", make)
    recipe = training.autoencoder

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        i = draw_batch(len(images.train_images), recipe, generator)
        x = to_model(images.train_images[i], config.image_size).to(job.device)
        mean, logvar = vae.encode(x.contiguous(memory_format=torch.channels_last))
        noise = torch.randn(mean.shape, generator=generator).to(job.device)
        difference = vae.decode(sample_posterior(mean, logvar, noise)) - x
        reconstruction = difference.square().flatten(1).sum(1).mean()
        kl = kl_divergence(mean, logvar).mean()
        loss = reconstruction + training.kl_weight * kl
        return loss, {"reconstruction": reconstruction.item(), "kl": kl.item()}

    def train() -> dict:
        fit(job.run, "autoencoder", vae, loss_of, recipe, job.seed)
        mean, std = encode_images(vae, images.train_images, config.image_size, job.device)
        centre = mean.double().mean()
        variance = (mean.double() - centre).square().mean() + std.double().square().mean()
        return {"shift": centre.item(), "scale": variance.rsqrt().item()}

    results = finish_or_load(job, "autoencoder", vae, train)
    vae.config = replace(vae.config, shift=results["shift"], scale=results["scale"])
    print(f"autoencoder: latents have mean {results['shift']:.3f}, deviation {1 / results['scale']:.3f}")
    return vae


def encode_images(
    vae: AutoencoderKL, images: Tensor, size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n, C, h, w) of the latents of uint8 images, not normalised."""

    def moments(chunk: Tensor) -> Tensor:
        x = to_model(chunk, size).to(device).contiguous(memory_format=torch.channels_last)
        mean, logvar = vae.encode(x)
        return torch.stack([mean, (0.5 * logvar).exp()], dim=1)

    mean, std = in_chunks(moments, images).unbind(1)
    return mean.contiguous(), std.contiguous()


# --- text encoders ------------------------------------------------------------------------------


def clip_loss(image: Tensor, text: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """Contrastive loss (CLIP, arXiv 2103.00020): each image finds its caption and each caption
    its image, among those of the batch. Equal captions share the answer: `same` (B, B)."""
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T  # (B, B)
    answer = same / same.sum(1, keepdim=True)
    return (F.cross_entropy(logits, answer) + F.cross_entropy(logits.T, answer)) / 2


def clip(job: Job, described: Described, text: TextEncoders) -> None:
    """Train both CLIPs against one image tower, which is thrown away afterwards."""
    images, config, recipe = job.images, job.config, job.config.training.clip
    dl, dg = config.text.clip_l.width, config.text.clip_g.width
    captions = described.captions
    ids_l, ids_g = (ids.to(job.device) for ids in text.clip_ids(captions.texts))
    students = build(job, "clip", lambda: nn.ModuleDict({
        "clip_l": text.clip_l,
        "clip_g": text.clip_g,
        "tower": ConvNet(dl + dg),
        "projection_l": nn.Linear(dl, dl, bias=False),  # SD3 uses L unprojected
        "log_scale": nn.ParameterList([torch.tensor(10.0).log()]),
    }))  # fmt: skip

    def embed_text(index: Tensor) -> tuple[Tensor, Tensor]:
        pooled_l = students["clip_l"](ids_l[index])[1]
        return students["projection_l"](pooled_l), students["clip_g"](ids_g[index])[1]

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        i = draw_batch(len(images.train_images), recipe, generator)
        u = torch.rand(recipe.batch, generator=generator)
        index = captions.draw(images.train_labels[i], described.weight[i], described.slant[i], u)
        index = index.to(job.device)
        x = to_model(images.train_images[i], config.image_size).to(job.device)
        image_l, image_g = students["tower"](x).split([dl, dg], dim=1)
        text_l, text_g = embed_text(index)
        same = (index[:, None] == index).float()
        scale = students["log_scale"][0].exp().clamp(max=100)
        return clip_loss(image_l, text_l, same, scale) + clip_loss(image_g, text_g, same, scale), {}

    @torch.no_grad()
    def zero_shot() -> dict:
        """Class of each test image by the nearest mean of its class's captions."""
        index = {text: i for i, text in enumerate(captions.texts)}
        anchors: tuple[list, list] = ([], [])
        for label in range(len(images.names)):
            ids = torch.tensor([index[text] for text in plain_captions(images.names, label)])
            for anchor, embedded in zip(anchors, embed_text(ids.to(job.device)), strict=True):
                anchor.append(F.normalize(embedded, dim=1).mean(0))
        test = to_model(images.test_images, config.image_size).to(job.device)
        outputs = in_chunks(students["tower"], test).split([dl, dg], dim=1)
        right = [
            (F.normalize(image, dim=1) @ torch.stack(anchor).T).argmax(1).cpu() == images.test_labels
            for image, anchor in zip(outputs, anchors, strict=True)
        ]
        return {f"zero_shot_{name}": r.float().mean().item() for name, r in zip("lg", right, strict=True)}

    def train() -> dict:
        fit(job.run, "clip", students, loss_of, recipe, job.seed)
        return zero_shot()

    results = finish_or_load(job, "clip", students, train)
    print(f"clip: by its caption alone, the class of {results['zero_shot_l']:.1%} (L) and "
          f"{results['zero_shot_g']:.1%} (G) of the test images is found")  # fmt: skip


def span_corruptions(rows: list[list[int]], sentinels: tuple[int, int], length: int) -> tuple[Tensor, Tensor]:
    """Every way to remove one span, of up to half its tokens, from each row of ids.

    Returns inputs (n, length), where the first sentinel stands for the span, and targets
    (n, length): that sentinel, the span, the second sentinel, end.
    """
    pad = lambda ids: (ids + [PAD] * length)[:length]  # noqa: E731
    inputs, targets = [], []
    for ids in rows:
        words = ids[:-1]  # without the end token
        for span in range(1, max(1, len(words) // 2) + 1):
            for start in range(len(words) - span + 1):
                inputs.append(pad([*words[:start], sentinels[0], *words[start + span :], END]))
                targets.append(pad([sentinels[0], *words[start : start + span], sentinels[1], END]))
    return torch.tensor(inputs), torch.tensor(targets)


def t5(job: Job, described: Described, text: TextEncoders) -> None:
    """Train T5 by span corruption, with a one-layer decoder that is thrown away afterwards."""
    config, recipe = job.config.text.t5, job.config.training.t5
    unigram = text.tokenizers.unigram
    rows = [unigram.encode(caption) for caption in described.captions.texts]
    sentinels = (unigram.sentinel(0), unigram.sentinel(1))
    inputs, targets = (ids.to(job.device) for ids in span_corruptions(rows, sentinels, config.length))
    students = build(job, "t5", lambda: nn.ModuleDict({
        "t5": text.t5,
        "decoder": nn.TransformerDecoderLayer(
            config.width, config.heads, config.hidden, dropout=0.0, batch_first=True
        ),
        "position": nn.Embedding(config.length, config.width),
        "output": nn.Linear(config.width, config.vocab, bias=False),
    }))  # fmt: skip
    causal = nn.Transformer.generate_square_subsequent_mask(config.length - 1, device=job.device)

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        i = draw_batch(len(inputs), recipe, generator).to(job.device)
        states = students["t5"](inputs[i])
        said, asked = targets[i, :-1], targets[i, 1:]
        y = students["t5"].encoder["embed_tokens"](said) + students["position"].weight[:-1]
        y = students["decoder"](y, states, tgt_mask=causal, tgt_is_causal=True)
        loss = F.cross_entropy(students["output"](y).flatten(0, 1), asked.flatten(), ignore_index=PAD)
        return loss, {}

    def train() -> dict:
        fit(job.run, "t5", students, loss_of, recipe, job.seed)
        tail = [entry["loss"] for entry in job.run.read_log("t5")[-20:]]
        return {"loss": sum(tail) / len(tail)}

    results = finish_or_load(job, "t5", students, train)
    print(f"t5: fills in removed words with a loss of {results['loss']:.2f} nats a piece "
          f"(a blind guess: {torch.tensor(config.vocab).log():.2f})")  # fmt: skip


def text_encoders(job: Job, described: Described) -> TextEncoders:
    """Tokenizers and the three encoders, trained, frozen and saved."""
    tokenizers = Tokenizers.train(described.captions.texts, job.config.text)
    text = build(job, "text", lambda: TextEncoders(job.config.text, tokenizers))
    clip(job, described, text)
    t5(job, described, text)
    write_json(job.run.folder / "tokenizers.json", tokenizers.to_json())
    save_weights(text, job.run.folder / "text.safetensors")
    return text.requires_grad_(False).eval()


# --- flow ---------------------------------------------------------------------------------------


def loss_by_time(losses: Tensor, t: Tensor) -> list[float | None]:
    """Mean loss in each of 8 equal intervals of t; None where there is no sample."""
    which = (t * BINS).long().clamp(max=BINS - 1)
    total = torch.zeros(BINS).index_add_(0, which, losses)
    count = torch.zeros(BINS).index_add_(0, which, torch.ones_like(losses))
    return [round(a / n, 4) if n else None for a, n in zip(total.tolist(), count.tolist(), strict=True)]


def flow(
    job: Job,
    described: Described,
    vae: AutoencoderKL,
    text: TextEncoders,
    watch: Callable[[int, nn.Module], None],
) -> MMDiT:
    """Train the transformer on cached latents and text features; returns its average (EMA)."""
    images, config, training = job.images, job.config, job.config.training
    recipe = training.flow
    model = build(job, "flow", lambda: MMDiT(config.mmdit))
    ema = make_ema(model)
    mean, std, context, pooled = (None,) * 4
    if "flow" not in job.run.stages:
        mean, std = encode_images(vae, images.train_images, config.image_size, job.device)
        context, pooled = text.encode(described.captions.texts)

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict]:
        i = draw_batch(len(mean), recipe, generator)
        u = torch.rand(recipe.batch, generator=generator)
        caption = described.captions.draw(images.train_labels[i], described.weight[i], described.slant[i], u)
        keep = torch.rand(recipe.batch, 3, generator=generator) >= training.encoder_dropout
        t = logit_normal(stratified(recipe.batch, generator), training.time_mean, training.time_std)
        noise, posterior = torch.randn(2, recipe.batch, *mean.shape[1:], generator=generator)

        i, caption, keep, t, noise = (x.to(job.device) for x in (i, caption, keep, t, noise))
        x0 = vae.normalise(mean[i] + std[i] * posterior.to(job.device))
        text_of_batch = drop_encoders(context[caption], pooled[caption], keep, config.text)
        losses = flow_loss(model(interpolate(x0, noise, t), t, *text_of_batch), x0, noise)
        return losses.mean(), {"by_time": loss_by_time(losses.detach().cpu(), t.cpu())}

    def train() -> dict:
        fit(job.run, "flow", model, loss_of, recipe, job.seed, ema, training.ema_decay,
            watch=lambda step: watch(step, ema))  # fmt: skip
        model.load_state_dict(ema.state_dict())
        return {"steps": recipe.steps}

    finish_or_load(job, "flow", model, train)
    return model
